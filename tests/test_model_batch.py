"""The batch: given by a file or a callable, or made up from what forward asks for."""

import json
import textwrap
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attncli.errors import ModelError
from attncli.model import BatchOptions, Runnable, make_batch, run
from attncli.model.signature import forward_of, rank, readers


def runnable(module, **more):
    settings = {"kind": "code", "path": "model.py:build", "device": torch.device("cpu"), "dtype": "float32"}
    return Runnable(module=module.eval(), configs=(), parameters=0, **{**settings, **more})


def made(module, **options):
    return make_batch(runnable(module), BatchOptions(**options))


def shapes(batch):
    return {name: (entry["dtype"], entry["shape"]) for name, entry in batch.inputs.items()}


def refused(module, **options):
    with pytest.raises(ModelError) as error:
        made(module, **options)
    return str(error.value)


class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, a, b, mask=None):
        return a + b


# --- what forward asks for ----------------------------------------------------------------------------


class Positions(nn.Module):
    """Ids through two embeddings, room for 16 positions."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Embedding(16, 8)
        self.word = nn.Embedding(30, 8)

    def forward(self, x):
        return self.word(x) + self.pos_embed(torch.arange(x.shape[1]))


class Encoder(nn.Module):
    """An encoder below a wrapper: the reader of `sequence` is found two levels down."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(12)
            self.mix = nn.Linear(12, 12)

        def forward(self, h):
            return self.mix(self.norm(h))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, sequence, lengths=None):
        for block in self.blocks:
            sequence = block(sequence)
        return sequence


class Cross(nn.Module):
    """Two inputs of different widths, each told by the layer that reads it."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(10, 4)

    def forward(self, decoder_hidden, encoder_outputs):
        return self.q(decoder_hidden) @ self.k(encoder_outputs).transpose(1, 2)


class Patches(nn.Module):
    """A tiny vision transformer: 16 patches of 4 × 4 pixels and a class token."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.pos = nn.Parameter(torch.zeros(1, 17, 8))

    def forward(self, img):
        x = self.patch(img.float()).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1], x], dim=1) + self.pos


class Rows(nn.Module):
    """Features without positions, as the code's own unpacking says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x):
        b, _d = x.shape
        return self.layer(x).view(b, 2)


class Masked(nn.Module):
    """A mask that has to be given, and a flag."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x, attn_mask, causal: bool, *, context):
        assert attn_mask is None
        return self.layer(x) + self.layer(context)


