"""Trains until the loss is no number any more, and asks attncli why.

python until_nan.py            # without 1/√D: NaN after a few epochs, and the reason
python until_nan.py --scaled   # with it: trains on
"""

from __future__ import annotations

import copy
import sys

import torch
from reverser import Reverser, batch
from torch import nn
from torch.nn.functional import cross_entropy

import attncli

EPOCHS, BATCHES, LEARNING_RATE = 12, 10, 2e-3


def main(scaled: bool = False) -> attncli.Report | None:
    """The report on the first epoch whose loss is not finite; None where training went through."""
    torch.manual_seed(0)
    model = Reverser(scaled)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def epoch(model: nn.Module) -> torch.Tensor:
        for _ in range(BATCHES):
            source_BS, target_BT, answer_BT = batch()
            loss = cross_entropy(model(source_BS, target_BT).flatten(0, 1), answer_BT.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss

    for number in range(1, EPOCHS + 1):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        loss = epoch(model)
        print(f"epoch {number}: loss {loss.item():.4f}")
        if not torch.isfinite(loss):
            # The same epoch once more, from where it began, under the eyes of attncli.
            model.load_state_dict(before[0])
            optimizer.load_state_dict(before[1])
            torch.set_rng_state(before[2])
            return attncli.nan_check(model, epoch)
    return None


if __name__ == "__main__":
    report = main(scaled="--scaled" in sys.argv[1:])
    if report is not None:
        print(report)
        sys.exit(report.exit_code())
