"""LoRA pairs become the weight that they change; whatever is no complete pair stays as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import attncli
from attncli.checkpoint.adapters import join_lora
from attncli.records import Array


def arrays(**shapes: tuple[int, ...]) -> list[Array]:
    """Arrays by name, "__" for a dot."""
    return [
        Array(name.replace("__", "."), shape, "float16", "adapter_model.safetensors", 0, 0)
        for name, shape in shapes.items()
    ]


def test_a_pair_has_the_shape_of_the_product_of_its_parts() -> None:
    parts = arrays(q_proj__lora_A__weight=(2, 5), q_proj__lora_B__weight=(7, 2))
    (tensor,), rest = join_lora(parts)
    assert (tensor.name, tensor.scheme, tensor.dtype) == ("q_proj.weight", "lora", "float16")
    assert tensor.shape == tuple((torch.zeros(7, 2) @ torch.zeros(2, 5)).shape) == (7, 5)
    assert dict(tensor.quantisation) == {"rank": 2}
    assert dict(tensor.parts) == {"lora_A": parts[0], "lora_B": parts[1]}
    assert rest == ()


def test_the_order_of_a_pair_does_not_matter() -> None:
    parts = arrays(q__lora_A__weight=(2, 5), q__lora_B__weight=(7, 2))
    (forward,), _ = join_lora(parts)
    (backward,), _ = join_lora(parts[::-1])
    assert (forward.name, forward.shape, dict(forward.parts)) == (
        backward.name,
        backward.shape,
        dict(backward.parts),
    )


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("h.0.q.lora_A.weight", "h.0.q.lora_B.weight", "h.0.q.weight"),
        ("h.0.q.lora_A.default.weight", "h.0.q.lora_B.default.weight", "h.0.q.weight"),
        ("h.0.q.lora_A.style.weight", "h.0.q.lora_B.style.weight", "h.0.q.style.weight"),
        ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight", "lora_unet_q.weight"),
    ],
)
def test_the_namings_of_peft_and_kohya(first: str, second: str, name: str) -> None:
    parts = [Array(first, (2, 5), "float32", "w", 0, 40), Array(second, (7, 2), "float32", "w", 40, 56)]
    (tensor,), rest = join_lora(parts)
    assert (tensor.name, tensor.shape, rest) == (name, (7, 5), ())
    assert tensor.size_bytes == 96


def test_two_adapters_of_one_weight_are_two_tensors() -> None:
    parts = arrays(
        q__lora_A__one__weight=(2, 5),
        q__lora_B__one__weight=(7, 2),
        q__lora_A__two__weight=(3, 5),
        q__lora_B__two__weight=(7, 3),
    )
    tensors, rest = join_lora(parts)
    assert {t.name: t.quantisation["rank"] for t in tensors} == {"q.one.weight": 2, "q.two.weight": 3}
    assert rest == ()


@pytest.mark.parametrize(
    "shapes",
    [
        {"q__lora_A__weight": (2, 5)},
        {"q__lora_B__weight": (7, 2)},
        {"q__lora_A__weight": (2, 5), "q__lora_B__weight": (7, 3)},
        {"q__lora_A__weight": (2, 5), "k__lora_B__weight": (7, 2)},
        {"q__lora_A__weight": (2, 5, 3, 3), "q__lora_B__weight": (7, 2, 1, 1)},
        {"q__lora_A__weight": (2,), "q__lora_B__weight": (7, 2)},
        {"q__lora_A__weight": (2, 5), "q__lora_B__weight": (7, 2), "q__weight": (7, 5)},
        {"q__lora_A": (2, 5), "q__lora_B": (7, 2)},
        {"lora_embedding_A": (2, 5)},
    ],
)
def test_what_is_no_complete_pair_of_matrices_stays_as_it_is(shapes: dict[str, tuple[int, ...]]) -> None:
    parts = arrays(**shapes)
    tensors, rest = join_lora(parts)
    assert tensors == ()
    assert sorted(array.name for array in rest) == sorted(array.name for array in parts)


def test_weights_without_an_adapter_pass_through() -> None:
    parts = arrays(q__weight=(7, 5), lora__weight=(7, 5), k__weight=(7, 5))
    assert join_lora(parts) == ((), tuple(parts))
    assert join_lora([]) == ((), ())


def test_a_magnitude_of_dora_stays_beside_its_pair() -> None:
    parts = arrays(q__lora_A__weight=(2, 5), q__lora_B__weight=(7, 2), q__lora_magnitude_vector__weight=(7,))
    tensors, rest = join_lora(parts)
    assert [t.name for t in tensors] == ["q.weight"]
    assert [array.name for array in rest] == ["q.lora_magnitude_vector.weight"]


def test_values_and_parameters_of_an_adapter_are_those_of_its_stored_pairs(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    down, up = torch.randn(4, 32), torch.zeros(16, 4)
    save_file(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors"
    )
    report = attncli.inspect(tmp_path, values=True, bounds=True)
    assert report.source["parameters"] == 4 * 32 + 16 * 4
    largest = {row.layer: row.value for row in report.measurements if row.metric == "absmax"}
    assert largest == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": down.abs().max().item(),
        "model.layers.0.self_attn.q_proj.lora_B.weight": 0.0,
    }
    (layer,) = report.layers
    assert layer.facts["adapter"] == "LoRA of rank 4"
    assert report.findings == (), "an adapter that was not trained yet is no defect"
