"""A smooth hinge with `where`: the branch that is not taken overflows, which only its gradient shows."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--safe", action="store_true")
args = parser.parse_args()


class Hazard(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        rate = self.linear(x)
        inside = rate.clamp(max=5) if args.safe else rate
        return torch.where(rate < 5, torch.exp(inside), rate)  # FAULT


torch.manual_seed(0)
model = Hazard()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
for step in range(20):
    x = torch.randn(6, 3)
    if step == 12:
        x[4] = 200 * model.linear.weight.detach().sign()[0]
    loss = (model(x) - 1).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
