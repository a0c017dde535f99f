"""Programs around the operators: complex, sparse, nested and scripted tensors, NumPy, autograd.grad, raising steps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncli
from attncli.records import Origin


def only(report: attncli.Report) -> Origin:
    assert len(report.origins) == 1, str(report)
    return report.origins[0]


def test_a_complex_number_is_looked_at_like_any_other() -> None:
    layer = nn.Linear(4, 4)

    def step(model: nn.Module) -> Tensor:
        spectrum = torch.fft.rfft(model(torch.zeros(2, 4)) * 0)
        return (spectrum / spectrum.abs()).real.mean()

    origin = only(attncli.nan_check(layer, step))
    assert (origin.op, origin.cause, origin.confirmed) == ("div", "division-by-zero", True)


def test_a_sparse_gradient_and_its_optimiser_do_not_stop_the_search() -> None:
    table = nn.Embedding(6, 3, sparse=True)

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = model(torch.tensor([1, 2]))
        loss = (rows * 0 / (rows * 0).norm(dim=1, keepdim=True)).sum()
        loss.backward()
        optimizer.step()
        return loss

    assert only(attncli.nan_check(table, step)).op == "div"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_traced_model_is_searched_and_put_back() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.inner(x) - 100)

    model = torch.jit.trace(Logarithm(), torch.randn(3, 4), check_trace=False)
    origin = only(attncli.nan_check(model, lambda model: model(torch.randn(3, 4)).sum()))
    # A traced program is optimised after its first runs, so its operators do not repeat one by one.
    assert (origin.op, origin.cause) == ("log", "outside-domain")


def test_a_nested_tensor_is_no_reason_to_stop() -> None:
    layer = nn.Linear(4, 4)

    def step(model: nn.Module) -> Tensor:
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
        return model(nested).values().mean()

    assert attncli.nan_check(layer, step).origins == ()


def test_a_call_of_autograd_grad_is_no_backward_pass_of_the_step() -> None:
    """A gradient penalty at a point where the gradient is 0."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    x = torch.randn(5, 4, requires_grad=True)

    def step(model: nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (gradient.pow(2).sum(1).sqrt() - 1).pow(2).mean()

    origin = only(attncli.nan_check(model, step))
    assert (origin.phase, origin.cause, origin.confirmed) == ("backward", "singular-gradient", True)


def test_what_numpy_writes_is_told_as_written_outside_torch() -> None:
    layer = nn.Linear(4, 4)

    def step(model: nn.Module) -> Tensor:
        hidden = torch.ones(3, 4)
        hidden.numpy()[0, 1] = math.nan
        return model(hidden).sum()

    origin = only(attncli.nan_check(layer, step))
    assert (origin.cause, origin.confirmed) == ("written-outside", True)
    assert "(3, 4)" in origin.message


def test_a_tensor_that_no_argument_names_is_told_by_its_shape() -> None:
    layer, labels = nn.Linear(4, 4), torch.randn(3, 4)
    labels[1, 2] = math.nan
    origin = only(attncli.nan_check(layer, lambda model: (model(torch.randn(3, 4)) - labels).pow(2).mean()))
    assert (origin.cause, origin.tensor, origin.at) == ("bad-input", None, {"index": [1, 2]})
    assert origin.message.startswith("a tensor of shape (3, 4) that no operator made holds 1 NaN")


def test_infinity_of_a_logarithm_is_not_called_a_mask() -> None:
    layer, distance = nn.Linear(4, 4), (torch.arange(5)[:, None] - torch.arange(5)).float()

    def step(model: nn.Module) -> Tensor:
        x = model(torch.randn(2, 5, 4))
        bias = -torch.log(distance.clamp(min=0))
        return (torch.softmax((x @ x.mT + bias).masked_fill(distance < 0, -math.inf), -1) @ x).sum()

    origin = only(attncli.nan_check(layer, step))
    assert (origin.op, origin.cause) == ("log", "log-of-zero")


def test_slots_of_a_cache_that_nobody_reads_are_no_fault() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("cache", torch.full((8, 4), math.nan))

        def forward(self, x: Tensor) -> Tensor:
            self.cache[:3] = self.inner(x).detach()
            return self.inner(self.cache[:3]).sum()

    assert attncli.nan_check(Cached(), lambda model: model(torch.randn(3, 4))).origins == ()


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_a_step_that_anomaly_mode_stops_is_explained_and_proved() -> None:
    layer = nn.Linear(3, 3, bias=False)

    def step(model: nn.Module) -> Tensor:
        with torch.autograd.set_detect_anomaly(True):
            loss = torch.sqrt(model(torch.zeros(2, 3)) ** 2).sum()
            loss.backward()
        return loss

    report = attncli.nan_check(layer, step)
    assert (only(report).cause, only(report).confirmed) == ("singular-gradient", True)
    assert any("RuntimeError" in note for note in report.notes)


def test_a_step_that_cannot_be_repeated_is_named_so() -> None:
    batches = iter([torch.randn(3, 4)])
    origin = only(attncli.nan_check(nn.Linear(4, 4), lambda model: (model(next(batches)) - 100).log().sum()))
    assert origin.cause == "outside-domain"
    assert origin.confirmed is None
    assert re.search("could not be repeated.*StopIteration", str(origin.evidence["proof"]))


def test_nan_that_a_step_leaves_behind_is_noted() -> None:
    def step(model: nn.Module) -> Any:
        loss = (model(torch.randn(3, 4)) - 100).log().sum()
        return None if not torch.isfinite(loss) else loss

    report = attncli.nan_check(nn.Linear(4, 4), step)
    assert report.origins == ()
    assert any("made NaN that reaches nothing" in note for note in report.notes)


def test_outputs_that_are_no_loss_get_no_backward_pass() -> None:
    layer = nn.Linear(4, 4)
    attncli.nan_check(layer, lambda model: model(torch.randn(3, 4)))
    assert layer.weight.grad is None


def test_nan_written_out_in_the_code_is_told_as_such() -> None:
    def step(model: nn.Module) -> Tensor:
        hidden = model(torch.ones(3, 4)).detach().clone()
        hidden[0, 1] = float("nan")
        return model(hidden).sum()

    origin = only(attncli.nan_check(nn.Linear(4, 4), step))
    assert (origin.phase, origin.cause) == ("forward", "written-nan")


def test_an_order_that_is_lost_to_overflow_is_told_although_indices_are_finite() -> None:
    points, centres = torch.randn(6, 4) * 300, torch.randn(5, 4) * 300

    def step(model: nn.Module) -> Tensor:
        difference = points.half()[:, None] - centres.half()[None]
        return difference.pow(2).sum(-1).argmin(-1)

    report = attncli.nan_check(nn.Linear(4, 4), step)
    assert [finding.code for finding in report.findings] == ["ATT704"]
