"""A tiny language model with a schedule of learning rates read from the command line: STEP:RATE,STEP:RATE,…"""

import sys

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

schedule = dict(part.split(":") for part in sys.argv[1].split(","))


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.wi, self.wo = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.wo(F.gelu(self.wi(x)))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 20)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


torch.manual_seed(0)
model = LanguageModel()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
text = torch.randint(20, (500,))
for step in range(1, 41):
    for group in optimizer.param_groups:
        group["lr"] = float(schedule.get(str(step), 0.05))
    starts = torch.randint(len(text) - 9, (4,))
    tokens = torch.stack([text[start : start + 9] for start in starts])
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
