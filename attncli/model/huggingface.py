"""Models that transformers builds: a folder with config.json, or a GGUF file.

Nothing is ever fetched, no code of the folder runs without `trust_remote_code`, and the attention
implementation stays whatever the config or the library chooses: what is measured is what the user runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attncli.errors import ModelError
from attncli.model.contracts import ModelOptions, Progress, Runnable
from attncli.model.devices import (
    dtype_name,
    main_dtype,
    parameter_count,
    pick_autocast,
    pick_device,
    pick_dtype,
)
from attncli.model.faults import user_code


def load_folder(folder: Path, options: ModelOptions, progress: Progress | None = None) -> Runnable:
    """The model of a folder with config.json, in the dtype of its checkpoint or `options.dtype`."""
    settings = _settings(folder / "config.json")
    _refuse_foreign(folder, settings)
    transformers = _transformers(str(folder))
    native = settings.get("model_type") in transformers.CONFIG_MAPPING
    notes: list[str] = []
    if settings.get("auto_map"):
        if not native and not options.trust_remote_code:
            problem = (
                f"its config.json names code of its own ({_auto_map(settings)}), which attncli does not run."
            )
            raise ModelError(str(folder), problem, "If you trust that code, pass --trust-remote-code.")
        if native and not options.trust_remote_code:
            notes.append("the folder's own code was not run: transformers' code for this model_type was")
    elif not native:
        settings = _with_type(folder, settings, transformers)
    with _quiet(transformers), user_code(str(folder), "reading its config", _OTHER_VERSION):
        config = _config(transformers, folder, settings, options)
    kind = _model_class(transformers, config, options)
    return _load(transformers, kind, folder, config, options, notes, progress, source="config.json")


def load_gguf(path: Path, options: ModelOptions, progress: Progress | None = None) -> Runnable:
    """The model of a GGUF file, its blocks dequantised by transformers (float32 unless `options.dtype`)."""
    transformers = _transformers(str(path))
    try:
        pkgutil.resolve_name("gguf")
    except ImportError as error:
        problem = "transformers reads GGUF files with the package gguf, which is not installed."
        raise ModelError(str(path), problem, "Install it: pip install attncli[hf].") from error
    remedy = (
        "transformers reads only some architectures from GGUF: if this is not one, give the original folder."
    )
    with _quiet(transformers), user_code(str(path), "reading its metadata", remedy):
        config = transformers.AutoConfig.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False
        )
    kind = _model_class(transformers, config, options, fallback="AutoModelForCausalLM")
    return _load(
        transformers, kind, path.parent, config, options, [], progress, source="GGUF metadata", gguf=path
    )


def load_adapter(folder: Path, options: ModelOptions, progress: Progress | None = None) -> Runnable:
    """A folder of PEFT: its base model, if that is a folder here, with the adapter in place."""
    merge = "Merge it first (merge_and_unload, save_pretrained) and give the merged folder."
    base = _settings(folder / "adapter_config.json").get("base_model_name_or_path")
    try:
        peft = pkgutil.resolve_name("peft")
    except ImportError as error:
        problem = "this is an adapter, without the model that it changes, and peft is not installed."
        raise ModelError(str(folder), problem, f"{merge[:-1]}, or pip install peft.") from error
    if not isinstance(base, str) or not (Path(base) / "config.json").is_file():
        problem = f"this is an adapter for {base!r}, which is no folder here; nothing is downloaded."
        raise ModelError(str(folder), problem, merge)
    model = load_folder(Path(base), options, progress)
    with warnings.catch_warnings(), user_code(str(folder), "loading the adapter", merge):
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model.module, str(folder), local_files_only=True)
        # Adapters that change layers leave the model itself in one piece: its own paths stay.
        module = adapted if adapted.active_peft_config.is_prompt_learning else adapted.get_base_model()
        module.train(options.train_mode)
    note = f"{base} with the adapter of {folder.name}"
    return replace(
        model, module=module, path=str(folder), parameters=parameter_count(module), notes=(*model.notes, note)
    )


# --- loading ------------------------------------------------------------------------------------------


def _load(
    transformers: Any,
    kind: Any,
    folder: Path,
    config: Any,
    options: ModelOptions,
    notes: list[str],
    progress: Progress | None,
    *,
    source: str,
    gguf: Path | None = None,
) -> Runnable:
    subject = str(gguf or folder)
    arguments, device = _placement(subject, options)
    arguments["dtype"] = pick_dtype(options.dtype) if options.dtype else "auto"
    if gguf is not None:
        arguments["gguf_file"] = gguf.name
    elif not _has_weights(folder):
        problem = "it holds a config.json, but no weights."
        raise ModelError(subject, problem, "Put model.safetensors (or its shards and their index) beside it.")
    if progress:
        progress("loading model", 0, 1)
    with (
        torch.random.fork_rng(devices=[]),
        _quiet(transformers),
        user_code(subject, "loading it", _OTHER_VERSION),
    ):
        # What the checkpoint lacks is drawn at random: the same on every run.
        torch.default_generator.manual_seed(0)
        module, info = kind.from_pretrained(
            str(folder),
            config=config,
            local_files_only=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **arguments,
        )
        if not options.device_map:
            # A quantised model lies where its kernels want it, and refuses to be moved.
            with contextlib.suppress(ValueError):
                module = module.to(device)
        module.train(options.train_mode)
    if progress:
        progress("loading model", 1, 1)
    notes = [*notes, *_loading_notes(subject, module, info, options)]
    dtype = main_dtype(module)
    tokenizer = partial(_tokenizer, transformers, folder, gguf, options.trust_remote_code)
    return Runnable(
        module=module,
        kind="gguf" if gguf else "huggingface",
        path=subject,
        device=torch.device(getattr(module, "device", device)),
        dtype=dtype_name(dtype) if dtype else None,
        configs=((source, json.loads(config.to_json_string(use_diff=False))),),
        parameters=parameter_count(module),
        notes=tuple(notes),
        autocast=pick_autocast(options.autocast),
        tokenizer=tokenizer,
    )


def _placement(subject: str, options: ModelOptions) -> tuple[dict[str, Any], torch.device]:
    """Arguments of from_pretrained that place the model, and the device of one that lies in one piece."""
    device = pick_device(options.device)
    if options.device_map is None:
        if options.offload_folder:
            problem = "--offload-folder works with --device-map only."
            raise ModelError(subject, problem, "Add --device-map auto.")
        return {}, device
    try:
        pkgutil.resolve_name("accelerate")
    except ImportError as error:
        problem = "--device-map needs the package accelerate, which is not installed."
        raise ModelError(subject, problem, "Install it: pip install attncli[hf].") from error
    arguments: dict[str, Any] = {"device_map": options.device_map}
    if options.offload_folder:
        arguments["offload_folder"] = options.offload_folder
    return arguments, device


def _config(transformers: Any, folder: Path, settings: Mapping[str, Any], options: ModelOptions) -> Any:
    model_type = settings.get("model_type")
    if model_type in transformers.CONFIG_MAPPING and not (
        settings.get("auto_map") and options.trust_remote_code
    ):
        # By its type alone: AutoConfig would otherwise guess a missing type from the folder's name.
        return transformers.CONFIG_MAPPING[model_type].from_pretrained(str(folder), local_files_only=True)
    return transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=options.trust_remote_code
    )


def _with_type(folder: Path, settings: dict[str, Any], transformers: Any) -> dict[str, Any]:
    """The settings with a model_type, taken from the class in `architectures` where there is none."""
    for name in settings.get("architectures") or ():
        config_class = getattr(getattr(transformers, str(name), None), "config_class", None)
        if not settings.get("model_type") and config_class is not None:
            return {**settings, "model_type": config_class.model_type}
    if not settings.get("model_type"):
        problem = "its config.json has no model_type, so transformers cannot tell what it is."
        raise ModelError(
            str(folder), problem, "For a model of your own, write a file.py:build that returns it."
        )
    problem = f"transformers {transformers.__version__} knows no model_type {settings['model_type']!r}."
    remedy = "Update transformers, or write a file.py:build that returns the model."
    raise ModelError(str(folder), problem, remedy)


def _model_class(transformers: Any, config: Any, options: ModelOptions, fallback: str = "AutoModel") -> Any:
    """The class that `architectures` names, or else the Auto class that maps this config to something."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    custom = getattr(config, "auto_map", None) if options.trust_remote_code else None
    if custom:
        autos = [auto for auto in custom if auto.startswith("AutoModel")]
        for auto in autos:
            if any(str(custom[auto]).endswith(f".{name}") for name in names):
                return getattr(transformers, auto)
        return getattr(transformers, autos[0]) if autos else transformers.AutoModel
    for name in names:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and isinstance(config, getattr(kind, "config_class", None) or ()):
            return kind
    autos = [fallback, *(name for name in dir(transformers) if name.startswith("AutoModel"))]
    for auto in autos:
        with contextlib.suppress(AttributeError, KeyError):
            if type(config) in getattr(transformers, auto)._model_mapping:
                return getattr(transformers, auto)
    return transformers.AutoModel


