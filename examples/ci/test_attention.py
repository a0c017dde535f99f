"""Tests that guard the attention of a model; the fixture `check_attention` comes with attncli.

pytest examples/ci
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attncli.pytest_plugin import CheckAttention

DATES = Path(__file__).parents[1] / "dates" / "model.py"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_sound_in_every_dtype(check_attention: CheckAttention, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, batch_first=True, dtype=dtype)  # yours
    padding_BT = torch.arange(16) >= torch.tensor([[16], [9]])
    check_attention(model, torch.randn(2, 16, 64, dtype=dtype), src_key_padding_mask=padding_BT)


def test_the_decoder_looks_at_the_source_and_its_scores_are_small(check_attention: CheckAttention) -> None:
    report = check_attention(
        f"{DATES}:build",
        input=f"{DATES}:batch",
        expect=["heads=4,head_dim=16", "decoder.*.encoder_attn:kind=cross"],
        fail_on="warning",
    )
    scores = [row.value for row in report.measurements if row.metric == "score_max"]
    assert len(scores) == 24
    assert all(isinstance(score, float) and score < 50 for score in scores)
