"""What a layer reads, and so what an argument must look like: ids below a vocabulary, features of a width, images.

Shapes: B batch, N positions, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attncli.errors import ModelError
from attncli.model.contracts import Draw
from attncli.model.signature import Parameter, Reader, rank, readers


class Found(NamedTuple):
    """A value for an argument, and what to say about it."""

    value: Any
    note: str = ""


def read_by(module: Any, item: Parameter, draw: Draw, batch: int, length: int) -> Found | None:
    """The argument as the layers want it that read it; None where the code does not show one."""
    if _IMAGE.search(item.name.lower()):
        pixels = _pixels(module, draw, batch)
        if pixels is not None:
            return Found(pixels)
    own = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    found = [Reader(module, item.name)] if own else readers(module, item.name)
    for reader in found:
        value = layer_input(module, reader, draw, batch, length)
        if value is not None:
            if rank(module, item.name) == 2 and value.dim() == 3:
                value = value[:, 0]
            return Found(value)
    return None


def by_name(module: Any, item: Parameter, draw: Draw, batch: int, length: int) -> Found | None:
    """The argument as its name or annotation tells it."""
    name, annotation = item.name.lower(), item.annotation
    if re.search(r"\bbool\b", annotation):
        return Found(False)
    if _MASK.search(name):
        if name == "attention_mask":
            return Found(torch.ones(batch, length, dtype=torch.long))
        return Found(None, f"{item.name} was given as None")
    if _CACHE.search(name) or "None" in annotation or "Optional" in annotation:
        return Found(None, f"{item.name} was given as None")
    if name in ("start_pos", "offset", "past_length"):
        return Found(0)
    if name in ("position_ids", "positions", "pos_ids"):
        return Found(torch.arange(length).expand(batch, length))
    if name in ("t", "timestep", "timesteps", "time_step"):
        return Found(draw.ids((batch,), 1000))
    ids = _IDS.search(name) or re.search(r"LongTensor|IntTensor|\bInt\[", annotation)
    size = vocabulary(module)
    if ids and size:
        return Found(draw.ids((batch, length), size))
    width = setting(module, _CROSS_WIDTHS) if name == "encoder_hidden_states" else None
    width = width or _width(module)
    if not _FEATURES.search(name):
        return None
    if width:
        return Found(draw.floats(batch, length, width))
    if not any(True for _ in (*module.parameters(), *module.buffers())):
        heads = (4,) if rank(module, item.name) == 4 else ()
        note = f"no layer fixes a width: {FREE_WIDTH} was taken"
        return Found(draw.floats(batch, *heads, length, FREE_WIDTH), note)
    return None


def first_layer(module: Any, draw: Draw, batch: int, length: int) -> Found | None:
    """The only tensor of a forward, as the first layer wants it that was registered."""
    for name, child in module.named_modules() if hasattr(module, "named_modules") else ():
        if any(True for _ in child.children()) and not _is_whole(child):
            continue
        if _POSITION.search(name):
            continue
        value = layer_input(module, Reader(child), draw, batch, length)
        if value is not None:
            return Found(value)
    return None


def layer_input(module: Any, reader: Reader, draw: Draw, batch: int, length: int) -> Tensor | None:
    """What one layer reads at one place of its call; None for a layer that is not known."""
    layer, place = reader.module, reader.place
    shape: tuple[int, ...] = (batch, length)
    size = _embeddings(layer)
    if size is not None:
        return draw.ids(shape, size)
    width = _attention_width(layer, place)
    if width is not None:
        first = getattr(layer, "batch_first", None)
        if first is None:
            first = getattr(_first_attention(layer), "batch_first", True)
        return draw.floats(*(shape if first else shape[::-1]), width)
    axes = _convolution_axes(layer)
    if axes is not None:
        channels = getattr(layer, "in_channels", None) or layer.weight.shape[1]
        if axes == 2:
            side = image_side(module, layer)
            return draw.floats(batch, channels, side, side)
        return draw.floats(batch, channels, *((length,) if axes == 1 else (8, 64, 64)))
    features = _features(layer)
    return draw.floats(*shape, *features) if features is not None else None


def vocabulary(module: Any) -> int | None:
    """Rows of the first embedding that is none of positions; None without one."""
    sizes = {
        name: size
        for name, child in (module.named_modules() if hasattr(module, "named_modules") else ())
        if (size := _embeddings(child)) is not None
    }
    tokens = [size for name, size in sizes.items() if not _POSITION.search(name)]
    return tokens[0] if tokens else next(iter(sizes.values()), None)


def length_limit(module: Any) -> int | None:
    """The number of positions that the module was made for; None where nothing says so."""
    config = getattr(module, "config", None)
    settings = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    limits = [settings[name] for name in _LENGTHS if isinstance(settings.get(name), int)]
    room = positions(module)
    return min([*limits, room] if room is not None else limits, default=None)


def positions(module: Any) -> int | None:
    """Rows of the smallest table of positions, or side of the smallest stored mask: no text can be longer."""
    if not isinstance(module, nn.Module):
        return None
    limits = []
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or _ELSEWHERE.search(name):
            continue
        sizes = [size for size in tensor.shape[:-1] if size > 1]
        square = tensor.shape[-1] == tensor.shape[-2] > 1 and _MASK.search(name.rpartition(".")[2])
        if square:
            limits.append(tensor.shape[-1])
        elif _POSITION.search(name) and len(sizes) == 1:
            limits.append(sizes[0])
    return min(limits, default=None)


def refuse_longer(seq_len: int | None, limit: int | None) -> None:
    """Errors: ModelError where the user asks for more positions than there are."""
    if seq_len is not None and limit is not None and seq_len > limit:
        problem = f"the model has room for {limit} positions."
        raise ModelError(f"--seq-len {seq_len}", problem, f"Ask for {limit} or fewer.")


def image_side(module: Any, patch: Any) -> int:
    """Pixels of an image's side: from the number of learned positions where patches do not overlap, else 224."""
    told = setting(module, ("image_size", "img_size", "sample_size"))
    if told:
        return told
    kernel = getattr(patch, "kernel_size", None) or tuple(patch.weight.shape[2:])
    stride = getattr(patch, "stride", kernel)
    if tuple(kernel) == tuple(stride) and kernel[0] > 1:
        for name, tensor in module.named_parameters():
            if _POSITION.search(name) and tensor.dim() >= 2 and tensor.shape[-1] == patch.weight.shape[0]:
                count = tensor.numel() // tensor.shape[-1]
                for extra in (0, 1, 2):
                    side = math.isqrt(max(count - extra, 0))
                    if side > 1 and side * side == count - extra:
                        return side * int(kernel[0])
    return 224


