"""Reads every model type of transformers, as its own code builds it, and counts what attncli gets wrong.

    python tests/benchmarks/scan_transformers.py [MODEL_TYPE ...]

Each default configuration is built on the meta device (no weights), its state dict's names and shapes and
its config are given to the layout code, and the answer is compared with the modules: is every module whose
class is an attention found, is anything else taken for one, are heads, head size and scale those of the
module? Needs the extra `hf`; takes some minutes.
"""

import json
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from attncli.layout import attention_layers
from attncli.records import Array, Config, Layer, Tensor

# (attribute of the layer, attributes of the module that say the same)
FACTS = (
    ("heads", ("num_heads", "n_heads", "num_attention_heads", "n_head")),
    ("head_dim", ("head_dim",)),
    ("scale", ("scaling",)),
)


@dataclass
class Tally:
    models: int = 0
    modules: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, str] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    alarms: dict[str, str] = field(default_factory=dict)


def main() -> None:
    transformers.logging.set_verbosity_error()
    tally = Tally()
    for model_type in sys.argv[1:] or sorted(CONFIG_MAPPING.keys()):
        built = _build(model_type)
        if built is not None:
            _compare(model_type, *built, tally)
    missed = sum(tally.missed.values())
    print(f"{tally.models} model types, {tally.modules} modules whose class is an attention")
    print(f"found {1 - missed / max(tally.modules, 1):.2%}; missed: {dict(tally.missed)}")
    print(f"layers outside any such module: {dict(tally.foreign)}")
    print(f"facts that differ from the module's, one line a model type and fact: {len(tally.wrong)}")
    print(*(f"  {key}: {text}" for key, text in tally.wrong.items()), sep="\n")
    print(f"heads unknown: {dict(tally.unknown)}")
    print(f"findings on these healthy models: {tally.alarms}")


def _build(model_type: str) -> tuple[Any, Any] | None:
    """(config, module) of the default configuration, or None where it cannot be built here."""
    try:
        config = CONFIG_MAPPING[model_type]()
        if type(config) not in MODEL_MAPPING:
            return None
        with torch.device("meta"):
            return config, AutoModel.from_config(config)
    except Exception:  # noqa: BLE001
        # Whatever a model needs that is not here, in whatever class of its own: it is skipped.
        return None


def _compare(model_type: str, config: Any, model: Any, tally: Tally) -> None:
    tensors = [_tensor(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    settings = json.loads(config.to_json_string(use_diff=False))
    layers = attention_layers(tensors, [Config("config.json", settings)])
    attentions = [
        name
        for name, module in model.named_modules()
        if re.search(r"Attention|Attn", type(module).__name__) and next(module.parameters(), None) is not None
    ]
    tally.models += 1
    tally.modules += len(attentions)
    for name in attentions:
        if not any(_related(name, layer.path) for layer in layers):
            tally.missed[model_type] += 1
    for layer in layers:
        if layer.anomalies:
            tally.alarms[model_type] = f"{layer.path}: {layer.anomalies[0].kind}"
        if layer.kind is None:
            continue
        if not any(_related(name, layer.path) for name in attentions):
            tally.foreign[model_type] += 1
        _compare_facts(model_type, layer, model, tally)


def _compare_facts(model_type: str, layer: Layer, model: Any, tally: Tally) -> None:
    module = _module(model, layer.path)
    for fact, names in FACTS:
        theirs = next(
            (v for name in names if isinstance(v := getattr(module, name, None), (int, float))), None
        )
        ours = getattr(layer, fact)
        if ours is None and theirs is not None and fact == "heads":
            tally.unknown[model_type] += 1
        if theirs is not None and ours is not None and abs(ours - theirs) > 1e-3 * abs(theirs):
            tally.wrong.setdefault(f"{model_type} {fact}", f"{layer.path}: {ours}, not {theirs}")


def _module(model: Any, path: str) -> Any:
    while path:
        try:
            return model.get_submodule(path)
        except AttributeError:
            path = path.rpartition(".")[0]
    return model


def _related(a: str, b: str) -> bool:
    return a == b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    return Tensor(name, shape, "float32", "model", {"weight": Array(name, shape, "float32", "model", 0, 0)})


if __name__ == "__main__":
    main()
