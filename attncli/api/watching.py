"""A training run, watched: what goes wrong → the step repeated → a report; what grows → a warning in time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attncli import __version__
from attncli.api.joining import memory_layers
from attncli.api.nan import operators_seen, placed
from attncli.api.report import Report, environment
from attncli.api.sampling import Samples
from attncli.errors import AttncliError, UsageError
from attncli.records import Fault, Finding, Layer, Origin, Sample, Step, Training
from attncli.rules import Observed, gravest_first, judge
from attncli.rules.training import early_warnings

if TYPE_CHECKING:
    from attncli.api.replaying import Replayed
    from attncli.trace.recorder import Recorder
    from attncli.training.shards import Whole
    from attncli.training.sightings import Sighting


class TrainingFault(AttncliError):  # noqa: N818 - what it tells of is the fault of a step
    """A training step went wrong. `report`: where and why, as `attncli nan-check` gives it."""

    def __init__(self, report: Report, text: str) -> None:
        self.report = report
        super().__init__("training", f"{text}.", "The report says where it began.")

    def __str__(self) -> str:
        # Where nobody catches it, the report is not lost.
        return f"{self.problem}\n\n{self.report}"


# What happens on a fault: an exception, nothing, or what a function of the report decides by raising.
OnFault = Literal["raise", "continue"] | Callable[[Report], Any]


def watch(
    model: Any = None,
    optimizer: Any = None,
    *,
    every: int = 50,
    log: str | Path | None = None,
    tensorboard: str | Path | None = None,
    capsule: str | Path | None = None,
    on_fault: OnFault = "raise",
    confirm: bool = True,
) -> Watch:
    """Watches the training that runs inside `with attncli.watch(model):`, at almost no cost.

    `model`, `optimizer`: whose updates are looked at; without them those of every optimiser. `every`: the attention
    of one step in so many is measured (0: none); early warnings need six of them. `log`: a file that gets one JSON line
    for each; `tensorboard`: a folder for the same. `capsule`: a folder that a faulty step is written to. `on_fault`:
    "raise" ends the training with a `TrainingFault`, before the bad update where it shows before; "continue" lets it go
    on, a function is called with the report. `confirm`: whether causes are proved by repeating the step.

    Nothing is left behind on exit. Errors: UsageError where a file cannot be written; `TrainingFault`.
    """
    if every < 0:
        raise UsageError(
            "attncli.watch", f"every is {every}.", "Give a number of steps, or 0 to measure none."
        )
    return Watch(
        source={"kind": "code", "path": type(model).__name__ if model is not None else "training"},
        wants=_wanted(model, optimizer),
        every=every,
        log=log,
        tensorboard=tensorboard,
        capsule=capsule,
        on_fault=on_fault,
        confirm=confirm,
    )


class Watch:
    """A training run that is watched. `reports`: one per fault that was looked into; `warnings`: those given early."""

    def __init__(
        self,
        *,
        source: Mapping[str, Any],
        wants: Callable[[Any], bool] = lambda optimizer: True,
        every: int = 50,
        log: str | Path | None = None,
        tensorboard: str | Path | None = None,
        capsule: str | Path | None = None,
        on_fault: OnFault = "raise",
        confirm: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        from attncli.training.log import writers
        from attncli.training.monitor import Monitor, told_on_stderr

        self.source, self.on_fault, self.confirm = source, on_fault, confirm
        self.capsule = Path(capsule) if capsule is not None else None
        self.tell = tell or told_on_stderr
        if self.capsule is not None:
            from attncli.api.capsules import check_capsule

            check_capsule(self.capsule)
        self.monitor = Monitor(self, every=every, wants=wants)
        self.reports: list[Report] = []
        # Of several processes one shows what all of them know.
        self.speaks = self.monitor.processes.rank == 0
        self.warnings: list[Finding] = []
        self._writers = writers(log, tensorboard, self.monitor.processes.rank)
        self.samples = Samples()
        self._logged = 0
        self._bad_outputs: list[str] = []
        self._sampled: deque[Step] = deque(maxlen=_KEPT)
        self._told: set[tuple[str, str | None]] = set()
        self._began = time.monotonic()
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        from attncli.training.hooks import hooked

        self._stack.enter_context(hooked(self.monitor))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        for writer in self._writers:
            writer.close()

    @property
    def report(self) -> Report:
        """What was seen so far: the report of the first fault, or of a run without one.

        Where the training went on, with what the later faults showed beside it.
        """
        if not self.reports:
            return self.reported(None, None)
        if self.on_fault != "continue":
            return self.reports[0]
        return _together(self.reports, self.monitor.step - 1, self.monitor.faults)

    def circumstances(self) -> str:
        """What was going on when the script raised an error of its own: ", while reading batch 3 of epoch 0 of …"."""
        loaders = self.monitor.loaders
        if loaders.reading is not None:
            return f", while reading {loaders.reading}"
        batch = loaders.of([one.tensor for one in self.monitor.program.given()])
        batch = batch or (loaders.recent[-1] if loaders.recent else None)
        if batch is None:
            return ""
        place = f"batch {batch.index} of epoch {batch.epoch} of {batch.loader}"
        return f", with {place}{_wrong_index(self.monitor.functions.failed)}"

    # --- what the monitor tells -----------------------------------------------------------------------

    def went_wrong(self, sighting: Sighting) -> BaseException | None:
        if len(self.reports) >= _MOST_REPORTS:
            return None
        if self.monitor.processes.world > 1:
            from attncli.api.meeting import met

            report, self.speaks = met(self, sighting)
        else:
            again, recorder = self.repeated(sighting)
            report = self.reported(sighting, again)
            if recorder is not None:
                report = self.encapsulated(report, again, recorder)
        self.reports.append(report)
        self._log(self.monitor.so_far())
        return self._decided(report)

    def was_called(self, step: int) -> BaseException | None:
        if len(self.reports) >= _MOST_REPORTS:
            return None
        from attncli.api.meeting import attended

        found = attended(self, step)
        if found is None:
            return None
        report, self.speaks = found
        self.reports.append(report)
        return self._decided(report)

    def place(self) -> str | None:
        return _script_line()

    def sampling(self, module: Any, step: int) -> AbstractContextManager[None] | None:
        """A measurement of the attention of one call, while it runs; None where that has to be another call."""
        from attncli.training.models import has_compiled_parts

        return None if has_compiled_parts(module) else self.samples.taken(module, step)

    def sample_again(self, module: Any, args: Any, kwargs: Any, step: int) -> None:
        """Measures a call of a compiled module by another, uncompiled one."""
        from attncli.trace import undisturbed
        from attncli.training.buffers import unwritten
        from attncli.training.models import inside

        with unwritten(module.buffers()), undisturbed(), self.samples.taken(inside(module), step):
            inside(module)(*args, **kwargs)

    def output_is_bad(self, module: Any, step: int) -> None:
        """Told once: of a sampled step, so it may have been so before."""
        if not self._bad_outputs:
            text = f"step {step}: what {type(module).__name__} returned holds NaN; the loss shows whether it matters"
            self._bad_outputs.append(text)
            self.tell(text)

    def stepped(self, step: Step) -> None:
        samples = self.samples.fresh()
        if samples:
            self._sampled.append(step)
            self._warn_early(step)
        if samples or (self.monitor.every and step.number % self.monitor.every == 0):
            self._log(step, samples)

    def _log(self, step: Step, samples: Sequence[Sample] = ()) -> None:
        if self._writers and step.number != self._logged:
            from attncli.training.log import line_of

            self._logged = step.number
            line = line_of(step, samples, time.monotonic() - self._began)
            for writer in self._writers:
                writer.write(line)

    def broken(self, error: Exception) -> None:
        import traceback

        self.monitor.processes.leave()

        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        self.tell(
            f"the watch failed and is off ({type(error).__name__}: {error}; {place}); the training goes on"
        )

    def _warn_early(self, step: Step) -> None:
        for finding in early_warnings(self._training(None)):
            key = (finding.code, finding.layer)
            if key not in self._told:
                first = finding.code not in {code for code, _ in self._told}
                self._told.add(key)
                self.warnings.append(finding)
                if self.monitor.processes.rank == 0:
                    advice = f"\n  → {finding.advice}" if first and finding.advice else ""
                    said = f"{finding.severity}: {finding.message} ({finding.code})"
                    self.tell(f"step {step.number}: {said}{advice}")

    # --- the report -----------------------------------------------------------------------------------

    def repeated(
        self, sighting: Sighting, whole: Whole | None = None, why: str = ""
    ) -> tuple[Replayed, Recorder | None]:
        """The step once more, and what it is written down by for a capsule. `why` it cannot be repeated, if so."""
        from attncli.api.replaying import Replayed, replayed
        from attncli.training.models import model_of

        recorder = None
        if self.capsule is not None and not self.reports:
            from attncli.api.capsules import capsule_recorder

            recorder = capsule_recorder()
        if why:
            return Replayed(None, why, model_of(self.monitor)), recorder
        again = replayed(self.monitor, sighting, confirm=self.confirm, beside=recorder, whole=whole)
        return again, recorder

    def _training(self, fault: Fault | None) -> Training:
        monitor = self.monitor
        return Training(
            monitor.step - 1,
            tuple(sorted({*self._sampled, *monitor.steps}, key=lambda one: one.number)),
            self.samples.all(),
            tuple(monitor.sizes.moved),
            tuple(monitor.optimizers.values()),
            fault,
        )

    def reported(self, sighting: Sighting | None, again: Replayed | None) -> Report:
        from attncli.trace import surroundings
        from attncli.training.models import model_of

        model = again.model if again is not None else model_of(self.monitor)
        layers: tuple[Layer, ...] = memory_layers(model, ())
        found = again.found if again is not None else None
        origins = placed(found.origins, layers) if found is not None else ()
        fault = self._fault(sighting, again) if sighting is not None and again is not None else None
        training = self._training(fault)
        if fault is not None:
            training = replace(training, seen=fault.step)
        return Report(
            command="nan-check",
            version=__version__,
            source=self.source,
            environment={**environment(), **surroundings(model, ())},
            layers=layers,
            origins=origins,
            findings=self._judged(Observed(layers, origins=origins, training=training)),
            run={
                "batch": "training",
                "inputs": {},
                **(operators_seen(found) if found is not None else _NO_OPERATORS),
                "training": {
                    **_plain(training),
                    "capsule": None,
                    "world": self.monitor.processes.world,
                    "faults": self.monitor.faults,
                    "stopped": fault is not None and self.on_fault != "continue",
                },
                "notes": [],
            },
            notes=(
                *self._bad_outputs,
                *(self._handed(origins) if fault is not None else ()),
                *(again.notes if again is not None else ()),
                *(found.notes if found is not None else ()),
            ),
        )

    def _handed(self, origins: Sequence[Origin]) -> Iterator[str]:
        """Where numbers left for Python and may have come back: behind such a line nothing can be followed."""
        if not any(one.cause in ("written-nan", "unexplained") for one in origins) and origins:
            return
        for place, value in self.monitor.functions.handed[:1]:
            words = "NaN" if value != value else "Inf"
            yield f"{_line(place)} handed {words} to Python; where it comes back, its origin lies before that line"

    def _judged(self, observed: Observed) -> tuple[Finding, ...]:
        """The findings, with the warnings that were given while it ran and are no trend any more."""
        found = judge(observed)
        known = {(one.code, one.layer) for one in found}
        return gravest_first((*found, *(one for one in self.warnings if (one.code, one.layer) not in known)))

    def encapsulated(self, report: Report, again: Replayed, recorder: Any) -> Report:
        """The report, with the capsule that was written beside it, or the reason why there is none."""
        from attncli.api.capsules import write_capsule

        run: dict[str, Any] = dict(report.run or {})
        if again.found is None:
            return replace(report, notes=(*report.notes, f"no capsule was written: {again.why}"))
        facts = {"origins": report.origins, "training": run["training"], "source": dict(self.source)}
        try:
            write_capsule(str(self.capsule), recorder, again.model, facts)
        except AttncliError as error:
            return replace(report, notes=(*report.notes, f"no capsule was written: {error.problem}"))
        training = {**run["training"], "capsule": str(self.capsule)}
        return replace(report, run={**run, "training": training})

    def _fault(self, sighting: Sighting, again: Replayed) -> Fault:
        monitor = self.monitor
        names = monitor.roots.names()
        batch = sighting.batch or self._batch(sighting)
        if batch is None and monitor.loaders.recent:
            batch = monitor.loaders.recent[-1] if len(monitor.loaders.recent) == 1 else None
        last = monitor.program.entries[-1] if monitor.program.entries else None
        return Fault(
            sighting.step,
            sighting.seen,
            sighting.value,
            tuple(names.get(id(one), "a parameter") for one in sighting.parameters[:_MOST_NAMED]),
            _with_element(batch.facts(), again) if batch is not None else None,
            bool(again.found.origins) if again.found is not None else None,
            again.why,
            self.on_fault != "continue" and (not sighting.is_updated or sighting.copies is not None),
            sighting.place
            or _script_line()
            or (_line(last.place) if last is not None and last.place is not None else None),
            None,
            monitor.spoiled() if not sighting.is_updated else 0,
        )

    def _batch(self, sighting: Sighting) -> Any:
        """The batch that the bad step, or of several backward passes the bad one, was given."""
        from attncli.api.replaying import bad_pass

        program, loaders = self.monitor.program, self.monitor.loaders
        # Gradients show late which of the micro-batches before them was bad.
        given = bad_pass(self.monitor) if sighting.seen in ("gradient", "loss scale") else []
        found = loaders.of(given) if given else None
        found = found or loaders.of([one.tensor for one in program.given()])
        return found or loaders.of([one.tensor for one in program.given(program.entries)])

    def _decided(self, report: Report) -> BaseException | None:
        """What is raised in the script. Where that ends it, buffers are as they were before the step as well."""
        error = self._raised(report)
        if error is not None and report.run is not None and report.run["training"]["fault"]["withheld"]:
            self.monitor.buffers.put_back()
        return error

    def _raised(self, report: Report) -> BaseException | None:
        if self.on_fault == "continue":
            return None
        if self.on_fault == "raise":
            from attncli.render.training import notice

            training = (report.run or {})["training"]
            return TrainingFault(report, notice(training["fault"]))
        try:
            self.on_fault(report)
        except BaseException as error:  # noqa: BLE001 - what the user's function raises ends the training
            return error
        return None


# --- building blocks ----------------------------------------------------------------------------------


def _together(reports: Sequence[Report], seen: int, faults: int) -> Report:
    """The first report with the origins of the others, and how many steps went wrong of how many."""
    first = reports[0]
    origins = tuple({_identity(one): one for report in reversed(reports) for one in report.origins}.values())
    findings = {one.fingerprint: one for report in reversed(reports) for one in report.findings}
    run = dict(first.run or {})
    run["training"] = {**run["training"], "seen": seen, "faults": faults}
    return replace(
        first, origins=origins[::-1], findings=gravest_first(tuple(findings.values())[::-1]), run=run
    )


def _identity(origin: Origin) -> tuple[Any, ...]:
    return origin.cause, origin.phase, origin.op, origin.module, origin.source, origin.tensor


def _wanted(model: Any, optimizer: Any) -> Callable[[Any], bool]:
    if model is not None and not callable(getattr(model, "parameters", None)):
        problem = f"{type(model).__name__} is no module."
        raise UsageError("attncli.watch", problem, "Give an nn.Module, or nothing to watch every optimiser.")
    if optimizer is not None:
        optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        inner = {id(getattr(one, "optimizer", one)) for one in optimizers} | {id(one) for one in optimizers}
        return lambda one: id(one) in inner
    if model is None:
        return lambda one: True
    mine = {id(parameter) for parameter in model.parameters()}
    return lambda one: any(id(p) in mine for group in one.param_groups for p in group["params"])


def _plain(training: Training) -> dict[str, Any]:
    return {
        "seen": training.seen,
        "steps": [asdict(step) for step in training.steps],
        "fault": asdict(training.fault) if training.fault is not None else None,
        "moved": [asdict(one) for one in training.moved],
        "optimizers": [asdict(one) for one in training.optimizers],
        "samples": [asdict(one) for one in training.samples[-_MOST_SAMPLES:]],
    }


def _wrong_index(failed: Any) -> str:
    """Of a function that was given an index out of range: which, and where it stands in the batch."""
    if failed is None:
        return ""
    from attncli.training.functions import index_beyond

    return index_beyond(*failed[:3])


def _with_element(batch: dict[str, Any], again: Replayed) -> dict[str, Any]:
    """The facts of a batch, and which of its elements the first origin lies in, with its item."""
    at = again.found.origins[0].at if again.found is not None and again.found.origins else None
    element = (at or {}).get("batch")
    if element is None and again.found is not None and at and again.found.origins[0].phase == "input":
        element = (at.get("index") or [None])[0]
    items = batch.get("items") or []
    if not isinstance(element, int) or element >= len(items):
        return batch
    return {**batch, "element": element, "item": items[element]}


def _script_line() -> str | None:
    from attncli.training.around import script_place

    place = script_place()
    return _line(place) if place is not None else None


def _line(place: tuple[str, int]) -> str:
    from attncli.trace.origins import Place

    return str(Place(*place))


# --- settings -----------------------------------------------------------------------------------------

_NO_OPERATORS: Mapping[str, Any] = {"operators": 0, "operators_by_phase": {}, "headroom_bits": {}}
_KEPT = 64
_MOST_SAMPLES = 2048
_MOST_NAMED = 32
# With `on_fault="continue"`: the faults after these are counted alone.
_MOST_REPORTS = 3
