"""The examples for CI, run for real: the workflow's shell steps, the hooks in a repository, the test, the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from test_check import CODE
from tiny_checkpoints import llama_folder

import attncli
from attncli.cli import run
from attncli.pytest_plugin import checker

ROOT = Path(attncli.__file__).parents[1]
CI = ROOT / "examples" / "ci"
DATES = ROOT / "examples" / "dates"


def environment(**changes: str) -> dict[str, str]:
    """With this interpreter's commands on PATH, and nothing of the repository in which these tests may be a hook."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "PRE_COMMIT"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), **changes}


# --- the workflow -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CI / "attention.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize(
    ("old", "new"), [("", ""), ("runs-on:", "runson:"), ("pull_request:", "pullrequest:")]
)
def test_the_workflow_is_valid_by_the_schema_of_github_workflows(old: str, new: str, tmp_path: Path) -> None:
    file = tmp_path / "attention.yml"
    file.write_text((CI / "attention.yml").read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if old else 0), done.stdout + done.stderr


def test_the_workflow_may_upload_alerts_and_nothing_else(workflow: dict[str, Any]) -> None:
    assert workflow[True] == {"pull_request": None}  # YAML reads "on" as true
    assert workflow["permissions"] == {"contents": "read", "security-events": "write"}
    assert all("permissions" not in job for job in workflow["jobs"].values())


def test_what_follows_the_check_runs_also_where_it_fails(workflow: dict[str, Any]) -> None:
    steps = workflow["jobs"]["check"]["steps"]
    at = next(n for n, step in enumerate(steps) if step.get("name") == "Check attention")
    assert len(steps[at + 1 :]) == 3
    assert all(re.fullmatch(CONDITION, step["if"]) for step in steps[at + 1 :])
    used = [step["uses"] for step in steps if "uses" in step]
    assert [action.partition("@")[0] for action in used] == [
        "actions/checkout",
        "actions/setup-python",
        "github/codeql-action/upload-sarif",
        "actions/upload-artifact",
    ]
    assert all(re.fullmatch(r"[a-z/-]+@v\d+", action) for action in used)


CONDITION = r"always\(\) && hashFiles\('([^']+)'\) != ''"


class Job(NamedTuple):
    """What became of a job: the exit code of its check, its log, and the summary on the page of the run."""

    code: int
    log: str
    summary: str


def job(workflow: dict[str, Any], folder: Path, **changes: str) -> Job:
    """Runs the shell steps as a runner would: bash -e, each by its condition."""
    summary = folder / "summary"
    summary.touch()
    variables = {**workflow["jobs"]["check"]["env"], **changes, "GITHUB_STEP_SUMMARY": str(summary)}
    code, log = 0, ""
    for step in workflow["jobs"]["check"]["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        condition = re.fullmatch(CONDITION, step["if"]) if "if" in step else None
        if code if condition is None else not (folder / condition[1]).exists():
            continue
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=folder,
            env=environment(**variables),
            capture_output=True,
            text=True,
            check=False,
        )
        code, log = code or done.returncode, log + done.stdout
    return Job(code, log, summary.read_text(encoding="utf-8"))


REPORTS = ["report.html", "report.md", "report.sarif", "report.xml"]


