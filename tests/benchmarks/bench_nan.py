"""What looking for NaN costs: a checked pass beside a plain one and beside transformers' DebugUnderflowOverflow.

    python tests/benchmarks/bench_nan.py [--tokens 128 512] [--repeats 3]

The model: 12 layers, 768 wide, random weights, float32, one sequence, forward and (without the other tool, which
looks at the forward pass alone) backward. Each way runs in a process of its own, so that its peak memory is its
own; times are the best of the repeats, which alternate between the ways. Budget: a checked forward pass is no slower
than DebugUnderflowOverflow, and holds no activation.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time

WAYS = ("plain", "checked", "debug", "plain backward", "checked backward")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], int(options.one[1]))))
        return
    print(f"{'tokens':>7} " + " ".join(f"{way + ' s':>18} {'MB':>6}" for way in WAYS))
    for tokens in options.tokens:
        best = dict.fromkeys(WAYS, (float("inf"), float("inf")))
        for _ in range(options.repeats):
            for way in WAYS:
                command = [sys.executable, __file__, "--one", way, str(tokens)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
                best[way] = (min(best[way][0], seconds), min(best[way][1], megabytes))
        print(
            f"{tokens:>7} " + " ".join(f"{best[way][0]:>18.2f} {best[way][1]:>6.0f}" for way in WAYS),
            flush=True,
        )


def run(way: str, tokens: int) -> tuple[float, float]:
    """(seconds of one pass after a short one, megabytes of peak memory above that of the loaded model)."""
    import torch
    import transformers
    from transformers.debug_utils import DebugUnderflowOverflow

    import attncli

    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=max(tokens, 64))).eval()
    backward = "backward" in way

    def step(length: int) -> None:
        ids = torch.randint(0, 1000, (1, length))

        def forward(model: torch.nn.Module) -> torch.Tensor:
            with torch.set_grad_enabled(backward):
                loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
                return loss

        if way.startswith("checked"):
            report = attncli.nan_check(net, forward, backward=backward)
            assert not report.origins
        elif way == "debug":
            with contextlib.redirect_stdout(io.StringIO()):
                forward(net)
        else:
            loss = forward(net)
            if backward:
                loss.backward()
        net.zero_grad()

    if way == "debug":
        DebugUnderflowOverflow(net)
    step(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step(tokens)
    return time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
