"""The command `nan-check` as a user and a CI job meet it, on real runs of small models of the user's own code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command, Result

import attncli
from attncli.cli import app

ROOT = Path(attncli.__file__).parents[1]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PHASES = {"parameter", "buffer", "input", "forward", "backward", "optimizer"}


CODE = '''
import math
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            self.qkv.weight[:32] *= factor
            self.qkv.bias[:32] *= factor

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        probs = self.drop(((q @ k.mT) / 2).softmax(-1))
        return x + self.out((probs @ v).transpose(1, 2).reshape(b, t, 16))

class Model(nn.Module):
    def __init__(self, factors=(1.0, 1.0), extra=None):
        super().__init__()
        self.layers = nn.ModuleList(Attention(f) for f in factors)
        self.head, self.extra = nn.Linear(16, 1), extra or nn.Identity()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.extra(x))

class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * 0) / (gradient * 0)

class BadBackward(nn.Module):
    def forward(self, x):
        return Nothing.apply(x)

class InTraining(nn.Module):
    def forward(self, x):
        return x / (0.0 if self.training else 1.0)

class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        raise RuntimeError("no such shape")

def made(*args, **kwargs):
    torch.manual_seed(0)
    return Model(*args, **kwargs)

def healthy():
    return made()

def large():
    """Scores of some 10 000 to 1 000 000: beyond float16, no trouble to float32."""
    return made((1.0, 400.0))

def bad_weight():
    model = made()
    with torch.no_grad():
        model.layers[1].out.weight[3, 5] = math.nan
    return model

def bad_backward():
    return made(extra=BadBackward())

def in_training():
    return made(extra=InTraining())

def raises():
    return Raises()

def empty():
    return None

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        inner = made((400.0,))
        for name in ("a_module_with_a_really_long_name", "another_module_with_a_long_name", "encoder_of_it_all"):
            outer = nn.Module()
            setattr(outer, name, inner)
            inner = outer
        self.body = inner

    def forward(self, x):
        inner = self.body
        for name in ("encoder_of_it_all", "another_module_with_a_long_name", "a_module_with_a_really_long_name"):
            inner = getattr(inner, name)
        return inner(x)

def deep():
    return Deep()

def batch():
    return {"x": torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))}

def bad_batch():
    made = batch()
    made["x"][1, 2, 3] = math.inf
    return made
'''


@pytest.fixture
def attncli_run(attncli_run: Command, tmp_path: Path) -> Iterator[Command]:
    """`attncli nan-check …` in a folder that holds the user's code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for a second thread
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    yield lambda *arguments: attncli_run("nan-check", *arguments)
    torch.set_num_threads(threads)


GIVEN = ("--input", "code.py:batch", "--device", "cpu")


def as_json(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    return found


# --- healthy, faulty, unusable ------------------------------------------------------------------------


def test_a_healthy_model_gives_one_sentence_and_exit_code_0(attncli_run: Command) -> None:
    result = attncli_run("code.py:healthy", *GIVEN)
    assert result.code == 0
    assert result.err == ""
    pattern = r"No NaN or Inf in \d+ operators; smallest headroom \d+\.\d bits of float32 \(\w+ in \S+\)\."
    assert re.search(pattern, result.out), result.out


def test_a_fault_is_exit_code_1_and_says_what_where_and_why(attncli_run: Command) -> None:
    result = attncli_run("code.py:large", *GIVEN, "--dtype", "float16")
    assert result.code == 1
    line = 1 + CODE.splitlines().index(next(line for line in CODE.splitlines() if "q @ k.mT" in line))
    for words in (
        "layers.1",
        "overflow-scores",
        f"code.py:{line}",
        "float16 ends at 65 504",
        "q·k = ",
        "ATT701",
    ):
        assert words in result.out, result.out
    assert "1 origin of NaN or Inf, proved" in result.out
    assert "Traceback" not in result.out + result.err


def test_a_bad_weight_is_told_with_its_name(attncli_run: Command) -> None:
    result = attncli_run("code.py:bad_weight", *GIVEN)
    assert result.code == 1
    assert "layers.1.out.weight" in result.out
    assert "ATT702" in result.out
    assert "1 NaN among 256 elements" in result.out


def test_a_bad_input_is_told_with_its_place(attncli_run: Command) -> None:
    result = attncli_run("code.py:healthy", "--input", "code.py:bad_batch", "-f", "json")
    (origin,) = as_json(result)["origins"]
    assert (result.code, origin["phase"], origin["tensor"], origin["value"]) == (1, "input", "x", "+inf")
    assert origin["at"] == {"index": [1, 2, 3]}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("code.py:raises", "no such shape"),
        ("code.py:empty", "it returned nothing"),
        ("code.py:missing", "missing"),
        ("nowhere.py:build", "nowhere.py"),
        ("nowhere", "nowhere"),
        ("", "empty"),
    ],
)
def test_a_model_that_cannot_be_run_is_exit_code_2(model: str, words: str, attncli_run: Command) -> None:
    result = attncli_run(model, *GIVEN)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert words in result.err
    assert "\n  try: " in result.err
    assert "Traceback" not in result.err


