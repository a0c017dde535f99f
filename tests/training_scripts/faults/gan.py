"""A generator and a discriminator, each with an optimiser of its own; the losses are those of the first paper."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--eps", type=float, default=0.0)
args = parser.parse_args()

torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
discriminator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
g_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)


def log(probability):
    return torch.log(probability + args.eps)  # FAULT


for step in range(20):
    real = torch.randn(8, 2) + 3
    if step == 13:
        with torch.no_grad():  # hard examples
            candidates = torch.randn(64, 2) * 1e5
            real[5] = candidates[discriminator(candidates).argmin()]
    fake = generator(torch.randn(8, 2))
    d_optimizer.zero_grad()
    d_loss = -(log(discriminator(real)) + log(1 - discriminator(fake.detach()))).mean()
    d_loss.backward()
    d_optimizer.step()
    g_optimizer.zero_grad()
    g_loss = -log(discriminator(fake)).mean()
    g_loss.backward()
    g_optimizer.step()
