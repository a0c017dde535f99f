"""Where a finding is, and findings that say the same of several layers as one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from ci_reports import HOSTILE, call, mismatch, report
from hypothesis import given, settings
from hypothesis import strategies as st
from test_render import finding, gpt2, layer

from attncli.records import Finding, Report
from attncli.render.collapsed import collapsed, tally
from attncli.render.observed import notes, unobserved, verdict
from attncli.render.places import Place, places

# RFC 3986: a relative reference begins with no slash, and its first part has no colon.
RELATIVE = re.compile(r"(?!/)[A-Za-z0-9._~!$&'()*+,;=@%-]+(/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def place(
    where: str | None = "h.0.attn", source: str = "m.safetensors", kind: str = "file", **other: object
) -> Place:
    found = Finding("ATT101", "heads-mismatch", "error", f"{where}: wrong.", "", where)
    shown = report(gpt2(0), source={"path": source, "kind": kind})
    return places(replace(shown, **other))(found)  # type: ignore[arg-type]


def told(evidence: dict[str, object], shown: Report) -> Place:
    return places(shown)(replace(mismatch("h.0.attn"), evidence=evidence))


# --- lines of code ------------------------------------------------------------------------------------


def test_the_line_that_a_finding_names_comes_first() -> None:
    shown = report(gpt2(0), calls=(call("h.0.attn", source="src/other.py:7"),))
    assert told({"source": "src/model.py:41"}, shown) == Place("src/model.py", 41)
    assert told({"source": "./src//model.py:41"}, shown) == Place("src/model.py", 41)
    assert told({"source": "src\\model.py:41"}, shown) == Place("src/model.py", 41)


def test_the_line_where_attention_of_the_layer_ran_comes_second() -> None:
    calls = (call("h.0.attn", source="/usr/lib/x.py:1"), call("h.0.attn", 1, source="src/model.py:12"))
    assert place(calls=calls) == Place("src/model.py", 12)
    assert place("h.1.attn", calls=calls).line is None


@pytest.mark.parametrize(
    "source",
    [
        "/usr/lib/python3/model.py:4",
        "C:/python/model.py:4",
        "C:\\python\\model.py:4",
        "../model.py:4",
        "src/../../model.py:4",
        ".venv/lib/python3.11/site-packages/transformers/models/bert.py:4",
        "lib/dist-packages/torch.py:4",
        "<string>:4",
        "model.py",
        "model.py:0",
        "model.py:",
        ":4",
        "model.py:99999999999999999999999",
        None,
        4,
    ],
)
def test_a_line_of_a_library_or_of_no_file_is_no_place(source: object) -> None:
    assert told({"source": source}, report(gpt2(0), source={"path": "w.pt"})).line is None


# --- files of a checkpoint ----------------------------------------------------------------------------


def test_a_finding_of_a_layer_is_in_the_file_that_holds_its_tensors() -> None:
    split = replace(gpt2(0), tensors=tuple(replace(t, file="shards/2.safetensors") for t in gpt2(0).tensors))
    shown = report(split, source={"path": "weights/gpt2", "kind": "folder"})
    assert told({}, shown) == Place("weights/gpt2/shards/2.safetensors")
    assert told({"source": "/lib/x.py:3"}, shown) == Place("weights/gpt2/shards/2.safetensors")


def test_the_tensor_that_a_finding_names_tells_the_file() -> None:
    first, *rest = gpt2(0).tensors
    split = replace(
        gpt2(0), tensors=(replace(first, file="1.bin"), *(replace(t, file="2.bin") for t in rest))
    )
    find = places(report(split, source={"path": "gpt2", "kind": "folder"}))
    assert find(mismatch("h.0.attn")) == Place("gpt2/1.bin")
    assert find(replace(mismatch("h.0.attn"), evidence={"tensor": rest[0].name})) == Place("gpt2/2.bin")
    assert find(finding("ATT201", "nan", "error", f"{rest[1].name}: 3 NaN.")) == Place("gpt2/2.bin")


def test_a_single_file_is_the_source_itself() -> None:
    single = replace(gpt2(0), tensors=tuple(replace(t, file="model.safetensors") for t in gpt2(0).tensors))
    for path in ("weights/model.safetensors", "./weights//model.safetensors"):
        assert told({}, report(single, source={"path": path})) == Place("weights/model.safetensors")
    assert told({}, report(single, source={"path": "weights/adapter.bin"})) == Place(
        "weights/model.safetensors"
    )


def test_a_file_that_a_finding_names_counts_only_if_it_is_there(here: Path) -> None:
    shown = report(source={"path": "gpt2", "kind": "folder"})
    assert told({"file": "model.safetensors.index.json"}, shown) == Place("gpt2")
    (here / "gpt2").mkdir()
    (here / "gpt2/model.safetensors.index.json").touch()
    assert told({"file": "model.safetensors.index.json"}, shown) == Place("gpt2/model.safetensors.index.json")


def test_a_name_that_no_file_can_have_is_no_error() -> None:
    held = replace(gpt2(0), tensors=tuple(replace(t, file="1.bin") for t in gpt2(0).tensors))
    long = "x" * 5000
    assert told({"file": long}, report(held, source={"path": long, "kind": "code"})) == Place(long)
    assert told({"file": long}, report(source={"path": "\0", "kind": "code"})) == Place("\0")


def test_weights_beside_code_do_not_become_files_inside_the_code() -> None:
    assert place(source="src/model.py:build", kind="code") == Place("src/model.py")


# --- the source itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("model.pt", "model.pt"),
        ("./a/b/../model.pt", "a/model.pt"),
        ("a\\model.pt", "a/model.pt"),
        (".", "."),
        ("src/model.py:build", "src/model.py"),
        ("src/model.py:Model.build", "src/model.py"),
        ("model:build", "model.py"),
        ("pkg.module:build", "pkg/module.py"),
        ("MyModel", "MyModel"),
        ("", "unknown"),
        ("../model.pt", "(outside)/model.pt"),
        ("../here2/model.pt", "(outside)/model.pt"),
        ("/", "(outside)"),
        ("/secret/alice/model.pt", "(outside)/model.pt"),
        ("C:\\secret\\model.pt", "(outside)/model.pt"),
        ("\0", "\0"),
        ("x" * 5000, "x" * 5000),
        (f"{'x' * 300}.y:build", f"{'x' * 300}/y.py"),
    ],
)
def test_the_source_is_told_from_the_working_folder_on(path: str, file: str) -> None:
    assert place(None, path, "code").file == file


def test_an_absolute_path_inside_the_working_folder_is_told_from_there(here: Path) -> None:
    assert place(None, str(here / "a" / "model.pt")) == Place("a/model.pt")
    (here.parent / "link").symlink_to(here)
    assert place(None, str(here.parent / "link" / "model.pt")) == Place("model.pt")


def test_a_folder_elsewhere_keeps_its_own_name_and_no_more() -> None:
    held = replace(gpt2(0), tensors=tuple(replace(t, file="a/1.bin") for t in gpt2(0).tensors))
    shown = report(held, source={"path": "/secret/alice/gpt2", "kind": "folder"})
    assert told({}, shown) == Place("(outside)/gpt2/a/1.bin")


def test_a_module_is_the_file_that_is_there(here: Path) -> None:
    (here / "src/pkg/module").mkdir(parents=True)
    (here / "src/pkg/module/__init__.py").touch()
    assert place(None, "pkg.module:build", "code").file == "src/pkg/module/__init__.py"
    (here / "pkg").mkdir()
    (here / "pkg/module.py").touch()
    assert place(None, "pkg.module:build", "code").file == "pkg/module.py"


def test_no_working_folder_is_no_error(here: Path) -> None:
    here.rmdir()
    assert place(None, "a/model.pt").file == "(outside)/model.pt"


@settings(deadline=None)
@given(st.text(st.characters(codec=None)), st.sampled_from(["file", "folder", "code"]), st.text())
def test_a_uri_is_relative_and_never_empty(path: str, kind: str, held: str) -> None:
    odd = replace(gpt2(0), tensors=tuple(replace(t, file=held) for t in gpt2(0).tensors))
    shown = report(odd, source={"path": path, "kind": kind})
    for where in ("h.0.attn", None):
        found = places(shown)(
            Finding("A", "b", "note", "c", "d", where, evidence={"source": path, "file": held})
        )
        assert RELATIVE.fullmatch(found.uri), found.uri
        assert ".." not in found.file.split("/")
        assert found.file == unquote(found.uri) or not found.file.isprintable() or "%" in found.uri


def test_a_hostile_name_is_percent_encoded() -> None:
    assert Place("a b/ü#?:%.pt").uri == "a%20b/%C3%BC%23%3F%3A%25.pt"
    assert Place("\ud800").uri == "%5Cud800"


# --- collapsed ----------------------------------------------------------------------------------------


def test_findings_that_say_the_same_of_several_layers_are_one() -> None:
    layers = [gpt2(index) for index in range(4)]
    (one,) = collapsed([mismatch(f"h.{index}.attn") for index in range(3)], layers)
    assert (one.where, one.sentence, one.more) == ("h.{0–2}.attn", "no 11 heads in 768 rows.", 0)
    assert len(one.findings) == 3


def test_other_numbers_are_counted_and_the_first_is_told() -> None:
    layers = [gpt2(index) for index in range(4)]
    (one,) = collapsed([mismatch(f"h.{index}.attn", 700 + index) for index in (1, 3)], layers)
    assert one.where == "h.{1,3}.attn"
    assert one.sentence == "no 11 heads in 701 rows. (h.1.attn, and 1 more like it)"


def test_severity_and_rule_keep_findings_apart_and_the_gravest_come_first() -> None:
    warning = replace(mismatch("h.0.attn"), severity="warning")
    other = replace(mismatch("h.0.attn"), code="ATT999")
    groups = collapsed([warning, mismatch("h.0.attn"), other], [gpt2(0)])
    assert [(group.first.severity, group.first.code) for group in groups] == [
        ("error", "ATT101"),
        ("error", "ATT999"),
        ("warning", "ATT101"),
    ]


def test_layers_of_no_common_stack_are_named_three_at_most() -> None:
    paths = [f"{name}.attn" for name in ("a", "b", "c", "d", "e")]
    found = [finding("ATT1", "x", "note", "the same.", path) for path in paths]
    (one,) = collapsed(found, [layer(path) for path in paths])
    assert one.where == "a.attn, b.attn, c.attn and 2 more"
    (one,) = collapsed(found[:2], [])
    assert one.where == "a.attn, b.attn"
    (one,) = collapsed([finding("ATT1", "x", "note", "the same.")], [])
    assert (one.where, one.message) == ("", "the same.")


def test_a_tally_counts_the_gravest_first() -> None:
    some = [finding("A", "b", severity, "c") for severity in ("note", "error", "warning", "note", "note")]
    assert tally(some) == "1 error, 1 warning, 3 notes"
    assert tally([]) == ""


# --- what was seen ------------------------------------------------------------------------------------


def test_a_verdict_says_first_that_nothing_was_seen() -> None:
    assert verdict(report()) == "not observed: no attention layer was found."
    assert verdict(report(command="entropy", run={"calls_seen": 0})) == "not observed: no attention ran."
    assert verdict(report(run={"operators_by_phase": {}, "operators": 0})) == "not observed: no operator ran."
    found = report(findings=(mismatch("h.0.attn"),))
    assert verdict(found) == "not observed: no attention layer was found; 1 error."


def test_a_verdict_counts_what_was_seen_and_found() -> None:
    assert verdict(report(gpt2(0), gpt2(1))) == "2 attention layers; no findings."
    known = report(gpt2(0), known=(mismatch("h.0.attn"),) * 2)
    assert verdict(known) == "1 attention layer; no findings; 2 known findings."
    ran = report(gpt2(0), run={"calls_seen": 2}, calls=(call("h.0.attn"), call("h.0.attn", 1)))
    assert verdict(ran) == "1 attention layer, all 2 calls explained; no findings."
    searched = report(run={"operators": 1, "operators_by_phase": {"forward": 1}})
    assert verdict(searched) == "1 operator searched; no findings."
    assert verdict(report(gpt2(0), command="diff")) == "1 attention layer; no findings; 0 changes."


def test_layers_that_did_not_run_or_were_not_explained_are_unobserved() -> None:
    calls = (call("h.0.attn"), call("h.1.attn", 1, explained=False, reason=f"{HOSTILE}."))
    layers = (gpt2(0), gpt2(1), gpt2(2), layer("ssm", kind=None, layout="state-space"))
    found = unobserved(report(*layers, run={"calls_seen": 2}, calls=calls))
    assert list(found) == ["ssm", "h.2.attn", "h.1.attn"]
    assert found["h.2.attn"] == "it did not run"
    assert found["ssm"] == "it is no softmax attention (state-space)"
    assert found["h.1.attn"].isprintable()
    assert list(unobserved(report(*layers))) == ["ssm"]
    assert list(unobserved(report(*layers, run={"operators": 3, "operators_by_phase": {}}))) == ["ssm"]


def test_notes_of_the_report_and_of_the_run_are_told_once() -> None:
    assert notes(report(notes=("a", "b"), run={"notes": ["b", "c\n"]})) == ["a", "b", r"c\x0a"]


def test_findings_whose_numbers_are_written_otherwise_are_still_alike() -> None:
    layers = [gpt2(index) for index in range(3)]
    written = ("21", "21.4", "1.2e+05")
    said = [
        replace(mismatch(f"h.{i}.attn"), message=f"h.{i}.attn: the largest score is {number}.")
        for i, number in enumerate(written)
    ]
    assert [one.where for one in collapsed(said, layers)] == ["h.{0–2}.attn"]
