"""Rules about shapes: heads that do not fit, projections that are missing, layers unlike their siblings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

from attncli.records import Finding, Layer
from attncli.rules.rule import Observed, Rule


def _heads_mismatch(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer in observed.layers:
        for anomaly in layer.anomalies:
            evidence = dict(anomaly.evidence)
            if anomaly.kind == "heads-mismatch" and "hint" in evidence:
                yield rule.finding(
                    f"{layer.path}: {anomaly.subject} says {evidence['claim']}, but {evidence['tensor']} "
                    f"gives {evidence['hint']} {evidence['value']}.",
                    layer=layer.id,
                    evidence=evidence,
                )
            elif anomaly.kind == "heads-mismatch":
                yield rule.finding(
                    f"{layer.path}: the query projection has {evidence['rows']} rows, which do not fit "
                    f"{evidence['claim']} ({evidence['key']} of {anomaly.subject}).",
                    layer=layer.id,
                    evidence=evidence,
                )
            elif anomaly.kind == "kv-mismatch" and "found" in evidence:
                yield rule.finding(
                    f"{layer.path}: the key projection has {evidence['rows']} rows, {evidence['found']} "
                    f"heads of {evidence['head_dim']}, but {anomaly.subject} says {evidence['kv_heads']} "
                    f"KV heads ({evidence['key']}).",
                    layer=layer.id,
                    evidence=evidence,
                )
            elif anomaly.kind == "kv-mismatch":
                yield rule.finding(
                    f"{layer.path}: the key projection has {evidence['rows']} rows, not divisible by the "
                    f"head size {evidence['head_dim']}.",
                    layer=layer.id,
                    evidence=evidence,
                )


def _widths_disagree(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer in observed.layers:
        for anomaly in layer.anomalies:
            evidence = dict(anomaly.evidence)
            if anomaly.kind == "bias-mismatch":
                shape = "×".join(map(str, evidence["rows"]))
                message = f"{anomaly.subject}: {evidence['bias']} elements do not fit a weight of {shape}."
            elif anomaly.kind == "width-mismatch" and evidence["role"] == "v":
                kv_heads = evidence["kv_heads"]
                message = (
                    f"{anomaly.subject}: {evidence['rows']} rows do not divide into {kv_heads} KV heads."
                )
            elif anomaly.kind == "width-mismatch":
                message = (
                    f"{anomaly.subject}: it reads {evidence['columns']} elements, but {evidence['heads']} heads "
                    f"of values have {evidence['expected']}."
                )
            else:
                continue
            yield rule.finding(message, layer=layer.id, evidence=evidence)


def _missing_layer(rule: Rule, observed: Observed) -> Iterator[Finding]:
    stacks: dict[str, list[Layer]] = defaultdict(list)
    for layer in observed.layers:
        if layer.index is not None:
            stacks[layer.stack].append(layer)
    for stack, layers in stacks.items():
        indices = {layer.index for layer in layers if layer.index is not None}
        gaps = sorted(set(range(min(indices), max(indices))) - indices)
        # Models that alternate attention with something else have many gaps; one alone is a loss.
        if len(gaps) == 1 and len(indices) >= _SMALLEST_STACK - 1:
            yield rule.finding(
                f"{stack.replace('#', str(gaps[0]), 1)}: no attention layer, although its neighbours have one.",
                evidence={"missing": gaps[0], "layers": len(indices)},
            )


def _option_mismatch(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer in observed.layers:
        for anomaly in layer.anomalies:
            if anomaly.kind == "option-overruled":
                yield rule.finding(
                    f"{layer.path}: {anomaly.subject} {anomaly.evidence['claim']} was not used: "
                    f"{anomaly.evidence['from']} gives {anomaly.evidence['used']}.",
                    layer=layer.id,
                    evidence=dict(anomaly.evidence),
                )
            if anomaly.kind == "option-mismatch":
                yield rule.finding(
                    f"{layer.path}: {anomaly.subject} says {anomaly.evidence['claim']}, which does not fit "
                    f"{anomaly.evidence['rows']} rows; it was not used here.",
                    layer=layer.id,
                    evidence=dict(anomaly.evidence),
                )


def _kv_not_dividing(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer in observed.layers:
        for anomaly in layer.anomalies:
            if anomaly.kind == "kv-not-dividing":
                heads, kv_heads = anomaly.evidence["heads"], anomaly.evidence["kv_heads"]
                yield rule.finding(
                    f"{layer.path}: {kv_heads} KV heads do not divide {heads} query heads.",
                    layer=layer.id,
                    evidence=dict(anomaly.evidence),
                )


def _missing_projection(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for layer in observed.layers:
        missing = [
            role for a in layer.anomalies if a.kind == "missing-projection" for role in a.evidence["missing"]
        ]
        if missing:
            whole = sum(o.stack == layer.stack and o.layout != "incomplete" for o in observed.layers)
            others = (
                f", although {_layers(whole, 'other')} of its stack {'has' if whole == 1 else 'have'} one"
            )
            yield rule.finding(
                f"{layer.path}: no {' and no '.join(missing)} projection{others if whole else ''}.",
                layer=layer.id,
                evidence={"missing": missing},
            )
    for stack in _stacks(observed.layers):
        counts = Counter(role for layer in stack for role in _roles(layer))
        for layer in stack:
            if layer.layout in ("incomplete", "kv-shared"):
                continue
            lost = [
                r
                for r in ("o", "o_bias", "q_bias", "k_bias", "v_bias", "qkv_bias", "q_norm", "k_norm")
                if r in counts and r not in _roles(layer)
            ]
            lost = [role for role in lost if counts[role] >= len(stack) - 1]
            if lost:
                yield rule.finding(
                    f"{layer.path}: no {' and no '.join(lost)}, although all {len(stack) - 1} other layers "
                    "of its stack have one.",
                    layer=layer.id,
                    evidence={"missing": lost, "layers": len(stack)},
                )


def _unlike_siblings(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for stack in _stacks(observed.layers):
        for what, describe in (("shape", _shapes), ("dtype", _dtypes)):
            described: dict[str, Hashable] = {layer.id: describe(layer) for layer in stack}
            usual, count = Counter(described.values()).most_common(1)[0]
            odd = [layer for layer in stack if described[layer.id] != usual and layer.layout != "incomplete"]
            if len(odd) != 1 or count != len(stack) - 1:
                continue
            layer = odd[0]
            if what == "shape" and (layer.facts.get("per_layer_heads") or layer.layout == "kv-shared"):
                continue
            differing = _difference(layer, next(other for other in stack if other is not layer), what)
            if differing:
                yield rule.finding(
                    f"{layer.path}: {differing}, unlike all {count} other layers of its stack.",
                    layer=layer.id,
                    evidence={"what": what, "layers": len(stack)},
                )


def _stacks(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Layers that should be alike: one stack, one kind of layer, four or more of them."""
    stacks: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.index is not None and layer.kind is not None:
            stacks[(layer.stack, layer.facts.get("layer_type"))].append(layer)
    yield from (stack for stack in stacks.values() if len(stack) >= _SMALLEST_STACK)


