"""Rules about the files themselves: indexes, pickles, configs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from attncli.records import Anomaly, Finding, Severity
from attncli.rules.rule import Observed, Rule


def _index_disagrees(rule: Rule, observed: Observed) -> Iterator[Finding]:
    split = [
        a for a in observed.anomalies if a.kind in _INDEX_PROBLEMS and set(a.evidence) & set(_SPLIT_CLAIMS)
    ]
    for anomaly in split:
        evidence = anomaly.evidence
        for key in _SPLIT_CLAIMS:
            if key in evidence:
                other = evidence["found" if "found" in evidence else "expected"]
                yield rule.finding(
                    _SPLIT_CLAIMS[key].format(file=anomaly.subject, claim=evidence[key], other=other),
                    evidence={"kind": anomaly.kind, "file": anomaly.subject, **evidence},
                )
    rest = [a for a in observed.anomalies if a not in split and _place_in_header(a) is None]
    yield from _summed_up(rule, rest, _INDEX_PROBLEMS)


def _ambiguous_header(rule: Rule, observed: Observed) -> Iterator[Finding]:
    by_place: dict[str, list[Anomaly]] = defaultdict(list)
    for anomaly in observed.anomalies:
        place = _place_in_header(anomaly)
        if place is not None:
            by_place[place].append(anomaly)
    for place, anomalies in by_place.items():
        yield from _summed_up(rule, anomalies, _HEADER_PROBLEMS, place)


def _place_in_header(anomaly: Anomaly) -> str | None:
    """Where one header says two things at once; None for all that is no such thing."""
    if anomaly.kind == "duplicate-key":
        return f"twice in {anomaly.evidence.get('file', 'one file')}"
    if anomaly.kind == "overlapping-tensors":
        return "share bytes"
    if anomaly.kind != "duplicate-tensor":
        return None
    if "with" in anomaly.evidence:
        return "both plain and quantised"
    files = set(anomaly.evidence.get("files") or (anomaly.evidence.get("file", "one file"),))
    return f"twice in {files.pop()}" if len(files) == 1 else None


def _summed_up(
    rule: Rule, anomalies: Iterable[Anomaly], problems: Mapping[str, tuple[str, Severity]], place: str = ""
) -> Iterator[Finding]:
    """One finding for all anomalies of a kind, which names the first three."""
    by_kind: dict[str, list[Anomaly]] = defaultdict(list)
    for anomaly in anomalies:
        if anomaly.kind in problems:
            by_kind[anomaly.kind].append(anomaly)
    for kind, found in by_kind.items():
        sentence, severity = problems[kind]
        names = [anomaly.subject for anomaly in found]
        numbered = _SINGULAR if len(names) == 1 else _PLURAL
        yield rule.finding(
            sentence.format(count=len(names), names=_listed(names), place=place, **numbered),
            severity=severity,
            evidence={"kind": kind, "names": names[:50], "count": len(names), **found[0].evidence},
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _pickle_global(rule: Rule, observed: Observed) -> Iterator[Finding]:
    for anomaly in observed.anomalies:
        if anomaly.kind != "pickle-global":
            continue
        file = anomaly.evidence.get("file", "the file")
        if anomaly.evidence.get("dangerous"):
            yield rule.finding(
                f"{file}: the pickle names {anomaly.subject}, which can run code when the file is loaded. "
                "Nothing was run.",
                severity="error",
                advice="Do not load this file with torch.load or pickle. Find out where it came from.",
                evidence={"global": anomaly.subject, **anomaly.evidence},
            )
        else:
            yield rule.finding(
                f"{file}: the pickle names {anomaly.subject}, which is no part of a plain state dict. "
                "It was not imported.",
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
        subject = "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        yield rule.finding(
            f"{subject} stored in a form attncli does not know, so shape and values were not checked: "
            f"{_listed(names)}.",
            evidence={"names": names[:50], "count": len(names)},
        )


# --- tables -------------------------------------------------------------------------------------------

_SINGULAR = {"s": "", "are": "is", "lie": "lies", "stand": "stands", "them": "it", "share": "shares"}
_PLURAL = {word: word for word in _SINGULAR}
_INDEX_PROBLEMS: Mapping[str, tuple[str, Severity]] = {
    "missing-tensor": ("{count} tensor{s} of the index {are} in no shard: {names}.", "error"),
    "duplicate-tensor": ("{count} tensor{s} {lie} in more than one file: {names}.", "error"),
    "wrong-shard": ("{count} tensor{s} {lie} in another shard than the index says: {names}.", "error"),
    "stray-tensor": (
        "{count} tensor{s} {lie} in a shard but not in the index, so loaders skip {them}: {names}.",
        "warning",
    ),
    "stray-file": (
        "{count} file{s} {are} named like shards but the index does not know {them}: {names}.",
        "warning",
    ),
}
# GGUF: what the metadata says of a split, against its files and their names.
_SPLIT_CLAIMS: Mapping[str, str] = {
    "split.tensors.count": "{file}: split.tensors.count is {claim}, but the split holds {other} tensors.",
    "split.count": "{file}: split.count is {claim}, but its name says {other} files.",
    "split.no": "{file}: split.no is {claim}, but its name says number {other}, counted from 0.",
}
_HEADER_PROBLEMS: Mapping[str, tuple[str, Severity]] = {
    "duplicate-tensor": ("{count} tensor{s} {stand} {place}: {names}.", "error"),
    "overlapping-tensors": ("{count} tensor{s} {share} bytes with another one: {names}.", "error"),
    "duplicate-key": (
        "{count} metadata key{s} {stand} {place}, and the first value was used: {names}.",
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
        why="Unpickling imports and calls what a file names: a checkpoint can run any code on the "
        "machine that loads it.",
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
    Rule(
        code="ATT006",
        name="ambiguous-header",
        severity="error",
        what="A header says two things at once: a tensor or key stands twice, or two tensors share bytes.",
        why="Which of the two a loader takes is its own choice, so two programs can load different weights.",
        formula="names that occur twice in one file; overlapping byte ranges",
        threshold="any; a warning where it is only a metadata key",
        source="GGUF specification: keys and tensor names are unique, tensors do not overlap",
        provenance="published",
        example="model.gguf holds blk.0.attn_q.weight twice.",
        remedy="Convert or save the checkpoint again, and compare it with the original.",
        check=_ambiguous_header,
    ),
)
