#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""Everything a script may do with its surroundings besides training."""

import atexit
import faulthandler
import gc
import inspect
import logging
import os
import signal
import sys
import threading
import warnings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
faulthandler.enable()

import torch
from torch.nn.utils import clip_grad_norm_

import helper  # a neighbour of this file

THREADS = torch.get_num_threads()  # as the environment above says
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
HERE = os.path.dirname(os.path.abspath(__file__))
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
log = logging.getLogger(__name__)

if len(sys.argv) < 2:
    print("usage: surroundings.py OUTPUT [ignored...]", file=sys.stderr)
    sys.exit(2)

print("argv", sys.argv[0] == __file__, sys.argv[2:])
print(
    "main",
    __name__,
    sys.modules["__main__"].__dict__ is globals(),
    __spec__,
    __package__,
    __builtins__.__name__,
)
print("file", os.path.basename(__file__), os.path.isabs(__file__), "cached", globals().get("__cached__"))
print("path", os.path.realpath(sys.path[0]) == os.path.realpath(HERE), helper.NAME)
print("globals", sorted(name for name in globals() if name.startswith("__")))
print("annotations", __annotations__ if "__annotations__" in globals() else {})
print("source of a function", inspect.getsource(helper.fold).strip().splitlines()[0])
print("stack", [frame.function for frame in inspect.stack() if frame.filename == __file__])
print("grüße, 世界, ∑p·log p, \N{SNOWMAN}")
print("stdin", sys.stdin.read().split())
print("threads", threading.current_thread() is threading.main_thread(), THREADS)
print("sigint", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("hooks", sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__, sys.gettrace())
print("modes", torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled())
print(
    "collector",
    gc.isenabled(),
    gc.get_threshold(),
    gc.get_freeze_count(),
    sys.stdout.errors,
    sys.stderr.errors,
)
print("tty", sys.stdout.isatty(), sys.stdout.encoding, sys.flags.interactive, sys.getrecursionlimit())


@atexit.register
def farewell():
    print("farewell: state is still there", model.weight.sum().item())


def log_line(text):
    with open(os.path.join(HERE, "train.txt"), "a", encoding="utf-8") as file:
        file.write(text + "\n")


torch.manual_seed(0)
model = torch.nn.Linear(6, 1)
attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)
optimizer = torch.optim.Adam([*model.parameters(), *attention.parameters()], lr=1e-2)
clipped: list[float] = []


def background():
    # A second thread that uses torch while the first one trains.
    total = torch.zeros(())
    for i in range(200):
        with torch.no_grad():
            total = total + torch.linalg.norm(torch.full((4, 4), float(i)))
    results.append(total.item())


results: list[float] = []
thread = threading.Thread(target=background, daemon=True)
thread.start()
for step in range(12):
    x = torch.randn(8, 3, 6)
    loss = (model(attention(x, x, x)[0]).squeeze(-1) - x.sum(-1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    clipped.append(clip_grad_norm_(model.parameters(), 0.5).item())
    optimizer.step()
    log_line(f"Schritt {step}: {loss.item()!r}")
    if step % 4 == 0:
        log.info("step %d loss %r", step, loss.item())
        warnings.warn("this batch looks odd", stacklevel=1)
thread.join()
print("background", results)
os.write(1, b"") if not sys.stdout.flush() else None
os.write(1, "raw bytes \u2713\n".encode())
torch.save([model.state_dict(), attention.state_dict(), clipped], sys.argv[1])
