"""Cost of the statistics of one attention call, against the kernel itself and against the full matrix.

    python tests/benchmarks/bench_statistics.py --tokens 512 1024 4096 16384

Three ways take turns: `scaled_dot_product_attention` alone, `fused_statistics`, and what one would write without it
(all scores, softmax in float32, entropy by xlogy). Prints medians of their ratios within one round, since the
machine may be shared, and the memory each adds at its peak, measured in a process of its own. On two shared cores all
statistics of 4,096 tokens took 2.1 times the kernel (causal; it skips the hidden half, whose products count here
too) and 1.2 times (both ways). Budget: 2.5 and 1.5 times, memory linear in tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attncli.trace.statistics import FusedCall, fused_statistics

# Above this the full matrices of all heads do not fit beside other work on a small machine.
FULL_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=["kernel", "statistics", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--causal", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(options)
        return
    print(
        f"{options.heads} heads of {options.head_dim}, {options.threads} threads, torch {torch.__version__}"
    )
    for tokens in options.tokens:
        for causal in (True, False):
            compare(tokens, causal, options)


def compare(tokens: int, causal: bool, options: argparse.Namespace) -> None:
    ways = made_ways(tokens, causal, options)
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = options.rounds if tokens <= FULL_TOKENS else max(1, options.rounds // 3)
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    parts = [f"{tokens:6} tokens {'causal' if causal else 'both ways':9}"]
    for name, taken in times.items():
        ratios = [one / kernel for one, kernel in zip(taken, times["kernel"], strict=True)]
        added = memory(name, tokens, causal, options)
        parts.append(
            f"{name} {min(taken):7.3f} s ×{statistics.median(ratios):5.2f} (least {min(ratios):.2f}) +{added:5.0f} MB"
        )
    print(" | ".join(parts), flush=True)


def made_ways(tokens: int, causal: bool, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, options.heads, options.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3))
    scale = options.head_dim**-0.5
    attention = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[], object]] = {
        "kernel": lambda: attention(q, k, v, is_causal=causal),
        # A new call each time: it remembers what it found out about its mask.
        "statistics": lambda: fused_statistics(
            FusedCall(q, k, v, scale, causal_offset=0 if causal else None)
        ),
    }
    if tokens <= FULL_TOKENS:
        ways["full"] = lambda: full_entropy(q, k, scale, causal)
    return ways


def full_entropy(q: Tensor, k: Tensor, scale: float, causal: bool) -> list[float]:
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32)
    entropy: list[float] = (-torch.xlogy(probs, probs).sum(-1)).mean((0, 2)).tolist()
    return entropy


def memory(name: str, tokens: int, causal: bool, options: argparse.Namespace) -> float:
    """MB that one call adds to the peak of a fresh process."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--memory-of",
        name,
        "--causal",
        str(int(causal)),
    ]
    for option in ("heads", "head_dim", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    command += ["--tokens", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def report_memory(options: argparse.Namespace) -> None:
    # A small call first: libraries that load at first use are not what is measured.
    made_ways(64, True, options)[options.memory_of]()
    way = made_ways(options.tokens[0], bool(options.causal), options)[options.memory_of]
    # Linux only: the peak is set back to what is held now, and read again.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    way()
    print((peak_kib() - before) / 1024)


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
