"""Two losses with a backward pass each, and a running codebook that the module itself writes to."""

import sys

import torch
from torch import nn

DECAY = float(sys.argv[1])


class Codebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("counts", torch.ones(4))

    def forward(self, x):
        nearest = (x[:, None] - self.codes).pow(2).sum(-1).argmin(1)
        chosen = nn.functional.one_hot(nearest, 4).float()
        with torch.no_grad():
            self.counts.mul_(DECAY).add_(chosen.sum(0), alpha=1 - DECAY)
            sums = chosen.t() @ x.detach()
            means = sums / self.counts[:, None]  # FAULT
            self.codes.lerp_(means, 1 - DECAY)
        return self.codes[nearest] + x - x.detach()


torch.manual_seed(0)
encoder, codebook, decoder = nn.Linear(3, 3), Codebook(), nn.Linear(3, 3)
optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.01)
for step in range(10):
    x = torch.randn(16, 3)
    if step >= 5:
        x[:, 0] = x[:, 0].abs() + 5  # all in one cell
    hidden = encoder(x)
    quantised = codebook(hidden)
    commitment = (hidden - quantised.detach()).pow(2).mean()
    reconstruction = (decoder(quantised) - x).pow(2).mean()
    optimizer.zero_grad()
    commitment.backward(retain_graph=True)
    reconstruction.backward()
    optimizer.step()
