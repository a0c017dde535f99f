"""What the watch sees, and what it must not see: skipped batches, discarded gradients, weights that survive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import attncli

STEPS, BAD = 10, 6  # counted from 0


def trained(
    step: Callable[[nn.Module, torch.optim.Optimizer, int], None], **settings: Any
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with attncli.watch(model, optimizer, **settings) as run:
        for number in range(STEPS):
            step(model, optimizer, number)
    return model, run


def loss_of(model: nn.Module, number: int) -> Tensor:
    """Its gradient alone is not finite at one step: the root of 0."""
    generator = torch.Generator().manual_seed(number)
    out = model(torch.randn(8, 4, generator=generator)).squeeze(-1)
    return (out * (number != BAD)).pow(2).sum().sqrt() + 0 * out.sum()


def test_a_script_that_leaves_bad_gradients_out_is_healthy() -> None:
    left_out = []

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        loss_of(model, number).backward()
        if not torch.isfinite(clip_grad_norm_(model.parameters(), 1.0)):
            left_out.append(number)
        else:
            optimizer.step()
        optimizer.zero_grad()

    _, run = trained(step)
    assert left_out == [BAD]
    assert (run.report.verdict, run.monitor.faults, run.monitor.step) == ("clean", 0, STEPS)


@pytest.mark.parametrize("clip", [False, True])
def test_bad_gradients_that_are_used_are_a_fault_and_the_weights_survive(clip: bool) -> None:
    seen: dict[str, Any] = {}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        seen.update(model=model, before=copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        loss_of(model, number).backward()
        if clip:
            clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    with pytest.raises(attncli.TrainingFault) as caught:
        trained(step)
    report = caught.value.report
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["seen"], fault["withheld"]) == (BAD + 1, "gradient", True)
    assert [(one.phase, one.cause, one.confirmed) for one in report.origins] == [
        ("backward", "singular-gradient", True)
    ]
    assert all(torch.equal(value, seen["before"][name]) for name, value in seen["model"].state_dict().items())


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_skips_by_itself_is_heard_like_one_that_is_skipped(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train() -> None:
        for number in range(40):
            loss = (model(torch.ones(2, 4)) * (number < 3)).pow(2).sum().sqrt()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    with pytest.raises(attncli.TrainingFault) as caught, attncli.watch(model, optimizer):
        train()
    training = caught.value.report.run["training"]
    assert (training["fault"]["seen"], training["fault"]["step"]) == ("loss scale", 15)
    steps = training["steps"]
    assert [step["number"] for step in steps if step["skipped"]] == list(range(4, 15))
    # √2 for each of five parameters, whatever the loss scale.
    assert [step["gradient_norm"] for step in steps[:3]] == pytest.approx([10**0.5] * 3)


def test_a_discarded_batch_is_no_part_of_the_step_behind_it() -> None:
    """The gradients of the bad batch are zeroed; the one behind it is bad for a reason of its own."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        loss = loss_of(model, number)
        if number == BAD + 1:
            loss = loss + (model[0].weight.sum() - model[0].weight.sum().detach()).pow(2).sqrt()
        loss.backward()
        if number != BAD:
            optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(attncli.TrainingFault) as caught:
        trained(step)
    report = caught.value.report
    assert report.run["training"]["fault"]["step"] == BAD + 1  # the bad batch before it made no step
    assert report.run["training"]["fault"]["tensors"] == ("0.weight",)
    lines = {one.source for one in report.origins}
    assert len(lines) == 1
    assert str(lines).count(":") == 1


def test_gradients_that_are_written_after_they_were_looked_at_are_told_without_an_invented_origin() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        loss = model(torch.ones(2, 4)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        if number == BAD:
            model[0].weight.grad[0, 0] = float("nan")
        optimizer.step()

    with pytest.raises(attncli.TrainingFault) as caught:
        trained(step)
    report = caught.value.report
    fault = report.run["training"]["fault"]
    assert (fault["step"], fault["seen"], fault["withheld"]) == (BAD + 1, "gradient", False)
    assert report.origins == ()
    assert [one.code for one in report.findings if one.severity == "error"] == ["ATT716"]


def test_a_repetition_that_shows_another_fault_than_the_run_proves_nothing() -> None:
    """A state outside the model that each call changes: the second time it is another step."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 1)
            self.times = 0

        def forward(self, x: Tensor) -> Tensor:
            self.times += 1
            return self.inner(x) / (self.times <= BAD + 1)

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def train() -> None:
        for number in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, number).backward()
            optimizer.step()

    with pytest.raises(attncli.TrainingFault) as caught, attncli.watch(model, optimizer, every=0):
        train()
    report = caught.value.report
    fault = report.run["training"]["fault"]
    assert (fault["seen"], fault["reproduced"], report.origins) == ("gradient", None, ())
    assert fault["why"] == "repeated, its loss is not finite, which it was in the run"


def test_nan_in_an_output_that_the_loss_does_not_show_is_told_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        x = torch.ones(3, 4)
        x[2] = float("nan") if number >= BAD else 1.0
        optimizer.zero_grad()
        # Chosen before anything is computed of it, so that no gradient is NaN either.
        torch.where(torch.arange(3)[:, None] < 2, model(x), 0.0)[:2].pow(2).mean().backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    _, run = trained(step, every=2)
    told = capsys.readouterr().err
    assert told.count("returned holds NaN") == 1
    assert "step 8: what Sequential returned holds NaN" in told
    assert run.report.notes[0].startswith("step 8: ")


def test_with_continue_nothing_of_the_training_is_another() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        loss = model(torch.full((2, 4), 0.1 * number)).pow(2).mean()
        loss.backward()
        if number == BAD:
            optimizer.param_groups[0]["lr"] = float("inf")
        optimizer.step()

    watched, run = trained(step, on_fault="continue", every=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for number in range(STEPS):
        step(model, optimizer, number)
    assert all(
        torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        for one, other in zip(watched.parameters(), model.parameters(), strict=True)
    )
    assert run.report.run["training"]["seen"] == STEPS
    assert run.report.run["training"]["faults"] == STEPS - BAD


def test_what_fails_in_the_watch_is_told_once_and_the_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attncli.training import monitor

    def fails(*given: Any) -> Any:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(monitor, "norms", fails)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).pow(2).mean().backward()
        optimizer.step()

    trained(step)
    told = capsys.readouterr().err
    assert told.count("a fault of ours") == 1
    assert "the training goes on" in told


def test_nothing_is_left_behind() -> None:
    from torch.nn.modules import module as hooks
    from torch.optim import optimizer as optimizers
    from torch.utils.data import dataloader

    def state() -> list[Any]:
        return [
            torch.autograd.backward, torch.nn.utils.clip_grad._get_total_norm, torch.amp.GradScaler.step,
            torch.amp.GradScaler.scale, vars(torch.autograd.Function)["apply"], torch.optim.Optimizer.zero_grad,
            nn.Module.zero_grad, dataloader._BaseDataLoaderIter.__next__, len(hooks._global_forward_hooks),
            len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks_with_kwargs),
            len(hooks._global_forward_hooks_always_called), len(optimizers._global_optimizer_pre_hooks),
            len(optimizers._global_optimizer_post_hooks), torch._C._len_torch_function_stack(),
        ]  # fmt: skip

    before = state()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()

    with pytest.raises(attncli.TrainingFault):
        trained(step)
    assert state() == before
