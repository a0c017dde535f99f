"""A loss scaler that starts far too high: it may skip some steps and recover, or have no room to."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--weight", type=float, default=1.0, help="of the loss")
parser.add_argument("--init-scale", type=float, default=65536.0)
args = parser.parse_args()

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3 / args.weight)
scaler = torch.amp.GradScaler("cpu", init_scale=args.init_scale, growth_interval=1000)
for _ in range(40):
    x = torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.float16):
        prediction = model(x)
    loss = args.weight * (prediction.float() - x[:, :4]).abs().sum()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
