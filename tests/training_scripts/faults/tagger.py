"""A tagger of tokens: documents without a single label, or with a label that no class has, may be among them."""
# ruff: noqa: T201

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

parser = argparse.ArgumentParser()
parser.add_argument("--unlabelled", type=int, default=None, metavar="DOCUMENT")
parser.add_argument("--mislabelled", type=int, default=None, metavar="DOCUMENT")
args = parser.parse_args()

TAGS, LENGTH = 5, 6

torch.manual_seed(0)
documents = [
    {"tokens": torch.randint(50, (LENGTH,)), "tags": torch.randint(TAGS, (LENGTH,))} for _ in range(40)
]
if args.unlabelled is not None:
    # The batch of this document, 2 documents a batch, has no label at all.
    first = args.unlabelled // 2 * 2
    documents[first]["tags"] = documents[first + 1]["tags"] = torch.full((LENGTH,), -100)
if args.mislabelled is not None:
    documents[args.mislabelled]["tags"][3] = TAGS

model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, TAGS))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
loader = DataLoader(documents, batch_size=2)
for epoch in range(2):
    for batch in loader:
        optimizer.zero_grad()
        logits = model(batch["tokens"])
        loss = cross_entropy(logits.reshape(-1, TAGS), batch["tags"].reshape(-1))  # FAULT
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: done")
