"""A classifier of sentences with masked self-attention; a sentence may be empty, which is all padding."""

import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

EMPTY = {int(word) for word in sys.argv[1:]}


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, mask):
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.size(-1) ** 0.5
        scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
        weights = scores.softmax(dim=-1)  # FAULT
        return weights @ self.value(x)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16, padding_idx=0)
        self.layers = nn.ModuleList([SelfAttention(16), SelfAttention(16)])
        self.output = nn.Linear(16, 3)

    def forward(self, tokens):
        mask = tokens != 0
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.output(x.mean(1))


def collate(samples):
    tokens = pad_sequence([tokens for tokens, _ in samples], batch_first=True)
    return tokens, torch.tensor([label for _, label in samples])


torch.manual_seed(3)
samples = []
for number in range(120):
    length = 0 if number in EMPTY else int(torch.randint(2, 7, ()))
    samples.append((torch.randint(1, 30, (length,)), number % 3))
loader = DataLoader(samples, batch_size=6, shuffle=True, collate_fn=collate)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
for _ in range(2):
    for tokens, labels in loader:
        optimizer.zero_grad()
        criterion(model(tokens), labels).backward()
        optimizer.step()