def _loading_notes(subject: str, module: Any, info: Mapping[str, Any], options: ModelOptions) -> list[str]:
    """What of the model the checkpoint did not fill. Errors: ModelError where that is most of it."""
    missing = sorted(info.get("missing_keys") or ())
    notes = []
    if missing:
        total = len(list(module.parameters()))
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        if options.strict and len(missing) > total / 2:
            problem = f"{len(missing)} of the model's {total} parameters are not in its checkpoint: {shown}."
            remedy = "These are weights of another model. --no-strict runs it anyway, with random values."
            raise ModelError(subject, problem, remedy)
        notes.append(f"{len(missing)} parameters are not in the checkpoint and have random values: {shown}")
    unexpected = sorted(info.get("unexpected_keys") or ())
    if unexpected:
        notes.append(f"{len(unexpected)} tensors of the checkpoint have no place in {type(module).__name__}")
    return notes


def _tokenizer(transformers: Any, folder: Path, gguf: Path | None, trust_remote_code: bool) -> Any:
    """The tokenizer that lies with the model. Errors: ModelError if there is none, or none that loads."""
    subject = str(gguf or folder)
    if gguf is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        problem = "--text needs a tokenizer, and the folder holds none."
        raise ModelError(
            subject, problem, "Copy tokenizer.json beside the weights, or give token ids with --input."
        )
    arguments = {"gguf_file": gguf.name} if gguf else {}
    remedy = "Give token ids with --input FILE instead of --text."
    with _quiet(transformers), user_code(subject, "loading its tokenizer", remedy):
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **arguments
        )


