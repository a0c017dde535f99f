"""Reports of every sort that a CI server may be shown, and their golden files in each of its formats.

`python tests/ci_reports.py` makes the golden files anew; look at their diff before committing it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_render import finding, gpt2, layer

from attncli.records import Call, Change, Finding, Layer, Measurement, Origin, Report
from attncli.render import FORMATS

GOLDEN = Path(__file__).parent / "golden_formats"
SUFFIXES = {"markdown": "md", "github": "txt", "sarif": "sarif", "junit": "xml"}
SOURCE = {"kind": "file", "path": "weights/model.safetensors", "format": "safetensors", "files": 1}
# Everything that a name could be in one of the formats, or in a terminal.
HOSTILE = (
    "a|b`c`|<script>alert(1)</script>]]>&lt;**x** @octocat #123 GH-7 https://x.yz $a$ [k](http://x.yz) "
    "\n::set-env name=A::b\r::stop-commands::x\n##[add-path]/tmp %0A::error::x {0} %25 \x1b[31m\x00\ud800\ufffe\\|"
)


def report(*layers: Layer, **other: Any) -> Report:
    return Report(
        command=other.pop("command", "inspect"),
        version="0.1.0",
        source={**SOURCE, **other.pop("source", {})},
        environment={"python": "3.11.0"},
        layers=layers,
        **other,
    )


def call(path: str, index: int = 0, **changes: Any) -> Call:
    made = Call(
        index, path, path, "softmax", "self", "softmax", 1, 2, 2, 8, 8, 4, "float32", "float32", "raw", 0.5,
        explained=True, difference=0.0,
    )  # fmt: skip
    return replace(made, **changes)


def measured(path: str, entropy: float, score: float, bits: float) -> list[Measurement]:
    return [
        Measurement(metric, path, value + head, head=head, call=0)
        for metric, value in (("entropy", entropy), ("score_max", score), ("headroom_bits_float16", bits))
        for head in range(2)
    ]


def mismatch(path: str, rows: int = 768) -> Finding:
    return finding("ATT101", "heads-mismatch", "error", f"{path}: no 11 heads in {rows} rows.", path)


def many(count: int, layers: int = 100) -> Report:
    """`count` findings of four rules and all severities over `layers` layers: what a broken model gives."""
    rules = [
        ("ATT101", "heads-mismatch", "error"),
        ("ATT501", "large-scores", "warning"),
        ("ATT505", "coarse-bfloat16-scores", "warning"),
        ("ATT504", "would-overflow-float16", "note"),
    ]
    findings = []
    for at in range(count):
        code, name, severity = rules[at % len(rules)]
        path = f"h.{at // len(rules) % layers}.attn"
        head = at // (len(rules) * layers)
        found = finding(code, name, severity, f"{path}: head {head}: the number is {at}.", path)
        findings.append(replace(found, head=head, evidence={"number": at}))
    return report(*(gpt2(index) for index in range(layers)), findings=tuple(findings))


def unlike(count: int) -> Report:
    """As many findings of which no two say the same, errors among the last."""
    words = ["".join(chr(97 + at // 26**place % 26) for place in range(4)) for at in range(count)]
    return report(
        gpt2(0),
        findings=tuple(
            finding(
                "ATT101", "heads-mismatch", "error" if at >= count - 7 else "note", f"{word}: it is wrong."
            )
            for at, word in enumerate(words)
        ),
    )


ORIGIN = Origin(
    "nan", "forward", "overflow", True, "decoder.0.attn", "bmm", "src/model.py:41", None, "decoder.0.attn",
    {"batch": 0, "head": 1, "query": 2, "key": 3}, "float16", {"seen": ["loss"], "proof": "in float32 it is finite"},
    ({"module": "decoder.0.attn", "op": "bmm"},), "q·k overflows float16", "Scale q before the product.",
)  # fmt: skip
NAN_FINDING = Finding(
    "ATT701",
    "nan-born",
    "error",
    "decoder.0.attn (bmm, model.py:41): q·k overflows float16.",
    "Scale q before the product.",
    "decoder.0.attn",
    evidence={"source": "src/model.py:41", "op": "bmm", "value": math.nan},
)
LINEAR = layer("backbone.1.mixer", kind=None, layout="linear-attention", heads=None, tensors=())
NOTE = finding("ATT104", "unlike-siblings", "warning", "h.2.attn: qkv is float32, not float16.", "h.2.attn")
REPORTS: dict[str, Report] = {
    "clean": report(*(gpt2(index) for index in range(12))),
    "one": report(*(gpt2(index) for index in range(2)), findings=(mismatch("h.1.attn"),)),
    "mixed": report(
        *(gpt2(index) for index in range(4)),
        LINEAR,
        findings=(
            *(mismatch(f"h.{index}.attn") for index in range(3)),
            NOTE,
            finding("ATT005", "unknown-storage", "note", "2 tensors are stored in a form attncli does not know."),
        ),
        known=(
            finding("ATT102", "widths-disagree", "error", "h.3.attn: 3 columns.", "h.3.attn"),
            finding("ATT001", "index-disagrees", "error", "1 tensor of the index is in no shard."),
        ),
        notes=("402 optimizer tensors left out",),
    ),
    "known": report(*(gpt2(index) for index in range(2)), known=(mismatch("h.0.attn"), mismatch("h.1.attn"))),
    "nothing": report(),
    "unobserved": report(
        *(gpt2(index) for index in range(3)),
        LINEAR,
        command="entropy",
        source={"kind": "code", "path": "src/model.py:build"},
        run={"batch": "synthetic", "operators": 90, "calls_seen": 2, "notes": ["flex_attention was unrolled"]},
        calls=(call("h.0.attn", source="src/model.py:12"), call("h.1.attn", 1, explained=False, reason="no mask.")),
        measurements=tuple(measured("h.0.attn", 1.25, 9.5, 3.0)),
    ),
    "nan": report(
        layer("decoder.0.attn"),
        command="nan-check",
        source={"kind": "code", "path": "src/model.py:build"},
        run={"operators": 412, "operators_by_phase": {"forward": 412}},
        origins=(ORIGIN,),
        findings=(NAN_FINDING,),
    ),
    "diff": report(
        gpt2(0),
        command="diff",
        findings=(mismatch("h.0.attn"),),
        changes=(
            Change("added", "h.1.attn", None, "layer", None, "fused-block"),
            Change("metric", "h.0.attn", 3, "entropy", 2.125, math.nan),
            Change("structure", "h.0.attn", None, "qkv shape", [768, 2304], [768, 768]),
            Change("source", None, None, "parameters", 124_439_808, None),
        ),
    ),
    "hostile": report(
        layer(f"{HOSTILE}.0.attn", ("q", f"{HOSTILE}.weight", (4, 4)), facts={"order": HOSTILE}, layout=HOSTILE),
        layer(f"{HOSTILE}.1.attn", kind=None),
        source={"path": HOSTILE, "format": HOSTILE},
        measurements=tuple(measured(HOSTILE, 1.0, math.inf, math.nan)),
        findings=(
            Finding("ATT101", "heads-mismatch", "error", f"{HOSTILE}.0.attn: {HOSTILE}", HOSTILE, f"{HOSTILE}.0.attn"),
            Finding("ATT504", "would-overflow", "note", HOSTILE, HOSTILE, HOSTILE, evidence={HOSTILE: HOSTILE}),
        ),
        known=(Finding("ATT102", "widths", "warning", HOSTILE, HOSTILE, HOSTILE, evidence={"source": HOSTILE}),),
        changes=(Change("metric", HOSTILE, 1, HOSTILE, HOSTILE, [HOSTILE]),),
        notes=(HOSTILE,),
    ),
}  # fmt: skip


def golden(name: str, output_format: str) -> Path:
    return GOLDEN / f"{name}.{SUFFIXES[output_format]}"


def rendered(name: str, output_format: str) -> str:
    return FORMATS[output_format].text(REPORTS[name])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*"):
        stale.unlink()
    for report_name in REPORTS:
        for format_name in SUFFIXES:
            golden(report_name, format_name).write_text(rendered(report_name, format_name), encoding="utf-8")
