"""The pytest plugin: a fixture that checks a model inside a test.

pytest loads this file in every run of every user who has attncli installed, so that it imports nothing but pytest:
attncli, torch and rich come in with the first check. It adds no option, no marker and no hook.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest

if TYPE_CHECKING:
    from attncli.api import Report
    from attncli.errors import AttncliError
    from attncli.records import Severity


class CheckAttention(Protocol):
    """The type of the fixture, for tests with annotations."""

    def __call__(
        self,
        model: Any,
        /,
        *args: Any,
        fail_on: Severity | Literal["never"] | None = None,
        select: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
        expect: str | Sequence[str] = (),
        baseline: str | Path | None = None,
        **kwargs: Any,
    ) -> Report:
        """The report of one forward pass, `model(*args, **kwargs)`; the test fails where it finds something.

        `model`: an nn.Module or any function of tensors, run as it is: its device, its dtype, in training mode or
        not. A model with an argument that is named like one of these goes in as a function. A str or a Path is a
        MODEL as `attncli check` takes it, and `kwargs` are the options of that command: text="…", seq_len=128.
        `fail_on`: from which severity on a finding fails the test; "error" unless [tool.attncli] says otherwise.
        `select`, `ignore`: codes, names or prefixes of rules; otherwise those of [tool.attncli]. `expect`: what the
        model is to be, "heads=8,layout=separate". `baseline`: a file of known findings. Attention that was not
        observed fails the test as well. Errors: whatever the model raises.
        """


@pytest.fixture(scope="session")
def check_attention(pytestconfig: pytest.Config) -> CheckAttention:
    """Checks the attention of a model and fails the test with the table of what was found.

    check_attention(model, *args, fail_on="error", select=(), ignore=(), expect=(), baseline=None, **kwargs) -> Report
    """
    return checker(pytestconfig.rootpath)


def checker(root: Path) -> CheckAttention:
    """What the fixture gives. `root`: the folder whose pyproject.toml, or the nearest above it, holds the settings."""
    settings = functools.cache(lambda: _settings(root))

    def check(
        model: Any,
        /,
        *args: Any,
        fail_on: Severity | Literal["never"] | None = None,
        select: str | Sequence[str] | None = None,
        ignore: str | Sequence[str] | None = None,
        expect: str | Sequence[str] = (),
        baseline: str | Path | None = None,
        **kwargs: Any,
    ) -> Report:
        __tracebackhide__ = True
        from attncli.api import choice, chosen
        from attncli.errors import AttncliError

        caller = sys._getframe(1)
        place = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"
        try:
            floor = _floor(settings().get("fail_on", "error") if fail_on is None else fail_on)
            wanted = choice(
                _texts(settings().get("select") if select is None else select),
                _texts(settings().get("ignore") if ignore is None else ignore),
                None if baseline is None else Path(baseline),
            )
            run = _program if isinstance(model, (str, Path)) else _module
            report = chosen(run(model, args, _texts(expect), kwargs), wanted)
        except AttncliError as error:
            message = _problem(error, place)
        else:
            if not report.exit_code(floor):
                return report
            message = _failure(report, floor, place)
        pytest.fail(message, pytrace=False)

    return check


# --- what runs ----------------------------------------------------------------------------------------


def _module(model: Any, args: Sequence[Any], expect: Sequence[str], kwargs: Mapping[str, Any]) -> Report:
    __tracebackhide__ = True
    from attncli.api import check

    return check(model, *args, expect=expect, **kwargs)


def _program(
    model: str | Path, args: Sequence[Any], expect: Sequence[str], kwargs: Mapping[str, Any]
) -> Report:
    """The same for a MODEL given by name; the options of the command line by their names, in the words of the API."""
    import difflib

    from attncli.api import check_model
    from attncli.api.loading import RunSettings
    from attncli.errors import UsageError

    known = [*RunSettings.__dataclass_fields__, "layer", "confirm"]
    unknown = next((name for name in kwargs if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, n=1)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            str(model), f"attncli check has no option {unknown!r}.", f"{meant}Known: {', '.join(known)}."
        )
    if args:
        raise UsageError(
            str(model),
            "a MODEL given by name takes no arguments of a forward pass.",
            'Give its batch as an option: text="…", input="file.py:batch".',
        )
    options = {name: _SPELLINGS.get(name, _as_it_is)(value) for name, value in kwargs.items()}
    return check_model(str(model), expect=expect, layers=options.pop("layer", ()), **options)


def _settings(root: Path) -> Mapping[str, Any]:
    """What counts as a failure, as [tool.attncli] says for `attncli check`; the rest there is of one model."""
    from attncli.cli import settings_of

    return {
        name: value
        for name, value in settings_of("check", root).items()
        if name in ("fail_on", "select", "ignore")
    }


def _floor(given: Any) -> Severity | Literal["never"]:
    from attncli.errors import UsageError
    from attncli.records import SEVERITIES

    known: tuple[Severity | Literal["never"], ...] = (*SEVERITIES, "never")
    for severity in known:
        if given == severity:
            return severity
    raise UsageError("fail_on", f"no severity is called {given!r}.", f"Known: {', '.join(known)}.")


def _texts(given: Any) -> tuple[str, ...]:
    """One or several, as a command line would have them."""
    several = [given] if isinstance(given, str) or not hasattr(given, "__iter__") else given
    return tuple(map(str, several)) if given is not None else ()


def _word(given: Any) -> str | None:
    """A path or a torch.dtype as it is written in a command line."""
    return None if given is None else str(given).removeprefix("torch.")


def _as_it_is(given: Any) -> Any:
    return given


# --- what the failed test shows -----------------------------------------------------------------------


def _failure(report: Report, floor: Severity | Literal["never"], place: str) -> str:
    """What failed in the first line, which is all that pytest's summary shows; then the report's table."""
    import io

    from rich.console import Console

    from attncli.records import SEVERITIES
    from attncli.render import table
    from attncli.render.words import clean

    graver = SEVERITIES[SEVERITIES.index(floor) :] if floor != "never" else ()
    codes = dict.fromkeys(finding.code for finding in report.findings if finding.severity in graver)
    what = f"{', '.join(codes)} in" if codes else "not observed: attention of"
    buffer = io.StringIO()
    table.draw(report, Console(file=buffer, width=_WIDTH, color_system=None, legacy_windows=False))
    lines = [
        f"{what} {clean(str(report.source['path']))} ({clean(place)})",
        "",
        *(line.rstrip() for line in buffer.getvalue().splitlines()),
    ]
    return "\n".join(lines)


def _problem(error: AttncliError, place: str) -> str:
    import textwrap

    from attncli.render.words import clean

    remedy = textwrap.fill(clean(error.remedy), _WIDTH, initial_indent="  try: ", subsequent_indent="  ")
    return f"{clean(error.subject)}: {clean(error.problem)} ({clean(place)})\n{remedy}"


# Of a terminal, and of what CI shows of a test.
_WIDTH = 80
_SPELLINGS: dict[str, Callable[[Any], Any]] = {
    "text": _texts,
    "layer": _texts,
    "input": _word,
    "weights": _word,
    "offload_folder": _word,
    "device": _word,
    "dtype": _word,
    "autocast": _word,
}
