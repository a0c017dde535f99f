"""Which of the things in a checkpoint are the model's weights, and what the model calls them."""

import pytest

from attncli.checkpoint.pickle_values import Call, Global, PickledTensor
from attncli.checkpoint.state_dict import (
    is_optimizer_name,
    is_training_state_name,
    module_tensors,
    plain_settings,
    select,
)
from attncli.checkpoint.wrappers import strip_wrappers
from attncli.errors import CheckpointError


def tensor(*shape: int, dtype: str = "float32") -> PickledTensor:
    return PickledTensor(None, 0, shape or (2, 2), None, dtype)


def names(root: object) -> list[str]:
    return list(select(root, "x.pt").tensors)


FLAT = {"h.0.weight": tensor(), "h.0.bias": tensor(2), "scale": tensor(1)}
ADAM = {
    "state": {0: {"exp_avg": tensor(), "exp_avg_sq": tensor(), "step": tensor(1)}},
    "param_groups": [{"lr": 0.1}],
}


@pytest.mark.parametrize(
    "root",
    [
        FLAT,
        {"state_dict": FLAT},
        {"model": FLAT, "epoch": 3, "loss": tensor(1)},
        {"model_state_dict": FLAT, "optimizer_state_dict": ADAM},
        {"checkpoint": {"model": {"state_dict": FLAT}}},
        {"weights": FLAT, "optimizer": ADAM, "lr_schedulers": [{"last": 1}]},
        [FLAT, 3],
        (FLAT, {"epoch": 3}),
        {"net": Call(Global("mymodel", "Weights"), pairs=FLAT)},
    ],
)
def test_the_weights_are_found_under_the_usual_keys(root):
    assert names(root) == list(FLAT)


def test_nested_dicts_become_dotted_names():
    root = {"model": {"encoder": {"layer": {0: {"w": tensor()}, 1: {"w": tensor()}}}}}
    assert names(root) == ["encoder.layer.0.w", "encoder.layer.1.w"]


def test_lists_of_tensors_are_numbered():
    assert names({"blocks": [{"w": tensor()}, {"w": tensor()}]}) == ["blocks.0.w", "blocks.1.w"]


def test_several_modules_keep_their_keys():
    root = {"encoder": {"w": tensor()}, "decoder": {"w": tensor()}, "generator": {"w": tensor()}}
    assert names(root) == ["encoder.w", "decoder.w", "generator.w"]


def test_a_tensor_alone_has_a_name():
    assert names(tensor()) == ["tensor"]


def test_the_optimizer_is_counted_and_left_out():
    chosen = select(
        {"model": FLAT, "optimizer": ADAM, "optimizer_g": {"a": tensor()}, "custom": dict(ADAM)}, "x"
    )
    assert list(chosen.tensors) == list(FLAT)
    assert chosen.excluded == {"optimizer": 7}


def test_optimizer_leaves_among_flat_names_are_counted():
    chosen = select({**FLAT, "h.0.weight.exp_avg": tensor()}, "x")
    assert list(chosen.tensors) == list(FLAT)
    assert chosen.excluded == {"optimizer": 1}


def test_random_states_are_training_state():
    chosen = select(
        {"model": FLAT, "rng_state": tensor(5056, dtype="uint8"), "cuda_rng_state": [tensor(16)]}, "x"
    )
    assert list(chosen.tensors) == list(FLAT)
    assert chosen.excluded == {"training state": 2}


@pytest.mark.parametrize(
    "key", ["ema", "model_ema", "ema_state_dict", "params_ema", "state_dict_ema", "ema_model"]
)
def test_a_moving_average_is_counted_beside_the_weights_and_used_alone(key):
    wrapped = {f"module.{name}": value for name, value in FLAT.items()}
    chosen = select({"params": FLAT, key: wrapped}, "x")
    assert list(chosen.tensors) == list(FLAT)
    assert chosen.excluded == {"ema copy": 3}
    assert names({key: FLAT, "epoch": 1}) == list(FLAT)


def test_a_moving_average_as_a_numbered_list_is_a_copy():
    assert select({"model": FLAT, "ema": {"shadow_params": [tensor(), tensor(2)]}}, "x").excluded == {
        "ema copy": 2
    }


def test_a_moving_average_of_other_weights_is_kept():
    assert names({"model": FLAT, "ema": {"other.weight": tensor()}}) == [*FLAT, "other.weight"]


