"""Runs scripts, each in a fork of one process that has imported the heavy libraries once.

    python forked.py LIBRARY...

reads one JSON object a line from stdin, {"folder", "command", "out", "err"}, and answers each with the exit code of
its process. `command` is that of `python` (a script and its arguments) or of `attncli` (where it begins with that
word). Both end as a process of their own does: atexit functions run, and `os._exit` is the end.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import TypedDict


class Request(TypedDict):
    folder: str
    command: list[str]
    out: str
    err: str


def serve(libraries: list[str]) -> Request | None:
    """In the parent None, at the end of the requests; in each fork the request that it has to run."""
    for library in libraries:
        importlib.import_module(library)
    # The forks share these objects and end three times as fast where their collector leaves them alone.
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            request: Request = json.loads(line)
            return request
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()
    return None


def run(request: Request) -> None:
    """What `python …` or `attncli …` does, in this process; its exit code is left to SystemExit."""
    for path, number in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - the stream of the script
    os.chdir(request["folder"])
    sys.argv = request["command"]
    if sys.argv[0] == "attncli":
        from attncli.__main__ import main

        sys.path[0] = str(Path(sys.executable).parent)
        main()
    else:
        sys.path[0] = request["folder"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.exit(_as_python_does(sys.argv[0]))


def _as_python_does(script: str) -> int:
    """Python's own way with a script: exceptions are printed without a frame of this file."""
    c = ctypes.CDLL(None)
    c.fopen.restype = ctypes.c_void_p
    file = ctypes.c_void_p(c.fopen(script.encode(), b"rb"))
    path = str(Path.cwd() / script)
    sys.modules["__main__"].__file__ = path
    failed: int = ctypes.pythonapi.PyRun_SimpleFileExFlags(file, os.fsencode(path), 1, None)
    return 1 if failed else 0


if __name__ == "__main__":
    wanted = serve(sys.argv[1:])
    if wanted is not None:
        run(wanted)
