"""A stream of text without length or indices, packed into batches by the loader."""

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

EMPTY = int(sys.argv[1])


class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(5)
        for number in range(60):
            tokens = torch.randint(1, 20, (7,), generator=generator)
            labels = tokens.roll(-1)
            labels[-1] = -100
            if number // 4 == EMPTY:
                labels[:] = -100
            yield {"input_ids": tokens, "labels": labels}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}  # FAULT


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for batch in DataLoader(Stream(), batch_size=4):
    loss = model(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
