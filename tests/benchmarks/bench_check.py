"""What checking everything at once costs: `attncli check` beside loading the model and the slowest part on its own.

    python tests/benchmarks/bench_check.py [MODEL …] [--tokens 512] [--repeats 3] [--cpu]

A MODEL is what `attncli check` takes; without one, a random model is written and used: 12 layers, 768 wide, float32.
Two tables. Whole commands: each way is a process of its own, so that every one loads the model once; "slowest" is the
slowest of the commands beside check. In one process: the model is loaded once, and each way gets the same batch;
"slowest" is loading it and the slowest part. Times are medians of the repeats, which alternate between the ways. --cpu:
seconds of the processor on one thread, which others on the same machine do not disturb.
Budget: check costs at most 1.15 × slowest in both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COMMANDS = {
    "entropy": ["entropy"],
    "nan-check": ["nan-check"],
    "values": ["inspect", "--values"],
    "check": ["check"],
}
PARTS = ("load", "plain", "entropy", "nan-check", "values", "check")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu:
        os.environ["OMP_NUM_THREADS"] = "1"
    if options.inside:
        print(json.dumps(inside(options.models[0], options.tokens, options.repeats, options.cpu)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or [random_model(Path(folder), options.tokens)]
        print("whole commands, seconds")
        print(f"{'model':>24} " + " ".join(f"{way:>9}" for way in COMMANDS) + "   check / slowest")
        for model in models:
            row(model, whole(model, options.tokens, options.repeats, options.cpu), load=0.0)
        print("in one process, seconds")
        print(f"{'model':>24} " + " ".join(f"{way:>9}" for way in PARTS) + "   check / slowest")
        for model in models:
            command = [sys.executable, __file__, "--inside", model]
            command += ["--tokens", str(options.tokens), "--repeats", str(options.repeats)]
            command += ["--cpu"] if options.cpu else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            medians = json.loads(done.stdout.splitlines()[-1])
            row(model, medians, load=medians["load"])


def row(model: str, medians: dict[str, float], load: float) -> None:
    slowest = load + max(
        seconds for way, seconds in medians.items() if way in ("entropy", "nan-check", "values")
    )
    ratio = (load + medians["check"]) / slowest
    name = Path(model.rpartition(":")[0] or model).name
    print(
        f"{name[-24:]:>24} " + " ".join(f"{s:>9.2f}" for s in medians.values()) + f"   {ratio:.2f}",
        flush=True,
    )


def whole(model: str, tokens: int, repeats: int, cpu: bool) -> dict[str, float]:
    """Medians of whole processes; inspect reads the file that the model is loaded from."""
    seconds: dict[str, list[float]] = {way: [] for way in COMMANDS}
    for _ in range(repeats):
        for way, words in COMMANDS.items():
            size = [] if way == "values" else ["--seq-len", str(tokens), "--device", "cpu"]
            command = [sys.executable, "-m", "attncli", *words, model, *size, "-q"]
            start = clock_of_children() if cpu else time.perf_counter()
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[way].append((clock_of_children() if cpu else time.perf_counter()) - start)
    return {way: statistics.median(found) for way, found in seconds.items()}


def clock_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def inside(spec: str, tokens: int, repeats: int, cpu: bool) -> dict[str, float]:
    """Medians in this process, each way after one run of it that is not counted; loading is timed once."""
    import torch

    import attncli
    from attncli.api.loading import RunSettings, load
    from attncli.model import run
    from attncli.trace import named_tensors
    from attncli.weights import ModelValues, value_measurements

    clock = time.process_time if cpu else time.perf_counter
    start = clock()
    model, batch = load(spec, RunSettings(seq_len=tokens, device="cpu"), None)
    loading = clock() - start
    net = model.module

    def plain() -> object:
        return run(model, batch)

    def values() -> object:
        store = ModelValues(named_tensors(net))
        return value_measurements(store.tensors, store)

    def step(net: torch.nn.Module) -> object:
        with torch.no_grad():
            return net(*batch.args, **batch.kwargs)

    ways: dict[str, Callable[[], object]] = {
        "plain": plain,
        "entropy": lambda: attncli.measure(net, *batch.args, **batch.kwargs),
        "nan-check": lambda: attncli.nan_check(net, step, backward=False),
        "values": values,
        "check": lambda: attncli.check(net, *batch.args, **batch.kwargs),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, go in ways.items():
            start = clock()
            go()
            if repeat:
                seconds[way].append(clock() - start)
    return {"load": loading, **{way: statistics.median(found) for way, found in seconds.items()}}


def random_model(folder: Path, tokens: int) -> str:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=max(tokens, 64))
    transformers.GPT2Model(config).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
