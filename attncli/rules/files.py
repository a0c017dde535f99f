"""Rules about the files themselves: indexes, pickles, configs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from attncli.records import Anomaly, Finding
from attncli.rules.rule import Observed, Rule


def _index_disagrees(rule: Rule, observed: Observed) -> Iterator[Finding]:
    by_kind: dict[str, list[Anomaly]] = defaultdict(list)
    for anomaly in observed.anomalies:
        if anomaly.kind in _INDEX_PROBLEMS:
            by_kind[anomaly.kind].append(anomaly)
    for kind, anomalies in by_kind.items():
        sentence, severity = _INDEX_PROBLEMS[kind]
        names = [anomaly.subject for anomaly in anomalies]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield rule.finding(
            sentence.format(count=len(names), names=listed),
            severity="error" if severity == "error" else "warning",
            evidence={"kind": kind, "names": names[:50], "count": len(names), **anomalies[0].evidence},
        )


def _pickle_global(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for anomaly in observed.anomalies:
        if anomaly.kind != "pickle-global":
            continue
        file = anomaly.evidence.get("file", "the file")
        if anomaly.evidence.get("dangerous"):
            yield rule.finding(
                f"{file}: the pickle names {anomaly.subject}, which can run code when the file is loaded. Nothing was run.",
                severity="error",
                advice="Do not load this file with torch.load or pickle. Find out where it came from.",
                evidence={"global": anomaly.subject, **anomaly.evidence},
            )
        else:
            yield rule.finding(
                f"{file}: the pickle names {anomaly.subject}, which is no part of a plain state dict. It was not imported.",
                evidence={"global": anomaly.subject, **anomaly.evidence},
            )


def _pickle_object(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for anomaly in observed.anomalies:
        if anomaly.kind == "pickle-object":
            yield rule.finding(
                f"{anomaly.subject} is an array of Python objects, stored as a pickle. It was not read.",
                evidence=dict(anomaly.evidence),
            )


def _unreadable_config(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for anomaly in observed.anomalies:
        if anomaly.kind == "unreadable-config":
            yield rule.finding(f"{anomaly.subject}: {anomaly.evidence.get('problem', 'it cannot be read.')}")


def _unknown_storage(rule: Rule, observed: Observed) -> Iterator[Finding]:
    names = [a.subject for a in observed.anomalies if a.kind in ("unknown-quantisation", "unknown-type")]
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield rule.finding(
            f"{len(names)} tensors are stored in a form attncli does not know, so their logical shape is unknown: {listed}.",
            evidence={"names": names[:50], "count": len(names)},
        )


# --- tables -------------------------------------------------------------------------------------------

_INDEX_PROBLEMS = {
    "missing-tensor": ("{count} tensors of the index are in no shard: {names}.", "error"),
    "duplicate-tensor": ("{count} tensors lie in more than one file: {names}.", "error"),
    "wrong-shard": ("{count} tensors lie in another shard than the index says: {names}.", "error"),
    "stray-tensor": (
        "{count} tensors lie in a shard but not in the index, so loaders skip them: {names}.",
        "warning",
    ),
    "stray-file": (
        "{count} files are named like shards but the index does not know them: {names}.",
        "warning",
    ),
}

FILE_RULES: tuple[Rule, ...] = (
    Rule(
        code="ATT001",
        name="index-disagrees",
        severity="error",
        what="The index of a sharded checkpoint and the headers of its shards do not say the same.",
        why="A loader follows the index: what it misses there stays at its random initial value, silently.",
        formula="names in weight_map − names in headers, and the reverse",
        threshold="any difference",
        source="safetensors index format; CoSER issue 3, mlx-vlm issue 1464",
        provenance="derived",
        example="model.safetensors.index.json lists lm_head.weight, which no shard holds.",
        remedy="Download all shards and the index of one revision again, or write the checkpoint anew.",
        check=_index_disagrees,
    ),
    Rule(
        code="ATT002",
        name="unknown-pickle-global",
        severity="warning",
        what="A torch file names a Python object outside the known plain ones.",
        why="Unpickling imports and calls what a file names: a checkpoint can run any code on the machine that loads it.",
        formula="globals in the pickle − globals of plain state dicts",
        threshold="any; an error where the name is known to run code (os.system, builtins.eval, …)",
        source="Python documentation of pickle; CVE-2025-32434",
        provenance="derived",
        example="data.pkl names os.system.",
        remedy="Load it with weights_only=True, or save the weights as safetensors.",
        check=_pickle_global,
    ),
    Rule(
        code="ATT003",
        name="pickled-object-array",
        severity="warning",
        what="An npz member holds Python objects instead of numbers.",
        why="Loading it needs allow_pickle=True, which runs code from the file.",
        formula="dtype of the member",
        threshold="dtype object",
        source="NumPy documentation of numpy.load",
        provenance="derived",
        example="weights.npz holds an object array `config`.",
        remedy="Save numbers and strings only.",
        check=_pickle_object,
    ),
    Rule(
        code="ATT004",
        name="unreadable-config",
        severity="warning",
        what="A config beside the weights cannot be read.",
        why="Heads and head sizes then have to come from shapes alone, which often cannot tell.",
        formula="JSON parse",
        threshold="any error",
        source="RFC 8259",
        provenance="derived",
        example="config.json ends in the middle.",
        remedy="Download or write the config again.",
        check=_unreadable_config,
    ),
    Rule(
        code="ATT005",
        name="unknown-storage",
        severity="note",
        what="Tensors are stored in a quantised form that attncli does not know.",
        why="Their logical shape and values stay unknown, so they were not checked.",
        formula="names and dtypes against the known schemes",
        threshold="any",
        source="attncli",
        provenance="heuristic",
        example="q_proj.packed of dtype uint8 without a known scale beside it.",
        remedy="Inspect the checkpoint before quantisation as well.",
        check=_unknown_storage,
    ),
)
