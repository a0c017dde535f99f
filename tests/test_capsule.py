"""Capsules: a faulty step in a folder, repeated from there in a process that has nothing of the user's code."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_program import Gpt
from torch import Tensor, nn
from torch.nn import functional

from attncli.api.capsules import capsule_recorder, check_capsule, replay_capsule, write_capsule
from attncli.api.report import Report
from attncli.errors import AttncliError
from attncli.trace.nan import Found, find
from attncli.trace.program import Operator, Program
from attncli.trace.stand_ins import stand_ins
from attncli.training import capsule

FILES = {"capsule.json", "model.safetensors", "batch.safetensors", "random.safetensors"}


def written(
    folder: Path, model: Any, step: Callable[[Any], Any], facts: dict[str, Any] | None = None, **settings: Any
) -> Found:
    recorder = capsule_recorder()
    found = find(model, step, beside=recorder, **settings)
    names = write_capsule(folder, recorder, model, {"origins": found.origins, **(facts or {})})
    assert {Path(name).name for name in names} == FILES == {entry.name for entry in folder.iterdir()}
    return found


def assert_same_origins(report: Report, found: Found) -> None:
    def shown(origins: Any) -> list[str]:  # as text: NaN is not itself
        return [repr({n: getattr(o, n) for n in o.__slots__ if n != "layer"}) for o in origins]

    assert shown(report.origins) == shown(found.origins)
    assert "the replay shows the same origins as the first run" in report.notes


# --- faults -------------------------------------------------------------------------------------------


class Unscaled(nn.Module):
    """Attention in float16 whose scores are not divided by √d."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer in (self.q, self.k):
                layer.weight.copy_(30 * torch.eye(32))
            self.embed.weight.normal_().mul_(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x)


def unscaled_attention() -> tuple[nn.Module, Callable[[Any], Any]]:
    tokens = torch.randint(8, (2, 6))
    return Unscaled().half(), lambda model: model(tokens).float().square().mean()


def sample_of_padding() -> tuple[nn.Module, Callable[[Any], Any]]:
    model, x = nn.Linear(8, 8), torch.randn(2, 5, 8)
    mask = torch.zeros(2, 1, 5)
    mask[1] = -math.inf

    def step(model: nn.Module) -> Tensor:
        hidden = model(x)
        return (torch.softmax(hidden @ hidden.mT + mask, -1) @ hidden).square().mean()

    return model, step


def log_of_zero_in_the_loss() -> tuple[nn.Module, Callable[[Any], Any]]:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)

    def step(model: nn.Module) -> Tensor:
        return -(torch.log(torch.relu(model(x) - 100)) * torch.tensor([0.0, 0.0, 1.0, 0.0])).mean()

    return model, step


def root_of_zero_in_the_gradient() -> tuple[nn.Module, Callable[[Any], Any]]:
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(3, 4)
    return model, lambda model: model(x).square().sum().sqrt()


def parameter_of_nan() -> tuple[nn.Module, Callable[[Any], Any]]:
    model, tokens = Gpt().eval(), torch.randint(11, (2, 5))
    with torch.no_grad():
        model.q[1].weight[3, 4] = math.nan
    return model, lambda model: model(tokens).square().mean()


def adam_in_float16() -> tuple[nn.Module, Callable[[Any], Any]]:
    model = nn.Linear(4, 4).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.weight.grad, model.bias.grad = torch.zeros_like(model.weight), torch.zeros_like(model.bias)
    return model, lambda _: optimizer.step()


FAULTS = {
    unscaled_attention: ("bmm", "overflow-scores", "forward"),
    sample_of_padding: ("_softmax", "masked-row", "forward"),
    log_of_zero_in_the_loss: ("log", "log-of-zero", "forward"),
    root_of_zero_in_the_gradient: ("div", "singular-gradient", "backward"),
    parameter_of_nan: ("leaf", "bad-parameter", "parameter"),
    adam_in_float16: ("addcdiv", None, "optimizer"),
}


