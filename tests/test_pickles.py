"""The pickle machine: same data as Python's own, inert records for everything else, and no way to hang it."""

import argparse
import collections
import contextlib
import enum
import os
import pathlib
import pickle
import struct
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncli.checkpoint.pickle_values import Call, Global, OpaqueKey, PickledTensor
from attncli.checkpoint.pickles import MAX_MARKS, Pickle, global_anomalies, read_pickle
from attncli.errors import CheckpointError


def read(data: bytes) -> Pickle:
    return read_pickle(data, subject="x.pt")


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(data)
    assert caught.value.subject == "x.pt"
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    return caught.value.problem


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
KEYS = st.text(max_size=10) | st.integers(-1000, 1000) | st.none() | st.booleans()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=5)
    ),
    max_leaves=20,
)


class Settings:
    def __init__(self) -> None:
        self.width = 3


class Attributes(dict):
    """A dict subclass with items and a state, as trainers define them."""


class Colour(enum.Enum):
    RED = 1


@settings(max_examples=150, deadline=None)
@given(TREES, st.integers(0, 5))
def test_plain_data_reads_as_python_itself_reads_it(tree, protocol):
    data = pickle.dumps(tree, protocol=protocol)
    if protocol > 2 or b"_codecs" not in data:  # older protocols spell bytes as a call that is not made here
        assert read(data).value == pickle.loads(data)


def test_the_end_is_the_position_after_stop():
    first, second = pickle.dumps([1, 2]), pickle.dumps("next")
    both = read_pickle(first + second + b"tail", subject="x")
    assert both.end == len(first)
    assert read_pickle(first + second + b"tail", subject="x", start=both.end).value == "next"


@pytest.mark.parametrize("protocol", range(6))
def test_known_containers_become_plain_ones(protocol):
    source = {
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(int, b=2),
        "set": {3},
        "frozen": frozenset([4]),
        "deque": collections.deque([5], maxlen=9),
        "counter": collections.Counter("aa"),
        "path": pathlib.PurePosixPath("a/b"),
    }
    result = read(pickle.dumps(source, protocol=protocol))
    assert result.value == {
        "ordered": {"a": 1},
        "default": {"b": 2},
        "set": [3],
        "frozen": [4],
        "deque": [5],
        "counter": {"a": 2},
        "path": "a/b",
    }
    assert result.globals == {}


@pytest.mark.parametrize("protocol", range(6))
def test_objects_become_inert_calls_with_their_state(protocol):
    result = read(
        pickle.dumps([Settings(), argparse.Namespace(heads=4), types.SimpleNamespace(a=1)], protocol=protocol)
    )
    mine, namespace, simple = result.value
    assert isinstance(mine, Call)
    assert mine.path.endswith("Settings")
    assert mine.state == {"width": 3}
    assert namespace.state == {"heads": 4}
    assert simple.state == {"a": 1}
    assert [name.rpartition(".")[2] for name in result.globals] == ["Settings"]


def test_a_dict_subclass_keeps_items_and_state_apart():
    source = Attributes(lr=0.1)
    source.note = "x"
    (call,) = read(pickle.dumps([source])).value
    assert call.pairs == {"lr": 0.1}
    assert call.state == {"note": "x"}


def test_numpy_scalars_are_numbers_and_arrays_are_headers():
    source = {
        "f": np.float64(0.25),
        "i": np.int32(-7),
        "b": np.bool_(True),
        "a": np.zeros((2, 3), np.float32),
        "t": np.asfortranarray(np.zeros((2, 3), np.int16)),
    }
    for protocol in range(2, 6):
        result = read(pickle.dumps(source, protocol=protocol))
        assert (result.value["f"], result.value["i"], result.value["b"]) == (0.25, -7, True)
        array, turned = result.value["a"], result.value["t"]
        assert isinstance(array, PickledTensor)
        assert (array.shape, array.dtype, array.strides) == ((2, 3), "float32", None)
        assert (turned.shape, turned.dtype, turned.strides) == ((2, 3), "int16", (1, 2))
        assert result.globals == {}


