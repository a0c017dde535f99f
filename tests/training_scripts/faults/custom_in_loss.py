"""A signed logarithm as an autograd function of one's own, used in the loss outside the model."""

import sys

import torch
from torch import nn


class SignedLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift):
        ctx.save_for_backward(x)
        ctx.shift = shift
        return x.sign() * torch.log(x.abs() + shift)  # FAULT

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (x.abs() + max(ctx.shift, 0.1)), None


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(12):
    x = torch.randn(8, 4)
    error = model(x) - x[:, :2]
    if step == 7:
        error = error * torch.tensor([1.0, 0.0])
    loss = SignedLog.apply(error, float(sys.argv[1])).pow(2).mean()  # FAULT
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
