"""What checking everything at once costs: `attncli check` beside loading the model and the slowest part on its own.

    python tests/benchmarks/bench_check.py [MODEL …] [--tokens 512] [--repeats 3]

A MODEL is what `attncli check` takes; without one, a random model is written and used: 12 layers, 768 wide, float32.
Two tables. Whole commands: each way is a process of its own, so that every one loads the model once; "slowest" is the
slowest of the commands beside check. In one process: the model is loaded once, and each way gets the same batch;
"slowest" is loading it and the slowest part. Times are medians of the repeats, which alternate between the ways.
Budget: check costs at most 1.15 × slowest in both.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
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
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(options.models[0], options.tokens, options.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or [random_model(Path(folder), options.tokens)]
        print("whole commands, seconds")
        print(f"{'model':>24} " + " ".join(f"{way:>9}" for way in COMMANDS) + "   check / slowest")
        for model in models:
            row(model, whole(model, options.tokens, options.repeats), load=0.0)
        print("in one process, seconds")
        print(f"{'model':>24} " + " ".join(f"{way:>9}" for way in PARTS) + "   check / slowest")
        for model in models:
            command = [sys.executable, __file__, "--inside", model]
            command += ["--tokens", str(options.tokens), "--repeats", str(options.repeats)]
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


def whole(model: str, tokens: int, repeats: int) -> dict[str, float]:
    """Medians of whole processes; inspect reads the file that the model is loaded from."""
    seconds: dict[str, list[float]] = {way: [] for way in COMMANDS}
    for _ in range(repeats):
        for way, words in COMMANDS.items():
            size = [] if way == "values" else ["--seq-len", str(tokens), "--device", "cpu"]
            command = [sys.executable, "-m", "attncli", *words, model, *size, "-q"]
            start = time.perf_counter()
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(found) for way, found in seconds.items()}


def inside(spec: str, tokens: int, repeats: int) -> dict[str, float]:
    """Medians in this process, each way after one run of it that is not counted; loading is timed once."""
    import torch

    import attncli
    from attncli.api.loading import RunSettings, load
    from attncli.model import run
    from attncli.trace import named_tensors
    from attncli.weights import ModelValues, value_measurements

    start = time.perf_counter()
    model, batch = load(spec, RunSettings(seq_len=tokens, device="cpu"), None)
    loading = time.perf_counter() - start
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
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                go()
            if repeat:
                seconds[way].append(time.perf_counter() - start)
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
