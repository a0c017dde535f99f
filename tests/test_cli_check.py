"""The command `check` as a user and a CI job meet it: one face per state, every option, every exit code."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from safetensors.torch import save_file
from test_check import CODE
from test_cli_measure import DEFAULTS, GIVEN

from attncli.cli import app
from attncli.records import Report

CONTROL = re.compile(r"\x1b")


@pytest.fixture
def attncli_run(attncli_run: Command, tmp_path: Path) -> Command:
    """`attncli check …` in a folder that holds the user's code."""
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    return lambda *arguments: attncli_run("check", *arguments)


RUN = ("--input", "code.py:batch", "--device", "cpu")


def bare(folder: Path, build: str) -> Path:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    save_file(namespace[build]().state_dict(), folder / "bare.safetensors")
    return folder / "bare.safetensors"


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ([], {}),
        *GIVEN,
        (["--expect", "heads=4", "--expect", "layers=2"], {"expect": ("heads=4", "layers=2")}),
        (["--confirm"], {}),
        (["--no-confirm"], {"confirm": False}),
    ],
)
def test_every_option_reaches_the_pipeline(
    options: list[str], changes: dict[str, Any], attncli_run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def check_model(spec: str, **settings: Any) -> Report:
        asked.append((spec, settings))
        return Report("check", "0", {"path": "m"}, {})

    monkeypatch.setattr("attncli.api.check_model", check_model)
    attncli_run("./model", *options)
    assert asked == [("./model", {**DEFAULTS, "expect": (), "confirm": True, **changes})]


def test_every_option_has_a_test_here_or_beside() -> None:
    from typer.main import get_command

    parameters = get_command(app).commands["check"].params  # type: ignore[attr-defined]
    names = {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}
    source = "".join(
        (Path(__file__).parent / name).read_text(encoding="utf-8")
        for name in ("test_cli_check.py", "test_cli_measure.py")
    )
    assert len(names) > 25
    assert [name for name in sorted(names) if f'"{name}"' not in source] == []


# --- exit codes and what is printed -------------------------------------------------------------------


def test_a_healthy_model_gives_a_row_per_subject_and_exit_code_0(attncli_run: Command) -> None:
    result = attncli_run("code.py:healthy", *RUN)
    assert result.code == 0
    rows = dict(re.findall(r"^(\w+) +(ok|not observed|known|\d \w+)  ", result.out, re.MULTILINE))
    assert rows == dict.fromkeys(("layout", "weights", "attention", "scores", "entropy", "NaN"), "ok")
    assert "layers.{0–1}: self, 4 heads of 8" in result.out
    assert result.out.endswith("2 attention layers, 2 calls, all explained; no findings.\n")
    assert not CONTROL.search(result.out)


@pytest.mark.parametrize(
    ("build", "row", "state", "code"),
    [
        ("bad_weight", "weights", "1 error", 1),
        ("dead_head", "weights", "1 warning", 0),
        ("hidden", "NaN", "1 error", 1),
        ("unscaled", "attention", "1 warning", 0),
    ],
)
def test_the_row_of_a_fault_says_how_grave_it_is(
    build: str, row: str, state: str, code: int, attncli_run: Command
) -> None:
    result = attncli_run(f"code.py:{build}", *RUN)
    assert re.search(rf"^{row} +{state}  ", result.out, re.MULTILINE)
    assert result.code == code
    assert attncli_run(f"code.py:{build}", *RUN, "--fail-on", "warning", "-q").code == 1


def test_an_origin_of_nan_is_told_in_full(attncli_run: Command) -> None:
    out = attncli_run("code.py:hidden", *RUN).out
    assert "NaN born in layers.0 · _softmax" in out
    assert "code.py:" in out
    assert "1 origin in " in out


def test_a_model_without_attention_gives_exit_code_3(attncli_run: Command) -> None:
    result = attncli_run("code.py:no_attention", *RUN)
    assert result.code == 3
    assert result.out.splitlines()[-1].startswith("Not observed: no attention ran")


def test_a_bare_checkpoint_says_what_was_not_observed(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run(bare(tmp_path, "healthy"))
    assert result.code == 0
    for subject in ("attention", "scores", "entropy", "NaN"):
        assert re.search(rf"^{subject} +not observed", result.out, re.MULTILINE)
    assert result.out.splitlines()[-1].endswith("nothing ran, so entropy, scores and NaN were not observed.")
    assert "file.py:build --weights" in result.out
    assert attncli_run(bare(tmp_path, "bad_weight")).code == 1


def test_an_expectation_that_is_not_met_fails_the_check(attncli_run: Command) -> None:
    assert attncli_run("code.py:healthy", *RUN, "--expect", "heads=4,layers=2").code == 0
    result = attncli_run("code.py:healthy", *RUN, "--expect", "heads=32")
    assert result.code == 1
    assert "error ATT801 not-as-expected  layers.{0–1}: heads: expected 32, found 4." in result.out
    wrong = attncli_run("code.py:healthy", *RUN, "--expect", "haeds=32")
    assert (wrong.code, wrong.out) == (2, "")
    assert "Did you mean 'heads'?" in wrong.err


def test_an_expectation_can_stand_in_pyproject(attncli_run: Command, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.attncli.check]\nexpect = "heads=32"\n', encoding="utf-8")
    assert attncli_run("code.py:healthy", *RUN, "-q").code == 1


def test_known_findings_turn_their_row_to_known(attncli_run: Command) -> None:
    first = attncli_run("code.py:dead_head", *RUN, "--write-baseline", "known.json", "--fail-on", "warning")
    assert first.code == 0
    result = attncli_run("code.py:dead_head", *RUN, "--baseline", "known.json", "--fail-on", "warning")
    assert result.code == 0
    assert re.search(r"^weights +known", result.out, re.MULTILINE)
    assert result.out.splitlines()[-1].endswith("no new findings, 1 known.")


def test_chosen_layers_are_shown_with_every_head(attncli_run: Command) -> None:
    out = attncli_run("code.py:healthy", *RUN, "--layer", "1").out
    assert "Entropy in nats" in out
    assert "sink_mass" in out
    assert "layers.0" not in out


def test_one_run_writes_every_format(attncli_run: Command, tmp_path: Path) -> None:
    files = ["r.json", "r.md", "r.sarif", "r.xml", "r.html", "r.txt"]
    result = attncli_run("code.py:hidden", *RUN, *[part for name in files for part in ("-o", name)])
    assert (result.code, result.out) == (1, "")
    texts = {name: (tmp_path / name).read_text(encoding="utf-8") for name in files}
    assert json.loads(texts["r.json"])["command"] == "check"
    assert json.loads(texts["r.sarif"])["version"] == "2.1.0"
    assert texts["r.xml"].startswith("<?xml")
    assert texts["r.html"].lower().startswith("<!doctype html>")
    assert all("ATT701" in text for text in texts.values())


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_line_is_longer_than_the_terminal_is_wide(columns: int, attncli_run: Command) -> None:
    from rich.console import Console

    from attncli import api
    from attncli.render import table

    report = api.check_model("code.py:hidden", input="code.py:batch", device="cpu", expect=["heads=5"])
    console = Console(width=columns, record=True, file=io.StringIO())
    table.draw(report, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= columns
    words = " ".join(" ".join(lines).split())
    assert "attention" in words
    assert "ATT801" in words


def test_long_facts_go_on_below_themselves_and_short_ones_are_not_broken(attncli_run: Command) -> None:
    from rich.console import Console

    from attncli import api
    from attncli.render import table

    report = api.check_model("code.py:healthy", input="code.py:batch", device="cpu")
    console = Console(width=80, record=True, file=io.StringIO())
    table.draw(report, console)
    lines = console.export_text().splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("scores "))
    column = lines[start].index("largest")
    below = lines[start + 1]
    assert below[:column].strip() == ""
    assert re.fullmatch(r"\+\d+\.\d bits of float16 left · largest score [\d.]+", below.strip())


def test_the_page_of_a_check_says_each_thing_once(attncli_run: Command, tmp_path: Path) -> None:
    def verdict(build: str) -> str:
        attncli_run(f"code.py:{build}", *RUN, "-o", "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        found = re.search(r'<section[^>]*class="verdict.*?</section>', page, re.DOTALL)
        assert found is not None
        return " ".join(re.sub(r"<[^>]*>", " ", found[0]).split())

    assert re.search(r"no findings\. No NaN or Inf in \d+ operators; smallest headroom", verdict("healthy"))
    hidden = verdict("hidden")
    assert "1 origin of NaN or Inf in" in hidden
    assert hidden.count("error") <= 2  # the headline and the sentence
    assert "no operator ran" not in verdict("no_attention")
