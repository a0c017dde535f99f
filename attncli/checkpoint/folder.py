"""A folder of weights → one `Contents`: index and shards, adapters, tensor-parallel ranks, configs beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from attncli.checkpoint import safetensors
from attncli.checkpoint.contents import Contents
from attncli.checkpoint.formats import FOLDER_FORMATS, read_file
from attncli.errors import CheckpointError, UnsupportedFormatError
from attncli.records import Anomaly, Array, Config


def read_folder(path: Path) -> Contents:
    """What the folder holds, by the first row that fits: an index, an adapter, ranks, shards, one file."""
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    for _, marker, read in FOLDER_FORMATS:
        if marker in names:
            return read(path)
    _refuse_foreign(path, names)
    index = next((n for pattern in _INDEXES for n in names if re.fullmatch(pattern, n)), None)
    if index is not None:
        return read_index(path / index)
    ranks = [n for n in names if re.fullmatch(r"consolidated\.\d+\.pth", n)]
    if ranks:
        return _read_ranks(path, ranks)
    for pattern, label in _WEIGHTS:
        found = [n for n in names if re.fullmatch(pattern, n)]
        if found:
            return _read_set(path, found, label)
    return _read_components(path, names)


def read_index(path: Path) -> Contents:
    """The shards that an index names; where headers and index disagree, anomalies."""
    folder = path.parent
    index = _json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(
            str(path),
            "the index holds no weight_map from tensor to file.",
            "Download the index again, or remove it so that the shards are read by themselves.",
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                str(path),
                f"the index points tensor {name!r} at {shard!r}, outside its own folder.",
                "Do not use this index: it was tampered with, or written by a broken tool.",
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise missing_shards(path, missing, len(shards))
    parts = [_read_shard(folder, shard) for shard in shards]
    whole = _merge(folder, parts, f"sharded {parts[0].format}")
    return replace(
        whole, anomalies=(*whole.anomalies, *_disagreements(folder, weight_map, whole.arrays, shards))
    )


def missing_shards(path: Path, missing: Sequence[str], total: int) -> CheckpointError:
    """The error for shards that are named somewhere but are not there."""
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return CheckpointError(
        str(path),
        f"{len(missing)} of {total} files it names are missing: {listed}.",
        "Download the missing files into the same folder.",
    )


def configs_beside(folder: Path) -> tuple[tuple[Config, ...], tuple[Anomaly, ...]]:
    """config.json and its kin in `folder`, the most trusted first."""
    configs: list[Config] = []
    anomalies: list[Anomaly] = []
    for name in _CONFIG_FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            configs.append(Config(name, _json(file)))
        except CheckpointError as error:
            anomalies.append(Anomaly("unreadable-config", name, {"problem": error.problem}))
    for config in list(configs):
        base = (
            config.values.get("base_model_name_or_path") if config.source == "adapter_config.json" else None
        )
        if isinstance(base, str) and (folder / base / "config.json").is_file():
            configs.append(Config("config.json of the base model", _json(folder / base / "config.json")))
    return tuple(configs), tuple(anomalies)


# --- kinds of folders ---------------------------------------------------------------------------------


def _read_set(folder: Path, names: Sequence[str], label: str) -> Contents:
    if label == "GGUF":
        first = {re.sub(r"-\d{5}-of-\d{5}", "", name) for name in names if not name.startswith("mmproj")}
        if len(first) > 1:
            raise _which(folder, names)
        return read_file(folder / next(n for n in names if not n.startswith("mmproj")))
    if label in ("torch file", "npz") and len(names) > 1 and not all(_SHARD.search(n) for n in names):
        canonical = [
            n for n in names if n in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "model.pth")
        ]
        if len(canonical) != 1:
            raise _which(folder, names)
        names = canonical
    if label == "safetensors" and len(names) > 1:
        canonical = [
            n
            for n in names
            if n in ("model.safetensors", "adapter_model.safetensors", "diffusion_pytorch_model.safetensors")
        ]
        shards = [n for n in names if _SHARD.search(n)]
        names = shards if shards and not canonical else (canonical or names)
    _check_numbering(folder, names)
    parts = [_read_shard(folder, name) for name in names]
    return parts[0] if len(parts) == 1 else _merge(folder, parts, f"sharded {parts[0].format}")


def _read_shard(folder: Path, name: str) -> Contents:
    file = folder / name
    part = safetensors.read(file) if name.endswith(".safetensors") else read_file(file)
    if "/" not in name:
        return part
    parent = str(PurePosixPath(name).parent)
    moved = tuple(replace(array, file=f"{parent}/{array.file}") for array in part.arrays)
    return replace(
        part, root=str(folder), arrays=moved, files=tuple(f"{parent}/{file}" for file in part.files)
    )


def _read_ranks(folder: Path, names: Sequence[str]) -> Contents:
    """Meta's tensor-parallel files: the same names in each, split along the axis that the layer's kind gives."""
    parts = [_read_shard(folder, name) for name in names]
    whole = _merge(folder, parts, "Meta consolidated", ranks=True)
    if len(parts) == 1:
        return whole
    arrays = []
    for array in parts[0].arrays:
        axis = next((axis for pattern, axis in _RANK_AXES if re.search(pattern, array.name)), None)
        if axis is None or axis >= len(array.shape):
            arrays.append(array)
            continue
        shape = tuple(
            size * len(parts) if number == axis else size for number, size in enumerate(array.shape)
        )
        # The rows are spread over files, so no single offset holds them.
        arrays.append(Array(array.name, shape, array.dtype, array.file, None, array.size_bytes * len(parts)))
    return replace(whole, arrays=tuple(arrays))


def _read_components(path: Path, names: Sequence[str]) -> Contents:
    """A pipeline: each subfolder with weights and a config of its own is one component, prefixed by its name."""
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    with_weights = [f for f in folders if _holds_weights(f)]
    if "model_index.json" in names and with_weights:
        parts = []
        for folder in with_weights:
            part = read_folder(folder)
            own, _ = configs_beside(folder)
            nested = tuple(
                Config(f"{folder.name}/{c.source}", {f"{folder.name}_config": c.values}) for c in own
            )
            parts.append(
                replace(
                    part,
                    root=str(path),
                    files=tuple(f"{folder.name}/{file}" for file in part.files),
                    configs=nested,
                    arrays=tuple(
                        replace(a, name=f"{folder.name}.{a.name}", file=f"{folder.name}/{a.file}")
                        for a in part.arrays
                    ),
                )
            )
        return _merge(path, parts, "diffusers pipeline")
    if with_weights:
        listed = ", ".join(f.name for f in with_weights[:6])
        raise CheckpointError(
            str(path),
            "the folder itself holds no weights, but subfolders do.",
            f"Give one of them: {listed}.",
        )
    held = (
        f"{len(names)} files ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        if names
        else "no files"
    )
    raise CheckpointError(
        str(path),
        f"the folder holds {held}, and none of them are weights.",
        "Expected *.safetensors, *.gguf, pytorch_model*.bin, *.pt, *.pth, *.ckpt, *.npz, or a distributed checkpoint.",
    )


def _holds_weights(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()]
    return (
        any(re.fullmatch(pattern, name) for name in names for pattern, _ in _WEIGHTS) or ".metadata" in names
    )


def _refuse_foreign(path: Path, names: Sequence[str]) -> None:
    entries = {entry.name for entry in path.iterdir()}
    if any(re.fullmatch(pattern, name) for name in names for pattern, _ in _WEIGHTS):
        return
    for markers, name, remedy in _FOREIGN_FOLDERS:
        if any(re.fullmatch(marker, entry) for entry in entries for marker in markers):
            raise UnsupportedFormatError(str(path), f"this is {name}, which attncli does not read.", remedy)


# --- merging ------------------------------------------------------------------------------------------


def _merge(folder: Path, parts: Sequence[Contents], label: str, *, ranks: bool = False) -> Contents:
    arrays: dict[str, Array] = {}
    anomalies: list[Anomaly] = [a for part in parts for a in part.anomalies]
    excluded: dict[str, int] = {}
    for part in parts:
        for array in part.arrays:
            first = arrays.setdefault(array.name, array)
            if first is not array and not ranks:
                anomalies.append(Anomaly("duplicate-tensor", array.name, {"files": [first.file, array.file]}))
        for what, count in part.excluded.items():
            excluded[what] = excluded.get(what, 0) + count
    return Contents(
        format=label,
        root=str(folder),
        files=tuple(file for part in parts for file in part.files),
        arrays=tuple(arrays.values()),
        configs=tuple(config for part in parts for config in part.configs),
        excluded=excluded,
        anomalies=tuple(anomalies),
    )


def _disagreements(
    folder: Path, weight_map: Mapping[str, str], arrays: Iterable[Array], shards: Sequence[str]
) -> list[Anomaly]:
    lying = {array.name: array.file for array in arrays}
    found = []
    for name, shard in weight_map.items():
        if name not in lying:
            found.append(Anomaly("missing-tensor", name, {"file": shard}))
        elif lying[name] != shard:
            found.append(Anomaly("wrong-shard", name, {"index": shard, "file": lying[name]}))
    for name, file in lying.items():
        if name not in weight_map:
            found.append(Anomaly("stray-tensor", name, {"file": file}))
    stem = _SHARD.sub("", shards[0])
    for entry in sorted(folder.iterdir()):
        if _SHARD.search(entry.name) and _SHARD.sub("", entry.name) == stem and entry.name not in shards:
            found.append(Anomaly("stray-file", entry.name, {"shards": len(shards)}))
    return found


def _check_numbering(folder: Path, names: Sequence[str]) -> None:
    """`x-00001-of-00003` promises three files."""
    numbered = [match for name in names if (match := _SHARD.search(name))]
    if not numbered or len(numbered) != len(names):
        return
    total = int(numbered[0].group(2))
    here = {int(match.group(1)) for match in numbered}
    expected = range(0, total) if 0 in here else range(1, total + 1)
    width = len(numbered[0].group(1))
    if total <= 100_000:
        missing = [number for number in expected if number not in here]
        if missing:
            pattern = names[0][: numbered[0].start(1)]
            tail = names[0][numbered[0].end(1) :]
            raise missing_shards(folder, [f"{pattern}{number:0{width}d}{tail}" for number in missing], total)


def _which(folder: Path, names: Sequence[str]) -> CheckpointError:
    listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return CheckpointError(
        str(folder),
        f"the folder holds {len(names)} checkpoints and no index that joins them: {listed}.",
        "Name one of them.",
    )


def _stays_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return (
        bool(name)
        and not pure.is_absolute()
        and ".." not in pure.parts
        and "\\" not in name
        and "\0" not in name
        and ":" not in name
    )


def _json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(
            str(path),
            f"{size} bytes of JSON are more than the {_MAX_JSON_BYTES} that attncli reads.",
            "Check that this is the right file.",
        )
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            str(path), f"the file is not valid JSON ({error}).", "Download or write it again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "the JSON is no object.", "Download or write it again.")
    return value


# --- tables -------------------------------------------------------------------------------------------

_MAX_JSON_BYTES = 256_000_000
_SHARD = re.compile(r"-(\d{5,6})-of-(\d{5,6})")
_CONFIG_FILES = (
    "config.json",
    "params.json",
    "adapter_config.json",
    "quantize_config.json",
    "model_args.json",
)
# Weights in order of preference; a folder that holds several kinds of the same model is read once.
_INDEXES = (
    r"model\.safetensors\.index\.json",
    r".*\.safetensors\.index\.json",
    r"pytorch_model\.bin\.index\.json",
    r".*\.(bin|pt|pth)\.index\.json",
)
_WEIGHTS: tuple[tuple[str, str], ...] = (
    (r"adapter_model\.safetensors", "safetensors"),
    (r"(?!consolidated).*\.safetensors", "safetensors"),
    (r".*\.safetensors", "safetensors"),
    (r".*\.gguf", "GGUF"),
    (r"adapter_model\.bin", "torch file"),
    (r"pytorch_model.*\.bin", "torch file"),
    (
        r"(?!training_args|optimizer|scheduler|rng_state|random_states|scaler).*\.(pt|pth|ckpt|bin|pt2)",
        "torch file",
    ),
    (r".*\.npz", "npz"),
)
_FOREIGN_FOLDERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (r"_METADATA", r"_CHECKPOINT_METADATA", r"manifest\.ocdbt"),
        "an Orbax checkpoint (JAX)",
        "Restore it with orbax and save the parameters with safetensors.flax.save_file.",
    ),
    ((r"saved_model\.pb",), "a TensorFlow SavedModel", "Convert it to a PyTorch or safetensors checkpoint."),
    (
        (r".*\.ckpt\.index", r".*\.data-\d+-of-\d+", r"checkpoint\.index"),
        "a TensorFlow checkpoint",
        "Convert it to a PyTorch or safetensors checkpoint.",
    ),
    (
        (r"flax_model\.msgpack",),
        "a Flax checkpoint (msgpack)",
        "Convert it: load with from_flax=True in transformers and save_pretrained.",
    ),
    (
        (r"tf_model\.h5",),
        "a TensorFlow checkpoint (HDF5)",
        "Convert it: load with from_tf=True in transformers and save_pretrained.",
    ),
    (
        (r"zero_to_fp32\.py", r"zero_pp_rank_.*"),
        "a DeepSpeed ZeRO checkpoint",
        "Run the zero_to_fp32.py beside it, and give the file it writes.",
    ),
    (
        (r".*\.onnx",),
        "an ONNX model",
        "Give the PyTorch checkpoint that it was exported from; its graph renames the weights.",
    ),
    (
        (r"openvino_model\.xml",),
        "an OpenVINO model",
        "Give the PyTorch checkpoint that it was converted from.",
    ),
)
# How Meta's tensor-parallel ranks split each weight: column-parallel on axis 0, row-parallel and embeddings on 1.
_RANK_AXES: tuple[tuple[str, int], ...] = (
    (r"\.(wq|wk|wv|w1|w3)\.weight$|(^|\.)output\.weight$", 0),
    (r"\.(wo|w2)\.weight$|tok_embeddings\.weight$", 1),
)