def test_a_moving_average_among_the_weights_is_a_copy_even_without_dots():
    root = {
        "state_dict": {
            "model.diffusion.in.weight": tensor(),
            "model.diffusion.out.weight": tensor(),
            "first_stage.weight": tensor(),
            "model_ema.diffusioninweight": tensor(),
            "model_ema.diffusionoutweight": tensor(),
            "model_ema.decay": tensor(1),
        }
    }
    chosen = select(root, "x")
    assert list(chosen.tensors) == [
        "model.diffusion.in.weight",
        "model.diffusion.out.weight",
        "first_stage.weight",
    ]
    assert chosen.excluded == {"ema copy": 3}


def test_settings_become_configs():
    namespace = Call(
        Global("argparse", "Namespace"), state={"heads": 4, "path": Call(Global("a", "B")), "names": ("a",)}
    )
    root = {"model": FLAT, "model_args": {"n_head": 12, "w": tensor()}, "args": namespace, "epoch": 3}
    chosen = select(root, "x")
    assert [(c.source, dict(c.values)) for c in chosen.configs] == [
        ("model_args in the checkpoint", {"n_head": 12}),
        ("args in the checkpoint", {"heads": 4, "names": ["a"]}),
    ]


def test_omegaconf_and_dataclasses_become_plain_settings():
    def node(value: object) -> Call:
        return Call(
            Global("omegaconf.nodes", "AnyNode"), state={"_metadata": Call(Global("o", "M")), "_val": value}
        )

    items = Call(
        Global("omegaconf.listconfig", "ListConfig"), state={"_metadata": 1, "_content": [node(1), node("a")]}
    )
    content = {"heads": node(8), "list": items}
    tree = Call(Global("omegaconf.dictconfig", "DictConfig"), state={"_metadata": 1, "_content": content})
    assert plain_settings(tree) == {"heads": 8, "list": [1, "a"]}
    inner = Call(Global("m", "C"), state={"d": 2})
    assert plain_settings(Call(Global("m", "C"), state={"n": 1, "inner": inner})) == {
        "n": 1,
        "inner": {"d": 2},
    }
    assert plain_settings(Call(Global("lightning", "AttributeDict"), pairs={"lr": 0.5})) == {"lr": 0.5}


def test_settings_that_contain_themselves_end():
    cycle: dict = {"n": 1}
    cycle["me"] = cycle
    values = plain_settings(cycle)
    assert values["n"] == values["me"]["n"] == 1
    laughs: object = {"n": 1}
    for _ in range(60):
        laughs = {"a": laughs, "b": laughs}
    plain_settings(laughs)


def test_shared_containers_are_walked_under_both_names():
    shared = {"w": tensor()}
    assert names({"encoder": shared, "decoder": shared}) == ["encoder.w", "decoder.w"]


def test_cycles_end_and_bombs_are_refused(monkeypatch):
    monkeypatch.setattr("attncli.checkpoint.state_dict.MAX_NODES", 20_000)
    cycle: dict = {"w": tensor()}
    cycle["me"] = cycle
    assert names({"a": cycle, "b": FLAT}) == ["a.w", "b.h.0.weight", "b.h.0.bias", "b.scale"]
    laughs: object = {"w": tensor()}
    for _ in range(60):
        laughs = {"a": laughs, "b": laughs}
    with pytest.raises(CheckpointError, match="nested without end"):
        select({"a": laughs, "b": FLAT}, "x.pt")
    deep: object = {"w": tensor()}
    for _ in range(100_000):
        deep = [deep]
    for root in ({"a": deep, "b": FLAT}, deep):
        with pytest.raises(CheckpointError, match="nested"):
            select(root, "x.pt")


def test_names_that_occur_twice_are_told():
    chosen = select({"a": {0: tensor(), "0": tensor()}}, "x")
    assert list(chosen.tensors) == ["a.0"]
    assert chosen.doubled == ("a.0",)


def test_nothing_but_an_optimizer_gives_no_weights():
    chosen = select({"optimizer": ADAM}, "x")
    assert chosen.tensors == {}
    assert chosen.excluded == {"optimizer": 3}


