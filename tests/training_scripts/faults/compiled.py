"""A compiled model; the feed-forward layer squares its activations."""

import sys

import torch
from torch import nn


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.wo(torch.relu(self.wi(x)).pow(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(4), Squared()

    def forward(self, x, scale):
        return x + self.body(self.norm(x)) / scale.sum()  # FAULT


torch.manual_seed(0)
net = torch.compile(Net(), backend="eager")
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(1, 13):
    x = torch.randn(8, 4)
    scale = torch.full((4,), float(sys.argv[1]) if step == 9 else 1.0)
    loss = (net(x, scale) - x.flip(1)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
