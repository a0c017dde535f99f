"""A step that went wrong in several processes: each repeats its own part, and one report names where it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from attncli.api.report import Report
from attncli.records.reading import report_from

if TYPE_CHECKING:
    from attncli.api.watching import Watch
    from attncli.training.monitor import Monitor
    from attncli.training.processes import Meeting, Settled
    from attncli.training.shards import Whole
    from attncli.training.sightings import Sighting


def met(watch: Watch, sighting: Sighting) -> tuple[Report, bool]:
    """The report of all processes, the same in each, and whether it is this one that shows it."""
    monitor = watch.monitor
    with monitor.processes.meeting(
        sighting.step, after_update=sighting.seen == "parameter" or sighting.is_updated
    ) as meeting:
        whole, why = _whole(monitor, meeting)
        again, recorder = watch.repeated(sighting, whole, why)
        report = watch.reported(sighting, again)
        settled = meeting.settle(
            {"rank": meeting.rank, "report": report.to_dict(), "origins": len(report.origins)}, chosen
        )
        if settled.chosen == meeting.rank:
            if recorder is not None:
                report = watch.encapsulated(report, again, recorder)
                meeting.say("report", report.to_dict())
        else:
            written = meeting.hear("report", settled.chosen) if recorder is not None else None
            report = _own(written or settled.told[settled.chosen]["report"])
        return joint(report, settled, meeting.world, owner_of(report, monitor, whole)), settled.speaks


def attended(watch: Watch, step: int) -> tuple[Report, bool] | None:
    """The same for a process in which nothing went wrong in that step; None where nobody has anything to tell."""
    with watch.monitor.processes.meeting(step) as meeting:
        _whole(watch.monitor, meeting)  # all gather the parameters, or none can
        settled = meeting.settle({"rank": meeting.rank, "report": None, "origins": 0}, chosen)
        written = meeting.hear("report", settled.chosen) if watch.capsule is not None else None
        values = written or settled.told[settled.chosen]["report"]
        if values is None:
            return None
        return joint(_own(values), settled, meeting.world), settled.speaks


def chosen(told: Mapping[int, Mapping[str, Any]]) -> int:
    """The rank whose repetition shows an origin; else one whose own loss was bad; else the first."""
    ranks = sorted(told)
    showing = [rank for rank in ranks if told[rank]["origins"]]
    own = [rank for rank in ranks if _fault(told[rank]["report"]).get("seen") == "loss"]
    seeing = [rank for rank in ranks if told[rank]["report"] is not None]
    return (showing or own or seeing or ranks)[0]


def joint(report: Report, settled: Settled, world: int, owner: int | None = None) -> Report:
    """The report of the chosen rank with what the others have to say. `owner`: the rank that holds what is bad."""
    ranks = [{"rank": rank, **_said(settled.told[rank])} for rank in sorted(settled.told)]
    showing = [row["rank"] for row in ranks if row["origins"]]
    own = [row["rank"] for row in ranks if row["seen"] == "loss"]
    seeing = [row["rank"] for row in ranks if row["seen"]]
    telling = showing or own or seeing
    began = owner if owner is not None else settled.chosen if len(telling) < world else None
    run = dict(report.run or {})
    training = {**run["training"], "world": world, "ranks": ranks, "missing": list(settled.missing)}
    training["fault"] = {**training["fault"], "rank": began}
    run["training"] = training
    notes = [
        *_shown_by(showing, seeing, [row["rank"] for row in ranks], world),
        *_lost(settled.missing, settled.told),
        *(
            [f"what is bad of {report.origins[0].tensor} lies in the part of rank {owner}"]
            if owner is not None
            else []
        ),
    ]
    return replace(report, run=run, notes=(*report.notes, *notes))


def owner_of(report: Report, monitor: Monitor, whole: Whole | None) -> int | None:
    """The rank that holds the part of a parameter in which the first origin lies."""
    if whole is None or not report.origins:
        return None
    from attncli.training.shards import owner

    first = report.origins[0]
    index = (first.at or {}).get("index")
    names = {name: parameter for parameter, name in monitor.roots.named_parameters()}
    if first.tensor not in names or not isinstance(index, (list, tuple)):
        return None
    return owner(names[first.tensor], index)


# --- building blocks ----------------------------------------------------------------------------------


def _whole(monitor: Monitor, meeting: Meeting) -> tuple[Whole | None, str]:
    """The model with all its parameters where they lie in parts in several processes, or why it cannot be had."""
    from attncli.training.models import model_of
    from attncli.training.shards import Whole, fits, is_whole

    model = model_of(monitor)
    if model is None or is_whole(model):
        return None, ""
    told, missing = meeting.gather("here", {"fits": fits(model)})
    if missing:
        return None, f"its parameters lie in parts in all processes, and {_ranks(missing)} did not come"
    full = [rank for rank, fact in sorted(told.items()) if not fact["fits"]]
    if full:
        return None, f"there is no room for the whole model beside the part in {_ranks(full)}"
    with monitor.buffers.as_then():
        return Whole(model), ""


def _own(values: Mapping[str, Any]) -> Report:
    found = report_from(values)
    return Report(**{field.name: getattr(found, field.name) for field in fields(found)})


def _fault(report: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Of a rank in which nothing went wrong it is empty."""
    fault: Mapping[str, Any] = report["run"]["training"]["fault"] if report is not None else {}
    return fault


def _said(told: Mapping[str, Any]) -> dict[str, Any]:
    fault = _fault(told["report"])
    return {
        "origins": told["origins"],
        **{name: fault.get(name) for name in ("seen", "value", "reproduced", "why", "batch")},
    }


def _shown_by(showing: Sequence[int], seeing: Sequence[int], told: Sequence[int], world: int) -> list[str]:
    silent = [rank for rank in told if rank not in showing]
    if not showing and len(seeing) < world:
        return [f"of {world} processes it was seen in {_ranks(seeing)} alone, and no repetition shows it"]
    if not showing:
        return [f"none of the {world} processes showed it again by itself"]
    if len(showing) == world:
        return [f"each of the {world} processes shows it"]
    said = f"the step, repeated by each process alone, shows it in {_ranks(showing)}"
    return [f"{said} and not in {_ranks(silent)}" if silent else said]


def _lost(missing: Sequence[int], told: Mapping[int, Any]) -> list[str]:
    from attncli.training.processes import ARRIVAL_SECONDS

    if not missing:
        return []
    said = f"nothing was heard of it from {_ranks(missing)} within {ARRIVAL_SECONDS:g} s"
    return [f"{said}, so it is reported by {_ranks([min(told)])}" if 0 in missing else said]


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 0, 1 and 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
