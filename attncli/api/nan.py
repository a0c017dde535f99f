"""A step of a model → where its NaN and Inf were born."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncli import __version__
from attncli.api.joining import memory_layers
from attncli.api.loading import RunSettings, load, source_of
from attncli.api.report import Progress, Report, environment
from attncli.records import Layer, Origin
from attncli.rules import Observed, judge

if TYPE_CHECKING:
    from attncli.model import Batch
    from attncli.trace.nan import Found


def nan_check(
    model: Any, step: Callable[[Any], Any], *, backward: bool = True, confirm: bool = True
) -> Report:
    """Where the NaN and Inf of `step(model)` were born, why, and whether removing the cause removes them.

    `model`: an nn.Module. `step`: whatever is to be looked at: a forward pass that returns a loss (`backward=True`
    then calls `.backward()` on it), or a whole training step with its own backward pass and optimiser. `confirm`:
    the step is repeated, from the same parameters and random numbers, with one thing changed; parameters that it
    writes are copied for that. Afterwards the model is as one run of the step leaves it.

    Errors: whatever the step raises, unless it stopped at a NaN whose origin was found.
    """
    from attncli.trace import surroundings
    from attncli.trace.nan import find

    found = find(model, step, backward=backward, confirm=confirm)
    return _report(
        "nan-check",
        found,
        memory_layers(model, ()),
        source={"kind": "code", "path": getattr(model, "__qualname__", type(model).__name__)},
        around=surroundings(model, ()),
        run={"batch": "arguments", "inputs": {}},
        notes=(),
    )


def nan_check_model(
    spec: str,
    *,
    backward: bool = False,
    steps: int = 0,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    confirm: bool = True,
    what_if: str | None = None,
    save_repro: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Report:
    """The same for a MODEL given by name, as `attncli nan-check` takes it. Errors: AttncliError.

    `settings`: those of `RunSettings`. `steps`: as many real training steps with `optimizer` (adamw, adam, sgd,
    rmsprop, adagrad). `what_if`: a dtype that the model is also run in, after predicting from this run what would
    overflow there. `save_repro`: a script that repeats the operator at the first origin, with its tensors beside it.
    """
    from attncli.model import run, training
    from attncli.trace.nan import find
    from attncli.trace.steps import loss_of

    chosen = RunSettings(**settings)
    model, batch = load(spec, chosen, progress)
    gradients = backward or steps > 0
    if gradients:
        batch = training.with_labels(model, batch)

    def tick(done: int) -> None:
        if progress is not None:
            progress("looking at operators", done, 0)

    def look(batch: Batch, limit: str | None = None) -> Found:
        def step(_: Any) -> Any:
            if steps:
                return training.train(model, batch, steps, optimizer, learning_rate, loss_of)
            return run(model, batch, gradients=gradients)

        return find(
            model.module,
            step,
            backward=gradients,
            summed=True,
            confirm=confirm,
            on_operator=tick,
            limit=limit,
            capture=save_repro is not None,
        )

    found = look(batch, what_if)
    facts: dict[str, Any] = {"batch": batch.kind, "inputs": batch.inputs, "steps": steps}
    notes = [*model.notes, *batch.notes]
    ran_in = chosen.autocast or model.dtype
    if what_if is not None and not found.origins:
        facts["what_if"] = {"dtype": what_if, "predicted": [dict(one) for one in found.beyond]}
        found = _what_if(look(training.in_dtype(model, batch, what_if)), found, what_if)
        ran_in = what_if
    elif what_if is not None:
        notes.append(f"the model is not sound as it is, so it was not run in {what_if}")
    if save_repro is not None:
        notes += _saved(found, Path(save_repro))
    return _report(
        "nan-check",
        found,
        memory_layers(model.module, model.configs),
        source=source_of(model, spec),
        around={"device": str(model.device), "dtype": ran_in},
        run=facts,
        notes=notes,
    )


# --- what is done besides -----------------------------------------------------------------------------


def _what_if(found: Found, plain: Found, dtype: str) -> Found:
    """What running in another dtype gave, with what the run before had predicted."""
    predicted, origins = len(plain.beyond), len(found.origins)
    places = list(dict.fromkeys(f"{one['op']} in {one['module'] or 'the model'}" for one in plain.beyond))
    named = f" ({', '.join(places[:_NAMED])}{' …' if len(places) > _NAMED else ''})" if places else ""
    note = (
        f"what if {dtype}: {predicted} operator{'s' if predicted != 1 else ''} of the run as it is made numbers "
        f"beyond {dtype}{named}; run in {dtype}, {origins or 'no'} origin{'s' if origins != 1 else ''} of NaN or Inf "
        f"{'was' if origins == 1 else 'were'} found"
    )
    return found._replace(notes=(*found.notes, note), beyond=plain.beyond)


def _saved(found: Found, path: Path) -> list[str]:
    from attncli.trace.repro import save

    if found.repro is None:
        return ["there is no operator to save: nothing was born in this run"]
    return [f"wrote {name}" for name in save(found.repro, path)]


# --- the report ---------------------------------------------------------------------------------------


def _report(
    command: str,
    found: Found,
    layers: Sequence[Layer],
    *,
    source: Mapping[str, Any],
    around: Mapping[str, Any],
    run: Mapping[str, Any],
    notes: Sequence[str],
) -> Report:
    origins = placed(found.origins, layers)
    return Report(
        command=command,
        version=__version__,
        source=source,
        environment={**environment(), **around},
        layers=tuple(layers),
        origins=origins,
        findings=judge(Observed(tuple(layers), origins=origins)),
        run={**run, **operators_seen(found), "notes": []},
        notes=(*notes, *found.notes),
    )


def operators_seen(found: Found) -> dict[str, Any]:
    """What `run` says of the operators that were looked at."""
    return {
        "operators": sum(found.operators.values()),
        "operators_by_phase": dict(found.operators),
        "headroom_bits": {
            dtype: {"bits": bits, "op": op, "module": module}
            for dtype, (bits, op, module) in found.headroom.items()
        },
    }


def placed(origins: Sequence[Origin], layers: Sequence[Layer]) -> tuple[Origin, ...]:
    """Origins with the attention layer that their module lies in; `facts["module"]`: its path in memory."""

    def home(module: str) -> str | None:
        inside = [
            (len(path), layer.id)
            for layer in layers
            if module == (path := layer.facts.get("module", layer.path)) or module.startswith(f"{path}.")
        ]
        return max(inside)[1] if inside else None

    return tuple(replace(origin, layer=home(origin.module)) for origin in origins)


# --- settings -----------------------------------------------------------------------------------------

_NAMED = 3  # places named in a sentence
