"""From the tree that was saved to the model's weights, and from wrapped names to the model's own.

People save a state dict alone, beside an optimizer, twice (with its moving average), nested by module, or
inside some trainer's dict. The tables at the foot say which keys mean what. Nothing is dropped without being
counted in `excluded`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attncli.checkpoint.pickle_values import Call, OpaqueKey, PickledTensor
from attncli.checkpoint.wrappers import strip_wrappers
from attncli.errors import CheckpointError
from attncli.records import Config

MAX_NODES = 500_000
MAX_DEPTH = 100
MAX_WRAPPERS = 8
MAX_SETTINGS = 10_000


@dataclass(frozen=True, slots=True)
class Selection:
    """The tensors that are the model, by name; settings found beside them; what was left out, by kind.

    `doubled`: names that occur twice, of which the first is kept.
    """

    tensors: dict[str, PickledTensor]
    configs: tuple[Config, ...] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)
    doubled: tuple[str, ...] = ()


def select(root: Any, subject: str) -> Selection:
    """The model's weights in whatever was saved, under dotted names.

    Errors: `CheckpointError` where it is nested without end.
    """
    picker = _Picker(subject)
    picker.level(root, "")
    tensors = picker.tensors or picker.averaged
    if picker.tensors and picker.averaged:
        if _same_names(picker.averaged, picker.tensors):
            picker.excluded["ema copy"] += len(picker.averaged)
        else:
            for name, tensor in picker.averaged.items():
                picker.add(name, tensor)
    return Selection(
        _drop_inner_copies(tensors, picker.excluded),
        tuple(picker.configs),
        dict(picker.excluded),
        tuple(picker.doubled),
    )


def module_tensors(root: Any, subject: str) -> dict[str, PickledTensor]:
    """The tensors in the state of a TorchScript module and the modules below it, by attribute path."""
    found: dict[str, PickledTensor] = {}
    for name, tensor in _walk(root, "", subject, modules_only=True):
        found.setdefault(name, tensor)
    return found


def is_optimizer_name(name: str) -> bool:
    """Whether a flat name is an optimizer's: one of its first two segments or its last says so."""
    segments = name.split(".")
    return segments[-1] in _OPTIMIZER_LEAVES or any(
        map(_OPTIMIZER.search, segments[: min(2, len(segments) - 1)])
    )


def is_training_state_name(name: str) -> bool:
    """Whether a flat name is of a random generator, scheduler or loss scaler."""
    return bool(_TRAINING_STATE.search(name.partition(".")[0]))


# --- choosing -------------------------------------------------------------------------------------------


class _Picker:
    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.tensors: dict[str, PickledTensor] = {}
        self.averaged: dict[str, PickledTensor] = {}
        self.configs: list[Config] = []
        self.excluded: Counter[str] = Counter()
        self.doubled: list[str] = []

    def level(self, value: Any, prefix: str) -> None:
        """Sort what lies at one level of a saved dict, and go on in the one child that wraps the weights."""
        for wrapper in range(MAX_WRAPPERS + 1):
            if isinstance(value, PickledTensor):
                self.add(prefix + "tensor", value)
                return
            weights: list[tuple[str, Any]] = []
            averaged: list[tuple[str, Any]] = []
            own: list[tuple[str, PickledTensor]] = []
            for key, child in _children(value):
                if isinstance(child, PickledTensor):
                    if _TRAINING_STATE.search(key):
                        self.excluded["training state"] += 1
                    else:
                        own.append((key, child))
                elif _SETTINGS.match(key) and (values := plain_settings(child)):
                    self.configs.append(Config(f"{key} in the checkpoint", values))
                elif count := _count(child):
                    if _is_optimizer(key, child):
                        self.excluded["optimizer"] += count
                    elif _TRAINING_STATE.search(key):
                        self.excluded["training state"] += count
                    elif _AVERAGED.search(key):
                        averaged.append((key, child))
                    else:
                        weights.append((key, child))
            # Lone numbers beside the weights are a loss or a step, unless they are all that there is.
            numbers = all(tensor.shape in ((), (1,)) for _, tensor in own)
            if weights or not numbers:
                self.average(averaged)
            elif averaged:
                self.average(averaged[:1])
                for _, child in averaged[1:]:
                    self.excluded["ema copy"] += _count(child)
            wraps = len(weights) == 1 and numbers and wrapper < MAX_WRAPPERS
            if wraps and (weights[0][0] in _WRAPPER_KEYS or isinstance(value, (list, tuple))):
                if own:
                    self.excluded["training state"] += len(own)
                value = weights[0][1]
                continue
            for key, tensor in own:
                self.add(prefix + key, tensor)
            for key, child in weights:
                for name, tensor in _walk(child, f"{prefix}{key}.", self.subject):
                    self.add(name, tensor)
            return

    def average(self, children: list[tuple[str, Any]]) -> None:
        for _, child in children:
            for name, tensor in _walk(child, "", self.subject):
                self.averaged.setdefault(name, tensor)

    def add(self, name: str, tensor: PickledTensor) -> None:
        if name.rpartition(".")[2] in _OPTIMIZER_LEAVES:
            self.excluded["optimizer"] += 1
        elif tensor.dtype == "object":
            self.excluded["object array"] += 1
        elif name in self.tensors:
            self.doubled.append(name)
        else:
            self.tensors[name] = tensor


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of each thing that a container or an inert object holds."""
    if isinstance(value, dict):
        for i, (key, child) in enumerate(value.items()):
            yield _key_text(key, i), child
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield str(i), child
    elif isinstance(value, Call):
        if value.is_module:
            yield from _module_children(value.state)
            return
        for part in (value.pairs, value.items, value.state if isinstance(value.state, dict) else None):
            if part:
                yield from _children(part)


def _module_children(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a pickled nn.Module would put into its state dict, one level of it."""
    transient = state.get("_non_persistent_buffers_set")
    skipped = {name for name in transient if isinstance(name, str)} if isinstance(transient, list) else set()
    for part in ("_parameters", "_buffers", "_modules"):
        for name, child in _children(state.get(part)):
            if part != "_buffers" or name not in skipped:
                yield name, child


