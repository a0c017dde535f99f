"""Time and memory of `attncli inspect` against `attncli --help`, as whole processes, interleaved.

Budget: twice the time of --help plus 1 ms per shard, and less than 100 MB whatever the size of the weights.
Run it as `python tests/benchmarks/bench_inspect.py [--repeats N]`; it needs some 250 MB in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

HELP_FACTOR = 2.0
SECONDS_PER_SHARD = 0.001
MEMORY_MB = 100


class Case(NamedTuple):
    """One checkpoint on disk; `shards` is what the time budget counts."""

    name: str
    path: Path
    shards: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        _write(options.write)
    else:
        _compare(options.repeats)


def _compare(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: the peak memory of a child starts at that of the process that forks it.
        subprocess.run([sys.executable, __file__, "--write", folder], check=True)
        cases = [Case(name, Path(folder) / place, shards) for name, place, shards in _CASES]
        seconds: dict[str, list[float]] = {name: [] for name in ("--help", *(case.name for case in cases))}
        peak_mb: dict[str, float] = {}
        _run(["--help"])
        for case in cases:
            _run(["inspect", str(case.path)])
        for _ in range(repeats):
            for name, arguments in (
                ("--help", ["--help"]),
                *((c.name, ["inspect", str(c.path)]) for c in cases),
            ):
                took, megabytes = _run(arguments)
                seconds[name].append(took)
                peak_mb[name] = max(megabytes, peak_mb.get(name, 0.0))
    help_time = statistics.median(seconds["--help"])
    print(f"{'':28}{'median':>9}{'fastest':>9}{'× help':>8}{'budget':>9}{'peak RSS':>10}")
    print(
        f"{'--help':28}{help_time:8.3f}s{min(seconds['--help']):8.3f}s{1:8.2f}{'':9}{peak_mb['--help']:7.0f} MB"
    )
    for case in cases:
        median = statistics.median(seconds[case.name])
        budget = HELP_FACTOR * help_time + SECONDS_PER_SHARD * case.shards
        kept = median <= budget and peak_mb[case.name] < MEMORY_MB
        print(
            f"{case.name:28}{median:8.3f}s{min(seconds[case.name]):8.3f}s{median / help_time:8.2f}"
            f"{budget:8.3f}s{peak_mb[case.name]:7.0f} MB  {'kept' if kept else 'EXCEEDED'}"
        )


# --- one run ------------------------------------------------------------------------------------------


def _run(arguments: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one whole process."""
    # An installed package has its bytecode; without it every run would compile the modules again.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "attncli", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    # wait4 and not RUSAGE_CHILDREN, which is the largest of all children so far.
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        assert process.stderr is not None
        sys.exit(f"attncli {' '.join(arguments)} ended with {process.returncode}: {process.stderr.read()!r}")
    return took, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# --- checkpoints --------------------------------------------------------------------------------------


def _write(folder: Path) -> None:
    _shards(folder / "shards", 1000)
    _torch_file(folder / "model.pt")
    _experts(folder / "experts")


def _shards(folder: Path, count: int) -> None:
    """`count` layers of ten tensors, a shard each."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for n in range(count):
        shard = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
        shapes = _layer(f"model.layers.{n}", 64)
        _safetensors(folder / shard, shapes)
        weight_map |= dict.fromkeys(shapes, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _config(folder, 64)


def _torch_file(path: Path) -> None:
    """Twelve layers, 200 MB of float32."""
    shapes = {name: shape for n in range(12) for name, shape in _layer(f"model.layers.{n}", 588).items()}
    import torch

    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)


def _experts(folder: Path) -> None:
    """Sixty layers of a thousand tensors, nearly all of them experts, as in a large mixture of experts."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(60):
        shapes |= _layer(f"model.layers.{n}", 64)
        shapes |= {
            f"model.layers.{n}.mlp.experts.{expert}.{name}_proj.weight": (4, 4)
            for expert in range(330)
            for name in ("gate", "up", "down")
        }
    _safetensors(folder / "model.safetensors", shapes)
    _config(folder, 64)


def _layer(path: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{path}.self_attn.q_proj.weight": (width, width),
        f"{path}.self_attn.k_proj.weight": (width // 2, width),
        f"{path}.self_attn.v_proj.weight": (width // 2, width),
        f"{path}.self_attn.o_proj.weight": (width, width),
        f"{path}.mlp.gate_proj.weight": (3 * width, width),
        f"{path}.mlp.up_proj.weight": (3 * width, width),
        f"{path}.mlp.down_proj.weight": (width, 3 * width),
        f"{path}.input_layernorm.weight": (width,),
        f"{path}.post_attention_layernorm.weight": (width,),
        f"{path}.self_attn.q_norm.weight": (width // 4,),
    }


def _safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Written by hand, with the data as a hole: only headers are measured."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)


def _config(folder: Path, width: int) -> None:
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": width}
    (folder / "config.json").write_text(json.dumps(config))


# Name, place below the folder, and the number of shards that the budget counts.
_CASES = (
    ("1,000 shards with an index", "shards", 1000),
    ("a .pt file of 200 MB", "model.pt", 1),
    ("60,000 tensors in one file", "experts", 1),
)

if __name__ == "__main__":
    main()
