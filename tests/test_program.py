"""A step as a flat program: rerun without the code, it shows what the first run showed, bit by bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nan_faults import FAULTS, Fault
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from attncli.errors import AttncliError
from attncli.trace.nan import Found, find
from attncli.trace.program import to_plain
from attncli.trace.reading import program_of
from attncli.trace.recorder import Recorded, Recorder
from attncli.trace.rerun import Rerun
from attncli.trace.steps import NOTHING_BEFORE, Before

Step = Callable[[Any], Any]
CPU = torch.device("cpu")


def recorded(model: Any, step: Step, **settings: Any) -> tuple[Found, Recorded]:
    """What the search found in the step, and the record of it; the program has been JSON in between."""
    recorder = Recorder()
    found = find(model, step, beside=recorder, **settings)
    record = recorder.recorded()
    text = json.dumps(to_plain(record.program), allow_nan=False)
    return found, record._replace(program=program_of(json.loads(text), "the record"))


def rerun_of(record: Recorded) -> Rerun:
    return Rerun(record.program, record.leaves, record.random, device=CPU, trust=True)


def found_again(record: Recorded) -> Found:
    step = rerun_of(record)
    before = Before(record.program.steps_before, record.program.moved)
    with torch.random.fork_rng():
        return find(step.model, step, backward=False, inputs=step.inputs, before=before)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(
        first.detach().contiguous().view(-1).view(torch.uint8),
        second.detach().contiguous().view(-1).view(torch.uint8),
    )


def assert_same_results(model: nn.Module, result: Any, step: Rerun, again: Any) -> None:
    """Outputs, gradients, parameters and buffers of two runs."""
    results = (
        {"": (result, again)} if isinstance(result, Tensor) else {n: (result[n], again[n]) for n in result}
    )
    for name, (first, second) in results.items():
        assert same_bits(first, second), name
    mine, theirs = dict(model.named_parameters()), dict(step.model.named_parameters())
    assert list(mine) == list(theirs)
    for name, parameter in mine.items():
        assert same_bits(parameter, theirs[name]), name
        assert (parameter.grad is None) == (theirs[name].grad is None), name
        if parameter.grad is not None:
            assert same_bits(parameter.grad, theirs[name].grad), f"gradient of {name}"
    buffers = dict(step.model.named_buffers())
    for name, buffer in model.named_buffers():
        assert same_bits(buffer, buffers[name]), name


class Gpt(nn.Module):
    """Two layers of causal attention, tied embeddings, dropout and a counter of calls."""

    def __init__(self, width: int = 16, vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v = (nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(3))
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.2)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(tokens)
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            x = x + self.drop(functional.scaled_dot_product_attention(q(x), k(x), v(x), is_causal=True))
            x = self.norm(x).relu_()
        return self.head(x)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_every_fault_is_found_again_in_its_record(fault: Fault) -> None:
    torch.manual_seed(0)
    found, record = recorded(*fault.build(False))
    again = found_again(record)
    # Compared as text: NaN is not itself.
    assert repr(again.origins) == repr(found.origins)
    assert again.operators == found.operators
    assert again.notes == found.notes


def test_the_loss_and_the_gradients_are_those_of_a_run_that_nobody_watched() -> None:
    torch.manual_seed(0)
    model, tokens = Gpt(), torch.randint(11, (3, 7))

    def step(model: nn.Module) -> Tensor:
        logits = model(tokens)
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    state = torch.get_rng_state()
    _, record = recorded(model, step)
    model.zero_grad()
    model.calls.zero_()
    torch.set_rng_state(state)
    loss = step(model)
    loss.backward()
    again = rerun_of(record)
    with torch.random.fork_rng():
        assert_same_results(model, loss, again, again(again.model))
    assert again.model.head.weight is again.model.embed.weight
    assert again.program.random


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_an_optimiser_step_leaves_the_same_parameters(optimizer: Any) -> None:
    torch.manual_seed(0)
    model, tokens = Gpt(), torch.randint(11, (3, 7))
    stepper = optimizer(model.parameters(), lr=0.1)

    def step(model: nn.Module) -> Tensor:
        stepper.zero_grad()
        loss = model(tokens).logsumexp(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        return loss.detach()

    step(model)  # so that there is a state, and gradients from before
    found, record = recorded(model, step)
    again = rerun_of(record)
    with torch.random.fork_rng():
        result = again(again.model)
    assert_same_results(model, found.result, again, result)
    assert len(record.program.optimizers) == 1


def test_a_closure_runs_inside_its_optimiser_step() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    stepper = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def step(model: nn.Module) -> Tensor:
        def closure() -> Tensor:
            stepper.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        return stepper.step(closure).detach()

    found, record = recorded(model, step)
    again = rerun_of(record)
    assert_same_results(model, found.result, again, again(again.model))
    assert found_again(record).operators == found.operators


def test_running_statistics_views_and_writes_in_place_are_repeated() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.register_buffer("cache", torch.zeros(6, 4), persistent=False)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            self.cache[:3].copy_(x.detach()[:3])
            rows = self.cache.view(2, 3, 4)
            rows[0].mul_(2)
            wide = self.cache[:1].expand(5, 4)
            hidden = self.out(self.norm(x)) + wide + x.t().contiguous().t()
            hidden[0].fill_(1.0)
            hidden.add_(1).clamp_(min=0)
            return {"loss": hidden.square().mean(), "rows": rows[0].clone(), "view": hidden[::2]}

    torch.manual_seed(0)
    model, x = Written(), torch.randn(5, 4)
    found, record = recorded(model, lambda model: model(x))
    again = rerun_of(record)
    assert_same_results(model, found.result, again, again(again.model))
    assert "cache" not in again.model.state_dict()
    assert torch.equal(again.model.norm.running_mean, model.norm.running_mean)


def test_a_buffer_that_is_exchanged_is_exchanged_again() -> None:
    class Average(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + super().forward(x).mean(0).detach()
            return (x - self.mean).square().mean() + self.bias.sum()

    model, x = Average(), torch.randn(5, 4)
    found, record = recorded(model, lambda model: model(x))
    again = rerun_of(record)
    for _ in range(2):  # the second run starts where the first did
        again.model.mean = torch.full((4,), math.nan)
        assert_same_results(model, found.result, again, again(again.model))


def test_memory_is_kept_as_it_was_when_it_was_first_read() -> None:
    model, x = nn.Linear(2, 2), torch.ones(3, 2)

    def step(model: nn.Module) -> Tensor:
        result = model(x).detach().sum()
        x.mul_(math.nan)
        return result

    found, record = recorded(model, step)
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))
    assert next(tensor for key, tensor in record.leaves.items() if key.startswith("input")).eq(1).all()


def test_strides_are_kept() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2), torch.randn(5, 3).t()
    found, record = recorded(model, lambda model: model(x).sum())
    view = record.program.views[dict(record.program.inputs)["input"]]
    assert (view.shape, view.stride) == ((3, 5), (1, 3))
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))


def test_of_a_large_tensor_only_what_is_read_is_kept() -> None:
    data, model = torch.arange(4_000_000, dtype=torch.float32), nn.Linear(4, 1)
    found, record = recorded(model, lambda model: model(data[2_000_000:2_000_004] * 1e-6).sum())
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))

    view = data[3_000_001:3_000_005]
    found, record = recorded(
        model, lambda model: (model(view * 1e-6) + view.as_strided((1,), (1,), 9).sum()).sum()
    )
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))

    found, record = recorded(model, lambda model: model(view * 1e-6).sum())
    assert sum(leaf.size for leaf in record.program.leaves if leaf.kind != "parameter") <= 128
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))


def test_a_view_that_nobody_saw_being_made_is_one_of_its_memory() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 4), torch.randn(3, 4)

    def step(model: nn.Module) -> Tensor:
        hidden = model(x).detach() * 2
        with _disable_current_modes():
            row = hidden[1:2, ::2]
        row.add_(1)
        return hidden.sum()

    found, record = recorded(model, step)
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))
    assert any(view.of is not None for view in record.program.views.values())


def test_a_generator_of_ones_own_starts_where_it_stood() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    found, record = recorded(
        None, lambda _: torch.rand(4, generator=generator) + torch.randn(4, generator=generator)
    )
    again = rerun_of(record)
    for _ in range(2):
        assert same_bits(found.result, again(again.model))


def test_complex_numbers_and_their_views_are_repeated() -> None:
    x = torch.randn(4, dtype=torch.complex64)

    def step(_: Any) -> Tensor:
        return (x.conj() * (2 + 1j)).imag + torch.view_as_real(x.conj().resolve_conj())[:, 0] + x.conj().imag

    found, record = recorded(None, step)
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))


def test_code_that_stops_at_nan_stops_again_and_its_cure_is_proved() -> None:
    layer = nn.Linear(4, 4)

    def step(model: nn.Module) -> Tensor:
        loss = torch.log(model(torch.zeros(2, 4)).square().sum() * 0 - 1)
        if torch.isnan(loss):
            raise FloatingPointError("the loss is NaN")
        return loss

    found, record = recorded(layer, step)
    again = found_again(record)
    assert again.notes == found.notes == ("the step raised FloatingPointError: the loss is NaN",)
    assert (
        [(o.op, o.confirmed) for o in again.origins]
        == [("log", True)]
        == [(o.op, o.confirmed) for o in found.origins]
    )


def test_an_operator_that_raises_raises_again() -> None:
    def step(_: Any) -> Tensor:
        return torch.linalg.cholesky(torch.full((2, 2), 0.0) / 0)

    found, record = recorded(None, step)
    assert record.program.fails
    again = found_again(record)
    assert repr(again.origins) == repr(found.origins)
    assert again.notes == found.notes


def test_an_error_that_the_step_catches_leaves_no_operator_behind() -> None:
    def step(_: Any) -> Tensor:
        x = torch.ones(2, 2)
        try:
            x = torch.linalg.cholesky(-x)
        except torch.linalg.LinAlgError:
            x = x + 1
        return x.sum()

    found, record = recorded(None, step)
    again = rerun_of(record)
    assert same_bits(found.result, again(again.model))
    assert found_again(record).operators == found.operators


def test_the_second_of_two_runs_is_the_one_that_is_recorded() -> None:
    model, recorder = nn.Linear(2, 2), Recorder()
    with pytest.raises(ZeroDivisionError):
        find(model, lambda model: model(torch.ones(1, 2)).sum() / (1 // 0), beside=recorder)
    found = find(model, lambda model: model(torch.ones(3, 2)).sum(), beside=recorder)
    again = rerun_of(recorder.recorded())
    assert same_bits(found.result, again(again.model))


def test_a_record_says_which_line_and_module_and_gradient_an_operator_stood_for() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Sigmoid()))
    _, record = recorded(model, lambda model: model(torch.ones(1, 2)).sum())
    operators = record.program.operators
    sigmoid = next(n for n, one in enumerate(operators) if one.name == "aten.sigmoid.default")
    assert operators[sigmoid].module == "1.0"
    assert operators[sigmoid].place is not None
    assert operators[sigmoid].place[0].endswith("test_program.py")
    backward = next(one for one in operators if one.name == "aten.sigmoid_backward.default")
    assert (backward.backward, backward.forward) == (True, sigmoid)


def test_what_an_earlier_step_threw_far_out_is_told_to_the_rerun() -> None:
    model = nn.Linear(2, 2)
    before = Before(7, {"weight": (1.0, 1e30, 7)})
    _, record = recorded(model, lambda model: model(torch.ones(1, 2)).sum(), before=before)
    assert (record.program.steps_before, record.program.moved) == tuple(before)
    _, record = recorded(model, lambda model: model(torch.ones(1, 2)).sum())
    assert (record.program.steps_before, record.program.moved) == tuple(NOTHING_BEFORE)


def sparse_gradient(model: nn.Module) -> Tensor:
    return nn.Embedding(4, 2, sparse=True)(torch.tensor([1])).sum()


def nested_tensor(model: nn.Module) -> Tensor:
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    return nn.Linear(4, 4)(torch.nested.nested_tensor(rows, layout=torch.jagged)).values().mean()


def sparse_matrix(model: nn.Module) -> Tensor:
    return torch.sparse.mm(torch.eye(3).to_sparse(), torch.ones(3, 2)).sum()


def higher_order(model: nn.Module) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 1, 16, 16)
    return flex_attention(q, q, q).sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (sparse_gradient, "layout sparse_coo"),
        (nested_tensor, "a NestedTensor, which is made of other tensors"),
        (sparse_matrix, "layout sparse_coo"),
        (higher_order, "a higher-order operator"),
    ],
)
def test_what_cannot_be_written_down_is_refused_with_the_reason_and_the_search_goes_on(
    step: Step, reason: str
) -> None:
    recorder = Recorder()
    found = find(nn.Linear(2, 2), step, beside=recorder)
    assert found.raised is None
    with pytest.raises(AttncliError, match="the step cannot be written down") as error:
        recorder.recorded()
    assert reason in str(error.value)


def test_a_recorder_that_heard_nothing_says_so() -> None:
    with pytest.raises(AttncliError, match="no step was recorded"):
        Recorder().recorded()
