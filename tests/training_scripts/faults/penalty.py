"""A gradient penalty, with the double backward that it needs; where the critic is flat its root has no gradient."""

import sys

import torch
from torch import nn

FLAT_AT = int(sys.argv[1])
torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
for step in range(12):
    x = torch.randn(8, 2, requires_grad=True)
    scores = critic(x * (0 if step == FLAT_AT else 1))
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    slope = gradient.pow(2).sum(1).sqrt()  # FAULT
    loss = scores.mean() + 10 * (slope - 1).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
