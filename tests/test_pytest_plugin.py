"""The fixture check_attention: what fails a test and what it shows then, what passes through, what it costs others."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from test_check import CODE
from torch import nn

import attncli
import attncli.api
from attncli.pytest_plugin import CheckAttention, checker

pytest_plugins = ["pytester"]

Failure = Callable[..., str]


class Attention(nn.Module):
    def __init__(self, *, hide: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.hide, self.dropout = hide, nn.Dropout(dropout)

    def forward(self, x_BTE: torch.Tensor, *, select: int = 0) -> torch.Tensor:
        b, t, _ = x_BTE.shape
        q, k, v = self.qkv(x_BTE).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(8)
        if self.hide:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x_BTE.device), -math.inf)
        return self.out((self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).reshape(b, t, 32)) + select


@pytest.fixture(name="x_BTE")
def batch() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 12, 32)


@pytest.fixture
def failure(check_attention: CheckAttention) -> Failure:
    """The message with which the fixture fails a test."""

    def message(*args: Any, check: CheckAttention = check_attention, **kwargs: Any) -> str:
        with pytest.raises(pytest.fail.Exception) as caught:
            check(*args, **kwargs)
        assert caught.value.pytrace is False
        return str(caught.value.msg)

    return message


# --- what fails and what does not ---------------------------------------------------------------------


def test_a_healthy_model_gives_its_report(check_attention: CheckAttention, x_BTE: torch.Tensor) -> None:
    report = check_attention(Attention(), x_BTE, fail_on="note")
    assert isinstance(report, attncli.Report)
    assert (report.command, report.verdict, len(report.calls)) == ("check", "clean", 1)
    assert report.calls[0].scale == pytest.approx(8**-0.5)


def test_a_finding_fails_with_its_code_the_line_and_the_table(failure: Failure, x_BTE: torch.Tensor) -> None:
    first, blank, *table = failure(Attention(hide=True), x_BTE).splitlines()
    line = failure.__code__.co_firstlineno + 2  # the line of check(…) above
    assert (first, blank) == (f"ATT701 in Attention (test_pytest_plugin.py:{line})", "")
    assert table[0] == "Attention  code · cpu · float32"
    assert table[-1] == "1 attention layer, 1 call, all explained; 1 error."
    assert any(row.startswith("NaN        1 error") for row in table)
    assert max(map(len, table)) <= 80
    assert "\x1b" not in "".join(table)


def test_a_hostile_name_is_harmless_in_the_message(failure: Failure, x_BTE: torch.Tensor) -> None:
    hostile = type("Red\x1b[31m\nATT", (nn.Sequential,), {})()
    hostile.add_module("layer\udc80\x1b[2J", Attention(hide=True))
    message = failure(hostile, x_BTE)
    assert message.startswith("ATT701 in Red\\x1b[31m\\x0aATT (")
    assert "layer\\xdc80\\x1b[2J" in message
    assert all(line.isprintable() for line in message.splitlines())


def test_attention_that_was_not_observed_fails(failure: Failure, x_BTE: torch.Tensor) -> None:
    message = failure(nn.Linear(32, 32), x_BTE)
    assert message.startswith("not observed: attention of Linear (")
    assert message.endswith("Not observed: no attention ran; no findings.")
    assert failure(nn.Linear(32, 32), x_BTE, fail_on="never").startswith("not observed: ")


@pytest.mark.parametrize("fail_on", ["note", "warning", "error", "never"])
def test_fail_on_is_the_severity_from_which_a_finding_fails(
    fail_on: Any, check_attention: CheckAttention, failure: Failure, x_BTE: torch.Tensor
) -> None:
    model = Attention()
    with torch.no_grad():
        model.qkv.weight[64:72].zero_()
        model.qkv.bias[64:72].zero_()
    if fail_on in ("note", "warning"):
        assert failure(model, x_BTE, fail_on=fail_on).startswith("ATT202 in Attention (")
    else:
        report = check_attention(model, x_BTE, fail_on=fail_on)
        assert [finding.code for finding in report.findings] == ["ATT202"]
    if fail_on == "error":  # the first line names what fails, and nothing else
        assert failure(model, x_BTE, expect="heads=5").startswith("ATT801 in Attention (")


def test_select_and_ignore_take_one_or_several(
    check_attention: CheckAttention, failure: Failure, x_BTE: torch.Tensor
) -> None:
    model = Attention(hide=True)
    assert check_attention(model, x_BTE, ignore="ATT701").findings == ()
    assert check_attention(model, x_BTE, ignore=["ATT1", "nan-born"]).findings == ()
    assert check_attention(model, x_BTE, select="ATT1,ATT2").findings == ()
    assert failure(model, x_BTE, select=("ATT1", "ATT7"), expect="heads=5").startswith("ATT701 in ")


def test_expectations_that_are_not_met_fail(
    check_attention: CheckAttention, failure: Failure, x_BTE: torch.Tensor
) -> None:
    assert check_attention(Attention(), x_BTE, expect=["heads=4", "head_dim=8"]).verdict == "clean"
    message = failure(Attention(hide=True), x_BTE, expect="heads=5,kv_heads=4")
    assert "heads: expected 5, found 4." in message
    assert re.match(r"ATT\d+, ATT\d+ in Attention \(", message)
    assert {"ATT701", "ATT801"} == set(re.findall(r"ATT\d+", message.splitlines()[0]))


def test_findings_of_a_baseline_are_known(
    check_attention: CheckAttention, failure: Failure, x_BTE: torch.Tensor, tmp_path: Path
) -> None:
    model = Attention(hide=True)
    report = check_attention(model, x_BTE, fail_on="never")
    known = tmp_path / "known.json"
    known.write_text(report.to_json(), encoding="utf-8")
    again = check_attention(model, x_BTE, baseline=known)
    assert (again.findings, [finding.code for finding in again.known]) == ((), ["ATT701"])
    assert failure(model, x_BTE, baseline=str(known), expect="heads=5").startswith("ATT801 in ")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fail_on": "fatal"}, "fail_on: no severity is called 'fatal'. ("),
        ({"fail_on": 3}, "fail_on: no severity is called 3. ("),
        ({"ignore": "ATX"}, "--ignore: no rule is named 'ATX'. ("),
        ({"select": [7]}, "--select: no rule is named '7'. ("),
        ({"expect": "hats=3"}, "--expect: nothing is called 'hats'. ("),
        ({"baseline": "missing\x1b[31m.json"}, "missing\\x1b[31m.json: the baseline cannot be read"),
    ],
)
def test_a_wrong_option_fails_in_a_sentence(
    options: dict[str, Any], said: str, failure: Failure, x_BTE: torch.Tensor
) -> None:
    message = failure(Attention(), x_BTE, **options)
    assert message.startswith(said)
    problem, *remedy = message.splitlines()
    assert re.search(r" \(test_pytest_plugin\.py:\d+\)$", problem)
    assert remedy[0].startswith("  try: ")
    assert max(map(len, remedy)) <= 80


# --- the model is the user's --------------------------------------------------------------------------


def test_what_the_model_raises_passes_through(check_attention: CheckAttention, x_BTE: torch.Tensor) -> None:
    error = LookupError("of the model")

    def model(x: torch.Tensor) -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        check_attention(model, x_BTE)
    assert caught.value is error


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_as_it_is_and_stays_so(
    training: bool, check_attention: CheckAttention, x_BTE: torch.Tensor
) -> None:
    model = Attention(dropout=0.5).train(training)
    before = torch.get_rng_state()
    report = check_attention(model, x_BTE)
    assert report.calls[0].dropout == (0.5 if training else 0.0)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_keyword_arguments_are_the_models_and_functions_take_those_that_are_ours(
    check_attention: CheckAttention, x_BTE: torch.Tensor
) -> None:
    assert check_attention(Attention(), x_BTE=x_BTE).verdict == "clean"
    model, seen = Attention(), []

    def forward(x_BTE: torch.Tensor) -> torch.Tensor:
        seen.append(5)
        return model(x_BTE, select=5)

    assert check_attention(forward, x_BTE).verdict == "clean"
    assert seen == [5]


@pytest.mark.gpu
def test_a_model_on_another_device_is_checked_there(check_attention: CheckAttention) -> None:
    device = "cuda" if torch.cuda.is_available() else "mps"
    if device == "mps" and not torch.backends.mps.is_available():
        pytest.skip("no GPU here")
    report = check_attention(Attention().to(device), torch.randn(2, 12, 32, device=device))
    assert report.environment["device"].startswith(device)


# --- a MODEL by name ----------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "code.py"
    file.write_text(CODE, encoding="utf-8")
    return file


def test_a_model_by_name_runs_with_the_options_of_the_command_line(
    check_attention: CheckAttention, failure: Failure, code: Path
) -> None:
    batch = f"{code}:batch"
    report = check_attention(f"{code}:healthy", input=batch, device=torch.device("cpu"), dtype=torch.float64)
    assert report.source["path"] == f"{code}:healthy"
    assert {call.dtype for call in report.calls} == {"float64"}
    assert len(report.layers) == 2
    assert len(check_attention(Path(f"{code}:healthy"), input=batch, layer="*.1").layers) == 1
    synthetic = check_attention(f"{code}:healthy", seq_len=5, batch_size=3)
    assert {(call.batch, call.queries) for call in synthetic.calls} == {(3, 5)}
    message = failure(f"{code}:hidden", input=batch, expect="layers=2", confirm=False)
    assert message.startswith("ATT701 in ")
    assert "proof    not confirmed: not tried" in message


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [
        ((), {"inputs": "x"}, ":healthy: attncli check has no option 'inputs'. ("),
        ((3,), {}, ":healthy: a MODEL given by name takes no arguments of a forward pass. ("),
    ],
)
def test_a_model_by_name_refuses_what_is_no_option(
    args: tuple[Any, ...], options: dict[str, Any], said: str, failure: Failure, code: Path
) -> None:
    assert said in failure(f"{code}:healthy", *args, **options)


def test_an_option_that_is_nearly_right_gets_a_suggestion(failure: Failure) -> None:
    assert "\n  try: Did you mean 'input'? Known: text, input, " in failure("code.py:healthy", inputs="x")


def test_options_arrive_as_the_command_line_gives_them(
    check_attention: CheckAttention, x_BTE: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, given = check_attention(Attention(), x_BTE), {}

    def check_model(spec: str, **settings: Any) -> attncli.Report:
        given.update(settings, spec=spec)
        return report

    monkeypatch.setattr(attncli.api, "check_model", check_model)
    options = {"input": Path("a.pt"), "weights": Path("w.pt"), "device": torch.device("cpu"), "seed": 3}
    check_attention(Path("m"), text="two words", layer=3, dtype=torch.float16, autocast=None, **options)
    assert given == {
        "spec": "m",
        "expect": (),
        "layers": ("3",),
        "text": ("two words",),
        "input": "a.pt",
        "weights": "w.pt",
        "device": "cpu",
        "dtype": "float16",
        "autocast": None,
        "seed": 3,
    }


def test_a_model_that_is_not_there_fails_in_a_sentence(failure: Failure, tmp_path: Path) -> None:
    message = failure(tmp_path / "none" / "model.pt2")
    assert "model.pt2: " in message
    assert "\n  try: " in message


# --- settings -----------------------------------------------------------------------------------------


def project(folder: Path, *lines: str) -> CheckAttention:
    (folder / "pyproject.toml").write_text("\n".join(["[tool.attncli]", *lines]), encoding="utf-8")
    return checker(folder)


def test_what_counts_is_taken_from_pyproject_and_an_argument_goes_before_it(
    failure: Failure, x_BTE: torch.Tensor, tmp_path: Path
) -> None:
    model = Attention(hide=True)
    check = project(tmp_path, 'ignore = ["ATT701"]', 'fail-on = "note"')
    assert check(model, x_BTE).findings == ()
    assert failure(model, x_BTE, ignore=(), check=check).startswith("ATT701 in ")
    check = project(tmp_path, 'fail-on = "error"', "[tool.attncli.check]", 'fail-on = "never"')
    assert len(check(model, x_BTE).findings) == 1
    assert failure(model, x_BTE, fail_on="error", check=check).startswith("ATT701 in ")
    check = project(tmp_path, 'select = "ATT4"', "[tool.attncli.nan-check]", 'select = ["ATT7"]')
    assert check(model, x_BTE).findings == ()


def test_what_is_of_one_model_is_not_taken_from_pyproject(x_BTE: torch.Tensor, tmp_path: Path) -> None:
    check = project(
        tmp_path, 'baseline = "none.json"', 'output = "r.json"', "[tool.attncli.check]", 'expect = "heads=5"'
    )
    assert check(Attention(), x_BTE, fail_on="note").verdict == "clean"
    assert [file.name for file in tmp_path.iterdir()] == ["pyproject.toml"]


def test_settings_are_found_above_the_folder_and_wherever_the_test_stands(
    x_BTE: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(tmp_path, 'ignore = "ATT701"')
    (tmp_path / "tests").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert checker(tmp_path / "tests")(Attention(hide=True), x_BTE).findings == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('fail-om = "error"', "[tool.attncli] has no setting 'fail-om'. ("),
        ('fail-on = "fatal"', "fail_on: no severity is called 'fatal'. ("),
        ("ignore = [1]", "--ignore: no rule is named '1'. ("),
        ("ignore = ", "it is not valid TOML ("),
    ],
)
def test_settings_that_are_wrong_fail_in_a_sentence(
    line: str, said: str, failure: Failure, x_BTE: torch.Tensor, tmp_path: Path
) -> None:
    assert said in failure(Attention(), x_BTE, check=project(tmp_path, line))


# --- in a run of pytest -------------------------------------------------------------------------------

USERS_TESTS = """
import sys
import pytest