def _layers(count: int, which: str) -> str:
    return f"{count} {which} layer{'' if count == 1 else 's'}"


def _roles(layer: Layer) -> set[str]:
    return {tensor.role for tensor in layer.tensors}


def _shapes(layer: Layer) -> Hashable:
    return frozenset((t.role, t.shape) for t in layer.tensors if t.role in _PROJECTIONS)


def _dtypes(layer: Layer) -> Hashable:
    # Quantised models mix storage types over layers on purpose.
    return frozenset(
        (t.role, t.dtype) for t in layer.tensors if t.role in _PROJECTIONS and t.dtype in _FLOATS
    )


def _difference(layer: Layer, other: Layer, what: str) -> str:
    theirs = {tensor.role: tensor for tensor in other.tensors}
    for tensor in layer.tensors:
        twin = theirs.get(tensor.role)
        if twin is None or tensor.role not in _PROJECTIONS:
            continue
        if what == "shape" and twin.shape != tensor.shape:
            return f"{tensor.role} has shape {list(tensor.shape)} instead of {list(twin.shape)}"
        if what == "dtype" and twin.dtype != tensor.dtype and {twin.dtype, tensor.dtype} <= _FLOATS:
            return f"{tensor.role} has dtype {tensor.dtype} instead of {twin.dtype}"
    return ""


# --- tables -------------------------------------------------------------------------------------------

# Below four layers one cannot tell which is the odd one.
_SMALLEST_STACK = 4
_PROJECTIONS = frozenset({"q", "k", "v", "o", "qkv", "kv", "qk", "q_a", "q_b", "kv_a", "kv_b"})
_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})

