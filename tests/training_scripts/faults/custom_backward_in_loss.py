"""A straight-through quantiser as an autograd function of one's own, used in the loss outside the model."""

import sys

import torch
from torch import nn

LEVELS_AT_8 = int(sys.argv[1])


class Quantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, levels):
        ctx.levels = levels
        return torch.round(x * levels.clamp(min=1)) / levels.clamp(min=1)  # FAULT

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.levels / ctx.levels, None  # FAULT


torch.manual_seed(0)
model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
for step in range(1, 13):
    x = torch.randn(8, 4)
    levels = torch.tensor(float(LEVELS_AT_8 if step == 8 else 16))
    loss = (Quantise.apply(model(x), levels) - x).pow(2).mean()  # FAULT
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