def _key_text(key: Any, index: int) -> str:
    if isinstance(key, OpaqueKey):
        key = key.value
    if isinstance(key, str):
        return key
    if isinstance(key, bytes):
        return key.decode("utf-8", "replace")
    if isinstance(key, (int, float)) and (not isinstance(key, int) or key.bit_length() < 256):
        return str(key)
    return "None" if key is None else f"key {index}"


def _walk(
    root: Any, prefix: str, subject: str, *, modules_only: bool = False
) -> Iterator[tuple[str, PickledTensor]]:
    """Every tensor below `root` with its dotted name, in the order of the file.

    A container that occurs twice is walked twice (shared modules have two names); one that holds itself is
    entered once. Bounded by MAX_NODES and MAX_DEPTH.
    """
    entered = (Call,) if modules_only else (dict, list, tuple, Call)
    nodes = 0
    path: list[tuple[Iterator[tuple[str, Any]], str, int]] = [(_children(root), prefix, id(root))]
    above = {id(root)}
    while path:
        children, name, identity = path[-1]
        step = next(children, None)
        if step is None:
            path.pop()
            above.discard(identity)
            continue
        nodes += 1
        if nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise CheckpointError(
                subject,
                f"its contents are nested without end: more than {MAX_DEPTH} levels or {MAX_NODES} entries.",
                "Save model.state_dict() alone.",
            )
        key, child = step
        if isinstance(child, PickledTensor):
            yield name + key, child
        elif isinstance(child, entered) and id(child) not in above:
            path.append((_children(child), f"{name}{key}.", id(child)))
            above.add(id(child))


