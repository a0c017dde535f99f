"""JUnit XML against the schema of Jenkins, and what a CI server counts in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from ci_reports import REPORTS, golden, many, mismatch, rendered, report
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import finding, gpt2

from attncli.records import SEVERITIES, Finding, Report
from attncli.render import FORMATS, junit

XSD = Path(__file__).parent / "data" / "junit.xsd"


@cache
def schema() -> Any:
    return xmlschema.XMLSchema(str(XSD))


def suite_of(text: str) -> ET.Element:
    """The suite of a document that is well-formed and valid, whose counts are right."""
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>')
    root = ET.fromstring(text.encode("utf-8"))
    schema().validate(root)
    (suite,) = root
    counts = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for attribute, tag in counts.items():
        assert suite.get(attribute) == str(len(list(suite.iter(tag)))), attribute
    return suite


def suite(shown: Report) -> ET.Element:
    return suite_of(junit.text(shown))


def states(found: ET.Element) -> dict[str, str]:
    """What a CI server shows: each test with the tag that decides its colour."""
    return {
        case.get("name", ""): next((one.tag for one in case if one.tag != "system-out"), "passed")
        for case in found.iter("testcase")
    }


@pytest.mark.parametrize("name", REPORTS)
def test_the_document_is_the_golden_one_and_valid(name: str) -> None:
    text = rendered(name, "junit")
    assert text == golden(name, "junit").read_text(encoding="utf-8")
    suite_of(text)


def test_the_schema_refuses_what_is_no_junit() -> None:
    root = ET.fromstring(rendered("one", "junit").encode())
    ET.SubElement(root[0], "testcase")
    assert not schema().is_valid(root)


def test_a_healthy_model_is_one_passed_test_for_each_layer() -> None:
    found = suite(report(*(gpt2(index) for index in range(24))))
    assert states(found) == {f"h.{index}.attn": "passed" for index in range(24)}
    assert (found.get("tests"), found.get("failures")) == ("24", "0")


def test_a_layer_with_an_error_has_failed_and_tells_all_of_them() -> None:
    other = finding("ATT102", "widths-disagree", "error", "h.1.attn: 3 columns.", "h.1.attn")
    found = suite(report(gpt2(0), gpt2(1), findings=(mismatch("h.1.attn"), other)))
    assert states(found) == {"h.0.attn": "passed", "h.1.attn": "failure"}
    (failure,) = found.iter("failure")
    assert failure.get("type") == "ATT101 heads-mismatch"
    assert failure.get("message") == "h.1.attn: no 11 heads in 768 rows. (and 1 more)"
    assert (failure.text or "").splitlines() == [
        "error ATT101 heads-mismatch: h.1.attn: no 11 heads in 768 rows.",
        "  weights/model.safetensors",
        "  Compare it with the original checkpoint.",
        "error ATT102 widths-disagree: h.1.attn: 3 columns.",
        "  weights/model.safetensors",
        "  Compare it with the original checkpoint.",
    ]


def test_lesser_and_known_findings_do_not_fail_and_are_told() -> None:
    found = suite_of(rendered("mixed", "junit"))
    assert states(found) == {
        "h.0.attn": "failure",
        "h.1.attn": "failure",
        "h.2.attn": "failure",
        "h.3.attn": "passed",
        "backbone.1.mixer": "skipped",
        "the whole model": "passed",
    }
    said = {case.get("name"): case.findtext("system-out") or "" for case in found.iter("testcase")}
    assert said["h.2.attn"].startswith("warning ATT104 unlike-siblings: ")
    assert said["h.3.attn"].startswith("known error ATT102 widths-disagree: ")
    assert said["the whole model"].startswith("note ATT005 unknown-storage: ")
    assert "known error ATT001" in said["the whole model"]


def test_known_findings_alone_are_passed_tests() -> None:
    assert set(states(suite_of(rendered("known", "junit"))).values()) == {"passed"}


def test_a_layer_that_was_not_observed_is_skipped_with_the_reason() -> None:
    found = suite_of(rendered("unobserved", "junit"))
    assert states(found) == {
        "h.0.attn": "passed",
        "h.1.attn": "skipped",
        "h.2.attn": "skipped",
        "backbone.1.mixer": "skipped",
        "something was observed": "error",
    }
    reasons = [one.get("message") for one in found.iter("skipped")]
    assert reasons[:2] == ["not observed: no mask", "not observed: it did not run"]


@pytest.mark.parametrize("name", REPORTS)
def test_the_suite_is_red_where_the_command_fails(name: str) -> None:
    found = suite_of(rendered(name, "junit"))
    red = int(found.get("failures", "")) + int(found.get("errors", ""))
    assert bool(red) is bool(REPORTS[name].exit_code("error"))


def test_a_model_without_layers_that_was_searched_is_one_passed_test() -> None:
    searched = report(run={"operators": 9, "operators_by_phase": {"forward": 9}})
    assert states(suite(searched)) == {"the whole model": "passed"}


def test_a_finding_of_a_layer_that_is_not_listed_has_a_test_of_its_own() -> None:
    found = suite(report(gpt2(0), findings=(mismatch("elsewhere"),)))
    assert states(found) == {"h.0.attn": "passed", "elsewhere": "failure"}


def test_5000_findings_are_100_failed_tests() -> None:
    found = suite(many(5000))
    assert (found.get("tests"), found.get("failures")) == ("100", "100")
    assert len([line for one in found.iter("failure") for line in (one.text or "").splitlines()]) == 3 * 1250


def test_dots_of_a_file_do_not_become_packages() -> None:
    case = suite_of(rendered("one", "junit")).find("testcase")
    assert case is not None
    assert case.get("classname") == "attncli.inspect.weights/model_safetensors"


@settings(deadline=None)
@given(st.text(st.characters(codec=None)))
def test_whatever_stands_in_a_name_the_document_is_valid(name: str) -> None:
    odd = [Finding(name, name, severity, name, name, name) for severity in ("error", "note")]
    layers = (gpt2(1, id=name, path=name), gpt2(0))
    some = tuple(odd)
    shown = report(*layers, source={"path": name}, findings=some, known=some, notes=(name,), command=name)
    suite(shown)


def test_what_makes_the_command_fail_is_a_failure_and_nothing_else():
    report = REPORTS["mixed"]

    def failures(fail_on):
        suite = ET.fromstring(FORMATS["junit"].text(report, fail_on=fail_on)).find("testsuite")
        return int(suite.get("failures"))

    layers = {
        severity: {f.layer for f in report.findings if f.severity == severity} for severity in SEVERITIES
    }
    assert failures("never") == 0
    assert failures("error") == len(layers["error"])
    assert failures("warning") == len(layers["error"] | layers["warning"])
    assert failures("note") == len(layers["error"] | layers["warning"] | layers["note"])