class _Evil:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_of_os_system_is_recorded_and_never_made(tmp_path, protocol):
    trace = tmp_path / "ran"
    data = pickle.dumps({"w": _Evil(os.system, f"touch {trace}"), "v": _Evil(eval, "1")}, protocol=protocol)
    result = read(data)
    assert not trace.exists()
    assert isinstance(result.value["w"], Call)
    found = {a.subject: a for a in global_anomalies(result.globals, "x.pt")}
    system = found[f"{os.system.__module__}.system"]
    assert system.kind == "pickle-global"
    assert system.evidence == {"file": "x.pt", "count": 1, "dangerous": True}
    assert found["builtins.eval"].evidence["dangerous"] is True
    pickle.loads(pickle.dumps(_Evil(os.system, f"touch {trace}")))
    assert trace.exists(), "the same pickle does run in Python's own machine"


def test_a_class_of_the_user_is_reported_but_not_dangerous():
    (anomaly,) = global_anomalies(read(pickle.dumps(Settings())).globals, "x.pt")
    assert anomaly.evidence["dangerous"] is False


@pytest.mark.parametrize(
    ("name", "dangerous"),
    [
        ("os system", True),
        ("posix system", True),
        ("subprocess Popen", True),
        ("builtins getattr", True),
        ("__builtin__ eval", True),
        ("torch load", True),
        ("torch.hub load", True),
        ("operator attrgetter", True),
        ("mymodel __class__.__base__", True),
        ("osmosis system", False),
        ("mymodel Config", False),
        ("__main__ Config", False),
    ],
)
def test_danger_is_told_by_module_and_name(name, dangerous):
    data = b"c" + name.replace(" ", "\n").encode() + b"\n."
    (anomaly,) = global_anomalies(read(data).globals, "x.pt")
    assert anomaly.evidence["dangerous"] is dangerous


