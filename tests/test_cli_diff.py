"""The command `attncli diff` as a user and a CI job meet it: streams, exit codes, options, errors, pipes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from command_line import Command
from compared import checkpoint, finding, measured
from safetensors.torch import save_file
from tiny_checkpoints import llama_folder

import attncli

ROOT = Path(attncli.__file__).parents[1]
SAME = "No difference in what the headers say (--values compares the weights)"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """a and same are alike; c has one layer more and fewer KV heads."""
    llama_folder(tmp_path / "a", layers=2)
    llama_folder(tmp_path / "same", layers=2)
    llama_folder(tmp_path / "c", layers=3)
    return tmp_path


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """a.json and b.json are runs; in b a head is nearly one-hot, its scores are large, and NaN was found."""
    worse = finding("layers.1.attn: scores are NaN.", "layers.1.attn", "ATT506", "error")
    first = measured({"entropy": 2.0})
    second = measured(
        [{"entropy": [2.0, 0.1, 2.0, 2.0], "score_max": [6.0, 90.0, 6.0, 6.0]}, {"entropy": 2.0}]
    )
    broken = measured({"entropy": 2.0}, findings=(worse,))
    for name, report in (("a", first), ("b", second), ("broken", broken)):
        (tmp_path / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
    return tmp_path


# --- what it says -------------------------------------------------------------------------------------


def test_equal_checkpoints_have_no_difference(attncli_run: Command, models: Path) -> None:
    for fail_on in ("note", "error"):
        result = attncli_run("diff", "a", "same", "--fail-on", fail_on)
        assert (result.code, result.err) == (0, "")
        lines = result.out.splitlines()
        assert [line.split("  ")[:2] for line in lines[:2]] == [["A", "a"], ["B", "same"]]
        assert lines[2].startswith("the same structure ")
        assert lines[3:] == [f"{SAME}."]


def test_what_changed_in_the_structure_is_listed(attncli_run: Command, models: Path) -> None:
    result = attncli_run("diff", "a", "c")
    assert (result.code, result.err) == (0, "")
    assert (
        "+ added model.layers.2.self_attn\n    self · separate · 4 heads · 2 KV heads · head size 16\n"
        in result.out
    )
    assert (
        "warning ATT901 changed-structure  1 attention layer is new: model.layers.2.self_attn." in result.out
    )
    assert result.out.endswith("B is worse: 1 warning.\n")
    assert attncli_run("diff", "a", "c", "--fail-on", "warning").code == 1


def test_two_reports_of_runs_are_compared_head_by_head(attncli_run: Command, reports: Path) -> None:
    result = attncli_run("diff", "a.json", "b.json")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"layers\.0\.attn +1 of 4   head 1: 2 → 0\.1 \(−1\.9\)   —", result.out)
    assert (
        "ATT903 fallen-entropy  layers.0.attn: head 1: the mean entropy fell from 2 to 0.1 nats."
        in result.out
    )
    assert "ATT904 grown-scores  layers.0.attn: head 1: the largest score grew from 6 to 90" in result.out
    assert attncli_run("diff", "b.json", "a.json").out.endswith(
        "Different, and nothing in B is worse: 2 numbers.\n"
    )


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 1),
        (("--fail-on", "never"), 0),
        (("--ignore", "ATT506"), 0),
        (("--select", "ATT9"), 0),
        (("--baseline", "broken.json"), 0),
        (("--quiet",), 1),
    ],
)
def test_a_new_error_fails_unless_told_otherwise(
    options: tuple[str, ...], code: int, attncli_run: Command, reports: Path
) -> None:
    assert attncli_run("diff", "a.json", "broken.json", *options).code == code
    assert attncli_run("diff", "broken.json", "broken.json", *options).code == 0


@pytest.mark.parametrize("rule", ["ATT901", "changed-structure", "ATT9"])
def test_rules_about_changes_can_be_chosen_by_code_and_name(
    rule: str, attncli_run: Command, models: Path
) -> None:
    assert attncli_run("diff", "a", "c", "--fail-on", "note", "--select", rule).code == 1
    assert attncli_run("diff", "a", "c", "--fail-on", "note", "--ignore", rule).code == 0


def test_a_checkpoint_and_a_report_are_compared_in_what_both_have(attncli_run: Command, models: Path) -> None:
    assert attncli_run("inspect", "a", "--format", "json", "-o", "a.json").code == 0
    result = attncli_run("diff", "a.json", "c", "--values")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("A  a.json  of a · safetensors · ")
    assert "note: only the second has numbers of: values of tensors (--values)\n" in result.out
    assert attncli_run("diff", "a.json", "a").out.endswith(f"{SAME}.\n")


def test_json_on_stdout_is_the_report_and_nothing_else(attncli_run: Command, models: Path) -> None:
    result = attncli_run("diff", "a", "c", "--format", "json")
    report = json.loads(result.out)
    assert (result.code, result.err) == (0, "")
    assert (report["schema"], report["command"], report["source"]["path"]) == (
        "attncli-report/1",
        "diff",
        "c",
    )
    assert [change["kind"] for change in report["changes"]] == ["source"] * 3 + ["added"]
    assert report["source"]["compared_with"]["path"] == "a"


@pytest.mark.parametrize("output_format", ["table", "json", "markdown", "github", "sarif", "junit", "html"])
def test_every_format_shows_a_comparison(output_format: str, attncli_run: Command, reports: Path) -> None:
    result = attncli_run("diff", "a.json", "broken.json", "--format", output_format)
    assert (result.code, result.err) == (1, "")
    assert "ATT506" in result.out


def test_layer_shows_every_head_of_the_layers_that_it_names(attncli_run: Command, reports: Path) -> None:
    result = attncli_run("diff", "a.json", "b.json", "--layer", "0")
    assert re.search(r"entropy +1 +2 +0\.1 +−1\.9\n", result.out)
    assert re.search(r"score_max +1 +6 +90 +×15\n", result.out)
    result = attncli_run("diff", "a.json", "b.json", "-l", "*.attn", "-l", "nothing")
    assert "note: no layer matches --layer nothing\n" in result.out
    result = attncli_run("diff", "a.json", "b.json", "--layer", "7")
    assert (result.code, result.out) == (2, "")
    assert "no layer matches --layer 7." in result.err


def test_heads_are_given_where_nothing_tells_them(attncli_run: Command, models: Path) -> None:
    for name in ("a", "c"):
        (models / name / "config.json").unlink()
    given = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    added = attncli_run("diff", "a", "c", *given).out
    assert "4 heads · 2 KV heads · head size 16" in added
    assert "4 heads" not in attncli_run("diff", "a", "c").out


def test_bounds_of_two_checkpoints_are_compared(attncli_run: Command, models: Path) -> None:
    result = attncli_run("diff", "a", "same", "--bounds", "--values")
    assert (result.code, result.err) == (0, "")
    assert "ATT202 all-zero-head" in result.out
    assert result.out.endswith("No difference; 8 findings in both.\n")


# --- pipes --------------------------------------------------------------------------------------------


def test_a_report_may_come_through_a_pipe(attncli_run: Command, models: Path) -> None:
    pipe = models / "pipe"
    os.mkfifo(pipe)
    text = attncli.inspect(models / "a").to_json()
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    result = attncli_run("diff", "pipe", "same")
    writer.join()
    assert (result.code, result.out.splitlines()[-1]) == (0, f"{SAME}.")


def test_headers_are_compared_without_torch(models: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = ['diff', 'a', 'c']; from attncli.cli import run; run(); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=models, env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


# --- what is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("diff",), "missing argument 'A'"),
        (("diff", "a"), "missing argument 'B'"),
        (("diff", "a", "none"), "none: there is no such file or folder."),
        (
            ("diff", "a.json", "b.json", "--values"),
            "--values: it is about checkpoints, and both sides are reports.",
        ),
        (
            ("diff", "cut.json", "a"),
            "cut.json: the JSON ends in the middle, at line 1: the file was cut short.",
        ),
        (("diff", "a", "other.json"), "other.json: this cannot be compared: it is no report of attncli."),
        (
            ("diff", "a", "a/config.json"),
            "a/config.json: this cannot be compared: it is no report of attncli.",
        ),
        (("diff", "a", "diff.json"), "diff.json: this report tells what changed, not what is."),
        (("diff", "a", "b.json", "-o", "b.json"), "the report would overwrite"),
        (("diff", "a.json", "b", "-o", "a.json"), "the report would overwrite"),
        (("diff", "a", "b.json", "--head", "0"), "No such option"),
        (("diff", "a", "b.json", "--heads", "0"), "0 is not in the range x>=1"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_exit_code_2(
    arguments: tuple[str, ...], words: str, attncli_run: Command, models: Path, reports: Path
) -> None:
    (models / "cut.json").write_text('{"schema": "attncli-report/1", "findings": [', encoding="utf-8")
    (models / "other.json").write_text('{"version": "2.1.0", "runs": []}', encoding="utf-8")
    (models / "diff.json").write_text(attncli.diff(checkpoint(), checkpoint()).to_json(), encoding="utf-8")
    before = (models / "a.json").read_bytes()
    result = attncli_run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert words.lower() in result.err.lower()
    assert "Traceback" not in result.err
    assert (models / "a.json").read_bytes() == before


def test_the_name_of_a_file_cannot_steer_the_terminal(attncli_run: Command, models: Path) -> None:
    name = "x\x1b[2J\nerror: no.json"
    (models / name).write_text("[", encoding="utf-8")
    result = attncli_run("diff", name, "a")
    assert result.code == 2
    assert "\x1b[2J" not in result.err
    assert result.err.count("\n") == 2


def test_the_help_says_how_models_that_run_are_compared(attncli_run: Command) -> None:
    words = " ".join(attncli_run("diff", "--help").out.split())
    assert "attncli check MODEL --format json -o a.json" in words
    for option in ("--values", "--bounds", "--heads", "--kv-heads", "--head-dim", "--layer", "--fail-on"):
        assert option in words
    assert "diff Show what changed between two checkpoints or two JSON reports" in " ".join(
        attncli_run("--help").out.split()
    )


def test_elements_that_differ_are_told_although_their_statistics_do_not(
    attncli_run: Command, tmp_path: Path
) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    names = [f"layers.0.self_attn.{role}_proj.weight" for role in "qkvo"]
    save_file({name: weight.clone() for name in names}, tmp_path / "a.safetensors")
    turned = {names[0]: -weight, names[1]: weight.flip(0).contiguous()}
    save_file({name: turned.get(name, weight).clone() for name in names}, tmp_path / "b.safetensors")
    result = attncli_run("diff", "a.safetensors", "b.safetensors", "--values")
    said = f"The elements of 2 tensors differ, of 2 with the same statistics: {', '.join(sorted(names[:2]))}."
    assert said.replace(names[1], "?").replace(names[0], "?") in result.out.replace(names[1], "?").replace(
        names[0], "?"
    )
    assert result.code == 0
    assert "Different, and nothing in B is worse" in result.out
    torch.save(dict.fromkeys(names, weight), tmp_path / "c.pt")
    other_file = attncli_run("diff", "a.safetensors", "c.pt", "--values").out
    assert "elements" not in other_file
    halved = {name: weight.half() for name in names}
    save_file(halved, tmp_path / "half.safetensors")
    assert "elements" not in attncli_run("diff", "a.safetensors", "half.safetensors", "--values").out


def test_more_nan_than_before_is_worse_although_the_finding_is_known(
    attncli_run: Command, tmp_path: Path
) -> None:
    for name, count in (("a", 1), ("b", 5)):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        weight[0, :count] = math.nan
        tensors = {f"layers.0.self_attn.{role}_proj.weight": weight.clone() for role in "qkvo"}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    worse = attncli_run("diff", "a.safetensors", "b.safetensors", "--values")
    assert worse.code == 1
    assert "ATT906 no-longer-finite" in worse.out
    assert "5 NaN instead of 1." in worse.out
    assert attncli_run("diff", "b.safetensors", "a.safetensors", "--values").code == 0
