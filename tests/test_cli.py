"""The command `attncli inspect` as a user and a CI job meet it: streams, exit codes, options, errors, terminals."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Command, Result
from tiny_checkpoints import floats, llama_folder, llama_shapes, write_safetensors

import attncli
from attncli.cli import app
from attncli.cli.progress import progress_bar
from attncli.cli.writing import write
from attncli.rules import RULES

ROOT = Path(attncli.__file__).parents[1]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-9]|9[0-7])(?:;[0-9;]*)?m")


def process(*arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "attncli", *map(str, arguments)],
        cwd=folder,
        env=clean_environment(**environment),
        capture_output=True,
        check=False,
    )


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without anything that decides on colours, widths or encodings."""
    deciding = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONIOENCODING", "PYTHONUTF8", "TERM")
    kept = {key: value for key, value in os.environ.items() if key not in deciding}
    return {**kept, "PYTHONPATH": str(ROOT), **changes}


def broken_folder(folder: Path) -> Path:
    return llama_folder(folder, num_attention_heads=5)


# --- the report ---------------------------------------------------------------------------------------


def test_the_table_goes_to_stdout_and_nothing_to_stderr(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("inspect", llama_folder(tmp_path / "m", layers=3))
    assert result.code == 0
    assert result.err == ""
    assert (
        "model.layers.{0–2}.self_attn   self   separate       4          2          16   1/√16" in result.out
    )
    assert result.out.endswith("3 attention layers; no findings.\n")


@pytest.mark.parametrize("flag", ["--format", "-f"])
def test_json_on_stdout_is_the_report_and_nothing_else(
    flag: str, attncli_run: Command, tmp_path: Path
) -> None:
    result = attncli_run("inspect", llama_folder(tmp_path / "m"), flag, "json")
    report = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    assert (report["schema"], report["command"], report["verdict"]) == (
        "attncli-report/1",
        "inspect",
        "clean",
    )
    assert report["attncli_version"] == attncli.__version__
    assert report["source"] == {
        "kind": "folder",
        "path": str(tmp_path / "m"),
        "format": "safetensors",
        "files": 1,
        "bytes": (tmp_path / "m" / "model.safetensors").stat().st_size,
        "parameters": 2 * (64 + 32 + 32 + 64) * 64,
        "tensors": 8,
    }
    first = report["layers"][0]
    assert (first["heads"], first["kv_heads"], first["head_dim"], first["scale"]) == (4, 2, 16, 0.25)
    assert first["tensors"][1] == {
        "role": "k",
        "name": "model.layers.0.self_attn.k_proj.weight",
        "shape": [32, 64],
        "dtype": "float32",
        "file": "model.safetensors",
    }
    assert result.out.endswith("}\n")


def test_a_report_with_notes_and_findings_is_json_alone(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("inspect", broken_folder(tmp_path / "m"), "--format", "json", "--values", "--bounds")
    report = json.loads(result.out)
    assert (result.code, result.err) == (1, "")
    assert report["notes"]
    assert report["verdict"] == "findings"


def test_a_checkpoint_without_attention_is_not_observed(attncli_run: Command, tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "mlp.safetensors", {"fc.weight": (8, 8)})
    result = attncli_run("inspect", file)
    assert (result.code, result.err) == (3, "")
    assert result.out.endswith("Not observed: no attention layer was found.\n")
    assert json.loads(attncli_run("inspect", file, "-f", "json").out)["verdict"] == "unobserved"
    assert attncli_run("inspect", file, "--fail-on", "never").code == 3


def test_a_state_space_model_is_not_observed_either(attncli_run: Command, tmp_path: Path) -> None:
    shapes = {"A_log": (64, 16), "D": (64,), "in_proj.weight": (128, 32), "x_proj.weight": (34, 64)}
    shapes |= {"dt_proj.weight": (64, 2), "out_proj.weight": (32, 64), "conv1d.weight": (64, 1, 4)}
    file = write_safetensors(
        tmp_path / "ssm.safetensors",
        {f"backbone.layers.{i}.mixer.{name}": shape for i in range(2) for name, shape in shapes.items()},
    )
    result = attncli_run("inspect", file)
    assert result.code == 3
    assert result.out.endswith("Not observed: no attention layer was found, 2 other sequence layers.\n")


# --- planted defects ----------------------------------------------------------------------------------


def plant_heads(folder: Path, planted: bool) -> None:
    llama_folder(folder, num_attention_heads=5 if planted else 4)


def plant_missing_keys(folder: Path, planted: bool) -> None:
    llama_folder(folder, layers=5)
    shapes = llama_shapes(5)
    if planted:
        del shapes["model.layers.3.self_attn.k_proj.weight"]
    write_safetensors(folder / "model.safetensors", shapes)


def plant_index(folder: Path, planted: bool) -> None:
    llama_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = [*llama_shapes(), *(["lm_head.weight"] if planted else [])]
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def plant_nan(folder: Path, planted: bool) -> None:
    llama_folder(folder)
    shapes = llama_shapes()
    values = {name: floats(math.prod(shape)) for name, shape in shapes.items()}
    if planted:
        values["model.layers.1.self_attn.q_proj.weight"] = floats(64 * 64, _1100=math.nan)
    write_safetensors(folder / "model.safetensors", shapes, values=values)


def plant_zero_head(folder: Path, planted: bool) -> None:
    llama_folder(folder)
    shapes = llama_shapes()
    values = {name: floats(math.prod(shape)) for name, shape in shapes.items()}
    if planted:  # query head 2 is rows 32 to 47
        values["model.layers.0.self_attn.q_proj.weight"] = (
            floats(32 * 64) + bytes(4 * 16 * 64) + floats(16 * 64)
        )
    write_safetensors(folder / "model.safetensors", shapes, values=values)


def plant_dtype(folder: Path, planted: bool) -> None:
    llama_folder(folder)
    odd = {name: "F32" for name in llama_shapes(5) if ".layers.2." in name} if planted else {}
    write_safetensors(folder / "model.safetensors", llama_shapes(5), dtype="BF16", dtypes=odd)


def plant_large_weights(folder: Path, planted: bool) -> None:
    llama_folder(folder)
    shapes = {**llama_shapes(1), "model.layers.0.input_layernorm.weight": (64,)}
    weight = 2.0 if planted else 0.5  # bound 65536·weight², typically 1024·weight²
    values = {name: struct.pack("<e", weight) * math.prod(shape) for name, shape in shapes.items()}
    values["model.layers.0.input_layernorm.weight"] = struct.pack("<e", 1.0) * 64
    write_safetensors(folder / "model.safetensors", shapes, dtype="F16", values=values)


@pytest.mark.parametrize(
    ("plant", "options", "code", "name", "said"),
    [
        (plant_heads, (), "ATT101", "heads-mismatch", "layers.{0–1}.self_attn: the query projection has 64 rows"),
        (plant_missing_keys, (), "ATT103", "missing-projection", "model.layers.3.self_attn: no k projection"),
        (plant_index, (), "ATT001", "index-disagrees", "is in no shard: lm_head.weight."),
        (plant_nan, ("--values",), "ATT201", "non-finite-weight", "1.self_attn.q_proj.weight: 1 NaN in head 1."),
        (plant_zero_head, ("--values", "--fail-on", "warning"), "ATT202", "all-zero-head", "head 2 are zero"),
        (plant_dtype, ("--fail-on", "warning"), "ATT104", "unlike-siblings", "model.layers.2.self_attn: q has dtype"),
        (plant_large_weights, ("--bounds", "--fail-on", "note"), "ATT301", "score-bound-beyond-dtype", "layers.0"),
    ],
)  # fmt: skip
def test_a_planted_defect_is_found_by_name_and_its_healthy_twin_is_clean(
    plant: Callable[[Path, bool], None],
    options: tuple[str, ...],
    code: str,
    name: str,
    said: str,
    attncli_run: Command,
    tmp_path: Path,
) -> None:
    plant(tmp_path / "bad", True)
    plant(tmp_path / "good", False)
    bad = attncli_run("inspect", tmp_path / "bad", *options)
    assert bad.code == 1
    assert re.search(rf"^(note|warning|error) {code} {name}  .*{re.escape(said)}", bad.out, re.MULTILINE)
    good = attncli_run("inspect", tmp_path / "good", *options)
    assert (good.code, good.err) == (0, "")
    assert good.out.endswith("no findings.\n")


# --- options ------------------------------------------------------------------------------------------


def test_every_option_has_a_test() -> None:
    from typer.main import get_command

    command = get_command(app).commands["inspect"]  # type: ignore[attr-defined]
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("-")]
    assert len(options) > 15
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in options if f'"{name}"' not in source] == []


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("inspect", "--help"), ("inspect", "-h")])
def test_help_names_every_command_or_option(arguments: tuple[str, ...], attncli_run: Command) -> None:
    result = attncli_run(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: ")
    expected = (
        "--values --bounds --heads --kv-heads --head-dim --layer --format --output --fail-on --select --ignore "
        "--baseline --write-baseline --quiet"
        if "inspect" in arguments
        else "inspect --version"
    )
    assert [word for word in expected.split() if word not in result.out] == []
    assert max(map(len, result.out.splitlines())) <= 80


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_one_line(flag: str, attncli_run: Command) -> None:
    assert attncli_run(flag) == Result(0, f"attncli {attncli.__version__}\n", "")


def test_without_a_command_the_help_is_shown(attncli_run: Command) -> None:
    result = attncli_run()
    assert result.code in (0, 2)
    assert result.out.startswith("Usage: ")
    assert "error" not in result.err


def test_heads_fill_in_what_neither_config_nor_shapes_tell(attncli_run: Command, tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", llama_shapes())

    def facts(*options: str) -> list[object]:
        result = attncli_run("inspect", file, "-f", "json", *options)
        first = json.loads(result.out)["layers"][0]
        return [first["heads"], first["kv_heads"], first["head_dim"], first["evidence"].get("heads")]

    assert facts() == [None, None, None, None]
    assert facts("--heads", "4") == [4, 2, 16, "option"]
    assert facts("--heads", "8", "--head-dim", "8", "--kv-heads", "4") == [8, 4, 8, "option"]


def test_a_head_count_that_does_not_fit_is_a_finding_by_name(attncli_run: Command, tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", llama_shapes())
    result = attncli_run("inspect", file, "--heads", "7", "--fail-on", "warning")
    assert result.code == 1
    assert "ATT105 option-does-not-fit" in result.out
    assert attncli_run("inspect", file, "--heads", "4", "--fail-on", "warning").code == 0


def test_values_and_bounds_are_read_only_on_request(attncli_run: Command, tmp_path: Path) -> None:
    plant_large_weights(tmp_path / "m", False)

    def metrics(*options: str) -> set[str]:
        report = json.loads(attncli_run("inspect", tmp_path / "m", "-f", "json", *options).out)
        return {row["metric"] for row in report["measurements"]}

    values = {"nan_count", "inf_count", "absmax", "rms", "zero_fraction"}
    bounds = {"score_bound", "score_typical", "overflow_float16", "overflow_bfloat16", "overflow_float32"}
    assert metrics() == set()
    assert metrics("--values") == values
    assert metrics("--bounds") == bounds
    assert metrics("--values", "--bounds") == values | bounds


@pytest.mark.parametrize(
    ("patterns", "numbers"),
    [
        (("--layer", "model.layers.1.self_attn"), [1]),
        (("--layer", "*.1?.*"), [10, 11]),
        (("--layer", "3"), [3]),
        (("-l", "3", "-l", "*.0.*"), [0, 3]),
    ],
)
def test_layer_keeps_the_layers_it_names_one_row_each(
    patterns: tuple[str, ...], numbers: list[int], attncli_run: Command, tmp_path: Path
) -> None:
    folder = llama_folder(tmp_path / "m", layers=12)
    report = json.loads(attncli_run("inspect", folder, "-f", "json", *patterns).out)
    assert [layer["path"] for layer in report["layers"]] == [f"model.layers.{n}.self_attn" for n in numbers]
    table = attncli_run("inspect", folder, *patterns).out
    for number in numbers:
        assert f"\n model.layers.{number}.self_attn   self" in table
    assert attncli_run("inspect", folder, *patterns, "-o", "out.txt").out == ""
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == table


@pytest.mark.parametrize("flag", ["--output", "-o"])
@pytest.mark.parametrize("form", ["table", "json"])
def test_output_writes_to_the_file_what_stdout_would_show(
    flag: str, form: str, attncli_run: Command, tmp_path: Path
) -> None:
    folder = broken_folder(tmp_path / "m")
    shown = attncli_run("inspect", folder, "--format", form)
    written = attncli_run("inspect", folder, "--format", form, flag, "report")
    assert (written.code, written.out, written.err) == (1, "", "")
    assert (tmp_path / "report").read_text(encoding="utf-8") == shown.out


@pytest.mark.parametrize("options", [("-o", "-"), ("-o", "-", "-o", "-"), ("-q", "-o", "-")])
def test_a_dash_is_stdout(options: tuple[str, ...], attncli_run: Command, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path / "m")
    assert attncli_run("inspect", folder, *options) == attncli_run("inspect", folder)
    assert not (tmp_path / "-").exists()


def test_a_dash_among_files_gives_stdout_the_format_and_files_their_own(
    attncli_run: Command, tmp_path: Path
) -> None:
    folder = broken_folder(tmp_path / "m")
    shown = {form: attncli_run("inspect", folder, "-f", form).out for form in ("github", "json", "table")}
    both = attncli_run("inspect", folder, "-f", "github", "-o", "r.json", "-o", "-", "-o", "report")
    assert (both.code, both.out, both.err) == (1, shown["github"], "")
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == shown["json"]
    assert (tmp_path / "report").read_text(encoding="utf-8") == shown["table"]


def test_a_dash_in_pyproject_is_stdout_too(attncli_run: Command, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path / "m")
    plain = attncli_run("inspect", folder)
    settings(tmp_path, '[tool.attncli]\noutput = ["-", "r.txt"]\n')
    assert attncli_run("inspect", folder) == plain
    assert (tmp_path / "r.txt").read_text(encoding="utf-8") == plain.out
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_quiet_lets_only_the_exit_code_speak(flag: str, attncli_run: Command, tmp_path: Path) -> None:
    assert attncli_run("inspect", broken_folder(tmp_path / "bad"), flag) == Result(1, "", "")
    assert attncli_run("inspect", llama_folder(tmp_path / "good"), flag) == Result(0, "", "")
    attncli_run("inspect", tmp_path / "good", flag, "-o", "report.txt")
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").endswith("no findings.\n")
    assert attncli_run("inspect", "missing", flag).err.startswith("error: missing: ")


@pytest.mark.parametrize(
    ("severity", "codes"),
    [
        ("error", {"note": 1, "warning": 1, "error": 1, "never": 0}),
        ("warning", {"note": 1, "warning": 1, "error": 0, "never": 0}),
        ("note", {"note": 1, "warning": 0, "error": 0, "never": 0}),
    ],
)
def test_fail_on_sets_the_severity_from_which_the_command_fails(
    severity: str, codes: dict[str, int], attncli_run: Command, tmp_path: Path
) -> None:
    folder, options = tmp_path / "m", ["--bounds"] if severity == "note" else []
    {"error": plant_heads, "warning": plant_dtype, "note": plant_large_weights}[severity](folder, True)
    assert {
        level: attncli_run("inspect", folder, *options, "--fail-on", level).code for level in codes
    } == codes
    assert attncli_run("inspect", folder, *options).code == codes["error"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ((), {"ATT101", "ATT104"}),
        (("--select", "ATT101"), {"ATT101"}),
        (("--select", "att104"), {"ATT104"}),
        (("--select", "heads-mismatch"), {"ATT101"}),
        (("--select", "ATT1"), {"ATT101", "ATT104"}),
        (("--select", "ATT0"), set()),
        (("--select", "ATT101,ATT104"), {"ATT101", "ATT104"}),
        (("--select", "ATT101", "--select", " unlike-siblings "), {"ATT101", "ATT104"}),
        (("--ignore", "ATT101"), {"ATT104"}),
        (("--ignore", "ATT"), set()),
        (("--select", "ATT1", "--ignore", "heads-mismatch,ATT2"), {"ATT104"}),
    ],
)
def test_select_and_ignore_choose_rules_by_code_name_or_prefix(
    options: tuple[str, ...], found: set[str], attncli_run: Command, tmp_path: Path
) -> None:
    plant_dtype(tmp_path, True)
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_attention_heads": 5}', encoding="utf-8"
    )
    result = attncli_run("inspect", tmp_path, "-f", "json", *options)
    report = json.loads(result.out)
    assert {finding["code"] for finding in report["findings"]} == found
    assert result.code == (1 if "ATT101" in found else 0)
    assert report["verdict"] == ("findings" if found else "clean")


def test_a_baseline_leaves_known_findings_out_and_new_ones_in(attncli_run: Command, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path / "m")
    assert attncli_run("inspect", folder, "-f", "json", "-o", "known.json").code == 1
    again = attncli_run("inspect", folder, "--baseline", "known.json")
    assert again.code == 0
    assert again.out.endswith("2 attention layers; no new findings, 2 known.\n")
    assert "  error ATT101 heads-mismatch  model.layers.{0–1}" in again.out
    write_safetensors(folder / "model.safetensors", llama_shapes(3))
    grown = attncli_run("inspect", folder, "--baseline", "known.json", "-f", "json")
    assert grown.code == 1
    assert [finding["layer"] for finding in json.loads(grown.out)["findings"]] == ["model.layers.2.self_attn"]


def test_a_baseline_knows_findings_whose_names_are_no_valid_text(
    attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m", num_attention_heads=5)
    write_safetensors(tmp_path / "m" / "model.safetensors", llama_shapes(2, prefix="a\ud800b.layers"))
    assert attncli_run("inspect", "m", "-f", "json", "-o", "known.json").code == 1
    assert attncli_run("inspect", "m", "--baseline", "known.json").code == 0


def test_a_baseline_is_written_and_from_then_on_its_findings_are_known(
    attncli_run: Command, tmp_path: Path
) -> None:
    folder = broken_folder(tmp_path / "m")
    assert attncli_run("inspect", folder, "-q").code == 1
    first = attncli_run("inspect", folder, "--write-baseline", "known.json")
    assert (first.code, first.out.splitlines()[-1]) == (0, "2 attention layers; no new findings, 2 known.")
    written = json.loads((tmp_path / "known.json").read_text(encoding="utf-8"))
    assert written["schema"] == "attncli-baseline/1"
    assert [row["layer"] for row in written["findings"]] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert attncli_run("inspect", folder, "--baseline", "known.json", "-q").code == 0
    # In another order, and by other numbers: the same findings.
    written["findings"].reverse()
    (tmp_path / "known.json").write_text(json.dumps(written), encoding="utf-8")
    assert attncli_run("inspect", folder, "--baseline", "known.json", "-q").code == 0
    report = json.loads(attncli_run("inspect", folder, "--baseline", "known.json", "-f", "json").out)
    assert (report["verdict"], len(report["known"]), report["findings"]) == ("clean", 2, [])


def test_the_first_baseline_can_be_written_where_the_settings_name_it(
    attncli_run: Command, tmp_path: Path
) -> None:
    folder = broken_folder(tmp_path / "m")
    settings(tmp_path, '[tool.attncli]\nbaseline = "known.json"\n')
    assert attncli_run("inspect", folder).code == 2
    assert attncli_run("inspect", folder, "--write-baseline", "known.json").code == 0
    assert attncli_run("inspect", folder).code == 0


def test_a_baseline_is_brought_up_to_date_in_place(attncli_run: Command, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path / "m")
    both = ("--baseline", "known.json", "--write-baseline", "known.json")
    assert attncli_run("inspect", folder, *both[2:], "-q").code == 0
    write_safetensors(folder / "model.safetensors", llama_shapes(3))
    assert attncli_run("inspect", folder, *both, "-q").code == 0
    assert len(json.loads((tmp_path / "known.json").read_text(encoding="utf-8"))["findings"]) == 3
    write_safetensors(folder / "model.safetensors", llama_shapes(1))
    gone = attncli_run("inspect", folder, *both[:2])
    assert "note: 2 findings of the baseline were not found again" in gone.out
    assert attncli_run("inspect", folder, *both, "-q").code == 0
    assert len(json.loads((tmp_path / "known.json").read_text(encoding="utf-8"))["findings"]) == 1


def test_a_baseline_of_an_older_report_without_fingerprints_is_understood(
    attncli_run: Command, tmp_path: Path
) -> None:
    folder = broken_folder(tmp_path / "m")
    report = json.loads(attncli_run("inspect", folder, "-f", "json").out)
    rows = [{key: row[key] for key in row if key != "fingerprint"} for row in report["findings"]]
    (tmp_path / "old.json").write_text(json.dumps({"findings": rows}), encoding="utf-8")
    assert attncli_run("inspect", folder, "--baseline", "old.json", "-q").code == 0


# --- files --------------------------------------------------------------------------------------------


def test_the_name_of_a_file_says_its_format_and_one_run_writes_several(
    attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    result = attncli_run("inspect", "m", "-o", "a.json", "-o", "b.txt", "--output", "c.unknown")
    assert result == Result(0, "", "")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["verdict"] == "clean"
    table = (tmp_path / "b.txt").read_text(encoding="utf-8")
    assert table.startswith("m  safetensors")
    assert (tmp_path / "c.unknown").read_text(encoding="utf-8") == table
    attncli_run("inspect", "m", "-f", "table", "-o", "a.json")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == table


def test_the_name_of_a_file_goes_before_a_format_from_the_settings(
    attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    settings(tmp_path, '[tool.attncli]\nformat = "json"\n')
    attncli_run("inspect", "m", "-o", "a.md", "-o", "b.unknown")
    assert (tmp_path / "a.md").read_text(encoding="utf-8").startswith("### attncli inspect")
    assert json.loads((tmp_path / "b.unknown").read_text(encoding="utf-8"))["verdict"] == "clean"
    attncli_run("inspect", "m", "-f", "table", "-o", "a.md")
    assert (tmp_path / "a.md").read_text(encoding="utf-8").startswith("m  safetensors")


@pytest.mark.parametrize("options", [("-o", "a", "-o", "a"), ("-o", "a", "--write-baseline", "./a")])
def test_two_outputs_do_not_go_to_one_file(
    options: tuple[str, ...], attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    result = attncli_run("inspect", "m", *options)
    assert (result.code, (tmp_path / "a").exists()) == (2, False)
    assert "two outputs would go to this file." in result.err


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    file.write_text("the old one", encoding="utf-8")
    file.chmod(0o640)
    write("the new one", file)
    assert (file.read_text(encoding="utf-8"), file.stat().st_mode & 0o777) == ("the new one", 0o640)

    def interrupted(self: Path, data: bytes) -> int:
        with self.open("wb") as half:
            half.write(data[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("never finished", file)
    assert file.read_text(encoding="utf-8") == "the new one"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write("text", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text(encoding="utf-8") == "text"
    write("nobody reads this", Path(os.devnull))
    assert not Path(os.devnull).is_file()


# --- errors -------------------------------------------------------------------------------------------


def bad_inputs(folder: Path) -> None:
    llama_folder(folder / "m")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("Dear diary, today I trained a model.\n", encoding="utf-8")
    (folder / "list.json").write_text("[1, 2]", encoding="utf-8")
    (folder / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (folder / "latin.json").write_bytes(b'{"findings": "\xe9"}')
    (folder / "rows.json").write_text('{"findings": [{"code": "ATT101"}]}', encoding="utf-8")
    (folder / "unhashable.json").write_text(
        '{"findings": [{"code": [], "layer": {}, "head": [], "message": ""}]}', encoding="utf-8"
    )
    write_safetensors(folder / "w.safetensors", llama_shapes())


NO_REPORT = "this is no baseline and no JSON report of attncli."


@pytest.mark.parametrize(
    ("arguments", "subject", "problem"),
    [
        (["inspect", "missing.safetensors"], "missing.safetensors", "there is no such file or folder."),
        (["inspect", "empty"], "empty", "the folder"),
        (["inspect", "notes.txt"], "notes.txt", "this is a text file, which attncli does not read."),
        (["inspect", "m", "--format", "bogus"], "attncli inspect", "'bogus' is not one of 'table', 'json'"),
        (["inspect", "m", "--fail-on", "fatal"], "attncli inspect", "'fatal' is not one of"),
        (["inspect", "m", "--heads", "0"], "attncli inspect", "0 is not in the range x>=1."),
        (["inspect", "m", "--heads", "four"], "attncli inspect", "'four' is not a valid int"),
        (["inspect", "m", "--nope"], "attncli inspect", "no such option"),
        (["inspect", "m", "m2"], "attncli inspect", "m2"),
        (["inspect"], "attncli inspect", "missing argument"),
        (["inspekt"], "attncli", "no such command 'inspekt'"),
        (["inspect", "m", "--select", "ATT999"], "--select", "no rule is named 'ATT999'."),
        (["inspect", "m", "--ignore", "ATT101,heads"], "--ignore", "no rule is named 'heads'."),
        (["inspect", "m", "--baseline", "absent.json"], "absent.json", "the baseline cannot be read (No such file"),
        (["inspect", "m", "--baseline", "empty"], "empty", "the baseline cannot be read (Is a directory)."),
        (["inspect", "m", "--baseline", "list.json"], "list.json", NO_REPORT),
        (["inspect", "m", "--baseline", "deep.json"], "deep.json", NO_REPORT),
        (["inspect", "m", "--baseline", "latin.json"], "latin.json", NO_REPORT),
        (["inspect", "m", "--baseline", "rows.json"], "rows.json", NO_REPORT),
        (["inspect", "m", "--baseline", "unhashable.json"], "unhashable.json", NO_REPORT),
        (["inspect", "m", "--baseline", "w.safetensors"], "w.safetensors", NO_REPORT),
        (["inspect", "m", "-o", "nowhere/report.json"], "nowhere/report.json", "there is no folder nowhere."),
        (["inspect", "m", "-o", "empty"], "empty", "this is a folder."),
        (["inspect", "w.safetensors", "-o", "w.safetensors"], "w.safetensors", "would overwrite the checkpoint"),
        (["inspect", "m", "--layer", "decoder.*"], "m", "no layer matches --layer decoder.*."),
        (["inspect", "m", "--layer", "99"], "m", "no layer matches --layer 99."),
    ],
)  # fmt: skip
def test_a_mistake_gets_a_message_in_three_parts_and_exit_code_2(
    arguments: list[str], subject: str, problem: str, attncli_run: Command, tmp_path: Path
) -> None:
    bad_inputs(tmp_path)
    result = attncli_run(*arguments)
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert first.startswith(f"error: {subject}: ")
    assert problem.lower() in first.lower()
    assert first[-1] in ".?"
    assert re.match(r"  try: .+[.?]$", second)
    assert "Traceback" not in result.err


def test_a_wrong_rule_is_told_before_the_checkpoint_is_read(attncli_run: Command) -> None:
    result = attncli_run("inspect", "missing", "--select", "ATT999")
    assert result.err.splitlines() == [
        "error: --select: no rule is named 'ATT999'.",
        f"  try: Rules: {', '.join(rule.code for rule in RULES)}.",
    ]
    nearly = attncli_run("inspect", "missing", "--ignore", "heads-missmatch").err
    assert "try: Did you mean heads-mismatch? Rules: ATT001" in nearly


def test_a_path_with_control_characters_does_not_steer_the_terminal(attncli_run: Command) -> None:
    result = attncli_run("inspect", "a\x1b[2Jb")
    assert "\x1b" not in result.err
    assert r"error: a\x1b[2Jb: there is no such file" in result.err


def test_the_checkpoint_is_never_overwritten_by_its_report(attncli_run: Command, tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "w.safetensors", llama_shapes())
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(file)
    for target in ("w.safetensors", "./w.safetensors", "link"):
        assert attncli_run("inspect", "w.safetensors", "-o", target).code == 2
    assert file.read_bytes() == before


def test_a_bug_of_attncli_keeps_its_traceback(
    attncli_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("attncli.api.inspect", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        attncli_run("inspect", tmp_path)


def test_interrupting_is_neither_clean_nor_a_finding(
    attncli_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("attncli.api.inspect", interrupted)
    assert attncli_run("inspect", tmp_path).code == 130


# --- defaults from pyproject.toml ---------------------------------------------------------------------


def settings(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def test_defaults_come_from_pyproject_and_the_command_line_wins(attncli_run: Command, tmp_path: Path) -> None:
    plant_dtype(tmp_path / "m", True)
    assert attncli_run("inspect", "m").code == 0
    settings(tmp_path, '[tool.attncli]\nfail-on = "warning"\nformat = "json"\n')
    result = attncli_run("inspect", "m")
    assert result.code == 1
    assert json.loads(result.out)["verdict"] == "findings"
    assert attncli_run("inspect", "m", "--fail-on", "error").code == 0
    assert attncli_run("inspect", "m", "--format", "table").out.startswith("m  safetensors")


@pytest.mark.parametrize(
    "value", ['["ATT104"]', '"ATT104"', '"ATT104,ATT103"', '["unlike-siblings", "ATT103"]']
)
def test_rules_can_be_ignored_by_list_or_by_text(value: str, attncli_run: Command, tmp_path: Path) -> None:
    plant_dtype(tmp_path / "m", True)
    settings(tmp_path, f'[tool.attncli]\nfail-on = "note"\nignore = {value}\n')
    assert attncli_run("inspect", "m").code == 0
    assert attncli_run("inspect", "m", "--ignore", "ATT2").code == 1


def test_settings_of_one_command_go_before_those_of_all(attncli_run: Command, tmp_path: Path) -> None:
    plant_dtype(tmp_path / "m", True)
    settings(
        tmp_path,
        '[tool.attncli]\nfail-on = "never"\nquiet = true\n'
        '[tool.attncli.inspect]\nfail-on = "warning"\nkv-heads = 2\nlayer = "2"\n',
    )
    assert attncli_run("inspect", "m") == Result(0, "", "")  # one layer has no siblings
    settings(tmp_path, '[tool.attncli]\nfail-on = "never"\n[tool.attncli.inspect]\nfail-on = "warning"\n')
    assert attncli_run("inspect", "m").code == 1


def test_the_nearest_pyproject_above_counts_and_its_baseline_lies_beside_it(
    attncli_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_folder(tmp_path / "m")
    assert attncli_run("inspect", "m", "-f", "json", "-o", "known.json").code == 1
    settings(tmp_path, '[tool.attncli]\nbaseline = "known.json"\n')
    assert attncli_run("inspect", "m").code == 0
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deeper" / "still")
    assert attncli_run("inspect", tmp_path / "m").code == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[project]\nname = 'x'\n",
        "this is no TOML, but nothing of ours",
        "[tool.attncli]\n",
        "\ufeff[tool.attncli]\nquiet = false\n",
        "[tool]\nattncli = {quiet = false}\n",
        "[project]\ndependencies = ['attncli']\n",
    ],
)
def test_a_pyproject_that_sets_nothing_changes_nothing(
    text: str, attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    before = attncli_run("inspect", "m")
    settings(tmp_path, text)
    assert attncli_run("inspect", "m") == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[tool.attncli]\nfail_onn = "note"\n', "[tool.attncli] has no setting 'fail-onn'."),
        ("[tool.attncli]\ncheckpoint = 'm'\n", "[tool.attncli] has no setting 'checkpoint'."),
        ("[tool.attncli.inspect]\nbound = true\n", "[tool.attncli.inspect] has no setting 'bound'."),
        ("[tool.attncli.inspekt]\nvalues = true\n", "[tool.attncli] has no setting 'inspekt'."),
        ("[tool.attncli\n", "it is not valid TOML ("),
        ("tool = {attncli = 3}\n", "attncli is no table of settings."),
        ("tool = 'attncli'\n", "tool is no table of settings."),
    ],
)
def test_a_setting_that_does_not_exist_is_an_error(
    text: str, problem: str, attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    settings(tmp_path, text)
    result = attncli_run("inspect", "m")
    assert (result.code, result.out) == (2, "")
    first, second = result.err.splitlines()
    assert first.startswith(f"error: {tmp_path / 'pyproject.toml'}: {problem}")
    assert second.startswith("  try: ")
    if "no setting" in problem:
        assert "Known: " in second
        assert "_" not in second


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('[tool.attncli]\nfail_onn = "note"\n', "fail-on"),
        ("[tool.attncli.inspect]\nbound = true\n", "bounds"),
        ("[tool.attncli.inspekt]\nvalues = true\n", "inspect"),
        ("[tool.attncli]\nxyzzy = 3\n", None),
    ],
)
def test_a_setting_that_is_nearly_right_gets_a_suggestion(
    text: str, meant: str | None, attncli_run: Command, tmp_path: Path
) -> None:
    settings(tmp_path, text)
    said = attncli_run("inspect", "m").err.splitlines()[1]
    assert said.startswith(f"  try: Did you mean '{meant}'? Known: " if meant else "  try: Known: ")


def test_a_setting_for_all_commands_counts_for_those_that_have_the_option(
    attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    settings(tmp_path, "[tool.attncli]\nvalues = true\nseq-len = 7\n")  # inspect has no --seq-len
    assert "Values of " in attncli_run("inspect", "m").out
    settings(tmp_path, "[tool.attncli]\nseq_len = 7\n")
    assert "Values of " not in attncli_run("inspect", "m").out


@pytest.mark.parametrize(
    "line", ['fail-on = "fatal"', "fail-on = 3", 'fail-on = ["note"]', 'quiet = "perhaps"', "ignore = [1]"]
)
def test_a_setting_with_a_wrong_value_is_an_error_without_traceback(
    line: str, attncli_run: Command, tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    settings(tmp_path, f"[tool.attncli]\n{line}\n")
    result = attncli_run("inspect", "m")
    assert (result.code, result.out) == (2, "")
    assert re.match(r"error: .+\n  try: .+\n$", result.err)


def test_a_working_folder_that_was_removed_does_not_matter(
    attncli_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama_folder(tmp_path / "m")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert attncli_run("inspect", tmp_path / "m").code == 0
    monkeypatch.chdir(tmp_path)


# --- streams ------------------------------------------------------------------------------------------


def without_reader(*arguments: str, folder: Path) -> tuple[int, bytes]:
    """Exit code and stderr of the command where nobody reads stdout, as in `attncli … | true`."""
    with subprocess.Popen(
        [sys.executable, "-m", "attncli", *arguments],
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        errors = running.stderr.read()
        return running.wait(), errors


def test_a_reader_that_leaves_early_ends_the_command_quietly_with_its_own_code(tmp_path: Path) -> None:
    llama_folder(tmp_path / "good", layers=300)
    broken_folder(tmp_path / "bad")
    more_than_a_pipe_holds = ("inspect", "good", "-f", "json")
    assert without_reader(*more_than_a_pipe_holds, folder=tmp_path) == (0, b"")
    assert without_reader("inspect", "bad", folder=tmp_path) == (1, b"")
    assert without_reader("inspect", "--help", folder=tmp_path) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    llama_folder(tmp_path / "m")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "attncli", "inspect", "m"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr.decode()) == (
        2,
        "error: stdout: the report cannot be written (No space left on device).\n"
        "  try: Check the disk, or write to a file with -o.\n",
    )


@pytest.mark.skipif(os.name == "nt", reason="closes file descriptors by number")
def test_closed_streams_leave_the_exit_code(tmp_path: Path) -> None:
    broken_folder(tmp_path / "m")
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" -m attncli inspect m {closed}', sys.executable],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, b""), closed
        assert bool(done.stdout) is (closed == "2>&-")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_unicode_gets_question_marks_and_no_traceback(
    environment: dict[str, str], tmp_path: Path
) -> None:
    llama_folder(tmp_path / "m")
    done = process("inspect", "m", folder=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    if "PYTHONIOENCODING" in environment:
        assert b"model.layers.{0?1}.self_attn" in done.stdout
    missing = process("inspect", "größe", folder=tmp_path, **environment)
    assert missing.returncode == 2
    assert missing.stderr.startswith(b"error: gr")


def test_json_loses_no_letter_where_stdout_cannot_hold_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", llama_shapes(1, prefix="größe.😀.layers"))
    plain = process("inspect", "w.safetensors", "-f", "json", folder=tmp_path, PYTHONUTF8="1")
    narrow = process("inspect", "w.safetensors", "-f", "json", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert "größe.😀.layers.0" in plain.stdout.decode("utf-8")
    assert narrow.stdout.isascii()
    assert json.loads(narrow.stdout) == json.loads(plain.stdout)


# --- terminals ----------------------------------------------------------------------------------------


def on_terminal(folder: Path, *arguments: str, columns: int = 70, **environment: str) -> tuple[int, str]:
    """Exit code and output of the command on a terminal of that width, as xterm would get it."""
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "attncli", *arguments],
        cwd=folder,
        env=clean_environment(TERM="xterm-256color", PYTHONUTF8="1", **environment),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as running:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says "input/output error" once the last writer is gone
                break
            if not piece:
                break
            output += piece
        os.close(ours)
        return running.wait(), output.decode("utf-8").replace("\r\n", "\n")


LONG = "a_rather_long_name_for_a_module_that_somebody_chose_one_day"


def long_names(folder: Path) -> Path:
    return write_safetensors(folder / "w.safetensors", llama_shapes(1, prefix=f"{LONG}.{LONG}.layers"))


def test_a_terminal_gets_colour_and_no_line_wider_than_itself(tmp_path: Path) -> None:
    long_names(tmp_path)
    code, output = on_terminal(tmp_path, "inspect", "w.safetensors", columns=70)
    assert code == 0
    assert COLOUR.search(output)
    lines = CONTROL.sub("", output).splitlines()
    assert max(map(len, lines)) <= 70
    assert f"{LONG}.{LONG}.layers.0.self_attn" in "".join(line.strip() for line in lines)


def test_what_is_piped_has_no_colour_and_every_name_whole(tmp_path: Path) -> None:
    long_names(tmp_path)
    done = process(
        "inspect", "w.safetensors", folder=tmp_path, TERM="xterm-256color", COLUMNS="40", PYTHONUTF8="1"
    )
    text = done.stdout.decode("utf-8")
    assert "\x1b" not in text
    assert f" {LONG}.{LONG}.layers.0.self_attn   self" in text


def test_no_color_leaves_a_terminal_without_colour(tmp_path: Path) -> None:
    long_names(tmp_path)
    _, output = on_terminal(tmp_path, "inspect", "w.safetensors", NO_COLOR="1")
    assert not COLOUR.search(output)
    code, output = on_terminal(tmp_path, "inspect", "missing", NO_COLOR="1")
    assert code == 2
    assert not COLOUR.search(output)
    assert COLOUR.search(on_terminal(tmp_path, "inspect", "missing")[1])


def test_progress_is_shown_on_a_terminal_and_gone_from_the_report(tmp_path: Path) -> None:
    plant_nan(tmp_path / "m", True)
    code, output = on_terminal(tmp_path, "inspect", "m", "--values", columns=120)
    assert code == 1
    assert "reading values" in output
    report = (
        output[output.rindex("m  safetensors") :] if "m  safetensors" in output else CONTROL.sub("", output)
    )
    assert "1 NaN in head 1." in CONTROL.sub("", report)
    assert "reading values" not in report.rpartition("safetensors")[2]


@pytest.mark.parametrize(("quiet", "terminal"), [(True, True), (False, False), (True, False)])
def test_no_progress_is_counted_where_nobody_would_see_it(
    quiet: bool, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(quiet) as progress:
        assert progress is None


def test_an_empty_path_is_no_folder() -> None:
    """`attncli inspect "$UNSET"` must not inspect the folder a script happens to stand in."""
    done = subprocess.run(
        [sys.executable, "-m", "attncli", "inspect", ""], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "the path is empty." in done.stderr