# --- what is run --------------------------------------------------------------------------------------


def test_the_backward_pass_is_looked_at_on_demand(attncli_run: Command) -> None:
    assert attncli_run("code.py:bad_backward", *GIVEN).code == 0
    result = attncli_run("code.py:bad_backward", *GIVEN, "--backward", "-f", "json")
    (origin,) = as_json(result)["origins"]
    assert (result.code, origin["phase"], origin["module"]) == (1, "backward", "extra")
    assert (origin["cause"], origin["op"]) == ("division-by-zero", "div")
    healthy = attncli_run("code.py:healthy", *GIVEN, "--backward")
    assert healthy.code == 0
    assert re.search(r"operators \(\d+ forward, \d+ backward\)", healthy.out), healthy.out


def test_training_mode_is_looked_at_on_demand(attncli_run: Command) -> None:
    assert attncli_run("code.py:in_training", *GIVEN).code == 0
    result = attncli_run("code.py:in_training", *GIVEN, "--train-mode", "-f", "json")
    (origin,) = as_json(result)["origins"]
    assert (result.code, origin["cause"], origin["module"]) == (1, "division-by-zero", "extra")


def test_a_model_is_run_in_another_dtype_on_demand(attncli_run: Command) -> None:
    assert attncli_run("code.py:large", *GIVEN).code == 0
    assert attncli_run("code.py:large", *GIVEN, "--dtype", "bfloat16").code == 0
    report = as_json(attncli_run("code.py:large", *GIVEN, "--dtype", "float16", "-f", "json"))
    (origin,) = report["origins"]
    assert (origin["dtype"], origin["module"], origin["op"]) == ("float16", "layers.1", "bmm")
    assert report["environment"]["dtype"] == "float16"


def test_a_model_is_run_under_autocast_on_demand(attncli_run: Command) -> None:
    assert attncli_run("code.py:large", *GIVEN, "--autocast", "bfloat16").code == 0
    result = attncli_run("code.py:large", *GIVEN, "--autocast", "float16", "-f", "json")
    (origin,) = as_json(result)["origins"]
    assert (result.code, origin["module"], origin["cause"]) == (1, "layers.1", "overflow-scores")


def test_training_steps_with_a_rate_that_explodes(attncli_run: Command) -> None:
    steps = ("--steps", "3", "--optimizer", "sgd")
    healthy = attncli_run("code.py:healthy", *GIVEN, *steps, "--lr", "1e-4")
    assert healthy.code == 0
    assert re.search(r"\d+ forward, \d+ backward, \d+ optimizer", healthy.out), healthy.out
    result = attncli_run("code.py:healthy", *GIVEN, *steps, "--lr", "1e30", "-f", "json")
    assert result.code == 1
    origin = as_json(result)["origins"][0]
    assert (origin["phase"], origin["cause"]) == ("optimizer", "optimizer-step")
    assert origin["evidence"]["step"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop", "adagrad"])
def test_every_optimiser_takes_healthy_steps(optimizer: str, attncli_run: Command) -> None:
    result = attncli_run("code.py:healthy", *GIVEN, "--steps", "2", "--optimizer", optimizer)
    assert result.code == 0, result.out


def test_what_if_predicts_and_then_runs(attncli_run: Command) -> None:
    result = attncli_run("code.py:large", *GIVEN, "--what-if", "float16", "-f", "json")
    report = as_json(result)
    assert result.code == 1
    predicted = report["run"]["what_if"]
    assert predicted["dtype"] == "float16"
    assert {one["module"] for one in predicted["predicted"]} == {"layers.1"}
    assert all(one["largest"] > 65504 for one in predicted["predicted"])
    (origin,) = report["origins"]
    assert (origin["dtype"], origin["module"]) == ("float16", "layers.1")
    assert any(note.startswith("what if float16: ") for note in report["notes"])
    healthy = attncli_run("code.py:healthy", *GIVEN, "--what-if", "float16")
    assert healthy.code == 0
    assert "what if float16: 0 operators" in healthy.out


def test_no_confirm_says_that_nothing_was_proved(attncli_run: Command) -> None:
    result = attncli_run("code.py:bad_weight", *GIVEN, "--no-confirm", "-f", "json")
    (origin,) = as_json(result)["origins"]
    assert (result.code, origin["confirmed"]) == (1, None)
    text = attncli_run("code.py:bad_weight", *GIVEN, "--no-confirm").out
    assert "not confirmed" in text
    assert "1 origin of NaN or Inf, not proved" in text
    (origin,) = as_json(attncli_run("code.py:bad_weight", *GIVEN, "--confirm", "-f", "json"))["origins"]
    assert origin["confirmed"] is True


# --- a script of its own ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        ("large", ["--dtype", "float16"], r"output 0: .*float16, \d+ NaN and [1-9]\d* Inf"),
        ("bad_backward", ["--backward"], r"output 0: .*float32, [1-9]\d* NaN and 0 Inf"),
    ],
)
def test_the_saved_script_repeats_the_birth_without_the_model(
    model: str, options: list[str], found: str, attncli_run: Command, tmp_path: Path
) -> None:
    result = attncli_run(f"code.py:{model}", *GIVEN, *options, "--save-repro", "repro.py")
    assert result.code == 1
    assert "wrote repro.py" in result.out
    tensors = torch.load(tmp_path / "repro.pt", weights_only=True)
    assert tensors
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "code.py").unlink()
    done = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "repro.py"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(found, done.stdout), done.stdout
    source = (tmp_path / "repro.py").read_text(encoding="utf-8")
    assert "attncli" not in source
    assert str(tmp_path) not in source


