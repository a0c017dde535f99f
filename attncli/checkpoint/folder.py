"""A folder of weights → one `Contents`: index and shards, adapters, tensor-parallel ranks, configs beside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
    label, weights = _weights(names)
    for index in (n for pattern in _INDEXES for n in names if _fits(pattern, n)):
        if label == "safetensors" and ".safetensors." not in index.lower():
            continue  # as loaders do: safetensors first, however the torch files beside them are split
        weight_map = _weight_map(path / index)
        # Downloads by pattern leave indexes behind whose shards were never wanted.
        if not weights or any((path / shard).is_file() for shard in set(weight_map.values())):
            return _read_mapped(path / index, weight_map)
    ranks = [n for n in names if _fits(r"consolidated\.\d+\.pth", n)]
    if ranks and label != "safetensors":
        return _read_ranks(path, ranks)
    if weights:
        return _read_set(path, weights, label)
    return _read_components(path, names)


def read_index(path: Path) -> Contents:
    """The shards that an index names; where headers and index disagree, anomalies."""
    return _read_mapped(path, _weight_map(path))


def _weight_map(path: Path) -> Mapping[str, str]:
    index = _json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(
            str(path),
            "the index holds no weight_map from tensor to file.",
            "Download the index again, or remove it so that the shards are read by themselves.",
        )
    inside = {shard for shard in weight_map.values() if isinstance(shard, str)}
    inside = {shard for shard in inside if _stays_inside(shard)}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard not in inside:
            raise CheckpointError(
                str(path),
                f"the index points tensor {name!r} at {shard!r}, outside its own folder.",
                "Do not use this index: it was tampered with, or written by a broken tool.",
            )
    return weight_map


def _read_mapped(path: Path, weight_map: Mapping[str, str]) -> Contents:
    folder = path.parent
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise missing_shards(path, missing, len(shards))
    parts = [_read_shard(folder, shard) for shard in shards]
    whole = _merge(folder, parts, f"sharded {parts[0].format}", weight_map)
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


def configs_beside(folder: Path, file: str = "") -> tuple[tuple[Config, ...], tuple[Anomaly, ...]]:
    """config.json and its kin in `folder`, the most trusted first: for `weights.pt`, `weights.json` before all."""
    configs: list[Config] = []
    anomalies: list[Anomaly] = []
    own = () if not file or file.endswith(".json") else (f"{Path(file).stem}.json",)
    for name in dict.fromkeys((*own, *_CONFIG_FILES)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            configs.append(Config(name, _json(path)))
        except CheckpointError as error:
            anomalies.append(Anomaly("unreadable-config", name, {"problem": error.problem}))
        except OSError as error:
            problem = f"it cannot be read ({error.strerror or error})."
            anomalies.append(Anomaly("unreadable-config", name, {"problem": problem}))
    adapter = next((config for config in configs if config.source == "adapter_config.json"), None)
    base = adapter.values.get("base_model_name_or_path") if adapter else None
    if isinstance(base, str):
        # Where the base model is not here or not readable, the adapter still is.
        with suppress(CheckpointError, OSError):
            path = folder / base / "config.json"
            if path.is_file():
                configs.append(Config("config.json of the base model", _json(path)))
    return tuple(configs), tuple(anomalies)


# --- kinds of folders ---------------------------------------------------------------------------------


def _read_set(folder: Path, names: Sequence[str], label: str) -> Contents:
    if label == "GGUF":
        return _read_gguf(folder, names)
    canonical = [n for n in names if n.lower() in _CANONICAL]
    shards = [n for n in names if _SHARD.search(n)]
    if len(names) == 1 or len(canonical) == 1:
        names = canonical or names
    elif shards:
        numbers = {_SHARD.findall(n)[0] for n in shards}
        if len({total for _, total in numbers}) > 1 or len(numbers) < len(shards):
            raise _which(folder, shards)
        names = shards
    elif label == "torch file":
        raise _which(folder, names)
    _check_numbering(folder, names)
    parts = [_read_shard(folder, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    whole = _merge(folder, parts, f"sharded {parts[0].format}")
    if not shards and any(anomaly.kind == "duplicate-tensor" for anomaly in whole.anomalies):
        raise _which(folder, names)
    return whole


def _read_gguf(folder: Path, names: Sequence[str]) -> Contents:
    """One model, however split. Its vision or audio tower, in a file of its own, is counted and left out:
    both files give their heads under the same keys."""
    projectors = [n for n in names if "mmproj" in n.lower()]
    models = [n for n in names if n not in projectors]
    if len({re.sub(r"-\d{5}-of-\d{5}", "", name) for name in models or projectors}) > 1:
        raise _which(folder, models or projectors)
    model, *others = (read_file(folder / found[0]) for found in (models, projectors) if found)
    left_out = sum(len(part.arrays) for part in others)
    return replace(model, excluded={**model.excluded, "projector (mmproj)": left_out}) if others else model


def _read_shard(folder: Path, name: str) -> Contents:
    file = folder / name
    try:
        part = safetensors.read(file) if name.endswith(".safetensors") else read_file(file)
    except CheckpointError:
        # By its bytes it may be something else: most often a Git LFS pointer.
        part = read_file(file)
    if "/" not in name:
        return part
    parent = str(PurePosixPath(name).parent)
    moved = tuple(replace(array, file=f"{parent}/{array.file}") for array in part.arrays)
    return replace(
        part, root=str(folder), arrays=moved, files=tuple(f"{parent}/{file}" for file in part.files)
    )


def _read_ranks(folder: Path, names: Sequence[str]) -> Contents:
    """Meta's tensor-parallel files: the same names in each, split along the axis that the layer gives."""
    numbers = {int(name.split(".")[1]): name for name in names}
    absent = [f"consolidated.{n:02d}.pth" for n in range(max(numbers)) if n not in numbers]
    if absent:
        raise missing_shards(folder, absent, max(numbers) + 1)
    parts = [_read_shard(folder, numbers[number]) for number in sorted(numbers)]
    whole = _merge(folder, parts, "Meta consolidated", ranks=True)
    if len(parts) == 1:
        return whole
    held = [{array.name: array for array in part.arrays} for part in parts]
    width = next((a.shape[0] for a in whole.arrays if re.search(r"(^|\.)norm\.weight$", a.name)), None)
    arrays: list[Array] = []
    anomalies: list[Anomaly] = []
    for array in whole.arrays:
        pieces = [rank[array.name] for rank in held if array.name in rank]
        for part, rank in zip(parts, held, strict=True):
            if array.name not in rank:
                anomalies.append(Anomaly("missing-tensor", array.name, {"file": part.files[0]}))
        axis = _rank_axis(array, width)
        if axis is None or len({(*p.shape[:axis], *p.shape[axis + 1 :]) for p in pieces}) > 1:
            arrays.append(array)
            continue
        total = sum(piece.shape[axis] for piece in pieces)
        shape = (*array.shape[:axis], total, *array.shape[axis + 1 :])
        # The rows are spread over files, so no single offset holds them.
        size = sum(piece.size_bytes for piece in pieces)
        arrays.append(Array(array.name, shape, array.dtype, array.file, None, size))
    return replace(whole, arrays=tuple(arrays), anomalies=(*whole.anomalies, *anomalies))


