"""The commands `entropy` and `overflow` as a user and a CI job meet them; the run itself is a report made by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from measured_reports import call, encoder, finding, numbers, report

import attncli
from attncli.cli import app
from attncli.errors import UsageError
from attncli.records import Report

ROOT = Path(attncli.__file__).parents[1]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Pipeline:
    """Stands for `api.measure_model`: keeps what it is asked and answers with `report`, or raises `error`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.report: Report | None = None
        self.error: BaseException | None = None

    def __call__(self, command: str, spec: str, **options: Any) -> Report:
        self.asked.append((command, spec, options))
        print("the user's own code talks")  # noqa: T201 - that is the point
        if self.error is not None:
            raise self.error
        return self.report or encoder(command, 2)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = Pipeline()
    monkeypatch.setattr("attncli.api.measure_model", made, raising=False)
    return made


@pytest.fixture
def attncli_run(attncli_run: Command, pipeline: Pipeline) -> Command:
    """Every run goes to the pipeline made by hand."""
    return attncli_run


COMMANDS = ("entropy", "overflow")


# --- what is asked ------------------------------------------------------------------------------------

DEFAULTS: dict[str, Any] = {
    "text": (),
    "input": None,
    "seq_len": None,
    "batch_size": None,
    "seed": 0,
    "device": "auto",
    "dtype": None,
    "autocast": None,
    "layers": (),
    "train_mode": False,
    "weights": None,
    "strict": True,
    "trust_remote_code": False,
    "device_map": None,
    "offload_folder": None,
    "progress": None,
}
GIVEN: list[tuple[list[str], dict[str, Any]]] = [
    (["--text", "one", "--text", "two words"], {"text": ("one", "two words")}),
    (["--input", "batch.py:make"], {"input": "batch.py:make"}),
    (["--seq-len", "64"], {"seq_len": 64}),
    (["--batch-size", "3"], {"batch_size": 3}),
    (["--seed", "7"], {"seed": 7}),
    (["--device", "cuda:1"], {"device": "cuda:1"}),
    (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    (["--autocast", "float16"], {"autocast": "float16"}),
    (["--layer", "h.*.attn", "-l", "3"], {"layers": ("h.*.attn", "3")}),
    (["--train-mode"], {"train_mode": True}),
    (["--weights", "w.pt"], {"weights": "w.pt"}),
    (["--no-strict"], {"strict": False}),
    (["--strict"], {}),
    (["--trust-remote-code"], {"trust_remote_code": True}),
    (["--device-map", "auto"], {"device_map": "auto"}),
    (["--offload-folder", "disk"], {"offload_folder": "disk"}),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("options", "changes"), [([], {}), *GIVEN])
def test_every_option_reaches_the_pipeline_and_nothing_else_changes(
    command: str, options: list[str], changes: dict[str, Any], attncli_run: Command, pipeline: Pipeline
) -> None:
    assert attncli_run(command, "./model", *options).code == 0
    assert pipeline.asked == [(command, "./model", {**DEFAULTS, **changes})]


def test_maps_reach_the_pipeline_of_entropy_and_overflow_has_none(
    attncli_run: Command, pipeline: Pipeline
) -> None:
    assert attncli_run("entropy", "./model", "--maps", "3:0,5-7", "--maps", "h.*").code == 0
    assert pipeline.asked == [("entropy", "./model", {**DEFAULTS, "maps": ("3:0,5-7", "h.*")})]
    result = attncli_run("overflow", "./model", "--maps", "3")
    assert (result.code, result.out) == (2, "")
    assert "no such option: --maps" in result.err.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_test(command: str) -> None:
    from typer.main import get_command

    parameters = get_command(app).commands[command].params  # type: ignore[attr-defined]
    names = [name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("--")]
    assert len(names) > 20
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in names if f'"{name}"' not in source] == []


