"""The ends of a watched script and of a repeated capsule: the report, and the exit code."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from attncli.cli.output import Outlet, Reporting, outlet
from attncli.cli.progress import progress_bar
from attncli.cli.script import Halted, Ran, Script, die_of_interrupt, exit_code, place_of, run_script, summary
from attncli.cli.script_options import Watching
from attncli.errors import UsageError

if TYPE_CHECKING:
    from attncli.api import Report, Watch


def watch_and_report(script: Script, watching: Watching, reporting: Reporting, *, confirm: bool) -> int:
    """Runs the script, writes the report of what went wrong, and gives the exit code."""
    from pathlib import Path

    ends = outlet(reporting, [] if script.is_module else [Path(script.target)])
    alone = ends.stdout not in (None, "table")

    def start() -> Watch:
        from attncli.api import Watch

        return Watch(
            source={"kind": "script", "path": script.target, "args": list(script.args)},
            every=watching.every,
            log=watching.log,
            tensorboard=watching.tensorboard,
            capsule=watching.capsule,
            on_fault="continue" if watching.go_on else _halt,
            confirm=confirm,
        )

    _check_targets(watching)
    ran = run_script(script, start, to_stderr=alone)
    code = 0 if ran.halted else exit_code(ran)
    if script.strayed and code == WRONG_ARGUMENTS and isinstance(ran.error, SystemExit):
        names = " and ".join(dict.fromkeys(script.strayed))
        _say(f"{script.target} was given {names}; what is meant for attncli stands before it", reporting)
    interrupted = isinstance(ran.error, KeyboardInterrupt)
    report = ran.watch.report if ran.watch is not None else None
    if report is None:
        _say(summary(ran, _NO_REPORT), reporting)
        return code or 3
    went_wrong = bool((report.run or {})["training"]["faults"])
    silent = ran.watch is not None and not ran.watch.speaks
    if ran.error is not None and not ran.halted and not isinstance(ran.error, SystemExit):
        _say(_raised(ran), reporting)
    elif not silent and (not went_wrong or watching.go_on):
        _say(summary(ran, report), reporting)
    if silent:
        # Another process says what was seen; what this one alone would find is no reason to fail.
        judged = ends._replace(stdout=None, files=(), baseline=None).finish(report) if went_wrong else 0
    elif went_wrong or alone or ends.files or ends.baseline is not None:
        judged = _finished(ends, report)
    else:
        judged = ends._replace(stdout=None).finish(report)
        if judged == 1 and not (ran.watch is not None and ran.watch.monitor.failed):
            _finished(ends, report)  # the exit code needs its reasons
    if ran.watch is not None and ran.watch.monitor.failed and not went_wrong:
        judged = 0  # a watch that broke down is no result of the script's
    if went_wrong and ends.stdout is None and not silent:
        _say(_notice(report, ends), reporting)
    if interrupted:
        die_of_interrupt()
    return code or judged


def replay_and_report(watching: Watching, device: str, reporting: Reporting, *, confirm: bool) -> int:
    """Repeats the step of a capsule and writes its report."""
    from attncli.api import replay_capsule

    folder = watching.replay
    if folder is None:
        raise UsageError("--replay", "there is no folder.", "Give the folder of a capsule.")
    ends = outlet(reporting, [folder])
    with progress_bar(reporting.quiet) as progress:
        report = replay_capsule(
            str(folder), device=device, trust=watching.trust, confirm=confirm, progress=progress
        )
    return ends.finish(report)


# --- building blocks ----------------------------------------------------------------------------------


def _halt(report: Report) -> None:
    raise Halted


def _check_targets(watching: Watching) -> None:
    """What cannot be written is told before the script runs, not after hours."""
    from attncli.cli.output import check_target

    if watching.log is not None:
        check_target(watching.log, [], "--log", "the log")
    for option, folder in (("--capsule", watching.capsule), ("--tensorboard", watching.tensorboard)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(option, f"{folder} is a file.", "Give a folder, which may be new.")
    if watching.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "--tensorboard", "the package tensorboard is not installed.", "pip install tensorboard"
        )


def _finished(ends: Outlet, report: Report) -> int:
    if sys.stdout.closed:
        ends = ends._replace(stdout=None)
    else:
        sys.stdout.flush()
    return ends.finish(report)


def _raised(ran: Ran) -> str:
    """Where in the training the script's own error came: its step, and the batch that was in use."""
    error, watch = ran.error, ran.watch
    if watch is None:
        return ""
    processes = watch.monitor.processes
    who = f"the script in rank {processes.rank}" if processes.world > 1 else "the script"
    what = f"{who} raised {type(error).__name__} in step {watch.monitor.step}"
    where = place_of(error) if error is not None else ""
    return f"{what}{f' ({where})' if where else ''}{watch.circumstances()}"


def _notice(report: Report, ends: Outlet) -> str:
    """What went wrong, where the report itself goes to files."""
    from attncli.render.training import notice

    training = (report.run or {})["training"]
    files = [str(file) for file, _ in ends.files]
    written = [*files, *([f"the capsule {training['capsule']}"] if training.get("capsule") else [])]
    return notice(training["fault"]) + (f"; written: {', '.join(written)}" if written else "")


def _say(text: str, reporting: Reporting) -> None:
    if text and not reporting.quiet:
        sys.stderr.write(f"attncli: {text}\n")
        sys.stderr.flush()


_NO_REPORT: Any = None
# The exit code of argparse, click and their like.
WRONG_ARGUMENTS = 2
