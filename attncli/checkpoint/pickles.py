"""A pickle machine that builds inert records: it imports nothing that the file names and calls nothing.

Why our own: a subclass of `pickle.Unpickler` still walks into `find_class`, `__setstate__` and `dict` with
hostile keys, and its memo allocates what the file asks for. Here every opcode is a few lines over plain
lists. The machine knows no checkpoint: storages come from the caller's `persistent`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from attncli.checkpoint.pickle_opcodes import RARE, too_long
from attncli.checkpoint.pickle_values import (
    Call,
    Global,
    MalformedError,
    NumpyDtype,
    PickledTensor,
    as_key,
    set_numpy_state,
)
from attncli.checkpoint.pickle_vocabulary import CONSTRUCTORS, is_dangerous, is_known
from attncli.errors import CheckpointError
from attncli.records import Anomaly

if TYPE_CHECKING:
    import mmap

# An honest checkpoint of 10,000 parameters with Adam's state takes about 1.5 million opcodes. The limit is
# also what bounds memory: no opcode makes more than some hundred bytes that the file does not hold itself.
MAX_OPCODES = 10_000_000
MAX_PICKLE_BYTES = 256 << 20
MAX_MARKS = 10_000
MAX_COPIED = 2_000_000


@dataclass(frozen=True, slots=True)
class Pickle:
    """What one pickle holds. `globals`: every name it wanted imported that is not in the known vocabulary,
    with how often; `end`: the position after its STOP."""

    value: Any
    globals: Mapping[str, int]
    end: int


def read_pickle(
    data: bytes | mmap.mmap,
    *,
    subject: str,
    start: int = 0,
    persistent: Callable[[Any], Any] | None = None,
) -> Pickle:
    """The pickle that begins at `data[start]`, all protocols, as plain data and inert records.

    `persistent` turns a persistent id into a record; it may raise `MalformedError`. Errors: `CheckpointError`
    where the stream is damaged, cut short, or beyond the limits above.
    """
    return Machine(data, subject, start, persistent).run()


def global_anomalies(
    counts: Mapping[str, int], file: str, allowed: tuple[str, ...] = ()
) -> tuple[Anomaly, ...]:
    """One "pickle-global" anomaly per name, but for names that start with one of `allowed`."""
    return tuple(
        Anomaly(
            "pickle-global",
            name,
            {"file": file, "count": count, "dangerous": name != _PLAIN_GETATTR and is_dangerous(name)},
        )
        for name, count in counts.items()
        if not name.startswith(allowed or ("\0",))
    )


class Machine:
    def __init__(
        self, data: bytes | mmap.mmap, subject: str, start: int, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.data = data
        self.subject = subject
        self.pos = start
        self.limit = min(len(data), start + MAX_PICKLE_BYTES)
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, int] = {}
        self.interned: dict[tuple[str, str], Global] = {}
        self.copied = 0

    def run(self) -> Pickle:
        try:
            value = self._interpret()
        except MalformedError as error:
            self.fail(str(error))
        except (IndexError, struct.error) as error:
            if isinstance(error, IndexError) and self.pos < self.limit:
                self._fail(f"the pickle is damaged: an opcode near byte {self.pos} has no operands.", error)
            if self.limit < len(self.data):
                self._fail(f"the pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB.", error)
            self._fail("the pickle is cut short: it ends before its STOP.", error)
        except KeyError as error:
            self._fail(f"the pickle is damaged: it recalls memo {error}, which was never stored.", error)
        except (UnicodeError, ValueError) as error:
            self._fail(f"the pickle is damaged: an opcode near byte {self.pos} holds no valid text.", error)
        if _INDIRECT in self.globals and _PLAIN_GETATTR in self.globals:
            self.globals["builtins.getattr"] = self.globals.pop(_PLAIN_GETATTR)
        return Pickle(value, self.globals, self.pos)

    def fail(self, problem: str) -> NoReturn:
        self._fail(problem, None)

    def _fail(self, problem: str, cause: Exception | None) -> NoReturn:
        raise CheckpointError(
            self.subject, problem, "Copy or download the file again; if that changes nothing, save it again."
        ) from cause

    def _interpret(self) -> Any:  # noqa: RET503 (fail never returns)
        # The loop is one chain, most frequent opcodes first, over local names: 5,000 tensors are some
        # 130,000 opcodes. Rare ones go through a table and see the same state as attributes.
        data, pos, limit = self.data, self.pos, self.limit
        stack, marks, memo = self.stack, self.marks, self.memo
        unpack_i, unpack_u = struct.Struct("<i").unpack_from, struct.Struct("<I").unpack_from
        rare = RARE
        try:
            for _ in range(MAX_OPCODES):
                op = data[pos]
                pos += 1
                if op == 0x71:  # BINPUT
                    memo[data[pos]] = stack[-1]
                    pos += 1
                elif op == 0x72:  # LONG_BINPUT
                    memo[unpack_u(data, pos)[0]] = stack[-1]
                    pos += 4
                elif op == 0x94:  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                elif op == 0x68:  # BINGET
                    stack.append(memo[data[pos]])
                    pos += 1
                elif op == 0x6A:  # LONG_BINGET
                    stack.append(memo[unpack_u(data, pos)[0]])
                    pos += 4
                elif op == 0x4B:  # BININT1
                    stack.append(data[pos])
                    pos += 1
                elif op == 0x4D:  # BININT2
                    stack.append(data[pos] | data[pos + 1] << 8)
                    pos += 2
                elif op == 0x4A:  # BININT
                    stack.append(unpack_i(data, pos)[0])
                    pos += 4
                elif op == 0x28:  # MARK
                    if len(marks) >= MAX_MARKS:
                        self.pos = pos
                        self.fail(f"the pickle nests deeper than {MAX_MARKS} levels.")
                    marks.append(stack)
                    stack = []
                elif op == 0x74:  # TUPLE
                    items = stack
                    stack = marks.pop()
                    stack.append(tuple(items))
                elif op == 0x58 or op == 0x8C:  # BINUNICODE, SHORT_BINUNICODE
                    if op == 0x58:
                        size = unpack_u(data, pos)[0]
                        pos += 4
                    else:
                        size = data[pos]
                        pos += 1
                    if pos + size > limit:
                        self.pos = pos
                        self.fail(too_long(size, limit - pos))
                    stack.append(str(data[pos : pos + size], "utf-8", "surrogatepass"))
                    pos += size
                elif op == 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                elif op == 0x86:  # TUPLE2
                    stack[-2:] = [(stack[-2], stack[-1])]
                elif op == 0x87:  # TUPLE3
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                elif op == 0x29:  # EMPTY_TUPLE
                    stack.append(())
                elif op == 0x89:  # NEWFALSE
                    stack.append(False)
                elif op == 0x88:  # NEWTRUE
                    stack.append(True)
                elif op == 0x4E:  # NONE
                    stack.append(None)
                elif op == 0x7D:  # EMPTY_DICT
                    stack.append({})
                elif op == 0x52 or op == 0x81:  # REDUCE, NEWOBJ
                    self.pos = pos
                    args = stack.pop()
                    stack[-1] = self.call(stack[-1], args)
                elif op == 0x75:  # SETITEMS
                    items = stack
                    stack = marks.pop()
                    self.pos = pos
                    self.set_items(stack[-1], items)
                elif op == 0x51:  # BINPERSID
                    self.pos = pos
                    stack[-1] = self.storage(stack[-1])
                elif op == 0x2E:  # STOP
                    self.pos = pos
                    return stack.pop()
                else:
                    handler = rare.get(op)
                    self.pos = pos
                    if handler is None:
                        self.fail(f"the pickle is damaged: byte {op:#04x} at {pos - 1} is no opcode.")
                    self.stack = stack
                    handler(self)
                    pos, stack = self.pos, self.stack
                if pos > limit:
                    raise IndexError
        finally:
            self.pos = max(pos, self.pos)
        self.fail(f"the pickle takes more than {MAX_OPCODES} steps, which no checkpoint needs.")

    # --- what the opcodes do ---

    def call(self, func: Any, args: Any, kwargs: Any = None) -> Any:
        if type(args) is not tuple:
            self.fail("the pickle is damaged: a call has arguments that are no tuple.")
        if type(func) is Global:
            path = func.path
            constructor = CONSTRUCTORS.get(path)
            if constructor is not None:
                made = constructor(args, self.spend)
                if made is not NotImplemented:
                    return made
            elif path == "builtins.getattr":
                return self._attribute(func, args)
            elif path == "copyreg._reconstructor" and len(args) == 3:
                return Call(args[0], (), None, None)
        return Call(func, args, kwargs)

    def _attribute(self, func: Global, args: tuple[Any, ...]) -> Any:
        """Enums are pickled by some Pythons as getattr(Class, "NAME"): that is a name, not an action."""
        if len(args) == 2 and type(args[0]) is Global and isinstance(args[1], str) and len(args[1]) < 256:
            found = self.find(args[0].module, f"{args[0].name}.{args[1]}")
            if not is_dangerous(found.path):
                count = self.globals.pop("builtins.getattr", 0)
                self.globals[_PLAIN_GETATTR] = self.globals.get(_PLAIN_GETATTR, 0) + count
                return found
        count = self.globals.pop(_PLAIN_GETATTR, 1)
        self.globals["builtins.getattr"] = max(count, self.globals.get("builtins.getattr", 0))
        return Call(func, args)

    def find(self, module: str, name: str) -> Global:
        known = self.interned.get((module, name))
        if known is None:
            # Shared, so that a name used a million times costs one record; bounded by the bytes it takes.
            known = self.interned[module, name] = Global(*_canonical(module, name))
        path = known.path
        if not is_known(path):
            self.globals[path] = self.globals.get(path, 0) + 1
        return known

    def storage(self, pid: Any) -> Any:
        if self.persistent is None:
            self.fail("the pickle refers to objects outside itself, which this kind of file never does.")
        return self.persistent(pid)

    def set_items(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            self.fail("the pickle is damaged: a key has no value.")
        if type(target) is not dict:
            if type(target) is not Call:
                self.fail("the pickle is damaged: it sets keys on something that is no dict.")
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        for i in range(0, len(items), 2):
            key = items[i]
            target[key if type(key) is str else as_key(key)] = items[i + 1]

    def extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is Call:
            if target.items is None:
                target.items = []
            target = target.items
        if type(target) is not list:
            self.fail("the pickle is damaged: it appends to something that is no list.")
        target.extend(items)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is Call:
            target.state = state
        elif type(target) is PickledTensor and target.layout == "numpy":
            set_numpy_state(target, state)
        elif type(target) is NumpyDtype and isinstance(state, tuple) and len(state) > 1:
            target.byteorder = ">" if state[1] == ">" else "<"

    def spend(self, copied: int) -> None:
        """Count elements that a constructor copies: a file could ask for the same copy a million times."""
        self.copied += copied
        if self.copied > MAX_COPIED:
            self.fail(f"the pickle copies more than {MAX_COPIED} elements, which no checkpoint needs.")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def take(self, width: int) -> bytes:
        """The next bytes: a little-endian length of `width` bytes, then that many."""
        head = self.data[self.pos : self.pos + width]
        if len(head) < width:
            self.pos = self.limit
            raise IndexError
        size = int.from_bytes(head, "little")
        self.pos += width
        return self.raw(size)

    def raw(self, size: int) -> bytes:
        if self.pos + size > self.limit:
            self.fail(too_long(size, self.limit - self.pos))
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.pos, self.limit)
        if end < 0:
            self.pos = self.limit
            raise IndexError
        line = self.data[self.pos : end]
        self.pos = end + 1
        return line


def _canonical(module: str, name: str) -> tuple[str, str]:
    """Module and name as today's Python and numpy spell them."""
    if module == "__builtin__":
        return "builtins", _PYTHON_2_NAMES.get(name, name)
    if module.startswith("numpy._core"):
        return f"numpy.core{module[11:]}", name
    return ("copyreg" if module == "copy_reg" else module), name


# What a getattr that only names an enum member is filed under: reported, but not as dangerous.
_PLAIN_GETATTR = "builtins.getattr (of a class)"
# What could call a getattr that the machine did not see called.
_INDIRECT = "functools.partial"

_PYTHON_2_NAMES = {"long": "int", "unicode": "str", "xrange": "range", "unichr": "chr"}
