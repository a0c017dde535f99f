"""The attention of model types of transformers, measured, against the tensors that the models return themselves.

Entropies are compared per head, tensor by tensor, to 1e-5 nats. `family_cases` holds the models, one row each.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from family_cases import BATCH, ROWS, TOKENS, Row, attention_tensors, tiny

from attncli import measure
from attncli.model import BatchOptions, make_batch
from attncli.model.contracts import Runnable
from attncli.records import Call, Report

# transformers warns of its own code.
pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
PADDED = (
    *("bert", "roberta", "electra", "distilbert", "esm", "mpnet", "llama", "mistral", "gemma2", "gpt2"),
    *("bloom", "gpt_neox", "opt", "t5", "bart", "falcon", "qwen2"),
)


@pytest.fixture(autouse=True)
def quiet():
    import transformers

    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tensors this small only wait for a second thread
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(level)


# --- every model type ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.type)
def test_the_measured_calls_are_the_attention_tensors_that_the_model_returns(row: Row) -> None:
    model = tiny(row)
    batch = row.batch() if row.batch else synthetic(model)
    returned = reference(model, batch, row)
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not switched_to_sdpa(model):
            continue
        report, traced = measured(model, batch)
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            assert same(traced, model(**batch)), f"{implementation}: tracing changes the outputs"
        check_count(report, row, returned)
        if row.found:
            check_entropies(report, returned)
        check_facts(report, row)


def check_count(report: Report, row: Row, returned: list[tuple[str, Tensor]]) -> None:
    expected = row.calls if row.calls is not None else len(returned)
    assert len(report.calls) == expected
    # Whatever cannot be compared as it is has its reason in the table.
    assert row.why or (row.found and row.calls in (None, len(returned)))
    if expected:
        unexplained = [call.reason for call in report.calls if not call.explained]
        assert not unexplained
        assert report.verdict != "unobserved"
    else:
        assert report.calls == ()
        assert report.measurements == ()
        assert report.verdict == "unobserved"
        assert any("not applicable" in note for note in report.notes)


def check_entropies(report: Report, returned: list[tuple[str, Tensor]]) -> None:
    """Every returned tensor is one call of its kind and shape, with its entropy in every head."""
    left = list(report.calls)
    for name, probs in returned:
        wanted = entropies(probs)
        match = next((call for call in left if alike(report, call, wanted)), None)
        assert match is not None, f"{name} {tuple(probs.shape)} with entropies {wanted} is none of the calls"
        left.remove(match)
        if probs.dim() == 4:
            assert (match.heads, match.queries, match.keys) == tuple(probs.shape[1:])
            assert match.batch == probs.shape[0]
        assert match.kind == ("cross" if name.startswith("cross") else "self")


def check_facts(report: Report, row: Row) -> None:
    calls = report.calls
    assert {call.mask_kind for call in calls} == set(row.masks)
    assert {call.kv_heads for call in calls} == set(row.kv_heads)
    assert {call.window for call in calls} - {None} == set(row.windows)
    scales = {call.scale for call in calls}
    assert {None if s is None else round(s, 4) for s in scales} == {
        None if s is None else round(s, 4) for s in row.scales
    }
    assert all(call.softmax_axis == "keys" for call in calls)
    assert all(call.heads % call.kv_heads == 0 for call in calls)


# --- padding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", PADDED)
def test_rows_of_padding_are_left_out(family: str, side: str) -> None:
    row = next(row for row in ROWS if row.type == family)
    model = tiny(row)
    batch: dict[str, Tensor] = dict(row.batch() if row.batch else synthetic(model))
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    padding = slice(TOKENS - 5, TOKENS) if side == "right" else slice(0, 5)
    mask[1, padding] = 0
    batch["attention_mask"] = mask
    returned = reference(model, batch, row)
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not switched_to_sdpa(model):
            continue
        report, _ = measured(model, batch)
        assert len(report.calls) == len(returned)
        left = list(report.calls)
        for name, probs in returned:
            # The decoder of an encoder-decoder is not padded here.
            padded = probs.shape[2] == TOKENS and not name.startswith(("cross", "decoder"))
            counted = mask.bool() if padded else torch.ones(probs.shape[0], probs.shape[2], dtype=torch.bool)
            wanted = entropies(probs, counted)
            match = next((call for call in left if alike(report, call, wanted)), None)
            assert match is not None, (
                f"{implementation} {name}: {wanted}, not {[values(report, c, 'entropy') for c in left]}"
            )
            left.remove(match)
            rows_padded = values(report, match, "rows_padded")
            assert rows_padded == [5.0 if padded else 0.0] * match.heads


# --- helpers ------------------------------------------------------------------------------------------


def synthetic(model: Any) -> dict[str, Tensor]:
    runnable = Runnable(model, "huggingface", "", torch.device("cpu"), "float32", (), 0)
    made = make_batch(runnable, BatchOptions(seq_len=TOKENS, batch_size=BATCH))
    return dict(made.kwargs)


def switched_to_sdpa(model: Any) -> bool:
    if not getattr(model, "_supports_sdpa", False):
        return False
    try:
        model.set_attn_implementation("sdpa")
    except ValueError:  # a part of it, such as a convolutional backbone, knows no such thing
        return False
    return True


def reference(model: Any, batch: dict[str, Tensor], row: Row) -> list[tuple[str, Tensor]]:
    if row.calls == 0 and row.found:
        return []  # some of these do not know the argument
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    return [(name, row.read(tensor)) for name, tensor in attention_tensors(output)]


def measured(model: Any, batch: dict[str, Tensor]) -> tuple[Report, Any]:
    """The report, and what the traced forward pass gave."""
    outputs: list[Any] = []
    hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            report = measure(model, **batch)
    finally:
        hook.remove()
    return report, outputs[0]


def same(first: Any, second: Any) -> bool:
    """Bit for bit, NaN included; caches and other objects are not compared."""
    if isinstance(first, Tensor):
        if first.is_floating_point():
            return torch.equal(first.isnan(), second.isnan()) and torch.equal(
                first.nan_to_num(), second.nan_to_num()
            )
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return True


def entropies(probs: Tensor, counted: Tensor | None = None) -> list[float]:
    """Mean entropy in nats, per head of (B, H, T, S) or (B, H, …, T, S); of all together for other shapes."""
    wide = probs.double()
    rows = -torch.special.xlogy(wide, wide).sum(-1)
    if counted is not None:
        return [float(rows[:, head][counted].mean()) for head in range(rows.shape[1])]
    if rows.dim() >= 3:
        return rows.transpose(0, 1).flatten(1).mean(1).tolist()
    return [float(rows.mean())]


def values(report: Report, call: Call, metric: str) -> list[float]:
    found = [row for row in report.measurements if row.call == call.index and row.metric == metric]
    return [row.value for row in sorted(found, key=lambda row: row.head or 0)]


def alike(report: Report, call: Call, wanted: list[float]) -> bool:
    got = values(report, call, "entropy")
    return len(got) == len(wanted) and all(
        a is not None and math.isclose(a, b, rel_tol=0, abs_tol=TOLERANCE)
        for a, b in zip(got, wanted, strict=True)
    )
