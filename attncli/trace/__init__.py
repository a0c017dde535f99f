"""A run → what happened. Watches one forward pass of any model and yields its attention calls and numbers.

Nothing is left behind: hooks, the fast-path flag, the compile stance and the modes are as before, also when
the forward pass raises. The model runs on its own kernels; its outputs are those of an untraced run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.records import Call, Measurement
from attncli.trace.attention import Attention
from attncli.trace.maps import Drawn, Maps
from attncli.trace.naming import clean, named_inputs, named_tensors, named_weights
from attncli.trace.pending import Seen
from attncli.trace.tape import Listener, Tape

__all__ = [
    "Maps",
    "Trace",
    "kept",
    "listening",
    "named_inputs",
    "named_tensors",
    "named_weights",
    "surroundings",
    "told",
    "trace",
    "undisturbed",
    "watched",
]


class Trace(NamedTuple):
    """`calls` carry their module as `layer`; the caller joins them with the checkpoint's layers.

    `left_out`: calls of modules that were not wanted. `linear`: products of scores and values without a
    normaliser, by module. `operators`: how many ran. `maps`: those that were asked for, by the index of their call.
    """

    calls: tuple[Call, ...]
    measurements: tuple[Measurement, ...]
    left_out: int
    linear: Mapping[str, int]
    operators: int
    notes: tuple[str, ...]
    surroundings: Mapping[str, Any]
    result: Any
    maps: Mapping[int, tuple[Drawn, ...]]


def trace(
    model: Any,
    run: Callable[[], Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    wanted: Callable[[str], bool] = lambda module: True,
    on_call: Callable[[int], None] | None = None,
    maps: Maps | None = None,
) -> Trace:
    """Runs `run()` once and measures every attention call in it.

    `model`: whose modules and parameters give places their names (an nn.Module, or any callable).
    `args`, `kwargs`: what `run` gives to it, so that inputs can be named. `wanted`: whether the calls of a
    module path are measured. `maps`: the heads whose probabilities are drawn; None draws none.
    Errors: whatever `run` raises.
    """
    with kept(model), listening(model, wanted=wanted, on_call=on_call, maps=maps) as heard:
        heard.tape.name_inputs(named_inputs(model, args, kwargs or {}))
        result = run()
    if heard.tape.failure is not None:
        raise heard.tape.failure
    return told(heard.listener, heard.tape.operators, heard.notes, surroundings(model, args), result)


class Heard(NamedTuple):
    listener: Attention
    tape: Tape
    notes: list[str]


@contextmanager
def listening(
    model: Any,
    *,
    wanted: Callable[[str], bool] = lambda module: True,
    on_call: Callable[[int], None] | None = None,
    maps: Maps | None = None,
) -> Iterator[Heard]:
    """Hears every attention call that runs inside. Where the tape failed, `tape.failure` says why."""
    listener = Attention(wanted, on_call, maps)
    tape = Tape(listener)
    if isinstance(model, nn.Module):
        for named in (model.named_parameters(), model.named_buffers()):
            tape.name_parameters((clean(name), tensor) for name, tensor in named)
    try:
        with watched(model, tape, listener) as notes, tape:
            yield Heard(listener, tape, notes)
    finally:
        listener.close()


def told(
    listener: Attention, operators: int, notes: Sequence[str], around: Mapping[str, Any], result: Any
) -> Trace:
    """What a listener that was closed has heard, as records. `around`: device and dtype; `notes`: what was changed."""
    calls: list[Call] = []
    measurements: list[Measurement] = []
    for index, seen in enumerate(listener.calls):
        facts = seen.facts
        call = Call(index=index, layer=facts["module"] or f"call {index}", **facts)
        calls.append(call)
        measurements += _measurements(call, seen)
    return Trace(
        tuple(calls),
        tuple(measurements),
        listener.left_out,
        dict(listener.linear),
        operators,
        tuple(notes),
        around,
        result,
        {index: seen.drawn for index, seen in enumerate(listener.calls) if seen.drawn},
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """One forward pass without gradients, whose random numbers are given back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def surroundings(model: Any, args: Sequence[Any]) -> dict[str, str]:
    """Device and dtype of the parameters, or of the first argument where there are none."""
    tensors = model.parameters() if isinstance(model, nn.Module) else ()
    first = next((t for t in (*tensors, *args) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        return {}
    return {"device": str(first.device), "dtype": str(first.dtype).removeprefix("torch.")}


# --- what is changed while it runs --------------------------------------------------------------------


@contextmanager
def watched(model: Any, tape: Tape, listener: Listener) -> Iterator[list[str]]:
    """Module paths, no opaque fast path, no compiled code: for the length of one run."""
    notes: list[str] = []
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(_module_paths(model, tape, listener))
            if any(isinstance(module, _WITH_FAST_PATH) for module in model.modules()):
                notes.append("the fused fast path of nn.MultiheadAttention was off while tracing")
        fast = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if _is_compiled(model):
            notes.append("compiled code ran uncompiled while tracing")
        # Also without a compiled module: flex_attention compiles itself, which no dispatch mode survives.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not all(map(_is_ignored, _OUR_DOING)):
            stack.enter_context(warnings.catch_warnings())
            for message in _OUR_DOING:
                warnings.filterwarnings("ignore", message=message)
        yield notes


def _is_ignored(message: str) -> bool:
    """Whether a watch over a training has set this filter: a new one would show the script's warnings once more."""
    return any(
        action == "ignore" and getattr(pattern, "pattern", None) == message
        for action, pattern, *_ in warnings.filters
    )


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """Buffers (running statistics, counters, caches) are put back as they were."""
    if not isinstance(model, nn.Module):
        yield
        return
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.device.type != "meta"
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                if not _same_bits(buffer, value):
                    buffer.copy_(value)
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return (
        first.shape == second.shape
        and bool(torch.equal(first.nan_to_num(), second.nan_to_num()))
        and bool(torch.equal(first.isnan(), second.isnan()))
    )


@contextmanager
def _module_paths(model: nn.Module, tape: Tape, listener: Listener) -> Iterator[None]:
    names = {id(module): clean(name) for name, module in model.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        tape.modules.append(names.get(id(module), tape.modules[-1]))
        if isinstance(module, nn.Dropout) and args and isinstance(args[0], Tensor):
            listener.dropout_module(tape.node(args[0]), module.p)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        tape.modules.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(model: Any) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in modules
    )


# --- numbers as records -------------------------------------------------------------------------------


def _measurements(call: Call, seen: Seen) -> Iterator[Measurement]:
    layer, index = call.layer, call.index

    def row(metric: str, value: Any, head: int | None = None, precision: Any = "exact") -> Measurement:
        return Measurement(metric, layer, value, _UNITS.get(metric, ""), head, index, precision)

    if call.scale is not None:
        yield row("scale", call.scale)
    if call.head_dim:
        yield row("scale_expected", 1 / math.sqrt(call.head_dim))
    yield row("mask_kind", call.mask_kind)
    if call.window is not None:
        yield row("window", call.window)
    if seen.softmax_dtype is not None:
        yield row("softmax_dtype", seen.softmax_dtype)
    if seen.tokens_per_head is not None:
        yield row("tokens_per_head", seen.tokens_per_head)
    if seen.row_sums is not None:
        yield row("row_sum_min", seen.row_sums[0])
        yield row("row_sum_max", seen.row_sums[1])
    if seen.numbers is None:
        return
    per_head = dict(seen.numbers.per_head)
    if call.normaliser not in _SUMS_TO_ONE:
        for metric in _OF_DISTRIBUTIONS:
            per_head.pop(metric, None)
    if call.normaliser == "other":  # only the probabilities were seen, not the scores
        for metric in _OF_SCORES:
            per_head.pop(metric, None)
    if seen.dots is not None:
        per_head["dot_absmax"] = seen.dots
        if call.stored != "nothing" and seen.dots:
            yield row("stored_absmax", max(seen.dots) * seen.factor_before)
    for metric in _ORDER:
        for head, value in enumerate(per_head.get(metric, ())):
            yield row(metric, value, head, seen.numbers.precision.get(metric, "exact"))
    for dtype, largest in _LARGEST.items():
        for head, value in enumerate(per_head.get("dot_absmax", ())):
            yield row(f"headroom_bits_{dtype}", _bits(largest, value), head)
    if seen.numbers.saturated is not None:
        for head, value in enumerate(seen.numbers.saturated):
            yield row("saturated", value, head)


def _bits(largest: float, value: float | None) -> float | None:
    """log2(largest / value): how often the score may double before it overflows."""
    if value is None or math.isnan(value):
        return None
    if value == 0:
        return math.inf
    return math.log2(largest) - math.log2(value) if math.isfinite(value) else -math.inf


# --- tables -------------------------------------------------------------------------------------------

_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
# What torch says of hooks and of the missing compiler, both of which are the tracing itself.
_OUR_DOING = ("Using `torch.compile", "flex_attention called without torch.compile")
_SUMS_TO_ONE = ("softmax", "softmax by hand", "other")
_LARGEST = {name: torch.finfo(getattr(torch, name)).max for name in ("float16", "bfloat16", "float32")}
_OF_DISTRIBUTIONS = ("entropy", "entropy_min", "entropy_ratio", "entropy_rest")
_OF_SCORES = ("score_max", "score_min", "score_std")
_ORDER = (
    *("entropy", "entropy_min", "entropy_ratio", "entropy_rest", "sink_mass", "sink_key"),
    *("score_max", "score_min", "score_std", "dot_absmax", "reach", "peaky_rows"),
    *("rows", "rows_masked", "rows_padded"),
)
_UNITS = {
    **dict.fromkeys(("entropy", "entropy_min", "entropy_rest"), "nats"),
    **dict.fromkeys((f"headroom_bits_{dtype}" for dtype in _LARGEST), "bits"),
    "reach": "tokens",
    "window": "tokens",
}
