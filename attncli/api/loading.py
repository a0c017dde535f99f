"""MODEL and the settings of a run → the model and its batch, with what the files beside it say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attncli.api.report import Progress
from attncli.checkpoint import open_checkpoint
from attncli.errors import AttncliError, UsageError
from attncli.layout import attention_layers
from attncli.records import Anomaly, Layer

if TYPE_CHECKING:
    from attncli.model import Batch, Runnable


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Which model runs on what: the options of every command that runs one, by the same names.

    `text`, `input`, or else a synthetic batch of `batch_size` × `seq_len`, made with `seed`.
    """

    text: tuple[str, ...] = ()
    input: str | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    autocast: str | None = None
    train_mode: bool = False
    weights: str | None = None
    strict: bool = True
    trust_remote_code: bool = False
    device_map: str | None = None
    offload_folder: str | None = None


class Headers(NamedTuple):
    """The layers as the files of a checkpoint name them, and what its reader noticed."""

    layers: tuple[Layer, ...]
    anomalies: tuple[Anomaly, ...]


def load(spec: str, settings: RunSettings, progress: Progress | None) -> tuple[Runnable, Batch]:
    """The model that MODEL names, and a batch for it. Errors: AttncliError."""
    from attncli.model import BatchOptions, ModelOptions, load_model, make_batch

    if not spec:
        raise UsageError("MODEL", "the path is empty.", "Give a model folder, a file, or file.py:build.")
    options = ModelOptions(
        device=settings.device,
        dtype=settings.dtype,
        autocast=settings.autocast,
        weights=_weights_reader(settings.weights) if settings.weights is not None else None,
        weights_path=settings.weights,
        strict=settings.strict,
        trust_remote_code=settings.trust_remote_code,
        device_map=settings.device_map,
        offload_folder=settings.offload_folder,
        train_mode=settings.train_mode,
    )
    wanted = BatchOptions(
        tuple(settings.text), settings.input, settings.seq_len, settings.batch_size, settings.seed
    )
    model = load_model(spec, options, progress)
    return model, make_batch(model, wanted)


def source_of(model: Runnable, spec: str) -> dict[str, Any]:
    path = Path(spec)
    files = (
        [file for file in path.rglob("*") if file.is_file()]
        if path.is_dir()
        else [path]
        if path.is_file()
        else []
    )
    return {
        "kind": model.kind,
        "path": spec,
        "format": model.kind,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "parameters": model.parameters,
    }


def _weights_reader(path: str) -> Callable[[], Mapping[str, Any]]:
    """Reads the checkpoint of --weights when the model is there to take it."""

    def read() -> Mapping[str, Any]:
        from attncli.checkpoint.values import Values

        checkpoint = open_checkpoint(path)
        with Values(checkpoint) as store:
            return {tensor.name: store.load(tensor).clone() for tensor in checkpoint.tensors}

    return read


def headers(path: str) -> Headers:
    """What the files say; nothing where there is no file, or none that inspect reads."""
    if not Path(path).exists():
        return Headers((), ())
    try:
        checkpoint = open_checkpoint(path)
        return Headers(attention_layers(checkpoint.tensors, checkpoint.configs), checkpoint.anomalies)
    except AttncliError:
        return Headers(
            (), ()
        )  # it loads, so it is good enough to run; inspect says what is wrong with the file
