"""Infinities and NaN that a healthy run is full of: masks, an eval loss, early stopping, logged numbers."""
# ruff: noqa: T201

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
embedding, layer, head = (
    nn.Embedding(12, 16),
    nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
    nn.Linear(16, 12),
)
parameters = [*embedding.parameters(), *layer.parameters(), *head.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
causal = torch.triu(torch.full((6, 6), float("-inf")), diagonal=1)
tokens = torch.randint(12, (48, 6))
best = float("inf")
for epoch in range(3):
    for (batch,) in DataLoader(TensorDataset(tokens), batch_size=8, shuffle=True):
        logits = head(layer(embedding(batch), src_mask=causal))
        top = logits.topk(6).values[..., -1:]
        loss = cross_entropy(logits.masked_fill(logits < top - 50, -math.inf).flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = head(layer(embedding(tokens), src_mask=causal))
        perplexity = (logits.sum() * 1e4).exp().abs() + math.inf
        correlation = torch.corrcoef(torch.stack([torch.ones(6), torch.arange(6.0)]))[0, 1]
    print(f"epoch {epoch} eval {perplexity.item()} correlation {correlation.item()} best {best}")
    best = min(best, loss.item())
