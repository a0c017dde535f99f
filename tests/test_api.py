"""`attncli.inspect(...)` as a program calls it: the report, its options, what it reads and what it leaves alone."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_checkpoints import floats, llama_folder, llama_shapes, write_safetensors

import attncli
from attncli import api, records
from attncli.errors import AttncliError, CheckpointError, UsageError

VALUE_METRICS = ("nan_count", "inf_count", "absmax", "rms", "zero_fraction")
NORM = "model.layers.0.input_layernorm.weight"


def small(folder: Path, **planted: bytes) -> Path:
    """One layer of four heads behind an RMSNorm, all weights 0.5; `planted` by role replaces a projection."""
    llama_folder(folder)
    shapes = {**llama_shapes(1), NORM: (64,)}
    values = {name: floats(math.prod(shape)) for name, shape in shapes.items()}
    for role, data in planted.items():
        values[f"model.layers.0.self_attn.{role}_proj.weight"] = data
    write_safetensors(folder / "model.safetensors", shapes, values=values)
    return folder


# --- the report ---------------------------------------------------------------------------------------


def test_a_report_holds_layers_findings_and_the_exit_code(tmp_path: Path) -> None:
    report = attncli.inspect(llama_folder(tmp_path, layers=3))
    assert isinstance(report, attncli.Report)
    assert [layer.path for layer in report.layers] == [f"model.layers.{i}.self_attn" for i in range(3)]
    first = report.layers[0]
    assert (first.heads, first.kv_heads, first.head_dim, first.scale) == (4, 2, 16, 0.25)
    assert (report.measurements, report.origins, report.findings, report.run) == ((), (), (), None)
    assert (report.exit_code(), report.verdict, report.looked) == (0, "clean", True)
    assert (report.command, report.version) == ("inspect", attncli.__version__)
    assert report.source["path"] == str(tmp_path)
    assert json.loads(report.to_json()) == report.to_dict()


def test_a_path_may_be_text_or_a_path(tmp_path: Path) -> None:
    llama_folder(tmp_path)
    assert attncli.inspect(str(tmp_path)).to_json() == attncli.inspect(tmp_path).to_json()
    file = attncli.inspect(tmp_path / "model.safetensors")
    assert file.source["kind"] == "file"
    assert file.layers[0].heads == 4  # the config lies beside it


def test_a_planted_defect_is_a_finding_by_name_and_its_healthy_twin_has_none(tmp_path: Path) -> None:
    bad = attncli.inspect(llama_folder(tmp_path / "bad", num_key_value_heads=4))
    assert {finding.name for finding in bad.findings} == {"heads-mismatch"}
    assert {finding.layer for finding in bad.findings} == {layer.id for layer in bad.layers}
    assert (bad.exit_code(), bad.exit_code("never"), bad.verdict) == (1, 0, "findings")
    good = attncli.inspect(llama_folder(tmp_path / "good"))
    assert (good.findings, good.exit_code("note")) == ((), 0)


def test_no_attention_is_not_observed(tmp_path: Path) -> None:
    report = attncli.inspect(write_safetensors(tmp_path / "w.safetensors", {"fc.weight": (4, 4)}))
    assert (report.exit_code(), report.verdict, report.looked) == (3, "unobserved", False)


def test_a_report_prints_as_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = attncli.inspect(llama_folder(tmp_path))
    print(report)  # noqa: T201 - printing is what is tested
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}  safetensors · 1 file")
    assert printed.endswith("2 attention layers; no findings.\n\n")
    assert f"{report}\n" == printed


def test_rich_draws_a_report_at_the_width_of_its_console(tmp_path: Path) -> None:
    report = attncli.inspect(llama_folder(tmp_path))
    buffer = io.StringIO()
    console = Console(file=buffer, width=60, _environ={})
    console.print("before")
    console.print(report)
    console.print("after")
    lines = buffer.getvalue().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert max(map(len, lines)) <= 60
    assert "2 attention layers; no findings." in "".join(lines)


def test_the_environment_names_torch_only_where_it_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = attncli.inspect(llama_folder(tmp_path)).environment
    assert (environment["torch"], environment["device"]) == (None, None)
    assert environment["python"] == sys.version.split()[0]
    assert environment["platform"].startswith(sys.platform)


def test_other_findings_make_another_report_of_the_same_kind(tmp_path: Path) -> None:
    report = attncli.inspect(llama_folder(tmp_path, num_attention_heads=5))
    fewer = api.with_findings(report, report.findings[:1])
    assert type(fewer) is attncli.Report
    assert fewer.findings == report.findings[:1]
    assert dataclasses.replace(fewer, findings=report.findings) == report


# --- options ------------------------------------------------------------------------------------------


def test_options_fill_in_what_neither_config_nor_shapes_tell(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", llama_shapes())

    def facts(**options: int) -> list[int | None]:
        first = attncli.inspect(file, **options).layers[0]  # type: ignore[arg-type]
        return [first.heads, first.kv_heads, first.head_dim]

    assert facts() == [None, None, None]
    assert facts(heads=4) == [4, 2, 16]
    assert facts(head_dim=16)[2] == 16
    assert facts(heads=8, head_dim=8, kv_heads=4) == [8, 4, 8]
    assert attncli.inspect(file, heads=4).layers[0].evidence["heads"] == "option"


def test_a_config_is_believed_before_options(tmp_path: Path) -> None:
    first = attncli.inspect(llama_folder(tmp_path), heads=8).layers[0]
    assert (first.heads, first.evidence["heads"]) == (4, "config")


@pytest.mark.parametrize(
    ("patterns", "numbers"),
    [
        (["model.layers.1.self_attn"], [1]),
        (["1"], [1]),
        (["*.1?.self_attn"], [10, 11]),
        (["*.0.*", "11"], [0, 11]),
        ([], list(range(12))),
    ],
)
def test_layers_keeps_those_that_a_pattern_names(
    patterns: list[str], numbers: list[int], tmp_path: Path
) -> None:
    report = attncli.inspect(llama_folder(tmp_path, layers=12), layers=patterns)
    assert [layer.index for layer in report.layers] == numbers


def test_brackets_in_a_path_can_be_given_as_they_are(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", llama_shapes(1, prefix="a[0]"))
    (only,) = attncli.inspect(file, layers=["a[0].0.self_attn"]).layers
    assert only.path == "a[0].0.self_attn"


def test_a_pattern_that_names_no_layer_is_an_error_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        attncli.inspect(llama_folder(tmp_path), layers=["decoder.*", "7"])
    assert caught.value.problem == "no layer matches --layer decoder.*, 7."
    assert caught.value.remedy == "Paths look like model.layers.0.self_attn."
    nothing = write_safetensors(tmp_path / "mlp.safetensors", {"fc.weight": (4, 4)})
    with pytest.raises(UsageError, match=r"No attention layer was found at all\.$"):
        attncli.inspect(nothing, layers=["7"])


def test_a_pattern_that_names_no_layer_is_named_where_others_do(tmp_path: Path) -> None:
    report = attncli.inspect(llama_folder(tmp_path, layers=2), layers=["1", "decoder.*", "7", "7"])
    assert [layer.index for layer in report.layers] == [1]
    assert report.notes[0] == "no layer matches --layer decoder.*, 7"
    assert not any("--layer" in note for note in attncli.inspect(tmp_path, layers=["0", "1"]).notes)


# --- values -------------------------------------------------------------------------------------------


def measured(report: records.Report, tensor: str) -> list[object]:
    return [row.value for row in report.measurements if row.layer.endswith(tensor)]


def test_values_count_what_is_wrong_and_name_tensor_and_head(tmp_path: Path) -> None:
    # Query head 2 is rows 32 to 47 of 64 columns.
    q = floats(64 * 64, _2100=math.nan, _2101=math.inf, _2102=-8.0)
    report = attncli.inspect(small(tmp_path / "bad", q=q), values=True)
    assert {row.metric for row in report.measurements} == set(VALUE_METRICS)
    assert len(report.measurements) == 5 * 5
    nan, inf, absmax, rms, zeros = measured(report, "q_proj.weight")
    assert (nan, inf, absmax, zeros) == (1, 1, 8.0, 0.0)
    assert rms == pytest.approx(math.sqrt((64 * (64 * 64 - 3) / 256 + 64) / (64 * 64 - 2)), rel=1e-5)
    assert measured(report, "k_proj.weight") == [0, 0, 0.5, pytest.approx(0.5), 0.0]
    (found,) = report.findings
    assert (found.name, found.layer, found.head) == ("non-finite-weight", "model.layers.0.self_attn", 2)
    assert found.message == "model.layers.0.self_attn.q_proj.weight: 1 NaN and 1 Inf in head 2."
    assert attncli.inspect(small(tmp_path / "good"), values=True).findings == ()


def test_a_head_of_zeros_is_found_and_a_key_head_names_both_query_heads(tmp_path: Path) -> None:
    k = floats(16 * 64) + bytes(4 * 16 * 64)  # the second of two key heads
    (found,) = attncli.inspect(small(tmp_path, k=k), values=True).findings
    assert found.name == "all-zero-head"
    assert found.message == "model.layers.0.self_attn.k_proj.weight: all k weights of heads 2, 3 are zero."
    assert found.evidence["heads"] == [2, 3]


def test_values_of_a_chosen_layer_still_scan_the_whole_file(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path, layers=2)
    report = attncli.inspect(folder, values=True, layers=["1"])
    assert len(report.measurements) == 5 * 8
    assert len(report.layers) == 1


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    attncli.inspect(small(tmp_path), values=True, bounds=True, progress=lambda *call: calls.append(call))
    total = 4 * (sum(math.prod(shape) for shape in llama_shapes(1).values()) + 64)
    reading = [(done, of) for what, done, of in calls if what == "reading values"]
    bounding = [(done, of) for what, done, of in calls if what == "bounding scores"]
    assert reading == sorted(reading)
    assert reading[-1] == (total, total)
    assert bounding == [(1, 1)]


# --- bounds -------------------------------------------------------------------------------------------


def test_bounds_of_constant_weights_are_the_closed_form(tmp_path: Path) -> None:
    report = attncli.inspect(small(tmp_path), bounds=True)
    # Every row of q and k is 0.5·(gain 0.5)·1: ‖M‖₂ = 0.25·√(16·64), ‖u‖ ≤ √64, so q·k ≤ 64·0.0625·1024.
    bounds = {row.head: row.value for row in report.measurements if row.metric == "score_bound"}
    assert bounds == {head: pytest.approx(4096.0, rel=1e-6) for head in range(4)}
    # C = M Mᵀ is 16×16 of 64/16 = 4: √tr(C C) = √(256·16).
    typical = {row.head: row.value for row in report.measurements if row.metric == "score_typical"}
    assert typical == {head: pytest.approx(64.0, rel=1e-6) for head in range(4)}
    safe = {row.metric: row.value for row in report.measurements if row.metric.startswith("overflow")}
    assert safe == {f"overflow_{dtype}": "proven safe" for dtype in ("float16", "bfloat16", "float32")}
    assert report.notes == ("scores of 1 layer bounded by a norm without bias in front",)
    assert report.findings == ()


def test_bounds_beyond_float16_are_a_finding_by_name(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    shapes = {**llama_shapes(1), NORM: (64,)}
    values = {name: struct.pack("<e", 4.0) * math.prod(shape) for name, shape in shapes.items()}
    values[NORM] = struct.pack("<e", 1.0) * 64
    write_safetensors(folder / "model.safetensors", shapes, dtype="F16", values=values)
    report = attncli.inspect(folder, bounds=True)
    (found,) = report.findings
    assert (found.code, found.name, found.severity) == ("ATT301", "score-bound-beyond-dtype", "note")
    assert found.evidence["score_bound"] == pytest.approx(64 * 16 * 1024, rel=1e-6)
    assert "overflow_float16" in {row.metric for row in report.measurements if row.value == "not excluded"}


def test_bounds_that_do_not_exist_are_said_and_not_called_safe(tmp_path: Path) -> None:
    shapes = llama_shapes(1)  # no norm in front
    write_safetensors(
        llama_folder(tmp_path) / "model.safetensors",
        shapes,
        values={name: floats(math.prod(shape)) for name, shape in shapes.items()},
    )
    report = attncli.inspect(tmp_path, bounds=True)
    assert {row.value for row in report.measurements if row.metric == "score_bound"} == {math.inf}
    assert json.loads(report.to_json())["measurements"][0]["value"] == "inf"
    assert "the norm in front of q and k is not certain" in report.notes[0]
    unknown = write_safetensors(tmp_path / "unknown.safetensors", llama_shapes(prefix="m"))
    (tmp_path / "config.json").unlink()
    report = attncli.inspect(unknown, bounds=True)
    assert report.measurements == ()
    assert report.notes[-1] == (
        "scores not bounded in 2 layers: the weights alone do not determine q·k there, or heads are unknown (2)"
    )


# --- errors -------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_an_error_in_three_parts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        attncli.inspect(tmp_path / "missing.safetensors")
    error = caught.value
    assert isinstance(error, AttncliError)
    assert isinstance(error, attncli.AttncliError)
    assert error.subject == str(tmp_path / "missing.safetensors")
    assert str(error) == f"{error.subject}: {error.problem} {error.remedy}"


# --- the package --------------------------------------------------------------------------------------


def test_the_package_names_what_it_offers_and_nothing_else() -> None:
    offered = (
        "AttncliError Report TrainingFault __version__ check diff inspect measure nan_check watch".split()
    )
    assert dir(attncli) == offered
    assert attncli.Report is api.Report
    assert attncli.inspect is api.inspect
    with pytest.raises(AttributeError, match="module 'attncli' has no attribute 'inspekt'"):
        attncli.inspekt  # noqa: B018


def test_bounds_alone_name_a_head_whose_weights_hold_nan(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {f"layers.0.self_attn.{leaf}_proj.weight": torch.randn(8, 8) for leaf in ("q", "k", "v", "o")}
    weights["layers.0.input_layernorm.weight"] = torch.ones(8)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 2}')
    save_file(weights, tmp_path / "model.safetensors")
    assert attncli.inspect(tmp_path, bounds=True).findings == ()
    weights["layers.0.self_attn.q_proj.weight"][5, 3] = math.nan
    save_file(weights, tmp_path / "model.safetensors")
    (finding,) = attncli.inspect(tmp_path, bounds=True).findings
    assert (finding.code, finding.layer, finding.head) == ("ATT201", "layers.0.self_attn", 1)


def test_a_module_that_is_given_another_sequence_is_cross_attention_whatever_its_name_says() -> None:
    import torch

    module = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x, y = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    report = attncli.measure(module, x, y, y)
    assert (report.calls[0].kind, report.layers[0].kind) == ("cross", "cross")
    assert attncli.measure(module, x, x, x).layers[0].kind == "self"


def test_layers_of_a_run_stand_in_the_order_in_which_they_ran() -> None:
    import torch

    layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    report = attncli.measure(model, torch.randn(1, 3, 8))
    assert [found.path for found in report.layers] == [f"layers.{i}.self_attn" for i in range(12)]
