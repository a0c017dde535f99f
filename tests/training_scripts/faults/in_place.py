"""A model that normalises its input in place: the batch is no longer what it was when the loader gave it."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SILENT = int(sys.argv[1])


class Loudness(nn.Module):
    def forward(self, sound):
        return sound.div_(sound.abs().amax(-1, keepdim=True))  # FAULT


torch.manual_seed(0)
sounds = torch.randn(64, 10)
if SILENT >= 0:
    sounds[SILENT] = 0
model = nn.Sequential(Loudness(), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for (sound,) in DataLoader(TensorDataset(sounds), batch_size=8):
    loss = model(sound).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
