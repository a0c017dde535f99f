"""A branch that no optimiser steps gets gradients of NaN, which nobody looks at; and numbers that are only logged."""

import torch
from torch import nn


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained, self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        zero = self.kept(x) * 0
        return self.trained(x) + zero.pow(2).sum(-1, keepdim=True).sqrt()


torch.manual_seed(0)
model = TwoBranches()
optimizer = torch.optim.SGD(model.trained.parameters(), lr=0.01)
for _ in range(20):
    x = torch.randn(8, 4)
    loss = (model(x) - x).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert not torch.isfinite(model.kept.weight.grad).any()
assert torch.isfinite(model.trained.weight).all()