def _rank_axis(array: Array, width: int | None) -> int | None:
    """The axis along which ranks split this tensor; None where each rank holds all of it."""
    axis = next((axis for pattern, axis in _RANK_AXES if re.search(pattern, array.name)), None)
    if axis == 1 and "tok_embeddings" in array.name and array.shape[1:] == (width,):
        axis = 0  # Llama 3 splits the vocabulary, Llama 1 and 2 split the width
    return axis if axis is not None and axis < len(array.shape) else None


def _read_components(path: Path, names: Sequence[str]) -> Contents:
    """A pipeline: each subfolder with weights is one component, and its name a prefix."""
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
    below = _below_with_weights(path)
    if below:
        raise CheckpointError(
            str(path),
            "the folder itself holds no weights, but folders below it do.",
            f"Give one of them: {', '.join(below)}.",
        )
    dangling = [e.name for e in path.iterdir() if e.is_symlink() and not e.exists() and _weights([e.name])[1]]
    if dangling:
        raise CheckpointError(
            str(path / min(dangling)), "this is a link to a file that is not there.", FETCH_AGAIN
        )
    listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    raise CheckpointError(
        str(path),
        f"the folder holds {len(names)} files ({listed}), and none of them are weights."
        if names
        else "the folder holds no files.",
        "Expected *.safetensors, *.gguf, pytorch_model*.bin, *.pt, *.pth, *.ckpt, *.npz, or a distributed "
        "checkpoint.",
    )


