"""Rows of rewards, averaged over the tokens that count; a batch may have none."""

import os

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def masked_mean(values, mask):
    total = (values * mask).sum()
    return total / mask.sum().clamp(min=1 if "MIN_TOKENS" in os.environ else 0)  # FAULT


torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
states = torch.randn(64, 5, 6)
counts = torch.ones(64, 5)
counts[36:40] = 0
loader = DataLoader(TensorDataset(states, counts), batch_size=4)
for _ in range(2):
    for batch, mask in loader:
        loss = masked_mean(policy(batch).squeeze(-1).pow(2), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
