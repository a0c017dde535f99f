"""Config → the settings that hold for one layer: heads, KV heads, head size, and what the family does by design.

A config may describe several towers, list heads per layer, and name one thing in a dozen ways. This file
normalises; it does not decide what to believe when the shapes disagree (`heads.py` does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from attncli.records import Config


class Settings(NamedTuple):
    """One config node as it applies to one layer. `keys` says which key gave each number, for messages.

    `kv_heads` and `head_dims` list every value the node allows (sliding and global layers may differ); the
    first is the default. `raw` is the node itself, merged over its parents.
    """

    source: str
    node: str
    model_type: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    hidden: frozenset[int]
    raw: Mapping[str, Any]
    keys: Mapping[str, str] = {}
    listed: frozenset[int] = frozenset()
    affinity: int = 0

    @property
    def where(self) -> str:
        """ "config.json" or "config.json (vision_config)"."""
        return f"{self.source} ({self.node})" if self.node else self.source


class _Node(NamedTuple):
    source: str
    name: str
    raw: Mapping[str, Any]


class SettingsReader:
    """All nodes of all configs, read once; `for_layer` answers for each layer."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self._nodes = [node for config in configs for node in _nodes(config)]
        self.model_type = next((str(n.raw["model_type"]) for n in self._nodes if n.raw.get("model_type")), "")

    def for_layer(self, path: str, index: int | None) -> tuple[Settings, ...]:
        """Nodes that may describe the layer at `path`, the likeliest first."""
        found = [_settings(node, path, index) for node in self._nodes]
        kept = [settings for settings in found if settings is not None]
        # Of equally good names the one that stands first in the path: the outer tower.
        return tuple(sorted(kept, key=lambda s: (-s.affinity, _position(s.node, path))))

    @property
    def nodes(self) -> Iterator[Mapping[str, Any]]:
        return (node.raw for node in self._nodes)


# --- nodes --------------------------------------------------------------------------------------------


def _nodes(config: Config) -> Iterator[_Node]:
    if config.source.startswith("GGUF"):
        yield from _gguf_nodes(config)
        return
    yield from _walk(config.source, "", _merged(config.values), 0)


def _walk(source: str, name: str, raw: Mapping[str, Any], depth: int) -> Iterator[_Node]:
    """The root, then every mapping below it that counts heads (a tower, or a constructor's arguments)."""
    if depth == 0 or _looks_like_model(name, raw):
        yield _Node(source, name, raw)
    if depth >= _MAX_DEPTH:
        return
    for key, value in raw.items():
        if isinstance(value, Mapping) and key not in _NOT_A_MODEL:
            inherited = {k: raw[k] for k in ("model_type", "architectures") if k in raw and k not in value}
            label = f"{name}.{key}" if name else str(key)
            yield from _walk(source, label, {**inherited, **_merged(value)}, depth + 1)


def _looks_like_model(name: str, raw: Mapping[str, Any]) -> bool:
    return name.endswith(("config", "cfg")) or any(key in raw for key in _HEADS)


