"""The values of a model in memory, as the scan of a checkpoint takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from attncli.records import Array, Tensor


class ModelValues:
    """Floating parameters and persistent buffers by name; `tensors` lists them.

    What lies on no device (meta tensors, offloaded weights) and what is no plain tensor (quantised, distributed) is
    not available. Values of another device are copied piece by piece.
    """

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        self._values = {
            name: value.detach()
            for name, value in named.items()
            if isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
        }
        self.tensors = tuple(_record(name, value) for name, value in self._values.items())
        self._records = {tensor.name: tensor for tensor in self.tensors}

    def find(self, name: str) -> Tensor | None:
        return self._records.get(name)

    def available(self, tensor: Tensor) -> bool:
        value = self._values.get(tensor.name)
        return (
            value is not None
            and type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout == torch.strided
            and value.device.type != "meta"
        )

    def load(self, tensor: Tensor) -> torch.Tensor:
        return self._values[tensor.name].cpu()

    def parts(self, tensor: Tensor) -> Iterator[Iterator[torch.Tensor]]:
        """The elements of a tensor in groups of 1-D pieces on the CPU, each group for one thread."""
        flat = self._values[tensor.name].reshape(-1)
        for start in range(0, flat.numel(), _GROUP):
            group = flat[start : start + _GROUP]
            yield (piece.cpu() for piece in group.split(_PIECE))


def _record(name: str, value: torch.Tensor) -> Tensor:
    dtype = str(value.dtype).removeprefix("torch.")
    size = value.numel() * value.element_size()
    array = Array(name, tuple(value.shape), dtype, "", None, size)
    return Tensor(name, tuple(value.shape), dtype, "", {"weight": array})


# Elements of a piece, which fits a core's cache, and of what one thread takes at a time.
_PIECE = 1 << 20
_GROUP = 4 << 20