def _count(root: Any) -> int:
    """Number of tensors below `root`; what occurs twice counts once."""
    seen: set[int] = set()
    pending = [root]
    count = 0
    while pending:
        value = pending.pop()
        if isinstance(value, PickledTensor):
            count += 1
        elif isinstance(value, (dict, list, tuple, Call)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(child for child in _held(value) if isinstance(child, _HOLDERS))
    return count


def _held(value: Any) -> Iterable[Any]:
    """What `_children` gives, without the cost of its keys."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, Call):
        state = value.state if isinstance(value.state, dict) else {}
        return (*(value.pairs or {}).values(), *(value.items or ()), *state.values())
    return tuple(value)


def _is_optimizer(key: str, value: Any) -> bool:
    if _OPTIMIZER.search(key):
        return True
    return isinstance(value, dict) and "param_groups" in value and "state" in value


def _bare(names: Sequence[str]) -> set[str]:
    # LitEma and its kin drop the dots from the names of the copies.
    return {name.replace(".", "").replace("_", "") for name in strip_wrappers(names)}


def _same_names(copies: Mapping[str, PickledTensor], main: Mapping[str, PickledTensor]) -> bool:
    """Whether the copies are of the main weights: nearly all names agree, or they are only numbered."""
    if all(name.rpartition(".")[2].isdigit() for name in copies):
        return True
    copied = _bare([name for name in copies if copies[name].shape not in ((), (1,))])
    own = _bare(list(main))
    return len(copied - own) <= len(copied) // 10 or any(
        len({f"{wrapper}{name}" for name in copied} - own) <= len(copied) // 10 for wrapper in _WRAPPER_KEYS
    )


def _drop_inner_copies(tensors: dict[str, PickledTensor], excluded: Counter[str]) -> dict[str, PickledTensor]:
    """The tensors without a moving average that lies among them under a prefix (`model_ema.`)."""
    for wrapper in _AVERAGED_PREFIXES:
        copies = {
            name[len(wrapper) :]: tensor for name, tensor in tensors.items() if name.startswith(wrapper)
        }
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(wrapper)}
        if copies and rest and (_same_names(copies, rest) or _same_names(copies, _below_first(rest))):
            excluded["ema copy"] += len(copies)
            tensors = rest
    return tensors


def _below_first(tensors: Mapping[str, PickledTensor]) -> dict[str, PickledTensor]:
    return {name.partition(".")[2] or name: tensor for name, tensor in tensors.items()}


# --- settings -------------------------------------------------------------------------------------------


def plain_settings(value: Any) -> dict[str, Any]:
    """`value` as a plain dict of scalars, text, lists and dicts; empty where it holds no settings.

    Namespaces, dataclasses, omegaconf nodes and Lightning's AttributeDict become dicts; tensors, classes and
    anything else is left out, and so is what lies below 16 levels.
    """
    budget = [MAX_SETTINGS]
    made = _plain(value, budget, 0)
    return made if isinstance(made, dict) else {}


def _plain(value: Any, budget: list[int], depth: int) -> Any:
    """The plain form, or `_plain` itself as the mark for "left out"."""
    budget[0] -= 1
    if budget[0] < 0 or depth > 16:
        return _plain
    if isinstance(value, int) and value.bit_length() > 64:
        return _plain
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Call):
        return _plain_call(value, budget, depth)
    if isinstance(value, dict):
        pairs = (
            (_key_text(key, i), _plain(child, budget, depth + 1))
            for i, (key, child) in enumerate(value.items())
        )
        return {key: child for key, child in pairs if child is not _plain}
    if isinstance(value, (list, tuple)):
        items = [_plain(child, budget, depth + 1) for child in value]
        return [child for child in items if child is not _plain]
    return _plain


def _plain_call(call: Call, budget: list[int], depth: int) -> Any:
    state = call.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0] or state[1], dict):
        state = state[0] or state[1]  # a class with __slots__
    if isinstance(state, dict):
        for inner in ("_content", "_val"):  # omegaconf's containers and leaves
            if inner in state and "_metadata" in state:
                return _plain(state[inner], budget, depth + 1)
        held = {**state, **(call.pairs or {})}
        return _plain(held, budget, depth + 1)
    if call.pairs:
        return _plain(call.pairs, budget, depth + 1)
    if isinstance(call.kwargs, dict) and call.kwargs:
        return _plain(call.kwargs, budget, depth + 1)
    return _plain(call.items, budget, depth + 1) if call.items else _plain


_HOLDERS = (dict, list, tuple, Call, PickledTensor)
# Keys that say nothing but "the weights are in here".
_WRAPPER_KEYS = frozenset({
    "state_dict", "model_state_dict", "model", "module", "model_state", "net", "network", "params", "param",
    "weights", "generator", "model_weights", "net_state_dict", "state", "checkpoint", "app", "ema",
    "model_ema", "ema_state_dict",
})  # fmt: skip
_AVERAGED = re.compile(r"(^|_)(g?ema|averaged|shadow)(_|$)|^shadow_params$|^ema_")
_AVERAGED_PREFIXES = ("model_ema.", "ema_model.", "ema.", "module_ema.")
_OPTIMIZER = re.compile(
    r"^(optim(izers?)?|opt|opt_state)$|optimizer|^optim_|_optim$|^opt_[a-z]$|^fp32_|_fp32_groups|^lr_sched"
)
_OPTIMIZER_LEAVES = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_sq_row", "exp_avg_sq_col",
    "square_avg", "grad_avg", "acc_delta", "prev_grad",
})  # fmt: skip
_TRAINING_STATE = re.compile(
    r"rng|random_state|^(grad_)?scaler|scheduler|^amp$|^callbacks$|^loops$|^(train|data)_?loader|^sampler|^history$"
)
_SETTINGS = re.compile(
    r"^(model_args|model_config|model_cfg|args|cfg|config|conf|hparams|hyper_parameters|hyperparameters|dims|params_config"
    r"|kwargs|model_kwargs|init_args|options|opts?|settings|train_args|arch_args|config_dict|configs)$"
)
