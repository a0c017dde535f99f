"""A progress bar on stderr, on a terminal only, and only once there is progress to show."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """What to call with (what is being done, done so far, total); None where nobody sees it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar: Any = None
    tasks: dict[str, Any] = {}
    one_at_a_time = threading.Lock()  # weights are read by several threads

    def tick(what: str, done: int, total: int) -> None:
        nonlocal bar
        with one_at_a_time:
            if bar is None:
                bar = _started_bar()
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

    try:
        yield tick
    finally:
        if bar is not None:
            bar.stop()


def _started_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar
