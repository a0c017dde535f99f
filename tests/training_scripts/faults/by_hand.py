"""A binary classifier whose loss is written by hand; it becomes so sure of a class that sigmoid is 1."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--clamp", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
classifier = nn.Linear(4, 1)
optimizer = torch.optim.SGD(classifier.parameters(), lr=0.5)


def binary_cross_entropy(logits, targets):
    probability = torch.sigmoid(logits)
    if args.clamp:
        probability = probability.clamp(1e-6, 1 - 1e-6)
    return -(targets * torch.log(probability) + (1 - targets) * torch.log(1 - probability)).mean()  # FAULT


for step in range(30):
    x = torch.randn(32, 4)
    targets = (x[:, :1] > 0).float()
    if step == 17:
        x[11] *= 500  # an outlier: its logit is in the hundreds
        targets[11] = 1 - (classifier(x[11]) > 0).float().detach()
    loss = binary_cross_entropy(classifier(x), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