@pytest.fixture(scope="module")
def report(check_attention):
    import torch
    torch.manual_seed(0)
    from code_under_test import healthy, batch
    return check_attention(healthy(), *batch())

def test_a_number(report):
    assert max(row.value for row in report.measurements if row.metric == "score_max") < 100

@pytest.mark.parametrize("build", ["healthy", "hidden", "no_attention"])
def test_each(check_attention, build):
    import code_under_test as code
    check_attention(getattr(code, build)(), *code.batch())
    check_attention(getattr(code, build)(), *code.batch())

class TestInAClass:
    def test_its_own_error(self, check_attention):
        import code_under_test as code
        check_attention(code.broken(), *code.batch())
"""


def test_a_failed_test_shows_the_table_and_nothing_of_our_stack(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(code_under_test=CODE, test_model=USERS_TESTS)
    done = pytester.runpytest_subprocess(
        "-W", "error", "--strict-markers", "-p", "no:cacheprovider", "--junitxml=junit.xml"
    )
    done.assert_outcomes(passed=2, failed=3)
    out = done.stdout.str()
    shown = out.partition("test_each[hidden]")[2].partition("test_its_own_error")[0]
    assert "ATT701 in Model (test_model.py:17)\n\nModel  code · cpu · float32\n" in shown
    assert "error ATT701 nan-born  layers.0" in shown
    assert "not observed: attention of Sequential (test_model.py:17)" in shown
    assert ".py:" not in re.sub(r"(test_model|code_under_test)\.py:\d+", "", shown)
    assert max(map(len, shown.splitlines())) <= 80
    assert "FAILED test_model.py::test_each[hidden] - Failed: ATT701 in Model" in out
    assert "E       RuntimeError: size mismatch" in out

    cases = ElementTree.parse(pytester.path / "junit.xml").getroot().iter("testcase")
    failures = {case.get("name"): case.find("failure") for case in cases}
    assert failures["test_each[healthy]"] is None
    told = failures["test_each[hidden]"]
    assert told is not None
    assert told.text is not None
    assert "ATT701 in Model (test_model.py:17)\n\nModel  code · cpu · float32\n" in told.text


BYSTANDERS = """
import sys