def test_getattr_of_an_enum_is_a_name_and_getattr_of_anything_else_is_dangerous():
    enum_member = b"cbuiltins\ngetattr\n(cmymodel\nColour\nVRED\ntR."
    result = read(enum_member)
    assert isinstance(result.value, Global)
    assert result.value.path == "mymodel.Colour.RED"
    assert not any(a.evidence["dangerous"] for a in global_anomalies(result.globals, "x"))
    for chain in (
        b"cbuiltins\ngetattr\n(cmymodel\nColour\nV__globals__\ntR.",
        b"cbuiltins\ngetattr\n(}Vget\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"cbuiltins\ngetattr\nq\x00(cmymodel\nColour\nVRED\ntRcfunctools\npartial\n(h\x00tR.",
        b"(" + enum_member[:-1] + b"cbuiltins\ngetattr\n(}Vget\ntRt.",
    ):
        anomalies = global_anomalies(read(chain).globals, "x")
        assert any(a.evidence["dangerous"] for a in anomalies if a.subject == "builtins.getattr"), chain


def test_an_enum_as_this_python_writes_it_is_harmless():
    for protocol in range(6):
        anomalies = global_anomalies(read(pickle.dumps(Colour.RED, protocol=protocol)).globals, "x")
        assert not any(a.evidence["dangerous"] for a in anomalies)


def test_a_memo_index_of_two_to_the_31_allocates_nothing():
    assert read(b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7f.").value == []


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "cut short"),
        (b"\x80\x02", "cut short"),
        (b"\x80\x02]q", "cut short"),
        (b"\x80\x02X\x05\x00\x00\x00abc.", "announces a value of 5 bytes where 4 are left"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "where 1 are left"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "where 1 are left"),
        (b"\x80\x02\x8b\x00\x10\x00\x00" + bytes(4096) + b".", "an integer of 4096 bytes"),
        (b"I" + b"9" * 5000 + b"\n.", "an integer of 5000 digits"),
        (b"\x80\x09.", "protocol 9"),
        (b"\x80\x02\xff.", "byte 0xff at 2 is no opcode"),
        (b"\x80\x02h\x07.", "recalls memo 7"),
        (b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00.", "announces a value of 255 bytes"),
        (b"\x80\x02K\x01K\x02s.", "damaged"),
        (b"\x80\x02K\x01}s.", "damaged"),
        (b"\x80\x02}K\x01a.", "appends to something that is no list"),
        (b"\x80\x02]K\x01K\x02s.", "sets keys on something that is no dict"),
        (b"\x80\x02}(K\x01u.", "a key has no value"),
        (b"\x80\x02cos\nsystem\nK\x01R.", "arguments that are no tuple"),
        (b"\x80\x04K\x01K\x02\x93.", "a name that is no text"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xff.", "no valid text"),
        (b"Fabc\n.", "no valid text"),
        (b"Sabc\n.", "no quotes"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "refers to objects outside itself"),
        (b"\x80\x05\x97.", "separate buffers"),
        (b"\x80\x02" + b"(" * (MAX_MARKS + 1) + b".", f"deeper than {MAX_MARKS} levels"),
    ],
)
def test_damaged_streams_are_refused_with_their_reason(data, problem):
    assert problem in refused(data)


def test_every_cut_of_a_stream_is_refused():
    data = pickle.dumps({"a": [1, 2.5, "text", (None, True)], "b": Settings()}, protocol=4)
    for end in range(len(data)):
        refused(data[:end])


def _quickly(data: bytes, seconds: float = 3.0) -> Pickle:
    begin = time.perf_counter()
    result = read(data)
    assert time.perf_counter() - begin < seconds
    return result


def test_keys_of_nested_tuples_are_not_hashed():
    # t = ((t, t), (t, t)) …: hashing takes 2^depth steps, and comparing as many.
    bomb = b"\x80\x02}" + b")" + b"2\x86" * 60 + b"K\x01s."
    (key,) = _quickly(bomb).value
    assert isinstance(key, OpaqueKey)


def test_integer_keys_cannot_be_chosen_to_collide():
    # CPython hashes integers modulo 2^61 - 1: all of these have the same hash.
    prime = (1 << 61) - 1
    keys = b"".join(b"\x8a\x0a" + (i * prime).to_bytes(10, "little") + b"N" for i in range(1, 60_000))
    assert len(_quickly(b"\x80\x02}(" + keys + b"u.").value) == 59_999


def test_repeated_copies_of_a_long_list_are_refused(monkeypatch):
    monkeypatch.setattr("attncli.checkpoint.pickles.MAX_COPIED", 200_000)
    pairs = b"((K\x01K\x02t" + b"2" * 50_000 + b"lq\x00"
    copies = b"0(h\x00tq\x01" + b"ccollections\nOrderedDict\nh\x01R0" * 1000
    assert "copies more than" in refused(b"\x80\x02" + pairs + copies + b"N.")


def test_cycles_and_shared_structures_are_kept_as_they_are():
    cycle: list = []
    cycle.append(cycle)
    value = read(pickle.dumps(cycle)).value
    assert value[0] is value
    laughs = _quickly(b"\x80\x02]" + b"(2222222222l" * 0 + b"2\x86" * 100_000 + b".").value
    assert isinstance(laughs, tuple)
    assert laughs[0] is laughs[1]


def test_deep_nesting_without_marks_does_not_exhaust_the_stack():
    value = read(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".").value
    depth = 0
    while value:
        (value,) = value
        depth += 1
    assert depth == 199_999


def test_too_many_steps_are_refused(monkeypatch):
    monkeypatch.setattr("attncli.checkpoint.pickles.MAX_OPCODES", 1000)
    assert "more than 1000 steps" in refused(b"\x80\x02]" + b"K\x010" * 1000 + b".")


def test_tensor_arguments_that_torch_never_writes_are_refused():
    name = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    for args, problem in (
        (b"(NK\x00(J\xff\xff\xff\xfft(K\x01ttR.", "no integer from 0"),
        (b"(NK\x00K\x03(K\x01ttR.", "no short tuple"),
        (b"(NK\x00(K\x03t(K\x01K\x01ttR.", "do not fit its shape"),
        (b"(NX\x01\x00\x00\x00a(K\x03t(K\x01ttR.", "do not fit its shape"),
        (b"(NtR.", "fewer than four"),
    ):
        assert problem in refused(name + args)


SEEDS = [
    pickle.dumps({"a": [1, 2.5, "t" * 300, (None, True)], "b": Settings(), 3: {4: b"x"}}, protocol=p)
    for p in range(6)
] + [pickle.dumps({"f": np.float64(0.25), "a": np.zeros((2, 3)), "n": argparse.Namespace(a=1)}, protocol=4)]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_changed_bytes_read_or_are_refused_and_nothing_else(seed, changes):
    data = bytearray(seed)
    for at, byte in changes:
        data[at % len(data)] = byte
    with contextlib.suppress(CheckpointError):
        assert 0 < read(bytes(data)).end <= len(data)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([bytes([i]) for i in range(256)] + [struct.pack("<I", 3), b"os\nsystem\n"]),
        max_size=60,
    )
)
def test_random_opcodes_read_or_are_refused_and_nothing_else(parts):
    with contextlib.suppress(CheckpointError):
        read(b"\x80\x04" + b"".join(parts) + b".")
