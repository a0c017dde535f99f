"""Steps as people write them are repeated whole: what a module keeps, what is written in place, other weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attncli
from attncli.training import program

BAD = 5


def faulty(train: Callable[[], Any], *given: Any) -> Any:
    """The report of the fault that the training runs into."""
    with pytest.raises(attncli.TrainingFault) as caught, attncli.watch(*given, every=0):
        train()
    return caught.value.report


def assert_named(report: Any, cause: str, line: str, step: int = BAD + 1) -> None:
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["reproduced"], fault["why"]) == (step, True, ""), fault
    assert [(one.cause, one.confirmed) for one in report.origins] == [(cause, True)], report.origins
    assert source_of(report.origins[0]).rstrip().endswith(f"# {line}"), report.origins[0].source


def source_of(origin: Any) -> str:
    import linecache

    file, _, number = str(origin.source).rpartition(":")
    return linecache.getline(file, int(number))


def descent(model: nn.Module, loss_of: Callable[[int], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def train() -> None:
        for number in range(BAD + 3):
            optimizer.zero_grad()
            loss_of(number).backward()
            optimizer.step()

    return train


# --- tensors that a module keeps ----------------------------------------------------------------------


class Experts(nn.Module):
    """Keeps a loss of its own, as a mixture of experts does for its router."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.chosen = 3
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.losses = [h.pow(2).mean() * 0.1, h[: self.chosen].mean()]  # kept
        return torch.tanh(h)


def test_a_loss_that_a_module_keeps_is_made_again() -> None:
    model = nn.Sequential(Experts(), nn.Linear(4, 1))

    def loss_of(number: int) -> Tensor:
        model[0].chosen = 0 if number == BAD else 3
        out = model(torch.ones(3, 4)).pow(2).mean()
        return out + sum(model[0].losses)  # type: ignore[no-any-return]

    assert_named(faulty(descent(model, loss_of), model), "empty-reduction", "kept")


def test_what_a_hook_takes_out_of_a_module_is_made_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    taken: dict[str, Tensor] = {}
    model[1].register_forward_hook(lambda module, args, output: taken.update(features=output))

    def loss_of(number: int) -> Tensor:
        x = torch.full((2, 4), -100.0 if number == BAD else 1.0)
        with torch.no_grad():
            model[0].weight.abs_()
            model[0].bias.fill_(0.1)
        out = model(x).pow(2).mean()
        features = taken["features"]
        return out + (features / features.sum()).mean()  # features

    assert_named(faulty(descent(model, loss_of), model), "division-by-zero", "features")


