"""What a pickle's globals mean here, in four tables at the foot.

`CONSTRUCTORS` are understood as data (never called: each row is our own function of the arguments),
`HARMLESS` are known and stay inert calls, `DANGEROUS` are reported as such. Every other name is reported too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from attncli.checkpoint.pickle_values import (
    ITEM_BYTES,
    STORAGE_DTYPES,
    Global,
    MalformedError,
    NumpyDtype,
    PickledTensor,
    Storage,
    as_key,
    dtype_name,
    fortran_strides,
    is_contiguous,
    shape_of,
)

Spend = Callable[[int], None]
Constructor = Callable[[tuple[Any, ...], Spend], Any]


def is_dangerous(path: str) -> bool:
    """Whether a dotted name runs code or touches the system."""
    segments = path.split(".")
    if any(segment.startswith("__") and segment not in ("__main__", "__torch__") for segment in segments[1:]):
        return True
    return any(".".join(segments[:end]) in DANGEROUS for end in range(1, len(segments) + 1))


def is_known(path: str) -> bool:
    """Whether a dotted name is in the vocabulary of harmless checkpoints."""
    return path in CONSTRUCTORS or path in HARMLESS or path.startswith(HARMLESS_PREFIXES)


# --- numpy ---------------


def _numpy_dtype(args: tuple[Any, ...], spend: Spend) -> Any:
    return NumpyDtype(str(args[0])[:64]) if args and isinstance(args[0], (str, bytes)) else NotImplemented


def _numpy_empty(args: tuple[Any, ...], spend: Spend) -> Any:
    return PickledTensor(None, 0, (0,), None, "unknown", "numpy")


def _numpy_frombuffer(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 4 or not isinstance(args[1], NumpyDtype):
        return NotImplemented
    shape = shape_of(args[2])
    strides = fortran_strides(shape) if args[3] == "F" else None
    return PickledTensor(None, 0, shape, strides, args[1].name, "numpy")


def _numpy_scalar(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) != 2 or not isinstance(args[0], NumpyDtype):
        return NotImplemented
    dtype, data = args
    if isinstance(data, str):
        data = data.encode("latin-1", "replace")
    form = _SCALAR_FORMATS.get(dtype.name)
    if form is None or not isinstance(data, bytes) or len(data) != struct.calcsize(form):
        return NotImplemented
    return struct.unpack((">" if dtype.byteorder == ">" else "<") + form, data)[0]


# --- Python's own containers ----------------------------------------------------------------------------


def _dict(args: tuple[Any, ...], spend: Spend) -> Any:
    if not args:
        return {}
    source = args[0]
    if isinstance(source, dict):
        return source
    if isinstance(source, (list, tuple)):
        spend(len(source))
        if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in source):
            return {as_key(pair[0]): pair[1] for pair in source}
    return NotImplemented


def _sequence(args: tuple[Any, ...], spend: Spend) -> Any:
    if not args:
        return []
    if isinstance(args[0], tuple):
        spend(len(args[0]))
        return list(args[0])
    return args[0] if isinstance(args[0], list) else NotImplemented


def _tuple(args: tuple[Any, ...], spend: Spend) -> Any:
    return args[0] if args and isinstance(args[0], (list, tuple)) else NotImplemented if args else ()


def _empty_dict(args: tuple[Any, ...], spend: Spend) -> Any:
    return {}


def _first(args: tuple[Any, ...], spend: Spend) -> Any:
    return args[0] if args else NotImplemented


def _scalar(args: tuple[Any, ...], spend: Spend) -> Any:
    return args[0] if len(args) == 1 and isinstance(args[0], (bool, int, float, str)) else NotImplemented


def _path(args: tuple[Any, ...], spend: Spend) -> Any:
    spend(len(args))
    if not all(isinstance(part, str) for part in args):
        return NotImplemented
    spend(sum(map(len, args)))
    return "/".join(args).replace("//", "/")


def _text(args: tuple[Any, ...], spend: Spend) -> Any:
    return args[0] if args and isinstance(args[0], (str, bytes)) else b"" if not args else NotImplemented


def _device(args: tuple[Any, ...], spend: Spend) -> Any:
    return ":".join(str(part) for part in args[:2] if isinstance(part, (str, int)))


# --- torch ----------------------------------------------------------------------------------------------


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: str | None = None) -> PickledTensor:
    shape, strides = shape_of(size), shape_of(stride)
    if len(shape) != len(strides) or type(offset) is not int or not 0 <= offset < 1 << 63:
        raise MalformedError("a tensor has strides or an offset that do not fit its shape.")
    if not isinstance(storage, Storage):
        return PickledTensor(None, 0, shape, None, dtype or "unknown")
    kept = None if is_contiguous(shape, strides) or 0 in shape else strides
    return PickledTensor(storage, offset, shape, kept, dtype or storage.dtype)


def _rebuild_tensor(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 4:
        raise MalformedError("a tensor is rebuilt from fewer than four arguments.")
    return _tensor(*args[:4])


def _rebuild_tensor_v3(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 7:
        raise MalformedError("a tensor is rebuilt from fewer than seven arguments.")
    storage, offset, size, stride = args[:4]
    return _tensor(storage, offset, size, stride, dtype_name(args[6]))


def _rebuild_meta(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 3:
        raise MalformedError("a meta tensor is rebuilt from fewer than three arguments.")
    return _tensor(None, 0, args[1], args[2], dtype_name(args[0]))


def _rebuild_wrapper(args: tuple[Any, ...], spend: Spend) -> Any:
    return _rebuild_meta(args[1:], spend)


def _rebuild_sparse(args: tuple[Any, ...], spend: Spend) -> Any:
    data = args[1] if len(args) > 1 else None
    if not isinstance(data, tuple) or len(data) < 3:
        return NotImplemented
    coo = args[0] == "torch.sparse_coo"
    values, size = (data[1], data[2]) if coo or len(data) < 4 else (data[2], data[3])
    dtype = values.dtype if isinstance(values, PickledTensor) else "unknown"
    return PickledTensor(None, 0, shape_of(size), None, dtype, "sparse")


def _rebuild_nested(args: tuple[Any, ...], spend: Spend) -> Any:
    if not args or not isinstance(args[0], PickledTensor):
        return NotImplemented
    return PickledTensor(None, 0, args[0].shape, None, args[0].dtype, "nested")


def _rebuild_device_tensor(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 2 or not isinstance(args[0], PickledTensor):
        return NotImplemented
    data = args[0]
    # The bytes keep the dtype they were saved with; torch casts them while loading.
    return PickledTensor(data.storage, data.offset, data.shape, data.strides, data.dtype, data.layout)


def _rebuild_from_type(args: tuple[Any, ...], spend: Spend) -> Any:
    if len(args) < 3 or not isinstance(args[0], Global) or not isinstance(args[2], tuple):
        return NotImplemented
    inner = CONSTRUCTORS.get(args[0].path)
    # A subclass wraps a rebuild function of a plain tensor, never itself: no recursion into the arguments.
    return NotImplemented if inner in (None, _rebuild_from_type) else inner(args[2], spend)


_SCALAR_FORMATS = {
    "float16": "e", "float32": "f", "float64": "d", "bool": "?",
    "int8": "b", "int16": "h", "int32": "i", "int64": "q",
    "uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q",
}  # fmt: skip

CONSTRUCTORS: dict[str, Constructor] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _empty_dict,
    "collections.deque": _sequence,
    "builtins.dict": _dict,
    "builtins.list": _sequence,
    "builtins.tuple": _tuple,
    "builtins.set": _sequence,
    "builtins.frozenset": _sequence,
    "builtins.int": _scalar,
    "builtins.float": _scalar,
    "builtins.bool": _scalar,
    "builtins.str": _scalar,
    "builtins.bytes": _text,
    "builtins.bytearray": _text,
    "_codecs.encode": _text,
    "pathlib.PosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.PureWindowsPath": _path,
    "pathlib.Path": _path,
    "pathlib._local.PosixPath": _path,
    "pathlib._local.WindowsPath": _path,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray._reconstruct": _numpy_empty,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy.core.numeric._frombuffer": _numpy_frombuffer,
    "torch.Size": _tuple,
    "torch.device": _device,
    "torch.serialization._get_layout": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_qtensor": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch._utils._rebuild_wrapper_subclass": _rebuild_wrapper,
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse,
    "torch._utils._rebuild_nested_tensor": _rebuild_nested,
    "torch._utils._rebuild_device_tensor_from_numpy": _rebuild_device_tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _rebuild_device_tensor,
    "torch._utils._rebuild_xla_tensor": _rebuild_device_tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.nn.parameter.Parameter": _first,
    "torch.nn.parameter.Buffer": _first,
}

# Known in honest checkpoints and left as inert calls.
HARMLESS: frozenset[str] = frozenset({
    "argparse.Namespace", "types.SimpleNamespace", "builtins.object", "builtins.slice", "builtins.range",
    "builtins.complex", "builtins.NoneType", "builtins.Ellipsis", "typing.Any", "collections.abc.Mapping",
    "copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__", "datetime.datetime",
    "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal",
    "fractions.Fraction", "uuid.UUID", "numpy.ndarray", "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__bit_generator_ctor", "numpy.random._pickle.__generator_ctor",
    "torch.per_tensor_affine", "torch.per_channel_affine", "torch.per_tensor_symmetric",
    "torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams", "torch.Tensor",
    "torch.Generator", "torch.strided", "torch.contiguous_format", "torch.channels_last",
    "torch.preserve_format", "torch._utils._rebuild_tensor_with_metadata",
    "torch.nn.parameter.UninitializedParameter", "torch._tensor._rebuild_from_type",
    *(f"torch.{name}" for name in ITEM_BYTES),
    *(f"{module}.{name}" for name in STORAGE_DTYPES for module in ("torch", "torch.cuda", "torch.storage")),
    *(f"numpy.{name}" for name in ("float16", "float32", "float64", "int16", "int32", "int64", "bool_")),
})  # fmt: skip
HARMLESS_PREFIXES: tuple[str, ...] = (
    "omegaconf.", "torch.distributed.checkpoint.metadata.", "torch.distributed.checkpoint.filesystem.",
    "torch.distributed.checkpoint.planner.", "torch.jit._pickle.",
    "torch.distributed.tensor.placement_types.",
)  # fmt: skip

# Whole modules, or single names, that run code, load code or touch the system.
DANGEROUS: frozenset[str] = frozenset({
    "os", "posix", "nt", "posixpath", "ntpath", "subprocess", "_posixsubprocess", "sys", "commands",
    "popen2", "pty", "importlib", "_frozen_importlib", "_frozen_importlib_external", "imp", "runpy",
    "pkgutil", "pydoc", "zipimport", "socket", "_socket", "ssl", "http", "urllib", "ftplib", "smtplib",
    "telnetlib", "requests", "httplib", "urllib2", "shutil", "tempfile", "glob", "fileinput", "linecache",
    "ctypes", "_ctypes", "cffi", "mmap", "webbrowser", "antigravity", "pickle", "_pickle", "cPickle",
    "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "codeop", "_codecs.lookup",
    "codecs.open", "io.open", "_io.open", "io.open_code", "_io.open_code", "io.FileIO", "_io.FileIO",
    "signal", "threading", "_thread", "multiprocessing", "concurrent", "asyncio", "gc", "inspect",
    "trace", "timeit", "cProfile", "profile", "pdb", "bdb", "doctest", "unittest", "distutils",
    "setuptools", "pip", "ensurepip", "venv", "platform", "logging.config", "operator", "_operator",
    "functools.reduce", "_functools", "itertools", "types.CodeType", "types.FunctionType",
    "types.MethodType", "types.LambdaType", "types.ModuleType", "weakref.finalize", "atexit", "test",
    "lib2to3", "idlelib", "sqlite3", "winreg", "_winapi", "msvcrt", "builtins.eval", "builtins.exec",
    "builtins.execfile", "builtins.compile", "builtins.open", "builtins.file", "builtins.__import__",
    "builtins.getattr", "builtins.setattr", "builtins.delattr", "builtins.globals", "builtins.locals",
    "builtins.vars", "builtins.input", "builtins.raw_input", "builtins.breakpoint", "builtins.apply",
    "builtins.map", "builtins.filter", "builtins.reduce", "builtins.type", "builtins.super",
    "builtins.classmethod", "builtins.memoryview", "builtins.exit", "builtins.quit", "builtins.help",
    "torch.load", "torch.storage._load_from_bytes", "torch.save", "torch.hub", "torch.serialization.load",
    "torch.utils.cpp_extension", "torch.ops", "torch.jit.load", "torch.package", "torch.classes",
    "torch._dynamo", "torch._inductor", "torch.compile", "torch.utils._config_module",
    "torch.utils.collect_env", "torch.utils.data.datapipes.utils.decoder", "numpy.load", "numpy.fromfile",
    "numpy.memmap", "numpy.testing", "numpy.f2py", "numpy.distutils", "pandas.read_pickle", "pandas.eval",
    "keras.models.load_model", "transformers.dynamic_module_utils",
})  # fmt: skip
