"""`attncli rules` and `attncli explain` as a user meets them: words, formats, files, terminals, typing mistakes.

Golden files are made anew by `python tests/test_cli_explain.py`; look at their diff before committing it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Command
from rich.cells import cell_len
from rich.console import Console

import attncli
from attncli.api.explained import explained, reported_by, rule_page
from attncli.cli import app
from attncli.records.pages import Column, Facts, Formula, Page, Prose, Table
from attncli.render import pages
from attncli.rules import RULES, Rule
from attncli.topics import TOPICS

ROOT = Path(attncli.__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden_topics"
FIELDS = [name for name in Rule._fields if name != "check"]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def process(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    deciding = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "PYTHONIOENCODING", "TERM")
    kept = {key: value for key, value in os.environ.items() if key not in deciding}
    return subprocess.run(
        [sys.executable, "-m", "attncli", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- rules --------------------------------------------------------------------------------------------


def test_rules_lists_every_rule_on_a_line_of_its_own(attncli_run: Command) -> None:
    result = attncli_run("rules")
    assert (result.code, result.err) == (0, "")
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.startswith("ATT")}
    assert list(lines) == [rule.code for rule in RULES]
    for rule in RULES:
        assert lines[rule.code].split(maxsplit=3) == [rule.code, rule.name, rule.severity, rule.what]
    assert result.out.splitlines()[0] == f"{len(RULES)} rules"


@pytest.mark.parametrize(
    ("words", "codes"),
    [
        (["ATT410"], ["ATT410"]),
        (["att410", "ATT601"], ["ATT410", "ATT601"]),
        (["ATT601,unscaled-scores"], ["ATT410", "ATT601"]),
        (["ATT6xx"], ["ATT601", "ATT602", "ATT603"]),
        (["ATT6", "entropy-collapse"], ["ATT601", "ATT602", "ATT603"]),
        (["Entropy_Collapse"], ["ATT601"]),
    ],
)
def test_rules_are_chosen_by_code_prefix_or_name(
    attncli_run: Command, words: list[str], codes: list[str]
) -> None:
    values = json.loads(attncli_run("rules", *words, "--format", "json").out)
    assert [row["code"] for row in values["rules"]] == codes


def test_json_holds_every_field_of_every_rule(attncli_run: Command) -> None:
    values = json.loads(attncli_run("rules", "-f", "json").out)
    assert values["schema"] == "attncli-explain/1"
    for row, rule in zip(values["rules"], RULES, strict=True):
        assert {name: row[name] for name in FIELDS} == {name: getattr(rule, name) for name in FIELDS}
        assert row["commands"] == [f"attncli {command}" for command in reported_by(rule.code)]


def test_the_markdown_table_has_four_cells_in_every_row(attncli_run: Command) -> None:
    rows = [line for line in attncli_run("rules", "-f", "markdown").out.splitlines() if line.startswith("|")]
    assert len(rows) == len(RULES) + 2
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_an_unknown_rule_is_told_with_those_that_are_near(attncli_run: Command) -> None:
    result = attncli_run("rules", "unscaled-score")
    assert result.code == 2
    assert result.out == ""
    assert result.err == (
        "error: attncli rules: no rule is named 'unscaled-score'.\n"
        "  try: Did you mean unscaled-scores? attncli rules lists all rules.\n"
    )
    assert attncli_run("rules", "ATT4,zzz").err == (
        "error: attncli rules: no rule is named 'zzz'.\n  try: attncli rules lists all rules.\n"
    )


# --- one rule -----------------------------------------------------------------------------------------


@every_rule
def test_a_rule_is_explained_with_all_its_texts(rule: Rule) -> None:
    said = one_line(pages.text(explained([rule.code]), width=100_000))
    assert said.startswith(f"{rule.code} {rule.name} {rule.severity} {one_line(rule.what)}")
    source = "attncli's own" if rule.source == "attncli" else rule.source
    for text in (rule.why, rule.formula, rule.threshold, source, rule.example, rule.remedy):
        assert one_line(text) in said
    assert f"provenance {rule.provenance}: the threshold" in said
    assert f"--ignore {rule.code}" in said


@every_rule
@pytest.mark.parametrize("width", [40, 80])
def test_a_rule_is_whole_at_any_width(rule: Rule, width: int) -> None:
    narrow = pages.text(explained([rule.code]), width=width)
    assert max(map(cell_len, narrow.splitlines())) <= width
    for text in (rule.what, rule.why, rule.formula, rule.threshold, rule.example, rule.remedy):
        assert "".join(text.split()) in "".join(narrow.split())


@every_rule
def test_a_rule_is_reported_by_commands_that_exist(rule: Rule) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert reported_by(rule.code)
    for command in reported_by(rule.code):
        name, *rest = command.split()
        assert set(rest) <= {option for parameter in commands[name].params for option in parameter.opts}


def test_the_longest_prefix_says_who_reports() -> None:
    assert reported_by("ATT202")[0] == "inspect --values"
    assert "inspect --bounds" not in reported_by("ATT202")
    assert "inspect --bounds" in reported_by("ATT201")
    assert reported_by("XYZ1") == ()


@pytest.mark.parametrize("word", ["ATT410", "att410", "410", "unscaled-scores", "Unscaled_Scores"])
def test_a_rule_goes_by_code_number_and_name(attncli_run: Command, word: str) -> None:
    assert attncli_run("explain", word).out.startswith("ATT410 unscaled-scores  warning\n")


@pytest.mark.parametrize("word", ["ATT5", "att5", "ATT5xx", "ATT50"])
def test_a_prefix_lists_its_rules(attncli_run: Command, word: str) -> None:
    result = attncli_run("explain", word)
    assert [line.split()[0] for line in result.out.splitlines() if line.startswith("ATT")] == [
        rule.code for rule in RULES if rule.code.startswith("ATT5")
    ]
    assert max(map(cell_len, result.out.splitlines())) <= 80


def test_the_word_for_a_provenance_is_explained() -> None:
    said = {rule.provenance: one_line(pages.text(explained([rule.code]), width=200)) for rule in RULES}
    assert "published: the threshold stands in the source." in said["published"]
    assert "derived: the threshold follows from arithmetic or from a definition" in said["derived"]
    assert "heuristic: the threshold is attncli's own judgement" in said["heuristic"]


# --- topics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_a_topic_goes_by_its_name_and_aliases(topic: Any) -> None:
    for word in (topic.name, *topic.aliases):
        assert explained([word.upper().replace("-", "_")]).title == f"{topic.name}: {topic.title}"


@pytest.mark.parametrize("words", [["kv", "cache"], ["kv cache"], ["KV-cache"], ["kv_cache"]])
def test_a_topic_may_be_typed_in_several_words(attncli_run: Command, words: list[str]) -> None:
    assert attncli_run("explain", *words).out.startswith("multi-head: ")


def test_without_a_word_all_topics_and_ranges_of_rules_are_listed(attncli_run: Command) -> None:
    result = attncli_run("explain")
    assert result.code == 0
    for topic in TOPICS:
        assert re.search(rf"^{topic.name} +{re.escape(topic.title)}$", result.out, re.MULTILINE)
    for prefix in {rule.code[:4] for rule in RULES}:
        count = sum(rule.code.startswith(prefix) for rule in RULES)
        assert re.search(rf"^{prefix}xx  .+ \({count} rules?\)$", result.out, re.MULTILINE)
    values = json.loads(attncli_run("explain", "-f", "json").out)
    assert [row["name"] for row in values["topics"]] == [topic.name for topic in TOPICS]
    assert len(values["rules"]) == len(RULES)


def test_json_of_a_topic_holds_the_numbers_themselves(attncli_run: Command) -> None:
    (topic,) = json.loads(attncli_run("explain", "overflow", "-f", "json").out)["topics"]
    table = next(block for block in topic["blocks"] if "rows" in block)
    assert table["rows"][0][:2] == ["float16", 65504.0]
    (nan,) = json.loads(attncli_run("explain", "nan", "-f", "json").out)["topics"]
    assert ["inf / inf", "nan"] in next(block for block in nan["blocks"] if "rows" in block)["rows"]
    assert topic["commands"][0] == "attncli overflow MODEL"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("scalling", "Did you mean scaling? attncli explain lists all."),
        ("sofmax", "Did you mean softmax? attncli explain lists all."),
        ("nanborn", "Did you mean nan-born? attncli explain lists all."),
        ("ATT999x9", "attncli explain lists all."),
        ("", "attncli explain lists all."),
    ],
)
def test_an_unknown_word_is_told_with_those_that_are_near(
    attncli_run: Command, word: str, remedy: str
) -> None:
    result = attncli_run("explain", word)
    assert (result.code, result.out) == (2, "")
    subject, tried = result.err.splitlines()
    assert subject == f"error: attncli explain: no topic and no rule is named {word!r}."
    if "Did" in remedy or not word:
        assert tried == f"  try: {remedy}"
    assert "Traceback" not in result.err


def test_a_hostile_word_does_not_steer_the_terminal(attncli_run: Command) -> None:
    result = attncli_run("explain", "\x1b[31mred\n\udc80")
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "no topic and no rule is named" in result.err


# --- files, pipes, terminals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "first"), [("a.txt", "ATT410 "), ("a.md", "# ATT410"), ("a.json", "{"), ("a.html", "ATT410 ")]
)
def test_a_file_is_written_in_the_format_that_its_name_says(
    attncli_run: Command, tmp_path: Path, file: str, first: str
) -> None:
    result = attncli_run("explain", "ATT410", "-o", file)
    assert result == (0, "", "")
    assert (tmp_path / file).read_text(encoding="utf-8").startswith(first)


def test_a_named_format_is_stronger_than_the_name_of_the_file(attncli_run: Command, tmp_path: Path) -> None:
    attncli_run("rules", "ATT6", "--format", "json", "--output", "a.md")
    assert json.loads((tmp_path / "a.md").read_text(encoding="utf-8"))["topics"] == []


def test_a_file_that_cannot_be_written_is_an_error(attncli_run: Command) -> None:
    result = attncli_run("rules", "-o", "missing/rules.txt")
    assert result.code == 2
    assert result.err.startswith("error: missing/rules.txt: there is no folder missing.")


def test_settings_of_reports_are_none_of_an_explanation(attncli_run: Command, tmp_path: Path) -> None:
    settings = '[tool.attncli]\nformat = "json"\noutput = "report.json"\n'
    (tmp_path / "pyproject.toml").write_text(settings, encoding="utf-8")
    assert attncli_run("explain", "ATT410").out.startswith("ATT410 ")
    assert not (tmp_path / "report.json").exists()


def test_what_is_piped_has_no_colour_and_the_width_that_columns_says(tmp_path: Path) -> None:
    wide = process("explain", "scaling", folder=tmp_path, TERM="xterm-256color")
    narrow = process("explain", "scaling", folder=tmp_path, TERM="xterm-256color", COLUMNS="40")
    assert (wide.returncode, wide.stderr, narrow.returncode) == (0, "", 0)
    assert "\x1b" not in wide.stdout + narrow.stdout
    assert max(map(cell_len, wide.stdout.splitlines())) in range(75, 81)
    assert max(map(cell_len, narrow.stdout.splitlines())) in range(36, 41)


@pytest.mark.parametrize("columns", ["0", "-5", "wide", "7", "²"])
def test_a_width_that_is_none_is_no_error(
    monkeypatch: pytest.MonkeyPatch, attncli_run: Command, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert attncli_run("explain", "nan").code == 0


def test_a_terminal_gets_colour_unless_it_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(**environment: str) -> str:
        console = Console(force_terminal=True, width=60, _environ={"TERM": "xterm-256color", **environment})
        with console.capture() as capture:
            pages.draw(explained(["ATT410"]), console)
        return capture.get()

    colours = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    assert colours.search(drawn())
    assert not colours.search(drawn(NO_COLOR="1"))


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    line = f"{sys.executable} -m attncli explain overflow | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stdout == "overflow: where q·k leaves its dtype\n0\n"
    assert done.stderr == ""


def test_an_explanation_imports_no_tensor_library(tmp_path: Path) -> None:
    script = "import sys; from attncli.cli import run; run(); sys.exit(sum(m in sys.modules for m in "
    script += "('torch', 'numpy', 'transformers', 'attncli.trace')))"
    done = subprocess.run(
        [sys.executable, "-c", script, "explain", "scaling"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["rules", "explain"])
def test_the_help_names_every_option(attncli_run: Command, command: str) -> None:
    said = attncli_run(command, "--help").out
    assert all(option in said for option in ("--format", "-f", "--output", "-o", "markdown", "json"))


# --- pages made by hand -------------------------------------------------------------------------------

HOSTILE = Page(
    "a *title* <b>\x1b[31m",
    (
        Prose("@team #12 `code` a|b [link](http://x)\n# no heading"),
        Formula(("x = 1",)),
        Table((Column("name"), Column("number", ",")), (("a|b\n| c", 12345), ("d", 6))),
        Facts((("*", "_"),)),
    ),
)


def test_hostile_words_are_harmless_in_markdown() -> None:
    text = pages.markdown(HOSTILE)
    assert "\x1b" not in text
    assert text.startswith("# a \\*title\\* \\<b\\>\\\\x1b\\[31m\n")
    assert "\n# no heading" not in text
    assert r"\@team \#12 \`code\` a\|b \[link\](http://x)" in text
    assert "| a\\|b\\\\x0a\\| c | 12 345 |" in text


def test_hostile_words_are_harmless_on_a_terminal() -> None:
    text = pages.text(HOSTILE, width=60)
    assert "\x1b" not in text
    assert "a|b\\x0a| c  12 345" in text


def test_a_table_too_wide_for_the_terminal_becomes_lines() -> None:
    wide = Table(
        tuple(Column(f"column {i}", ".3f") for i in range(6)), (tuple(i + 0.5 for i in range(6)),), "Caption."
    )
    text = pages.text(Page("title", (wide,)), width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert "column 5 5.500" in text
    assert pages.text(Page("title", (Table((Column("a"),), ()),)), width=40) == "title\n\na\n"


@pytest.mark.parametrize(
    ("value", "shown", "text"),
    [(0.125, "", "0.125"), (12345, ",", "12 345"), (2**30, "bytes", "1.07 GB"), (1500, "count", "1.5 k"),
     (float("inf"), ".3g", "inf"), ("12,5", ",", "12,5"), (3.0, "+.1f", "+3.0")],
)  # fmt: skip
def test_a_cell_shows_its_number_as_the_column_asks(value: Any, shown: str, text: str) -> None:
    assert pages.cell(value, Column("x", shown)) == text


GOLDEN_TEXTS: dict[str, Callable[[], str]] = {
    "att410.txt": lambda: pages.text(explained(["ATT410"]), width=80),
    "att410-40-columns.txt": lambda: pages.text(explained(["ATT410"]), width=40),
    "att410.md": lambda: pages.markdown(explained(["ATT410"])),
    "att410.json": lambda: pages.json_text(explained(["ATT410"])),
    "scaling.md": lambda: pages.markdown(explained(["scaling"])),
    "att6.txt": lambda: pages.text(rule_page(["ATT6"]), width=80),
    "att6-40-columns.txt": lambda: pages.text(rule_page(["ATT6"]), width=40),
}


@pytest.mark.parametrize("file", GOLDEN_TEXTS)
def test_a_page_looks_as_it_did(file: str) -> None:
    assert GOLDEN_TEXTS[file]() == (GOLDEN / file).read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file, made in GOLDEN_TEXTS.items():
        (GOLDEN / file).write_text(made(), encoding="utf-8")
