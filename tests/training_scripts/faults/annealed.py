"""A temperature in a buffer, which each forward pass lowers a little; it meets 0 on its way."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("by", type=float)
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()


class Annealed(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
        self.register_buffer("temperature", torch.tensor(2.0))

    def forward(self, logits):
        if self.training:
            self.temperature.sub_(self.by)
        return logits / self.temperature  # FAULT


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 5), Annealed(args.by))
if args.compile:
    model = torch.compile(model, backend="eager")
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(12):
    x = torch.randn(6, 5)
    loss = nn.functional.cross_entropy(model(x), x.argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
