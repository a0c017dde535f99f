"""The opcodes of a pickle that are too rare for the machine's inner loop: each a function on the machine."""

from __future__ import annotations

import struct
import warnings
from codecs import escape_decode
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attncli.checkpoint.pickle_values import Global
    from attncli.checkpoint.pickles import Machine

# A torch seed needs 8; hashing or printing a longer one takes time that grows with its square.
MAX_LONG_BYTES = 1024


def too_long(size: int, left: int) -> str:
    return f"the pickle is cut short: it announces a value of {size} bytes where {left} are left."


def _push_with(read: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    def push(m: Machine) -> None:
        value = read(m)  # first: it may swap the stack
        m.stack.append(value)

    return push


def _proto(m: Machine) -> None:
    version = m.raw(1)[0]
    if version > 5:
        m.fail(f"the pickle says it has protocol {version}, and 5 is the newest.")


def _frame(m: Machine) -> None:
    size = int.from_bytes(m.raw(8), "little")
    if m.pos + size > m.limit:
        m.fail(too_long(size, m.limit - m.pos))


def _long(m: Machine, width: int) -> int:
    data = m.take(width)
    if len(data) > MAX_LONG_BYTES:
        m.fail(f"the pickle holds an integer of {len(data)} bytes, which no checkpoint needs.")
    return int.from_bytes(data, "little", signed=True)


def _decimal(m: Machine) -> int | bool:
    text = m.line()
    if text in (b"00", b"01"):  # protocol 0 writes booleans so
        return text == b"01"
    if len(text) > MAX_LONG_BYTES:
        m.fail(f"the pickle holds an integer of {len(text)} digits, which no checkpoint needs.")
    return int(text.rstrip(b"L"))


def _text(data: bytes) -> str | bytes:
    """Python 2's byte strings: text where they are UTF-8, otherwise the bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data


def _quoted(m: Machine) -> str | bytes:
    text = m.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        m.fail("the pickle is damaged: a string of protocol 0 has no quotes.")
    body = text[1:-1]
    if b"\\" in body:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an unknown escape is kept as it stands
            body = escape_decode(body)[0]
    return _text(body)


def _global(m: Machine) -> Global:
    module, name = m.line().decode(), m.line().decode()
    return m.find(module, name)


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        m.fail("the pickle is damaged: a global has a name that is no text.")
    m.stack.append(m.find(module, name))


def _new_object(m: Machine) -> None:
    kwargs, args = m.stack.pop(), m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, kwargs)


def _instance(m: Machine) -> None:
    func = _global(m)
    args = m.pop_mark()
    m.stack.append(m.call(func, tuple(args)))


def _object(m: Machine) -> None:
    items = m.pop_mark()
    func = items[0]
    m.stack.append(m.call(func, tuple(items[1:])))


def _build(m: Machine) -> None:
    state = m.stack.pop()
    m.build(m.stack[-1], state)


def _append(m: Machine) -> None:
    item = m.stack.pop()
    m.extend(m.stack[-1], [item])


def _appends(m: Machine) -> None:
    items = m.pop_mark()
    m.extend(m.stack[-1], items)


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _dict_from_mark(m: Machine) -> None:
    items = m.pop_mark()
    made: dict[Any, Any] = {}
    m.set_items(made, items)
    m.stack.append(made)


def _pop(m: Machine) -> None:
    # POP on an empty stack drops the mark, as C's unpickler does.
    if m.stack:
        m.stack.pop()
    else:
        m.stack = m.marks.pop()


def _dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])


def _put(m: Machine) -> None:
    m.memo[int(m.line())] = m.stack[-1]


def _persistent(m: Machine) -> None:
    m.stack.append(m.storage(m.line().decode()))


def _discard_mark(m: Machine) -> None:
    m.pop_mark()


def _out_of_band(m: Machine) -> None:
    m.fail("the pickle keeps its data in separate buffers, and they are not in the file.")


def _keep(m: Machine) -> None:
    """READONLY_BUFFER: nothing to do for inert data."""


RARE: dict[int, Callable[[Machine], None]] = {
    0x80: _proto,
    0x95: _frame,
    0x63: _push_with(_global),
    0x93: _stack_global,
    0x62: _build,
    0x61: _append,
    0x65: _appends,
    0x90: _appends,  # ADDITEMS: sets are lists here, so that nothing is hashed
    0x73: _set_item,
    0x64: _dict_from_mark,
    0x5D: _push_with(lambda m: []),
    0x8F: _push_with(lambda m: []),
    0x6C: _push_with(lambda m: m.pop_mark()),
    0x91: _push_with(lambda m: m.pop_mark()),  # FROZENSET
    0x69: _instance,
    0x6F: _object,
    0x92: _new_object,
    0x47: _push_with(lambda m: struct.unpack(">d", m.raw(8))[0]),
    0x46: _push_with(lambda m: float(m.line())),
    0x49: _push_with(_decimal),
    0x4C: _push_with(_decimal),
    0x8A: _push_with(lambda m: _long(m, 1)),
    0x8B: _push_with(lambda m: _long(m, 4)),
    0x53: _push_with(_quoted),
    0x54: _push_with(lambda m: _text(m.take(4))),
    0x55: _push_with(lambda m: _text(m.take(1))),
    0x56: _push_with(lambda m: str(m.line(), "raw-unicode-escape")),
    0x8D: _push_with(lambda m: str(m.take(8), "utf-8", "surrogatepass")),
    0x42: _push_with(lambda m: m.take(4)),
    0x43: _push_with(lambda m: m.take(1)),
    0x8E: _push_with(lambda m: m.take(8)),
    0x96: _push_with(lambda m: m.take(8)),
    0x67: _push_with(lambda m: m.memo[int(m.line())]),
    0x70: _put,
    0x30: _pop,
    0x31: _discard_mark,
    0x32: _dup,
    0x50: _persistent,
    0x82: _push_with(lambda m: m.find("copyreg", f"extension {m.raw(1)[0]}")),
    0x83: _push_with(lambda m: m.find("copyreg", f"extension {int.from_bytes(m.raw(2), 'little')}")),
    0x84: _push_with(lambda m: m.find("copyreg", f"extension {int.from_bytes(m.raw(4), 'little')}")),
    0x97: _out_of_band,
    0x98: _keep,
}
