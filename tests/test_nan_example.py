"""The example of a training run that ends in NaN: its scores are named, and scaling them is shown to cure it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "nan_training"


@pytest.fixture(scope="module")
def train():
    sys.path.insert(0, str(FOLDER))
    for name in ("reverser", "until_nan"):
        sys.modules.pop(name, None)
    spec = importlib.util.spec_from_file_location("until_nan", FOLDER / "until_nan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("reverser", "until_nan"):
        sys.modules.pop(name, None)


def test_the_loss_becomes_nan_after_some_epochs_and_the_scores_are_named(train, capsys):
    report = train.main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) > 2
    assert printed[-1].endswith("loss nan")
    (origin,) = report.origins
    assert (origin.phase, origin.op, origin.cause, origin.module) == (
        "forward",
        "exp",
        "overflow-exp",
        "attention",
    )
    assert origin.source.endswith("reverser.py:30")
    assert "scores_BTS.exp()" in (FOLDER / "reverser.py").read_text().splitlines()[29]
    assert origin.evidence["scale"] == 1.0
    assert origin.evidence["scale_expected"] == pytest.approx(192**-0.5)
    assert origin.confirmed is True
    assert "scaled by 0.07217" in origin.evidence["proof"]
    assert report.exit_code() == 1


def test_with_the_scale_it_trains_on(train, capsys):
    train.EPOCHS = 8
    assert train.main(scaled=True) is None
    assert "nan" not in capsys.readouterr().out


def test_the_guard_for_ci_passes_on_the_healthy_model():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reverser.py"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("..")
