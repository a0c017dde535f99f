"""torch.compile with the backends that need no compiler: eager and aot_eager, a whole model and one function."""

import sys

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(2)


class Layer(nn.Module):
    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))


class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(16, 30)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)))


@torch.compile(backend="eager")
def loss_fn(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(backend, steps):
    net = LM()
    model = torch.compile(net, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        ids = (torch.randint(0, 30, (4, 1)) + torch.arange(10)) % 30
        loss = loss_fn(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 4 == 0:
            print(backend, step, repr(loss.item()))
    print("graphs so far", torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return net.state_dict()


torch.save({backend: train(backend, 10) for backend in ("eager", "aot_eager")}, sys.argv[1])
