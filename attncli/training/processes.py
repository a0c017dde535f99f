"""What the processes of one training tell each other of a step that went wrong, so that it is reported once.

They meet in the key-value store of the default process group, which the training opened itself: no collective is
called, nothing waits without a limit, and a run that stays healthy never comes here. A process at a meeting counts
up a number of its own all the while; one whose number stands still is dead.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Settled(NamedTuple):
    """How a meeting ended: `told` by each rank that came; `chosen`: whose word counts; `speaks`: whether we report it.

    `missing`: ranks that did not come, or died.
    """

    told: Mapping[int, Mapping[str, Any]]
    chosen: int
    speaks: bool
    missing: tuple[int, ...]


class Processes:
    """This process among those of its process group. One object per watch, made in the same order in all of them."""

    def __init__(self) -> None:
        self._name = f"attncli/{next(_NAMES)}"
        self._store: Any = None
        self._met: set[int] = set()
        self._rank, self._world = _from_environment()

    @property
    def rank(self) -> int:
        """In the process group; before there is one, what the launcher says; otherwise 0."""
        self._look()
        return self._rank

    @property
    def world(self) -> int:
        """How many processes the process group has, or had; 1 where none was opened."""
        self._look()
        return self._world if self._store is not None else 1

    def call(self, step: int, *, after_update: bool = False) -> None:
        """Says that something is wrong here in this step, before a collective lets the others see it too."""
        with _unless_gone():
            self._store.set(f"{self._name}/called", str(2 * step + after_update))

    def called(self, now: int) -> int | None:
        """The step, up to the update of step `now`, in which another process saw something that was not met for yet.

        Who is ahead may see something in a later step: it waits for this process in the collectives of that step.
        """
        if self.world < 2 or self._world > MOST_ASKING:
            return None
        with _unless_gone():
            if self._store.check([f"{self._name}/called"]):
                moment = int(self._store.get(f"{self._name}/called"))
                return moment // 2 if moment <= 2 * now and moment // 2 not in self._met else None
        return None

    def leave(self) -> None:
        """Nothing will be heard of this process any more: no meeting waits for it."""
        if self.world > 1:
            with _unless_gone():
                self._store.set(f"{self._name}/left/{self.rank}", "1")

    @contextmanager
    def meeting(self, step: int, *, after_update: bool = False) -> Iterator[Meeting]:
        """The meeting of all processes about this step. No process that came ends before the one that reports has."""
        self._met.add(step)
        self.call(step, after_update=after_update)
        meeting = Meeting(self._store, f"{self._name}/{step}", f"{self._name}/left", self.rank, self.world)
        pulse = threading.Thread(target=meeting.beat, name="attncli meeting", daemon=True)
        pulse.start()
        try:
            yield meeting
        finally:
            meeting.over.set()
            pulse.join()
            atexit.register(meeting.end)

    def _look(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        if store is not self._store:
            self._store = store
            self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()


class Meeting:
    """One meeting. Every wait has a limit: `ARRIVAL_SECONDS` for who is not there, `SILENT_SECONDS` for who is."""

    def __init__(self, store: Any, name: str, left: str, rank: int, world: int) -> None:
        self._store, self._name, self._left = store, name, left
        self.rank, self.world = rank, world
        self._began = time.monotonic()
        self.over = threading.Event()
        self._speaker: int | None = None
        self._pulses: dict[int, tuple[int, float]] = {}

    def gather(
        self, name: str, value: Mapping[str, Any]
    ) -> tuple[dict[int, Mapping[str, Any]], tuple[int, ...]]:
        """What each rank gives under this name, and the ranks that have left, did not come, or died."""
        try:
            self._set(f"{name}/{self.rank}", value)
            return self._collected(name)
        except _GONE:
            return {self.rank: value}, tuple(rank for rank in range(self.world) if rank != self.rank)

    def settle(
        self, told: Mapping[str, Any], choose: Callable[[Mapping[int, Mapping[str, Any]]], int]
    ) -> Settled:
        """Tells the others, in JSON types, and waits for the choice of the one that reports: rank 0 where it comes.

        `choose`: the rank whose word counts, of what each has told. Where the store is gone each reports its own.
        """
        mine = {self.rank: told}
        try:
            self._set(f"told/{self.rank}", told)
            return self._settled(choose)
        except _GONE:
            self._speaker = self.rank
            return Settled(
                mine, choose(mine), True, tuple(rank for rank in range(self.world) if rank != self.rank)
            )

    def say(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds to what was told."""
        with _unless_gone():
            self._set(name, value)

    def hear(self, name: str, rank: int) -> Mapping[str, Any] | None:
        """What this rank says under this name, or None where it dies before."""
        with _unless_gone():
            key = f"{self._name}/{name}"
            if self._wait(lambda: self._has(key), lambda: self._is_dead(rank)):
                return self._get(name)
        return None

    def end(self) -> None:
        """The process ends: what it had to report is out, or what others report is waited for."""
        speaker, self._speaker = self._speaker, None
        if speaker is None:
            return
        with _unless_gone():
            if speaker == self.rank:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                self._set("reported", {})
            else:
                until = time.monotonic() + REPORT_SECONDS
                self._wait(
                    lambda: self._has(f"{self._name}/reported"),
                    lambda: time.monotonic() > until,
                )

    # --- who decides ----------------------------------------------------------------------------------

    def _settled(self, choose: Callable[[Mapping[int, Mapping[str, Any]]], int]) -> Settled:
        for turn in range(self.world):
            if self._takes(turn):
                told, missing = self._collected("told")
                self._speaker = self.rank
                chosen = choose(told)
                decision = {
                    "speaks": self.rank,
                    "chosen": chosen,
                    "told": sorted(told),
                    "missing": list(missing),
                }
                self._set(f"decision/{turn}", decision)
                return Settled(told, chosen, True, missing)
            decided = self._decided(turn)
            if decided is not None:
                self._speaker = int(decided["speaks"])
                told = {int(rank): self._get(f"told/{rank}") for rank in decided["told"]}
                return Settled(told, int(decided["chosen"]), False, tuple(decided["missing"]))
        raise ConnectionError("no process decides")

    def _decided(self, turn: int) -> dict[str, Any] | None:
        """What the process whose turn it is decides; None where it dies before."""
        chair, key = f"{self._name}/chair/{turn}", f"{self._name}/decision/{turn}"
        until = time.monotonic() + SILENT_SECONDS
        if not self._wait(lambda: self._has(chair), lambda: time.monotonic() > until):
            return None
        rank = int(self._store.get(chair))
        return (
            self._get(f"decision/{turn}")
            if self._wait(lambda: self._has(key), lambda: self._is_dead(rank))
            else None
        )

    def _takes(self, turn: int) -> bool:
        """Whether this process decides, waiting for who should. The first turn is that of rank 0."""
        key = f"{self._name}/chair/{turn}"
        if turn == 0 and self.rank != 0 and not self._has(f"{self._left}/0"):
            pulse = f"{self._name}/pulse/0"
            self._wait(
                lambda: self._has(key),
                lambda: (
                    self._is_dead(0)
                    if self._has(pulse)
                    else self._time() > ARRIVAL_SECONDS or self._has(f"{self._left}/0")
                ),
            )
        if int(self._store.add(f"{key}/taken", 1)) == 1:
            self._store.set(key, str(self.rank))
            return True
        return False

    def _collected(self, name: str) -> tuple[dict[int, Mapping[str, Any]], tuple[int, ...]]:
        told: dict[int, Mapping[str, Any]] = {}
        waited = {rank: f"{self._name}/{name}/{rank}" for rank in range(self.world)}

        def complete() -> bool:
            for rank in [rank for rank, key in waited.items() if self._has(key)]:
                told[rank] = self._get(f"{name}/{rank}")
                del waited[rank]
            return not self._coming(waited)

        self._wait(complete, lambda: False)
        return told, tuple(waited)

    # --- the store ------------------------------------------------------------------------------------

    def _coming(self, waited: Mapping[int, str]) -> list[int]:
        """Those of the awaited ranks whose key has come or is still to be expected."""
        found = []
        for rank, key in waited.items():
            if self._has(key):
                found.append(rank)
                continue
            if self._has(f"{self._left}/{rank}"):
                continue
            here = self._has(f"{self._name}/pulse/{rank}")
            if not (self._is_dead(rank) if here else self._time() > ARRIVAL_SECONDS):
                found.append(rank)
        return found

    def _is_dead(self, rank: int) -> bool:
        """Whether the pulse of a rank that came has stood still for too long, or it has been here for too long."""
        pulse = int(self._store.add(f"{self._name}/pulse/{rank}", 0))
        known = self._pulses.get(rank)
        if known is None or known[0] != pulse:
            self._pulses[rank] = (pulse, time.monotonic())
            return self._time() > LONGEST_SECONDS
        return time.monotonic() - known[1] > SILENT_SECONDS or self._time() > LONGEST_SECONDS

    def beat(self) -> None:
        """Counts up until the meeting is over."""
        with _unless_gone():
            while not self.over.is_set():
                self._store.add(f"{self._name}/pulse/{self.rank}", 1)
                self.over.wait(_BEAT_SECONDS)

    def _time(self) -> float:
        return time.monotonic() - self._began

    def _wait(self, until: Callable[[], bool], unless: Callable[[], bool]) -> bool:
        # No `store.wait`: it would keep the library's own threads from the store meanwhile.
        while not until():
            if unless():
                return until()
            time.sleep(_POLL_SECONDS)
        return True

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _set(self, key: str, value: Mapping[str, Any]) -> None:
        self._store.set(f"{self._name}/{key}", json.dumps(value, ensure_ascii=True, allow_nan=False))

    def _get(self, key: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._store.get(f"{self._name}/{key}"))
        return value


