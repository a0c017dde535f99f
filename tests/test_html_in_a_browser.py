"""The HTML page in a headless Chromium: quiet, self-contained, usable by pointer and by keyboard, and printable.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import Any

import chromium
import pytest
from chromium import Browser
from measured_reports import call, encoder, finding, numbers, report
from test_render_html import NASTY, REPORTS, attention_map, hostile, with_findings

from attncli.render import html
from attncli.render.words import number

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="Chromium is not installed")
PHONE = 360


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture
def shown(browser, tmp_path):
    """`shown(report, width=…)` → the browser with its page."""

    def show(made: Any, **size: Any) -> Browser:
        file = tmp_path / "report.html"
        file.write_text(html.text(made), encoding="utf-8")
        browser.media(prefers_color_scheme="light")
        browser.open(file, **size)
        return browser

    return show


def plane(browser: Browser, selector: str = "[data-block]") -> dict[str, float]:
    """Where the cells of a picture lie in the window, once scrolled to."""
    canvas = f'document.querySelector("{selector} canvas")'
    browser.value(f'{canvas}.scrollIntoView({{block: "center", behavior: "instant"}})')
    frame: dict[str, float] = browser.value(f"{canvas}.getBoundingClientRect().toJSON()")
    return frame


def point(
    browser: Browser, row: float, column: float, rows: int, columns: int, selector: str = "[data-block]"
) -> None:
    frame = plane(browser, selector)
    x = frame["left"] + (column + 0.5) * frame["width"] / columns
    browser.move(x, frame["top"] + (row + 0.5) * frame["height"] / rows)


def readout(browser: Browser, name: str = "heads-readout") -> str:
    text: str = browser.value(f'document.getElementById("{name}").textContent')
    return text


def announced(browser: Browser) -> str:
    text: str = browser.value('document.getElementById("announce").textContent')
    return text


def focus(browser: Browser, selector: str = "[data-block]") -> None:
    """By the keyboard alone: Tab until the picture has the focus."""
    browser.value("document.activeElement.blur(); getSelection().removeAllRanges(); 0")
    wanted = f'document.activeElement === document.querySelector("{selector} .heat-plane")'
    for _ in range(60):
        browser.press("Tab")
        if browser.value(wanted):
            return
    raise AssertionError("Tab does not reach the picture")


# --- quiet and self-contained -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REPORTS, "hostile"])
def test_the_page_opens_without_a_word_on_the_console_and_asks_for_nothing(name, shown):
    page = shown(hostile() if name == "hostile" else REPORTS[name])
    assert page.complaints() == []
    assert [url.rpartition("/")[2] for url in page.requests()] == ["report.html"]
    assert page.value("document.documentElement.classList.contains('js')") is True


def test_a_script_that_is_not_of_the_page_does_not_run(shown, browser, tmp_path):
    shown(with_findings())
    file = tmp_path / "changed.html"
    text = html.text(with_findings())
    file.write_text(
        text.replace("<header>", "<script>window.ran = 1</script><img src='https://x.invalid/a.png'><header>")
    )
    browser.open(file)
    assert browser.value("window.ran") is None
    assert any("Content Security Policy" in line for line in browser.complaints())


@pytest.mark.parametrize("name", [*REPORTS, "hostile", "wide"])
def test_a_phone_never_scrolls_sideways(name, shown):
    made = {"hostile": hostile(), "wide": encoder("measure", layers=4, heads=128)}.get(name) or REPORTS[name]
    page = shown(made, width=PHONE, height=740)
    assert page.value("document.documentElement.scrollWidth") == PHONE


# --- numbers by pointer and by keyboard ---------------------------------------------------------------


@pytest.mark.parametrize(("row", "head"), [(0, 0), (2, 3), (5, 11)])
def test_the_pointer_shows_the_numbers_of_the_cell_below_it(row, head, shown):
    made = encoder("measure")
    page = shown(made)
    point(page, row, head, 6, 12)
    seen = readout(page)
    values = {m.metric: m.value for m in made.measurements if (m.call, m.head) == (row, head)}
    assert seen.startswith(f"layer {row}, head {head}")
    assert f"H/ln n {number(values['entropy_ratio'])}" in seen
    assert f"entropy {number(values['entropy'])} nats" in seen
    assert f"largest score {number(values['score_max'])}" in seen
    assert f"headroom in float16 {number(values['headroom_bits_float16'])} bits" in seen
    assert announced(page) == ""  # a pointer that wanders is not read aloud


def test_keys_move_through_the_picture_and_are_read_aloud(shown):
    page = shown(encoder("measure"))
    focus(page)
    steps = [
        ("", False, 0, 0), ("ArrowRight", False, 0, 1), ("ArrowDown", False, 1, 1), ("End", False, 1, 11),
        ("ArrowRight", False, 1, 11), ("Home", False, 1, 0), ("End", True, 5, 11), ("ArrowUp", False, 4, 11),
        ("ArrowLeft", False, 4, 10), ("Home", True, 0, 0), ("PageDown", False, 5, 0), ("PageUp", False, 0, 0),
    ]  # fmt: skip
    for key, ctrl, row, head in steps:
        if key:
            page.press(key, ctrl=ctrl)
        assert announced(page).startswith(f"layer {row}, head {head}: H/ln n 0."), key
        assert readout(page).startswith(f"layer {row}, head {head}")
    page.press("Tab")
    assert page.value("document.activeElement.className") != "heat-plane"


def test_the_focus_can_be_seen(shown):
    page = shown(encoder("measure"))
    focus(page)
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.value('document.querySelector(".heat-cursor").hidden') is False


def test_another_metric_changes_colours_numbers_and_legend(shown):
    page = shown(encoder("measure"))
    focus(page)
    draw = 'document.querySelector("[data-block] canvas").toDataURL()'
    before = page.value(draw)
    page.value(
        'const s = document.getElementById("metric"); s.value = "headroom_bits_float16";'
        's.dispatchEvent(new Event("change")); 0'
    )
    assert page.value(draw) != before
    assert page.value('document.getElementById("legend-high").textContent') == "16 bits far from overflow"
    page.press("ArrowRight")
    assert announced(page).startswith("layer 0, head 1: headroom in float16 10.27 bits")


def test_a_finding_is_named_at_its_head_and_its_row(shown):
    page = shown(with_findings())
    point(page, 4, 5, 6, 12)
    assert "note ATT602 uniform-head" in readout(page)
    point(page, 1, 7, 6, 12)
    assert "warning ATT501 large-scores" in readout(page)
    point(page, 5, 7, 6, 12)
    assert "ATT" not in readout(page)
    assert page.value('[...document.querySelectorAll(".heat-rows .flagged")].map((one) => one.textContent)') == [
        "! 0", "! 1", "! 2",
    ]  # fmt: skip


def test_cells_that_are_nan_overflowed_absent_or_not_measured_are_told_apart(shown):
    one = call(0, "h.0.a", heads=4, kv_heads=4)
    few = call(1, "h.1.a", heads=2, kv_heads=2)
    rows = numbers(one, [{"dot_absmax": 7e4}, {"dot_absmax": float("nan")}, {"dot_absmax": None}, {}])
    page = shown(report("measure", [(one, rows), (few, numbers(few))]))
    page.value(
        'const s = document.getElementById("metric"); s.value = "headroom_bits_float16";'
        's.dispatchEvent(new Event("change")); 0'
    )
    told = []
    for row, head in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]:
        point(page, row, head, 2, 4)
        told.append(
            re.search(r"headroom in float16 ([^a-z]*\w* ?\w*)|there is no such head", readout(page))[0]
        )
    assert told[0].startswith("headroom in float16 −0.095")
    assert told[1].startswith("headroom in float16 NaN")
    assert told[2].startswith("headroom in float16 not measured")
    assert told[3].startswith("headroom in float16 10.2")
    assert told[4] == "there is no such head"
    signs = page.value(
        '[...document.querySelectorAll("[data-sign]")].filter((i) => !i.hidden).map((i) => i.dataset.sign)'
    )
    assert signs == ["nan", "over", "none"]
    pixels = page.value(
        "(() => { const c = document.querySelector('[data-block] canvas'), p = c.getContext('2d'), w = c.width / 4,"
        "h = c.height / 2; return [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1]].map(([x, y]) =>"
        "[...p.getImageData(x * w, y * h, w - 1, h - 1).data].join()); })()"
    )
    assert len(set(pixels)) == 5


def test_a_hundred_layers_of_128_heads_are_drawn_and_answer(shown):
    made = encoder("measure", layers=100, heads=128)
    page = shown(made)
    value = next(
        m.value for m in made.measurements if (m.metric, m.call, m.head) == ("entropy_ratio", 99, 127)
    )
    focus(page)
    page.press("End", ctrl=True)
    assert announced(page) == f"layer 99, head 127: H/ln n {number(value)}"
    cursor = page.value('document.querySelector(".heat-cursor").getBoundingClientRect().toJSON()')
    assert cursor["top"] >= 0
    assert cursor["bottom"] <= 900  # scrolled to
    assert page.value("document.documentElement.scrollWidth") == 1280


def test_the_picture_is_sharp_on_a_dense_screen(shown):
    page = shown(encoder("entropy"), scale=2)
    ratio = page.value(
        '(() => { const c = document.querySelector("canvas"); return c.width / c.clientWidth; })()'
    )
    assert ratio == 2


def test_a_map_names_its_tokens_by_pointer_and_by_keyboard(shown):
    page = shown(encoder("entropy", maps=(attention_map(),)))
    point(page, 2, 1, 3, 3, "[data-map]")
    assert readout(page, "maps-readout") == "query [SEP] 2 → key cat 1probability 0.25"
    focus(page, "[data-map]")
    page.press("End", ctrl=True)
    assert announced(page) == "query [SEP] 2, key [SEP] 2: 0.5"
    page.press("ArrowUp")
    assert announced(page) == "query cat 1, key [SEP] 2: no key allowed"


def test_a_hostile_name_is_shown_as_it_is(shown):
    page = shown(hostile())
    point(page, 0, 0, 1, 12)
    assert "</script><script>alert(1)</script>" in readout(page)
    assert page.value('document.querySelectorAll("img[onerror]").length') == 0
    assert NASTY not in readout(page)  # its control characters are written out


# --- light and dark, filter, without a script ---------------------------------------------------------


def test_the_page_follows_the_system_and_the_button_changes_it(shown):
    page = shown(with_findings())
    ground = "getComputedStyle(document.body).backgroundColor"
    pressed = 'document.getElementById("theme").getAttribute("aria-pressed")'
    light = page.value(ground)
    page.media(prefers_color_scheme="dark")
    page.settle()
    dark = page.value(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
    assert page.value(pressed) == "true"
    page.value('document.getElementById("theme").click()')
    assert (page.value(ground), page.value(pressed)) == (light, "false")
    page.value('document.getElementById("theme").click()')
    assert (page.value(ground), page.value(pressed)) == (dark, "true")
    assert page.complaints() == []


def test_the_filter_leaves_the_findings_that_hold_all_words(shown):
    some = [
        finding(f"ATT{100 + at}", "odd", "note", f"{'abcdefghijklmnopqrstuvwxyz'[at]}: x.")
        for at in range(26)
    ]
    page = shown(encoder("check", findings=tuple(some)))
    count = 'document.querySelectorAll("#cards > :not([hidden])").length'
    assert page.value(count) == 26
    page.value('document.getElementById("filter").focus()')
    page.send("Input.insertText", text="ODD att104")
    assert page.value(count) == 1
    assert page.value('document.getElementById("filtered").textContent') == "1 of 26"


def test_without_scripts_everything_can_be_read(shown, browser):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page = shown(with_findings(), settled=False)
        document = page.send("DOM.getDocument")["root"]["nodeId"]

        def height(selector: str) -> float:
            node = page.send("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
            try:
                box = page.send("DOM.getBoxModel", nodeId=node)["model"]
            except RuntimeError:
                return 0  # not drawn
            return float(box["height"])

        assert height("article.finding") > 0
        assert height("#picture .image img") > 0
        assert height("#maps img.static") > 0
        assert height("#theme") == 0
        assert height("#metric") == 0
        assert height("#heads-readout") == 0
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


# --- print --------------------------------------------------------------------------------------------


def pages(pdf: bytes) -> int:
    streams = [
        zlib.decompress(part)
        for part in re.findall(rb"stream\r?\n(x.+?)\r?\nendstream", pdf, re.DOTALL)
        if part[:1] == b"x"
    ]
    return max(len(re.findall(rb"/Type ?/Page\b", part)) for part in (pdf, b"".join(streams)))


def test_the_page_prints_light_with_its_details_open(shown):
    page = shown(with_findings())
    page.media(prefers_color_scheme="dark")
    closed = 'document.querySelectorAll("details:not([open])").length'
    page.value(f'window.told = []; addEventListener("beforeprint", () => told.push({closed})); 0')
    printed = page.pdf()
    assert printed.startswith(b"%PDF-")
    assert page.value("told") == [0]
    assert page.value(closed) > 0  # closed again
    page.send(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.value('getComputedStyle(document.getElementById("theme")).display') == "none"
    page.send("Emulation.setEmulatedMedia", media="", features=[])


@pytest.mark.parametrize(
    "made", [encoder("measure", layers=100, heads=128), dataclasses.replace(with_findings())]
)
def test_nothing_is_cut_on_paper(made, shown):
    page = shown(made, width=718)  # A4 without its margins
    page.value("window.dispatchEvent(new Event('beforeprint'))")
    page.send("Emulation.setEmulatedMedia", media="print")
    wide = page.value(
        "[...document.querySelectorAll('main *')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1"
        "&& !one.closest('.hidden, .readout')).map((one) => one.tagName + '.' + one.className).slice(0, 5)"
    )
    page.send("Emulation.setEmulatedMedia", media="")
    assert wide == []
