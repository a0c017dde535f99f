"""Every fault of the suite is named as what it is, and nothing is said of its healthy twin.

That a fault is one, and its twin none, is seen without attncli first: the step is run, and what it leaves is looked at.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nan_faults import FAULTS, HEALTHY, Built, Fault, two_at_once
from torch import Tensor, nn

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


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """As torch fills it in its deterministic mode; otherwise it holds whatever was there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def line_of(source: str | None) -> str:
    file, _, line = (source or ":0").rpartition(":")
    return linecache.getline(file, int(line))


def finite_after(built: Built) -> bool:
    """Whether the step leaves numbers: in what it gives, in gradients, and in what was a number of the parameters."""
    model, step = built
    before = {name: torch.isfinite(parameter) for name, parameter in model.named_parameters()}
    try:
        result = step(model)
    except RuntimeError as error:
        if "inf" not in str(error):
            raise
        return False
    if isinstance(result, Tensor) and result.requires_grad and not gradients(model):
        result.backward()
    kept = [parameter[before[name]] for name, parameter in model.named_parameters() if name in before]
    return all(bool(torch.isfinite(one).all()) for one in (*tensors(result), *gradients(model), *kept))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict | tuple | list):
        for one in result.values() if isinstance(result, dict) else result:
            yield from tensors(one)


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_one_and_its_twin_is_none(fault: Fault, unwritten_memory_is_nan: None) -> None:
    for healthy in (False, True):
        torch.manual_seed(0)
        assert finite_after(fault.build(healthy)) is (healthy or fault.silent)


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
    assert (origin.confirmed is True) is fault.provable, told(report)
    assert fault.forward.lower().strip("_") in str(origin.evidence.get("forward_op", "")).replace(
        "_", ""
    ) or (fault.forward == "Halved"), told(report)
    assert bool(origin.evidence["seen"]) is not fault.silent, told(report)
    assert report.exit_code() == 1
    assert fault.line in line_of(origin.source)
    assert origin.message
    assert "{" not in origin.message
    assert origin.advice.endswith(".")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_nothing_is_said_of_the_healthy_twin(fault: Fault) -> None:
    report = checked(fault, healthy=True)
    assert report.origins == (), told(report)
    assert report.findings == ()
    assert (report.verdict, report.exit_code("note")) == ("clean", 0)


@pytest.mark.parametrize("build", HEALTHY, ids=lambda build: build.__name__)
def test_nothing_is_said_of_nan_and_inf_that_do_no_harm(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    report = attncli.nan_check(*build())
    assert report.origins == (), told(report)
    assert report.findings == ()
    assert (report.verdict, report.exit_code("note")) == ("clean", 0)


def test_two_independent_faults_are_both_named_each_with_what_it_reaches() -> None:
    torch.manual_seed(0)
    report = attncli.nan_check(*two_at_once(False))
    assert [(o.op, o.cause, o.confirmed, o.evidence["seen"]) for o in report.origins] == [
        ("div", "division-by-zero", True, ["output.mean"]),
        ("log", "log-of-zero", True, ["output.power"]),
    ]
    assert attncli.nan_check(*two_at_once(True)).verdict == "clean"


@pytest.mark.parametrize("layers", [1, 5])
def test_a_line_that_overflows_in_every_layer_is_proved_by_all_of_them(layers: int) -> None:
    """Behind the first layer everything is NaN: that the others overflow too shows only once it is repaired."""

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = (300 * x) @ (300 * x).mT
            return nn.functional.layer_norm(x + scores.softmax(-1) @ x, x.shape[-1:])

    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(layers))).half()
    x = torch.randn(2, 5, 8).half()
    report = attncli.nan_check(model, lambda model: model(x).float().mean())
    assert [(one.cause, one.module, one.confirmed) for one in report.origins] == [
        ("overflow-scores", "0", True)
    ]
    assert ("in every layer" in report.origins[0].evidence["proof"]) == (layers > 1)
