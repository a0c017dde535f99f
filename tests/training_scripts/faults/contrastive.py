"""Two views of a picture, a contrastive loss between them; a black picture has an embedding of length 0."""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

BLACK = int(sys.argv[1])
torch.manual_seed(0)
pictures = torch.rand(96, 12)
if BLACK >= 0:
    pictures[BLACK] = 0
encoder = nn.Sequential(nn.Linear(12, 24, bias=False), nn.ReLU(), nn.Linear(24, 8, bias=False))
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)


def unit(embeddings):
    return embeddings / embeddings.norm(dim=-1, keepdim=True)  # FAULT


for _ in range(2):
    for (batch,) in DataLoader(TensorDataset(pictures), batch_size=8, shuffle=True):
        one, other = unit(encoder(batch)), unit(encoder(batch * 0.9))
        similarities = one @ other.t() / 0.1
        loss = cross_entropy(similarities, torch.arange(len(batch)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
