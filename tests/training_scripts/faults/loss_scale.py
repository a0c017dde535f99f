"""Mixed precision with a loss scaler: learns the distances between points; `--eps 0` gives no gradient at 0."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--eps", type=float, default=0.0)
args = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler("cpu")
points = torch.randn(12, 4)
for _ in range(60):
    with torch.autocast("cpu", dtype=torch.float16):
        embedded = model(points).float()
    differences = embedded[:, None] - embedded[None, :]
    distances = (differences.pow(2).sum(-1) + args.eps).sqrt()  # FAULT
    loss = (distances - torch.cdist(points, points)).pow(2).mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
