"""MODEL as the user's own code: finding it, building it, giving it weights, and every way that can go wrong."""

import os
import sys
import textwrap

import pytest
import torch
from torch import nn

from attncli.errors import ModelError
from attncli.model import BatchOptions, ModelOptions, load_model, make_batch, run

TINY = """
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 50)

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(self.attention(x, x, x)[0])

    def build():
        return Tiny()
"""


@pytest.fixture
def code(tmp_path):
    """`code(source, name)` writes a file and returns its path."""

    def write(source, name="model.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write


def message(spec, **options):
    with pytest.raises(ModelError) as error:
        load_model(str(spec), ModelOptions(device="cpu", **options))
    return str(error.value)


def test_a_factory_in_a_file_is_built_and_runs_on_a_batch_of_its_own_vocabulary(code):
    model = load_model(f"{code(TINY)}:build", ModelOptions(device="cpu"))
    batch = make_batch(model, BatchOptions(seq_len=5, batch_size=3))
    assert model.kind == "code"
    assert model.dtype == "float32"
    assert model.parameters == sum(p.numel() for p in model.module.parameters())
    assert batch.inputs == {"tokens": {"shape": [3, 5], "dtype": "int64"}}
    assert int(batch.args[0].max()) < 50
    assert run(model, batch).shape == (3, 5, 50)


def test_the_model_is_in_eval_mode_unless_asked_otherwise(code):
    spec = f"{code(TINY)}:build"
    assert not load_model(spec).module.training
    assert load_model(spec, ModelOptions(train_mode=True)).module.training


def test_a_class_and_a_ready_module_serve_as_well_as_a_function(code):
    path = code(TINY + "\n    ready = build()\n")
    assert type(load_model(f"{path}:Tiny").module).__name__ == "Tiny"
    assert type(load_model(f"{path}:ready").module).__name__ == "Tiny"


def test_a_module_of_the_current_folder_is_found_by_its_dotted_name(code, tmp_path, monkeypatch):
    code(TINY, "shop/parts.py")
    code("", "shop/__init__.py")
    monkeypatch.chdir(tmp_path)
    assert load_model("shop.parts:build").parameters > 0
    for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
        del sys.modules[name]


def test_a_file_that_imports_relatively_is_loaded_as_a_part_of_its_package(code):
    code("", "pack/__init__.py")
    code(TINY, "pack/layers.py")
    path = code("from .layers import Tiny\ndef build():\n    return Tiny()\n", "pack/entry.py")
    assert load_model(f"{path}:build").parameters > 0
    for name in [name for name in sys.modules if name.split(".")[0] == "pack"]:
        del sys.modules[name]


def test_the_folder_of_the_file_is_on_the_path_while_it_runs_and_not_afterwards(code, tmp_path):
    code("SIZE = 6\n", "beside_it.py")
    path = code("""
        from torch import nn
        import beside_it

        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(beside_it.SIZE, 1)

            def forward(self, x):
                import also_beside_it
                return self.layer(x)

        def build():
            return Late()
    """)
    code("", "also_beside_it.py")
    model = load_model(f"{path}:build")
    assert run(model, make_batch(model)).shape == (2, 128, 1)
    assert str(tmp_path) not in sys.path
    for name in ("beside_it", "also_beside_it"):
        del sys.modules[name]


def test_a_path_that_the_code_adds_itself_is_there_when_it_builds(code, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    code(TINY, "elsewhere/far_away.py")
    path = code(f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "elsewhere")!r})

        def build():
            import far_away
            return far_away.build()
    """)
    assert load_model(f"{path}:build").parameters > 0
    del sys.modules["far_away"]


def test_building_is_the_same_on_every_run_and_leaves_the_random_state_alone(code):
    spec = f"{code(TINY)}:build"
    first = load_model(spec).module
    torch.rand(1)
    before = torch.get_rng_state()
    second = load_model(spec).module
    assert torch.equal(first.embed.weight, second.embed.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_code_prints_does_not_reach_stdout(code, capsys):
    load_model(f"{code('print(1)' + textwrap.dedent(TINY))}:build")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "1\n")


def test_dtype_and_the_settings_of_the_module_are_told(code):
    path = code(
        TINY + "\n    def other():\n        m = Tiny(); m.config = {'n_head': 2, 'odd': print}; return m\n"
    )
    model = load_model(f"{path}:other", ModelOptions(dtype="bf16"))
    assert model.dtype == "bfloat16"
    assert model.configs == (("the module's config", {"n_head": 2}),)


# --- weights ------------------------------------------------------------------------------------------


def weights(code, change=lambda state: None):
    model = load_model(f"{code(TINY, 'saved.py')}:build").module
    state = {name: value + 1 for name, value in model.state_dict().items()}
    change(state)
    return {"weights": lambda: state, "weights_path": "w.safetensors"}


def test_weights_fill_the_model(code):
    options = weights(code)
    model = load_model(f"{code(TINY)}:build", ModelOptions(**options))
    assert torch.equal(model.module.embed.weight, options["weights"]()["embed.weight"])
    assert model.notes == ()


def test_a_model_on_the_meta_device_takes_the_weights_themselves(code):
    path = code(TINY + "\n    def meta():\n        with torch.device('meta'):\n            return Tiny()\n")
    assert load_model(f"{path}:meta", ModelOptions(**weights(code))).dtype == "float32"
    assert "are on the meta device, without values: embed.weight" in message(f"{path}:meta")


def test_missing_and_unexpected_keys_are_an_error_that_lists_them(code):
    def change(state):
        state["stray"] = state.pop("head.bias")

    options = weights(code, change)
    text = message(f"{code(TINY)}:build", **options)
    assert text.startswith("w.safetensors: its names are not those of the model that")
    assert "1 missing (head.bias) and 1 unexpected (stray)." in text
    assert "--no-strict" in text
    model = load_model(f"{code(TINY)}:build", ModelOptions(strict=False, **options))
    assert model.notes[0].startswith("weights: 1 missing (head.bias) and 1 unexpected (stray)")


def test_tied_weights_that_are_stored_once_are_not_missing(code):
    path = code(TINY + "\n    def tied():\n        m = Tiny(); m.head.weight = m.embed.weight; return m\n")
    options = weights(code, lambda state: state.pop("head.weight"))
    assert load_model(f"{path}:tied", ModelOptions(**options)).notes == ()


def test_mis_shaped_tensors_are_an_error_with_both_shapes_whatever_strict_says(code):
    def change(state):
        state["head.weight"] = state["head.weight"][:40]

    text = message(f"{code(TINY)}:build", strict=False, **weights(code, change))
    assert "1 tensors do not have the model's shapes: head.weight is [40, 8] and should be [50, 8]." in text


def test_a_model_one_level_above_its_weights_is_told_to_return_the_inner_module(code):
    path = code(TINY + "\n    def outer():\n        return nn.ModuleDict({'net': Tiny()})\n")
    text = message(f"{path}:outer", **weights(code))
    assert "not one name fits. The model's names begin with 'net.': return the inner module." in text


@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (lambda name: f"net.{name}", "The checkpoint's names begin with 'net.'"),
        (lambda name: name.removeprefix("attention."), None),
    ],
)
def test_names_that_differ_by_a_prefix_get_a_hint(code, rename, hint):
    def change(state):
        for name in list(state):
            state[rename(name)] = state.pop(name)

    text = message(f"{code(TINY)}:build", **weights(code, change))
    assert (hint or "Build the model that the weights were saved from") in text


def test_weights_of_another_dtype_are_told(code):
    def change(state):
        state.update({name: value.bfloat16() for name, value in state.items()})

    model = load_model(f"{code(TINY)}:build", ModelOptions(**weights(code, change)))
    assert model.notes == (
        "the weights are stored as bfloat16; the model that the code builds runs in float32",
    )


# --- what goes wrong ----------------------------------------------------------------------------------

BROKEN = [
    ("def build():\n    raise KeyError('sizes')\n", "building the model failed", "KeyError: 'sizes'"),
    ("def build():\n    return 1, 2\n", "it returned a tuple of int, int, not a torch.nn.Module.", "Return the"),
    ("def build():\n    pass\n", "it returned nothing", "Return the module alone."),
    ("build = 3\n", "it is a int, not a function", "Name a function without arguments"),
    ("def built():\n    pass\n", "has no build.", "It defines: built."),
    ("import not_there_at_all\n", "importing model.py failed", "No module named 'not_there_at_all'"),
    ("def build(:\n", "importing model.py failed", "SyntaxError"),
    ("def build(size):\n    pass\n", "building the model failed", "missing 1 required positional argument"),
    ("import sys\nsys.exit(3)\n", "ended the program with sys.exit(3)", "__name__"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "problem", "more"), BROKEN)
def test_code_that_builds_no_model_is_told_in_three_parts(code, source, problem, more):
    text = message(f"{code(source)}:build")
    assert problem in text
    assert more in text


def test_the_line_of_the_user_stands_in_the_message(code):
    source = "def inner():\n    return 1 / 0\ndef build():\n    return inner()\n"
    text = message(f"{code(source)}:build")
    assert "(model.py:4 in build: return inner() → model.py:2 in inner: return 1 / 0)" in text
    assert "ZeroDivisionError: division by zero." in text


def test_control_c_passes_through(code):
    with pytest.raises(KeyboardInterrupt):
        load_model(f"{code('def build(): raise KeyboardInterrupt')}:build")


def test_a_file_without_a_name_lists_what_it_defines(code):
    assert "It defines: model.py:Tiny, model.py:build." in message(code(TINY))


def test_specs_that_name_nothing_say_what_to_write(tmp_path):
    assert "there is no file" in message(f"{tmp_path}/gone.py:build")
    assert "is no name" in message("gone.py:1x")
    assert "neither a file nor the name" in message("not a module:build")
    assert "No module named 'not_there_at_all'" in message("not_there_at_all:build")
    assert "must be downloaded first" in message("someone/model")
    assert "no such file or folder" in message("gone.pt")


def test_a_device_that_is_not_here_lists_those_that_are(code):
    spec = f"{code(TINY)}:build"
    for name in ("cuda:99", "xpu", "toaster"):
        with pytest.raises(ModelError) as error:
            load_model(spec, ModelOptions(device=name))
        assert str(error.value).startswith(f"--device {name}: that ")
        assert error.value.remedy.startswith("Devices here: ")
        assert error.value.remedy.endswith("cpu.")


def test_dtypes_are_told_apart_from_typing_errors(code):
    spec = f"{code(TINY)}:build"
    assert "--dtype int8: that is no floating dtype." in message(spec, dtype="int8")
    assert "autocast runs in float16 or bfloat16 only." in message(spec, autocast="float32")


# --- the run ------------------------------------------------------------------------------------------


def test_an_error_in_the_forward_pass_names_the_module_and_the_line(code):
    path = code("""
        from torch import nn

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 4)

            def forward(self, x):
                return self.layer(x[..., :3])

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Inner()])

            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                return x
    """)
    model = load_model(f"{path}:Outer")
    with pytest.raises(ModelError) as error:
        run(model, make_batch(model))
    assert "the forward pass failed in module blocks.0.layer (" in error.value.problem
    assert "model.py:10 in forward: return self.layer(x[..., :3])" in error.value.problem
    assert "mat1 and mat2 shapes cannot be multiplied (256x3 and 4x4)" in error.value.problem
    assert error.value.remedy.startswith("It was given x float32 [2, 128, 4], made up")


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_says_what_makes_the_run_smaller(code, raised):
    class Hungry(nn.Module):
        def forward(self, x):
            raise raised

    model = load_model(f"{code(TINY)}:build")
    model.module.head = Hungry()
    with pytest.raises(ModelError) as error:
        run(model, make_batch(model))
    assert "the forward pass ran out of memory in module head" in error.value.problem
    assert error.value.remedy.startswith("Try a smaller --seq-len or --batch-size")


def test_a_run_leaves_no_trace_in_the_process_and_repeats_its_dropout(code):
    path = code(TINY.replace("self.head(", "nn.functional.dropout(").replace(")[0])", ")[0], 0.5)"))
    model = load_model(f"{path}:build")
    batch = make_batch(model, BatchOptions(seed=3))
    first = run(model, batch)
    torch.rand(1)
    before = torch.get_rng_state()
    assert torch.equal(first, run(model, batch))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert not first.requires_grad


def test_autocast_runs_in_the_dtype_asked_for(code):
    model = load_model(f"{code(TINY)}:build", ModelOptions(device="cpu", autocast="bfloat16"))
    assert run(model, make_batch(model)).dtype == torch.bfloat16
    assert model.dtype == "float32"


def test_the_process_environment_is_left_as_it_was(code):
    before = dict(os.environ)
    load_model(f"{code(TINY)}:build")
    assert dict(os.environ) == before
