"""`attncli nan-check SCRIPT.py`: its options, its streams and its exit codes; `--replay`; `-m`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import Command

from attncli.cli import settings_of
from attncli.cli.script_options import split

SCRIPT = '''"""A training script that knows nothing of attncli."""
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (f(x).view(len(x), -1, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(x + self.attention(x)).squeeze(-1).mean(1)


data, targets = torch.randn(48, 5, 8), torch.rand(48) + 0.5
if "bad" in sys.argv:
    targets[21] = 0
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for x, y in DataLoader(TensorDataset(data, targets), 4):
    optimizer.zero_grad()
    loss = (model(x) / y).abs().mean()  # the division
    loss.backward()
    optimizer.step()
print("arguments", sys.argv[1:], "loss", f"{loss.item():.3f}")
if "fails" in sys.argv:
    sys.exit(7)
if "late" in sys.argv:
    raise LookupError("nothing of attncli's")
'''


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A script becomes the main module of the process, as it would be without attncli."""
    main, path, argv = sys.modules["__main__"], list(sys.path), list(sys.argv)
    yield
    sys.modules["__main__"] = main
    sys.path[:], sys.argv[:] = path, argv


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "train.py"
    file.write_text(SCRIPT, encoding="utf-8")
    return file


def test_a_healthy_script_keeps_its_output_and_its_exit_code(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "train.py", "--alpha", "1", "-o", "x")
    assert result.code == 0
    assert result.out.startswith("arguments ['--alpha', '1', '-o', 'x'] loss ")
    assert result.err == "attncli: 12 steps watched, nothing went wrong\n"
    assert attncli_run("nan-check", "-q", "train.py", "fails")[::2] == (7, "")


def test_a_fault_is_reported_with_its_step_its_batch_and_its_line(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "train.py", "bad")
    assert result.code == 1
    assert "arguments" not in result.out  # the script was stopped
    assert "Training stopped in step 6 (epoch 0, batch 5 of DataLoader over TensorDataset," in result.out
    line = SCRIPT.splitlines().index("    loss = (model(x) / y).abs().mean()  # the division") + 1
    assert f"line     train.py:{line}" in result.out
    assert "division" in result.out
    assert result.out.rstrip().endswith("Step 6 of 6: 1 origin of Inf, proved; 1 error.")


@pytest.fixture
def collapsing(tmp_path: Path) -> Path:
    """Twenty steps of a training whose scores grow and whose entropies fall, before anything is not finite."""
    text = (Path(__file__).parent / "training_scripts/faults/entropy_collapse.py").read_text(encoding="utf-8")
    file = tmp_path / "collapsing.py"
    file.write_text(text.replace("8, 140\n", "8, 20\n"), encoding="utf-8")
    return file


def test_the_first_warning_of_a_kind_comes_with_its_advice_and_the_end_counts_them(
    collapsing: Path, attncli_run: Command
) -> None:
    result = attncli_run("nan-check", "--every", "1", "collapsing.py")
    assert (result.code, result.out) == (0, "")
    told = result.err.splitlines()
    warned = [line for line in told if ": warning: " in line]
    assert all("at the present rate" in line for line in warned)
    assert "and at the present rate" in result.err
    assert "under 0.2 nats from step" in result.err
    for code, advice in (("ATT712", "  → Normalise q and k"), ("ATT713", "  → Check that scores are scaled")):
        assert sum(line.startswith(advice) for line in told) == 1
        first = next(at for at, line in enumerate(told) if line.endswith(f"({code})"))
        assert told[first + 1].startswith(advice)
    assert told[-1] == "attncli: 20 steps watched, nothing non-finite, 2 warnings"


def test_warnings_that_fail_the_run_are_reported(collapsing: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "--every", "1", "--fail-on", "warning", "collapsing.py")
    assert result.code == 1
    assert "warning ATT713 entropy-falls  attention: " in result.out
    assert result.out.endswith("20 steps watched, nothing non-finite; 2 warnings.\n")
    quiet = attncli_run("nan-check", "-q", "--every", "1", "--fail-on", "warning", "collapsing.py")
    assert (quiet.code, quiet.out) == (1, "")


def test_the_help_tells_each_exit_code_and_when_warnings_begin(attncli_run: Command) -> None:
    told = " ".join(attncli_run("nan-check", "--help").out.split())
    assert "the script's own, or 3 where no training step was seen." in told
    assert "Early warnings need 6 of them." in told


def test_a_format_of_its_own_has_stdout_alone(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "--format", "json", "train.py")
    assert json.loads(result.out)["run"]["training"]["seen"] == 12
    assert "arguments [] loss" in result.err
    result = attncli_run("nan-check", "--format", "json", "train.py", "bad")
    report = json.loads(result.out)
    assert (result.code, report["run"]["training"]["fault"]["batch"]["index"]) == (1, 5)
    assert report["origins"][0]["op"] == "div"


def test_a_report_for_a_file_leaves_the_streams_alone(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "-o", "report.json", "train.py", "bad")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("attncli: ")
    assert result.err.endswith("; written: report.json\n")
    assert json.loads(Path("report.json").read_text())["verdict"] == "findings"
    assert attncli_run("nan-check", "--fail-on", "never", "-q", "train.py", "bad").code == 0


