"""A learned weight under a root, and clipping: one gradient of Inf makes the norm Inf, and all others 0."""

import sys

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_


class Gate(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        self.body = nn.Linear(4, 4)
        self.strength = nn.Parameter(torch.tensor([0.4]))

    def forward(self, x):
        return self.body(x) + self.strength.clamp(min=0).add(self.eps).sqrt() * x.abs()  # FAULT


torch.manual_seed(0)
model = Gate(float(sys.argv[1]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(30):
    x = torch.randn(8, 4)
    if step == 14:
        with torch.no_grad():
            model.strength.zero_()  # pruned
    loss = (model(x) - x).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