@pytest.mark.parametrize("build", FAULTS, ids=lambda build: build.__name__)
def test_a_fault_is_told_as_it_was_told_first(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, step = build()
    found = written(tmp_path / "capsule", model, step)
    report = replay_capsule(tmp_path / "capsule")
    assert_same_origins(report, found)
    (origin,) = report.origins
    op, cause, phase = FAULTS[build]
    assert (origin.op, origin.phase) == (op, phase)
    assert cause in (None, origin.cause)
    assert origin.confirmed
    assert report.exit_code() == 1
    assert (report.command, report.source["kind"]) == ("nan-check", "capsule")
    assert report.source["path"] == str(tmp_path / "capsule")
    assert report.run is not None
    assert report.run["operators"] == sum(found.operators.values())
    json.loads(report.to_json())


def test_a_healthy_step_is_clean_again(tmp_path: Path) -> None:
    model, tokens = Gpt(), torch.randint(11, (2, 5))
    written(tmp_path / "c", model, lambda model: model(tokens).square().mean())
    report = replay_capsule(tmp_path / "c")
    assert (report.origins, report.exit_code()) == ((), 0)


def test_the_replay_needs_nothing_of_the_code_that_wrote_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine.py").write_text(
        "import torch\n"
        "from attncli.trace.nan import find\n"
        "from attncli.api.capsules import capsule_recorder, write_capsule\n"
        "torch.set_num_threads(1)\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x):\n"
        "        return torch.log(self.inner(x) * 0 - 1)\n"
        "recorder, model = capsule_recorder(), Net()\n"
        "found = find(model, lambda m: m(torch.ones(2, 4)).sum(), beside=recorder)\n"
        "write_capsule('capsule', recorder, model, {'origins': found.origins})\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from attncli.api.capsules import replay_capsule\n"
        "report = replay_capsule('capsule')\n"
        "(o,) = report.origins\n"
        "print(o.op, o.module, o.source, o.confirmed, 'mine' in sys.modules, *report.notes, sep='|')\n"
    )
    root = str(Path(capsule.__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "mine.py"], cwd=home, check=True, env=variables)
    (home / "capsule").rename(elsewhere / "capsule")
    (home / "mine.py").unlink()
    told = subprocess.run(
        [sys.executable, "-c", script],
        cwd=elsewhere,
        check=True,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert told.stdout == "log||mine.py:10|True|False|the replay shows the same origins as the first run\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_of_transformers_is_repeated_without_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] = math.inf
    ids = torch.randint(30, (2, 7))
    found = written(tmp_path / "c", model, lambda model: model(input_ids=ids, labels=ids))
    report = replay_capsule(tmp_path / "c")
    assert_same_origins(report, found)
    assert [(o.tensor, o.layer) for o in report.origins] == [
        ("bert.encoder.layer.1.attention.self.query.weight", report.layers[1].id)
    ]
    assert {layer.heads for layer in report.layers} <= {None, 1, 2}


def test_dropout_draws_the_same_numbers_and_the_process_keeps_its_own(tmp_path: Path) -> None:
    def step(model: nn.Module) -> Tensor:
        kept = functional.dropout(torch.ones(64), 0.5) * model.weight[0, 0]
        return (kept / kept.detach().sum().frac()).mean() + torch.where(
            kept == 0, kept.detach() / kept, kept
        ).sum()

    torch.manual_seed(3)
    found = written(tmp_path / "c", nn.Linear(1, 1), step)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    report = replay_capsule(tmp_path / "c")
    assert_same_origins(report, found)  # also the place of the first bad element
    assert torch.equal(torch.get_rng_state(), state)


# --- what stands in the folder ------------------------------------------------------------------------


def test_facts_of_the_training_are_told_with_whether_the_replay_is_the_same(tmp_path: Path) -> None:
    model, step = sample_of_padding()
    training = {
        "seen": 12,
        "fault": {"step": 12, "seen": "loss", "value": "nan"},
        "steps": [{"loss": math.nan}],
    }
    written(tmp_path / "c", model, step, {"training": training, "source": "train.py"})
    report = replay_capsule(tmp_path / "c")
    assert report.run is not None
    told = report.run["training"]
    assert told["replayed"] is True
    assert told["steps"] == [{"loss": "nan"}]
    assert report.source["script"] == "train.py"


def test_another_result_is_said_with_what_differs(tmp_path: Path) -> None:
    model, step = sample_of_padding()
    written(tmp_path / "c", model, step, {"training": {"seen": 1}})
    head = json.loads((tmp_path / "c" / "capsule.json").read_text())
    head["facts"]["origins"][0]["op"] = "bmm"
    head["environment"].update(torch="1.0", device="cuda:0", device_name="NVIDIA T4")
    (tmp_path / "c" / "capsule.json").write_text(json.dumps(head))
    report = replay_capsule(tmp_path / "c")
    assert report.run is not None
    assert report.run["training"]["replayed"] is False
    assert report.notes[0] == "the replay differs from the first run: op of origin 1: bmm then, _softmax now"
    assert report.notes[1] == "recorded on NVIDIA T4, replayed on cpu"
    assert report.notes[2].startswith("recorded with torch 1.0, replayed with torch ")
    head["facts"]["origins"] = []
    head["program"]["random"] = True
    (tmp_path / "c" / "capsule.json").write_text(json.dumps(head))
    notes = replay_capsule(tmp_path / "c").notes
    assert notes[0] == "the replay differs from the first run: 0 origins then and 1 origin now"
    assert any(note.startswith("its random numbers") for note in notes)


def test_the_model_lies_in_its_file_under_its_own_names(tmp_path: Path) -> None:
    model, tokens = Gpt(), torch.randint(11, (2, 5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model: nn.Module) -> Tensor:
        loss = model(tokens).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    written(tmp_path / "c", model, step)
    held = load_file(tmp_path / "c" / "model.safetensors")
    assert set(held) == set(before) - {"head.weight"}  # tied to the embedding
    assert all(torch.equal(held[name], before[name]) for name in held)
    assert load_file(tmp_path / "c" / "batch.safetensors")["input tokens"].equal(tokens.view(-1))


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_dtypes_that_safetensors_has_not_are_kept_as_bytes(tmp_path: Path) -> None:
    x = torch.randn(3, dtype=torch.complex64)
    y = torch.tensor([1.0, 2.0]).to(torch.float8_e5m2)
    small = torch.randn(2, dtype=torch.complex64).to(torch.complex32)

    def step(_: Any) -> Tensor:
        return (x / 0).abs().sum() + y.float().sum() + small.to(torch.complex64).real.sum()

    found = written(tmp_path / "c", None, step)
    head = json.loads((tmp_path / "c" / "capsule.json").read_text())
    assert sorted(head["stored"].values()) == ["complex32", "complex64", "float8_e5m2"]
    assert_same_origins(replay_capsule(tmp_path / "c"), found)


def test_an_older_capsule_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "c"
    written(target, *sample_of_padding())
    found = written(target, *log_of_zero_in_the_loss())
    assert_same_origins(replay_capsule(target), found)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(AttncliError, match=r"the folder holds other files \(notes.txt\)"):
        written(target, *sample_of_padding())
    assert_same_origins(replay_capsule(target), found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_an_empty_folder_is_taken_and_other_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    written(tmp_path / "empty", *sample_of_padding())
    written(tmp_path / "new" / "deep", *sample_of_padding())
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"of somebody else")
    for name, problem in (
        ("file", "it is a file, not a folder"),
        ("link", "it is a link to nothing"),
        ("weights", "the folder holds tensors but is no capsule"),
    ):
        with pytest.raises(AttncliError, match=problem):
            check_capsule(tmp_path / name)
        with pytest.raises(AttncliError, match=problem):
            written(tmp_path / name, *sample_of_padding())
    assert (tmp_path / "weights" / "model.safetensors").read_bytes() == b"of somebody else"
    check_capsule(tmp_path / "empty")
    check_capsule(tmp_path / "not there")


def test_a_capsule_that_cannot_be_written_whole_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "c"
    found = written(target, *log_of_zero_in_the_loss())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(capsule, "save_file", full)
        with pytest.raises(AttncliError, match="cannot be written: No space left on device"):
            written(target, *sample_of_padding())
    assert_same_origins(replay_capsule(target), found)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# --- hostile capsules ---------------------------------------------------------------------------------


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    written(tmp_path / "c", *sample_of_padding())
    return tmp_path / "c"


def altered(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """What is said of the capsule after a change to its JSON."""
    path = folder / "capsule.json"
    head = json.loads(path.read_text())
    change(head)
    path.write_text(json.dumps(head))
    return refusal(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(AttncliError) as error:
        replay_capsule(folder)
    assert str(error.value).startswith(f"{folder}: ")
    return str(error.value)


def set_op(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda head: head["program"]["operators"][2].update(op=name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("os.system.default", "not an operator of torch itself"),
        ("c10d.allreduce_.default", "not an operator of torch itself"),
        ("profiler._record_function_enter_new.default", "not an operator of torch itself"),
        ("aten.from_file.default", "which no training step needs"),
        ("aten._print.default", "which no training step needs"),
        ("aten.save.default", "is not in torch"),
        ("aten.no_such_operator.default", "is not in torch"),
        ("aten.mm.no_such_overload", "is not in torch"),
        ("aten.__class__.mro", "is not in torch"),
        ("aten.__dict__.clear", "is not in torch"),
        ("prims.__init__.__call__", "is not in torch"),
        ("aten.mm", "is no name of an operator"),
        ("aten.mm.default.x", "is no name of an operator"),
        ("aten.m m.default", "is no name of an operator"),
        ("", "is no name of an operator"),
    ],
)
def test_only_operators_that_compute_are_called(good: Path, name: str, problem: str) -> None:
    assert problem in altered(good, set_op(name))


def first(head: dict[str, Any], table: str) -> dict[str, Any]:
    found: dict[str, Any] = head["program"][table][0]
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another schema": (
        lambda head: head.update(schema="attncli-capsule/9"),
        "its schema is 'attncli-capsule/9'",
    ),
    "a schema of another type": (lambda head: head.update(schema=["x"] * 99), "its schema is ['x', 'x'"),
    "no program": (lambda head: head.pop("program"), "capsule.json has no program"),
    "a program that is none": (lambda head: head.update(program={}), "'modules' cannot be None"),
    "an argument of no slot": (
        lambda head: first(head, "operators").update(args=[{"slot": 10**6}]),
        "slot 1000000 is read before it is made",
    ),
    "a negative slot": (
        lambda head: first(head, "operators").update(args=[{"slot": -1}]),
        "a slot cannot be -1",
    ),
    "a slot of text": (
        lambda head: first(head, "operators").update(args=[{"slot": "0"}]),
        "a slot cannot be '0'",
    ),
    "a huge slot": (lambda head: first(head, "operators").update(out=[10**30]), "a slot cannot be 1000000"),
    "a module that is not there": (
        lambda head: first(head, "operators").update(module=99),
        "a module cannot be 99",
    ),
    "a forward operator behind": (
        lambda head: first(head, "operators").update(forward=5),
        "a forward operator cannot be 5",
    ),
    "a leaf without a tensor": (
        lambda head: first(head, "leaves").update(key="none"),
        "the tensor 'none' is missing",
    ),
    "a leaf of another size": (
        lambda head: first(head, "leaves").update(size=8),
        "and should have 8",
    ),
    "a view beyond its memory": (
        lambda head: first(head, "views").update(shape=[1 << 40], stride=[1]),
        "lies outside its memory",
    ),
    "a view of endless zeros": (
        lambda head: first(head, "views").update(shape=[1 << 40, 1 << 40], stride=[0, 0]),
        "lies outside its memory",
    ),
    "a negative stride": (lambda head: first(head, "views").update(stride=[-1, 1]), "a stride cannot be -1"),
    "an offset beyond": (lambda head: first(head, "views").update(offset=1 << 50), "lies outside its memory"),
    "a dtype that is none": (lambda head: first(head, "views").update(dtype="load"), "'load' is no dtype"),
    "a device that is none": (
        lambda head: first(head, "leaves").update(device="load"),
        "'load' is no device",
    ),
    "an argument of a new kind": (
        lambda head: first(head, "operators").update(args=[{"import": "os"}]),
        "'import' of an argument is not known",
    ),
    "a function as a dtype": (
        lambda head: first(head, "operators").update(args=[{"dtype": "load"}]),
        "'dtype' of an argument is not known",
    ),
    "a wrong number of arguments": (
        lambda head: first(head, "operators").update(args=[]),
        "operator 0, aten.",
    ),
    "more memory than there is": (
        lambda head: first(head, "operators").update(op="aten.zeros.default", args=[[1 << 50]], kwargs={}),
        "operator 0, aten.zeros.default, cannot be repeated here",
    ),
    "optimisers that overlap": (
        lambda head: head["program"].update(
            optimizers=[
                {"begins": 0, "ends": 3, "parameters": []},
                {"begins": 2, "ends": 5, "parameters": []},
            ]
        ),
        "its optimiser steps overlap",
    ),
    "a gradient of nothing": (
        lambda head: head["program"]["shown"].update(
            {"gradient of bias": head["program"]["shown"]["output"]}
        ),
        "gradient of bias does not fit the model",
    ),
    "a generator that is not there": (
        lambda head: first(head, "operators").update(kwargs={"generator": {"generator": 0}}),
        "there is no random generator 0",
    ),
    "a generator without a state": (
        lambda head: head["program"].update(generators=["cpu"]),
        "the state of random generator 0 is missing",
    ),
    "a tensor stored as another dtype": (
        lambda head: head.update(stored={"weight": "complex32"}),
        "is not stored as 'complex32'",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_program_is_refused_with_what_is_wrong(good: Path, name: str) -> None:
    change, problem = DAMAGES[name]
    assert problem in altered(good, change)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"schema": NaN}', "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_json_of_a_capsule_is_refused(good: Path, text: str) -> None:
    (good / "capsule.json").write_text(text, errors="surrogateescape")
    assert refusal(good)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_or_cut_file_is_named(good: Path, name: str) -> None:
    path = good / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert name in refusal(good)
    path.unlink()
    assert f"there is no {name} in it" in refusal(good)


def test_arguments_that_are_nested_without_end_are_refused(good: Path) -> None:
    head = json.loads((good / "capsule.json").read_text())
    head["program"]["operators"][0]["args"] = ["HERE"]
    text = json.dumps(head).replace('"HERE"', "[" * 400 + "]" * 400)
    (good / "capsule.json").write_text(text)
    assert refusal(good)


def test_no_capsule_at_all_is_said(tmp_path: Path) -> None:
    assert "there is no such folder" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "there is no capsule.json in it" in refusal(tmp_path / "empty")


def test_a_random_state_that_is_none_is_refused(good: Path) -> None:
    save_file({"cpu": torch.zeros(3, dtype=torch.uint8)}, good / "random.safetensors")
    assert "a random state is none that torch takes here" in refusal(good)


def test_names_that_mean_something_to_modules_are_only_names(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("forward", "_modules", "a b", "\x1b[31m", "__class__"):
                self._parameters[name] = nn.Parameter(torch.ones(2))
            self._modules["parameters"] = nn.Linear(2, 2)

    def step(model: nn.Module) -> Tensor:
        return sum(parameter.sum() for parameter in model._parameters.values()) / 0

    found = written(tmp_path / "c", Odd(), step)
    assert_same_origins(replay_capsule(tmp_path / "c"), found)


def test_whatever_is_changed_in_a_capsule_there_is_an_answer_or_a_message(good: Path) -> None:
    """A hundred random changes of the JSON; none may end in another error."""
    path = good / "capsule.json"
    text = path.read_text()
    choose = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        3,
        1 << 70,
        1.5,
        "x",
        "cuda",
        [],
        [[]],
        {},
        {"slot": 2},
        {"dtype": "float16"},
    ]
    for _ in range(100):
        head = json.loads(text)
        here: Any = head["program"]
        for _ in range(choose.randint(1, 6)):
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = choose.choice(keys)
            if not isinstance(here[key], (dict, list)) or not here[key] or choose.random() < 0.2:
                here[key] = choose.choice(values)
                break
            here = here[key]
        path.write_text(json.dumps(head))
        try:
            replay_capsule(good, confirm=False)
        except AttncliError as error:
            assert str(error).startswith(str(good))  # noqa: PT017 - most changes are refused, some mean nothing


# --- other devices and libraries ----------------------------------------------------------------------


def kernels(*names: str) -> Program:
    operators = tuple(Operator(f"aten.{name}.default", (), {}, ()) for name in names)
    return Program(operators, (), {}, (), device="cuda:0")


@pytest.mark.parametrize("masked", ["none", "causal", "bias"])
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn"])
def test_attention_kernels_of_a_gpu_are_computed_by_products(kernel: str, masked: str) -> None:
    if (kernel, masked) == ("flash", "bias"):
        pytest.skip("this kernel takes none")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 3, 5, 5, requires_grad=True) if masked == "bias" else None
    causal = masked == "causal"
    expected = functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [q, k, v], grad, retain_graph=True)
    name = f"_scaled_dot_product_{kernel}_attention"
    with stand_ins(kernels(name, f"{name}_backward"), torch.device("cpu"), "c") as replaced, torch.no_grad():
        forward, backward = (getattr(torch.ops.aten, one) for one in replaced)
        if kernel == "flash":
            out, lse, a, b, c, d, seed, offset, _ = forward(q, k, v, 0.0, causal)
            grads = backward(grad, q, k, v, out, lse, a, b, c, d, 0.0, causal, seed, offset)
        elif kernel == "efficient":
            out, lse, seed, offset = forward(q, k, v, bias, True, 0.0, causal)
            mask = [True, True, True, bias is not None]
            *grads, of_bias = backward(grad, q, k, v, bias, out, lse, seed, offset, 0.0, mask, causal)
            if bias is not None:
                torch.testing.assert_close(of_bias, torch.autograd.grad(expected, bias, grad)[0])
        else:
            out, lse, a, b, c, d, seed, offset, _ = forward(q, k, v, bias, True, 0.0, causal)
            grads = backward(grad, q, k, v, out, lse, seed, offset, bias, a, b, c, d, 0.0, causal)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(list(grads), list(wanted))
    with pytest.raises(NotImplementedError):
        forward(q, k, v, *([0.0, False] if kernel == "flash" else [None, True]))


def test_the_kernel_of_the_cpu_is_computed_by_products_elsewhere() -> None:
    from attncli.trace.stand_ins import _on_cpu, _on_cpu_backward

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.randn(2, 1, 5, 5)
    expected = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [q, k, v], grad)
    with torch.no_grad():
        out, lse = _on_cpu(q, k, v, attn_mask=mask, scale=0.3)
        grads = _on_cpu_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(list(grads), list(wanted))