def test_with_continue_the_script_goes_on_and_the_fault_is_told(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "--continue", "train.py", "bad")
    assert result.code == 1
    assert result.out.startswith("arguments ['bad'] loss nan\n")
    assert "12 steps watched, 7 went wrong" in result.err
    assert "div" in result.out


def test_the_log_has_a_line_for_every_nth_step(script: Path, attncli_run: Command) -> None:
    assert attncli_run("nan-check", "--log", "run.jsonl", "--every", "5", "train.py").code == 0
    lines = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    call = lines[0]["attention"][0]
    assert call["layer"] == "attention"
    assert all(len(call[metric]) == 2 for metric in ("entropy", "score_max", "dot_absmax", "headroom_bits"))


def test_tensorboard_gets_the_same_numbers(script: Path, attncli_run: Command) -> None:
    pytest.importorskip("tensorboard")
    assert attncli_run("nan-check", "--tensorboard", "events", "--every", "4", "train.py").code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("events")
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8, 12]


def test_a_capsule_is_replayed_without_the_script(script: Path, attncli_run: Command) -> None:
    first = attncli_run("nan-check", "--capsule", "capsule", "train.py", "bad")
    assert "attncli nan-check --replay capsule" in first.out
    script.unlink()
    again = attncli_run("nan-check", "--replay", "capsule", "--format", "json", "--trust")
    report = json.loads(again.out)
    assert again.code == 1
    assert report["origins"][0]["op"] == "div"
    assert report["source"]["kind"] == "capsule"


def test_an_error_of_the_script_is_its_own_and_its_step_is_told(script: Path, attncli_run: Command) -> None:
    result = attncli_run("nan-check", "train.py", "late")
    assert result.code == 1
    assert "LookupError: nothing of attncli's\n" in result.err
    assert "attncli/" not in result.err.replace(str(Path.cwd()), "")
    assert "attncli: the script raised LookupError in step 13" in result.err


def test_a_module_is_run_as_python_runs_it(tmp_path: Path, attncli_run: Command) -> None:
    package = tmp_path / "trained"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SCRIPT, encoding="utf-8")
    result = attncli_run("nan-check", "-m", "trained", "--log", "its own")
    assert result.code == 0
    assert result.out.startswith("arguments ['--log', 'its own'] loss")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere.py",), "nowhere.py: there is no such script."),
        (("--text", "a", "train.py"), "--text: this option means nothing for a training script."),
        (("--log", "a.jsonl", "code.py:build"), "--log: this option means nothing for a model."),
        (("--every", "3", "--replay", "capsule"), "--every: this option means nothing for a capsule."),
        (("--log", "no/such/folder.jsonl", "train.py"), "there is no folder no/such."),
        (("--capsule", "train.py", "train.py"), "--capsule: train.py is a file."),
        (("--replay", "nowhere"), "nowhere"),
        ((), "nan-check: there is nothing to look at."),
        (("-m",), "try: attncli nan-check --help"),
        (("--log",), "try: attncli nan-check --help"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    words: tuple[str, ...], told: str, script: Path, attncli_run: Command
) -> None:
    result = attncli_run("nan-check", *words)
    assert (result.code, result.out) == (2, "")
    assert told in result.err


def test_a_script_that_never_trains_was_not_observed(tmp_path: Path, attncli_run: Command) -> None:
    (tmp_path / "idle.py").write_text("import torch\nprint(torch.ones(2).sum())\n", encoding="utf-8")
    result = attncli_run("nan-check", "idle.py")
    assert (result.code, result.out) == (3, "tensor(2.)\n")
    assert "no optimiser step was seen" in result.err


def test_a_script_that_refuses_an_option_of_attncli_is_told_where_it_stands(
    tmp_path: Path, attncli_run: Command
) -> None:
    (tmp_path / "picky.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--lr')\nparser.parse_args()\n",
        encoding="utf-8",
    )
    result = attncli_run("nan-check", "picky.py", "--lr", "1", "--log=run.jsonl", "--every", "5")
    assert result.code == 2
    assert "picky.py was given --log and --every; what is meant for attncli stands before it" in result.err
    assert "stands before it" not in attncli_run("nan-check", "picky.py", "--nope").err


def test_a_script_that_is_named_like_a_model_is_told_how_it_is_watched(
    tmp_path: Path, attncli_run: Command
) -> None:
    (tmp_path / "train.py").write_text("def main():\n    pass\n", encoding="utf-8")
    result = attncli_run("nan-check", "train.py:main")
    assert result.code == 2
    assert "run attncli nan-check train.py." in result.err


def test_words_behind_the_script_are_its_own() -> None:
    from typer.main import get_command

    from attncli.cli import app

    params = get_command(app).commands["nan-check"].params  # type: ignore[attr-defined]
    own, found = split(params, ["--log", "x.py", "-q", "a.py", "--log", "b.py"])
    assert own == ["--log", "x.py", "-q", "a.py"]
    assert found is not None
    assert (found.target, found.args) == ("a.py", ("--log", "b.py"))
    assert split(params, ["model.py:build", "--steps", "3"])[1] is None
    assert split(params, ["folder", "--input", "data.py"])[1] is None


def test_settings_know_the_options_of_scripts(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.attncli.nan-check]\nevery = 7\n", encoding="utf-8")
    assert settings_of("nan-check", tmp_path)["every"] == 7
