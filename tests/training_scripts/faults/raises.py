"""Ends in its own way: by an exit code, or by an error, after some steps."""
# ruff: noqa: T201

import sys

import torch
from torch import nn


def train(steps):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}")


torch.manual_seed(0)
train(3)
if sys.argv[1] == "raise":
    raise KeyError("out of ideas")
sys.exit(int(sys.argv[1]))
