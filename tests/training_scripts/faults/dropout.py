"""A norm of what dropout left, divided by; with much dropout it leaves nothing of a row, sometimes."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--dropout", type=float, default=0.5)
args = parser.parse_args()


class Unit(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)  # FAULT


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(args.dropout), Unit(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loader = DataLoader(TensorDataset(torch.randn(128, 5)), batch_size=4, shuffle=True)
for _ in range(2):
    for (x,) in loader:
        loss = (model(x) - x.mean(1, keepdim=True)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
