"""Self-attention without a norm before it: its scores grow with the signal, heads become one-hot, float16 ends."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--normed", action="store_true", help="normalise what queries and keys are made of")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

WIDTH, HEADS, TOKENS, STEPS = 64, 2, 8, 140


class Attention(nn.Module):
    """Queries and keys share their projection."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False) if args.normed else nn.Identity()
        self.shared, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        shared = self.norm(self.shared(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        values = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        scores = shared * (WIDTH // HEADS) ** -0.5 @ shared.transpose(-1, -2)  # FAULT
        mixed = torch.softmax(scores, dim=-1) @ values
        return self.shared(x) + self.value(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


torch.manual_seed(0)
level = torch.randint(0, 2, (WIDTH,)) * 2.0 - 1.0
x = level + 0.1 * torch.randn(4, TOKENS, WIDTH)
model = Model()
if args.compile:
    model = torch.compile(model, backend="eager")
optimizer = torch.optim.Adam(model.parameters(), lr=0.0125)
for _ in range(STEPS):
    with torch.autocast("cpu", dtype=torch.float16):
        y = model(x)
    loss = (y.float() - 400 * x).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