LAYOUT_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT101",
        name="heads-mismatch",
        severity="error",
        what="Heads × head size, as the config gives them, do not make up the projection.",
        why="The model cannot be built from this config, or it splits the projection into the wrong heads.",
        formula="rows of q = heads × head size; rows of k = KV heads × head size",
        threshold="any difference",
        source="Vaswani et al. 2017 §3.2.2; Ainslie et al. 2023 (GQA)",
        provenance="derived",
        example="q_proj has 4096 rows and num_attention_heads is 30.",
        remedy="Check num_attention_heads, num_key_value_heads and head_dim in the config, or take config "
        "and weights from one source.",
        check=_heads_mismatch,
    ),
    Rule(
        code="ATT102",
        name="kv-heads-do-not-divide",
        severity="error",
        what="The number of KV heads does not divide the number of query heads.",
        why="Grouped-query attention gives each KV head the same number of query heads.",
        formula="heads mod KV heads",
        threshold="≠ 0",
        source="Ainslie et al. 2023 (GQA), arXiv 2305.13245",
        provenance="published",
        example="32 query heads and 5 KV heads.",
        remedy="Check num_key_value_heads, and how the checkpoint was split or pruned.",
        check=_kv_not_dividing,
    ),
    Rule(
        code="ATT103",
        name="missing-projection",
        severity="error",
        what="A layer lacks a projection, bias or norm that its siblings have.",
        why="A loader leaves what is missing at its random initial value, or fails.",
        formula="roles of the layer against the roles of its stack",
        threshold="missing in one layer, present in all others",
        source="attncli",
        provenance="derived",
        example="Layer 7 has q_proj and o_proj, but no k_proj.",
        remedy="Look for the tensor in the original checkpoint; shared keys (num_kv_shared_layers) belong "
        "in the config.",
        check=_missing_projection,
    ),
    Rule(
        code="ATT104",
        name="unlike-siblings",
        severity="warning",
        what="One layer's shape or dtype differs from all others of its stack.",
        why="A single odd layer is the usual trace of a bad merge, a partial conversion or an overwritten "
        "tensor.",
        formula="shapes and dtypes of the projections, over the layers of one stack",
        threshold="exactly one layer of four or more differs, and no config lists heads per layer",
        source="attncli",
        provenance="heuristic",
        example="Layer 12 is float32, all others are bfloat16.",
        remedy="Compare that layer with the original checkpoint.",
        check=_unlike_siblings,
    ),
    Rule(
        code="ATT106",
        name="widths-disagree",
        severity="error",
        what="Tensors of one layer do not fit together: a bias and its weight, values and heads, values and output.",
        why="The layer cannot be run, whatever the rest of the checkpoint looks like.",
        formula="length of bias = rows; rows of v = KV heads × value head size; columns of o = heads × value head size",
        threshold="any difference",
        source="Vaswani et al. 2017 §3.2.2",
        provenance="derived",
        example="q_proj has 64 rows and its bias 32 elements.",
        remedy="Compare the layer with the original checkpoint; it is the trace of a partial conversion or of pruning.",
        check=_widths_disagree,
    ),
    Rule(
        code="ATT107",
        name="missing-layer",
        severity="warning",
        what="One layer of a stack has no attention, while all its neighbours have it.",
        why="Lost tensors stay at their random initial values when the rest is loaded without a strict check.",
        formula="numbers of the layers of one stack",
        threshold="exactly one number is missing between the first and the last of three or more",
        source="attncli",
        provenance="heuristic",
        example="Layers 0, 2 and 3 have attention, layer 1 has none.",
        remedy="Look for the layer in the original checkpoint; if it was removed on purpose, ignore this rule.",
        check=_missing_layer,
    ),
    Rule(
        code="ATT105",
        name="option-does-not-fit",
        severity="warning",
        what="--heads, --kv-heads or --head-dim contradict the shapes or the config of a layer.",
        why="The option was not used there, so the facts shown may still be unknown.",
        formula="rows of the projection = heads × head size",
        threshold="any remainder",
        source="attncli",
        provenance="derived",
        example="--heads 7 and a projection of 128 rows.",
        remedy="Give counts that divide the rows of the projection.",
        check=_option_mismatch,
    ),
)
