"""Speed and memory of the value scan, against plain reading of the same cached file.

    python tests/benchmarks/bench_values.py --size-gb 1 --dtype bfloat16

Writes a safetensors file into a temporary folder, reads it once to warm the page cache, then lets plain
reading (one thread, `readinto` of one buffer) and the scan take turns, each in a process of its own, so
that the peak memory is the scan's alone. Prints medians and their ratio. Budget: ratio ≥ 0.8; peak ≤ 300 MB
+ the largest tensor.
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
from pathlib import Path

from attncli.checkpoint import open_checkpoint

BUFFER_BYTES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tensor-mb", type=float, default=32.0, help="size of each large tensor")
    parser.add_argument("--small", type=int, default=200, help="tensors of 8 kB between them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--read", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--scan", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(timed_read(Path(options.read))))
    elif options.scan:
        print(json.dumps(timed_scan(Path(options.scan))))
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder) / "model.safetensors", options)


def compare(path: Path, options: argparse.Namespace) -> None:
    largest = write(path, options.dtype, options.size_gb, options.tensor_mb, options.small)
    size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB of {options.dtype}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    measure("--read", path)
    reads, scans = [], []
    for _ in range(options.rounds):
        reads.append(measure("--read", path))
        scans.append(measure("--scan", path))
    read, scan = (statistics.median(row["seconds"] for row in rows) for rows in (reads, scans))
    each = statistics.median(r["seconds"] / s["seconds"] for r, s in zip(reads, scans, strict=True))
    busy = statistics.median(row["cpu_seconds"] / row["seconds"] for row in scans)
    peak = max(row["peak_bytes"] for row in scans)
    print(f"plain read   {size / read / 1e9:6.2f} GB/s  (median of {options.rounds})")
    print(f"value scan   {size / scan / 1e9:6.2f} GB/s  on {busy:.2f} cores")
    print(f"ratio        {read / scan:6.2f}  (median of each round's own: {each:.2f}; budget 0.8)")
    print(f"peak memory  {peak / 1e6:6.0f} MB  (budget 300 MB + {largest / 1e6:.0f} MB, the largest tensor)")


def measure(role: str, path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, role, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {key: float(value) for key, value in json.loads(done.stdout).items()}


def timed_read(path: Path) -> dict[str, float]:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return {"seconds": time.perf_counter() - start}


def timed_scan(path: Path) -> dict[str, float]:
    from attncli.checkpoint.values import Values
    from attncli.weights import value_measurements

    checkpoint = open_checkpoint(path)
    start, cpu = time.perf_counter(), time.process_time()
    with Values(checkpoint) as values:
        result = value_measurements(checkpoint.tensors, values)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    assert len(result.measurements) == 5 * len(checkpoint.tensors)
    assert not result.skipped
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Largest resident memory of this process. getrusage would count the parent's, from before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(path: Path, dtype: str, size_gb: float, tensor_mb: float, small: int) -> int:
    """Normal weights of spread 0.02 as safetensors, by hand: the file may exceed memory. Gives the size of
    the largest tensor."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    large = int(tensor_mb * 1e6) // kind.itemsize
    count = max(1, round(size_gb * 1e9 / (large * kind.itemsize)))
    sizes = [large] * count
    for index in range(small):
        sizes.insert(1 + index * (len(sizes) - 1) // max(1, small), 8192 // kind.itemsize)
    header, offset = {}, 0
    code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    for index, numel in enumerate(sizes):
        end = offset + numel * kind.itemsize
        header[f"layers.{index}.weight"] = {"dtype": code, "shape": [numel], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(0)
    buffer = bytearray(large * kind.itemsize)
    values = torch.frombuffer(buffer, dtype=kind)
    values.copy_(torch.randn(large, generator=generator) * 0.02)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for numel in sizes:
            file.write(memoryview(buffer)[: numel * kind.itemsize])
    return large * kind.itemsize


if __name__ == "__main__":
    main()
