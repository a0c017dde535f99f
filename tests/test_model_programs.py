"""Self-contained programs: TorchScript and torch.export files, told by their bytes."""

import warnings

import pytest
import torch
from torch import nn

from attncli.errors import ModelError
from attncli.model import BatchOptions, ModelOptions, load_model, make_batch, run


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, tokens, extra):
        return self.inner(self.embed(tokens)) + self.inner(extra)


@pytest.fixture(autouse=True)
def _scripting_is_deprecated():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture
def example():
    return torch.arange(10).reshape(2, 5), torch.ones(2, 5, 8)


def refused(path, **options):
    with pytest.raises(ModelError) as error:
        load_model(str(path), ModelOptions(device="cpu", **options))
    return str(error.value)


def test_scripted_and_traced_models_run_on_what_their_graph_reads(tmp_path, example):
    torch.jit.script(Tiny().eval()).save(tmp_path / "scripted.bin")
    torch.jit.trace(Tiny().eval(), example).save(tmp_path / "traced.bin")
    for name in ("scripted.bin", "traced.bin"):
        model = load_model(str(tmp_path / name))
        batch = make_batch(model, BatchOptions(seq_len=6))
        assert (model.kind, model.dtype, model.parameters) == (
            "torchscript",
            "float32",
            20 * 8 + 8 * 2 + 8 * 9,
        )
        assert {key: value["shape"] for key, value in batch.inputs.items()} == {
            "tokens": [2, 6],
            "extra": [2, 6, 8],
        }
        assert run(model, batch).shape == (2, 6, 8)


def test_a_torchscript_model_takes_a_dtype_and_a_mode(tmp_path):
    torch.jit.script(Tiny()).save(tmp_path / "model.pt")
    model = load_model(str(tmp_path / "model.pt"), ModelOptions(dtype="bfloat16", train_mode=True))
    assert model.dtype == "bfloat16"
    assert model.module.training


def test_an_exported_program_runs_at_its_own_fixed_sizes_and_says_so(tmp_path, example):
    torch.export.save(torch.export.export(Tiny().eval(), example), tmp_path / "model.pt2")
    model = load_model(str(tmp_path / "model.pt2"))
    batch = make_batch(model, BatchOptions(seq_len=6))
    assert model.kind == "export"
    assert {name: entry["shape"] for name, entry in batch.inputs.items()} == {
        "tokens": [2, 5],
        "extra": [2, 5, 8],
    }
    assert batch.notes == ("the program has fixed sizes: --seq-len and --batch-size do not change them",)
    assert run(model, batch).shape == (2, 5, 8)


def test_dynamic_sizes_of_an_exported_program_follow_the_options_within_its_range(tmp_path, example):
    length = torch.export.Dim("length", min=2, max=9)
    dynamic = {"tokens": {1: length}, "extra": {1: length}}
    program = torch.export.export(Tiny().eval(), example, dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    model = load_model(str(tmp_path / "model.pt2"))
    for asked, given in ((7, 7), (None, 9)):
        batch = make_batch(model, BatchOptions(seq_len=asked))
        assert batch.inputs["tokens"]["shape"] == [2, given]
        assert run(model, batch).shape == (2, given, 8)
    assert batch.notes == ()


def test_keyword_arguments_of_an_exported_program_stay_keywords(tmp_path, example):
    program = torch.export.export(Tiny().eval(), example[:1], {"extra": example[1]})
    torch.export.save(program, tmp_path / "model.pt2")
    model = load_model(str(tmp_path / "model.pt2"))
    batch = make_batch(model)
    assert (len(batch.args), set(batch.kwargs)) == (1, {"extra"})
    assert run(model, batch).shape == (2, 5, 8)


def test_inputs_by_name_reach_a_program_that_was_exported_with_positional_ones(tmp_path, example):
    torch.export.save(torch.export.export(Tiny().eval(), example), tmp_path / "model.pt2")
    torch.save({"tokens": example[0], "extra": example[1]}, tmp_path / "batch.pt")
    model = load_model(str(tmp_path / "model.pt2"))
    batch = make_batch(model, BatchOptions(input=str(tmp_path / "batch.pt")))
    assert (len(batch.args), dict(batch.kwargs)) == (2, {})
    assert run(model, batch).shape == (2, 5, 8)


def test_an_exported_program_cannot_change_its_dtype_or_mode(tmp_path, example):
    torch.export.save(torch.export.export(Tiny().eval(), example), tmp_path / "model.pt2")
    assert "part of its graph; --dtype cannot change them." in refused(
        tmp_path / "model.pt2", dtype="float16"
    )
    assert "part of its graph; --train-mode cannot" in refused(tmp_path / "model.pt2", train_mode=True)


def test_the_wrong_batch_for_a_program_is_told_by_name(tmp_path, example):
    torch.jit.script(Tiny().eval()).save(tmp_path / "model.pt")
    (tmp_path / "batch.json").write_text('{"ids": [[1]]}')
    model = load_model(str(tmp_path / "model.pt"))
    with pytest.raises(
        ModelError, match=r"forward has no argument ids\. Rename the keys: forward takes tokens, extra"
    ):
        make_batch(model, BatchOptions(input=str(tmp_path / "batch.json")))
    (tmp_path / "batch.json").write_text('{"tokens": [[99]], "extra": [[[1.0]]]}')
    with pytest.raises(ModelError, match=r"the forward pass failed.*index out of range"):
        run(model, make_batch(model, BatchOptions(input=str(tmp_path / "batch.json"))))


def test_damaged_programs_and_bare_checkpoints_say_what_to_do(tmp_path, example):
    torch.jit.script(Tiny()).save(tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:700])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"hello world, I am a text")
    torch.save(Tiny().state_dict(), tmp_path / "state.pt")
    assert "this is a zip archive that is cut short or damaged" in refused(tmp_path / "cut.pt")
    assert "the file is empty" in refused(tmp_path / "empty.pt")
    assert "begins with b'hello wo', which is no known kind of model" in refused(tmp_path / "text.pt")
    assert "this is a checkpoint: it holds weights" in refused(tmp_path / "state.pt")
    assert f"file.py:build --weights {tmp_path}/state.pt" in refused(tmp_path / "state.pt")
    assert "--weights goes with a model built by code" in refused(tmp_path / "model.pt", weights=dict)


def test_an_archive_with_a_broken_program_inside_is_a_damaged_torchscript(tmp_path):
    import zipfile

    torch.jit.script(Tiny()).save(tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as old, zipfile.ZipFile(tmp_path / "bad.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"broken" if name.endswith(".py") else old.read(name))
    text = refused(tmp_path / "bad.pt")
    assert "loading it as TorchScript failed" in text
    assert "export it again" in text
