"""What a run of the command line gives back; the fixture `attncli_run` of conftest.py makes one in this process."""

from collections.abc import Callable
from typing import NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]
