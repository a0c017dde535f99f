"""Trains the reverser as any script does; it knows nothing of attncli.

python train_reverser.py                     # the loss becomes NaN
attncli nan-check train_reverser.py          # the same run, and where the NaN came from
attncli nan-check train_reverser.py --scaled # with 1/√D: trains on
"""

from __future__ import annotations

import sys

import torch
from reverser import Reverser, batch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

EPOCHS, BATCHES = 8, 10


def main() -> None:
    torch.manual_seed(0)
    model = Reverser(scaled="--scaled" in sys.argv[1:])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    columns = [torch.cat(column) for column in zip(*(batch() for _ in range(BATCHES)), strict=True)]
    loader = DataLoader(TensorDataset(*columns), batch_size=len(columns[0]) // BATCHES, shuffle=True)
    for epoch in range(1, EPOCHS + 1):
        for source_BS, target_BT, answer_BT in loader:
            loss = cross_entropy(model(source_BS, target_BT).flatten(0, 1), answer_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
