"""Everything at once, in one load and one run: layouts, weights, attention calls, and the search for NaN and Inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from attncli import __version__
from attncli.api.expectations import expectations
from attncli.api.forward import call_notes, calls_seen, modules_wanted, only, own_config
from attncli.api.joining import Joined, joined, memory_layers
from attncli.api.loading import Headers, RunSettings, headers, load, source_of
from attncli.api.nan import operators_seen, placed
from attncli.api.report import Progress, Report, environment
from attncli.api.weights import inspect
from attncli.errors import BareCheckpointError
from attncli.layout import Options
from attncli.records import Anomaly, Expectation, Finding, Layer
from attncli.rules import Observed, gravest_first, judge

if TYPE_CHECKING:
    from attncli.trace.checked import Checked
    from attncli.weights import ModelValues, ValueScan

# (where from, its settings), as a model carries them.
Configs = Sequence[tuple[str, Mapping[str, Any]]]


def check(model: Any, *args: Any, expect: Sequence[str] = (), **kwargs: Any) -> Report:
    """Weights, layouts, attention and NaN of one forward pass, `model(*args, **kwargs)`.

    `model`: an nn.Module, or any function of tensors. It runs as it is, without gradients; its state and the random
    state are as before afterwards. It runs again only to prove where NaN or Inf came from. `expect`: what the model
    is to be, as --expect takes it ("heads=8,layout=separate"). Errors: whatever the model raises, unless the NaN that
    it tripped over was found.
    """
    from attncli.trace import named_inputs, undisturbed
    from attncli.trace.checked import check as checked

    expected = expectations(expect)
    configs = own_config(model)
    in_memory = memory_layers(model, configs)
    scanned = _scanned(model)
    with undisturbed():
        seen = checked(model, lambda: model(*args, **kwargs), args, kwargs, finite=scanned.finite)
    inputs = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in named_inputs(model, args, kwargs)
    }
    return _report(
        model,
        seen,
        scanned,
        configs,
        in_memory,
        Headers((), ()),
        expected,
        source={"kind": "code", "path": getattr(model, "__qualname__", type(model).__name__)},
        around=seen.trace.surroundings,
        run={"batch": "arguments", "inputs": inputs},
        notes=(),
    )


def check_model(
    spec: str,
    *,
    layers: Sequence[str] = (),
    expect: Sequence[str] = (),
    confirm: bool = True,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """The same for a MODEL given by name, as `attncli check` takes it; of a bare checkpoint what needs no run.

    `settings`: those of `RunSettings`. `layers`: glob patterns or numbers; what is not of these layers is left out,
    but for NaN and Inf. `confirm`: whether the cause of NaN is proved by repeating the run. Errors: AttncliError.
    """
    expected = expectations(expect)
    chosen = RunSettings(**settings)
    try:
        model, batch = load(spec, chosen, progress)
    except BareCheckpointError as error:
        return _without_run(spec, chosen, layers, expected, error, progress)
    from attncli.model import run
    from attncli.trace.checked import check as checked

    in_memory = memory_layers(model.module, model.configs)
    on_disk = headers(chosen.weights if chosen.weights is not None else spec)
    total = sum(layer.kind is not None for layer in in_memory)

    def tick(done: int) -> None:
        if progress is not None:
            progress("running the model", done, max(total, done))

    scanned = _scanned(model.module)
    seen = checked(
        model.module,
        lambda: run(model, batch),
        batch.args,
        batch.kwargs,
        wanted=modules_wanted(layers, in_memory, on_disk.layers),
        on_call=tick,
        confirm=confirm,
        finite=scanned.finite,
    )
    report = _report(
        model.module,
        seen,
        scanned,
        model.configs,
        in_memory,
        on_disk,
        expected,
        source=source_of(model, spec),
        around={"device": str(model.device), "dtype": chosen.autocast or model.dtype},
        run={"batch": batch.kind, "inputs": batch.inputs},
        notes=(*model.notes, *batch.notes),
    )
    return only(report, layers, spec) if layers else report


# --- what was seen ------------------------------------------------------------------------------------


def _report(
    model: Any,
    seen: Checked,
    scanned: Scanned,
    configs: Configs,
    in_memory: Sequence[Layer],
    on_disk: Headers,
    expected: Sequence[Expectation],
    *,
    source: Mapping[str, Any],
    around: Mapping[str, Any],
    run: Mapping[str, Any],
    notes: Sequence[str],
) -> Report:
    found = seen.found
    result = joined(seen.trace.calls, seen.trace.measurements, in_memory, on_disk.layers)
    broken = _broken_heads(model, scanned, configs, in_memory, result)
    origins = placed(found.origins, result.layers)
    measurements = (*result.measurements, *scanned.scan.measurements)
    observed = Observed(result.layers, measurements, broken, result.calls, origins, tuple(expected))
    return Report(
        command="check",
        version=__version__,
        source=source,
        environment={**environment(), **around},
        layers=result.layers,
        measurements=measurements,
        origins=origins,
        findings=_judged(observed, on_disk),
        run={**run, **operators_seen(found), **calls_seen(seen.trace, result)},
        calls=result.calls,
        notes=(*notes, *call_notes(seen.trace, result), *scanned.notes, *found.notes),
    )


def _judged(observed: Observed, on_disk: Headers) -> tuple[Finding, ...]:
    """What the run shows, and what the files do that the model in memory no longer does; each once."""
    everything = (*judge(observed), *judge(Observed(on_disk.layers, anomalies=on_disk.anomalies)))
    once: dict[tuple[str, str], Finding] = {}
    for finding in everything:
        once.setdefault((finding.fingerprint, finding.message), finding)
    return gravest_first(once.values())


class Scanned(NamedTuple):
    """The values of a model's weights. `finite`: the names of those without NaN and Inf; `notes`: what was not read."""

    values: ModelValues
    scan: ValueScan
    finite: frozenset[str]
    notes: tuple[str, ...]


