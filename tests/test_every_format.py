"""One model in every format: the same layers, facts and values come out, whatever file holds it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

import attncli

CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=False)
        self.k_proj = nn.Linear(32, 16, bias=False)
        self.v_proj = nn.Linear(32, 16, bias=False)
        self.o_proj = nn.Linear(32, 32, bias=False)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        keys, values = self.k_proj(x_BTE), self.v_proj(x_BTE)
        probs = torch.softmax(self.q_proj(x_BTE)[..., :16] @ keys.transpose(1, 2), dim=-1)
        return self.o_proj(torch.cat([probs @ values, x_BTE[..., 16:]], dim=-1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(32)
        self.self_attn = Attention()
        self.mlp = nn.Linear(32, 32)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        return self.mlp(x_BTE + self.self_attn(self.input_layernorm(x_BTE)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_BTE = layer(x_BTE)
        return x_BTE


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def safetensors(folder: Path) -> Path:
    save_file(model().state_dict(), folder / "model.safetensors")
    return folder


def safetensors_shards(folder: Path, *, index: bool = True) -> Path:
    weights = list(model().state_dict().items())
    names = [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    parts = {names[0]: dict(weights[::2]), names[1]: dict(weights[1::2])}
    for name, part in parts.items():
        save_file(part, folder / name)
    if index:
        weight_map = {key: name for name, part in parts.items() for key in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def torch_shards(folder: Path) -> Path:
    weights = list(model().state_dict().items())
    names = [f"pytorch_model-{n:05d}-of-00002.bin" for n in (1, 2)]
    parts = {names[0]: dict(weights[::2]), names[1]: dict(weights[1::2])}
    for name, part in parts.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def torch_zip(folder: Path) -> Path:
    torch.save(model().state_dict(), folder / "model.pt")
    return folder / "model.pt"


def torch_legacy(folder: Path) -> Path:
    torch.save(model().state_dict(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return folder / "model.pth"


def training_checkpoint(folder: Path) -> Path:
    trained = model()
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(1, 3, 32)).sum().backward()
    optimizer.step()
    weights = {f"module._orig_mod.{name}": value for name, value in model().state_dict().items()}
    torch.save({"epoch": 3, "model": weights, "optimizer": optimizer.state_dict()}, folder / "last.ckpt")
    return folder / "last.ckpt"


def torchscript(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model(), torch.ones(1, 3, 32)).save(str(folder / "model.pt"))
    return folder / "model.pt"


def exported(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model(), (torch.ones(1, 3, 32),)), folder / "model.pt2")
    return folder / "model.pt2"


def distributed(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed_checkpoint.save({"model": model().state_dict()}, checkpoint_id=folder, no_dist=True)
    return folder


def npz(folder: Path) -> Path:
    np.savez(folder / "model.npz", **{name: value.numpy() for name, value in model().state_dict().items()})
    return folder / "model.npz"


FORMATS: tuple[Callable[[Path], Path], ...] = (
    safetensors,
    safetensors_shards,
    lambda folder: safetensors_shards(folder, index=False),
    torch_shards,
    torch_zip,
    torch_legacy,
    training_checkpoint,
    torchscript,
    exported,
    distributed,
    npz,
)


@pytest.mark.parametrize("write", FORMATS, ids=[write.__name__ for write in FORMATS])
def test_every_format_gives_the_same_layers_and_values(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    report = attncli.inspect(path, values=True, bounds=True)
    assert [layer.path for layer in report.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    for layer in report.layers:
        assert (layer.kind, layer.layout) == ("self", "separate")
        assert (layer.heads, layer.kv_heads, layer.head_dim) == (4, 2, 8)
        assert [(t.role, t.shape, t.dtype) for t in layer.tensors] == [
            ("q", (32, 32), "float32"),
            ("k", (16, 32), "float32"),
            ("v", (16, 32), "float32"),
            ("o", (32, 32), "float32"),
        ]
    assert report.findings == ()
    absmax = {row.layer: row.value for row in report.measurements if row.metric == "absmax"}
    for name, value in model().state_dict().items():
        assert absmax[name] == value.abs().max().item()
    bounds = [row for row in report.measurements if row.metric == "score_bound"]
    assert len(bounds) == 8
    assert report.source["parameters"] == sum(value.numel() for value in model().state_dict().values())


def test_the_bound_holds_for_inputs_of_the_model(tmp_path: Path) -> None:
    safetensors(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    report = attncli.inspect(tmp_path, bounds=True)
    bound = {(row.layer, row.head): row.value for row in report.measurements if row.metric == "score_bound"}
    layer = model().layers[0]
    assert isinstance(layer, Layer)
    x_TE = layer.input_layernorm(torch.randn(200, 32) * 100)
    q_THD = layer.self_attn.q_proj(x_TE).view(200, 4, 8)
    k_TKD = layer.self_attn.k_proj(x_TE).view(200, 2, 8)
    for head in range(4):
        largest = (q_THD[:, head] @ k_TKD[:, head // 2].T).abs().max().item()
        limit = bound["layers.0.self_attn", head]
        assert isinstance(limit, float)
        assert 0.1 * limit < largest <= limit
