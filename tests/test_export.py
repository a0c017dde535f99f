"""Headers of torch.export archives agree with the program's state dict, whichever torch wrote them."""

import contextlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attncli.checkpoint.export import read
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Array

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 6)
        self.k_proj = torch.nn.Linear(4, 6, dtype=torch.bfloat16)
        self.k_proj.weight = torch.nn.Parameter(torch.arange(24.0).to(torch.bfloat16).reshape(4, 6).t())
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x.bfloat16()) + self.positions.sum() + self.cache.sum()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    model = Block()
    path = tmp_path_factory.mktemp("export") / "m.pt2"
    torch.export.save(torch.export.export(model, (torch.ones(1, 4),)), path)
    return path, model.state_dict()


def values(root: Path, array: Array) -> torch.Tensor:
    assert array.offset is not None
    with (root / array.file).open("rb") as file:
        file.seek(array.offset)
        flat = torch.frombuffer(bytearray(file.read(array.size_bytes)), dtype=getattr(torch, array.dtype))
    return (
        flat.reshape(array.shape)
        if array.strides is None
        else torch.as_strided(flat, array.shape, array.strides)
    )


def agrees(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    contents = read(path)
    assert contents.format == "torch-export"
    assert contents.anomalies == ()
    found = {array.name: array for array in contents.arrays}
    assert set(found) == {prefix + name for name in state}
    for name, tensor in state.items():
        array = found[prefix + name]
        assert (array.shape, f"torch.{array.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        assert torch.equal(values(path.parent, array), tensor)


def test_a_program_reads_as_torch_wrote_it(program):
    path, state = program
    agrees(path, state)
    found = {array.name: array for array in read(path).arrays}
    assert found["k_proj.weight"].strides == (1, 6)
    assert read(path).excluded == {"constant": 1}


def archive(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return path


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_older_archives_hold_a_torch_save_archive(program, tmp_path):
    _, state = program
    before_2_7 = {
        "serialized_exported_program.json": b"{}",
        "serialized_state_dict.pt": saved(state),
        "serialized_constants.pt": saved({}),
        "version": b"8.1",
    }
    agrees(archive(tmp_path / "old.pt2", before_2_7), state)
    since_2_7 = {
        "m/archive_format": b"pt2",
        "m/models/model.json": b"{}",
        "m/data/weights/model.pt": saved(state),
        "m/data/constants/model.pt": saved({}),
    }
    agrees(archive(tmp_path / "middle.pt2", since_2_7), state)


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert caught.value.subject == str(path)
    assert caught.value.problem.endswith(".")
    assert caught.value.remedy.endswith(".")
    return caught.value


def test_compiled_packages_are_named(tmp_path):
    path = archive(tmp_path / "a.pt2", {"m/archive_format": b"pt2", "m/data/aotinductor/model/x.so": b""})
    error = refused(path)
    assert isinstance(error, UnsupportedFormatError)
    assert "AOTInductor" in error.problem


def test_archives_without_weights_say_so(tmp_path):
    path = archive(tmp_path / "a.pt2", {"m/archive_format": b"pt2", "m/models/model.json": b"{}"})
    assert "a program without weights" in refused(path).problem
    assert "no program of torch.export" in refused(archive(tmp_path / "b.pt2", {"x": b""})).problem


META = {
    "dtype": 7,
    "sizes": [{"as_int": 2}, {"as_int": 3}],
    "strides": [{"as_int": 3}, {"as_int": 1}],
    "storage_offset": {"as_int": 0},
    "layout": 7,
}


def one_weight(path: Path, change: dict[str, object], data: bytes = bytes(24)) -> Path:
    payload = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": {**META, **change}}
    table = json.dumps({"config": {"w": payload}}).encode()
    name = "m/data/weights/model_weights_config.json"
    return archive(path, {"m/archive_format": b"pt2", name: table, "m/data/weights/weight_0": data})


def test_a_hand_made_table_reads(tmp_path):
    (array,) = read(one_weight(tmp_path / "a.pt2", {})).arrays
    assert (array.name, array.shape, array.dtype, array.size_bytes) == ("w", (2, 3), "float32", 24)
    assert array.offset is not None
    assert array.strides is None


def test_a_view_begins_at_its_storage_offset(tmp_path):
    data = torch.arange(10.0)
    (array,) = read(
        one_weight(tmp_path / "a.pt2", {"storage_offset": {"as_int": 3}}, data.numpy().tobytes())
    ).arrays
    assert torch.equal(values(tmp_path, array), data[3:9].reshape(2, 3))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": 99}, "a dtype or strides that torch.export never writes"),
        ({"dtype": None}, "a dtype or strides"),
        ({"strides": [{"as_int": 1}]}, "a dtype or strides"),
        ({"sizes": [{"as_int": -2}, {"as_int": 3}]}, "no plain number"),
        ({"sizes": [{"as_expr": {"expr_str": "s0"}}, {"as_int": 3}]}, "no plain number"),
        ({"sizes": [{"as_int": 3}, {"as_int": 3}]}, "w [3, 3] needs 36 bytes; data/weights/weight_0 has 24."),
        ({"storage_offset": {"as_int": 1}}, "needs 28 bytes"),
    ],
)
def test_tables_that_contradict_their_data_are_refused(tmp_path, change, problem):
    assert problem in refused(one_weight(tmp_path / "a.pt2", change)).problem


def test_a_broken_table_is_refused(tmp_path):
    name = "m/data/weights/model_weights_config.json"
    for table, problem in (
        (b"{", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"[]", "no table of weights"),
        (b'{"config": 3}', "no table of weights"),
    ):
        path = archive(tmp_path / "a.pt2", {"m/archive_format": b"pt2", name: table})
        assert problem in refused(path).problem


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_read_or_are_refused_and_nothing_else(tmp_path, changes):
    path = one_weight(tmp_path / "fuzz.pt2", {})
    data = bytearray(path.read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        read(path)