def _holds_weights(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return bool(_weights(names)[1]) or any(marker in names for _, marker, _ in FOLDER_FORMATS)


def _below_with_weights(path: Path) -> list[str]:
    """Some folders with weights below this one, e.g. snapshots/REVISION in a download cache."""
    found: list[str] = []
    for visited, (folder, below, _) in enumerate(os.walk(path)):
        inner = Path(folder).relative_to(path)
        if _holds_weights(Path(folder)):
            found.append(inner.as_posix())
        deeper = len(inner.parts) < _MAX_DEPTH
        below[:] = sorted(name for name in below if deeper and not name.startswith("."))
        if len(found) >= 6 or visited >= _MAX_FOLDERS:
            break
    return found


def _weights(names: Sequence[str]) -> tuple[str, list[str]]:
    """The most preferred kind of weights among these names: its label and its files; none: "", []."""
    for pattern, label in _WEIGHTS:
        found = [n for n in names if _fits(pattern, n)]
        if found:
            return label, found
    return "", []


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name, re.IGNORECASE | re.DOTALL) is not None


def _refuse_foreign(path: Path, names: Sequence[str]) -> None:
    entries = {entry.name for entry in path.iterdir()}
    if _weights(names)[1]:
        return
    for markers, name, remedy in _FOREIGN_FOLDERS:
        if any(_fits(marker, entry) for entry in entries for marker in markers):
            raise UnsupportedFormatError(str(path), f"this is {name}, which attncli does not read.", remedy)


# --- merging ------------------------------------------------------------------------------------------


def _merge(
    folder: Path,
    parts: Sequence[Contents],
    label: str,
    weight_map: Mapping[str, str] | None = None,
    *,
    ranks: bool = False,
) -> Contents:
    """All parts as one. Of a tensor in several files, the one where `weight_map` says, or the first."""
    arrays: dict[str, Array] = {}
    anomalies: list[Anomaly] = [a for part in parts for a in part.anomalies]
    excluded: dict[str, int] = {}
    for part in parts:
        for array in part.arrays:
            first = arrays.setdefault(array.name, array)
            if first is not array and not ranks:
                anomalies.append(Anomaly("duplicate-tensor", array.name, {"files": [first.file, array.file]}))
                if weight_map and weight_map.get(array.name) == array.file:
                    arrays[array.name] = array
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
    known = set(shards)
    found.extend(
        Anomaly("stray-file", name, {"shards": len(shards)})
        for name in sorted(entry.name for entry in folder.iterdir())
        if _SHARD.search(name) and _SHARD.sub("", name) == stem and name not in known
    )
    return found


def _check_numbering(folder: Path, names: Sequence[str]) -> None:
    """`x-00001-of-00003` promises three files."""
    numbered = [match for name in names if (match := _SHARD.search(name))]
    if not numbered or len(numbered) != len(names):
        return
    total = int(numbered[0].group(2))
    here = {int(match.group(1)) for match in numbered}
    expected = range(total) if 0 in here else range(1, total + 1)
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
FETCH_AGAIN = "Fetch what it points to again, or copy the folder with its links followed (cp -rL)."
# How far an error message looks for weights below a folder that has none.
_MAX_DEPTH = 4
_MAX_FOLDERS = 200
_SHARD = re.compile(r"-(\d{5,6})-of-(\d{5,6})")
_CONFIG_FILES = (
    "config.json",
    "params.json",
    "adapter_config.json",
    "quantize_config.json",
    "model_args.json",
)
# What several files are, of which this one alone is the model.
_CANONICAL = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
    "model.pt",
    "model.pth",
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
        r"(?!training_args|optimizer|scheduler|rng_state|random_states|scaler|openvino_|\w*zero_pp_rank_)"
        r".*\.(pt|pth|ckpt|bin|pt2)",
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
        (r"zero_to_fp32\.py", r"\w*zero_pp_rank_.*"),
        "a DeepSpeed ZeRO checkpoint",
        "Run the zero_to_fp32.py in it or above it, and give the file it writes.",
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
# How Meta's tensor-parallel ranks split weights: column-parallel on axis 0, row-parallel and embeddings on 1.
_RANK_AXES: tuple[tuple[str, int], ...] = (
    (r"\.(wq|wk|wv|w1|w3)\.weight$|(^|\.)output\.weight$", 0),
    (r"\.(wo|w2)\.weight$|tok_embeddings\.weight$", 1),
)
