"""The log of a training run: strict JSON lines that survive a killed run, and event files that TensorBoard reads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attncli.errors import UsageError
from attncli.records import Sample, Step
from attncli.training.log import JsonLines, TensorBoard, line_of

STEP = Step(50, loss=2.5, gradient_norm=0.75, learning_rate=3e-4, loss_scale=65536.0)


def samples(heads: int = 2, layer: str = "blocks.0.attn", call: int = 0) -> list[Sample]:
    return [
        Sample(50, layer, call, head, metric, value + head, "float16")
        for metric, value in (("entropy", 1.0), ("score_max", 8.0), ("headroom_bits", 5.0))
        for head in range(heads)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


# --- lines --------------------------------------------------------------------------------------------


def test_a_line_has_the_step_and_a_row_of_heads_for_each_metric_of_each_call() -> None:
    assert line_of(STEP, [*samples(), *samples(1, call=1)], 12.34567) == {
        "schema": "attncli-log/1",
        "step": 50,
        "loss": 2.5,
        "gradient_norm": 0.75,
        "learning_rate": 3e-4,
        "loss_scale": 65536.0,
        "skipped": False,
        "seconds": 12.346,
        "attention": [
            {
                "layer": "blocks.0.attn", "call": 0, "dtype": "float16",
                "entropy": [1.0, 2.0], "entropy_ratio": None, "entropy_rest": None, "score_max": [8.0, 9.0],
                "dot_absmax": None, "headroom_bits": [5.0, 6.0],
            },
            {
                "layer": "blocks.0.attn", "call": 1, "dtype": "float16",
                "entropy": [1.0], "entropy_ratio": None, "entropy_rest": None, "score_max": [8.0],
                "dot_absmax": None, "headroom_bits": [5.0],
            },
        ],
    }  # fmt: skip


def test_a_head_that_was_not_measured_is_null_and_a_number_that_is_none_a_string() -> None:
    line = line_of(Step(3, loss=math.nan, skipped=True), [Sample(3, "a", 0, 2, "score_max", math.inf)], 0.0)
    assert line["loss"] == "nan"
    assert line["skipped"] is True
    (call,) = line["attention"]
    assert call["score_max"] == [None, None, "inf"]


def test_calls_have_the_same_keys_whatever_was_measured_of_them() -> None:
    fused = [Sample(50, "b", 0, 0, "entropy", 1.0, None)]
    stored, unstored = line_of(STEP, [*samples(), *fused], 0.0)["attention"]
    assert list(stored) == list(unstored)
    assert (unstored["dtype"], unstored["headroom_bits"], unstored["entropy"]) == (None, None, [1.0])


def test_a_file_of_lines_is_strict_json_and_truncated_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("of an earlier run\n", encoding="utf-8")
    log = JsonLines(path)
    log.write({"step": 1, "loss": math.inf, "name": "\udc80\nä"})
    log.write(line_of(STEP, samples(), 1.0))
    log.close()
    first, second = lines(path)
    assert first == {"step": 1, "loss": "inf", "name": "\\udc80\nä"}
    assert second == line_of(STEP, samples(), 1.0)


def test_each_line_is_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    program = (
        "import os, sys\nfrom attncli.training.log import JsonLines\n"
        "log = JsonLines(sys.argv[1])\nlog.write({'step': 1})\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert done.returncode != 0
    assert lines(path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing/run.jsonl", "missing does not exist."),
        ("folder", "It cannot be written: is a directory."),
        ("nul\0.jsonl", "It cannot be written: embedded null byte."),
        ("n" * 300, "It cannot be written: file name too long."),
    ],
)
def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError) as refused:
        JsonLines(tmp_path / name)
    assert refused.value.problem.endswith(problem)
    assert refused.value.remedy == "Give log (--log) a file in a folder that can be written."


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_told_once_and_the_training_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    log = JsonLines("/dev/full")
    for at in range(3):
        log.write({"step": at})
    log.close()
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err == (
        "attncli: /dev/full: It cannot be written: no space left on device. The training goes on without it.\n"
    )


def test_a_closed_log_takes_no_more_lines_and_may_be_closed_again(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "run.jsonl")
    log.close()
    log.write({"step": 1})
    log.close()
    assert lines(tmp_path / "run.jsonl") == []


# --- tensorboard --------------------------------------------------------------------------------------


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_tensorboard_gets_the_step_the_extremes_and_each_head(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path / "runs")
    board.write(line_of(STEP, samples(), 1.0))
    board.write(line_of(Step(100, loss=math.nan), samples(17), 2.0))
    board.write(line_of(Step(150), [Sample(150, "fused", 0, 0, "entropy", 1.0, None)], 3.0))
    board.close()
    board.close()
    seen = drawn(tmp_path / "runs")
    assert seen["train/loss"] == [(50, 2.5)]
    assert seen["train/gradient_norm"] == [(50, 0.75)]
    at = "attention/blocks.0.attn"
    assert seen[f"{at}/entropy_min"] == [(50, 1.0), (100, 1.0)]
    assert seen[f"{at}/entropy_mean"] == [(50, 1.5), (100, 9.0)]
    assert seen[f"{at}/score_max"] == [(50, 9.0), (100, 24.0)]
    assert seen[f"{at}/headroom_bits"] == [(50, 5.0), (100, 5.0)]
    # Seventeen heads are too many to draw each.
    assert seen[f"{at}/score_max/head_1"] == [(50, 9.0)]
    assert f"{at}/score_max/head_16" not in seen
    assert [name for name in seen if "fused" in name] == [
        "attention/fused/entropy_min", "attention/fused/entropy_mean", "attention/fused/entropy/head_0",
    ]  # fmt: skip


def test_without_the_package_the_user_learns_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError) as refused:
        TensorBoard(tmp_path)
    assert refused.value.subject == "tensorboard"
    assert refused.value.remedy == "Run pip install tensorboard."


@pytest.mark.filterwarnings("ignore")
def test_a_folder_for_tensorboard_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "runs").write_text("", encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        TensorBoard(tmp_path / "runs")
    assert refused.value.problem == "It cannot be written: file exists."


def test_mistakes_in_the_arguments_of_a_watch_are_told_by_their_names(tmp_path: Path) -> None:
    import attncli

    with pytest.raises(UsageError, match=r"attncli\.watch: every is -1\.") as refused:
        attncli.watch(every=-1)
    assert refused.value.remedy == "Give a number of steps, or 0 to measure none."
    with pytest.raises(UsageError) as refused:
        attncli.watch(log=tmp_path / "missing" / "run.jsonl")
    assert refused.value.remedy.startswith("Give log ")


def test_writing_lines_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom attncli.training.log import JsonLines\n"
        "JsonLines(sys.argv[1]).close()\nsys.exit('torch' in sys.modules)"
    )
    path = tmp_path / "run.jsonl"
    done = subprocess.run([sys.executable, "-c", program, path], check=False, env=dict(os.environ))
    assert done.returncode == 0
