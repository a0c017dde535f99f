"""After `nan_check` all is as one plain run of the step leaves it: compared with a deep copy that ran it without."""

from __future__ import annotations

import copy
import gc
import math
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import attncli
from attncli.records import Report


class Model(nn.Module):
    """Attention, dropout, two norms (one with running statistics), a buffer that is counted up, one that is replaced.

    `fault`: None, "nan weight", "log" (the loss is −Inf), "aside" (a buffer is, the loss and all gradients are finite),
    or "silent" (a square that overflows gives zeros: all is finite).
    """

    def __init__(self, fault: str | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 1)
        self.norm, self.drop, self.last = nn.BatchNorm1d(16), nn.Dropout(0.2), nn.LayerNorm(16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("aside", torch.zeros(()))
        self.fault = fault
        if fault == "nan weight":
            with torch.no_grad():
                self.out.weight[3, 2] = math.nan

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        self.seen += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        probs = self.drop(((q @ k.mT) / 2).softmax(-1))
        x = x + noise * self.out((probs @ v).transpose(1, 2).reshape(b, t, 16))
        x = self.layer(self.norm(x.transpose(1, 2)).transpose(1, 2))
        if self.fault == "log":
            x = x + (x.detach()[0, 0, 0] * 0).log()
        if self.fault == "aside":
            self.aside.copy_((x.detach()[0, 0, 0] * 0).log())
        if self.fault == "silent":
            big = x * 1e30
            x = x + 3 * big.roll(1, -1) * torch.rsqrt((big * big).mean(-1, keepdim=True))
        value: Tensor = self.head(self.last(x)).square().mean()
        return value


class Bench(NamedTuple):
    """A model with what trains it, so that all of it can be copied together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scaler: Any
    x: Tensor


def bench(
    fault: str | None = None, optimizer: str | None = "AdamW", *, lr: float = 1e-2, scaled: bool = False
) -> Bench:
    torch.manual_seed(0)
    model = Model(fault)
    stepper = getattr(torch.optim, optimizer)(model.parameters(), lr=lr) if optimizer else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1) if scaled else None
    return Bench(model, stepper, scaler, torch.randn(2, 6, 16))


Step = Callable[[Bench, nn.Module], Any]


# --- what is compared ---------------------------------------------------------------------------------


def same(first: Any, second: Any, path: str = "") -> None:
    """Bit for bit, NaN equal to NaN; raises with the path of the first difference."""
    assert type(first) is type(second), f"{path}: {first} {second}"
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype, path
        assert first.shape == second.shape, path
        assert first.requires_grad == second.requires_grad, path
        equal = torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
        assert equal, f"{path}: other values"
    elif isinstance(first, np.ndarray):
        assert np.array_equal(first, second), path
    elif isinstance(first, dict):
        assert list(first) == list(second), path
        for key in first:
            same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{path}.{number}")
    else:
        assert first == second, path


def inside(of: Bench) -> dict[str, Any]:
    """Values of everything that a step may change."""
    model = of.model
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "requires grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {
            name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()
        },
        "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
        "training": [module.training for module in model.modules()],
        "hooks": [
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
            for module in model.modules()
        ],
        "tensor hooks": [len(p._backward_hooks or ()) for p in model.parameters()],
        "grad hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "optimizer": copy.deepcopy(of.optimizer.state_dict()) if of.optimizer else None,
        "scaler": copy.deepcopy(of.scaler.state_dict()) if of.scaler else None,
        "input": of.x.detach().clone(),
        "input gradient": None if of.x.grad is None else of.x.grad.clone(),
    }


def chances() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": state}


def around() -> dict[str, Any]:
    """All global state that checking changes, or might."""
    modules = nn.modules.module
    return {
        "hooks before": len(modules._global_forward_pre_hooks),
        "hooks after": len(modules._global_forward_hooks),
        "hooks backward": len(modules._global_backward_hooks) + len(modules._global_backward_pre_hooks),
        "always called": len(modules._global_forward_hooks_always_called),
        "optimizer hooks": len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": len(_get_current_function_mode_stack()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "stance": torch._dynamo.eval_frame._stance.stance,
        "saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """The encoder layer's fast path is another kernel, which checking turns off: off for both."""
    before, threads = chances(), torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_num_threads(1)  # tensors this small only wait for a second thread
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
    torch.set_rng_state(before["torch"])


def seed() -> None:
    torch.manual_seed(11)
    random.seed(12)
    np.random.seed(13)


def copied(made: Bench) -> Bench:
    """A deep copy, with the gradients that copying a parameter leaves out."""
    other = copy.deepcopy(made)
    for mine, theirs in zip(made.model.parameters(), other.model.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    return other


def assert_like_one_run(
    made: Bench, step: Step, *, twice: int = 1, plain: Callable[[Any], Any] | None = None, **options: Any
) -> Report | None:
    """Runs the step on a copy without attncli, and on `made` with it; the report, or None where both raise.

    `plain`: what the plain run does with what the step returns, as `nan_check` does itself.
    """
    other = copied(made)
    seed()
    failure = result = report = None
    for _ in range(twice):
        try:
            result = step(other, other.model)
            if plain is not None:
                plain(result)
        except Exception as error:  # noqa: BLE001 - compared with that of the checked run
            failure = error
    expected, drawn = inside(other), chances()
    places = {name: id(p) for name, p in made.model.named_parameters()}
    surroundings = around()
    seed()
    for _ in range(twice):
        if failure is None:
            report = attncli.nan_check(made.model, lambda model: step(made, model), **options)
        else:
            try:
                report = attncli.nan_check(made.model, lambda model: step(made, model), **options)
            except type(failure) as error:
                assert str(error) == str(failure)  # noqa: PT017 - it need not raise: the origin may be found
    assert around() == surroundings
    same(inside(made), expected)
    same(chances(), drawn)
    assert {name: id(p) for name, p in made.model.named_parameters()} == places
    return report


FAULTS = (None, "nan weight", "aside", "silent")
CASES = pytest.mark.parametrize(
    ("fault", "confirm"),
    [(fault, True) for fault in FAULTS] + [(None, False), ("aside", False)],
)
BOTH = pytest.mark.parametrize("confirm", [True, False], ids=["confirm", "no-confirm"])


def assert_told(report: Report | None, fault: str | None, confirm: bool) -> None:
    assert report is not None
    if fault is None:
        assert report.origins == ()
    elif fault != "silent" or confirm:
        assert len(report.origins) >= 1


# --- forward and backward -----------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@CASES
def test_a_forward_pass_is_that_of_one_plain_run(fault: str | None, train: bool, confirm: bool) -> None:
    made = bench(fault)
    made.model.train(train)
    report = assert_like_one_run(made, lambda b, m: m(b.x), backward=False, confirm=confirm)
    assert_told(report, fault, confirm)


@CASES
def test_a_forward_pass_without_gradients_is_that_of_one_plain_run(fault: str | None, confirm: bool) -> None:
    made = bench(fault)

    def step(b: Bench, model: nn.Module) -> Any:
        with torch.no_grad():
            return model(b.x)

    assert_told(assert_like_one_run(made, step, confirm=confirm), fault, confirm)


@CASES
def test_gradients_are_those_of_one_backward_pass(fault: str | None, confirm: bool) -> None:
    made = bench(fault)
    made.x.requires_grad_()
    report = assert_like_one_run(
        made, lambda b, m: m(b.x), plain=lambda loss: loss.backward(), confirm=confirm
    )
    assert_told(report, fault, confirm)
    assert all(p.grad is not None for p in made.model.parameters())


@CASES
def test_gradients_that_were_there_are_added_to_once(fault: str | None, confirm: bool) -> None:
    """Accumulation: the tensors of the gradients stay the same ones, too."""
    made = bench(fault)
    for parameter in made.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    gradients = [parameter.grad for parameter in made.model.parameters()]
    assert_like_one_run(made, lambda b, m: m(b.x), plain=lambda loss: loss.backward(), confirm=confirm)
    assert all(p.grad is g for p, g in zip(made.model.parameters(), gradients, strict=True))


@CASES
def test_two_micro_batches_are_accumulated_as_in_plain_runs(fault: str | None, confirm: bool) -> None:
    def step(b: Bench, model: nn.Module) -> None:
        for part in b.x:
            (model(part[None].expand(2, -1, -1)) / 2).backward()

    assert_like_one_run(bench(fault), step, confirm=confirm)


@CASES
def test_a_second_check_goes_on_from_where_the_first_ended(fault: str | None, confirm: bool) -> None:
    assert_like_one_run(bench(fault), training, twice=2, confirm=confirm)


@BOTH
def test_frozen_parameters_stay_frozen_and_without_gradient(confirm: bool) -> None:
    made = bench("log")
    made.model.get_submodule("qkv").requires_grad_(False)
    assert_like_one_run(made, lambda b, m: m(b.x), plain=lambda loss: loss.backward(), confirm=confirm)
    assert all(p.grad is None for p in made.model.get_submodule("qkv").parameters())


# --- whole training steps -----------------------------------------------------------------------------


def training(b: Bench, model: nn.Module) -> None:
    """A step of its own, which returns nothing: clipping, and a loss scaler where there is one."""
    assert b.optimizer is not None
    b.optimizer.zero_grad()
    loss = model(b.x)
    if b.scaler is not None:
        b.scaler.scale(loss).backward()
        b.scaler.unscale_(b.optimizer)
    else:
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    if b.scaler is not None:
        b.scaler.step(b.optimizer)
        b.scaler.update()
    else:
        b.optimizer.step()


@pytest.mark.parametrize(
    ("fault", "confirm", "optimizer"),
    [
        (fault, True, optimizer)
        for fault in ("aside", "silent")
        for optimizer in ("AdamW", "SGD", "RMSprop", "Adagrad")
    ]
    + [("nan weight", True, "AdamW"), (None, True, "AdamW"), ("aside", False, "AdamW")],
)
def test_a_training_step_is_taken_once(fault: str | None, optimizer: str, confirm: bool) -> None:
    report = assert_like_one_run(bench(fault, optimizer), training, confirm=confirm)
    assert_told(report, fault, confirm)


@CASES
def test_a_later_training_step_starts_from_the_states_of_the_optimiser(
    fault: str | None, confirm: bool
) -> None:
    """Moments and step counts exist already, and are written to in place."""
    made = bench(fault)
    for parameter in made.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    assert made.optimizer is not None
    made.optimizer.step()
    assert_like_one_run(made, training, confirm=confirm)


@BOTH
@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_several_steps_with_a_schedule_are_taken_once(rate: float, confirm: bool) -> None:
    """The schedule lies outside of the step: it is made anew for each."""

    def step(b: Bench, model: nn.Module) -> None:
        assert b.optimizer is not None
        for number in range(3):
            for group in b.optimizer.param_groups:
                group["lr"] = rate / (number + 1)
            training(b, model)

    assert_like_one_run(bench(None, lr=rate), step, confirm=confirm)


@CASES
def test_a_step_with_a_loss_scaler_is_taken_once(fault: str | None, confirm: bool) -> None:
    """The scaler grows, or backs off, exactly once."""
    assert_like_one_run(bench(fault, scaled=True), training, confirm=confirm)


@CASES
def test_fused_and_listwise_optimisers_are_taken_back(fault: str | None, confirm: bool) -> None:
    for options in ({"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        model = Model(fault)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]
        assert_like_one_run(Bench(model, optimizer, None, torch.randn(2, 6, 16)), training, confirm=confirm)


@CASES
def test_a_scheduler_inside_the_step_is_stepped_once(fault: str | None, confirm: bool) -> None:
    """The learning rate that it leaves is that after one step."""
    made = bench(fault, "SGD")
    assert made.optimizer is not None
    schedules: dict[int, Any] = {}

    def step(b: Bench, model: nn.Module) -> None:
        training(b, model)
        assert b.optimizer is not None
        schedule = schedules.setdefault(
            id(b.optimizer), torch.optim.lr_scheduler.ExponentialLR(b.optimizer, 0.5)
        )
        schedule.step()

    assert_like_one_run(made, step, confirm=confirm)


@CASES
def test_buffers_that_are_replaced_are_those_of_one_run(fault: str | None, confirm: bool) -> None:
    made = bench(fault)
    assert_like_one_run(made, lambda b, m: m(b.x), backward=False, confirm=confirm)
    assert made.model.get_buffer("seen").item() == 1
    assert made.model.get_submodule("norm").num_batches_tracked.item() == 1


# --- steps that raise ---------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("fault", [None, "nan weight", "log"])
@pytest.mark.parametrize("stage", ["forward", "backward", "optimizer"])
def test_a_step_that_raises_leaves_what_it_leaves_without_a_check(
    stage: str, fault: str | None, confirm: bool
) -> None:
    def step(b: Bench, model: nn.Module) -> None:
        loss = model(b.x)
        if stage == "forward":
            raise ValueError("after the forward pass")
        loss.backward()
        if stage == "backward":
            raise ValueError("after the backward pass")
        assert b.optimizer is not None
        b.optimizer.step()
        raise ValueError("after the update")

    assert_like_one_run(bench(fault), step, confirm=confirm)


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_and_leaves_nothing(error: type[BaseException], confirm: bool) -> None:
    made, surroundings = bench("nan weight"), around()

    def step(model: nn.Module) -> None:
        model(made.x)
        raise error

    with pytest.raises(error):
        attncli.nan_check(made.model, step, confirm=confirm)
    assert around() == surroundings


def test_what_a_healthy_step_raises_is_raised() -> None:
    made = bench()

    def step(model: nn.Module) -> None:
        model(made.x)
        raise ZeroDivisionError("of my own")

    with pytest.raises(ZeroDivisionError, match="of my own"):
        attncli.nan_check(made.model, step)


@BOTH
def test_an_error_that_has_nothing_to_do_with_nan_is_raised(confirm: bool) -> None:
    """A harmless −Inf that was chosen away before is no reason to keep the user's own error back."""

    def step(model: nn.Module) -> None:
        logs = torch.zeros(3).log()
        model(made.x + torch.where(logs < -1, 0.0, logs).sum())
        raise AttributeError("no such name")

    made = bench()
    with pytest.raises(AttributeError, match="no such name"):
        attncli.nan_check(made.model, step, confirm=confirm)


def test_a_step_that_stops_at_its_own_nan_check_is_answered_with_the_origin() -> None:
    made = bench("nan weight")

    def step(model: nn.Module) -> Tensor:
        loss: Tensor = model(made.x)
        if not torch.isfinite(loss):
            raise FloatingPointError("loss is nan")
        return loss

    report = attncli.nan_check(made.model, step)
    assert [origin.tensor for origin in report.origins] == ["out.weight"]
    assert any("FloatingPointError: loss is nan" in note for note in report.notes)


@pytest.mark.parametrize("fails", ["second", "third"])
def test_a_repetition_that_raises_leaves_nothing(fails: str) -> None:
    """A step that cannot be repeated (an exhausted iterator) is not proved; the first run stands."""
    made = bench("log")
    batches = iter([made.x] * (1 if fails == "second" else 2))
    plain = copied(made)
    seed()
    plain.model(plain.x).backward()
    seed()
    report = attncli.nan_check(made.model, lambda model: model(next(batches)))
    same(inside(made), inside(plain))
    assert len(report.origins) == 1
    assert report.origins[0].confirmed is not True


# --- kinds of models ----------------------------------------------------------------------------------


@BOTH
def test_tied_and_shared_weights_are_restored_once_and_stay_tied(confirm: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Flatten(0))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30, momentum=0.9)

    def step(b: Bench, model: nn.Module) -> None:
        assert b.optimizer is not None
        for _ in range(2):
            b.optimizer.zero_grad()
            model(b.x).square().sum().backward()
            b.optimizer.step()

    assert_like_one_run(Bench(model, optimizer, None, torch.randn(3, 16)), step, confirm=confirm)
    assert model[2].weight is model[0].weight


@BOTH
def test_a_step_that_writes_to_views_of_parameters_is_taken_back(confirm: bool) -> None:
    """Two slices of one storage, and data set without autograd."""

    def step(b: Bench, model: nn.Module) -> Any:
        weight = model.get_parameter("out.weight")
        with torch.no_grad():
            weight[:4].add_(1)
            weight[8:].T.mul_(2)
            model.get_parameter("out.bias").data.fill_(0.25)
        return model(b.x)

    for fault in ("log", None):
        assert_like_one_run(bench(fault), step, backward=False, confirm=confirm)


@BOTH
def test_a_step_that_turns_dropout_on_and_gradients_off_leaves_it_so(confirm: bool) -> None:
    def step(b: Bench, model: nn.Module) -> Any:
        model.train(not model.training)
        model.get_parameter("qkv.weight").requires_grad_(False)
        return model(b.x)

    made = bench("log")
    made.model.eval()
    assert_like_one_run(made, step, backward=False, confirm=confirm)
    assert made.model.training


@BOTH
def test_inputs_that_a_step_changes_in_place_are_changed_once(confirm: bool) -> None:
    """Every repetition starts from the inputs as they were; afterwards they are as after one run."""

    def step(b: Bench, model: nn.Module) -> Any:
        b.x.mul_(3.0)
        return model(b.x)

    for fault in FAULTS:
        assert_like_one_run(bench(fault), step, backward=False, confirm=confirm)


@BOTH
@pytest.mark.parametrize("grad", [True, False])
def test_the_grad_mode_of_the_caller_stays(grad: bool, confirm: bool) -> None:
    with torch.set_grad_enabled(grad):
        made = bench("log")
        assert_like_one_run(made, lambda b, m: m(b.x), backward=False, confirm=confirm)
        assert torch.is_grad_enabled() == grad


@BOTH
def test_inference_mode_inside_and_outside(confirm: bool) -> None:
    made = bench("log")

    def step(b: Bench, model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(b.x)

    made.model.eval()
    assert_told(assert_like_one_run(made, step, backward=False, confirm=confirm), "log", confirm)


def test_the_fast_path_is_on_again_for_those_who_had_it_on() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    for fault in FAULTS:
        attncli.nan_check(bench(fault).model.eval(), lambda model: model(torch.randn(2, 6, 16)))
        assert torch.backends.mha.get_fastpath_enabled()


@BOTH
def test_memory_that_was_only_reserved_is_told_and_filled_no_more_than_in_the_step(confirm: bool) -> None:
    """Tensors that the caller reserved before the check keep their bits."""
    reserved = torch.full((4,), 7.0)

    def step(b: Bench, model: nn.Module) -> Any:
        made = torch.empty(4)
        made.copy_(reserved)
        return model(b.x) + made.sum()

    report = assert_like_one_run(bench(), step, backward=False, confirm=confirm)
    assert report is not None
    assert report.origins == ()
    assert torch.equal(reserved, torch.full((4,), 7.0))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_values_of_a_checked_run_are_those_of_a_plain_one(fault: str | None) -> None:
    """Bit for bit, in the run that the user's own step sees first."""
    made, losses = bench(fault), []

    def step(model: nn.Module) -> Tensor:
        loss: Tensor = model(made.x)
        losses.append(loss.detach().clone())
        return loss

    plain = copy.deepcopy(made)
    seed()
    expected = plain.model(plain.x).detach()
    seed()
    attncli.nan_check(made.model, step)
    same(losses[0], expected)


# --- memory -------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("backward", [False, True])
def test_a_healthy_check_holds_no_activation(backward: bool, confirm: bool) -> None:
    """No tensor of the step outlives it, without the help of the garbage collector."""
    kept: list[Any] = []

    def step(model: nn.Module) -> Tensor:
        hidden = model[1](model[0](x))
        kept.append(weakref.ref(hidden))
        probs = hidden.softmax(-1)
        kept.append(weakref.ref(probs))
        out: Tensor = model[2](probs * 3).sum()
        kept.append(weakref.ref(out))
        return out

    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(200, 64)
    gc.collect()
    gc.disable()
    try:
        report = attncli.nan_check(model, step, backward=backward, confirm=confirm)
        assert report.origins == ()
        assert len(kept) == 3
        assert [ref for ref in kept if ref() is not None] == []
    finally:
        gc.enable()


def test_activations_of_earlier_layers_are_let_go_while_a_healthy_check_runs() -> None:
    """Without gradients a layer's output is gone once the next layer has used it; single numbers may stay."""
    alive: list[int] = []
    refs: list[Any] = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(x).tanh()
            refs.append(weakref.ref(out))
            alive.append(sum(ref() is not None for ref in refs))
            return out

    model, x = nn.Sequential(*(Layer() for _ in range(8))), torch.randn(200, 64)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            attncli.nan_check(model, lambda m: m(x), backward=False)
    finally:
        gc.enable()
    assert max(alive) <= 2


def test_a_faulty_check_holds_nothing_but_its_report() -> None:
    kept: list[Any] = []

    def step(model: nn.Module) -> Tensor:
        hidden = model(x)
        kept.append(weakref.ref(hidden))
        out: Tensor = (hidden * 0).log().sum()
        kept.append(weakref.ref(out))
        return out

    model, x = nn.Linear(64, 64), torch.randn(200, 64)
    report = attncli.nan_check(model, step)
    assert len(report.origins) == 1
    gc.collect()
    assert [ref for ref in kept if ref() is not None] == []