def test_the_options_of_the_pipeline_are_those_of_the_command() -> None:
    import dataclasses
    import inspect

    from attncli import api
    from attncli.api.loading import RunSettings

    settings = {field.name for field in dataclasses.fields(RunSettings)}
    assert {*settings, *inspect.signature(api.measure_model).parameters} >= {"command", "spec", *DEFAULTS}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--dtype", "float8"], "'float8' is not one of"),
        (["--autocast", "float32"], "'float32' is not one of"),
        (["--seq-len", "0"], "0 is not in the range"),
        (["--batch-size", "-1"], "-1 is not in the range"),
        (["--seed", "x"], "'x' is not a valid int"),
        (["--sequence", "3"], "no such option"),
    ],
)
def test_a_wrong_value_is_a_message_in_three_parts_before_anything_runs(
    command: str, options: list[str], problem: str, attncli_run: Command, pipeline: Pipeline
) -> None:
    result = attncli_run(command, "m", *options)
    assert (result.code, result.out, pipeline.asked) == (2, "", [])
    assert re.match(rf"error: attncli {command}: .+\n  try: attncli {command} --help", result.err)
    assert problem in result.err.lower()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_without_running_anything(command: str, attncli_run: Command) -> None:
    result = attncli_run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert [
        name for options, _ in GIVEN for name in options if name[:2] == "--" and name not in result.out
    ] == []
    assert max(map(len, result.out.splitlines())) <= 80


# --- what is answered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_carries_the_report_alone_whatever_the_model_prints(
    command: str, attncli_run: Command
) -> None:
    result = attncli_run(command, "m", "--format", "json")
    assert json.loads(result.out)["command"] == command
    assert result.err == "the user's own code talks\n"
    table = attncli_run(command, "m").out
    assert table.startswith("./minilm  huggingface")
    assert table.endswith("2 calls, 2 explained (largest difference 3e-06); no findings.\n")


def test_each_command_shows_its_own_numbers(attncli_run: Command) -> None:
    assert "layer  H/ln n " in attncli_run("entropy", "m").out
    assert " layer   |q·k|   head   score " in attncli_run("overflow", "m").out


def test_layer_shows_every_metric_of_every_head(attncli_run: Command) -> None:
    assert "entropy_rest" not in attncli_run("entropy", "m").out
    assert "entropy_rest" in attncli_run("entropy", "m", "--layer", "0").out


@pytest.mark.parametrize("flag", ["--quiet", "-q"])
def test_quiet_lets_only_the_exit_code_speak(flag: str, attncli_run: Command, pipeline: Pipeline) -> None:
    pipeline.report = report("entropy", [])
    assert attncli_run("entropy", "m", flag)[:2] == (3, "")


def test_the_report_can_go_to_a_file(attncli_run: Command, tmp_path: Path) -> None:
    result = attncli_run("overflow", "m", "--output", "r.json", "-f", "json")
    assert (result.code, result.out) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["verdict"] == "clean"


@pytest.mark.parametrize(
    ("output", "arguments"),
    [
        ("m.pt", ["m.pt"]),
        ("code.py", ["code.py:build"]),
        ("w.pt", ["code.py:build", "--weights", "w.pt"]),
        ("batch.npz", ["m.pt", "--input", "batch.npz"]),
        ("batch.py", ["m.pt", "--input", "batch.py:make"]),
    ],
)
def test_nothing_that_is_read_is_overwritten_by_the_report(
    output: str, arguments: list[str], attncli_run: Command, tmp_path: Path, pipeline: Pipeline
) -> None:
    for name in ("m.pt", "code.py", "w.pt", "batch.npz", "batch.py"):
        (tmp_path / name).write_text("precious", encoding="utf-8")
    result = attncli_run("entropy", *arguments, "-o", output)
    assert (result.code, pipeline.asked) == (2, [])
    assert result.err.startswith(f"error: {output}: the report would overwrite")
    assert (tmp_path / output).read_text(encoding="utf-8") == "precious"


# --- exit codes ---------------------------------------------------------------------------------------


def found(severity: str) -> Report:
    one = call(0, "h.0.attn")
    return report(
        "entropy", [(one, numbers(one))], findings=(finding("ATT601", "x", severity, "h.0.attn: y."),)
    )