def test_a_healthy_model_leaves_no_script_and_says_so(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("code.py:healthy", *GIVEN, "--save-repro", "repro.py")
    assert result.code == 0
    assert "no operator to save" in result.out
    assert not (tmp_path / "repro.py").exists()


def test_a_bad_weight_has_no_operator_to_save_and_says_so(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("code.py:bad_weight", *GIVEN, "--save-repro", "repro.py")
    assert result.code == 1
    assert "no operator to save" in result.out
    assert not (tmp_path / "repro.py").exists()


def test_a_script_is_saved_without_proof_as_well(attncli_run: Command, tmp_path: Path) -> None:
    """Or the command says why it is not."""
    result = attncli_run(
        "code.py:large", *GIVEN, "--dtype", "float16", "--no-confirm", "--save-repro", "repro.py"
    )
    if result.code == 2:
        assert "--save-repro" in result.err
    else:
        assert result.code == 1
        assert (tmp_path / "repro.py").exists(), result.out


# --- the report ---------------------------------------------------------------------------------------

ORIGIN_KEYS = (
    "value phase cause confirmed module op source tensor layer at dtype evidence path message advice".split()
)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("large", ["--dtype", "float16"]),
        ("bad_weight", []),
        ("bad_backward", ["--backward"]),
        ("healthy", []),
        ("healthy", ["--steps", "3", "--lr", "1e30", "--optimizer", "sgd"]),
    ],
)
def test_the_json_report_has_the_schema(model: str, options: list[str], attncli_run: Command) -> None:
    result = attncli_run(f"code.py:{model}", *GIVEN, *options, "-f", "json")
    report = as_json(result)
    assert (report["schema"], report["command"]) == ("attncli-report/1", "nan-check")
    assert report["verdict"] == ("findings" if result.code else "clean")
    assert report["source"]["path"] == f"code.py:{model}"
    assert {"python", "torch", "device", "dtype", "platform"} <= set(report["environment"])
    assert report["run"]["operators"] > 0
    assert report["run"]["operators"] == sum(report["run"]["operators_by_phase"].values())
    assert report["run"]["inputs"] == {
        "x": {"shape": [2, 6, 16], "dtype": report["run"]["inputs"]["x"]["dtype"]}
    }
    assert len(report["findings"]) == len(report["origins"]) == (1 if result.code else 0)
    for origin in report["origins"]:
        assert list(origin) == ORIGIN_KEYS
        assert origin["value"] in ("nan", "+inf", "-inf")
        assert origin["phase"] in PHASES
        assert origin["confirmed"] in (True, False, None)
        assert isinstance(origin["module"], str)
        assert origin["source"] is None or re.fullmatch(r".+:\d+", origin["source"])
        assert origin["at"] is None or set(origin["at"]) in (
            {"index"},
            {"batch", "head", "query", "key"},
            {"batch", "head", "query"},
        )
        assert all(set(step) == {"module", "op"} for step in origin["path"])
        assert origin["message"]
        assert origin["advice"].endswith(".")
    for finding in report["findings"]:
        assert list(finding) == [
            "code",
            "name",
            "severity",
            "layer",
            "head",
            "message",
            "advice",
            "evidence",
            "fingerprint",
        ]
        assert finding["code"].startswith("ATT7")


