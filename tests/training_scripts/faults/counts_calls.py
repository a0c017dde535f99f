"""A module that counts its calls in a plain attribute, and goes wrong at one of them."""

import sys

import torch
from torch import nn

ODD = int(sys.argv[1])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) / (0.0 if self.calls == ODD else 1.0)  # FAULT


torch.manual_seed(0)
layer = Layer()
optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
for _ in range(12):
    x = torch.randn(6, 4)
    loss = (layer(x) - x).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