def _pixels(module: Any, draw: Draw, batch: int) -> Tensor | None:
    """Images for a model that cuts them into patches itself and reads those with a Linear."""
    side, patch = setting(module, ("image_size",)), setting(module, ("patch_size",))
    if patch and not side:
        cells = positions(module) or 0
        side = next(
            (math.isqrt(n) * patch for n in (cells, cells - 1) if n > 0 and math.isqrt(n) ** 2 == n), None
        )
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Linear)), None)
    if not side or not patch or first is None or first.in_features % patch**2:
        return None
    return draw.floats(batch, first.in_features // patch**2, side, side)


def setting(module: Any, names: tuple[str, ...]) -> int | None:
    """A whole number that the module or its config holds under one of the names."""
    config = getattr(module, "config", None)
    for name in names:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        for value in (found, getattr(module, name, None)):
            if isinstance(value, int) and value > 0:
                return value
    return None


# --- one layer ----------------------------------------------------------------------------------------


def _kind(layer: Any) -> str:
    return str(getattr(layer, "original_name", type(layer).__name__))


def _weight(layer: Any) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _embeddings(layer: Any) -> int | None:
    size = getattr(layer, "num_embeddings", None)
    if isinstance(size, int):
        return size
    weight = _weight(layer)
    return weight.shape[0] if weight is not None and _kind(layer) in ("Embedding", "EmbeddingBag") else None


def _first_attention(layer: Any) -> Any:
    """The attention in torch's own transformer layers and stacks."""
    if isinstance(layer, nn.Transformer):
        return _first_attention(layer.encoder)
    if isinstance(layer, (nn.TransformerEncoder, nn.TransformerDecoder)):
        layer = layer.layers[0]
    if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return layer.self_attn
    return None


def _attention_width(layer: Any, place: int | str) -> int | None:
    """The width of what torch's own attention and recurrent layers read at that place."""
    if isinstance(layer, nn.MultiheadAttention):
        widths: dict[int | str, int] = {0: layer.embed_dim, 1: layer.kdim or 0, 2: layer.vdim or 0}
        widths.update(query=widths[0], key=widths[1], value=widths[2])
        return widths.get(place)
    if isinstance(layer, nn.RNNBase):
        return layer.input_size if place in (0, "input") else None
    attention = _first_attention(layer)
    if attention is None or place not in (0, 1, "src", "tgt", "memory"):
        return None
    return int(attention.embed_dim)


def _convolution_axes(layer: Any) -> int | None:
    match = re.fullmatch(r"(?:Lazy)?Conv([123])d", _kind(layer))
    return int(match.group(1)) if match else None


def _features(layer: Any) -> tuple[int, ...] | None:
    shape = getattr(layer, "normalized_shape", None)
    if shape:
        return tuple(shape)
    width = getattr(layer, "in_features", None)
    if isinstance(width, int) and width > 0:
        return (width,)
    weight = _weight(layer)
    if weight is None:
        return None
    if weight.dim() == 1 and "Norm" in _kind(layer):
        return tuple(weight.shape)
    if weight.dim() == 2:
        if _kind(layer) == "Linear":
            return (weight.shape[1],)
        if hasattr(layer, "nx"):
            return (weight.shape[0],)  # transformers' Conv1D keeps [in, out]
    return None


def _is_whole(layer: Any) -> bool:
    """A layer with children that is known as a whole."""
    return isinstance(layer, nn.MultiheadAttention) or _first_attention(layer) is not None


def _width(module: Any) -> int | None:
    """The one width that all projections of a module read; None where they differ."""
    found: set[int] = set()
    for child in module.modules() if hasattr(module, "modules") else ():
        if isinstance(child, nn.MultiheadAttention):
            return int(child.embed_dim)
        features = _features(child)
        if features is not None and len(features) == 1 and not _embeddings(child):
            found.add(features[0])
    return found.pop() if len(found) == 1 else None


# What a forward without a single parameter is given: any width is right there.
FREE_WIDTH = 64
_IMAGE = re.compile(r"^(img|image|images|pixels|pixel_values)$")
_CROSS_WIDTHS = ("cross_attention_dim", "joint_attention_dim", "caption_channels", "encoder_hid_dim")
_IDS = re.compile(r"(^|_)(ids?|idx|tokens?|indices|src|tgt|source|target)$|^(input_ids|tokens|idx)")
_MASK = re.compile(r"mask|^(tril|triu|causal|bias)$")
_CACHE = re.compile(r"past_key|cache")
_FEATURES = re.compile(
    r"^(x|y|z|h|q|k|v|query|key|value|queries|keys|values|src|tgt|memory|context|hidden|inputs?|embeds?|"
    r"embeddings|features|encoder_outputs?|encoder_hidden(_states)?|decoder_hidden|hidden_states)$"
)
_POSITION = re.compile(
    r"(^|[._])(\w*pos(ition)?(al|s)?(_?(emb\w*|enc\w*|ids?))?|wpe|pe|rope|rotary\w*)($|[._])"
)
# Tables that bound something else than the length of a text.
_ELSEWHERE = re.compile(r"rel|dist|2d|(^|[._])[xywh]_pos|vision|visual|image|audio|speech|patch")
_LENGTHS = (
    "block_size",
    "max_seq_len",
    "max_position_embeddings",
    "n_positions",
    "context_length",
    "max_len",
)
