"""Warm-up with batch statistics, then the norms are frozen. Losses that are no number are skipped in the warm-up."""

import sys

import torch
from torch import nn

BAD_AT = int(sys.argv[1])
WARM_UP = 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.relu(self.bn(self.first(x))))


torch.manual_seed(0)
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for iteration in range(20):
    x = torch.randn(16, 4)
    if iteration == BAD_AT:
        x[3, 2] = float("nan")
    if iteration == WARM_UP:
        net.bn.eval()
    loss = (net(x) - x.sum(1, keepdim=True)).pow(2).mean()
    if iteration < WARM_UP and not torch.isfinite(loss):
        continue
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
