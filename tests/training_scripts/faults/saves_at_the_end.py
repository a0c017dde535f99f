"""Saves its weights whatever happens, as careful scripts do; some steps may go wrong."""
# ruff: noqa: T201

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--bad", choices=("loss", "gradient", "parameter", "nothing"), default="nothing")
parser.add_argument("--at", type=int, default=7)
parser.add_argument("--steps", type=int, default=12)
args = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
try:
    for step in range(1, args.steps + 1):
        x = torch.randn(16, 4)
        bad = args.bad if step == args.at else "nothing"
        error = model(x) - x
        loss = error.pow(2).mean()
        if bad == "loss":
            loss = loss + torch.log(loss.detach() * 0)
        if bad == "gradient":
            loss = loss + (error * 0).pow(2).sum().sqrt()
        if bad == "parameter":
            optimizer.param_groups[0].update(lr=float("inf"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print("trained")
finally:
    torch.save(model.state_dict(), args.out)