def _merged(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The node with its attention sub-config (MPT, DBRX) laid flat."""
    flat = dict(raw)
    # Hand-written configs shout: {"HEADS": 4}.
    flat.update(
        {k.lower(): v for k, v in raw.items() if isinstance(k, str) and k.isupper() and k.lower() not in raw}
    )
    for key in ("attn_config", "attention_config"):
        inner = raw.get(key)
        if isinstance(inner, Mapping):
            flat.update({k: v for k, v in inner.items() if k != "model_type"})
    return flat


def _gguf_nodes(config: Config) -> Iterator[_Node]:
    values = config.values
    suffix = ".attention.head_count"
    for key in values:
        if not key.endswith(suffix):
            continue
        prefix = key[: -len(suffix)]
        raw: dict[str, Any] = {
            "model_type": str(values.get("general.architecture", prefix)),
            "gguf_prefix": prefix,
        }
        for name, value in values.items():
            if name.startswith(prefix + "."):
                raw[name[len(prefix) + 1 :]] = value
        for ours, theirs in _GGUF_KEYS.items():
            if theirs in raw:
                raw[ours] = raw[theirs]
        yield _Node(config.source, "" if "." not in prefix else prefix, raw)


# --- one node, one layer ------------------------------------------------------------------------------


def _settings(node: _Node, path: str, index: int | None) -> Settings | None:
    raw = _for_one_layer(node.raw, index)
    keys: dict[str, str] = {"per_layer": "per_layer_config"} if raw is not node.raw else {}
    heads = _pick(raw, _heads_keys(raw, path), path, index, keys, "heads")
    heads = heads or _heads_by_other_means(raw, path, keys)
    ratio = _whole(raw.get("head_ratio"))
    if heads and ratio and ratio > 1:  # ConvBERT gives some of its heads to convolutions
        heads = tuple(max(1, count // ratio) for count in heads)
    kv = _implied_kv(raw, heads, index, keys) if heads else ()
    # Without multi-query attention the count that stands beside it is an unused default.
    unused = raw.get("multi_query") is False and not raw.get("new_decoder_architecture")
    kv = (
        kv or () if unused else kv or _pick(raw, _cross_first(_KV_HEADS, path), path, index, keys, "kv_heads")
    )
    if not heads and not kv:
        return None
    return Settings(
        source=node.source,
        node=node.name,
        model_type=str(raw.get("model_type", "")),
        heads=heads,
        kv_heads=kv,
        head_dims=()
        if keys.get("heads") == "attention_head_dim"
        else _pick(raw, _cross_first(_HEAD_DIMS, path), path, index, keys, "head_dim"),
        hidden=frozenset(_widths(raw)),
        raw=raw,
        keys=keys,
        listed=frozenset(_listed(raw)),
        affinity=_affinity(node.name, path),
    )


def _for_one_layer(raw: Mapping[str, Any], index: int | None) -> Mapping[str, Any]:
    """The node with what `per_layer_config` changes for this layer."""
    table = raw.get("per_layer_config")
    if not isinstance(table, Mapping) or index is None:
        return raw
    own = next(
        (v for k, v in table.items() if str(k).isdigit() and int(k) == index and isinstance(v, Mapping)), None
    )
    return {**raw, **own} if own else raw


def _heads_keys(raw: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """Keys that count heads, those that name a part of the path ("decoder_attention_heads") first."""
    # The module's own name (`encoder_attn`) says what it attends to, not where it stands.
    parent = path.rpartition(".")[0]
    sides = [
        key
        for key in raw
        if (match := _SIDE_HEADS.fullmatch(str(key))) and re.search(rf"(^|[._]){match['side']}", parent)
    ]
    sides.sort(key=lambda key: -len(key))
    segments = re.split(r"[._]", parent)
    if "decoder" in segments:
        sides += ["n_text_head"]
    elif "encoder" in segments:
        sides += ["n_audio_head"]
    return _cross_first((*sides, *_HEADS), path)


def _cross_first(names: tuple[str, ...], path: str) -> tuple[str, ...]:
    """A cross-attention may have counts of its own ("cross_num_key_value_heads")."""
    if "cross" not in path.rpartition(".")[2]:
        return names
    return (*(f"cross_{name}" for name in names), *names)


def _heads_by_other_means(raw: Mapping[str, Any], path: str, keys: dict[str, str]) -> tuple[int, ...]:
    """diffusers' UNets count heads under `attention_head_dim`, per block; open_clip gives width and head width."""
    value = raw.get("attention_head_dim")
    if str(raw.get("_class_name", "")).startswith("UNet") and value is not None:
        keys["heads"] = "attention_head_dim"
        if not isinstance(value, (list, tuple)):
            return (value,) if _whole(value) else ()
        block = re.search(r"(down|up)_blocks\.(\d+)|(mid)_block", path)
        if block is None:
            return ()
        position = (
            -1 if block[3] else (int(block[2]) if block[1] == "down" else len(value) - 1 - int(block[2]))
        )
        return (value[position],) if -1 <= position < len(value) and _whole(value[position]) else ()
    width, per_head = _whole(raw.get("width")), _whole(raw.get("head_width"))
    if width and per_head and width % per_head == 0:
        keys["heads"] = "head_width"
        return (width // per_head,)
    return ()


def _pick(
    raw: Mapping[str, Any],
    names: Sequence[str],
    path: str,
    index: int | None,
    keys: dict[str, str],
    what: str,
) -> tuple[int, ...]:
    """Every value that the keys give for this layer, the most trusted first; `keys` notes the first key."""
    found: list[int] = []
    for name in names:
        value = raw.get(name)
        if isinstance(value, (list, tuple)):
            value = _element(value, raw, path, index)
            keys.setdefault("per_layer", name)
        number = _whole(value)
        if number is not None and number > 0 and number not in found:
            found.append(number)
            keys.setdefault(what, name)
    return tuple(found)


def _element(values: Sequence[Any], raw: Mapping[str, Any], path: str, index: int | None) -> Any:
    """The entry of a list that holds for this layer: by layer, or by stage where the list counts stages."""
    numbers = [int(part) for part in re.split(r"[._]", path) if part.isdigit()]
    if not numbers or index is None:
        return None
    depths = next((raw[key] for key in _DEPTHS if isinstance(raw.get(key), (list, tuple))), None)
    by_stage = depths is not None and len(depths) == len(values)
    if by_stage and len(numbers) == 1 and depths is not None:
        end = 0
        for value, depth in zip(values, depths, strict=True):
            end += _whole(depth) or 0
            if index < end:
                return value
        return None
    position = numbers[0] if by_stage or (len(numbers) > 1 and _STAGES.search(path)) else index
    return values[position] if position < len(values) else None


def _implied_kv(
    raw: Mapping[str, Any], heads: tuple[int, ...], index: int | None, keys: dict[str, str]
) -> tuple[int, ...]:
    blocks = raw.get("block_configs")
    if isinstance(blocks, (list, tuple)) and index is not None and index < len(blocks):
        block = blocks[index]
        attention = block.get("attention") if isinstance(block, Mapping) else None
        group = _whole(attention.get("n_heads_in_group")) if isinstance(attention, Mapping) else None
        if group:
            keys["kv_heads"] = "block_configs"
            return (heads[0] // group,)
    if raw.get("multi_query") is True and not raw.get("new_decoder_architecture"):
        keys["kv_heads"] = "multi_query"
        return (1,)
    return ()


def _listed(raw: Mapping[str, Any]) -> Iterator[int]:
    """Every head count of a list per stage: layers between two stages may have the count of either."""
    for name in _HEADS:
        value = raw.get(name)
        if isinstance(value, (list, tuple)):
            yield from (number for item in value if (number := _whole(item)) is not None)


def _widths(raw: Mapping[str, Any]) -> Iterator[int]:
    for key, value in raw.items():
        if _WIDTH.search(str(key)):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                number = _whole(item)
                if number is not None:
                    yield number


def _affinity(node: str, path: str) -> int:
    """How well a tower's name fits a module path: its words found there; 0 for the root; -1 for another tower.

    The language tower often has no name of its own in a path: it fits wherever no other tower is named.
    """
    if not node:
        return 0
    words, segments = _words(node), _segments(path)
    found = [word for word in words if not _TOWERS.get(word, {word}).isdisjoint(segments)]
    if len(found) == len(words):
        return 2 * len(words) if words else 0
    missing = set(words) - set(found)
    rivals = set().union(*(names for tower, names in _TOWERS.items() if tower not in _LANGUAGE))
    if missing <= _LANGUAGE and rivals.isdisjoint(segments):
        return 2 * len(found) + 1
    return -1


def _words(node: str) -> list[str]:
    return [word for word in re.split(r"[._]", node.lower()) if word not in _NO_TOWER]


def _segments(path: str) -> list[str]:
    """Words of the modules around an attention; its own name (`encoder_attn_text`) says what it attends to."""
    return re.split(r"[._]", (path.rpartition(".")[0] or path).lower())


def _position(node: str, path: str) -> int:
    segments = _segments(path)
    names = set().union(*(_TOWERS.get(word, {word}) for word in _words(node)))
    return next((number for number, segment in enumerate(segments) if segment in names), len(segments))


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if value == value and abs(value) < 1e9 and int(value) == value else None


# --- tables -------------------------------------------------------------------------------------------

_MAX_DEPTH = 6
_NOT_A_MODEL = frozenset(
    {
        "quantization_config",
        "generation_config",
        "rope_scaling",
        "attn_config",
        "compression_config",
        "vq_config",
    }
)
# In order of trust: the first key present gives the default.
_HEADS = (
    "num_attention_heads_per_stage",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "num_query_heads",
    "n_audio_head",
    "n_text_head",
    "nhead",
    "nheads",
    "num_heads_q",
    "heads",
    "num_sliding_attention_heads",
    "swa_num_attention_heads",
    "head_count",
)
_KV_HEADS = (
    "num_key_value_heads",
    "n_kv_heads",
    "kv_n_heads",
    "num_kv_heads",
    "n_head_kv",
    "n_query_groups",
    "multi_query_group_num",
    "num_query_groups",
    "num_attention_groups",
    "num_key_value_heads_per_layer",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "num_sliding_key_value_heads",
)
_HEAD_DIMS = (
    "head_dim",
    "d_kv",
    "kv_channels",
    "attention_head_dim",
    "d_head",
    "head_width",
    "attention_head_size",
    "dim_head",
    "head_size",
    "attention_key_size",
    "global_head_dim",
    "swa_head_dim",
    "sliding_head_dim",
)
# Widths a projection may read: any of them shows that the node speaks of this tower.
_WIDTH = re.compile(r"hidden|d_model|n_embd|emb|width|(?<!head_)dim$|_state$|channels|ninp|embedding_length")
_SIDE_HEADS = re.compile(r"(?:num_)?(?P<side>[a-z_]{3,}?)_(?:num_)?(?:attention_heads|num_heads|n_heads?)")
_DEPTHS = ("depths", "blocks_per_stage", "num_block", "depth", "layers", "encoder_depths", "stage_depths")
_STAGES = re.compile(r"stages?\.\d+\.|layers\.\d+\.blocks\.\d+|layers_\d+\.|block\.\d+\.\d+")
_LANGUAGE = frozenset({"text", "llm", "language", "lm"})
_NO_TOWER = frozenset({"config", "cfg", "model", "thinker", "talker", "configs", "initargs", "args", "clip"})

_GGUF_KEYS = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "hidden_size": "embedding_length",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "sliding_window": "attention.sliding_window",
    "softmax_scale": "attention.scale",
    "clip_qkv": "attention.clamp_kqv",
    "qk_head_dim": "attention.key_length_mla",
    "v_head_dim_mla": "attention.value_length_mla",
}
_TOWERS: dict[str, set[str]] = {
    "vision": {"vision", "visual", "image", "vit", "img", "siglip", "clip", "vpm", "v"},
    "image": {"vision", "visual", "image", "vit", "img"},
    "audio": {"audio", "speech", "sound", "whisper", "apm"},
    "text": {"text", "language", "llm", "lm"},
    "encoder": {"encoder", "enc"},
    "decoder": {"decoder", "dec"},
    "qformer": {"qformer"},
    "backbone": {"backbone"},
    "projector": {"projector", "connector", "projection", "adapter", "adaptor", "resampler"},
    "adaptor": {"projector", "connector", "projection", "adapter", "adaptor", "resampler"},
}