@pytest.mark.parametrize(
    ("options", "code", "shown"),
    [
        ([], 1, True),
        (["--fail-on", "never"], 0, True),
        (["--fail-on", "warning"], 1, True),
        (["--ignore", "ATT701"], 0, False),
        (["--ignore", "nan-born"], 0, False),
        (["--ignore", "ATT702"], 1, True),
        (["--select", "ATT701"], 1, True),
        (["--select", "ATT702"], 0, False),
        (["--select", "ATT7"], 1, True),
    ],
)
def test_rules_are_chosen_and_the_exit_code_follows(
    options: list[str], code: int, shown: bool, attncli_run: Command
) -> None:
    result = attncli_run("code.py:large", *GIVEN, "--dtype", "float16", "--no-confirm", *options)
    assert result.code == code
    assert ("ATT701" in result.out) == shown


def test_an_ignored_finding_does_not_hide_that_nan_was_found(attncli_run: Command) -> None:
    """The origins stay facts of the run: nothing says that it was clean of NaN."""
    result = attncli_run("code.py:large", *GIVEN, "--dtype", "float16", "--ignore", "ATT701")
    assert "No NaN or Inf" not in result.out
    assert "1 origin of NaN or Inf" in result.out


def test_a_baseline_of_known_findings_is_left_out(attncli_run: Command) -> None:
    options = ("code.py:bad_weight", *GIVEN, "--no-confirm")
    assert attncli_run(*options, "--write-baseline", "known.json").code == 0
    assert attncli_run(*options, "--baseline", "known.json").code == 0


def test_quiet_leaves_only_the_exit_code(attncli_run: Command) -> None:
    for model, code in (("healthy", 0), ("bad_weight", 1)):
        assert attncli_run(f"code.py:{model}", *GIVEN, "--quiet") == (code, "", "")


