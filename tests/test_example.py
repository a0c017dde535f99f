"""The example model that ships with attncli: its weights, its attention, and the script that trained it."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

FOLDER = Path(__file__).parents[1] / "examples" / "dates"

# All of them are days on which the model was never trained; a test below holds that.
WRITTEN_BY_HAND = [
    ("3rd of May 1998", "1998-05-03"),
    ("May 3, 1998", "1998-05-03"),
    ("Sunday 3 May 98", "1998-05-03"),
    ("3.5.1998", "1998-05-03"),
    ("the 3rd of may, 1998", "1998-05-03"),
    ("5/3/1998", "1998-05-03"),
    ("19980503", "1998-05-03"),
    ("3-May-98", "1998-05-03"),
    ("May 3 '98", "1998-05-03"),
    ("Wednesday, the 23rd of September, 2026", "2026-09-23"),
    ("February 29, 2012", "2012-02-29"),
    ("31. December 1971", "1971-12-31"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time where threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_file() -> Iterator[Any]:
    yield from imported("model")


@pytest.fixture(scope="module")
def train_file(model_file: Any) -> Iterator[Any]:
    yield from imported("train")


@pytest.fixture(scope="module")
def shipped(model_file: Any) -> nn.Module:
    model: nn.Module = model_file.build()
    return model


def imported(name: str) -> Iterator[Any]:
    """A module of the example by its bare name, as its own script sees it; gone again after the tests."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        sys.modules.pop(name, None)


def test_the_shipped_weights_are_below_one_megabyte_and_name_their_heads() -> None:
    weights = FOLDER / "dates.safetensors"
    assert weights.stat().st_size < 1_000_000
    with safe_open(weights, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        rows, columns = file.get_slice("decoder.layers.1.encoder_attn.q_proj.weight").get_shape()
    assert rows == columns == config["d_model"] == 64
    assert config["num_attention_heads"] == 4


def test_build_returns_the_shipped_weights_in_evaluation_mode(model_file: Any) -> None:
    first, second = model_file.build(), model_file.build()
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with safe_open(FOLDER / "dates.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(first.state_dict())
        assert torch.equal(file.get_tensor("lm_head.weight"), first.lm_head.weight)


@pytest.mark.parametrize(("text", "iso"), WRITTEN_BY_HAND)
def test_a_date_written_by_hand_is_translated(model_file: Any, text: str, iso: str) -> None:
    assert model_file.translate(text) == iso


def test_the_dates_written_by_hand_were_never_trained_on(train_file: Any) -> None:
    days = {date.fromisoformat(iso) for _, iso in WRITTEN_BY_HAND}
    assert days <= set(train_file.HELD_OUT_DAYS)
    assert not set(train_file.HELD_OUT_DAYS) & set(train_file.TRAINING_DAYS)


def test_held_out_days_are_translated_exactly(train_file: Any, shipped: nn.Module) -> None:
    pairs = train_file.written_dates(train_file.HELD_OUT_DAYS, 500, random.Random(7))
    assert train_file.accuracy(shipped, pairs) >= 0.98


def test_accuracy_counts_only_texts_that_are_right_in_every_character(
    train_file: Any, shipped: nn.Module
) -> None:
    right, wrong = ("3.5.1998", "1998-05-03"), ("3.5.1998", "1998-05-04")
    assert train_file.accuracy(shipped, [right, wrong, right, right]) == 0.75


def test_batch_has_real_padding_and_fits_forward(model_file: Any, shipped: nn.Module) -> None:
    batch = model_file.batch()
    lengths = (batch["input_ids"] != model_file.PAD).sum(dim=1)
    assert len(set(lengths.tolist())) > 2
    logits_BTV = shipped(**batch)
    assert logits_BTV.shape == (4, 10, model_file.Config().vocab_size)
    written = [model_file.decode(ids_T) for ids_T in logits_BTV.argmax(dim=2)]
    assert written == ["1998-05-03", "1998-05-03", "1998-05-03", "1998-04-01"]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_written_out_attention_equals_fused_attention(
    model_file: Any, shipped: nn.Module, layer: int
) -> None:
    attention: Any = shipped.get_submodule(f"decoder.layers.{layer}.encoder_attn")
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        decoder_hidden_BTE, encoder_outputs_BSE, visible_BS = inputs
        q_BHTD = attention.heads(attention.q_proj(decoder_hidden_BTE))
        k_BHSD = attention.heads(attention.k_proj(encoder_outputs_BSE))
        v_BHSD = attention.heads(attention.v_proj(encoder_outputs_BSE))
        fused_BHTD = scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, visible_BS[:, None, None, :])
        seen["fused"], seen["written out"] = attention.output(fused_BHTD), output

    handle = attention.register_forward_hook(keep)
    try:
        shipped(**model_file.batch())
    finally:
        handle.remove()
    torch.testing.assert_close(seen["written out"], seen["fused"], atol=1e-5, rtol=1e-5)


def test_the_decoder_does_not_look_ahead(model_file: Any, shipped: nn.Module) -> None:
    batch = model_file.batch()
    changed = {**batch, "decoder_input_ids": batch["decoder_input_ids"].clone()}
    changed["decoder_input_ids"][:, 6:] = model_file.START
    before_BTV, after_BTV = shipped(**batch), shipped(**changed)
    torch.testing.assert_close(before_BTV[:, :6], after_BTV[:, :6])
    assert not torch.allclose(before_BTV[:, 6:], after_BTV[:, 6:])


def test_padding_does_not_change_the_logits(model_file: Any, shipped: nn.Module) -> None:
    batch = model_file.batch()
    together_BTV = shipped(**batch)
    for i, (ids_S, target_T) in enumerate(zip(batch["input_ids"], batch["decoder_input_ids"], strict=True)):
        alone_1TV = shipped(ids_S[ids_S != model_file.PAD][None], target_T[None])
        torch.testing.assert_close(together_BTV[i], alone_1TV[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["", "3 мая 1998", "3 May 1998" + " " * 31])
def test_a_text_outside_the_alphabet_or_the_length_is_refused(model_file: Any, text: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 40 characters out of"):
        model_file.translate(text)


def test_every_form_is_written_within_the_alphabet_and_the_length(model_file: Any, train_file: Any) -> None:
    texts = [text for text, _ in train_file.written_dates(train_file.DAYS, 5000, random.Random(3))]
    assert model_file.encode(texts).shape[1] <= model_file.MAX_LENGTH


@pytest.mark.parametrize(
    ("number", "suffix"),
    [(1, "st"), (2, "nd"), (3, "rd"), (4, "th"), (11, "th"), (12, "th"), (13, "th"), (31, "st")],
)
def test_ordinal_suffix(train_file: Any, number: int, suffix: str) -> None:
    assert train_file.ordinal_suffix(number) == suffix


def test_three_steps_of_training_change_every_weight_and_repeat_exactly(
    model_file: Any, train_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_file, "BATCH_SIZE", 8)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = model_file.DateTranslator(model_file.Config())
        fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        train_file.train(model, steps=3, rng=random.Random(0))
        states.append(model.state_dict())
    assert "step    3 of 3: loss" in capsys.readouterr().out
    assert not model.training
    # The keys' bias moves all scores of a row alike, which a softmax does not see: its gradient is rounding.
    assert all(not torch.equal(fresh[name], states[0][name]) for name in fresh)
    assert all(torch.equal(states[0][name], states[1][name]) for name in fresh)
