"""The comment, read back by a Markdown parser as GitHub would: columns, text, length."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape

import pytest
from ci_reports import HOSTILE, NAN_FINDING, ORIGIN, REPORTS, golden, many, mismatch, rendered, report, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_render import finding, gpt2, layer

from attncli.records import Change, Finding, Measurement
from attncli.render import markdown
from attncli.render.words import clean

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ALLOWED = re.compile(r"<details><summary>[^<]*</summary>|</details>|</?code>")
INVISIBLE = "\u200b"


def tokens(text: str) -> list[Token]:
    """The blocks of a comment that GitHub accepts and in which nothing but ours is markup."""
    assert len(text) < 65_536
    assert len(text.encode("utf-8")) < 65_536
    assert text.endswith("\n")
    found = PARSER.parse(text)
    for token in found:
        if token.type == "html_block":
            assert ALLOWED.sub("", token.content).strip() == ""
        for inner in token.children or []:
            assert inner.type in (
                "text",
                "html_inline",
                "strong_open",
                "strong_close",
                "softbreak",
                "text_special",
            )
            assert inner.type != "html_inline" or ALLOWED.fullmatch(inner.content), inner.content
            if inner.type in ("text", "text_special"):
                assert not re.search(r"[@#][^\W_]|://|\bGH-\d|\bwww\.", inner.content), inner.content
    return found


def tables(text: str) -> list[list[list[str]]]:
    """Every table as rows of the text of its cells."""
    made: list[list[list[str]]] = []
    inside = False
    for token in tokens(text):
        inside = token.type == "table_open" or (inside and token.type != "table_close")
        if token.type == "table_open":
            made.append([])
        elif token.type == "tr_open":
            made[-1].append([])
        elif token.type == "inline" and inside:
            made[-1][-1].append(shown(token))
    for table in made:
        assert {len(row) for row in table} == {len(table[0])}
    # The parser fills up short rows and drops what is too much: only the source tells.
    for line in text.splitlines():
        if line.startswith("| "):
            assert line.count("|") - 1 in {len(table[0]) for table in made}, line
    return made


def shown(token: Token) -> str:
    """The text that a person sees."""
    parts = [one.content for one in token.children or [] if one.type in ("text", "text_special")]
    return "".join(parts).replace(INVISIBLE, "")


def first_line(text: str) -> str:
    return text.splitlines()[0]


@pytest.mark.parametrize("name", REPORTS)
def test_the_comment_is_the_golden_one_and_renders(name: str) -> None:
    text = rendered(name, "markdown")
    assert text == golden(name, "markdown").read_text(encoding="utf-8")
    tables(text)


# --- what it says -------------------------------------------------------------------------------------


def test_the_verdict_is_the_first_line() -> None:
    assert (
        first_line(rendered("clean", "markdown")) == "### attncli inspect: 12 attention layers; no findings."
    )
    assert first_line(rendered("nothing", "markdown")).endswith("not observed: no attention layer was found.")
    assert first_line(rendered("mixed", "markdown")).endswith(
        "3 errors, 1 warning, 1 note; 2 known findings."
    )


def test_findings_are_collapsed_over_layers() -> None:
    heading, *rows = tables(rendered("mixed", "markdown"))[0]
    assert heading == ["severity", "rule", "where", "finding", "file"]
    assert rows[0] == [
        "error", "ATT101 heads-mismatch", "h.{0–2}.attn", "no 11 heads in 768 rows.", "weights/model.safetensors",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["error", "warning", "note"]
    assert rows[2][2] == "the whole model"


@pytest.mark.parametrize("command", ["nan-check", "check"])
def test_an_origin_is_told_with_its_cause_its_way_and_its_proof(command: str) -> None:
    text = rendered("nan", "markdown") if command == "nan-check" else markdown.text(
        replace(REPORTS["nan"], command="check")
    )  # fmt: skip
    tokens(text)
    assert (
        "\n**Origins of NaN and Inf**\n\n"
        "- **NaN born in decoder.0.attn** · bmm · forward · float16\n"
        "  - cause: overflow\n"
        "  - line: src/model.py:41\n"
        "  - at: batch 0, head 1, query 2, key 3\n"
        "  - way: bmm\n"
        "  - seen in: loss\n"
        "  - proof: in float32 it is finite\n\n"
    ) in text


def test_an_origin_of_no_layer_stands_in_its_module() -> None:
    born = replace(NAN_FINDING, layer=None, evidence={"module": "mlp.up"})
    assert tables(markdown.text(report(findings=(born,))))[0][1][2] == "mlp.up"
    nowhere = replace(born, evidence={"module": None})
    assert tables(markdown.text(report(findings=(nowhere,))))[0][1][2] == "the whole model"
    trained = report(findings=(nowhere,), run={"training": {}})
    assert tables(markdown.text(trained))[0][1][2] == "the training run"


def test_names_in_an_origin_are_text() -> None:
    odd = replace(
        ORIGIN, module=HOSTILE, tensor=HOSTILE, source=HOSTILE, evidence={"proof": HOSTILE, "seen": [HOSTILE]}
    )
    tokens(markdown.text(report(origins=(odd,) * 400)))


def test_advice_is_given_once_for_a_rule() -> None:
    text = rendered("mixed", "markdown")
    assert text.count("- ATT101 heads-mismatch: Compare it with the original checkpoint.\n") == 1
    special = replace(mismatch("h.1.attn"), advice="Something else.", message="h.1.attn: other words.")
    text = markdown.text(report(gpt2(0), findings=(mismatch("h.0.attn"), special)))
    assert text.count("- ATT101 heads-mismatch: ") == 2


def test_known_findings_are_folded_away() -> None:
    text = rendered("mixed", "markdown")
    assert "<details><summary>2 known: 2 errors, no failure</summary>" in text
    known = tables(text)[1]
    assert [row[1] for row in known[1:]] == ["ATT102 widths-disagree", "ATT001 index-disagrees"]


def test_layers_are_folded_into_kinds() -> None:
    *_, layers = tables(rendered("clean", "markdown"))
    assert layers[1:] == [["h.{0–11}.attn", "self", "fused-block", "12", "12", "64", "0.125"]]


def test_numbers_are_the_extremes_of_a_layer() -> None:
    numbers, _ = tables(rendered("unobserved", "markdown"))
    assert numbers == [
        ["layer", "entropy (nats)", "largest score", "bits left in float16"],
        ["h.0.attn", "1.25 … 2.25", "10.5", "3"],
    ]


def test_nan_is_never_hidden_by_another_number() -> None:
    rows = [Measurement("score_max", "h.0.attn", value, head=0, call=0) for value in (3.0, math.nan, 5.0)]
    (heading, row), _ = tables(markdown.text(report(gpt2(0), measurements=tuple(rows))))
    assert (heading, row) == (["layer", "largest score"], ["h.0.attn", "nan"])
    assert tables(rendered("hostile", "markdown"))[3][1][1:] == ["1 … 2", "inf", "nan"]


def test_changes_are_told_with_both_values() -> None:
    changes = tables(rendered("diff", "markdown"))[1]
    assert changes[2] == ["metric", "h.0.attn", "3", "entropy", "2.125", "nan"]
    assert changes[3][3:] == ["qkv shape", "[768, 2304]", "[768, 768]"]


def test_what_was_not_observed_is_told_with_its_reason() -> None:
    text = rendered("unobserved", "markdown")
    assert "**Not observed**" in text
    assert "- <code>h.1.attn</code>: no mask\n" in text
    assert "**Not observed**" not in rendered("clean", "markdown")


def test_notes_are_told() -> None:
    assert rendered("mixed", "markdown").endswith("**Notes**\n\n- 402 optimizer tensors left out\n")


# --- length -------------------------------------------------------------------------------------------


def test_5000_findings_of_few_kinds_are_few_rows() -> None:
    _, *rows = tables(markdown.text(many(5000)))[0]
    assert [row[0] for row in rows] == ["error", "warning", "warning", "note"]
    assert rows[0][2] == "h.{0–99}.attn"


def test_5000_unlike_findings_fit_the_gravest_first_and_the_rest_are_counted() -> None:
    text = markdown.text(unlike(5000))
    _, *rows = tables(text)[0]
    assert [row[0] for row in rows[:8]] == ["error"] * 7 + ["note"]
    assert len(rows) > 100
    assert f"\n{5000 - len(rows)} more left out here (kinds of findings, the mildest).\n" in text
    assert "1 layer</summary>" in text


def test_a_report_that_is_too_long_everywhere_fits() -> None:
    long = HOSTILE * 20
    layers = [layer(f"{long}.{index}.{'x' * index}", layout=f"{long}{index}") for index in range(100)]
    some = tuple(
        Finding(f"ATT{at}", "x", "error", long + "y" * at, long + "z" * at, f"{long}{at}")
        for at in range(300)
    )
    changes = tuple(Change("structure", f"{long}{at}", at, long, long, long) for at in range(300))
    notes = tuple(f"{long}{at}" for at in range(300))
    text = markdown.text(
        report(*layers, findings=some, known=some, changes=changes, notes=notes, source={"path": long})
    )
    assert len(tables(text)) == 4
    assert text.count(" more left out here (") == 6


# --- hostile names ------------------------------------------------------------------------------------


def test_a_hostile_name_is_shown_as_it_is() -> None:
    table = tables(rendered("hostile", "markdown"))[0]
    assert table[2][3] == clean(HOSTILE)
    assert table[2][2][:40] == clean(HOSTILE)[:40]


@pytest.mark.parametrize(
    "name",
    [
        "@octocat", "see #12", "octo/repo#12", "GH-12", "https://x.yz", "www.x.yz", "a@b.yz",
        ":smile:", "0123abc", "0123456789abcdef0123456789abcdef01234567",
    ],
)  # fmt: skip
def test_github_makes_no_link_of_a_name(name: str) -> None:
    said = unescape(markdown.escaped(name))
    assert said != name
    assert said.replace(INVISIBLE, "") == name


@pytest.mark.parametrize(
    "words", ["a_b_c", "65504.5", "0.125", "-3.5", "12:30", "h.0.attn", "q @ k.mT", "fp16 (a/b)", "1234567"]
)
def test_plain_words_stay_as_they_are(words: str) -> None:
    assert markdown.escaped(words) == words


@pytest.mark.parametrize(
    "note", ["# x", "- x", "1. x", "> x", "---", "    x", "=", "_x_", "__x__", "+ x", "~~x~~"]
)
def test_a_note_is_no_heading_list_or_emphasis(note: str) -> None:
    found = tokens(markdown.text(report(gpt2(0), notes=(note,))))
    assert [token.type for token in found].count("bullet_list_open") == 1
    assert [token.type for token in found].count("heading_open") == 1
    assert shown(found[-4]) == note.strip()


@settings(deadline=None)
@given(st.text(st.characters(codec=None), min_size=1))
def test_whatever_stands_in_a_name_rows_keep_their_columns_and_names_their_letters(name: str) -> None:
    odd = finding("ATT1", "x", "error", name, name)
    text = markdown.text(
        report(
            gpt2(0, id=name, path=name), source={"path": name}, findings=(odd,), known=(odd,), notes=(name,)
        )
    )
    found, *_ = tables(text)
    assert " ".join(found[1][2].split()) == " ".join(clean(name)[:200].split()) or len(clean(name)) > 200


@settings(deadline=None)
@given(st.text(st.sampled_from("|\\`*_[]<>!&#@:/-~$ a0.\n"), min_size=1, max_size=30))
def test_no_combination_of_markup_opens_anything(name: str) -> None:
    odd = finding("ATT1", "x", "error", name, name)
    found, *_ = tables(markdown.text(report(gpt2(0), findings=(odd,), notes=(name, name))))
    assert found[1][3].split() == clean(name).split()
