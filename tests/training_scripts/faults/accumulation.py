"""Four micro-batches to a step of the optimiser; one of them may be bad."""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--zero-row", type=int, default=None)
args = parser.parse_args()

ACCUMULATE = 4


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(3, 6))

    def forward(self, x):
        x = x / x.pow(2).sum(-1, keepdim=True).sqrt()  # FAULT
        return x @ self.prototypes.t()


torch.manual_seed(0)
rows, labels = torch.randn(80, 6), torch.randint(3, (80,))
if args.zero_row is not None:
    rows[args.zero_row] = 0
model = nn.Sequential(Cosine(), nn.Linear(3, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
loader = DataLoader(TensorDataset(rows, labels), batch_size=2)
for number, (x, y) in enumerate(loader):
    loss = nn.functional.cross_entropy(model(x), y) / ACCUMULATE
    loss.backward()
    if (number + 1) % ACCUMULATE == 0:
        optimizer.step()
        optimizer.zero_grad()
