"""SARIF against the official schema, what GitHub requires beyond it, and identities that stay."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ci_reports import HOSTILE, REPORTS, golden, many, mismatch, rendered, report, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from test_render import finding, gpt2

from attncli.records import Finding, Report
from attncli.render import sarif
from attncli.rules import RULES

SCHEMA = Path(__file__).parent / "data" / "sarif-schema-2.1.0.json"


@cache
def validator() -> Draft7Validator:
    return Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def run_of(text: str) -> dict[str, Any]:
    """The run of a log that is strict JSON, valid, and complete for GitHub."""
    text.encode("utf-8")
    log = json.loads(text, parse_constant=refuse)
    assert [error.message for error in validator().iter_errors(log)] == []
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    for rule in rules:
        assert all(rule[name]["text"] for name in ("shortDescription", "fullDescription", "help"))
        assert len(rule["name"]) <= 255
        assert all(len(rule[name]["text"]) <= 1024 for name in ("shortDescription", "fullDescription"))
        assert len(rule["properties"]["tags"]) <= 20
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        assert physical["artifactLocation"]["uriBaseId"] == "%SRCROOT%"
        assert re.fullmatch(r"(?!/)[!-9;-~][!-~]*", physical["artifactLocation"]["uri"])
        assert physical["region"]["startLine"] >= 1
        assert re.fullmatch(r"[0-9a-f]{16}:\d+", result["partialFingerprints"]["primaryLocationLineHash"])
    marks = [tuple(result["partialFingerprints"].values()) for result in run["results"]]
    assert len(set(marks)) == len(marks)
    run_: dict[str, Any] = run
    return run_


def run(shown: Report, **options: Any) -> dict[str, Any]:
    return run_of(sarif.text(shown, **options))


@pytest.mark.parametrize("name", REPORTS)
def test_the_log_is_the_golden_one_and_valid(name: str) -> None:
    text = rendered(name, "sarif")
    assert text == golden(name, "sarif").read_text(encoding="utf-8")
    run_of(text)


def test_the_schema_refuses_what_is_no_sarif() -> None:
    log = json.loads(rendered("one", "sarif"))
    log["runs"][0]["results"][0]["level"] = "grave"
    assert list(validator().iter_errors(log))
    del log["runs"]
    assert list(validator().iter_errors(log))


# --- results ------------------------------------------------------------------------------------------


def test_a_result_says_where_and_of_which_layer() -> None:
    (result,) = run_of(rendered("nan", "sarif"))["results"]
    assert result["level"] == "error"
    (location,) = result["locations"]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "src/model.py"
    assert location["physicalLocation"]["region"] == {"startLine": 41}
    assert location["logicalLocations"] == [
        {"name": "attn", "fullyQualifiedName": "decoder.0.attn", "kind": "module"}
    ]
    assert result["message"]["text"].endswith("q·k overflows float16. Scale q before the product.")
    assert result["properties"]["evidence"]["value"] == "nan"


def test_every_finding_is_a_result_the_gravest_first_and_known_ones_last() -> None:
    results = run_of(rendered("mixed", "sarif"))["results"]
    assert [(result["level"], "suppressions" in result) for result in results] == [
        ("error", False),
        ("error", False),
        ("error", False),
        ("warning", False),
        ("note", False),
        ("error", True),
        ("error", True),
    ]
    assert results[-1]["suppressions"][0]["kind"] == "external"
    assert "logicalLocations" not in results[-1]["locations"][0]


def test_5000_findings_are_5000_results() -> None:
    results = run(many(5000))["results"]
    assert len(results) == 5000
    assert [result["level"] for result in results] == ["error"] * 1250 + ["warning"] * 2500 + ["note"] * 1250


@pytest.mark.parametrize(
    ("name", "successful", "code"),
    [
        ("clean", True, 0),
        ("one", True, 1),
        ("nothing", False, 3),
        ("unobserved", False, 3),
        ("known", True, 0),
    ],
)
def test_the_invocation_tells_the_exit_code_and_whether_anything_was_observed(
    name: str, successful: bool, code: int
) -> None:
    (invocation,) = run_of(rendered(name, "sarif"))["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (successful, code)
    levels = [told["level"] for told in invocation["toolExecutionNotifications"]]
    assert ("error" in levels) is not successful


# --- identity -----------------------------------------------------------------------------------------


def marks(shown: Report) -> dict[tuple[str, str], dict[str, str]]:
    """Fingerprints by level and message."""
    return {
        (result["level"], result["message"]["text"]): result["partialFingerprints"]
        for result in run(shown)["results"]
    }


def test_fingerprints_do_not_depend_on_the_order() -> None:
    shown = many(40)
    turned = replace(shown, findings=shown.findings[::-1])
    assert marks(shown) == marks(turned)


def test_findings_of_one_rule_and_place_are_told_apart_by_head() -> None:
    twice = [replace(mismatch("h.0.attn"), head=head, message=f"h.0.attn: {head}.") for head in (3, 1)]
    third, first = (
        result["partialFingerprints"] for result in run(report(gpt2(0), findings=tuple(twice)))["results"]
    )
    mark = twice[0].fingerprint
    assert first == {"attncli/v1": mark, "primaryLocationLineHash": f"{mark[:16]}:1"}
    assert third == {"attncli/v1": f"{mark}:2", "primaryLocationLineHash": f"{mark[:16]}:2"}


def test_one_finding_given_twice_is_two_results() -> None:
    one = mismatch("h.0.attn")
    assert len(run(report(gpt2(0), findings=(one, one), known=(one,)))["results"]) == 3


def test_a_finding_keeps_its_mark_when_it_becomes_known() -> None:
    found = [replace(mismatch("h.0.attn"), head=head, message=f"h.0.attn: {head}.") for head in (0, 1)]
    new = marks(report(gpt2(0), findings=tuple(found)))
    assert marks(report(gpt2(0), findings=(found[0],), known=(found[1],))) == new


# --- rules --------------------------------------------------------------------------------------------


def test_without_a_catalogue_a_rule_is_told_from_its_finding() -> None:
    (rule,) = run_of(rendered("one", "sarif"))["tool"]["driver"]["rules"]
    assert rule["id"] == "ATT101"
    assert rule["shortDescription"]["text"] == "heads mismatch."
    assert rule["help"]["text"] == "Compare it with the original checkpoint."
    assert rule["defaultConfiguration"] == {"level": "error"}


def test_the_catalogue_is_told_as_a_whole_and_is_the_same_in_every_file() -> None:
    described = run(REPORTS["one"], rules=RULES)["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in described] == sorted(rule.code for rule in RULES)
    assert described == run(REPORTS["clean"], rules=RULES)["tool"]["driver"]["rules"]
    for rule, told in zip(sorted(RULES, key=lambda rule: rule.code), described, strict=True):
        assert told["name"] == rule.name
        assert told["properties"]["precision"] in ("very-high", "high", "medium")
        assert told["properties"]["problem.severity"] in ("error", "warning", "recommendation")
        for text in (told["help"]["text"], told["help"]["markdown"]):
            assert all(title in text for title in ("Why it is bad", "Formula", "Threshold", "What helps"))


def test_a_rule_that_is_not_in_the_catalogue_is_told_as_well() -> None:
    strange = replace(mismatch("h.0.attn"), code="ATT000")
    rules = run(report(gpt2(0), findings=(strange,)), rules=RULES)["tool"]["driver"]["rules"]
    assert rules[0]["id"] == "ATT000"


def test_a_rule_with_long_words_keeps_within_what_github_shows() -> None:
    long = replace(mismatch("h.0.attn"), name="x" * 300, advice="y" * 3000)
    (rule,) = run(report(gpt2(0), findings=(long,)))["tool"]["driver"]["rules"]
    assert (len(rule["name"]), len(rule["fullDescription"]["text"])) == (255, 1024)
    assert len(rule["help"]["text"]) == 3000


# --- limits -------------------------------------------------------------------------------------------


def test_beyond_what_GitHub_takes_the_mildest_are_left_out(  # noqa: N802
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sarif._MOST == 25_000
    monkeypatch.setattr(sarif, "_MOST", 250)
    found = run(unlike(260))
    assert len(found["results"]) == 250
    assert [result["level"] for result in found["results"][:8]] == ["error"] * 7 + ["note"]
    (told,) = found["invocations"][0]["toolExecutionNotifications"]
    assert told == {"level": "warning", "message": {"text": "10 more results are left out, the mildest."}}


def test_a_log_that_GitHub_would_refuse_for_its_size_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: N802
    monkeypatch.setattr(sarif, "_BYTES", 10_000)
    text = sarif.text(many(1000))
    assert len(zlib.compress(text.encode("utf-8"))) <= 10_000
    found = run_of(text)
    assert 0 < len(found["results"]) < 1000
    assert {result["level"] for result in found["results"]} == {"error"}
    left_out = 1000 - len(found["results"])
    (told,) = found["invocations"][0]["toolExecutionNotifications"]
    assert told["message"]["text"].startswith(f"{left_out} more results")


# --- hostile names ------------------------------------------------------------------------------------


def test_a_message_holds_no_link_and_no_placeholder() -> None:
    found = finding("ATT1", "x", "note", "[see](http://x.yz) {0} {name} [1]")
    (result,) = run(report(gpt2(0), findings=(found,)))["results"]
    assert result["message"]["text"].startswith(r"[see\](http://x.yz) {{0}} {name} [1]")


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def test_a_hostile_name_is_printable_wherever_it_is_shown() -> None:
    found = run_of(rendered("hostile", "sarif"))
    for result in found["results"]:
        del result["properties"]
    assert [text for text in texts(found) if not text.isprintable()] == []
    assert HOSTILE not in "".join(texts(found))


@settings(deadline=None)
@given(st.text(st.characters(codec=None), min_size=1))
def test_whatever_stands_in_a_name_the_log_is_valid(name: str) -> None:
    odd = Finding(name, name, "error", name, name, name, evidence={name: name, "source": f"{name}:3"})
    run(
        report(gpt2(0), source={"path": name}, findings=(odd, odd), known=(odd,), notes=(name,), command=name)
    )
