"""A loop that fetches the next batch before it trains on this one, as prefetchers do."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ZERO = int(sys.argv[1])
torch.manual_seed(0)
rows = torch.rand(60, 5) + 0.1
if ZERO >= 0:
    rows[ZERO] = 0
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
batches = iter(DataLoader(TensorDataset(rows), batch_size=4))
following = next(batches)
while following is not None:
    (x,) = following
    following = next(batches, None)
    x = x / x.sum(1, keepdim=True)  # FAULT
    loss = (model(x) - x.amax(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