class Hidden(nn.Module):
    """Nothing is read directly: the first layer has to do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 2)

    def forward(self, thing):
        return self.layer(thing * 2)


class Free(nn.Module):
    """No parameter at all: any width is right."""

    def forward(self, decoder_hidden, encoder_outputs):
        scores = torch.bmm(decoder_hidden, encoder_outputs.transpose(1, 2))
        return torch.softmax(scores, dim=2) @ encoder_outputs


class Squares(nn.Module):
    """Cuts its images into patches by hand."""

    def __init__(self):
        super().__init__()
        self.image_size, self.patch_size = 12, 4
        self.embed = nn.Linear(3 * 16, 8)

    def forward(self, img):
        b, c, h, w = img.shape
        x = img.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(b, 9, -1)
        return self.embed(x)


ASKED = [
    (Free(), {"decoder_hidden": ("float32", [2, 128, 64]), "encoder_outputs": ("float32", [2, 128, 64])}),
    (Squares(), {"img": ("float32", [2, 3, 12, 12])}),
    (Positions(), {"x": ("int64", [2, 16])}),
    (Encoder(), {"sequence": ("float32", [2, 128, 12])}),
    (Cross(), {"decoder_hidden": ("float32", [2, 128, 6]), "encoder_outputs": ("float32", [2, 128, 10])}),
    (Patches(), {"img": ("float32", [2, 3, 16, 16])}),
    (Rows(), {"x": ("float32", [2, 5])}),
    (Masked(), {"x": ("float32", [2, 128, 5]), "context": ("float32", [2, 128, 5])}),
    (Hidden(), {"thing": ("float32", [2, 128, 7])}),
    (nn.Linear(3, 3), {"input": ("float32", [2, 128, 3])}),
    (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), {"input": ("int64", [2, 128])}),
    (nn.LSTM(5, 4), {"input": ("float32", [128, 2, 5])}),
    (
        nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        {"query": ("float32", [2, 128, 8]), "key": ("float32", [2, 128, 6]), "value": ("float32", [2, 128, 4])},
    ),
    (
        nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        {"src": ("float32", [2, 128, 8]), "tgt": ("float32", [2, 128, 8])},
    ),
    (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        {"src": ("float32", [2, 128, 8])},
    ),
    (
        nn.TransformerDecoderLayer(8, 2, 16),
        {"tgt": ("float32", [128, 2, 8]), "memory": ("float32", [128, 2, 8])},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("module", "expected"), ASKED, ids=lambda value: type(value).__name__)
def test_the_layers_that_read_an_argument_tell_its_shape_and_the_model_runs_on_it(module, expected):
    model = runnable(module)
    batch = make_batch(model)
    assert batch.kind == "synthetic"
    assert shapes(batch) == expected
    run(model, batch)


def test_seq_len_and_batch_size_are_the_users():
    assert shapes(made(Encoder(), seq_len=7, batch_size=3)) == {"sequence": ("float32", [3, 7, 12])}
    assert shapes(made(nn.TransformerEncoderLayer(8, 2, 16), seq_len=7)) == {"src": ("float32", [7, 2, 8])}


def test_the_seed_makes_the_batch_and_the_random_state_of_the_process_stays():
    module = Encoder()
    before = torch.get_rng_state()
    first, again, other = (made(module, seed=seed).args[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_left_empty_is_said():
    assert made(Free()).notes == ("no layer fixes a width: 64 was taken",)
    assert made(Masked()).notes == ("attn_mask was given as None",)


def test_a_forward_that_cannot_be_told_names_its_unknown_arguments():
    text = refused(Adder())
    assert "what forward wants as a, b cannot be told" in text
    assert "--input file.py:batch: a dict with the keys a, b." in text


def test_a_forward_of_anything_is_refused():
    class Anything(nn.Module):
        def forward(self, *args):
            return args

    assert "what forward wants as *args cannot be told" in refused(Anything())


def test_compiled_and_parallel_models_are_looked_through():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own compiler imports deprecated parts of torch
        compiled = torch.compile(Cross(), backend="eager")
    assert forward_of(runnable(compiled)).names == {"decoder_hidden", "encoder_outputs"}
    assert forward_of(runnable(nn.DataParallel(Cross()))).names == {"decoder_hidden", "encoder_outputs"}


def test_the_reader_of_an_argument_is_found_through_loops_and_wrappers():
    module = Encoder()
    assert [reader.module for reader in readers(module, "sequence")] == [module.blocks[0].norm]
    assert readers(module, "lengths") == []
    assert (rank(Rows(), "x"), rank(Encoder(), "sequence")) == (2, None)


# --- files and callables ------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_batch(tmp_path):
    np = pytest.importorskip("numpy")
    batch = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2, 3)}
    torch.save(batch, tmp_path / "batch.pt")
    save_file(batch, tmp_path / "batch.safetensors")
    np.savez(tmp_path / "batch.npz", **{name: value.numpy() for name, value in batch.items()})
    (tmp_path / "batch.json").write_text(json.dumps({"a": [[0, 1, 2], [3, 4, 5]], "b": [[1.0] * 3] * 2}))
    for path in sorted(tmp_path.iterdir()):
        given = made(Adder(), input=str(path))
        assert given.kind == "file"
        assert shapes(given) == {"a": ("int64", [2, 3]), "b": ("float32", [2, 3])}, path
        assert torch.equal(given.kwargs["a"], batch["a"])


def test_a_tuple_is_arguments_and_one_tensor_is_the_first(tmp_path):
    torch.save((torch.zeros(1), torch.ones(1)), tmp_path / "pair.pt")
    assert shapes(made(Adder(), input=f"{tmp_path}/pair.pt")) == {
        "a": ("float32", [1]),
        "b": ("float32", [1]),
    }
    (tmp_path / "one.json").write_text("[[1, 2], [3, 4]]")
    assert shapes(made(nn.Embedding(9, 2), input=f"{tmp_path}/one.json")) == {"input": ("int64", [2, 2])}


def test_a_callable_gives_the_batch_in_the_dtype_of_the_model(tmp_path):
    path = tmp_path / "data.py"
    path.write_text(
        textwrap.dedent("""
            import torch

            def batch():
                return {"a": torch.ones(2, dtype=torch.float64), "b": [torch.ones(1)], "mask": "kept"}
        """)
    )
    batch = make_batch(runnable(Adder(), dtype="bfloat16"), BatchOptions(input=f"{path}:batch"))
    assert batch.kind == "callable"
    assert shapes(batch) == {"a": ("bfloat16", [2]), "b.0": ("bfloat16", [1])}
    assert batch.kwargs["mask"] == "kept"


WRONG = [
    (
        '{"a": [1], "c": [2]}',
        "forward has no argument c. Rename the keys: forward takes a, b, mask (optional).",
    ),
    ('{"a": [1]}', "forward needs b. Add what is missing: forward takes a, b, mask (optional)."),
    ('{"a": [[1], [2, 3]], "b": 1}', "the lists of a do not make a tensor"),
    ("3", "it gives a int, which is no batch. Give a tensor"),
    ("{nope", "no valid JSON"),
    ('{"a": [1], "b": [1, {"x": 2}], "mask": null}', None),
]


@pytest.mark.parametrize(("text", "problem"), WRONG)
def test_a_batch_that_does_not_fit_forward_is_told_by_name(tmp_path, text, problem):
    path = tmp_path / "batch.json"
    path.write_text(text)
    if problem is None:
        assert made(Adder(), input=str(path)).kwargs["b"] == [1, {"x": 2}]
    else:
        assert problem in refused(Adder(), input=str(path))


def test_too_many_arguments_are_counted(tmp_path):
    torch.save([torch.ones(1)] * 4, tmp_path / "four.pt")
    assert "it gives 4 arguments, and forward takes 3." in refused(Adder(), input=f"{tmp_path}/four.pt")


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    assert "its tensors cannot be read" in refused(Adder(), input=f"{tmp_path}/evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_damaged_file_is_told(tmp_path, name):
    whole = tmp_path / "whole"
    (torch.save if name == "cut.pt" else lambda value, path: save_file(value, path))(
        {"a": torch.ones(99)}, whole
    )
    (tmp_path / name).write_bytes(whole.read_bytes()[:150])
    assert "Save a dict of tensors with torch.save" in refused(Adder(), input=f"{tmp_path}/{name}")


def test_inputs_that_name_nothing_say_what_to_give(tmp_path):
    (tmp_path / "data.py").write_text(
        "def batch():\n    raise ValueError('no data')\ndef none():\n    pass\n"
    )
    assert "there is no such file" in refused(Adder(), input="gone.pt")
    assert "this is a folder" in refused(Adder(), input=str(tmp_path))
    assert f"Write {tmp_path}/data.py:NAME." in refused(Adder(), input=f"{tmp_path}/data.py")
    assert "making the batch failed (data.py:2 in batch" in refused(
        Adder(), input=f"{tmp_path}/data.py:batch"
    )
    assert "it gives nothing, which is no batch" in refused(Adder(), input=f"{tmp_path}/data.py:none")
    assert "--text and --input both say" in refused(Adder(), input="x", text=("y",))
    assert "--text needs a tokenizer" in refused(Adder(), text=("y",))
    assert "--seq-len 0" in refused(Adder(), seq_len=0)


def test_a_length_beyond_the_table_of_positions_is_refused():
    assert shapes(made(Positions(), seq_len=16)) == {"x": ("int64", [2, 16])}
    assert "--seq-len 17: the model has room for 16 positions. Ask for 16 or fewer." in refused(
        Positions(), seq_len=17
    )
