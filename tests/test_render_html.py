"""The HTML page as text: golden files, its parts for every kind of report, hostile names, and the package's files.

Golden files hold the page without its style and script; they are made anew by `python tests/test_render_html.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import html5lib
import pytest
from measured_reports import EVEN, call, encoder, encoder_decoder, finding, layer, numbers, report

import attncli
from attncli.records import AttentionMap, Change, Measurement, Origin, Report
from attncli.render import FORMATS, html
from attncli.render.html.colours import VIRIDIS, Scale, image, scale_of
from attncli.render.html.findings import groups, heads_of
from attncli.render.html.picture import METRICS, compact

GOLDEN = Path(__file__).parent / "golden_html"
PACKAGE = Path(html.__file__).parent
NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}\u2028\x1b[31m\ud800\u202e"


# --- reports ------------------------------------------------------------------------------------------


def inspected(**changes: Any) -> Report:
    """Two layers out of a file, with bounds of four heads and the values of one tensor."""
    layers = tuple(layer(f"h.{index}.attn", heads=4, kv_heads=2) for index in range(2))
    rows = [
        Measurement(metric, one.id, value + head, "", head)
        for one in layers
        for head in range(4)
        for metric, value in (("score_bound", 900.0), ("score_typical", 4.0))
    ]
    rows += [Measurement("overflow_float16", one.id, "proven safe") for one in layers]
    rows += [Measurement("nan_count", "h.0.attn.q", 3), Measurement("absmax", "h.0.attn.q", 1.5)]
    made = Report(
        command="inspect",
        version="0.1.0",
        source={
            "kind": "file", "path": "model.safetensors", "format": "safetensors", "files": 1, "bytes": 650_000,
            "parameters": 160_000,
        },
        environment={"python": "3.11.0", "torch": None, "device": None, "dtype": None},
        layers=layers,
        measurements=tuple(rows),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def nan_checked(**changes: Any) -> Report:
    origin = Origin(
        value="nan",
        phase="forward",
        cause="zero-by-zero",
        confirmed=True,
        module="encoder.norm",
        op="div",
        source="model.py:41",
        tensor=None,
        layer=None,
        at={"index": [1, 2]},
        dtype="float32",
        evidence={"proof": "with eps the result is finite", "divisor": 0.0},
        path=({"module": "encoder.norm", "op": "div"}, {"module": "head", "op": "mm"}),
        message="0/0 in encoder.norm.",
        advice="Add an eps.",
    )
    run = {"batch": "arguments", "inputs": {}, "operators": 12, "operators_by_phase": {"forward": 12}}
    made = Report(
        command="nan-check",
        version="0.1.0",
        source={"kind": "code", "path": "model.py:build"},
        environment={"python": "3.11.0", "torch": "2.13.0", "device": "cpu", "dtype": "float32"},
        origins=(origin,),
        findings=(finding("ATT701", "nan-born", "error", "0/0 in encoder.norm."),),
        run=run,
    )
    return dataclasses.replace(made, **changes)


def compared() -> Report:
    changes = (
        Change("structure", "h.0.attn", None, "heads", 8, 4),
        Change("metric", "h.0.attn", 1, "entropy", 2.0, 1.0),
        Change("metric", "h.1.attn", 0, "entropy", 2.0, 1.9),
        Change("metric", "h.2.attn", 0, "score_max", 3.0, math.nan),
    )
    source = {**inspected().source, "compared_with": {"path": "before.safetensors"}}
    return inspected(command="diff", changes=changes, source=source)


def attention_map(**changes: Any) -> AttentionMap:
    """Three queries, the second of which may attend to nothing."""
    made = AttentionMap(
        "encoder.layer.0.attention.self", 0, 1, 0, 3, 3, (0, 1, 2), (0, 1, 2),
        ((1.0, 0.0, 0.0), None, (0.25, 0.25, 0.5)), ("[CLS]", "cat", "[SEP]"), ("[CLS]", "cat", "[SEP]"),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def unobserved() -> Report:
    one = call(0, "h.0.attn", explained=False, difference=None, reason="q could not be recovered")
    return report("entropy", [(one, [])], run={"batch": "text"})


def with_findings() -> Report:
    one = dataclasses.replace(
        finding("ATT602", "uniform-head", "note", "encoder.layer.4: head 5 is even.", "encoder.layer.4.attention.self"),
        head=5,
        evidence={"entropy_ratio": 0.9996, "heads": [5]},
    )  # fmt: skip
    more = [
        finding("ATT501", "large-scores", "warning", f"{path}: score {300 + at}.", path)
        for at in range(3)
        for path in (f"encoder.layer.{at}.attention.self",)
    ]
    known = (finding("ATT503", "scores-near-overflow", "note", "An old one."),)
    return encoder("check", findings=(one, *more), known=known, maps=(attention_map(),))


def nothing() -> Report:
    return inspected(layers=(), measurements=())


REPORTS = {
    "inspect": inspected(),
    "nothing": nothing(),
    "nan-check": nan_checked(),
    "nan-check-clean": nan_checked(origins=(), findings=()),
    "diff": compared(),
    "entropy": encoder_decoder("entropy", [EVEN]),
    "overflow": encoder("overflow", layers=2),
    "check": with_findings(),
    "unobserved": unobserved(),
    "no-attention": report("measure", []),
}
GOLDEN_NAMES = ("inspect", "nothing", "nan-check", "diff", "check", "unobserved")


# --- reading the page ---------------------------------------------------------------------------------


def parsed(text: str) -> Any:
    """The document; an error wherever a browser would have to guess."""
    parser = html5lib.HTMLParser(html5lib.getTreeBuilder("etree"), strict=True, namespaceHTMLElements=False)
    return parser.parse(text)


def words(text: str) -> str:
    """What a reader sees, on one line."""
    document = parsed(text)
    body = document.find("body")
    for parent in list(body.iter()):
        for child in list(parent):
            if child.tag in ("script", "style"):
                child.text = ""
    return " ".join("".join(body.itertext()).split())


def heads_data(text: str) -> Any:
    return json.loads(next(e.text for e in parsed(text).iter("script") if e.get("id") == "heads-data"))


def bare(text: str) -> str:
    """The page without what other files hold, and without hashes of it."""
    text = re.sub(r"<style>.*?</style>", "<style></style>", text, flags=re.DOTALL)
    text = re.sub(r"<script>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    return re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256", text)


# --- every report -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_page_is_as_its_golden_file(name):
    assert bare(html.text(REPORTS[name])) == (GOLDEN / f"{name}.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_parses_strictly_with_unique_ids_and_links_that_lead_somewhere(name):
    document = parsed(html.text(REPORTS[name]))
    ids = [element.get("id") for element in document.iter() if element.get("id")]
    assert sorted(set(ids)) == sorted(ids)
    links = {element.get("href")[1:] for element in document.iter("a")}
    assert links <= set(ids)
    for attribute in ("aria-labelledby", "aria-describedby", "for"):
        assert {e.get(attribute) for e in document.iter() if e.get(attribute)} <= set(ids)


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_refers_to_nothing_outside_itself(name):
    document = parsed(html.text(REPORTS[name]))
    for element in document.iter():
        assert element.get("style") is None  # the policy would drop it
        for attribute in ("src", "href", "srcset", "action", "data", "poster"):
            value = element.get(attribute, "data:")
            assert value.startswith(("data:", "#")), (element.tag, value)
    assert not re.search(r"url\(|@import|https?:", (PACKAGE / "style.css").read_text(encoding="utf-8"))
    assert not re.search(
        r"fetch|XMLHttp|import\(|https?:", (PACKAGE / "script.js").read_text(encoding="utf-8")
    )


def test_the_policy_names_the_style_and_the_script_by_their_hashes():
    document = parsed(html.text(inspected()))
    policy = next(e for e in document.iter("meta") if e.get("http-equiv")).get("content")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        source = next(e.text for e in document.iter(tag) if e.get("type") is None)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_same_report_gives_the_same_bytes():
    assert FORMATS["html"].text(with_findings()) == FORMATS["html"].text(with_findings())


# --- verdict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state", "headline"),
    [
        ("inspect", "clean", "No findings"),
        ("nothing", "unobserved", "Not observed"),
        ("no-attention", "unobserved", "Not observed"),
        ("unobserved", "unobserved", "Not observed"),
        ("nan-check", "error", "1 error"),
        ("nan-check-clean", "clean", "No findings"),
        ("check", "warning", "3 warnings, 1 note"),
        ("diff", "clean", "Nothing is worse"),
    ],
)
def test_the_verdict_is_told_by_words_an_icon_and_a_colour(name, state, headline):
    text = html.text(REPORTS[name])
    assert f'<section class="verdict {state}"' in text
    assert f'<h2 id="verdict-title">{headline}</h2>' in text
    icon = re.search(r'<span class="icon" aria-hidden="true">(.)</span>', text)
    assert icon is not None
    assert icon[1] == {"clean": "✓", "unobserved": "?", "error": "✕", "warning": "!"}[state]


def test_a_report_that_saw_nothing_does_not_look_healthy():
    text = html.text(unobserved())
    assert unobserved().exit_code() == 3
    assert 'class="verdict clean"' not in text
    assert "That is no sign of health." in words(text)
    assert "q could not be recovered" in words(text)


def test_findings_beside_unobserved_calls_say_both():
    made = dataclasses.replace(unobserved(), findings=(finding("ATT501", "x", "error", "Bad."),))
    assert "1 error; not observed as a whole" in words(html.text(made))


# --- findings -----------------------------------------------------------------------------------------


def test_findings_that_differ_only_in_numbers_are_one_and_the_gravest_stands_first():
    made = groups([*with_findings().findings, finding("ATT502", "overflow", "error", "Over.")], ())
    assert [(group.severity, len(group.places)) for group in made] == [
        ("error", 1),
        ("warning", 3),
        ("note", 1),
    ]


def test_no_finding_is_left_out_and_many_can_be_filtered():
    some = [finding("ATT501", "large", "warning", f"layer {at}: large.") for at in range(2500)]
    letters = [finding("ATT104", "unlike", "note", f"layer {'x' * at}: odd.") for at in range(1, 40)]
    text = html.text(encoder("check", layers=1, findings=(*some, *letters)))
    assert text.count('<article class="finding') == 40
    assert "All 2500 places" in text
    assert "layer 2499: large." in text
    assert 'id="filter"' in text
    assert 'id="filter"' not in html.text(with_findings())


def test_known_findings_stand_apart_and_are_counted():
    text = words(html.text(with_findings()))
    assert "Known from the baseline: 1 note" in text
    assert text.index("An old one.") > text.index("ATT501")


def test_heads_of_a_finding_are_its_own_and_those_of_its_evidence():
    one = finding("ATT1", "x", "note", "m")
    assert heads_of(one) == ()
    assert heads_of(dataclasses.replace(one, head=3)) == (3,)
    assert heads_of(dataclasses.replace(one, head=3, evidence={"heads": [5, 3]})) == (3, 5)
    assert heads_of(dataclasses.replace(one, evidence={"heads": 12})) == ()


# --- picture ------------------------------------------------------------------------------------------


def test_the_picture_holds_each_number_at_its_layer_and_head():
    made = encoder("measure")
    block = heads_data(html.text(made))["blocks"][0]
    assert [row["label"] for row in block["rows"]] == ["0", "1", "2", "3", "4", "5"]
    for row in made.measurements:
        if row.metric in [metric.key for metric in METRICS] and row.head is not None:
            assert block["rows"][row.call]["values"][row.metric][row.head] == compact(row.value)


def test_a_finding_marks_its_head_and_one_without_a_head_its_row():
    rows = heads_data(html.text(with_findings()))["blocks"][0]["rows"]
    assert rows[4]["cells"] == {"5": ["note ATT602 uniform-head"]}
    assert rows[1]["whole"] == ["warning ATT501 large-scores"]
    assert not rows[5]["cells"]
    assert not rows[5]["whole"]


def test_self_and_cross_attention_are_blocks_of_their_own():
    data = heads_data(html.text(encoder_decoder("entropy", [EVEN])))
    assert [block["title"] for block in data["blocks"]] == [
        "decoder.layers.{0–1}.self_attn",
        "decoder.layers.{0–1}.encoder_attn",
    ]
    assert all("cross-attention" in row["facts"] for row in data["blocks"][1]["rows"])


def test_layers_may_differ_in_heads_and_run_twice():
    made = []
    for index, (path, heads) in enumerate([("h.0.a", 4), ("h.1.a", 2), ("h.0.a", 4)]):
        one = call(index, path, heads=heads, kv_heads=heads)
        made.append((one, numbers(one)))
    block = heads_data(html.text(report("entropy", made)))["blocks"][0]
    assert [(row["label"], row["heads"]) for row in block["rows"]] == [
        ("0 call 0", [0, 1, 2, 3]),
        ("0 call 2", [0, 1, 2, 3]),
        ("1 call 1", [0, 1]),
    ]
    assert block["heads"] == 4


def test_what_was_not_measured_is_null_and_what_is_no_number_is_named():
    one = call(0, "h.0.a", heads=3, kv_heads=3)
    rows = numbers(one, [{"score_max": math.nan}, {"score_max": math.inf}, {"score_max": None}])
    values = heads_data(html.text(report("measure", [(one, rows)])))["blocks"][0]["rows"][0]["values"]
    assert values["score_max"] == ["nan", "inf", None]


def test_a_call_that_was_not_observed_stands_in_the_picture_without_numbers():
    seen, blind = call(0, "h.0.a"), call(1, "h.1.a", explained=False, reason="opaque")
    rows = heads_data(html.text(report("entropy", [(seen, numbers(seen)), (blind, [])])))["blocks"][0]["rows"]
    assert rows[1]["heads"] == list(range(12))
    assert rows[1]["values"]["entropy"] == [None] * 12


def test_bounds_of_the_weights_have_a_picture_without_any_run():
    data = heads_data(html.text(inspected()))
    assert [metric["key"] for metric in data["metrics"]] == ["score_bound", "score_typical"]
    assert data["blocks"][0]["rows"][1]["values"]["score_bound"] == [900, 901, 902, 903]


def test_a_hundred_layers_of_128_heads_stay_below_three_megabytes():
    text = html.text(encoder("measure", layers=100, heads=128))
    assert len(text.encode()) < 3_000_000
    data = heads_data(text)
    assert sum(len(row["heads"]) for row in data["blocks"][0]["rows"]) == 12_800
    assert len(data["metrics"]) >= 7


def test_an_unknown_number_of_heads_makes_no_picture():
    assert 'id="picture"' not in html.text(nothing())
    assert 'id="picture"' not in html.text(nan_checked())


def test_a_broken_count_of_heads_does_not_fill_the_page():
    one = call(0, "h.0.a", heads=10**9)
    text = html.text(report("entropy", [(one, [Measurement("entropy", "h.0.a", 1.0, "nats", 0, 0)])]))
    assert len(text) < 1_000_000


# --- scales and colours -------------------------------------------------------------------------------


def test_a_scale_is_linear_within_two_orders_of_magnitude_and_logarithmic_beyond():
    assert scale_of([1.0, 100.0], None, None) == Scale(1.0, 100.0, False)
    assert scale_of([1.0, 101.0], None, None) == Scale(1.0, 101.0, True)
    assert scale_of([-1.0, 1e6], None, None).log is False
    assert scale_of([1.0, 1e6, math.inf, math.nan], None, None).high == 1e6
    assert scale_of([], 0.0, None) == Scale(0.0, 1.0)
    assert scale_of([5.0, 5.0], None, None) == Scale(5.0, 6.0)


@pytest.mark.parametrize(("value", "fraction"), [(-1, 0), (0, 0), (5, 0.5), (10, 1), (math.inf, 1)])
def test_a_number_lies_where_the_scale_says(value, fraction):
    assert Scale(0.0, 10.0).fraction(value) == fraction
    assert Scale(1.0, 100.0, True).fraction(10.0) == pytest.approx(0.5)


def test_the_image_has_one_pixel_a_number_and_the_ends_of_viridis():
    data = base64.b64decode(image([[0.0, 1.0], [math.nan, None]], Scale(0.0, 1.0)).partition(",")[2])
    assert struct.unpack(">II", data[16:24]) == (2, 2)
    start = data.index(b"IDAT") + 4
    pixels = zlib.decompress(data[start : data.index(b"IEND") - 8])
    palette = data[data.index(b"PLTE") + 4 :]
    shown = [[palette[3 * at : 3 * at + 3].hex() for at in line[1:]] for line in (pixels[:3], pixels[3:])]
    assert shown == [["440154", "fde725"], ["c8102e", "9e9e9e"]]


def test_the_colours_of_style_and_script_are_those_of_the_images():
    style = (PACKAGE / "style.css").read_text(encoding="utf-8")
    assert ", ".join(VIRIDIS) in style
    script = (PACKAGE / "script.js").read_text(encoding="utf-8")
    assert ", ".join(f'"{stop}"' for stop in VIRIDIS) in script


def luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("mode", [0, 1])
def test_text_has_a_contrast_of_four_and_a_half_on_page_and_panel(mode):
    style = (PACKAGE / "style.css").read_text(encoding="utf-8")
    found = {
        name: (light, dark)[mode]
        for name, light, dark in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)
    }
    for text in ("text", "faint", "link", "error", "warning", "note", "clean"):
        for ground in ("page", "panel"):
            low, high = sorted((luminance(found[text]), luminance(found[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, 0.1235), (12345.678, 12345.7), (3.0, 3), (0.0, 0), (True, 1), ("none", None), (-math.inf, "-inf")],
)  # fmt: skip
def test_numbers_travel_with_the_digits_that_are_shown(value, shown):
    assert compact(value) == shown


# --- other parts --------------------------------------------------------------------------------------


def test_an_attention_map_has_its_tokens_its_numbers_and_the_strongest_keys():
    text = html.text(encoder("entropy", maps=(attention_map(),)))
    data = json.loads(next(e.text for e in parsed(text).iter("script") if e.get("id") == "map-data-0"))
    assert data["queries"] == ["[CLS] 0", "cat 1", "[SEP] 2"]
    assert data["values"] == [[1, 0, 0], [], [0.25, 0.25, 0.5]]
    seen = words(text)
    assert "[SEP] 2[SEP] 20.5" in seen
    assert "none allowed" in seen


def test_blocks_of_a_long_map_say_which_tokens_they_hold():
    one = attention_map(
        queries=24, keys=24, query_starts=(0, 8, 16), key_starts=(0, 8, 16), query_tokens=(), key_tokens=()
    )
    text = html.text(encoder("entropy", maps=(one,)))
    data = json.loads(next(e.text for e in parsed(text).iter("script") if e.get("id") == "map-data-0"))
    assert data["keys"] == ["0–7", "8–15", "16–23"]
    assert "neighbouring tokens in blocks" in text


def test_an_origin_tells_its_cause_line_proof_and_way():
    seen = words(html.text(nan_checked()))
    for part in (
        "NaN born in div in encoder.norm",
        "zero-by-zero",
        "model.py:41",
        "Proved: with eps",
        "head: mm",
    ):
        assert part in seen
    doubted = dataclasses.replace(nan_checked().origins[0], confirmed=None, evidence={})
    assert "Not confirmed: not tried" in words(html.text(nan_checked(origins=(doubted,))))


def test_changes_stand_by_kind_and_the_largest_change_of_numbers_first():
    seen = words(html.text(compared()))
    assert seen.index("Changed structure") < seen.index("Changed numbers")
    assert seen.index("h.2.attn") < seen.index("h.1.attn")
    assert "4 changes." in seen
    assert "compared withbefore.safetensors" in seen


def test_more_changes_than_a_page_holds_are_said_to_be_left_out():
    changes = tuple(Change("metric", f"h.{at}", 0, "entropy", 1.0, 2.0) for at in range(2001))
    seen = words(html.text(inspected(command="diff", changes=changes)))
    assert "2001 in all. The first 2000 are shown; --format json has all." in seen


def test_tensors_with_nan_stand_first_among_the_weights():
    rows = (
        *inspected().measurements,
        Measurement("absmax", "larger", 9.0),
        Measurement("nan_count", "larger", 0),
    )
    seen = words(html.text(inspected(measurements=rows)))
    assert "3 NaN and 0 Inf in 2 tensors" in seen
    table = seen[seen.index("Values of the weights") :]
    assert table.index("h.0.attn.q") < table.index("larger")


def test_without_a_script_the_picture_is_an_image_and_the_numbers_are_tables():
    document = parsed(html.text(encoder("entropy", layers=2)))
    images = list(document.iter("img"))
    assert len(images) == len(METRICS) - 2  # a run bounds nothing
    assert all(e.get("alt") for e in images)


# --- hostile names ------------------------------------------------------------------------------------


def hostile() -> Report:
    where = f"h.0.{NASTY}"
    one = call(
        0, where, module=NASTY, kernel=NASTY, normaliser=NASTY, mask_kind=NASTY, source=NASTY, reason=NASTY
    )
    bad = dataclasses.replace(
        finding(NASTY, NASTY, "error", NASTY, where),
        advice=NASTY,
        evidence={NASTY: {NASTY: [NASTY, math.nan]}},
    )
    origin = dataclasses.replace(
        nan_checked().origins[0],
        module=NASTY,
        op=NASTY,
        source=NASTY,
        message=NASTY,
        evidence={NASTY: NASTY},
        path=({"module": NASTY, "op": NASTY},),
    )
    return report(
        "check",
        [(one, [*numbers(one), Measurement("absmax", NASTY, math.inf)])],
        layers=(layer(where, facts={NASTY: NASTY}, layout=NASTY),),
        findings=(bad, dataclasses.replace(bad, head=1)),
        known=(bad,),
        origins=(origin,),
        maps=(attention_map(layer=NASTY, query_tokens=(NASTY,) * 3),),
        changes=(Change("source", NASTY, None, NASTY, NASTY, {NASTY: NASTY}),),
        notes=(NASTY,),
        run={"batch": NASTY, "inputs": {NASTY: {"shape": [NASTY], "dtype": NASTY}}, "notes": [NASTY], NASTY: NASTY},
    )  # fmt: skip


def test_names_out_of_files_become_neither_markup_nor_script_nor_control_characters():
    text = html.text(hostile())
    document = parsed(text)
    plain = parsed(html.text(with_findings()))
    assert {e.tag for e in document.iter() if isinstance(e.tag, str)} <= {
        *(e.tag for e in plain.iter() if isinstance(e.tag, str)), "em", "ol"
    }  # fmt: skip
    assert not any(e.get("onerror") for e in document.iter())
    assert sum(e.tag == "script" and e.get("type") is None for e in document.iter()) == 1
    assert "{{7*7}}" in words(text)  # and not 49
    text.encode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", text.replace("\t", ""))


def test_a_name_in_the_data_stays_inside_its_script():
    data = heads_data(html.text(hostile()))
    assert data["blocks"][0]["rows"][0]["path"].startswith("h.0.</script><script>alert(1)")


# --- the package --------------------------------------------------------------------------------------


def test_template_style_and_script_lie_in_the_package():
    for name in ("report.html.j2", "style.css", "script.js"):
        assert (PACKAGE / name).is_file()
    assert PACKAGE.is_relative_to(Path(attncli.__file__).parent)


def test_the_script_is_no_place_for_html_from_strings():
    script = (PACKAGE / "script.js").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script
    )
    assert "localStorage" not in script


def test_jinja2_is_asked_for_since_the_page_is_made_with_it():
    project = Path(attncli.__file__).parent.parent / "pyproject.toml"
    assert re.search(r'^    "jinja2>=3.1",$', project.read_text(encoding="utf-8"), re.MULTILINE)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in GOLDEN_NAMES:
        (GOLDEN / f"{name}.html").write_text(bare(html.text(REPORTS[name])), encoding="utf-8")
