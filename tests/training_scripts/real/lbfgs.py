"""LBFGS: step(closure) runs forward and backward several times within one step."""

import sys

import torch

torch.manual_seed(6)
x = torch.randn(40, 5, 8)
y = x.mean(1) @ torch.randn(8, 1)

attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
head = torch.nn.Linear(8, 1)
params = [*attention.parameters(), *head.parameters()]
optimizer = torch.optim.LBFGS(params, lr=0.5, max_iter=4, history_size=5, line_search_fn="strong_wolfe")
calls = 0


def closure():
    global calls
    calls += 1
    optimizer.zero_grad()
    loss = (head(attention(x, x, x)[0].mean(1)) - y).square().mean()
    loss.backward()
    return loss


for i in range(10):
    loss = optimizer.step(closure)
    print(f"{i}: {loss.item()!r} after {calls} evaluations")

torch.save([attention.state_dict(), head.state_dict()], sys.argv[1])
