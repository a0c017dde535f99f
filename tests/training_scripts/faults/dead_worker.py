"""A worker of the data loader that is killed, as one that runs out of memory is."""
# ruff: noqa: T201

import os
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

LAST = int(sys.argv[1])


class Pictures(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == LAST:
            time.sleep(0.5)
            os._exit(9)
        return torch.full((4,), float(index)) / 40


def main():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, x in enumerate(DataLoader(Pictures(), batch_size=4, num_workers=1)):
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} done", flush=True)


if __name__ == "__main__":
    main()
