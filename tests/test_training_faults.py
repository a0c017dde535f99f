"""The fault of every training script is named as what it is, with its step and its batch; its healthy twin runs on.

What is true of a script is seen without attncli first: it is run plainly, and every loss, gradient and parameter of
it is looked at.
"""

from __future__ import annotations

import json
import linecache
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from command_line import Command, Result
from torch import Tensor, nn
from training_faults import CASES, SCRIPTS, SILENT, Case, Silent
from training_witness import Witness, witnessed

import attncli


@pytest.fixture(autouse=True)
def _one_thread_and_nothing_compiled() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if "torch._dynamo.utils" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


@cache
def plain(path: Path, arguments: tuple[str, ...], environment: tuple[str, ...] = ()) -> Witness:
    with mock.patch.dict(os.environ, dict.fromkeys(environment, "1")):
        return witnessed(path, arguments)


def faulty(case: Case) -> Witness:
    return plain(case.path, case.faulty, case.environment)


def batch_in_use(case: Case) -> tuple[int | None, int | None, tuple[int, ...]]:
    """Epoch, index and items of the batch that the fault is in."""
    run = faulty(case)
    if case.index is None:
        return run.epoch, run.index, run.items
    return case.epoch, case.index, run.sampled[case.epoch or 0, case.index]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plain_run_has_the_fault_where_it_is_said_to_be(case: Case) -> None:
    run = faulty(case)
    assert run.raised is None
    if case.seen == "loss scale":
        assert run.step is None
        assert run.skipped == list(range(1, run.steps + 1))
    else:
        steps = case.step if isinstance(case.step, range) else (case.step,)
        assert run.step in steps
        assert run.seen == case.seen
        assert case.value in ("", run.value)
        assert run.step - 1 not in run.skipped or "--scaler" in case.faulty
    if case.loader:
        assert set(case.items) <= set(batch_in_use(case)[2])
        assert case.epoch in (None, run.epoch)
    assert "# FAULT" in case.path.read_text() or not case.line


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plain_run_of_the_healthy_twin_has_none(case: Case) -> None:
    run = plain(case.path, case.healthy, case.healthy_environment)
    assert (run.raised, run.step) == (None, None)
    assert run.steps > len(run.skipped) + 3


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.name)
def test_a_plain_run_of_a_silent_script_has_none(case: Silent) -> None:
    run = plain(case.path, case.arguments)
    assert (run.raised, run.step) == (None, None)


# --- under attncli ------------------------------------------------------------------------------------


