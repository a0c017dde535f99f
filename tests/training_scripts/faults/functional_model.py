"""A model without a module: two matrices and functions, with a learning rule out of torch.optim."""

import sys

import torch
from torch.nn.functional import nll_loss

torch.manual_seed(0)
w1 = (torch.randn(6, 12) / 6**0.5).requires_grad_()
w2 = (torch.randn(12, 4) / 12**0.5).requires_grad_()
optimizer = torch.optim.SGD([w1, w2], lr=0.1)


def network(x):
    hidden = torch.tanh(x @ w1)
    return torch.softmax(hidden @ w2 * TEMPERATURE, dim=-1)


TEMPERATURE = 1.0
for step in range(1, 21):
    x = torch.randn(16, 6)
    labels = torch.randint(4, (16,))
    if step == 11:
        TEMPERATURE = float(sys.argv[1])
    loss = nll_loss(torch.log(network(x)), labels)  # FAULT
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
