"""Every fault of the suite is named as what it is, and nothing is said of its healthy twin."""

from __future__ import annotations

import pytest
import torch
from nan_faults import FAULTS, Fault

import attncli
from attncli.api import Report


def checked(fault: Fault, healthy: bool) -> Report:
    torch.manual_seed(0)
    model, step = fault.build(healthy)
    return attncli.nan_check(model, step)


def told(report: Report) -> str:
    return "\n".join(
        f"{o.phase} | {o.module} | {o.op} | {o.cause} | {o.tensor} | {o.confirmed} | {o.message}"
        for o in report.origins
    )


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_true_origin_is_named_and_proved(fault: Fault) -> None:
    report = checked(fault, healthy=False)
    assert len(report.origins) == 1, told(report) or "no origin"
    origin = report.origins[0]
    assert (origin.phase, origin.op in fault.ops, origin.cause in fault.causes) == (
        fault.phase,
        True,
        True,
    ), told(report)
    assert fault.module == "*" or origin.module == fault.module, told(report)
    assert fault.tensor is None or origin.tensor == fault.tensor, told(report)
    assert origin.confirmed is True, told(report)
    assert fault.forward.lower().strip("_") in str(origin.evidence.get("forward_op", "")).replace(
        "_", ""
    ) or (fault.forward == "Halved"), told(report)
    assert bool(origin.evidence["seen"]) is not fault.silent, told(report)
    assert report.exit_code("warning") == 1
    assert report.exit_code() == (0 if fault.silent else 1)
    assert origin.message
    assert "{" not in origin.message
    assert origin.advice.endswith(".")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_nothing_is_said_of_the_healthy_twin(fault: Fault) -> None:
    report = checked(fault, healthy=True)
    assert report.origins == (), told(report)
    assert report.findings == ()
    assert (report.verdict, report.exit_code("note")) == ("clean", 0)
