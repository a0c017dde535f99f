"""Which batch of which data loader is in use: its place in the epoch and the items of the data set in it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import dataloader


@dataclass(frozen=True)
class Batch:
    """A batch as a loader gave it. `epoch` and `index` count from 0; `items`: what the sampler asked for, if known."""

    value: Any
    loader: str
    epoch: int
    index: int
    items: tuple[Any, ...] | None

    def facts(self) -> dict[str, Any]:
        items = None if self.items is None else [_item(one) for one in self.items[:_MOST_ITEMS]]
        return {"loader": self.loader, "epoch": self.epoch, "index": self.index, "items": items}


@dataclass
class _Pass:
    """One pass over a loader."""

    loader: str
    epoch: int
    taken: int = 0
    # Of a pass that began before the watch nobody knows what was asked for ahead.
    from_its_start: bool = True
    asked: deque[tuple[Any, ...] | None] = field(default_factory=deque)


class Loaders:
    """The last batches of all loaders, oldest first."""

    def __init__(self) -> None:
        self.recent: deque[Batch] = deque(maxlen=_RECENT)
        self.reading: str | None = None
        self._passes: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()
        self._epochs: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()

    def patches(
        self, guarded: Callable[..., Any], shut: Callable[[], AbstractContextManager[None]]
    ) -> list[tuple[Any, str, Any]]:
        """(class, method, replacement). `guarded(function, *given)` calls a function of ours, whatever it does.

        `shut`: nothing is written down inside.
        """
        base: Any = dataloader._BaseDataLoaderIter
        begin, again, following, asks = base.__init__, base._reset, base.__next__, base._next_index

        def begins(iterator: Any, loader: Any) -> None:
            guarded(self._begins, iterator, loader)
            begin(iterator, loader)

        def begins_again(iterator: Any, loader: Any, first_iter: bool = False) -> None:
            if not first_iter:  # workers that live on begin another pass
                guarded(self._begins, iterator, loader)
            again(iterator, loader, first_iter)

        def taken(iterator: Any) -> Any:
            self.reading = guarded(self._told, iterator)
            with shut():
                value = following(iterator)
            self.reading = None
            guarded(self._taken, iterator, value)
            return value

        def asked(iterator: Any) -> Any:
            items = asks(iterator)
            guarded(self._asked, iterator, items)
            return items

        return [
            (base, "__init__", begins),
            (base, "_reset", begins_again),
            (base, "__next__", taken),
            (base, "_next_index", asked),
        ]

    def of(self, tensors: list[Tensor]) -> Batch | None:
        """The batch that these tensors came from: by their memory, else by their values, else None.

        A loader may be some batches ahead, and a batch may have been moved to a device or cut to windows.
        """
        storages = {storage for tensor in tensors if (storage := _storage(tensor)) is not None}
        for batch in reversed(self.recent):
            if any(_storage(one) in storages for one in _tensors(batch.value)):
                return batch
        for batch in reversed(self.recent):
            if any(_equal(one, tensor) for one in _tensors(batch.value) for tensor in tensors):
                return batch
        return None

    def _begins(self, iterator: Any, loader: Any) -> None:
        epochs = self._epochs.get(loader)
        if epochs is None:
            epochs = self._epochs[loader] = count()
        data = type(getattr(loader, "dataset", None)).__name__
        self._passes[iterator] = _Pass(f"{type(loader).__name__} over {data}", next(epochs))

    def _asked(self, iterator: Any, items: Any) -> None:
        found = self._passes.get(iterator)
        if found is not None:
            # Without a batch sampler it is one item; a data set that is a stream has none.
            streamed = getattr(iterator, "_dataset_kind", 0) != 0
            listed = tuple(items) if isinstance(items, (list, tuple)) else (items,)
            found.asked.append(None if streamed else listed)

    def _taken(self, iterator: Any, value: Any) -> None:
        found = self._passes.get(iterator)
        if found is None:  # it began before the watch
            data = type(getattr(iterator, "_dataset", None)).__name__
            found = self._passes[iterator] = _Pass(
                f"DataLoader over {data}", 0, iterator._num_yielded - 1, False
            )
        items = found.asked.popleft() if found.asked and found.from_its_start else None
        if len(self.recent) >= _HELD:
            old = self.recent[-_HELD]
            self.recent[-_HELD] = replace(old, value=_faded(old.value))
        self.recent.append(Batch(value, found.loader, found.epoch, found.taken, items))
        found.taken += 1

    def _told(self, iterator: Any) -> str | None:
        found = self._passes.get(iterator)
        if found is None:
            return None
        return f"batch {found.taken} of epoch {found.epoch} of {found.loader}"


def named(value: Any, name: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch under their place in it: "batch[1]", "batch['labels']"."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from named(item, f"{name}[{number}]")


def _faded(value: Any) -> Any:
    """A batch that is held no longer: tensors of it that a step still uses can be told."""
    return _Faded(tuple(weakref.ref(tensor) for tensor in _tensors(value)))


class _Faded(NamedTuple):
    tensors: tuple[weakref.ref[Tensor], ...]


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, _Faded):
        yield from (tensor for reference in value.tensors if (tensor := reference()) is not None)
    elif depth < _DEEPEST:
        inside = value.values() if isinstance(value, Mapping) else value
        if isinstance(value, (Mapping, list, tuple)):
            for item in inside:
                yield from _tensors(item, depth + 1)
        elif hasattr(value, "__dict__"):
            for item in list(vars(value).values()):
                yield from _tensors(item, depth + 1)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or not first.numel() or first.numel() > _MOST_COMPARED:
        return False
    with torch.no_grad():
        one, other = first.to("cpu", torch.float64), second.detach().to("cpu", torch.float64)
        return bool(torch.allclose(one, other, rtol=1e-2, atol=0.0, equal_nan=True))


def _item(item: Any) -> Any:
    return item if isinstance(item, (int, str)) else str(item)


# --- settings -----------------------------------------------------------------------------------------

# Loaders that read ahead by themselves are one or two batches ahead of the step; workers do not count here.
_HELD = 3
# Micro-batches whose gradients are accumulated: the step itself holds them.
_RECENT = 64
_MOST_ITEMS = 4096
_MOST_COMPARED = 1 << 24
_DEEPEST = 4
