"""Logistic regression by LBFGS, which asks for the loss several times a step."""

import sys

import torch
from torch import nn

WEIGHT_AT_4 = float(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(40, 3)
y = (x.sum(1) > 0).float()
model = nn.Linear(3, 1)
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
for step in range(1, 7):
    weights = torch.ones(40) * (WEIGHT_AT_4 if step == 4 else 1)

    def closure(weights=weights):
        optimizer.zero_grad()
        losses = nn.functional.binary_cross_entropy_with_logits(model(x).squeeze(-1), y, reduction="none")
        loss = (losses * weights).sum() / weights.sum()  # FAULT
        loss.backward()
        return loss

    optimizer.step(closure)
