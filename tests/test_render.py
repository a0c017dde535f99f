"""The table against golden files, and what must hold of it for any report: whole names, honest numbers.

Golden files are made anew by `python tests/test_render.py`; look at their diff before committing it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from attncli.records import Finding, Layer, LayerTensor, Measurement, Report
from attncli.render import FORMATS, table
from attncli.render.folds import folds, ranges, relative
from attncli.render.words import clean, count, number, percent, size

GOLDEN = Path(__file__).parent / "golden"
SOURCE = {
    "path": "model.safetensors",
    "format": "safetensors",
    "files": 2,
    "bytes": 548118077,
    "parameters": 137022720,
}


def report(*layers: Layer, **other: Any) -> Report:
    return Report(
        command="inspect",
        version="0.1.0",
        source={**SOURCE, **other.pop("source", {})},
        environment={"python": "3.11.0"},
        layers=layers,
        **other,
    )


def layer(
    path: str, *tensors: tuple[str, str, tuple[int, ...]], dtype: str = "float16", **changes: Any
) -> Layer:
    """A layer with twelve heads of size 64; `tensors`: role, name inside the layer, shape."""
    index = next((int(part) for part in path.split(".") if part.isdigit()), None)
    made = Layer(
        id=path,
        path=path,
        kind="self",
        layout="separate",
        heads=12,
        kv_heads=12,
        head_dim=64,
        scale=0.125,
        evidence={"heads": "config", "kv_heads": "config", "head_dim": "config", "scale": "config"},
        tensors=tuple(
            LayerTensor(
                role, name if name.startswith("=") else f"{path}.{name}", shape, dtype, "model.safetensors"
            )
            for role, name, shape in tensors or SEPARATE
        ),
        stack=path if index is None else path.replace(f".{index}.", ".#.", 1),
        index=index,
    )
    return dataclasses.replace(made, **changes)


SEPARATE = tuple((role, f"{role}_proj.weight", (768, 768)) for role in "qkvo")
FUSED = (
    ("qkv", "c_attn.weight", (768, 2304)),
    ("qkv_bias", "c_attn.bias", (2304,)),
    ("o", "c_proj.weight", (768, 768)),
    ("o_bias", "c_proj.bias", (768,)),
)


def gpt2(index: int, **changes: Any) -> Layer:
    facts = {"bias": True, "orientation": "in, out"}
    made = layer(f"h.{index}.attn", *FUSED, layout="fused-block", facts=facts)
    return dataclasses.replace(made, **changes)


def finding(code: str, name: str, severity: Any, message: str, where: str | None = None) -> Finding:
    return Finding(code, name, severity, message, "Compare it with the original checkpoint.", where)


def bound_rows(path: str, *bounds: tuple[float, float | None]) -> list[Measurement]:
    rows = []
    for head, (bound, typical) in enumerate(bounds):
        rows.append(Measurement("score_bound", path, bound, head=head))
        rows.append(Measurement("score_typical", path, typical, head=head))
    largest = max(bound for bound, _ in bounds)
    for dtype, maximum in (("float16", 65504.0), ("bfloat16", 3.39e38), ("float32", 3.4e38)):
        rows.append(
            Measurement(f"overflow_{dtype}", path, "proven safe" if largest < maximum else "not excluded")
        )
    return rows


def value_rows(
    name: str, nan: int, inf: int, absmax: float | None, rms: float | None, zeros: float
) -> list[Measurement]:
    metrics = {"nan_count": nan, "inf_count": inf, "absmax": absmax, "rms": rms, "zero_fraction": zeros}
    return [Measurement(metric, name, value) for metric, value in metrics.items()]


# --- golden files -------------------------------------------------------------------------------------

UNKNOWN = layer(
    "blocks.0.attn",
    ("qkv", "qkv.weight", (1152, 384)),
    ("q_norm", "q_norm.weight", (64,)),
    heads=None,
    kv_heads=None,
    head_dim=None,
    scale=None,
    layout="fused-unknown",
    evidence={},
    facts={"q_norm": True},
)
REPORTS: dict[str, Report] = {
    "folds": report(*(gpt2(index) for index in range(12))),
    "nothing": report(source={"files": 1, "bytes": 1, "parameters": 16}),
    "kinds": report(
        layer("decoder.0.self_attn", evidence={"heads": "config", "head_dim": "shape", "scale": "assumed"}),
        layer(
            "decoder.0.encoder_attn",
            ("q", "q_proj.weight", (768, 768)),
            ("kv", "kv_proj.weight", (1536, 512)),
            kind="cross",
            layout="q+kv",
            scale=1.0,
        ),
        UNKNOWN,
        layer(
            "backbone.1.mixer",
            ("qkv", "in_proj.weight", (3072, 768)),
            ("conv1d", "conv1d.weight", (1536, 1, 4)),
            ("conv1d_bias", "conv1d.bias", (1536,)),
            ("a_log", "A_log", (1536,)),
            kind=None,
            layout="linear-attention",
            heads=None,
            kv_heads=None,
            head_dim=None,
            scale=None,
            evidence={"layout": "name"},
        ),
        layer(
            "layers.3.swin",
            scale=None,
            evidence={"heads": "shape"},
            facts={"cosine": True, "relative_bias": True, "window": 8, "bias": True, "what nobody knows": 1},
        ),
        notes=("402 optimizer tensors left out",),
    ),
    "grouped": report(
        *(
            layer(
                f"model.layers.{index}.self_attn",
                ("q", "q_proj.weight", (4096, 4096)),
                ("k", "k_proj.weight", (1024, 4096)),
                ("v", "v_proj.weight", (1024, 4096)),
                ("o", "o_proj.weight", (4096, 4096)),
                dtype="q4_k" if index != 5 else "q6_k",
                heads=32,
                kv_heads=8,
                head_dim=128,
                scale=128**-0.5,
                facts={
                    "layer_type": "full_attention" if index % 4 == 3 else "sliding_attention",
                    **({} if index % 4 == 3 else {"window": 4096}),
                    "quantisation": "gguf",
                    "soft_cap": 50.0,
                },
            )
            for index in range(12)
        ),
        source={"format": "gguf", "files": 1, "bytes": 4_370_000_000, "parameters": 7_248_023_552},
    ),
    "findings": report(
        *(gpt2(index) for index in range(4)),
        findings=(
            *(
                finding("ATT101", "heads-mismatch", "error", f"h.{i}.attn: no 11 heads in 768 rows.", f"h.{i}.attn")
                for i in range(3)
            ),
            finding("ATT001", "index-disagrees", "error", "1 tensor of the index is in no shard: lm_head.weight."),
            finding("ATT104", "unlike-siblings", "warning", "h.2.attn: qkv has dtype float32 instead of float16."),
            finding("ATT005", "unknown-storage", "note", "2 tensors are stored in a form attncli does not know."),
        ),
        notes=("bounds of 4 layers use: LayerNorm in front, biases",),
    ),
    "measured": report(
        *(gpt2(index) for index in range(3)),
        measurements=(
            *bound_rows("h.0.attn", (217.4, 6.252), (136.0, 2.872)),
            *bound_rows("h.1.attn", (65503.4, None), (70000.0, 812.0)),
            *bound_rows("h.2.attn", (math.inf, 1e-5), (1.0, 0.0)),
            *value_rows("h.0.attn.c_attn.weight", 0, 0, 3.25, 0.1412, 0.0),
            *value_rows("h.1.attn.c_attn.weight", 128, 2, 65504.0, 0.02, 0.5),
            *value_rows("h.2.attn.c_attn.weight", 0, 0, 1e-7, 3e-9, 0.999999),
            *value_rows("empty", 0, 0, None, None, 1.0),
        ),
        notes=("values not observed in 1 tensors: compressed (1)",),
    ),
    "nothing-but-findings": report(
        findings=(finding("ATT002", "unknown-pickle-global", "error", "m.pt: the pickle names os.system."),),
        source={"format": "torch"},
    ),
}  # fmt: skip
VIEWS = {
    **{name: (name, None, False) for name in REPORTS},
    "grouped-unfolded": ("grouped", None, True),
    "measured-unfolded": ("measured", None, True),
    "kinds-60-columns": ("kinds", 60, False),
    "kinds-90-columns": ("kinds", 90, False),
    "findings-60-columns": ("findings", 60, False),
    "measured-60-columns": ("measured", 60, False),
}


def drawn(shown: Report, columns: int, *, unfolded: bool = False, color: bool = False, **options: Any) -> str:
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=columns,
        color_system="truecolor" if color else None,
        force_terminal=color,
        legacy_windows=False,
        _environ={},
        **options,
    )
    table.draw(shown, console, unfolded=unfolded)
    return buffer.getvalue()


def view(name: str) -> str:
    source, columns, unfolded = VIEWS[name]
    if columns is None:
        return table.text(REPORTS[source], unfolded=unfolded)
    lines = drawn(REPORTS[source], columns, unfolded=unfolded).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.mark.parametrize("name", VIEWS)
def test_the_table_is_the_golden_one(name: str) -> None:
    assert view(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*")} == set(VIEWS)


# --- widths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [20, 40, 60, 79, 80, 100, 120, 160, 300])
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_wider_than_the_console(name: str, columns: int) -> None:
    for line in drawn(REPORTS[name], columns).splitlines():
        assert len(line) <= columns


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_wrapping_loses_no_letter_of_a_name(name: str, columns: int) -> None:
    output = "".join(drawn(REPORTS[name], columns).split())
    for fold in folds(REPORTS[name].layers):
        assert "".join(fold.label.split()) in output
    for found in REPORTS[name].findings:
        assert found.name in output


def test_a_very_wide_console_shows_what_a_pipe_gets() -> None:
    for name, given_report in REPORTS.items():
        lines = drawn(given_report, 2000).splitlines()
        assert "\n".join(line.rstrip() for line in lines) + "\n" == table.text(given_report), name


def test_names_of_any_length_are_whole_where_the_output_is_no_terminal() -> None:
    module = "x" * 3000
    tensor = "w" * 2000
    output = table.text(
        report(
            layer(f"{module}.0.attn", ("q", f"{tensor}.weight", (1,) * 40)),
            measurements=tuple(value_rows(f"{module}.0.attn.{tensor}.weight", 1, 0, 1.0, 1.0, 0.0)),
            findings=(finding("ATT101", "heads-mismatch", "error", f"{module}.0.attn: wrong."),),
        )
    )
    assert f" {module}.0.attn   self" in output
    assert f" {tensor}.weight " in output
    assert f" {module}.0.attn.{tensor}.weight " in output
    assert f"heads-mismatch  {module}.0.attn: wrong." in output
    assert "×".join("1" * 40) in output
    assert "…" not in output


def test_text_has_no_trailing_spaces_and_ends_in_one_line_feed() -> None:
    for name in VIEWS:
        output = view(name)
        assert re.search(r"[ \t]+$", output, re.MULTILINE) is None
        assert output.endswith("\n")
        assert not output.endswith("\n\n")


# --- colour -------------------------------------------------------------------------------------------


def test_colour_marks_findings_on_a_terminal_and_nowhere_else() -> None:
    red = re.compile(r"\x1b\[[0-9;]*31m")
    assert red.search(drawn(REPORTS["findings"], 200, color=True))
    assert not red.search(drawn(REPORTS["folds"], 200, color=True))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", drawn(REPORTS["findings"], 200, color=True, no_color=True))
    assert "\x1b" not in table.text(REPORTS["findings"])


def test_colour_is_decoration_the_words_are_the_same_without_it() -> None:
    for given_report in REPORTS.values():
        coloured = re.sub(r"\x1b\[[0-9;]*m", "", drawn(given_report, 120, color=True))
        assert coloured == drawn(given_report, 120)


# --- hostile names ------------------------------------------------------------------------------------

HOSTILE = "[red]x[/red]:smile:\x1b[2J\x07\x9b1m\u202e\u2028\n\ud800"
SEEN = r"[red]x[/red]:smile:\x1b[2J\x07\x9b1m\x202e\x2028\x0a\xd800"


@pytest.mark.parametrize("columns", [50, 100, 3000])
def test_markup_and_control_characters_are_shown_and_never_obeyed(columns: int) -> None:
    shown = report(
        layer(
            f"{HOSTILE}.0.attn",
            ("q", f"{HOSTILE}.weight", (4, 4)),
            ("qkv", "qkv.weight", (4, 4)),
            dtype=HOSTILE,
            facts={"layer_type": HOSTILE, "order": HOSTILE},
        ),
        layer(f"{HOSTILE}.1.attn", ("q", f"{HOSTILE}.weight", (4, 5))),
        measurements=(*bound_rows(HOSTILE, (1.0, 1.0)), *value_rows(HOSTILE, 1, 0, 1.0, 1.0, 0.0)),
        findings=(Finding("ATT101", "heads-mismatch", "error", HOSTILE, HOSTILE),),
        notes=(HOSTILE,),
        source={"path": HOSTILE, "format": HOSTILE},
    )
    plain = drawn(shown, columns)
    assert all(letter.isprintable() or letter == "\n" for letter in plain)
    # Path, format, 2 labels in two tables, 2 tensors, 2 dtypes, 2 facts, 2 measurements, message, advice, note.
    if columns > 1000:  # narrower, names are folded inside their columns
        assert plain.count(SEEN) == 17
    coloured = drawn(shown, columns, color=True)
    assert "\x1b[2J" not in coloured
    plain.encode("utf-8")


@given(st.text(st.characters(codec=None)))
def test_what_clean_returns_is_printable_and_keeps_printable_text(name: str) -> None:
    shown = clean(name)
    assert shown.isprintable()
    if name.isprintable():
        assert shown == name


def test_clean_takes_anything() -> None:
    assert [clean(value) for value in (None, 3, "a\tb", "größe")] == ["None", "3", r"a\x09b", "größe"]


# --- folds --------------------------------------------------------------------------------------------


def test_a_thousand_layers_that_are_alike_fold_into_few_lines() -> None:
    shown = report(*(gpt2(index) for index in range(1000)))
    output = table.text(shown)
    assert len(output.splitlines()) < 15
    assert "h.{0–999}.attn" in output
    assert output.endswith("1000 attention layers; no findings.\n")
    unfolded = table.text(report(*(gpt2(index) for index in range(50))), unfolded=True)
    assert [index for index in range(50) if f"\n h.{index}.attn " not in unfolded] == []


def labels(*layers: Layer) -> list[str]:
    return [fold.label for fold in folds(layers)]


def test_layers_fold_by_stack_and_the_rest_stay_in_order() -> None:
    assert labels(*(gpt2(i) for i in (0, 1, 2, 5))) == ["h.{0–2,5}.attn"]
    assert labels(gpt2(0), layer("x.attn"), gpt2(1)) == ["h.{0–1}.attn", "x.attn"]
    assert labels(gpt2(7)) == ["h.7.attn"]
    assert labels(layer("attn"), layer("attention")) == ["attn", "attention"]


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "cross"},
        {"layout": "fused-head"},
        {"heads": 6},
        {"heads": None},
        {"kv_heads": 6},
        {"head_dim": 32},
        {"scale": 0.1251},
        {"scale": None},
        {"evidence": {"heads": "shape"}},
        {"facts": {"bias": True}},
        {"facts": {"bias": True, "orientation": "in, out", "window": 3}},
        {"tensors": gpt2(1).tensors[:2]},
        {"tensors": tuple(dataclasses.replace(t, dtype="float32") for t in gpt2(1).tensors)},
        {"tensors": tuple(dataclasses.replace(t, shape=(1, 1)) for t in gpt2(1).tensors)},
        {"tensors": tuple(dataclasses.replace(t, role="kv") for t in gpt2(1).tensors)},
        {"tensors": tuple(dataclasses.replace(t, name=f"{t.name}x") for t in gpt2(1).tensors)},
        {"stack": "another.#"},
    ],
)
def test_layers_that_differ_in_anything_shown_do_not_fold(changes: dict[str, Any]) -> None:
    assert len(labels(gpt2(0), gpt2(1), gpt2(2))) == 1
    assert len(labels(gpt2(0), gpt2(1, **changes), gpt2(2))) == 2


def test_rounding_of_the_scale_does_not_split_a_fold() -> None:
    assert len(labels(gpt2(0, scale=0.125), gpt2(1, scale=0.125 + 1e-12))) == 1


def test_a_hash_in_a_name_is_not_taken_for_the_number() -> None:
    sharp = [gpt2(i, path=f"c#.{i}.attn", stack="c#.#.attn", tensors=()) for i in range(2)]
    assert labels(*sharp) == ["c#.{0–1}.attn"]
    padded = [gpt2(i, path=f"h.0{i}.attn", stack="h.#.attn", tensors=()) for i in range(2)]
    assert labels(*padded) == ["h.{0–1}.attn"]


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ([3], "3"),
        ([0, 1], "0–1"),
        ([1, 0, 1], "0–1"),
        ([0, 2], "0,2"),
        ([0, 1, 2, 5], "0–2,5"),
        ([0, 2, 4], "0–4 step 2"),
        ([1, 4, 7, 10], "1–10 step 3"),
        ([0, 2, 4, 5], "0,2,4–5"),
        ([0, 1, 3, 4, 8], "0–1,3–4,8"),
    ],
)
def test_numbers_become_ranges(numbers: list[int], shown: str) -> None:
    assert ranges(numbers) == shown


@given(st.lists(st.integers(0, 60), min_size=1))
def test_ranges_name_every_number_and_no_other(numbers: list[int]) -> None:
    named: set[int] = set()
    for part in ranges(numbers).split(","):
        span, _, step = part.partition(" step ")
        first, _, last = span.partition("–")
        named.update(range(int(first), int(last or first) + 1, int(step or 1)))
    assert named == set(numbers)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("h.0.attn.c_attn.weight", "c_attn.weight"),
        ("h.0.ln_1.weight", "ln_1.weight"),
        ("h.0.attn_bias", "attn_bias"),
        ("wte.weight", "wte.weight"),
        ("h.01.attn", "h.01.attn"),
    ],
)
def test_names_are_shown_inside_their_module_or_whole(name: str, shown: str) -> None:
    assert relative(LayerTensor("q", name, (), "float16", "f"), gpt2(0)) == shown


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (1, "1"),
        (0.125, "0.125"),
        (3.14159, "3.142"),
        (-2.5, "-2.5"),
        (0.001, "0.001"),
        (0.000999, "9.99e-04"),
        (1e-300, "1.00e-300"),
        (5e-324, "4.94e-324"),
        (9999.4, "9999"),
        (9999.6, "10 000"),
        (65504.0, "65 504"),
        (999999.4, "999 999"),
        (1e6, "1.00e+06"),
        (3.4028e38, "3.40e+38"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (None, "—"),
        ("inf", "inf"),
    ],
)
def test_numbers_have_four_digits_and_only_zero_is_0(value: object, shown: str) -> None:
    assert number(value) == shown


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_within_half_a_percent_of_the_number(value: float) -> None:
    shown = number(value)
    assert (shown == "0") is (value == 0)
    assert math.isclose(float(shown.replace(" ", "")), value, rel_tol=5.1e-3, abs_tol=5e-324)


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [
        (0, "0 %"),
        (0.0, "0 %"),
        (1, "100 %"),
        (1.0, "100 %"),
        (5e-324, "<0.01 %"),
        (0.00009, "<0.01 %"),
        (0.0001, "0.01 %"),
        (0.00123, "0.12 %"),
        (0.125, "12 %"),
        (0.5, "50 %"),
        (0.984, "98 %"),
        (0.985, "98.5 %"),
        (0.996, "99.6 %"),
        (0.9996, "99.96 %"),
        (0.9999, "99.99 %"),
        (0.99991, ">99.99 %"),
        (math.nextafter(1, 0), ">99.99 %"),
        (None, "—"),
    ],
)
def test_percents_are_0_or_100_only_where_they_are(fraction: object, shown: str) -> None:
    assert percent(fraction) == shown


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_no_share_rounds_to_nothing_or_to_all(fraction: float) -> None:
    shown = percent(fraction)
    assert shown not in ("0 %", "100 %")
    value = float(re.sub("[<>% ]", "", shown)) / 100
    if shown[0] == "<":
        assert fraction < value
    elif shown[0] == ">":
        assert fraction > value
    else:
        assert math.isclose(value, fraction, rel_tol=0.06)
        assert math.isclose(1 - value, 1 - fraction, rel_tol=0.51)


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (198403, "198 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (548118077, "548 MB"),
        (4_370_000_000, "4.37 GB"),
        (999_600_000_000, "1 TB"),
        (1_234_567 * 10**12, "1234567 TB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(amount: int, shown: str) -> None:
    assert size(amount) == shown


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (49152, "49.2 k"), (999_999, "1 M"), (7_248_023_552, "7.25 B")],
)
def test_counts_have_three_digits(amount: int, shown: str) -> None:
    assert count(amount) == shown


# --- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPORTS)
def test_json_is_the_report_and_ends_in_a_line_feed(name: str) -> None:
    text = FORMATS["json"].text(REPORTS[name])
    assert json.loads(text) == REPORTS[name].to_dict()
    assert text.endswith("}\n")
    assert FORMATS["table"].text(REPORTS[name]) == table.text(REPORTS[name])


if __name__ == "__main__":
    for stale in GOLDEN.glob("*"):
        stale.unlink()
    for view_name in VIEWS:
        (GOLDEN / f"{view_name}.txt").write_text(view(view_name), encoding="utf-8")
