"""What watching a training run costs: a small GPT, step by step beside the same run without attncli.

    python tests/benchmarks/bench_watch.py [--steps 200] [--rounds 1] [--clip off on] [--ways again light log]

The model: 6 layers, 384 wide, heads of 64, 512 tokens, vocabulary 256, AdamW, CPU. Every way of running is a process
of its own, so that the hooks of one cannot slow another. They go in lockstep: each takes one step while the others
wait, and the order turns with every step, so that whatever else the machine does meets all of them alike. A ratio is
that of two steps made beside each other; shown are the median, the quartiles, and how far the median may be off
(95 %, bootstrap). `again` is a second plain run: what its ratio differs from 1 is the error of the measurement.
On a GPU (`--device cuda`) nobody waits for a step: there `--together 10` takes the time of ten.

Two processes that do the same differ by some percent for as long as they live, by where their memory came to lie:
`--rounds 8` starts all of them anew eight times, and how far the median may be off is then told from how the rounds
differ.

Steps at which attncli takes a sample are dear and rare, so that a median hides them: `whole run` adds what they cost
above the others, over all steps. Which they are is read from the logs, and so needs a way that writes one. Every way
must end with the same bits in its weights. Budget: light 1.03, log 1.05.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

WAYS = ("plain", "again", "light", "log", "watch", "watch log", "anomaly")
BUDGETS = {"light": 1.03, "watch": 1.03, "log": 1.05, "watch log": 1.05}
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1, help="how often all processes are started anew")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", default="none", choices=("none", "float16", "bfloat16"))
    parser.add_argument("--together", type=int, default=1, help="steps between two readings of the clock")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--clip", nargs="*", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--ways", nargs="*", choices=WAYS[1:], default=list(WAYS[1:]))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "CLIP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        steps_on_request(options, *options.one)
        return
    for clip in options.clip:
        compare(options, clip)


# --- the processes, in lockstep -------------------------------------------------------------------------


def compare(options: argparse.Namespace, clip: str) -> None:
    """Prints one row for each way, and ends the program where two ways differ in their weights."""
    ways = ["plain", *options.ways]
    rounds = [one_round(options, clip, ways) for _ in range(options.rounds)]
    threads = options.threads or "default"
    times = f"{options.rounds} × {options.steps}" if options.rounds > 1 else options.steps
    print(f"\nclip_grad_norm_ {clip}, {times} steps, batch {options.batch}, {threads} threads")
    print(
        f"{'way':<10} {'s/step':>8} {'median':>8} {'quartiles':>16} {'± (95 %)':>9} {'whole run':>10}  budget"
    )
    for way in ways:
        print(row(way, rounds))
    for way, note in rounds[-1].notes.items():
        if note:
            print(f"{way}: {note}")
    print(same_bits(rounds, ways))


def same_bits(rounds: list[Round], ways: list[str]) -> str:
    """Ends the program where a watched way ends with other weights than the plain one does, each time it is run."""
    own = {one.digests[way] for one in rounds for way in ways if way in ("plain", "again")}
    others = {way: one.digests[way] for one in rounds for way in ways if one.digests[way] not in own}
    if others:
        sys.exit(f"the weights differ: {own} {others}")
    if len(own) > 1:
        return (
            f"the weights differ already between plain runs ({len(own)} results); watched ways gave no others"
        )
    return f"weights after the last step: the same bits in all {len(ways) * len(rounds)} runs"


class Round(NamedTuple):
    """Seconds of each step, digests of the weights and what was told, of each way; the steps with a sample."""

    seconds: dict[str, list[float]]
    digests: dict[str, str]
    notes: dict[str, str]
    sampled: set[int]


def one_round(options: argparse.Namespace, clip: str, ways: list[str]) -> Round:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = {way: Path(folder) / f"{way}.jsonl" for way in ways}
        running = {way: stack.enter_context(process(options, way, clip, logs[way])) for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for step in range(options.steps):
            turn = step % len(ways)
            for way in ways[turn:] + ways[:turn]:
                seconds[way].append(float(answer(running[way], "step")))
        digests = {way: answer(running[way], "end") for way in ways}
        notes = {way: running[way].communicate()[1].strip() for way in ways}
        sampled = set[int]().union(*map(sampled_steps, logs.values()))
        return Round(seconds, digests, notes, {-(-step // options.together) for step in sampled})


@contextmanager
def process(options: argparse.Namespace, way: str, clip: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """One way of running, waiting for its first request. `light` and `log` go through the real command line."""
    script = [__file__, "--one", way, clip]
    for name in "steps every batch tokens threads layers width device autocast together".split():
        script += [f"--{name}", str(getattr(options, name))]
    command = [sys.executable]
    if way in ("light", "log"):
        command += ["-m", "attncli", "nan-check", "--every", str(options.every)]
        command += ["--log", str(log)] if way == "log" else []
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, *script], cwd=log.parent, text=True, **pipes) as started:
        try:
            yield started
        finally:
            started.kill()


def answer(process: subprocess.Popen[str], request: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{request}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a process ended: {process.communicate()[1]}")
    return line.strip()


def sampled_steps(log: Path) -> set[int]:
    """The steps (from 1) at which a sample was taken, as the log tells; empty where none was written."""
    return (
        {json.loads(line)["step"] for line in log.read_text("utf-8").splitlines()} if log.exists() else set()
    )


def row(way: str, rounds: list[Round]) -> str:
    ratios: list[list[float]] = []
    usual: list[float] = []
    dear = plain = 0.0
    for one in rounds:
        mine, theirs = one.seconds[way], one.seconds["plain"]
        kept = range(min(WARM_UP, len(mine) - 1), len(mine))
        ordinary = [i for i in kept if i + 1 not in one.sampled] or list(kept)
        ratios.append([mine[i] / theirs[i] for i in ordinary])
        usual.append(statistics.median(mine[i] for i in ordinary))
        dear += sum(mine[i] - usual[-1] for i in kept if i + 1 in one.sampled)
        plain += len(kept) * statistics.median(theirs[i] for i in ordinary)
    together = [ratio for one in ratios for ratio in one]
    median = statistics.median(together)
    low, _, high = statistics.quantiles(together, n=4) if len(together) > 1 else (median, median, median)
    return (
        f"{way:<10} {statistics.median(usual):>8.4f} {median:>8.4f} {f'{low:.3f} to {high:.3f}':>16} "
        f"{uncertainty(ratios):>9.4f} {median + dear / plain:>10.4f}  {BUDGETS.get(way, '')}"
    )


def uncertainty(ratios: list[list[float]]) -> float:
    """Half of the range in which 95 % of the medians of resampled ratios lie: of rounds, or of the steps of one."""
    chance = random.Random(0)
    pool = ratios if len(ratios) > 1 else [[ratio] for ratio in ratios[0]]
    medians = sorted(
        statistics.median(ratio for one in chance.choices(pool, k=len(pool)) for ratio in one)
        for _ in range(400)
    )
    return (medians[389] - medians[10]) / 2


# --- one process ---------------------------------------------------------------------------------------------


def steps_on_request(options: argparse.Namespace, way: str, clip: str) -> None:
    """Takes one training step for each line of stdin and prints its seconds; at the end the digest of the weights."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = gpt(options.tokens, options.layers, options.width).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    batches = torch.Generator().manual_seed(1)
    dtype = None if options.autocast == "none" else getattr(torch, options.autocast)
    scaler = torch.amp.GradScaler(options.device, enabled=dtype is torch.float16)

    def step() -> None:
        ids = torch.randint(0, 256, (options.batch, options.tokens + 1), generator=batches).to(options.device)
        with torch.autocast(options.device, dtype=dtype, enabled=dtype is not None):
            logits = model(ids[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        scaler.scale(loss).backward()
        if clip == "on":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    with surroundings(way, model, optimizer, options.every):
        for line in sys.stdin:
            if line.strip() == "end":
                break
            start = time.perf_counter()
            for _ in range(options.together):
                step()
            if options.device != "cpu":
                torch.cuda.synchronize()
            print((time.perf_counter() - start) / options.together, flush=True)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    print(digest.hexdigest(), flush=True)


def surroundings(way: str, model: Any, optimizer: Any, every: int) -> AbstractContextManager[object]:
    import torch

    import attncli

    if way.startswith("watch"):
        log = f"{way}.jsonl" if way == "watch log" else None
        watched: AbstractContextManager[object] = attncli.watch(model, optimizer, every=every, log=log)
        return watched
    if way == "anomaly":
        return torch.autograd.set_detect_anomaly(True)
    return nullcontext()


def gpt(tokens: int, layers: int = 6, width: int = 384, vocabulary: int = 256) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                part.unflatten(-1, (width // 64, -1)).transpose(1, 2)
                for part in self.qkv(self.norms[0](x)).chunk(3, -1)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            y: torch.Tensor = x + self.mlp(self.norms[1](x))
            return y

    class Gpt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
            logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
            return logits

    return Gpt()


if __name__ == "__main__":
    main()
