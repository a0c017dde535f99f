"""One forward pass: the model and its batch → calls and numbers → joined with the layers → judged."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attncli import __version__
from attncli.api.joining import Joined, joined, memory_layers
from attncli.api.loading import RunSettings, headers, load, source_of
from attncli.api.maps import call_fits, maps_to_draw, wanted_maps, with_maps
from attncli.api.report import Progress, Report, environment, fits, without_match
from attncli.errors import UsageError
from attncli.records import Layer
from attncli.rules import Observed, judge

if TYPE_CHECKING:
    from attncli.trace import Trace


def measure(model: Any, *args: Any, **kwargs: Any) -> Report:
    """Entropy and score extremes of every attention call in one forward pass, `model(*args, **kwargs)`.

    `model`: an nn.Module, or any function of tensors. It runs as it is (device, dtype, train or eval mode, its
    own kernels), without gradients; its state and the random state are as before afterwards. Errors: whatever
    the model raises.
    """
    from attncli.trace import named_inputs, trace, undisturbed

    with undisturbed():
        found = trace(model, lambda: model(*args, **kwargs), args, kwargs)
    inputs = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in named_inputs(model, args, kwargs)
    }
    layers = memory_layers(model, own_config(model))
    return _report(
        "measure",
        found,
        layers,
        (),
        source={"kind": "code", "path": getattr(model, "__qualname__", type(model).__name__)},
        surroundings=found.surroundings,
        run={"batch": "arguments", "inputs": inputs},
        notes=(),
    )


def measure_model(
    command: str,
    spec: str,
    *,
    layers: Sequence[str] = (),
    maps: Sequence[str] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """The same for a MODEL given by name, as `attncli entropy` and `attncli overflow` take it.

    `settings`: those of `RunSettings`. `layers`: glob patterns or numbers; calls of other layers run, but are not
    measured. `maps`: LAYER[:HEAD] each, heads whose probabilities are drawn, for every text or for the first row of
    another batch. Errors: AttncliError.
    """
    from attncli.model import run
    from attncli.trace import trace

    drawn = wanted_maps(maps)
    chosen = RunSettings(**settings)
    model, batch = load(spec, chosen, progress)
    in_memory = memory_layers(model.module, model.configs)
    on_disk = headers(chosen.weights if chosen.weights is not None else spec).layers
    total = sum(layer.kind is not None for layer in in_memory)

    def tick(done: int) -> None:
        if progress is not None:
            progress("running the model", done, max(total, done))

    reaches = [modules_wanted((one.pattern,), in_memory, on_disk) for one in drawn]
    draw = maps_to_draw(drawn, reaches, in_memory, len(batch.tokens or ()) or 1) if drawn else None
    found = trace(
        model.module,
        lambda: run(model, batch),
        batch.args,
        batch.kwargs,
        wanted=modules_wanted(layers, in_memory, on_disk),
        on_call=tick,
        maps=draw,
    )
    report = _report(
        command,
        found,
        in_memory,
        on_disk,
        source=source_of(model, spec),
        surroundings={"device": str(model.device), "dtype": chosen.autocast or model.dtype},
        run={"batch": batch.kind, "inputs": batch.inputs},
        notes=(*model.notes, *batch.notes),
    )
    if layers:
        report = only(report, layers, spec)
    if draw is not None:
        tokens = {"input_ids": batch.tokens or (), "decoder_input_ids": batch.decoder_tokens or ()}
        report = with_maps(report, draw, found.maps, drawn, tokens, spec)
    return report


# --- joining and judging ------------------------------------------------------------------------------


def _report(
    command: str,
    found: Trace,
    in_memory: Sequence[Layer],
    on_disk: Sequence[Layer],
    *,
    source: Mapping[str, Any],
    surroundings: Mapping[str, Any],
    run: Mapping[str, Any],
    notes: Sequence[str],
) -> Report:
    result = joined(found.calls, found.measurements, in_memory, on_disk)
    return Report(
        command=command,
        version=__version__,
        source=source,
        environment={**environment(), **surroundings},
        layers=result.layers,
        measurements=result.measurements,
        findings=judge(Observed(result.layers, result.measurements, (), result.calls)),
        run={**run, **calls_seen(found, result)},
        calls=result.calls,
        notes=(*notes, *call_notes(found, result)),
    )


def calls_seen(found: Trace, result: Joined) -> dict[str, Any]:
    """What `run` says of the attention calls."""
    differences = [call.difference for call in result.calls if call.difference is not None]
    return {
        "operators": found.operators,
        "calls_seen": len(result.calls),
        "calls_measured": sum(call.explained for call in result.calls),
        "difference": max(differences, default=None),
        "notes": list(found.notes),
    }


def call_notes(found: Trace, result: Joined) -> list[str]:
    notes = []
    if found.linear:
        times = sum(found.linear.values())
        notes.append(
            f"{times} product{'s' if times != 1 else ''} of scores and values ran without a softmax "
            "(linear attention or state space): entropy does not apply there"
        )
    if not found.calls and not found.left_out:
        notes.append("no softmax attention ran: entropy and overflow are not applicable to this forward pass")
    bare = [layer for layer in result.layers if layer.kind is None]
    if bare and not found.calls:
        kinds = ", ".join(sorted({layer.layout for layer in bare}))
        notes.append(f"{len(bare)} layers are {kinds}: entropy does not apply to them")
    idle = result.idle
    if idle and not found.left_out:
        shown = ", ".join(idle[:3]) + (" …" if len(idle) > 3 else "")
        notes.append(f"{len(idle)} attention layer{'s' if len(idle) != 1 else ''} did not run: {shown}")
    blind = sum(call.explained and bool(call.reason) for call in result.calls)
    if blind:
        notes.append(
            f"{blind} call{'s' if blind != 1 else ''} with dropout could not be compared with recomputed rows"
        )
    unknown = Counter(call.layer for call in result.calls if call.scale is None and call.explained)
    if unknown:
        notes.append(
            f"the scale of {sum(unknown.values())} call{'s' if sum(unknown.values()) != 1 else ''} is no single "
            "number that the dataflow shows (learned per head, or mixed over heads)"
        )
    return notes


def only(report: Report, patterns: Sequence[str], subject: str) -> Report:
    """The report with the layers that were asked for; an error where none was."""
    layers = {layer.id: layer for layer in report.layers}
    found = {
        pattern: [call for call in report.calls if call_fits(layers[call.layer], call, pattern)]
        for pattern in patterns
    }
    wanted = {call.index for some in found.values() for call in some}
    calls = tuple(call for call in report.calls if call.index in wanted)
    if not calls:
        named = ", ".join(patterns)
        examples = [layer.id for layer in report.layers][:1]
        hint = f"Paths look like {examples[0]}." if examples else "No attention ran at all."
        raise UsageError(subject, f"no attention call matches --layer {named}.", hint)
    ids = {call.layer for call in calls}
    return replace(
        report,
        layers=tuple(layer for layer in report.layers if layer.id in ids),
        calls=calls,
        measurements=tuple(row for row in report.measurements if row.layer in ids),
        findings=tuple(item for item in report.findings if item.layer is None or item.layer in ids),
        notes=(
            *without_match("attention call", patterns, lambda pattern: bool(found[pattern])),
            *report.notes,
        ),
    )


def modules_wanted(
    patterns: Sequence[str], in_memory: Sequence[Layer], on_disk: Sequence[Layer]
) -> Callable[[str], bool]:
    if not patterns:
        return lambda module: True
    paths = [
        layer.path for layer in (*in_memory, *on_disk) if any(fits(layer, pattern) for pattern in patterns)
    ]

    def wanted(module: str) -> bool:
        if not module:  # a program without modules: its calls are told apart afterwards, by their weights
            return True
        inside = any(
            module == path or module.startswith(f"{path}.") or path.startswith(f"{module}.") for path in paths
        )
        return inside or any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)

    return wanted


# --- what is known besides the run --------------------------------------------------------------------


def own_config(model: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The config that a transformers model carries."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else None
    return (("model.config", values),) if isinstance(values, Mapping) else ()
