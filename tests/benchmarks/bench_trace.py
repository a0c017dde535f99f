"""What measuring costs: a traced forward pass beside a plain one, and beside `output_attentions` plus entropy.

    python tests/benchmarks/bench_trace.py [--tokens 512 1024 4096 16384] [--model gpt2|bert] [--repeats 3]

Each way runs in a process of its own, so that its peak memory is its own; times are the best of the repeats,
which alternate between the ways. The model: 12 layers, 768 wide, 12 heads, random weights, float32, one
sequence. "plain" runs scaled_dot_product_attention without attncli; "traced" is `attncli.measure` on the same
model; "matrices" is the eager model with output_attentions=True and the entropy of each matrix by xlogy.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

WAYS = ("plain", "traced", "matrices")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 4096, 16384])
    parser.add_argument("--model", default="gpt2", choices=("gpt2", "bert"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], int(options.one[1]), options.model)))
        return
    head = f"{'tokens':>7} " + " ".join(f"{way + ' s':>11} {'added MB':>9}" for way in options.ways)
    print(f"{options.model}, 12 layers, 768 wide, float32, {options.repeats} repeats\n{head}   traced/plain")
    for tokens in options.tokens:
        best: dict[str, tuple[float, float]] = {}
        for _ in range(options.repeats):
            for way in options.ways:
                if way == "matrices" and tokens > _LARGEST_MATRICES:
                    continue
                seconds, megabytes = child(way, tokens, options.model)
                known = best.get(way, (float("inf"), float("inf")))
                best[way] = (min(known[0], seconds), min(known[1], megabytes))
        cells = [
            f"{best[w][0]:>11.2f} {best[w][1]:>9.0f}" if w in best else f"{'—':>11} {'—':>9}"
            for w in options.ways
        ]
        ratio = best["traced"][0] / best["plain"][0] if {"traced", "plain"} <= set(best) else float("nan")
        print(f"{tokens:>7} " + " ".join(cells) + f"   {ratio:>8.2f}", flush=True)


def child(way: str, tokens: int, model: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--model", model, "--one", way, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), float(megabytes)


def run(way: str, tokens: int, model: str) -> tuple[float, float]:
    """(seconds of one pass after a short one, megabytes of peak memory above that of the loaded model)."""
    import torch
    import transformers

    import attncli

    torch.manual_seed(0)
    eager = way == "matrices"
    if model == "gpt2":
        config = transformers.GPT2Config(n_positions=tokens, vocab_size=1000)
        kind = transformers.GPT2Model
    else:
        config = transformers.BertConfig(max_position_embeddings=tokens, vocab_size=1000)
        kind = transformers.BertModel
    net = kind._from_config(config, attn_implementation="eager" if eager else "sdpa").eval()
    net.config.use_cache = False

    def step(length: int) -> None:
        ids = torch.randint(0, 1000, (1, length))
        with torch.no_grad():
            if way == "plain":
                net(input_ids=ids)
            elif way == "traced":
                report = attncli.measure(net, input_ids=ids)
                assert len(report.calls) == 12
                assert all(call.explained for call in report.calls)
            else:
                for probs in net(input_ids=ids, output_attentions=True).attentions:
                    torch.special.xlogy(probs, probs).sum(-1).neg().mean((0, 2))

    step(64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step(tokens)
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# Twelve matrices of 12 heads × 4,096² floats are 9.7 GB; at 16,384 tokens they would be 155 GB.
_LARGEST_MATRICES = 4096

if __name__ == "__main__":
    main()
