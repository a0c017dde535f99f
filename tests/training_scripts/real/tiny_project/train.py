import os
import sys

import torch

from . import model as models
from .data import loader


def main(argv):
    target, *rest = argv
    print("arguments", rest, "package", __package__, "spec", __spec__.name, "name", __name__)
    print("program", os.path.basename(sys.argv[0]), "path", os.path.relpath(sys.path[0]))
    torch.manual_seed(4)
    net = models.Net()
    optimizer = torch.optim.RMSprop(net.parameters(), lr=1e-3)
    for epoch in range(2):
        for x, y in loader(epoch):
            loss = (net(x) - y).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("epoch", epoch, repr(loss.item()))
    torch.save(net.state_dict(), target)


if __name__ == "__main__":
    main(sys.argv[1:])
