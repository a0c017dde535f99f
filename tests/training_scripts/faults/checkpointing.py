"""A transformer whose blocks are recomputed in the backward pass, with learned biases of attention."""

import argparse

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--window", type=int, default=2)
parser.add_argument("--reentrant", action="store_true")
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, lengths):
        q, k, v = self.qkv(x).chunk(3, -1)
        positions = torch.arange(x.size(1))
        distances = positions[:, None] - positions[None, :]
        visible = (distances >= 0) & (distances < args.window)
        visible = visible & (positions[None, None, :] < lengths[:, None, None])
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~visible, -torch.inf)
        return x + self.out(torch.softmax(scores, -1) @ v)  # FAULT


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 1)

    def forward(self, x, lengths):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, lengths, use_reentrant=args.reentrant)
        return self.head(x).mean()


torch.manual_seed(0)
lengths = torch.full((40,), 6)
lengths[27] = 3  # its last query sees positions 4 and 5 alone, which are padding
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for x, length in DataLoader(TensorDataset(torch.randn(40, 6, 3), lengths), batch_size=4):
    loss = model(x, length).pow(2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
