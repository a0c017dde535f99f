"""A watched training is the same training: functions that were exchanged, modes, warnings, threads, models that go."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attncli


def trained(steps: int = 6, watched: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def run() -> None:
        for _ in range(steps):
            loss = nn.functional.mse_loss(model(torch.randn(3, 4)), torch.randn(3, 1))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    if watched:
        with attncli.watch(model, optimizer, every=2):
            run()
    else:
        run()
    return [parameter.detach() for parameter in model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_function_that_a_script_exchanged_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = nn.functional.mse_loss, []

    def scaled(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs) * 0.5 + 0.1

    monkeypatch.setattr(nn.functional, "mse_loss", scaled)
    plain = trained(watched=False)
    before = len(calls)
    assert same(plain, trained())
    assert len(calls) == 2 * before


class Noise(TorchFunctionMode):
    """Draws a random number at each function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch._C._jit_set_profiling_mode(True)
        result = func(*args, **(kwargs or {}))
        self.seen = getattr(self, "seen", 0) + 1
        return result


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Noise, Counted])
def test_modes_of_the_script_hear_what_they_would_hear_without_the_watch(mode: Any) -> None:
    counts = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, foreach=False)
        with mode() as heard:
            if watched:
                stack = attncli.watch(model, optimizer, every=0)
                stack.__enter__()
            for _ in range(5):
                loss = model(torch.ones(2, 4)).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if watched:
                stack.__exit__(None, None, None)
        counts.append(heard.seen)
    assert counts[0] == counts[1]


def test_a_warning_is_said_of_the_line_of_the_script() -> None:
    def warned() -> list[tuple[str, int]]:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                # The shapes differ, of which torch warns.
                nn.functional.mse_loss(model(torch.ones(2, 4)), torch.ones(2)).backward()
                optimizer.step()
        return [(one.filename, one.lineno) for one in found]

    plain = warned()
    with attncli.watch():
        watched = warned()
    assert plain
    assert watched == plain


def test_a_model_that_the_script_lets_go_is_not_kept() -> None:
    def one() -> tuple[Any, Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            loss = model(torch.ones(2, 4)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return weakref.ref(model), weakref.ref(model[0].weight)

    with attncli.watch():
        gone = [one() for _ in range(4)]
        gc.collect()
        assert [[reference() is not None for reference in pair] for pair in gone[:3]] == [[False, False]] * 3


def test_what_is_carried_from_step_to_step_is_not_written_down_for_ever() -> None:
    cell = nn.GRUCell(3, 3)
    optimizer = torch.optim.SGD(cell.parameters(), 0.01)
    state = torch.zeros(2, 3)
    with attncli.watch(cell, optimizer) as run:
        for _ in range(20):
            state = cell(torch.ones(2, 3), state.detach())
            optimizer.zero_grad()
            state.pow(2).mean().backward()
            optimizer.step()
        assert len(run.monitor.program.entries) < 12


def test_a_script_that_looks_at_its_loss_behind_backward_is_not_stopped() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    skipped = 0
    with attncli.watch(model, optimizer) as run:
        for number in range(6):
            x = torch.full((2, 4), float("nan") if number == 3 else 1.0)
            loss = model(x).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            if loss.isfinite():
                optimizer.step()
            else:
                skipped += 1
    assert (skipped, run.monitor.faults, run.report.verdict) == (1, 0, "clean")


def test_minus_infinity_in_a_batch_is_bad_data_and_no_mask() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def train() -> None:
        for number in range(4):
            x = (torch.rand(8, 4) * (number != 2)).log()
            loss = model(x.detach().clone()).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with pytest.raises(attncli.TrainingFault) as caught, attncli.watch(model, optimizer):
        train()
    assert caught.value.report.origins
    assert {one.cause for one in caught.value.report.origins} <= {"bad-input", "log-of-zero"}
    assert str(caught.value.report) in str(caught.value)


def test_a_training_in_a_thread_is_watched() -> None:
    seen: list[Any] = []
    with attncli.watch(every=2) as run:
        thread = threading.Thread(target=lambda: seen.extend(trained(watched=False)))
        thread.start()
        thread.join()
    assert run.report.run["training"]["seen"] == 6
    assert same(seen, trained(watched=False))
