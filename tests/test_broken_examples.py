"""Each mistake under examples/broken is found by name, and nothing is said of the same attention done right."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import attncli
from attncli.rules import RULES

FOLDER = Path(__file__).parent.parent / "examples" / "broken"
# (file, factory) → the finding by name.
BROKEN = {
    ("no_scale", "broken"): "unscaled-scores",
    ("scaled_by_width", "broken"): "scaled-by-model-width",
    ("scaled_twice", "broken"): "scaled-twice",
    ("scaled_twice", "broken_by_hand"): "scaled-twice",
    ("softmax_over_queries", "broken"): "softmax-over-wrong-axis",
    ("mask_after_softmax", "broken"): "rows-do-not-sum-to-one",
    ("dropout_on_scores", "broken"): "dropout-before-softmax",
    ("sides_swapped", "broken"): "queries-and-keys-swapped",
    ("sides_swapped", "broken_values"): "queries-and-keys-swapped",
    ("plain_attention", "broken"): "queries-and-keys-swapped",
    ("softmax_by_hand", "broken"): "softmax-without-maximum-subtracted",
    ("diagonal_hidden", "broken"): "causal-mask-hides-diagonal",
    ("future_shown", "broken"): "causal-mask-shows-future",
    ("empty_source", "broken"): "fully-masked-rows",
    ("mask_upside_down", "broken"): "mask-of-the-wrong-sign",
    ("mask_upside_down", "broken_added"): "mask-of-the-wrong-sign",
    ("scores_in_float16", "broken"): "product-overflows",
    ("heads_of_tokens", "broken"): "heads-cut-across-tokens",
    ("zeros_for_hidden", "broken"): "mask-hides-nothing",
    ("zeros_for_hidden", "broken_by_hand"): "mask-hides-nothing",
}
HEALTHY = [
    *((file, "healthy") for file in dict.fromkeys(file for file, _ in BROKEN)),
    ("no_scale", "folded"),
    ("scaled_twice", "healthy_by_hand"),
    ("softmax_over_queries", "slots"),
    ("mask_after_softmax", "renormalised"),
    ("mask_upside_down", "healthy_added"),
    ("zeros_for_hidden", "healthy_by_hand"),
]


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The examples import what they share from their own folder; no other test is to see their names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = [path.stem for path in FOLDER.glob("*.py")]
    yield
    for name in names:
        monkeypatch.delitem(importlib.sys.modules, name, raising=False)  # type: ignore[attr-defined]


def example(file: str) -> ModuleType:
    return importlib.import_module(file)


def measured(file: str, factory: str, train: bool = False) -> attncli.Report:
    module = example(file)
    return attncli.measure(getattr(module, factory)().train(train), *module.batch())


@pytest.mark.parametrize(("file", "factory"), BROKEN)
def test_the_mistake_is_found_by_name_and_nothing_else(file: str, factory: str) -> None:
    report = measured(file, factory)
    assert [finding.name for finding in report.findings] == [BROKEN[file, factory]]
    assert report.looked


@pytest.mark.parametrize(("file", "factory"), HEALTHY)
def test_nothing_is_said_of_the_same_attention_done_right(file: str, factory: str) -> None:
    report = measured(file, factory)
    assert [finding.message for finding in report.findings] == []
    assert report.verdict == "clean"


def test_dropout_in_its_right_place_is_no_finding_in_training_either() -> None:
    assert [f.name for f in measured("dropout_on_scores", "broken", train=True).findings] == [
        "dropout-before-softmax"
    ]
    assert measured("dropout_on_scores", "healthy", train=True).verdict == "clean"


def test_free_functions_are_looked_at_as_they_are() -> None:
    module = example("plain_attention")
    decoder_hidden, encoder_outputs = module.batch()
    report = attncli.measure(module.attention, decoder_hidden, encoder_outputs)
    (call,) = report.calls
    assert (call.batch, call.heads, call.queries, call.keys, call.head_dim) == (2, 1, 3, 5, 16)
    assert call.scale == pytest.approx(16**-0.5)
    assert module.attention(decoder_hidden, encoder_outputs).shape == (2, 3, 16)
    assert report.verdict == "clean"
    assert [finding.name for finding in attncli.measure(module.swapped, *module.batch()).findings] == [
        "queries-and-keys-swapped"
    ]


def test_the_examples_are_the_same_each_time() -> None:
    for file, factory in BROKEN:
        module = example(file)
        inputs, again = module.batch(), module.batch()
        assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
        state = getattr(module, factory)().state_dict()
        other = getattr(module, factory)().state_dict()
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_the_readme_names_each_example_and_its_finding() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    codes = {rule.name: rule.code for rule in RULES}
    for (file, _), name in BROKEN.items():
        (row,) = [line for line in table.splitlines() if f"`{file}.py`" in line and line.startswith("|")]
        assert f"| {codes[name]} {name} |" in row
    files = {path.stem for path in FOLDER.glob("*.py")} - {"multi_head"}
    assert files == {file for file, _ in BROKEN}
