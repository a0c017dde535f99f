"""What a check says of planted faults is what the single commands say: the same origins, the same findings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from nan_faults import FAULTS, HEALTHY, Apply, Built, Fault
from test_broken_examples import BROKEN, example
from test_broken_examples import HEALTHY as DONE_RIGHT
from test_broken_examples import examples as examples  # a fixture that puts their folder on the path
from torch import nn

import attncli
from attncli.api import Report

pytestmark = pytest.mark.filterwarnings("ignore:.*degrees of freedom")
# The rest has its fault in the backward pass or the optimiser, which a check does not run.
IN_FORWARD = tuple(fault for fault in FAULTS if fault.phase not in ("backward", "optimizer"))

IN_ONE_CALL = tuple(build for build in HEALTHY if build.__name__ != "scaler_that_recovers")


class Given(NamedTuple):
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Reports(NamedTuple):
    """Of one forward pass, each of a model of its own. `measured`: None where the forward pass raises."""

    checked: Report
    searched: Report
    measured: Report | None


def reports_of(make: Callable[[], Given]) -> Reports:
    def step(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(*searched.args, **searched.kwargs)

    searched = make()
    check = report(attncli.check, make())
    torch.manual_seed(1)
    search = attncli.nan_check(searched.model, step, backward=False)
    measured = None
    with contextlib.suppress(RuntimeError):  # it may stop at its fault
        measured = report(attncli.measure, make())
    return Reports(check, search, measured)


def report(command: Callable[..., Report], given: Given) -> Report:
    """On one line for both commands: it is where the calls of a module of torch itself stand."""
    torch.manual_seed(1)
    return command(given.model, *given.args, **given.kwargs)


def handed_over(built: Built) -> Given:
    """What a step hands to its model."""
    model, step = built
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = model.register_forward_pre_hook(remember, with_kwargs=True)
    with contextlib.suppress(RuntimeError):  # a step may stop at its fault
        step(model)
    handle.remove()
    (only,) = seen
    return Given(model, *only)


def told(report: Report) -> list[tuple[Any, ...]]:
    return [(o.phase, o.module, o.op, o.cause, o.tensor, o.confirmed, o.at) for o in report.origins]


def codes(report: Report | None) -> set[str]:
    return {finding.code for finding in report.findings} if report is not None else set()


def assert_the_same(reports: Reports) -> None:
    checked, searched, measured = reports
    assert told(checked) == told(searched)
    of_weights = {code for code in codes(checked) if code.startswith("ATT2")}
    # That scores are NaN is no news beside where it was born.
    unsaid = {"ATT506"} if checked.origins else set()
    assert codes(checked) - of_weights == (codes(searched) | codes(measured)) - unsaid
    if measured is not None:
        assert repr(checked.calls) == repr(measured.calls)
        of_calls = [row for row in checked.measurements if row.call is not None]
        assert repr(of_calls) == repr(list(measured.measurements))


# --- faults of numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", IN_FORWARD, ids=lambda fault: fault.name)
def test_a_check_names_the_fault_that_nan_check_names(fault: Fault) -> None:
    def make() -> Given:
        torch.manual_seed(0)
        return handed_over(fault.build(False))

    reports = reports_of(make)
    assert_the_same(reports)
    if fault.name in NOT_OF_THE_FORWARD_PASS:
        return
    (origin,) = reports.checked.origins
    assert (origin.phase, origin.op in fault.ops, origin.cause in fault.causes) == (fault.phase, True, True)
    assert reports.checked.exit_code() == 1


@pytest.mark.parametrize("fault", IN_FORWARD, ids=lambda fault: fault.name)
def test_nothing_is_said_of_the_healthy_twin(fault: Fault) -> None:
    torch.manual_seed(0)
    checked = report(attncli.check, handed_over(fault.build(True)))
    assert checked.origins == ()
    # A row of NaN that no token asks for is one in the weights all the same.
    found = {code for code in codes(checked) if code.startswith(("ATT2", "ATT7"))}
    assert found == ({"ATT201"} if fault.name == "rare_token" else set())


@pytest.mark.parametrize("build", IN_ONE_CALL, ids=lambda build: build.__name__)
def test_nothing_is_said_of_nan_and_inf_that_do_no_harm(build: Callable[[], Built]) -> None:
    torch.manual_seed(0)
    assert report(attncli.check, handed_over(build())).origins == ()


NOT_OF_THE_FORWARD_PASS = {
    # The step makes the mask wrong, and hands it over as it is.
    *("minimum_added_twice", "minimum_of_another_dtype", "zero_times_infinity"),
    # What is made there is not in what the model returns: only the gradient shows it.
    *("nan_to_num_hides_it", "where_with_exp", "where_with_sqrt", "where_with_division"),
    # It is the loss behind the model that fails, or a step of its own making.
    *("ratio_of_policies", "product_under_autocast", "smoothing_over_masked_classes"),
    *("transcript_longer_than_the_sound", "clipping_in_float16"),
}


# --- mistakes in attention ----------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "factory"), [*BROKEN, *DONE_RIGHT])
def test_a_check_of_an_example_finds_what_its_measurement_finds(file: str, factory: str) -> None:
    def make() -> Given:
        module = example(file)
        return Given(getattr(module, factory)().eval(), module.batch(), {})

    reports = reports_of(make)
    assert_the_same(reports)
    names = {finding.name for finding in reports.checked.findings}
    if (file, factory) in BROKEN:
        assert BROKEN[file, factory] in names
    else:
        assert names == set()


def test_scores_of_nan_do_not_show_their_mask() -> None:
    def attend(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        future = torch.full((6, 6), -torch.inf).triu(1)
        return ((x @ self.w) @ x.mT + future).softmax(-1) @ x

    given = Given(Apply(attend, w=nn.Parameter(torch.eye(8))), (torch.randn(2, 6, 8),), {})
    assert [call.mask_kind for call in report(attncli.check, given).calls] == ["causal"]
    with torch.no_grad():
        given.model.w[0, 0] = torch.nan
    checked = report(attncli.check, given)
    assert [call.mask_kind for call in checked.calls] == [None]
    assert "mask not recovered" in str(checked)