def test_nothing_is_imported_for_a_run_without_a_check():
    assert {"torch", "rich", "typer", "attncli.api"}.isdisjoint(sys.modules)
"""


@pytest.mark.parametrize("options", [(), ("-p", "no:attncli")])
def test_a_run_that_checks_nothing_is_left_alone(options: tuple[str, ...], pytester: pytest.Pytester) -> None:
    pytester.makepyfile(BYSTANDERS)
    done = pytester.runpytest_subprocess(
        "-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider", *options
    )
    done.assert_outcomes(passed=1)
    assert ("attncli" in done.stdout.str()) is not bool(options)  # the list of plugins


def test_without_the_plugin_there_is_no_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_model(check_attention): pass")
    done = pytester.runpytest_subprocess("-p", "no:attncli", "-p", "no:cacheprovider")
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines(["*fixture 'check_attention' not found*"])


def test_pytest_lists_the_fixture_with_its_first_line(pytester: pytest.Pytester) -> None:
    done = pytester.runpytest_subprocess("--fixtures", "-p", "no:cacheprovider")
    listed = re.sub(r"\s+", " ", done.stdout.str())
    assert "check_attention [session scope]" in listed
    assert "Checks the attention of a model and fails the test with the table" in listed


def test_the_plugin_is_found_by_its_entry_point() -> None:
    (point,) = (point for point in entry_points(group="pytest11") if point.name == "attncli")
    assert point.value == "attncli.pytest_plugin"


def test_the_plugin_imports_nothing_but_pytest() -> None:
    script = (
        "import sys, json, pytest; before = set(sys.modules); import attncli.pytest_plugin; "
        "json.dump(sorted(set(sys.modules) - before), sys.stdout)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(attncli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(done.stdout) == ["attncli", "attncli.pytest_plugin"]
