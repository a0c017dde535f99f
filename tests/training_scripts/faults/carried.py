"""Truncated backpropagation through time: the state is carried from step to step, and nothing keeps it small."""

import sys

import torch
from torch import nn

GAIN = float(sys.argv[1])


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward = nn.Linear(3, 6)

    def forward(self, x, state):
        return state * GAIN + torch.sigmoid(self.inward(x))  # FAULT


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.outward = Cell(), nn.Linear(6, 1)

    def forward(self, x, state):
        for inputs in x.unbind(1):
            state = self.cell(inputs, state)
        return self.outward(torch.log1p(state)), state


torch.manual_seed(0)
model = Recurrent()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
state = torch.ones(4, 6)
for _ in range(16):
    prediction, state = model(torch.randn(4, 2, 3), state.detach())
    loss = (prediction - 1).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
