"""LoRA pairs → one logical tensor per adapted weight: lora_B · lora_A is [out, in] like what it changes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attncli.records import Array, Tensor

_PAIR = re.compile(r"^(?P<base>.*)\.lora_(?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight$")
_SIDES = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B"}


def join_lora(arrays: Sequence[Array]) -> tuple[tuple[Tensor, ...], tuple[Array, ...]]:
    """Logical tensors of complete pairs (scheme "lora", `quantisation` holds the rank), and all other
    arrays."""
    if not any(".lora_" in array.name for array in arrays):
        return (), tuple(arrays)
    pairs: dict[tuple[str, str], dict[str, Array]] = {}
    rest: list[Array] = []
    for array in arrays:
        match = _PAIR.match(array.name)
        if match and len(array.shape) == 2:
            pairs.setdefault((match["base"], match["adapter"] or ""), {})[_SIDES[match["side"]]] = array
        else:
            rest.append(array)
    plain = {array.name for array in rest}
    tensors = []
    for (base, adapter), parts in pairs.items():
        a, b = parts.get("lora_A"), parts.get("lora_B")
        name = f"{base}.weight"
        if a is None or b is None or a.shape[0] != b.shape[1] or name in plain:
            rest.extend(parts.values())
            continue
        label = name if adapter in ("", "default") else f"{base}.{adapter}.weight"
        shape = (b.shape[0], a.shape[1])
        tensors.append(Tensor(label, shape, a.dtype, a.file, parts, "lora", {"rank": a.shape[0]}))
    return tuple(tensors), tuple(rest)
