"""Random windows out of one long series, without a data loader, as in nanoGPT."""

import sys

import torch
from torch import nn

BROKEN = int(sys.argv[1])
batch_size, block_size = 4, 8


def get_batch():
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([data[i : i + block_size] for i in ix])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in ix])
    return x, y


torch.manual_seed(1337)
data = torch.sin(torch.arange(2000) / 10)
if BROKEN >= 0:
    data[BROKEN] = float("nan")
model = nn.Sequential(nn.Linear(block_size, 16), nn.GELU(), nn.Linear(16, block_size))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(120):
    X, Y = get_batch()
    loss = nn.functional.mse_loss(model(X), Y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