def test_an_operator_that_the_device_has_not_is_named() -> None:
    program = kernels("_cudnn_rnn")
    with (
        pytest.raises(AttncliError, match=r"aten\._cudnn_rnn\.default does not run on cpu") as error,
        stand_ins(program, torch.device("cpu"), "c"),
    ):
        pass
    assert error.value.remedy == "Replay it with --device cuda."


def test_operators_of_a_library_need_trust(tmp_path: Path) -> None:
    (tmp_path / "ops_of_mine.py").write_text(
        "import torch\n"
        "@torch.library.custom_op('ops_of_mine::root', mutates_args=())\n"
        "def root(x: torch.Tensor) -> torch.Tensor:\n"
        "    return x.sqrt()\n"
    )
    first = (
        "import torch, ops_of_mine\n"
        "from attncli.trace.nan import find\n"
        "from attncli.api.capsules import capsule_recorder, write_capsule\n"
        "recorder, model = capsule_recorder(), torch.nn.Linear(2, 2)\n"
        "step = lambda m: torch.ops.ops_of_mine.root(m(torch.ones(1, 2)).detach() * 0 - 1).sum()\n"
        "found = find(model, step, beside=recorder)\n"
        "write_capsule('c', recorder, model, {'origins': found.origins})\n"
    )
    second = (
        "import sys\n"
        "from attncli.api.capsules import replay_capsule\n"
        "from attncli.errors import AttncliError\n"
        "for trust in (False, True):\n"
        "    try:\n"
        "        print(replay_capsule('c', trust=trust).origins[0].op)\n"
        "    except AttncliError as error:\n"
        "        print(error.problem, error.remedy, 'ops_of_mine' in sys.modules)\n"
        "(sys.modules.pop('ops_of_mine'), sys.path.remove('')) if '' in sys.path else None\n"
    )
    root = str(Path(capsule.__file__).parents[2])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((root, str(tmp_path)))}
    subprocess.run([sys.executable, "-c", first], cwd=tmp_path, check=True, env=variables)
    told = subprocess.run(
        [sys.executable, "-c", second],
        cwd=tmp_path,
        check=True,
        env=variables,
        capture_output=True,
        text=True,
    )
    refused, op = told.stdout.splitlines()
    assert refused.startswith("it calls ops_of_mine.root.default, which is not an operator of torch itself.")
    assert refused.endswith("pass --trust: that imports the library that defines it. False")
    assert op == "root"
    (tmp_path / "ops_of_mine.py").unlink()
    with pytest.raises(
        AttncliError, match="the library ops_of_mine, which defines its operators, cannot be imported"
    ):
        replay_capsule(tmp_path / "c", trust=True)
