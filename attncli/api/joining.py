"""Calls of a run ↔ layers of the weights: by the weight that projected the queries, then by module path.

A layer goes by the name that the checkpoint's files give it; the path in memory stands beside it where the
two differ (transformers renames on loading). A call that belongs to no layer makes one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from attncli.layout import Options, attention_layers
from attncli.records import Array, Call, Config, Evidence, Layer, Measurement, Tensor


class Joined(NamedTuple):
    """`idle`: softmax layers that no call belongs to."""

    layers: tuple[Layer, ...]
    calls: tuple[Call, ...]
    measurements: tuple[Measurement, ...]
    idle: tuple[str, ...]


def memory_layers(
    model: Any, configs: Sequence[tuple[str, Mapping[str, Any]]], options: Options | None = None
) -> tuple[Layer, ...]:
    """The layers that the parameters of a model in memory make, by the same reading as a checkpoint's."""
    from attncli.trace import named_weights

    tensors = []
    for weight in named_weights(model):
        array = Array(weight.name, weight.shape, weight.dtype, "", None, weight.size_bytes)
        tensors.append(Tensor(weight.name, weight.shape, weight.dtype, "", {"weight": array}))
    return attention_layers(tensors, [Config(source, values) for source, values in configs], options)


def joined(
    calls: Sequence[Call],
    measurements: Sequence[Measurement],
    in_memory: Sequence[Layer],
    on_disk: Sequence[Layer],
) -> Joined:
    """Every call with the id of its layer, and every layer with what the run adds to it."""
    names = _disk_names(in_memory, on_disk)
    layers: dict[str, Layer] = {}
    for layer in in_memory:
        known = names.get(layer.path)
        layers[layer.path] = layer if known is None else _renamed(layer, known)
    used: dict[int, str] = {}
    for number, call in enumerate(calls):
        home = _home(call, in_memory)
        if home is None:
            path = call.module or _weights_home(call) or _function(call)
            home = path
            if path not in layers:
                layers[path] = _from_run(call, path)
        used[number] = home
        layers[home] = _completed(layers[home], call)
    ids = {path: layer.id for path, layer in layers.items()}
    by_call = {call.index: ids[used[number]] for number, call in enumerate(calls)}
    new_calls = []
    for number, call in enumerate(calls):
        layer = layers[used[number]]
        kind = _kind(layer, call)
        new_calls.append(replace(call, layer=layer.id, kind=kind))
        if kind != layer.kind:
            evidence: dict[str, Evidence] = {**layer.evidence, "kind": "run"}
            layers[used[number]] = replace(layer, kind=kind, evidence=evidence)
    ran = set(used.values())
    idle = [ids[path] for path, layer in layers.items() if layer.kind is not None and path not in ran]
    order = {path: min(i for i, home in used.items() if home == path) for path in ran}
    kept = sorted(layers, key=lambda path: (path not in ran, order.get(path, 0)))
    return Joined(
        tuple(layers[path] for path in kept),
        tuple(new_calls),
        tuple(replace(row, layer=by_call[row.call]) if row.call is not None else row for row in measurements),
        tuple(idle),
    )


# --- a call's layer -----------------------------------------------------------------------------------


def _home(call: Call, layers: Sequence[Layer]) -> str | None:
    """The path of the layer that a call belongs to."""
    weights = [call.parameters[role] for role in ("q", "k", "v") if role in call.parameters]
    for name in weights:
        holders = [layer for layer in layers if any(tensor.name == name for tensor in layer.tensors)]
        if len(holders) == 1:
            return holders[0].path
        # Self- and cross-attention that lie flat in one layer share nothing but their parent.
        inside = [layer for layer in holders if _within(call.module, layer.path)]
        if inside:
            return inside[0].path
    fitting = [layer for layer in layers if layer.kind is not None and _within(call.module, layer.path)]
    if not fitting:
        return None
    return max(fitting, key=lambda layer: (layer.kind == call.kind, len(layer.path))).path


