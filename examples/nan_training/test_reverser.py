"""A test that guards a model in CI: one training step of it gives no NaN and no Inf, in float32 and under autocast.

pytest examples/nan_training
"""

from __future__ import annotations

import pytest
import torch
from reverser import batch, build
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attncli


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast-bfloat16"])
def test_a_training_step_is_finite(dtype: torch.dtype | None) -> None:
    model = build().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def step(model: nn.Module) -> Tensor:
        source_BS, target_BT, answer_BT = batch()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits_BTV = model(source_BS, target_BT)
        loss = cross_entropy(logits_BTV.float().flatten(0, 1), answer_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    report = attncli.nan_check(model, step)
    assert report.exit_code() == 0, report
