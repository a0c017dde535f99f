"""The inert records that a pickle becomes: names, calls, storages and the headers of tensors.

Nothing here imports or calls what a file names. The dtype tables at the foot are torch's and numpy's names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


class MalformedError(ValueError):
    """Data that a pickle cannot mean. The text is a full sentence."""


@dataclass(slots=True, eq=False)
class Global:
    """A name that a pickle wanted imported."""

    module: str
    name: str
    # Stored, not derived: it is looked up for every tensor.
    path: str = field(init=False)

    def __post_init__(self) -> None:
        self.path = f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """A call that a pickle wanted made, and what it wanted added to the result.

    `state` is what BUILD would have set, `items` what APPENDS and `pairs` what SETITEMS would have added.
    """

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: Any = None
    state: Any = None
    items: list[Any] | None = None
    pairs: dict[Any, Any] | None = None

    @property
    def path(self) -> str:
        """The dotted name of the class or function, or "?" where it is itself the result of a call."""
        return self.func.path if isinstance(self.func, Global) else "?"

    @property
    def is_module(self) -> bool:
        """Whether this is an nn.Module that was pickled whole."""
        return isinstance(self.state, dict) and "_modules" in self.state and "_parameters" in self.state


@dataclass(slots=True, eq=False)
class OpaqueKey:
    """A dict key that is not hashed by its value, because hashing it could take forever (nested tuples)."""

    value: Any


@dataclass(slots=True, eq=False)
class Storage:
    """One storage that tensors view. `numel` in elements of `dtype`; `view_offset` in the same elements, from
    the start of the root storage `key`."""

    key: str
    dtype: str
    numel: int
    location: str
    view_offset: int = 0


@dataclass(slots=True, eq=False)
class PickledTensor:
    """The header of a tensor. `storage` None: there are no bytes of its own (meta, numpy, wrapper subclass).

    `offset` and `strides` in elements; `strides` None is C-contiguous. `layout` "strided", or "sparse",
    "nested", "numpy", whose elements cannot be addressed.
    """

    storage: Storage | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    layout: str = "strided"

    @property
    def span(self) -> int:
        """Elements from the first to the last that the tensor touches; 0 for an empty one."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def item_bytes(dtype: str) -> int:
    """Bytes one element takes; 1 for a dtype that is not known."""
    return ITEM_BYTES.get(dtype, 1)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie in C order without gaps; strides of axes of size 1 do not matter."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def as_key(value: Any) -> Any:
    """`value` as a dict key whose hash is cheap: short scalars as they are, records by identity.

    Others become opaque. So do integers beyond 31 bits and floats: their hashes are not salted, and a file
    could choose them to collide.
    """
    kind = type(value)
    if kind is str or kind is bytes or value is None or kind is bool or kind in _RECORDS:
        return value
    if kind is int and -(1 << 31) < value < 1 << 31:
        return value
    return OpaqueKey(value)


def dtype_name(value: Any) -> str:
    """torch's name without prefix of an inert dtype, storage type or numpy dtype.

    Errors: `MalformedError` for anything else.
    """
    if isinstance(value, Storage):
        return value.dtype
    if isinstance(value, NumpyDtype):
        return value.name
    if isinstance(value, Global):
        if value.name in STORAGE_DTYPES:
            return STORAGE_DTYPES[value.name]
        if value.module == "torch":
            return value.name
    raise MalformedError("a tensor has a dtype that torch does not know.")


def storage_record(pid: Any) -> Storage | Global:
    """The storage that torch.save's persistent id ("storage", type, key, location, numel[, view]) stands for.

    ("module", class, file, source) of the oldest files gives the class. Errors: `MalformedError`.
    """
    if isinstance(pid, tuple) and len(pid) >= 2:
        if pid[0] == "module" and isinstance(pid[1], Global):
            return pid[1]
        if pid[0] == "storage" and len(pid) >= 5 and isinstance(pid[4], int) and pid[4] >= 0:
            _, kind, key, location, numel = pid[:5]
            if isinstance(key, (str, int)):
                storage = Storage(str(key), dtype_name(kind), numel, str(location or ""))
                view = pid[5] if len(pid) > 5 else None
                if isinstance(view, tuple) and len(view) == 3 and isinstance(view[1], int) and view[1] >= 0:
                    storage.view_offset = view[1]
                return storage
    raise MalformedError("a storage is described in a way that torch.save never writes.")


# --- numpy ----------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class NumpyDtype:
    """A numpy dtype by its code ("f4"); `name` in torch's spelling where there is one."""

    code: str
    byteorder: str = "<"

    @property
    def name(self) -> str:
        return NUMPY_DTYPES.get(self.code.lstrip("<>=|"), self.code)


def set_numpy_state(array: PickledTensor, state: Any) -> None:
    """Fill the header that numpy's `_reconstruct` left open from (version, shape, dtype, fortran, bytes)."""
    if not isinstance(state, tuple) or len(state) < 4 or not isinstance(state[-3], NumpyDtype):
        return
    shape, dtype, fortran = state[-4], state[-3], state[-2]
    array.shape = shape_of(shape)
    array.dtype = dtype.name
    array.strides = fortran_strides(array.shape) if fortran is True else None


def fortran_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of an array whose first axis runs fastest."""
    strides, step = [], 1
    for size in shape:
        strides.append(step)
        step *= size
    return tuple(strides)


def shape_of(value: Any) -> tuple[int, ...]:
    """A shape: a tuple of at most 64 non-negative integers below 2^63."""
    if not isinstance(value, (tuple, list)) or len(value) > 64:
        raise MalformedError("a tensor has a shape that is no short tuple of integers.")
    for size in value:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise MalformedError("a tensor has a size or stride that is no integer from 0 to 2^63.")
    return tuple(value)


_RECORDS = frozenset({Global, Call, Storage, PickledTensor, OpaqueKey, NumpyDtype})

STORAGE_DTYPES: dict[str, str] = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8", "QUInt8Storage": "quint8", "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    # Untyped storages count bytes.
    "UntypedStorage": "uint8", "_UntypedStorage": "uint8", "TypedStorage": "uint8",
}  # fmt: skip

ITEM_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
    "complex32": 4, "complex64": 8, "complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4,
    "quint4x2": 1, "quint2x4": 1, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
    "bits8": 1, "bits16": 2, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1,
}  # fmt: skip

NUMPY_DTYPES: dict[str, str] = {
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128",
    "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64", "b1": "bool",
    "O8": "object", "O": "object",
}  # fmt: skip
