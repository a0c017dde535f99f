"""A faulty training step in a folder, and what it shows when it is repeated from there without the user's code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attncli import __version__
from attncli.api.joining import memory_layers
from attncli.api.nan import operators_seen, placed
from attncli.api.report import Progress, Report, environment
from attncli.errors import AttncliError
from attncli.records import Origin
from attncli.records.report import strict_json
from attncli.rules import Observed, judge

if TYPE_CHECKING:
    from attncli.trace.program import Program
    from attncli.trace.recorder import Recorder


def capsule_recorder() -> Recorder:
    """What is passed as `beside` to the search for NaN of a step that is to be written down."""
    from attncli.trace.recorder import Recorder

    return Recorder()


def check_capsule(folder: str | Path) -> None:
    """Errors: AttncliError where a capsule could not take that place."""
    from attncli.training import capsule

    capsule.check(Path(folder))


def write_capsule(
    folder: str | Path, recorder: Recorder, model: Any, facts: Mapping[str, Any]
) -> tuple[str, ...]:
    """Writes the recorded step; gives the names of the files. An older capsule is replaced.

    `facts`: JSON types, and under "origins" the origins that were found (records.Origin), under "training" what
    `run["training"]` says. Call it before the model is trained on: parameters that the step did not write to are
    read now. Errors: AttncliError, also where a step cannot be written down, with the reason.
    """
    from attncli.trace import surroundings
    from attncli.trace.program import to_plain
    from attncli.trace.rerun import device_name
    from attncli.training import capsule

    program, leaves, random = recorder.recorded()
    own = frozenset(leaf.key for leaf in program.leaves if leaf.kind in ("parameter", "buffer"))
    origins = [asdict(one) if isinstance(one, Origin) else one for one in facts.get("origins", ())]
    return capsule.write(
        Path(folder),
        to_plain(program),
        leaves,
        random,
        model=own,
        environment={
            **environment(),
            **surroundings(model, ()),
            "device": program.device,
            "device_name": device_name(program.device),
            "attncli": __version__,
        },
        facts=strict_json({**facts, "origins": origins}),
    )


def replay_capsule(
    folder: str | Path,
    *,
    device: str = "auto",
    trust: bool = False,
    confirm: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Repeats the step of a capsule and reports it as the first run did. Errors: AttncliError.

    `device`: where it runs; "auto" is the kind of device that it was recorded on, or the CPU. `trust`: whether the
    libraries that its custom operators come from may be imported; otherwise nothing but torch's own operators runs.
    """
    from attncli.trace import undisturbed
    from attncli.trace.nan import find
    from attncli.trace.reading import program_of
    from attncli.trace.rerun import Rerun, device_name
    from attncli.trace.stand_ins import stand_ins
    from attncli.trace.steps import Before
    from attncli.training import capsule

    held = capsule.read(Path(folder))
    program = program_of(held.program, str(folder))
    here = _device(device, program.device)

    def tick(done: int) -> None:
        if progress is not None:
            progress("looking at operators", done, len(program.operators))

    with ExitStack() as stack:
        replaced = stack.enter_context(stand_ins(program, here, str(folder)))
        stack.enter_context(undisturbed())
        step = Rerun(program, held.tensors, held.random, device=here, subject=str(folder), trust=trust)
        found = find(
            step.model,
            step,
            backward=False,
            confirm=confirm,
            on_operator=tick,
            inputs=step.inputs,
            before=Before(program.steps_before, program.moved),
        )
    if isinstance(found.raised, AttncliError):
        raise found.raised
    layers = memory_layers(step.model, ())
    origins = placed(found.origins, layers)
    differs = tuple(_differences(held.facts.get("origins"), origins))
    run: dict[str, Any] = {
        "batch": "capsule",
        "inputs": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in step.inputs
        },
        **operators_seen(found),
        "notes": [],
    }
    training = held.facts.get("training")
    if isinstance(training, dict):
        run["training"] = {**training, "replayed": not differs}
    return Report(
        command="nan-check",
        version=__version__,
        source={"kind": "capsule", "path": str(folder), **_source(held.facts, held.environment)},
        environment={**environment(), "device": str(here), "dtype": held.environment.get("dtype")},
        layers=tuple(layers),
        origins=origins,
        findings=judge(Observed(tuple(layers), origins=origins)),
        run=run,
        notes=(
            *_notes(program, held.environment, here, device_name(str(here)), replaced, differs),
            *found.notes,
        ),
    )


# --- what differs -------------------------------------------------------------------------------------


def _differences(before: Any, after: Sequence[Origin]) -> Iterator[str]:
    """In words, what is not as in the first run; nothing where the capsule does not say what it showed."""
    if not isinstance(before, list) or not all(isinstance(one, dict) for one in before):
        return
    first = [{name: one.get(name) for name in _TELLING} for one in before]
    second = [strict_json({name: getattr(one, name) for name in _TELLING}) for one in after]
    if len(first) != len(second):
        yield f"{_counted(len(first))} then and {_counted(len(second))} now"
    for number, (then, now) in enumerate(zip(first, second, strict=False), start=1):
        for name in _TELLING:
            if then[name] != now[name]:
                yield f"{name.replace('confirmed', 'proof')} of origin {number}: {then[name]} then, {now[name]} now"


def _notes(
    program: Program,
    then: Mapping[str, Any],
    here: Any,
    name: str,
    replaced: Sequence[str],
    differs: Sequence[str],
) -> Iterator[str]:
    if differs:
        yield f"the replay differs from the first run: {'; '.join(differs[:_NAMED])}"
    else:
        yield "the replay shows the same origins as the first run"
    there = then.get("device_name") or then.get("device")
    if there != name:
        yield f"recorded on {there}, replayed on {name}"
        if program.random:
            yield "its random numbers (dropout and the like) are not those of the first run: another kind of device"
    if replaced:
        yield f"kernels that {here.type} has not were computed by plain products: {', '.join(replaced)}"
    torch = environment()["torch"]
    if then.get("torch") != torch:
        yield f"recorded with torch {then.get('torch')}, replayed with torch {torch}"


def _source(facts: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "recorded": {
            name: then.get(name) for name in ("torch", "python", "device", "device_name", "platform")
        },
        **({"script": facts["source"]} if "source" in facts else {}),
    }


def _counted(origins: int) -> str:
    return f"{origins} origin{'s' if origins != 1 else ''}"


# --- devices ------------------------------------------------------------------------------------------


def _device(wanted: str, recorded: str) -> Any:
    from attncli.model.devices import available_devices, pick_device

    if wanted != "auto":
        return pick_device(wanted)
    kind = recorded.partition(":")[0]
    return pick_device(kind if any(one.split(":")[0] == kind for one in available_devices()) else "cpu")


# --- settings -----------------------------------------------------------------------------------------

# What two origins share that are the same.
_TELLING = ("value", "phase", "cause", "op", "module", "source", "tensor", "confirmed")
_NAMED = 3