def _kind(layer: Layer, call: Call) -> Literal["self", "cross"] | None:
    """What its name says it is, unless queries and keys have nothing in common."""
    apart = not set(call.query_sources) & set(call.key_sources)
    # Learned queries (latents, seeds) come from no input at all.
    if call.kind == "cross" and apart and (call.query_sources or call.key_sources):
        return "cross"
    if layer.kind is not None and layer.evidence.get("kind") in ("name", "config"):
        return layer.kind
    return call.kind


def _within(module: str, path: str) -> bool:
    if not module or not path:
        return module == path
    return module == path or module.startswith(f"{path}.") or path.startswith(f"{module}.")


def _weights_home(call: Call) -> str:
    """Where the weights of a call lie, for programs that have no modules of their own."""
    paths = [name.split(".")[:-1] for name in call.parameters.values()]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _function(call: Call) -> str:
    """A name for attention outside any module: where it stands in the source."""
    if call.source is None:
        return f"call {call.index}"
    file, _, line = call.source.rpartition(":")
    return f"{file.replace(chr(92), '/').rpartition('/')[2]}:{line}"


def _from_run(call: Call, path: str) -> Layer:
    evidence: dict[str, Evidence] = dict.fromkeys(("heads", "kv_heads", "head_dim", "kind", "scale"), "run")
    return Layer(
        id=path,
        path=path,
        kind=call.kind or "self",
        layout="functional",
        heads=call.heads,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        scale=call.scale,
        evidence=evidence,
        tensors=(),
    )


def _completed(layer: Layer, call: Call) -> Layer:
    """What the weights left open, the run tells; a guess gives way to what was seen."""
    evidence: dict[str, Evidence] = dict(layer.evidence)
    facts: dict[str, Any] = {}
    for name in ("heads", "kv_heads", "head_dim", "scale"):
        seen = getattr(call, name)
        if seen and (getattr(layer, name) is None or evidence.get(name) == "assumed"):
            facts[name] = seen
            evidence[name] = "run"
    if layer.kind is None or evidence.get("kind") == "assumed":
        facts["kind"] = call.kind or layer.kind or "self"
        evidence["kind"] = "run"
    return replace(layer, **facts, evidence=evidence) if facts else layer


# --- names on disk ------------------------------------------------------------------------------------


def _disk_names(in_memory: Sequence[Layer], on_disk: Sequence[Layer]) -> dict[str, Layer]:
    """The layer on disk for each path in memory, where it goes by another name there."""
    paths = {layer.path: layer for layer in on_disk}
    rest = [layer for layer in in_memory if layer.path not in paths]
    found: dict[str, Layer] = {}
    taken = {layer.path for layer in in_memory} & set(paths)
    for layer in rest:
        ends = [
            path
            for path in paths
            if path not in taken and (path.endswith(f".{layer.path}") or layer.path.endswith(f".{path}"))
        ]
        if len(ends) == 1:
            found[layer.path] = paths[ends[0]]
            taken.add(ends[0])
    rest = [layer for layer in rest if layer.path not in found]
    left = [layer for layer in on_disk if layer.path not in taken]
    # Renamed beyond recognition: the order of equal layers stays.
    if len(rest) == len(left) and all(_alike(a, b) for a, b in zip(rest, left, strict=True)):
        found.update({a.path: b for a, b in zip(rest, left, strict=True)})
    return found


def _alike(first: Layer, second: Layer) -> bool:
    return (first.kind, first.heads, first.head_dim, first.index) == (
        second.kind, second.heads, second.head_dim, second.index,
    )  # fmt: skip


def _renamed(layer: Layer, disk: Layer) -> Layer:
    facts = {**layer.facts, "module": layer.path}
    return replace(
        layer,
        id=disk.id,
        path=disk.path,
        stack=disk.stack,
        index=disk.index,
        tensors=disk.tensors,
        facts=facts,
    )