class Examined(NamedTuple):
    result: Result
    report: dict[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        return self.report["run"]["training"]

    @property
    def told(self) -> str:
        """All that a failure of a test needs to show."""
        origins = [
            {key: origin[key] for key in ("value", "phase", "op", "cause", "module", "tensor", "source", "at",
                                          "confirmed", "message")}
            for origin in self.report["origins"]
        ]  # fmt: skip
        findings = [finding["message"] for finding in self.report["findings"]]
        parts = [self.training["fault"], *origins, *findings, self.report["notes"], self.result.err[-2000:]]
        return "\n".join(map(str, parts))


_EXAMINED: dict[Any, Examined] = {}


@pytest.fixture
def examine(attncli_run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Examined]:
    """The report on a script in this process; one run serves all tests of a case."""

    def run(path: Path, arguments: tuple[str, ...], environment: tuple[str, ...] = ()) -> Examined:
        key = path, arguments, environment
        if key not in _EXAMINED:
            for name in environment:
                monkeypatch.setenv(name, "1")
            file = tmp_path / "report.json"
            options = ("nan-check", "--every", "5", "--format", "json", "-o", file)
            result = attncli_run(*options, path, *arguments)
            assert file.exists(), result.err[-3000:]
            _EXAMINED[key] = Examined(result, json.loads(file.read_text()))
        return _EXAMINED[key]

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_step_is_named_where_it_shows_first(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.faulty, case.environment)
    fault = seen.training["fault"]
    assert fault is not None, seen.told
    assert fault["seen"] == case.seen, seen.told
    if case.seen == "loss scale":
        assert fault["step"] in case.step, seen.told
        assert all(step["skipped"] for step in seen.training["steps"]), seen.told
    else:
        truth = faulty(case)
        assert fault["step"] == truth.step, seen.told
        assert fault["value"] == truth.value or case.value == "", seen.told
    assert seen.result.code == 1, seen.told
    assert seen.training["seen"] in (fault["step"], fault["step"] - 1), seen.told


@pytest.mark.parametrize("case", [case for case in CASES if case.loader], ids=lambda case: case.name)
def test_the_batch_is_named_by_its_place_in_the_loader(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.faulty, case.environment)
    batch = seen.training["fault"]["batch"]
    assert batch is not None, seen.told
    epoch, index, items = batch_in_use(case)
    assert (batch["epoch"], batch["index"]) == (epoch, index), seen.told
    assert tuple(batch["items"] or ()) == items, seen.told


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_origin_is_named_and_proved(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.faulty, case.environment)
    if not case.repeatable and seen.training["fault"]["reproduced"] is False:
        assert seen.training["fault"]["why"], seen.told
        assert seen.report["origins"] == [], seen.told
        return
    assert 1 <= len(seen.report["origins"]) <= case.origins, seen.told
    origin = seen.report["origins"][0]
    assert origin["phase"] in case.phases, seen.told
    assert origin["op"] in case.ops, seen.told
    assert origin["cause"] in case.causes, seen.told
    if case.module is not None:
        assert f".{origin['module']}".endswith(f".{case.module}" if case.module else "."), seen.told
    if case.tensor is not None:
        named = (origin["tensor"], *seen.training["fault"]["tensors"])
        assert any(f".{name}".endswith(f".{case.tensor}") for name in named), seen.told
    if case.line:
        file, _, number = origin["source"].rpartition(":")
        text = linecache.getline(str(case.path), int(number))
        assert Path(file).name == case.script, seen.told
        assert "# FAULT" in text, f"{text}\n{seen.told}"
    if case.forward:
        assert any(name in origin["evidence"]["forward_op"] for name in case.forward), seen.told
    assert origin["confirmed"] is True, seen.told
    assert seen.training["fault"]["reproduced"] is True, seen.told
    assert {finding["severity"] for finding in seen.report["findings"]} >= {"error"}, seen.told


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.element is not None], ids=lambda case: case.name
)
def test_the_element_of_the_batch_is_named(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.faulty, case.environment)
    origin = seen.report["origins"][0]
    expected = case.element
    if expected == "item":
        expected = batch_in_use(case)[2].index(case.items[0])
    if "where" in origin["evidence"]:
        assert f"batch {expected}," in origin["evidence"]["where"], seen.told
        return
    at = origin["at"]
    element = at["batch"] if "batch" in at else at["index"][0] if "index" in at else at["query"]
    assert element == expected, seen.told


@pytest.mark.parametrize("case", [case for case in CASES if case.withheld], ids=lambda case: case.name)
def test_the_bad_update_is_withheld(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.faulty, case.environment)
    assert seen.training["fault"]["withheld"] is True, seen.told


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nothing_is_said_of_the_healthy_twin(case: Case, examine: Callable[..., Examined]) -> None:
    seen = examine(case.path, case.healthy, case.healthy_environment)
    _silent(seen, plain(case.path, case.healthy, case.healthy_environment))


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.name)
def test_nothing_is_said_of_what_does_no_harm(case: Silent, examine: Callable[..., Examined]) -> None:
    _silent(examine(case.path, case.arguments), plain(case.path, case.arguments))


def _silent(seen: Examined, truth: Witness) -> None:
    assert seen.training["fault"] is None, seen.told
    assert seen.report["origins"] == [], seen.told
    assert seen.report["findings"] == [], seen.told
    assert seen.training["seen"] == truth.steps, seen.told
    assert (seen.result.code, seen.report["verdict"]) == (0, "clean"), seen.told