def test_the_steps_of_the_workflow_run_as_they_stand(workflow: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(DATES, tmp_path / "examples" / "dates", ignore=shutil.ignore_patterns("__pycache__"))
    done = job(workflow, tmp_path)
    assert done.code == 0
    assert "::error" not in done.log
    assert sorted(file.name for file in tmp_path.glob("report.*")) == REPORTS
    assert done.summary == (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no findings" in done.summary


@pytest.mark.parametrize(
    ("build", "code", "said"), [("hidden", 1, "::error"), ("no_attention", 3, ""), ("missing", 2, "")]
)
def test_a_model_that_fails_leaves_its_code_and_its_reports(
    build: str, code: int, said: str, workflow: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    done = job(workflow, tmp_path, MODEL=f"code.py:{build}", BATCH="code.py:batch")
    assert done.code == code
    assert said in done.log
    written = sorted(file.name for file in tmp_path.glob("report.*"))
    assert written == ([] if code == 2 else REPORTS)
    assert ("ATT701" in done.summary) is (code == 1)
    assert bool(done.summary) is bool(written)


def test_the_artifact_keeps_every_report(workflow: dict[str, Any]) -> None:
    kept = workflow["jobs"]["check"]["steps"][-1]["with"]["path"].split()
    assert sorted(kept) == REPORTS


# --- pre-commit ---------------------------------------------------------------------------------------


def hooks(folder: Path, config: Any) -> subprocess.CompletedProcess[str]:
    """`pre-commit run --all-files` in a new git repository of everything in `folder`."""
    (folder / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = environment(PRE_COMMIT_HOME=str(folder.parent / "pre-commit"), PRE_COMMIT_COLOR="never")
    for command in (["git", "init", "-q"], ["git", "add", "."]):
        subprocess.run(command, cwd=folder, env=variables, check=True)
    return subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(re.findall(r"^(attncli [a-z-]+)\.+(?:\(.*\))?(\w+)$", done.stdout, re.MULTILINE))


def test_the_manifest_is_valid_and_names_what_can_be_run() -> None:
    from pre_commit.clientlib import load_manifest

    manifest = load_manifest(ROOT / ".pre-commit-hooks.yaml")
    assert [hook["id"] for hook in manifest] == ["attncli-inspect", "attncli-values"]
    assert {hook["language"] for hook in manifest} == {"python"}


@pytest.mark.parametrize(("heads", "outcome"), [(4, "Passed"), (5, "Failed")])
def test_the_hooks_of_the_manifest_read_the_checkpoints_of_a_repository(
    heads: int, outcome: str, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    for name in ("a", "b"):
        llama_folder(repository / name, num_attention_heads=heads)
    (repository / "notes.txt").write_text("no checkpoint", encoding="utf-8")
    manifest = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    # In this environment instead of one made for the hooks, which would take torch from a package index.
    local = [{**hook, "language": "system"} for hook in manifest]
    done = hooks(repository, {"repos": [{"repo": "local", "hooks": local}]})
    assert outcomes(done) == {"attncli inspect": outcome, "attncli values": outcome}, done.stdout
    assert done.stdout.count("ATT101 heads-mismatch") == (0 if heads == 4 else 4)


def test_the_example_of_a_configuration_runs_as_it_stands(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(DATES, repository, ignore=shutil.ignore_patterns("__pycache__"))
    config = yaml.safe_load((CI / "pre-commit-config.yaml").read_text(encoding="utf-8"))
    done = hooks(repository, config)
    assert outcomes(done) == {"attncli inspect": "Passed", "attncli check": "Passed"}, done.stdout
    assert done.stderr == ""


def test_the_commented_hooks_of_the_example_are_those_of_the_manifest() -> None:
    text = (CI / "pre-commit-config.yaml").read_text(encoding="utf-8")
    manifest = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert {hook["id"] for hook in manifest} <= set(re.findall(r"attncli-\w+", text))
    shown = yaml.safe_load(re.sub(r"^# ", "", text[text.index("#   - repo:") :], flags=re.MULTILINE))
    assert [hook["id"] for hook in shown[0]["hooks"]] == ["attncli-inspect"]


# --- the test, the settings, the page -----------------------------------------------------------------


def test_the_test_passes_on_the_healthy_model() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_attention.py"],
        cwd=CI,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("...")


def test_the_settings_hold_for_the_command_and_for_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(CI / "pyproject-settings.toml", tmp_path / "pyproject.toml")
    monkeypatch.chdir(tmp_path)
    model = ["attncli", "check", f"{DATES}/model.py:build", "--input", f"{DATES}/model.py:batch"]
    monkeypatch.setattr(sys, "argv", model)
    assert run() == 0
    monkeypatch.setattr(sys, "argv", [*model, "--expect", "heads=5"])
    assert run() == 1
    assert "ATT801" in capsys.readouterr().out

    (tmp_path / "code.py").write_text(CODE, encoding="utf-8")
    with pytest.raises(
        pytest.fail.Exception, match=r"^ATT202 in "
    ):  # a warning, from which the settings fail
        checker(tmp_path)("code.py:dead_head", input="code.py:batch")


def test_the_page_tells_of_every_file() -> None:
    page = (CI / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    there = {file.name for file in CI.iterdir() if file.is_file()}
    assert set(listed) == there - {"README.md"}
    assert all(f"**{code}**" in page for code in range(4))
