"""Thousands of rows of features from a sensor, one of which may be broken; shuffled batches."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

parser = argparse.ArgumentParser()
parser.add_argument("--broken", type=int, default=None, metavar="ROW")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--epochs", type=int, default=1)
args = parser.parse_args()


class Sensor(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(3000, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        if args.broken is not None:
            self.x[args.broken, 5] = float("inf")

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return self.x[row], self.y[row]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, features):
        return self.second(torch.tanh(self.first(features)))


def main():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Sensor(), batch_size=16, shuffle=True, num_workers=args.workers)
    for _ in range(args.epochs):
        for x, y in loader:
            loss = ((model(x) - y) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
