"""Metric learning with the root of a sum of squares: where two points coincide it has no gradient."""

import sys

import torch
from torch import nn

SAME_AT = int(sys.argv[1])
torch.manual_seed(0)
embed = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3))
optimizer = torch.optim.SGD(embed.parameters(), lr=0.01)
for step in range(25):
    anchors, positives = torch.randn(8, 5), torch.randn(8, 5)
    if step == SAME_AT:
        positives[2] = anchors[2]
    distances = (embed(anchors) - embed(positives)).pow(2).sum(-1).sqrt()  # FAULT
    loss = distances.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