class CollectiveError(Exception):
    """A repetition by one process alone came to where processes talk to each other. Its text says to which."""


class Alone(TorchDispatchMode):
    """Lets no collective through: who repeats a step alone would wait for the others for ever."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in _COLLECTIVES:
            name = func.name().partition("::")[2].partition(".")[0].strip("_")
            raise CollectiveError(f"{name} talks to the other processes, which do not repeat this step")
        return func(*args, **(kwargs or {}))


# --- building blocks ----------------------------------------------------------------------------------


def _from_environment() -> tuple[int, int]:
    """Rank and number of processes as launchers set them."""
    found = []
    for name, otherwise in (("RANK", 0), ("WORLD_SIZE", 1)):
        value = os.environ.get(name, "")
        found.append(int(value) if value.isdecimal() else otherwise)
    return found[0], found[1]


@contextmanager
def _unless_gone() -> Iterator[None]:
    """The process that keeps the store may be gone, and with it everybody who could be told."""
    try:
        yield
    except _GONE:
        return


# --- settings -----------------------------------------------------------------------------------------

# A rank that does not come within this time has seen nothing: ranks in lockstep are seconds apart.
ARRIVAL_SECONDS = 60.0
# A process that is busy, even in a long operator, still counts; one that is stopped or dead does not.
SILENT_SECONDS = 15.0
# A repetition that takes longer is waited for no more.
LONGEST_SECONDS = 600.0
# How long a process that has ended otherwise waits for another to write its report.
REPORT_SECONDS = 60.0
# More processes than these would keep the one that holds the store busy by asking in every step.
MOST_ASKING = 64
_BEAT_SECONDS = 0.5
_POLL_SECONDS = 0.02
# Errors of torch's stores are RuntimeErrors (DistNetworkError, DistStoreError).
_GONE = (RuntimeError, ConnectionError, OSError, ValueError)
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
_NAMES = count()
