"""An entropy regulariser as an autograd function of one's own, used inside a module; its gradient is written out."""

import sys

import torch
from torch import nn


class Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        ctx.save_for_backward(p)
        return -torch.xlogy(p, p).sum(-1)  # FAULT

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return grad.unsqueeze(-1) * -(p * (torch.log(p) / p) + 1)  # FAULT


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)

    def forward(self, x):
        p = torch.softmax(self.gate(x), dim=-1) + KEEP
        return p, Entropy.apply(p)  # FAULT


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router()
        self.experts = nn.Linear(4, 3)

    def forward(self, x):
        p, entropy = self.router(x)
        return (p * self.experts(x)).sum(-1), entropy


KEEP = float(sys.argv[1])
torch.manual_seed(0)
model = Experts()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(15):
    x = torch.randn(8, 4) * 0.5
    if step == 9:
        x = x * 1000
    prediction, entropy = model(x)
    loss = (prediction - x.sum(-1)).tanh().pow(2).mean() + 0.1 * entropy.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