def test_an_explosion_names_the_update_and_the_step_before(examine: Callable[..., Examined]) -> None:
    for case in CASES:
        if case.script != "learning_rate.py":
            continue
        seen, truth = examine(case.path, case.faulty), faulty(case)
        assert truth.moved[case.step - 1] > 1e15
        (origin,) = seen.report["origins"]
        assert origin["evidence"]["step"] == case.step - 1, seen.told
        assert 1e15 < origin["evidence"]["after"] <= truth.moved[case.step - 1] * 1.001, seen.told
        moved = {move["step"]: move for move in seen.training["moved"]}
        assert moved[case.step - 1]["learning_rate"] == 1e25, seen.told


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.script == "entropy_collapse.py"], ids=lambda case: case.name
)
def test_an_entropy_collapse_is_foreseen_twenty_steps_ahead(
    case: Case, examine: Callable[..., Examined]
) -> None:
    seen = examine(case.path, case.faulty)
    step = faulty(case).step
    assert step is not None
    warned = [int(number) for number in re.findall(r"[Ss]tep (\d+)", seen.result.err)]
    assert warned, seen.told
    assert min(warned) <= step - 20, seen.told
    assert any(finding["severity"] == "warning" for finding in seen.report["findings"]), seen.told


# --- weights that survive -----------------------------------------------------------------------------

SAVING = SCRIPTS / "saves_at_the_end.py"


@pytest.mark.parametrize("bad", ["loss", "gradient", "parameter"])
def test_what_a_script_saves_as_it_ends_are_the_weights_before_the_bad_step(
    bad: str, attncli_run: Command, tmp_path: Path
) -> None:
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    witnessed(SAVING, ("--out", str(before), "--steps", "6"))
    result = attncli_run("nan-check", SAVING, "--out", after, "--bad", bad)
    assert result.code == 1
    assert "trained" not in result.out
    assert _same(before, after)


