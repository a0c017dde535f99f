"""A binary classifier in bfloat16: 1 − p is 0 long before it would be in float32."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()

torch.manual_seed(0)
scorer = nn.Sequential(nn.Linear(6, 1), nn.Sigmoid())
optimizer = torch.optim.SGD(scorer.parameters(), lr=2.0)
x = torch.randn(64, 6)
wanted = (x.sum(1) > 0).float()
x[20] = x[20].sign() * 4
wanted[20] = (x[20].sum() <= 0).float()
for _ in range(60):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
        p = scorer(x).squeeze(-1)
        loss = -(wanted * torch.log(p) + (1 - wanted) * torch.log(1 - p)).mean()  # FAULT
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