def test_the_report_goes_to_a_file_and_not_to_stdout(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("code.py:bad_weight", *GIVEN, "-o", "report.txt")
    assert (result.code, result.out, result.err) == (1, "", "")
    written = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert written == attncli_run("code.py:bad_weight", *GIVEN).out


def test_the_same_run_gives_the_same_report(attncli_run: Command) -> None:
    options = ("code.py:large", *GIVEN, "--dtype", "float16", "-f", "json")
    assert attncli_run(*options).out == attncli_run(*options).out


# --- terminals and pipes ------------------------------------------------------------------------------

LONG = "body.encoder_of_it_all.another_module_with_a_long_name.a_module_with_a_really_long_name.layers.0"


def piped(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    deciding = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "COLORTERM")
    (folder / "code.py").write_text(CODE, encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if key not in deciding}
    done = subprocess.run(
        [sys.executable, "-m", "attncli", "nan-check", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_pipe_gets_no_colour_and_names_in_full_whatever_its_width(tmp_path: Path) -> None:
    options = ("code.py:deep", "--input", "code.py:batch", "--dtype", "float16")
    code, text = piped(tmp_path, *options, COLUMNS="60", TERM="xterm-256color")
    assert code == 1
    assert "\x1b" not in text
    assert text.count(LONG) >= 2
    assert "q·k = " in text


def on_terminal(folder: Path, *arguments: str, columns: int, **environment: str) -> tuple[int, str]:
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    import struct

    (folder / "code.py").write_text(CODE, encoding="utf-8")
    deciding = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "COLORTERM")
    kept = {key: value for key, value in os.environ.items() if key not in deciding}
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "attncli", "nan-check", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as running:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says "input/output error" once the last writer is gone
                break
            if not piece:
                break
            output += piece
        os.close(ours)
        return running.wait(), output.decode("utf-8").replace("\r\n", "\n")


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colour", "no-colour"])
def test_a_narrow_terminal_gets_no_line_wider_than_itself(
    environment: dict[str, str], tmp_path: Path
) -> None:
    options = ("code.py:deep", "--input", "code.py:batch", "--dtype", "float16")
    code, output = on_terminal(tmp_path, *options, columns=60, TERM="xterm-256color", **environment)
    assert code == 1
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", output)) == (not environment)
    shown = CONTROL.sub("", output)
    shown = shown[shown.rindex("code.py:deep") :] if "code.py:deep" in shown else shown
    assert max(map(len, shown.splitlines())) <= 60
    assert "overflow-scores" in shown
    assert "65 504" in shown.replace("\n", " ")


# --- wrong arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--save-repro", "repro.txt"], ["--save-repro", "repro.txt is no Python file.", "ends in .py"]),
        (["--steps", "-1"], ["--steps"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "fast"], ["--lr"]),
        (["--optimizer", "lion"], ["--optimizer", "adamw"]),
        (["--dtype", "int8"], ["--dtype", "float16"]),
        (["--what-if", "fp8"], ["--what-if", "float16"]),
        (["--autocast", "float64"], ["--autocast", "float16"]),
        (["--select", "ATT999"], ["--select", "no rule is named 'ATT999'.", "ATT701"]),
        (["--device", "toaster"], ["toaster"]),
        (["--text", "hello"], ["--text", "--input"]),
        (["-o", "nowhere/report.txt"], ["nowhere/report.txt", "there is no folder"]),
        (["-o", "code.py"], ["code.py", "overwrite"]),
        (["--layres", "1"], ["--layres"]),
        (
            ["--save-repro", "nowhere/repro.py", "--dtype", "float16"],
            ["repro.py", "there is no folder", "try: "],
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_told_in_three_parts(
    options: list[str], words: list[str], attncli_run: Command, tmp_path: Path
) -> None:
    result = attncli_run("code.py:large", *GIVEN, *options)
    assert (result.code, result.out) == (2, ""), result.out
    assert result.err.startswith("error: ")
    assert "\n  try: " in result.err
    for word in words:
        assert word in result.err, result.err
    assert "Traceback" not in result.err
    assert (tmp_path / "code.py").read_text(encoding="utf-8") == CODE


@pytest.mark.parametrize("target", ["code.py", "batch.pt"])
def test_the_saved_script_overwrites_nothing_that_is_read(
    target: str, attncli_run: Command, tmp_path: Path
) -> None:
    """Its tensors lie beside it, in a file of the same name: neither may be the model's or the batch's."""
    torch.save({"x": torch.randn(2, 6, 16)}, tmp_path / "batch.pt")
    before = (tmp_path / target).read_bytes()
    script = target if target.endswith(".py") else "batch.py"
    result = attncli_run("code.py:large", "--input", "batch.pt", "--dtype", "float16", "--save-repro", script)
    assert (tmp_path / target).read_bytes() == before
    assert result.code == 2
    assert "overwrite" in result.err


def test_steps_of_a_model_without_parameters_are_told_as_an_error(
    attncli_run: Command, tmp_path: Path
) -> None:
    (tmp_path / "frozen.py").write_text(
        "import code\nfrom torch import nn\ndef build():\n    return nn.Softmax(-1)\n", encoding="utf-8"
    )
    result = attncli_run("frozen.py:build", "--input", "code.py:batch", "--steps", "1")
    assert (result.code, result.out) == (2, "")
    assert "\n  try: " in result.err


def test_every_option_of_the_command_is_tested() -> None:
    from typer.main import get_command

    parameters = get_command(app).commands["nan-check"].params  # type: ignore[attr-defined]
    names = {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("--")}
    source = Path(__file__).read_text(encoding="utf-8")
    own = names - {"--help"}
    assert {"--backward", "--steps", "--optimizer", "--lr", "--confirm", "--no-confirm"} < own
    # Which model and batch: the same options as of the other commands, tested with them.
    shared = set(
        "--layer --text --seq-len --batch-size --seed --weights --strict --no-strict --trust-remote-code "
        "--device-map --offload-folder --format --output".split()
    )
    # Training scripts: tests/test_cli_watching.py.
    source += (Path(__file__).parent / "test_cli_watching.py").read_text(encoding="utf-8")
    assert {name for name in own - shared if f'"{name}"' not in source} == set()


def test_help_tells_what_is_done_and_imports_no_tensor_library(tmp_path: Path) -> None:
    script = (
        "import sys, atexit; from attncli.__main__ import main\n"
        "atexit.register(lambda: sys.stderr.write(' '.join(sys.modules)))\n"
        "sys.argv = ['attncli', 'nan-check', '--help']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {"torch", "numpy", "attncli.api", "attncli.model", "attncli.trace"}.isdisjoint(done.stderr.split())
    assert "Find where a NaN or Inf was born" in done.stdout


def test_a_search_for_nan_takes_no_layer(attncli_run: Command) -> None:
    result = attncli_run("code.py:healthy", "--layer", "layers.1")
    assert result.code == 2
    assert "looks at every operator" in result.err