def test_what_is_not_made_again_is_said() -> None:
    """A tensor of a module that goes another way each time it runs."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.calls = 0
            self.kept = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            h = self.inner(x)
            self.kept = h.mean() if self.calls <= BAD + 1 else h.sum()
            return h

    model = Fickle()

    def loss_of(number: int) -> Tensor:
        out = model(torch.ones(2, 4)).pow(2).mean()
        return out + model.kept * (math.nan if number == BAD else 1.0)

    report = faulty(descent(model, loss_of), model)
    assert (
        report.run["training"]["fault"]["why"] == "it uses a tensor of shape () that Fickle keeps to itself"
    )
    assert not any("reaches nothing" in note for note in report.notes)


def test_a_module_that_is_given_no_tensor_is_repeated() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.points = nn.Parameter(torch.ones(3))
            self.register_buffer("divisor", torch.ones(3))

        def forward(self) -> Tensor:
            return (self.points / self.divisor).sum()  # points

    model = Graph()

    def loss_of(number: int) -> Tensor:
        model.divisor.fill_(float(number != BAD))
        return model()  # type: ignore[no-any-return]

    assert_named(faulty(descent(model, loss_of), model), "division-by-zero", "points")


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_what_a_function_of_the_user_s_own_made_in_a_module_is_made_again() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            self.doubled = Doubling.apply(h)
            return h + self.doubled

    model = Keeps()

    def loss_of(number: int) -> Tensor:
        out = model(torch.ones(2, 4)).pow(2).mean()
        return out + (model.doubled.pow(2) * float(number != BAD)).mean().log()  # log

    assert_named(faulty(descent(model, loss_of), model), "log-of-zero", "log")


# --- writing in place ---------------------------------------------------------------------------------


def multiplied(loss: Tensor) -> Tensor:
    loss *= 2  # as the Trainer of transformers does for several processes
    loss /= 2
    return loss


def through_a_view(loss: Tensor) -> Tensor:
    row = loss.expand(2).clone()
    row[0].mul_(3.0)
    row[1] = 0.0
    return row.sum() / 3


def out_of_a_sum(loss: Tensor) -> Tensor:
    total = torch.zeros(())
    total += loss
    total.add_(loss.detach(), alpha=0.0)
    return total


@pytest.mark.parametrize("written", [multiplied, through_a_view, out_of_a_sum])
def test_a_loss_that_is_written_in_place_is_made_again(written: Callable[[Tensor], Tensor]) -> None:
    model = nn.Linear(4, 1)

    def loss_of(number: int) -> Tensor:
        out = model(torch.ones(2, 4))
        loss = (out / torch.full((2, 1), float(number != BAD))).pow(2).mean()  # divided
        return written(loss)

    assert_named(faulty(descent(model, loss_of), model), "division-by-zero", "divided")


@pytest.mark.parametrize("edit", ["zero_", "clamp_", "diagonal", "transposed"])
def test_weights_that_are_written_through_views_leave_the_watch_on(edit: str) -> None:
    model = nn.Linear(4, 4)

    def loss_of(number: int) -> Tensor:
        with torch.no_grad():
            if edit == "zero_":
                model.weight[0].zero_()
            elif edit == "clamp_":
                model.weight[:2].clamp_(-1, 1)
            elif edit == "diagonal":
                model.weight.diagonal().fill_(0.5)
            else:
                model.weight.T.mul_(0.99)
        return torch.log(model(torch.ones(2, 4)).pow(2).mean() * float(number != BAD))  # log

    assert_named(faulty(descent(model, loss_of), model), "log-of-zero", "log")


def test_running_statistics_that_a_bad_batch_wrote_to_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    before: dict[str, Tensor] = {}

    def loss_of(number: int) -> Tensor:
        if number == BAD:
            before.update({name: value.clone() for name, value in model.state_dict().items()})
        x = torch.ones(3, 4) * torch.arange(3)[:, None]
        x[1, 2] = math.nan if number == BAD else 0.0
        return model(x).pow(2).mean()  # type: ignore[no-any-return]

    faulty(descent(model, loss_of), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_number_that_goes_through_python_is_followed_to_the_line_where_it_left() -> None:
    model = nn.Linear(4, 1)

    def loss_of(number: int) -> Tensor:
        first, second = model(torch.ones(2, 4)).pow(2)
        other = (second * 0 / (0.0 if number == BAD else 1.0)).sum()
        weight = other.item()  # handed
        return (first * (1 + weight)).sum()

    report = faulty(descent(model, loss_of), model)
    (note,) = [note for note in report.notes if "handed NaN to Python" in note]
    file, _, line = note.partition(" handed")[0].rpartition(":")
    import linecache

    assert linecache.getline(file, int(line)).rstrip().endswith("# handed")


# --- micro-batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("shows", ["loss", "gradient"])
def test_of_several_micro_batches_the_bad_one_is_named(bad: int, shows: str) -> None:
    torch.manual_seed(0)
    data = torch.rand(24, 4) + 0.5
    at = 4 * 3 + bad  # in the fourth step of four batches of one sample
    data[at] = 0.0
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def train() -> None:
        for number, (x,) in enumerate(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data))):
            out = model(x).pow(2).sum()
            loss = (1 / out.detach() if shows == "loss" else 1.0) * out + out.sqrt()  # divided
            loss.backward()
            if number % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()

    report = faulty(train)
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["seen"]) == (4, shows)
    assert (fault["batch"]["index"], list(fault["batch"]["items"])) == (at, [at])
    first = report.origins[0]
    assert (first.phase, first.cause) == (
        ("forward", "division-by-zero") if shows == "loss" else ("backward", "singular-gradient")
    )


# --- other weights, other optimisers ------------------------------------------------------------------


class Exponential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).exp().mean()  # exp


def test_a_module_that_is_called_with_other_weights_is_called_with_them_again() -> None:
    model = Exponential()

    def loss_of(number: int) -> Tensor:
        factor = 400.0 if number == BAD else 1.0
        fast = {name: one.abs() * factor + 0.1 for name, one in model.named_parameters()}
        return torch.func.functional_call(model, fast, (torch.ones(2, 4),))  # type: ignore[no-any-return]

    assert_named(faulty(descent(model, loss_of), model), "overflow-exp", "exp")


class Sharpness(torch.optim.Optimizer):
    """An optimiser of two halves around another one of the same parameters (Foret et al. 2021)."""

    def __init__(self, parameters: Any, base: torch.optim.Optimizer) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base, self.number, self.eps = base, 0, 1e-12

    def step(self, closure: Any) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        own = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in own]).norm() * (self.number != BAD)
        before = [p.detach().clone() for p in own]
        with torch.no_grad():
            for p in own:
                p.add_(p.grad * (0.05 / (norm + (0.0 if self.number == BAD else 1e-12)) * norm))
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, value in zip(own, before, strict=True):
                p.copy_(value)
        self.base.step()
        self.number += 1


def test_an_optimizer_inside_another_makes_no_steps_of_its_own() -> None:
    model = nn.Linear(4, 1)
    optimizer = Sharpness(model.parameters(), torch.optim.SGD(model.parameters(), 0.01))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 4)) - 3).pow(2).mean()
        loss.backward()
        return loss

    def train() -> None:
        for _ in range(BAD + 3):
            optimizer.step(closure)

    report = faulty(train)
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["withheld"], fault["spoiled"]) == (BAD + 1, True, 2)
    assert "withheld, but 2 parameters were not finite already" in str(report)


# --- much outside modules -----------------------------------------------------------------------------


def test_a_step_of_very_many_functions_is_not_looked_at_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(program, "MOST_ENTRIES", 64)
    looked: list[int] = []
    sweep = program.Program._sweep

    def counting(self: Any, **settings: Any) -> None:
        looked.append(1)
        sweep(self, **settings)

    monkeypatch.setattr(program.Program, "_sweep", counting)
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 1e-3)
    steps = 6

    def train(last: float) -> None:
        for number in range(steps):
            x = weight
            for _ in range(200):
                x = x * 1.0 + 0.0
            optimizer.zero_grad()
            (x * (last if number == steps - 1 else 1.0)).sum().backward()
            optimizer.step()

    with attncli.watch(every=0) as run:
        train(1.0)
    assert len(looked) < 4 * steps
    assert run.monitor.program.is_hopeless
    report = faulty(lambda: train(math.nan))
    assert (
        report.run["training"]["fault"]["why"]
        == "the step does more outside its modules than is written down"
    )
