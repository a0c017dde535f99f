"""Speed of the score bounds, against one full singular value decomposition of each projection.

    python tests/benchmarks/bench_bounds.py --width 2048 4096

Builds q and k projections [heads · d, width] in bfloat16 behind an RMSNorm, and lets
`torch.linalg.svdvals` of the whole projections (float32) and `score_bounds` take turns. Prints medians and
their ratio. Budget: ≥ 10 times faster per projection.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator

import torch

from attncli.records import Array, HeadRows, Layer, Norm, ScoreSide, ScoreTerm, Tensor
from attncli.weights import score_bounds


class Held:
    """Tensors in memory as a source of values."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def find(self, name: str) -> Tensor | None:
        tensor = self.tensors[name]
        dtype = str(tensor.dtype)[6:]
        array = Array(name, tuple(tensor.shape), dtype, "", 0, tensor.nbytes)
        return Tensor(name, array.shape, dtype, "", {"weight": array})

    def available(self, tensor: Tensor) -> bool:
        return tensor.name in self.tensors

    def load(self, tensor: Tensor) -> torch.Tensor:
        return self.tensors[tensor.name]

    def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]:
        yield iter([self.tensors[tensor.name].reshape(-1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for width in options.width:
        compare(width, options.heads, options.head_dim, options.rounds)


def compare(width: int, heads: int, head_dim: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (heads * head_dim, width)
    held = Held({name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name in ("q", "k")})
    held.tensors["gain"] = torch.ones(width)
    starts = tuple(range(0, heads * head_dim, head_dim))
    norm = Norm("rms", "gain", size=width)
    sides = (ScoreSide(HeadRows(name, starts, head_dim), norm) for name in ("q", "k"))
    layer = Layer(
        id="layer",
        path="layer",
        kind="self",
        layout="separate",
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=None,
        evidence={},
        tensors=(),
        score_terms=(ScoreTerm(*sides),),
    )
    bounds, decompositions = [], []
    score_bounds([layer], held)
    for _ in range(rounds):
        start = time.perf_counter()
        result = score_bounds([layer], held)
        bounds.append((time.perf_counter() - start) / 2)
        start = time.perf_counter()
        torch.linalg.svdvals(held.tensors["q"].float())
        decompositions.append(time.perf_counter() - start)
    assert len(result.measurements) == 2 * heads
    bound, decomposition = statistics.median(bounds), statistics.median(decompositions)
    print(f"[{shape[0]} x {width}], {heads} heads of {head_dim}, load {os.getloadavg()[0]:.1f}")
    print(f"  full SVD      {decomposition:8.3f} s a projection  (median of {rounds})")
    print(f"  score bounds  {bound:8.3f} s a projection")
    print(f"  ratio         {decomposition / bound:8.1f}  (budget 10)")


if __name__ == "__main__":
    main()