# --- the folder ---------------------------------------------------------------------------------------


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            str(path), f"this is no valid JSON: {error}.", "Download or copy it again."
        ) from error
    if not isinstance(settings, dict):
        raise ModelError(str(path), "this is JSON, but no object.", "Download or copy it again.")
    return settings


def _refuse_foreign(folder: Path, settings: Mapping[str, Any]) -> None:
    if "_diffusers_version" in settings:
        problem = (
            f"this is a part of a diffusers pipeline ({settings.get('_class_name')}), not of transformers."
        )
        raise ModelError(
            str(folder), problem, "Write a file.py:build that returns CLASS.from_pretrained(FOLDER)."
        )


def _auto_map(settings: Mapping[str, Any]) -> str:
    found = settings["auto_map"]
    return ", ".join(str(value) for value in found.values()) if isinstance(found, Mapping) else str(found)


def _has_weights(folder: Path) -> bool:
    return any(
        path.name.endswith((".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json"))
        for path in folder.iterdir()
    )


# --- the library --------------------------------------------------------------------------------------


def _transformers(subject: str) -> Any:
    """The library. By name, which leaves it untyped: its own types take a checker a minute."""
    with _offline():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pkgutil.resolve_name("transformers")
        except ImportError as error:
            problem = "this model runs through transformers, which is not installed."
            raise ModelError(subject, problem, "Install it: pip install attncli[hf].") from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No request leaves this process: the variable for what is imported now, the constant for what was before."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if constants is not None:
            constants.HF_HUB_OFFLINE = was  # type: ignore[attr-defined]
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Offline, and without the library's log, bars and warnings, which are for its own users."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        # Not all of its progress bars have a switch; its log has a handler of its own.
        with _offline(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


_OTHER_VERSION = "If the message names a package, install it; otherwise try another version of transformers."
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "source.spm", "tekken.json", "vocab.model", "merges.txt",
)  # fmt: skip
