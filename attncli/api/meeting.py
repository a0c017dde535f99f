"""A step that went wrong in several processes: each repeats its own part, and one report names where it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attncli.records import Report
from attncli.records.reading import report_from

if TYPE_CHECKING:
    from attncli.api.watching import Watch
    from attncli.training.monitor import Monitor, Sighting
    from attncli.training.processes import Meeting, Settled
    from attncli.training.shards import Whole


def met(watch: Watch, sighting: Sighting) -> tuple[Report, bool]:
    """The report of all processes, the same in each, and whether it is this one that shows it."""
    monitor = watch.monitor
    with monitor.processes.meeting(sighting.step) as meeting:
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
            report = report_from(written or settled.told[settled.chosen]["report"])
        return joint(report, settled, meeting.world, owners(report, monitor, whole)), settled.speaks


def chosen(told: Mapping[int, Mapping[str, Any]]) -> int:
    """The rank whose repetition shows an origin; else one whose own loss was bad; else the first."""
    ranks = sorted(told)
    showing = [rank for rank in ranks if told[rank]["origins"]]
    own = [rank for rank in ranks if _fault(told[rank]["report"]).get("seen") == "loss"]
    return (showing or own or ranks)[0]


def joint(report: Report, settled: Settled, world: int, owner: int | None = None) -> Report:
    """The report of the chosen rank with what the others have to say. `owner`: the rank that holds what is bad."""
    ranks = [{"rank": rank, **_said(settled.told[rank])} for rank in sorted(settled.told)]
    showing = [row["rank"] for row in ranks if row["origins"]]
    own = [row["rank"] for row in ranks if row["seen"] == "loss"]
    everywhere = len(showing) == world
    began = owner if owner is not None else settled.chosen if not everywhere and (showing or own) else None
    if not showing and len(own) == world:
        began = None
    run = dict(report.run or {})
    training = {**run["training"], "world": world, "ranks": ranks, "missing": list(settled.missing)}
    training["fault"] = {**training["fault"], "rank": began}
    run["training"] = training
    notes = [
        *_shown_by(showing, [row["rank"] for row in ranks], world),
        *_lost(settled.missing, settled.told),
    ]
    return replace(report, run=run, notes=(*report.notes, *notes))


def owners(report: Report, monitor: Monitor, whole: Whole | None) -> int | None:
    """The rank that holds the part of a parameter in which the first origin lies."""
    if whole is None or not report.origins:
        return None
    from attncli.training.shards import owner

    first = report.origins[0]
    index = (first.at or {}).get("index")
    names = {name: parameter for parameter, name in monitor.named_parameters()}
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
        return None, f"{_ranks(full)} has no room for the whole model beside its part"
    with monitor.buffers.as_then():
        return Whole(model), ""


def _fault(report: Mapping[str, Any]) -> Mapping[str, Any]:
    fault: Mapping[str, Any] = report["run"]["training"]["fault"]
    return fault


def _said(told: Mapping[str, Any]) -> dict[str, Any]:
    fault = _fault(told["report"])
    return {
        "origins": told["origins"],
        **{name: fault.get(name) for name in ("seen", "value", "reproduced", "why", "batch")},
    }


def _shown_by(showing: Sequence[int], told: Sequence[int], world: int) -> list[str]:
    silent = [rank for rank in told if rank not in showing]
    if not showing:
        return [f"no process of {world} showed it again by itself"]
    if len(showing) == world:
        return [f"each of the {world} processes shows it"]
    said = f"repeated by itself, {_ranks(showing)} shows it"
    return [f"{said}, and {_ranks(silent)} shows nothing" if silent else said]


def _lost(missing: Sequence[int], told: Mapping[int, Any]) -> list[str]:
    from attncli.training.processes import ARRIVAL_SECONDS

    if not missing:
        return []
    said = f"{_ranks(missing)} said nothing of it within {ARRIVAL_SECONDS:g} s"
    return [f"{said}, so that {_ranks([min(told)])} reports it" if 0 in missing else said]


def _ranks(ranks: Sequence[int]) -> str:
    """ "rank 2", "ranks 0, 1 and 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
