"""Devices and dtypes by the names that a user gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from attncli.errors import ModelError


def available_devices() -> tuple[str, ...]:
    """Every device that torch can use here, the fastest first: ("cuda:0", "cuda:1", "cpu")."""
    names = (
        [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    if torch.backends.mps.is_available():
        names.append("mps")
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None and not names and accelerator.is_available():
        kind = accelerator.current_accelerator().type
        names = [f"{kind}:{index}" for index in range(accelerator.device_count())]
    return (*names, "cpu")


def pick_device(name: str) -> torch.device:
    """The device of that name, or the best one for "auto". Errors: ModelError that lists those that are here."""
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    remedy = f"Devices here: {', '.join(available)}."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"--device {name}", "that is no name of a device.", remedy) from error
    if device.index is None:
        found = [here for here in available if here.split(":")[0] == device.type]
    else:
        found = [here for here in available if here in (str(device), device.type)]
    if not found:
        raise ModelError(
            f"--device {name}", "that device is not here, or torch was built without it.", remedy
        )
    return torch.device(found[0])


def pick_dtype(name: str, option: str = "--dtype") -> torch.dtype:
    """The floating dtype of that name, torch's spelling or a usual short one."""
    dtype = DTYPES.get(name.removeprefix("torch.").lower())
    if dtype is None:
        raise ModelError(f"{option} {name}", "that is no floating dtype.", f"Known: {', '.join(DTYPES)}.")
    return dtype


def pick_autocast(name: str | None) -> torch.dtype | None:
    """The dtype to autocast to: float16 or bfloat16, which are all that torch's autocast knows."""
    if name is None:
        return None
    dtype = pick_dtype(name, "--autocast")
    if dtype not in (torch.float16, torch.bfloat16):
        problem = "autocast runs in float16 or bfloat16 only."
        raise ModelError(
            f"--autocast {name}", problem, "Use --dtype to run the whole model in another dtype."
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def main_dtype(module: Any) -> torch.dtype | None:
    """The dtype that most floating parameters (or, without any, buffers) have; None for a module without."""
    for tensors in (_listed(module, "parameters"), _listed(module, "buffers")):
        sizes: Counter[torch.dtype] = Counter()
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype in DTYPES.values():
                sizes[tensor.dtype] += tensor.numel()
        if sizes:
            return sizes.most_common(1)[0][0]
    return None


def parameter_count(module: Any) -> int:
    """Elements of all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in _listed(module, "parameters") if not _is_lazy(parameter))


def _listed(module: Any, what: str) -> list[Any]:
    method: Callable[[], Any] | None = getattr(module, what, None)
    return [tensor for tensor in method() if not _is_lazy(tensor)] if method is not None else []


def _is_lazy(tensor: Any) -> bool:
    return torch.nn.parameter.is_lazy(tensor)


DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "half": torch.float16,
    "double": torch.float64,
}
