"""A model that was made float16 by .half(), and Adam with an eps from the command line."""

import sys

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1)).half()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=float(sys.argv[1]))
for _ in range(6):
    x = torch.randn(16, 6).half()
    loss = (model(x).float() - x.float().mean(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # FAULT