@pytest.mark.parametrize("bad", ["loss", "gradient", "parameter", "nothing"])
def test_a_run_that_is_continued_ends_with_the_weights_it_would_have(
    bad: str, attncli_run: Command, tmp_path: Path
) -> None:
    alone, watched, report = tmp_path / "alone.pt", tmp_path / "watched.pt", tmp_path / "report.json"
    run = witnessed(SAVING, ("--out", str(alone), "--bad", bad))
    assert run.step == (None if bad == "nothing" else 7)
    options = ("--continue", "--every", "2", "--format", "json", "-o", report)
    result = attncli_run("nan-check", *options, SAVING, "--out", watched, "--bad", bad)
    assert "trained" in result.out
    assert _same(alone, watched)
    training = json.loads(report.read_text())["run"]["training"]
    assert training["seen"] == 12
    assert (training["fault"] or {}).get("step") == run.step
    assert (training["fault"] or {}).get("withheld") is not True


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold bitwise the same weights; NaN is like NaN."""
    first, second = torch.load(one), torch.load(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )


# --- in one's own loop ---------------------------------------------------------------------------------


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, bad: int | None, steps: int = 8) -> None:
    """Takes steps; the loss of step `bad` divides by a count of 0."""
    for step in range(1, steps + 1):
        x = torch.ones(4, 3) * step
        counted = torch.tensor(0.0 if step == bad else 4.0)
        loss = (model(x) - 1).pow(2).sum() * counted / counted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def hooks_and_patches() -> list[Any]:
    """Everything global that a watcher might leave behind."""
    hooks = [
        dict(table)
        for module in (sys.modules["torch.optim.optimizer"], sys.modules["torch.nn.modules.module"])
        for name, table in sorted(vars(module).items())
        if name.startswith("_global_") and isinstance(table, dict)
    ]
    assert len(hooks) > 4
    patched = [
        Tensor.backward,
        torch.autograd.backward,
        torch.nn.utils.clip_grad_norm_,
        torch.amp.GradScaler.step,
        torch.amp.GradScaler.update,
        torch.amp.GradScaler.scale,
        torch.utils.data.DataLoader.__iter__,
        nn.Module.__call__,
        torch.overrides._len_torch_function_stack(),
    ]
    return [*hooks, *patched]


def test_watch_raises_the_fault_with_its_report_and_leaves_the_weights_of_the_step_before() -> None:
    truth, optimizer = fresh()
    loop(truth, optimizer, None, steps=4)
    model, optimizer = fresh()
    before = hooks_and_patches()
    with pytest.raises(attncli.TrainingFault) as raised, attncli.watch(model, optimizer):
        loop(model, optimizer, bad=5)
    report = raised.value.report
    (origin,) = report.origins
    assert (origin.phase, origin.op, origin.cause, origin.confirmed) == (
        "forward",
        "div",
        "division-by-zero",
        True,
    )
    assert "counted / counted" in linecache.getline(__file__, int(str(origin.source).rpartition(":")[2]))
    assert report.run is not None
    assert report.to_dict()["run"]["training"]["fault"]["step"] == 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))
    assert hooks_and_patches() == before


def test_watch_lets_a_healthy_loop_end_with_the_same_weights() -> None:
    truth, optimizer = fresh()
    loop(truth, optimizer, None)
    model, optimizer = fresh()
    before = hooks_and_patches()
    with attncli.watch(model, optimizer, every=2) as run:
        loop(model, optimizer, None)
    assert run is not None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))
    assert hooks_and_patches() == before


def test_watch_tells_a_function_and_goes_on() -> None:
    truth, optimizer = fresh()
    loop(truth, optimizer, bad=3)
    model, optimizer = fresh()
    reports = []
    with attncli.watch(model, optimizer, on_fault=reports.append):
        loop(model, optimizer, bad=3)
    assert reports[0].to_dict()["run"]["training"]["fault"]["step"] == 3
    assert reports[0].origins[0].op == "div"
    assert all(
        torch.equal(a.view(torch.int32), b.view(torch.int32))
        for a, b in zip(model.parameters(), truth.parameters(), strict=True)
    )


def test_watch_passes_an_error_of_the_loop_on() -> None:
    model, optimizer = fresh()
    before = hooks_and_patches()
    with pytest.raises(RuntimeError, match="must match"), attncli.watch(model, optimizer):  # noqa: PT012
        loop(model, optimizer, None)
        torch.ones(2) + torch.ones(3)
    assert hooks_and_patches() == before


# --- as processes -------------------------------------------------------------------------------------


def process(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120, env=environment
    )


WATCH = ("-m", "attncli", "nan-check")


def test_a_label_out_of_range_keeps_its_error_and_is_told_by_step_and_batch() -> None:
    script = (SCRIPTS / "tagger.py", "--mislabelled", "21")
    alone, watched = process(*script), process(*WATCH, *script)
    assert alone.stderr.splitlines()[-1] == "IndexError: Target 5 is out of bounds."
    assert (watched.returncode, watched.stdout) == (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr in watched.stderr
    note = watched.stderr.replace(alone.stderr, "")
    assert re.search(r"\bstep 11\b", note), note
    assert re.search(r"\bbatch 10\b", note), note


def test_a_data_loader_whose_worker_dies_keeps_its_error() -> None:
    script = (SCRIPTS / "dead_worker.py", "22")
    alone, watched = process(*script), process(*WATCH, *script)
    error = r"RuntimeError: DataLoader worker \(pid(\(s\))? \d+\) exited unexpectedly"
    assert re.search(error, alone.stderr)
    assert re.search(error, watched.stderr)
    assert (watched.returncode, watched.stdout) == (alone.returncode, alone.stdout)
    assert alone.returncode == 1
    assert watched.stdout.startswith("step 0 done\n")


@pytest.mark.parametrize("end", ["raise", "0", "3"])
def test_a_script_ends_in_its_own_way(end: str) -> None:
    script = (SCRIPTS / "raises.py", end)
    alone, watched = process(*script), process(*WATCH, *script)
    assert (watched.returncode, watched.stdout) == (alone.returncode, alone.stdout)
    assert alone.stderr in watched.stderr
    assert ("in step 4" if end == "raise" else "3 steps watched") in watched.stderr


def test_the_table_of_a_fault_follows_the_output_of_the_script(tmp_path: Path) -> None:
    script = (SCRIPTS / "saves_at_the_end.py", "--out", tmp_path / "weights.pt", "--bad", "loss")
    watched = process(*WATCH, *script)
    assert watched.returncode == 1
    assert "Traceback" not in watched.stderr
    assert "saves_at_the_end.py" in watched.stdout
    for words in ("log-of-zero", "7"):
        assert words in watched.stdout


def test_a_report_in_another_format_has_stdout_to_itself() -> None:
    script = (SCRIPTS / "tagger.py", "--unlabelled", "31")
    watched = process(*WATCH, "--format", "json", *script)
    report = json.loads(watched.stdout)
    assert (watched.returncode, report["run"]["training"]["fault"]["step"]) == (1, 16)
    assert report["source"]["kind"] == "script"
    healthy = process(*WATCH, "--format", "json", *script[:1])
    assert json.loads(healthy.stdout)["verdict"] == "clean"
    assert "epoch 1: done" in healthy.stderr