@pytest.mark.parametrize(
    ("severity", "options", "code"),
    [
        ("error", [], 1),
        ("warning", [], 0),
        ("warning", ["--fail-on", "warning"], 1),
        ("error", ["--fail-on", "never"], 0),
    ],
)
def test_findings_decide_the_exit_code(
    severity: str, options: list[str], code: int, attncli_run: Command, pipeline: Pipeline
) -> None:
    pipeline.report = found(severity)
    assert attncli_run("entropy", "m", *options).code == code


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_not_observed_is_exit_code_3(command: str, attncli_run: Command, pipeline: Pipeline) -> None:
    pipeline.report = report(command, [])
    result = attncli_run(command, "m")
    assert result.code == 3
    assert result.out.endswith("Not observed: no attention ran.\n")
    one = call(0, "h.0.attn", explained=False, reason="the output differs")
    pipeline.report = report(command, [(one, numbers(one))])
    result = attncli_run(command, "m")
    assert result.code == 3
    assert "not observed: h.0.attn: the output differs.\n" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_an_error_of_the_pipeline_is_shown_in_three_parts(
    command: str, attncli_run: Command, pipeline: Pipeline
) -> None:
    pipeline.error = UsageError("m", "it has no \x1b[31mtokenizer.", "Give --input.")
    result = attncli_run(command, "m")
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith("error: m: it has no \\x1b[31mtokenizer.\n  try: Give --input.\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupting_is_neither_clean_nor_a_finding(
    command: str, attncli_run: Command, pipeline: Pipeline
) -> None:
    pipeline.error = KeyboardInterrupt()
    result = attncli_run(command, "m")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_an_interrupt_that_a_library_turns_into_another_error_is_one_still(
    attncli_run: Command, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As numpy does when Ctrl-C is pressed while it is imported."""

    def importing(*_: object, **__: object) -> Report:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None
        raise AssertionError("nothing was interrupted")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("attncli.api.measure_model", importing)
    result = attncli_run("entropy", "m")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_bug_of_attncli_keeps_its_traceback(attncli_run: Command, pipeline: Pipeline) -> None:
    pipeline.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        attncli_run("entropy", "m")


@pytest.mark.parametrize("name", ["--select", "--ignore"])
def test_a_wrong_rule_is_told_before_the_model_is_loaded(
    name: str, attncli_run: Command, pipeline: Pipeline
) -> None:
    result = attncli_run("entropy", "m", name, "ATT999")
    assert (result.code, pipeline.asked) == (2, [])
    assert "no rule is named 'ATT999'." in result.err


def test_known_findings_of_a_baseline_are_left_out(attncli_run: Command, pipeline: Pipeline) -> None:
    pipeline.report = found("error")
    assert attncli_run("entropy", "m", "--write-baseline", "known.json").code == 0
    assert attncli_run("entropy", "m").code == 1
    assert attncli_run("entropy", "m", "--baseline", "known.json").code == 0


# --- settings -----------------------------------------------------------------------------------------


def test_defaults_come_from_pyproject_and_the_command_line_wins(
    attncli_run: Command, tmp_path: Path, pipeline: Pipeline
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.attncli]\nfail-on = "note"\n[tool.attncli.entropy]\ntext = "hello"\nseq-len = 32\nstrict = false\n'
        'dtype = "float16"\nlayer = ["0"]\nweights = "w.pt"\ninput = "batch.py:make"\n',
        encoding="utf-8",
    )
    pipeline.report = found("note")
    assert attncli_run("entropy", "m", "--seq-len", "8").code == 1
    assert attncli_run("overflow", "m").code == 1
    entropy, overflow = (asked[2] for asked in pipeline.asked)
    expected = {"text": ("hello",), "seq_len": 8, "strict": False, "dtype": "float16", "layers": ("0",)}
    assert {name: entropy[name] for name in expected} == expected
    assert entropy["weights"] == str(tmp_path / "w.pt")
    assert entropy["input"] == str(tmp_path / "batch.py:make")
    assert overflow == DEFAULTS


def test_an_unknown_setting_is_an_error_that_lists_the_known_ones(
    attncli_run: Command, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.attncli.overflow]\nseqlen = 3\n", encoding="utf-8")
    result = attncli_run("overflow", "m")
    assert result.code == 2
    assert "[tool.attncli.overflow] has no setting 'seqlen'." in result.err
    assert "seq-len" in result.err


# --- terminals and pipes ------------------------------------------------------------------------------

# The command as a process of its own, with a run made by hand in place of the model.
STUB = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import measured_reports
from attncli import api
def measured(command, spec, *, progress, **options):
    for done in range(3 if progress else 0):
        progress("running", done, 3)
    return measured_reports.encoder(command, {layers}, {heads})
api.measure_model = measured
from attncli.__main__ import main
sys.argv = ["attncli", *sys.argv[1:]]
main()
"""


def stubbed(*arguments: str, layers: int = 6, heads: int = 12) -> list[str]:
    source = STUB.format(tests=str(ROOT / "tests"), root=str(ROOT), layers=layers, heads=heads)
    return [sys.executable, "-c", source, *arguments]


def clean_environment(**changes: str) -> dict[str, str]:
    deciding = (
        "NO_COLOR",
        "FORCE_COLOR",
        "COLUMNS",
        "LINES",
        "PYTHONIOENCODING",
        "PYTHONUTF8",
        "TERM",
        "COLORTERM",
    )
    return {**{key: value for key, value in os.environ.items() if key not in deciding}, **changes}


def on_terminal(
    folder: Path, *arguments: str, columns: int, heads: int = 12, **environment: str
) -> tuple[int, str]:
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(
        stubbed(*arguments, heads=heads),
        cwd=folder,
        env=clean_environment(PYTHONUTF8="1", **environment),
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


@pytest.mark.parametrize("columns", [40, 120])
def test_a_terminal_gets_painted_cells_progress_and_no_line_wider_than_itself(
    columns: int, tmp_path: Path
) -> None:
    code, output = on_terminal(tmp_path, "entropy", "m", columns=columns, heads=40, TERM="xterm-256color")
    assert code == 0
    assert "running" in output
    assert "\x1b[38;5;231;48;5;24m" in output
    shown = CONTROL.sub("", output[output.rindex("./minilm") :])
    assert "running" not in shown
    assert max(map(len, shown.splitlines())) <= columns
    assert len(re.findall(r"\b\d\.\d\d\b", shown)) >= 6 * 39


@pytest.mark.parametrize("environment", [{"TERM": "xterm-256color", "NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_without_colour_gets_plain_numbers(environment: dict[str, str], tmp_path: Path) -> None:
    _, output = on_terminal(tmp_path, "entropy", "m", "--quiet", columns=80, **environment)
    assert output == ""
    code, output = on_terminal(tmp_path, "entropy", "m", columns=80, **environment)
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", output)
    assert " 2.67" in output


def test_a_reader_that_leaves_early_ends_the_command_quietly_with_its_own_code(tmp_path: Path) -> None:
    with subprocess.Popen(
        stubbed("entropy", "m", layers=200, heads=64),
        cwd=tmp_path,
        env=clean_environment(PYTHONUTF8="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait() == 0


def test_what_is_piped_has_no_colour_and_every_head_in_its_row(tmp_path: Path) -> None:
    done = subprocess.run(
        stubbed("entropy", "m", heads=64),
        cwd=tmp_path,
        env=clean_environment(TERM="xterm-256color", COLUMNS="40", PYTHONUTF8="1"),
        capture_output=True,
        check=True,
    )
    text = done.stdout.decode("utf-8")
    assert "\x1b" not in text
    assert [len(line.split()) for line in text.splitlines() if re.match(r" +[0-5]  ", line)] == [66] * 6


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_tensor_library(command: str, tmp_path: Path) -> None:
    script = (
        "import sys, atexit; from attncli.__main__ import main\n"
        "atexit.register(lambda: sys.stderr.write(' '.join(sys.modules)))\n"
        f"sys.argv = ['attncli', {command!r}, '--help']; main()"
    )
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.split())
    assert "attncli.cli.model_options" in loaded
    assert {"torch", "numpy", "attncli.api", "attncli.model", "attncli.trace"}.isdisjoint(loaded)
