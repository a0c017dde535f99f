"""Workflow commands, read back by the rules of GitHub's own runner."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from ci_reports import HOSTILE, REPORTS, golden, many, mismatch, rendered, report, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import finding, gpt2

from attncli.records import Finding
from attncli.render import github

REGISTERED = {
    "error",
    "warning",
    "notice",
    "set-env",
    "add-path",
    "stop-commands",
    "debug",
    "group",
    "add-mask",
}


class Command(NamedTuple):
    name: str
    properties: dict[str, str]
    data: str


def unescaped(value: str, pairs: list[tuple[str, str]]) -> str:
    for code, letter in pairs:
        value = value.replace(code, letter)
    return value


DATA = [("%0D", "\r"), ("%0A", "\n"), ("%25", "%")]
PROPERTY = [("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")]


def parsed(line: str) -> Command | None:
    """What the runner makes of one line of a step's output (ActionCommand.TryParseV2, then TryParse)."""
    stripped = line.lstrip()
    end = stripped.find("::", 2)
    if stripped.startswith("::") and end >= 0:
        name, _, rest = stripped[2:end].partition(" ")
        if name in REGISTERED:
            pairs = [pair.split("=", 1) for pair in rest.strip().split(",") if pair]
            properties = {pair[0]: unescaped(pair[1], PROPERTY) for pair in pairs if len(pair) == 2}
            return Command(name, properties, unescaped(stripped[end + 2 :], DATA))
    start = line.find("##[")
    if start >= 0 and "]" in line[start:]:
        name = line[start + 3 : line.index("]", start)].partition(" ")[0]
        return Command(name, {}, line) if name in REGISTERED else None
    return None


def commands(text: str) -> list[Command]:
    """Every command in a report, whose last line must be none."""
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    found = [parsed(line) for line in lines]
    assert found[-1] is None
    assert lines[-1].startswith("attncli ")
    assert None not in found[:-1]
    return [command for command in found if command is not None]


@pytest.mark.parametrize("name", REPORTS)
def test_the_commands_are_the_golden_ones(name: str) -> None:
    assert rendered(name, "github") == golden(name, "github").read_text(encoding="utf-8")


def test_a_finding_is_one_command_with_its_file_and_advice() -> None:
    (command,) = commands(rendered("one", "github"))
    assert command == Command(
        "error",
        {"file": "weights/model.safetensors", "title": "ATT101 heads-mismatch"},
        "h.1.attn: no 11 heads in 768 rows.\nCompare it with the original checkpoint.",
    )


def test_a_line_of_the_users_code_is_told() -> None:
    (command,) = commands(rendered("nan", "github"))
    assert (command.properties["file"], command.properties["line"]) == ("src/model.py", "41")
    assert command.data.startswith("decoder.0.attn (bmm, model.py:41): ")


def test_layers_that_are_alike_share_one_command() -> None:
    first, second, third = commands(rendered("mixed", "github"))
    assert first.data.startswith("h.{0–2}.attn: no 11 heads")
    assert first.properties["title"] == "ATT101 heads-mismatch (3 layers)"
    assert (first.name, second.name, third.name) == ("error", "warning", "notice")


@pytest.mark.parametrize("name", ["clean", "known", "nothing", "unobserved"])
def test_without_findings_there_is_the_verdict_alone(name: str) -> None:
    assert commands(rendered(name, "github")) == []
    assert rendered(name, "github").count("\n") == 1


def test_known_findings_are_counted_and_not_annotated() -> None:
    assert rendered("known", "github").endswith("2 attention layers; no findings; 2 known findings.\n")


@pytest.mark.parametrize("count", [10, 11, 5000])
def test_there_are_ten_commands_at_most_and_the_last_counts_the_rest(count: int) -> None:
    found = commands(github.text(unlike(count)))
    assert len(found) == 10
    assert [command.name for command in found[:7]] == ["error"] * 7
    rest = count - 9
    if count > 10:
        assert found[-1].name == "notice"
        assert found[-1].data.startswith(f"{rest} notes more, not shown here: ATT101 heads-mismatch.")
        assert found[-1].properties == {"title": f"{rest} more findings"}


def test_the_rest_has_the_severity_of_the_gravest_in_it() -> None:
    errors = [finding(f"ATT{at}", "x", "error", "wrong.") for at in range(12)]
    found = commands(github.text(report(gpt2(0), findings=(finding("ATT9", "y", "note", "odd."), *errors))))
    assert [command.name for command in found] == ["error"] * 10
    assert "3 errors, 1 note more" in found[-1].data
    assert "ATT9 x, ATT10 x, ATT11 x, ATT9 y." in found[-1].data


def test_5000_findings_of_few_kinds_are_few_commands() -> None:
    found = commands(github.text(many(5000)))
    assert [command.name for command in found] == ["error", "warning", "warning", "notice"]
    assert found[0].data.startswith(
        "h.{0–99}.attn: head 0: the number is 0. (h.0.attn, and 1249 more like it)\n"
    )


def test_a_message_keeps_within_what_the_runner_keeps() -> None:
    long = Finding("ATT1", "x", "error", "\x00" * 9000, "b" * 9000)
    (command,) = commands(github.text(report(gpt2(0), findings=(long,))))
    assert len(command.data) <= 4096
    assert [line[-1] for line in command.data.split("\n")] == ["…", "…"]


# --- hostile names ------------------------------------------------------------------------------------


def test_a_hostile_name_gives_no_command_and_arrives_as_it_is() -> None:
    first, second = commands(rendered("hostile", "github"))
    assert (first.name, second.name) == ("error", "notice")
    assert set(first.properties) == {"file", "title"}
    assert (
        r"\x0a::set-env name=A::b\x0d::stop-commands::x\x0a##\x5badd-path]/tmp %0A::error::x {0} %25"
        in second.data
    )
    assert second.data.count("\n") == 1
    assert "##[" not in rendered("hostile", "github")


def test_a_model_cannot_name_itself_a_command() -> None:
    for name in ("::error::x", "  ::stop-commands::x", "##[error]x", "\n::error::x", "%0A::error::x"):
        assert commands(github.text(report(gpt2(0), source={"path": name}))) == []
        (command,) = commands(github.text(report(gpt2(0), findings=(finding("A", "b", "note", name),))))
        assert command.name == "notice"


@settings(deadline=None)
@given(st.text(st.characters(codec=None)))
def test_whatever_stands_in_a_name_there_is_one_command_with_its_own_properties(name: str) -> None:
    odd = Finding("ATT1", "x", "error", name, name, name, evidence={"source": f"{name}:3"})
    (command,) = commands(github.text(report(gpt2(0), source={"path": name}, findings=(odd,))))
    assert command.name == "error"
    assert set(command.properties) <= {"file", "line", "title"}
    assert command.properties["title"] == "ATT1 x"


def test_the_reader_of_commands_sees_one_that_is_not_escaped() -> None:
    assert parsed(" ::error title=a%2Cb::c%0Ad") == Command("error", {"title": "a,b"}, "c\nd")
    assert parsed("x ##[error]y") is not None
    assert parsed("x ::error::y") is None
    assert HOSTILE.count("\n") == 2
    assert mismatch("a").severity == "error"
