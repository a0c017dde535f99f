"""Training and validation in turn; noise on the training images grows from epoch to epoch, until it divides by 0."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

LEVELS = [float(level) for level in sys.argv[1].split(",")]


class Noisy(Dataset):
    def __init__(self, x):
        self.x, self.level = x, 0.0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        level = self.level if index == 19 else 0.0
        return self.x[index] / (1 - level)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
images = Noisy(torch.randn(48, 6))
training = DataLoader(images, batch_size=8, shuffle=True)
validation = DataLoader(TensorDataset(torch.randn(16, 6)), batch_size=8)
for level in LEVELS:
    images.level = level
    for x in training:
        loss = (model(x) - x).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for (x,) in validation:
            model(x)