def _scanned(model: Any) -> Scanned:
    """The weights as they lie in memory, before anything runs: what is sound then need not be looked at again."""
    from attncli.trace import named_tensors
    from attncli.weights import ModelValues, value_measurements

    values = ModelValues(named_tensors(model))
    scan = value_measurements(values.tensors, values)
    counts = [row for row in scan.measurements if row.metric in ("nan_count", "inf_count")]
    finite = frozenset(row.layer for row in counts) - {row.layer for row in counts if row.value}
    skipped = len(scan.skipped)
    unread = f"values not observed in {skipped} tensor{'s' if skipped != 1 else ''}: they are not in memory"
    return Scanned(values, scan, finite, (unread,) if skipped else ())


def _broken_heads(
    model: Any, scanned: Scanned, configs: Configs, in_memory: Sequence[Layer], result: Joined
) -> tuple[Anomaly, ...]:
    """The heads that are zero, or hold NaN or Inf."""
    from attncli.weights import head_anomalies

    # A layer may go by the name that it has on disk.
    ids = {layer.facts.get("module", layer.path): layer.id for layer in result.layers}
    sizes = {(call.heads, call.kv_heads, call.head_dim) for call in result.calls}
    if len(sizes) == 1 and any(layer.kind is not None and layer.heads is None for layer in in_memory):
        # Where neither config nor shapes tell where a head's rows lie, the run does.
        in_memory = memory_layers(model, configs, Options(*sizes.pop()))
    return tuple(
        replace(
            one, evidence={**one.evidence, "layer": ids.get(one.evidence["layer"], one.evidence["layer"])}
        )
        for one in head_anomalies(in_memory, scanned.scan.measurements, scanned.values)
    )


# --- without a run ------------------------------------------------------------------------------------


def _without_run(
    spec: str,
    settings: RunSettings,
    layers: Sequence[str],
    expected: Sequence[Expectation],
    error: BareCheckpointError,
    progress: Progress | None,
) -> Report:
    """Of weights that nothing says how to run: layouts, values and bounds."""
    report = inspect(
        spec, values=True, bounds=True, layers=layers, expected=expected, asks_heads=False, progress=progress
    )
    note = f"not observed: entropy, scores and NaN of a forward pass, since {error.problem.rstrip('.')}. {error.remedy}"
    given = [
        f"--{item.name.replace('_', '-')}"
        for item in fields(settings)
        if getattr(settings, item.name) != item.default
    ]
    unused = (f"not used, since nothing ran: {', '.join(given)}",) if given else ()
    return replace(report, command="check", notes=(*report.notes, note, *unused))
