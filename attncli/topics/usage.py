"""Masks, which most mistakes are made with, and what attncli answers with."""

from __future__ import annotations

from attncli.records import Finding, Layer, Report, Severity
from attncli.records.pages import Block, Column, Formula, Prose, Table
from attncli.topics.arithmetic import largest, rounded, softmax
from attncli.topics.topic import Topic

# --- masks --------------------------------------------------------------------------------------------

_TOKENS = 4


def masks() -> tuple[Block, ...]:
    rows = tuple(
        (name, " ".join(map(str, visible_keys(offset, upside_down))), meaning)
        for name, offset, upside_down, meaning in (
            ("tril(ones)", 0, False, "right"),
            ("tril(ones, -1)", -1, False, "row 0 sees nothing: NaN"),
            ("tril(ones, 1)", 1, False, "the answer is shown"),
            ("triu(ones)", 0, True, "upside down"),
        )
    )
    zero_fill, added = softmax([1.0, 0.0, 0.0, 0.0]), softmax([1.0 + 1.0, 0.0, 0.0, 0.0])
    lowest = str(rounded(-largest("float16") - 16, "float16")).replace("-", "−")
    return (
        Prose(
            "A mask takes keys out of a row before the softmax, by −inf on their scores. Two conventions "
            "are opposites, and neither fails when it is given the other's mask:"
        ),
        Table(
            (Column("where"), Column("hides a key")),
            (
                ("scaled_dot_product_attention", "False, or −inf"),
                ("nn.MultiheadAttention", "True, or −inf"),
                ("attention_mask of transformers", "0"),
                ("masked_fill(mask, −inf)", "True"),
            ),
        ),
        Prose(
            "A float mask is added: zeros and ones hide nothing. With a score of 1 and three hidden keys "
            f"of score 0, row 0 gives the hidden ones {1 - added[0]:.2f} of its attention where ones are "
            f"added for visible keys, and {1 - zero_fill[0]:.2f} where hidden scores are set to 0. A causal "
            "mask shows key j to query i where:"
        ),
        Formula(("j ≤ i + offset + (S − T)",)),
        Table(
            (Column("visible"), Column("keys of rows 0–3"), Column("effect")),
            rows,
            f"{_TOKENS} tokens, T = S; S − T is the length of a KV cache, and offset 0 is right.",
        ),
        Prose(
            "A row without a key is NaN with −inf, and even over all keys with finfo.min: no mask at all. "
            f"In float16 finfo.min plus a score of −16 is {lowest} itself. Masking after the softmax leaves "
            "rows that do not sum to 1. attncli entropy names the mask of each call and its offset by what "
            "is really hidden."
        ),
    )


def visible_keys(offset: int, upside_down: bool) -> list[int]:
    """How many keys each of four queries sees under j ≤ i + offset, or the reverse, j ≥ i − offset."""
    return [
        sum(j >= i - offset if upside_down else j <= i + offset for j in range(_TOKENS))
        for i in range(_TOKENS)
    ]


# --- exit codes ---------------------------------------------------------------------------------------


def exit_codes() -> tuple[Block, ...]:
    cases: tuple[tuple[str, bool, Severity | None], ...] = (
        ("attention, no finding", True, None),
        ("a note", True, "note"),
        ("a warning", True, "warning"),
        ("an error", True, "error"),
        ("no attention at all", False, None),
    )
    rows = []
    for name, looked, severity in cases:
        report = _report(looked, severity)
        codes = (report.exit_code("error"), report.exit_code("warning"), report.exit_code("never"))
        rows.append((name, *codes))
    return (
        Prose(
            "attncli never calls healthy what it did not look at: that nothing was found and that nothing "
            "could be seen are two results."
        ),
        Formula(
            (
                "0  looked, nothing at --fail-on",
                "1  found something at or above it",
                "2  wrong usage, or unreadable input",
                "3  not observed: no attention layer,",
                "   or a call was not explained",
            )
        ),
        Prose(
            "--fail-on says from which severity on a finding fails: note, warning, error (the default) or "
            "never. An error is a defect, a warning a likely one, a note is worth knowing. Findings win "
            "over 3: what was found stands."
        ),
        Table(
            (Column("report"), Column("error"), Column("warning"), Column("never")),
            tuple(rows),
            "The exit code of a report, by --fail-on.",
        ),
        Prose(
            "Ctrl-C ends with 130. A reader that goes away (| head) is no error. A bug in attncli shows "
            "its traceback, with 1."
        ),
    )


def _report(looked: bool, severity: Severity | None) -> Report:
    layer = Layer("0", "0", "self", "separate", 1, 1, 64, 0.125, {}, ())
    findings = () if severity is None else (Finding("ATT000", "example", severity, "", ""),)
    return Report("inspect", "", {}, {}, layers=(layer,) if looked else (), findings=findings)


# --- the topics ---------------------------------------------------------------------------------------

USAGE_TOPICS: tuple[Topic, ...] = (
    Topic(
        name="masks",
        aliases=(
            "mask",
            "causal",
            "causal-mask",
            "causal-masks",
            "attention-mask",
            "padding",
            "causal-offset",
        ),
        title="who may see whom, and how that goes wrong",
        blocks=masks,
        sources=(
            "documentation of torch 2: scaled_dot_product_attention, nn.MultiheadAttention",
            "Vaswani et al. 2017, arXiv 1706.03762 §3.2.3",
        ),
        rules=("ATT402", "ATT406", "ATT407", "ATT408", "ATT409", "ATT413"),
        commands=("entropy MODEL", "nan-check MODEL"),
        see=("softmax", "nan", "local-attention"),
    ),
    Topic(
        name="exit-codes",
        aliases=("exit-code", "exit", "fail-on", "severity", "ci", "not-observed", "unobserved"),
        title="what a CI job learns",
        blocks=exit_codes,
        sources=("attncli --help",),
        rules=(),
        commands=("check MODEL --fail-on warning", "rules"),
        see=("nan", "entropy", "overflow"),
    ),
)