def test_module_tensors_skip_what_is_no_module():
    inner = Call(Global("__torch__", "Linear"), state={"weight": tensor(), "training": True})
    root = Call(Global("__torch__", "M"), state={"fc": inner, "again": inner, "cache": {"k": tensor()}})
    assert list(module_tensors(root, "x")) == ["fc.weight", "again.weight"]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("optimizer.state.exp_avg.decoder.weight", True),
        ("chained_0.optimizer.state.fp32_param.weight", True),
        ("optim.state.h.0.weight.exp_avg", True),
        ("h.0.weight.exp_avg", True),
        ("model.decoder.weight", False),
        ("optimizer", False),
        ("model.h.optimizer.weight", False),
    ],
)
def test_optimizer_names_are_told_by_their_ends(name, optimizer):
    assert is_optimizer_name(name) is optimizer


def test_training_state_names_are_told_by_their_first_segment():
    assert is_training_state_name("rng_state.cpu")
    assert not is_training_state_name("model.rng.weight")


# --- wrappers in names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        (["module.h.w", "module.w"], ["h.w", "w"]),
        (["module.module.h.w"], ["h.w"]),
        (["_orig_mod.module.h.w", "_orig_mod.module.g.w"], ["h.w", "g.w"]),
        (["module._orig_mod.h.w", "module._orig_mod.g.w"], ["h.w", "g.w"]),
        (["h._fsdp_wrapped_module.0._checkpoint_wrapped_module.w", "g.w"], ["h.0.w", "g.w"]),
        (["_forward_module.module.model.layers.0.w"], ["model.layers.0.w"]),
        (["model_ema.module.h.w"], ["h.w"]),
        (["base_model.model.model.layers.0.q_proj.base_layer.weight"], ["model.layers.0.q_proj.weight"]),
        (["net.h.w", "net.g.w"], ["h.w", "g.w"]),
        (["student.backbone.w", "student.head.w"], ["backbone.w", "head.w"]),
        (["student.w", "teacher.w"], ["student.w", "teacher.w"]),
        (["module.h.w", "n_averaged"], ["h.w", "n_averaged"]),
        (["module.h.w", "head.w"], ["module.h.w", "head.w"]),
        (["generator.module.h.w", "discriminator.module.h.w"], ["generator.h.w", "discriminator.h.w"]),
        (["gan.module.h.w", "gan.head.w", "d.w"], ["gan.module.h.w", "gan.head.w", "d.w"]),
        # A residual branch that is called `module` is the model's own.
        (
            ["encoder.stages.0.layers.0.module.qkv.w", "encoder.stages.0.layers.1.module.fc.w"],
            ["encoder.stages.0.layers.0.module.qkv.w", "encoder.stages.0.layers.1.module.fc.w"],
        ),
        # `model.` is the first segment of Hugging Face's own names …
        (["model.layers.0.w", "model.norm.w"], ["model.layers.0.w", "model.norm.w"]),
        (["model.layers.0.w", "lm_head.weight"], ["model.layers.0.w", "lm_head.weight"]),
        (["model.transformer.blocks.0.att_proj.weight"], ["model.transformer.blocks.0.att_proj.weight"]),
        # … and a wrapper where those begin after it.
        (["model.model.layers.0.w", "model.lm_head.weight"], ["model.layers.0.w", "lm_head.weight"]),
        (["model.transformer.h.0.w", "model.lm_head.weight"], ["transformer.h.0.w", "lm_head.weight"]),
        ([], []),
        (["weight"], ["weight"]),
        (["module"], ["module"]),
    ],
)
def test_wrappers_are_stripped_and_the_models_own_names_kept(wrapped, plain):
    assert strip_wrappers(wrapped) == plain


def test_names_that_would_collide_stay_as_they_were():
    assert strip_wrappers(["h.w", "_orig_mod.h.w", "g._orig_mod.w"]) == ["h.w", "_orig_mod.h.w", "g.w"]
    assert strip_wrappers(["a._orig_mod.b", "a.b", "x._orig_mod.y"]) == ["a._orig_mod.b", "a.b", "x.y"]


def test_stripping_keeps_unique_names_unique_and_is_stable():
    segments = ["module", "_orig_mod", "model", "h", "base_layer", "net"]
    unique = sorted({".".join([a, b, c, "w"]) for a in segments for b in segments for c in segments})
    once = strip_wrappers(unique)
    assert len(set(once)) == len(unique)
    assert len(once) == len(unique)
