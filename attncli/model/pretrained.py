"""Synthetic inputs for a model of transformers: which of its arguments to make, in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attncli.errors import ModelError
from attncli.model.contracts import BatchOptions, Draw, Made
from attncli.model.layers import by_name, positions, read_by, refuse_longer
from attncli.model.multimodal import modality_of, with_tower
from attncli.model.recipes import RECIPES, Ask, token_count, token_ids
from attncli.model.settings import find, text_config
from attncli.model.signature import Forward

SEQ_LEN = 128
BATCH_SIZE = 2


def is_pretrained(module: Any) -> bool:
    """Whether a module speaks the conventions of transformers."""
    return hasattr(module, "main_input_name") and hasattr(getattr(module, "config", None), "to_dict")


def pretrained_inputs(
    module: Any, forward: Forward, options: BatchOptions, given: Mapping[str, Any] | None = None
) -> Made:
    """Keyword arguments for a model of transformers, `given` ones as they are. Errors: ModelError."""
    most = longest(module)
    rows = positions(module)
    if most is not None and rows is not None and most <= rows <= most + 4:
        # Learned positions, a few of which may be set aside. Rotary ones can go beyond what the config says.
        refuse_longer(options.seq_len, most)
    ids = (given or {}).get("input_ids")
    ask = Ask(
        module,
        module.config,
        Draw(options.seed),
        ids.shape[0] if isinstance(ids, Tensor) else options.batch_size or BATCH_SIZE,
        ids.shape[1] if isinstance(ids, Tensor) else options.seq_len or min(SEQ_LEN, most or SEQ_LEN),
        options.seq_len,
        forward.names,
        dict(given or {}),
    )
    _place_tower(ask)
    main = module.main_input_name
    mains = [main] if isinstance(main, str) else list(main or ())
    insisted = [name for name in mains if name in forward.names]
    insisted += [item.name for item in forward.required]
    unknown = [name for name in dict.fromkeys(insisted) if not _make(ask, forward, name)]
    for name, row in RECIPES.items():
        if name in forward.names and name not in insisted and row.also(ask):
            _make(ask, forward, name)
    if unknown:
        problem = f"what forward wants as {', '.join(unknown)} cannot be told from the config."
        remedy = f"Give it with --input FILE or file.py:batch: forward takes {forward.described()}."
        raise ModelError(type(module).__name__, problem, remedy)
    return Made((), ask.made, tuple(ask.notes))


def _make(ask: Ask, forward: Forward, name: str) -> bool:
    """Adds the argument to what is made; False where it cannot be told."""
    if name in ask.made:
        return True
    value = RECIPES[name].make(ask) if name in RECIPES else None
    if value is None:
        parameter = next(item for item in forward.parameters if item.name == name)
        found = read_by(ask.module, parameter, ask.draw, ask.batch, ask.length)
        found = found or by_name(ask.module, parameter, ask.draw, ask.batch, ask.length)
        if found is None:
            return False
        value = found.value
    ask.made[name] = value
    return True


def longest(module: Any) -> int | None:
    """The number of positions the text side has room for; None where the config sets no limit."""
    config = text_config(module.config)
    limits = [
        value for name in _LENGTHS if isinstance(value := getattr(config, name, None), int) and value > 0
    ]
    for name, child in module.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if (
            isinstance(child, nn.Embedding)
            and "position_embeddings" in name
            and child.padding_idx is not None
        ):
            limits.append(child.num_embeddings - child.padding_idx - 1)
    return min(limits) if limits else None


def _place_tower(ask: Ask) -> None:
    """An image or a sound with its tokens in the text, for a model that has a token for it."""
    if "input_ids" not in ask.names or "input_ids" in ask.made:
        return
    modality = modality_of(ask.module, ask.names, lambda names: find(ask.config, names))
    if modality is None:
        return

    def make(name: str) -> Any:
        return RECIPES[name].make(ask) if name in RECIPES else None

    token = find(ask.config, modality.tokens)
    if token >= token_count(ask):
        return
    found = with_tower(ask.module, modality, token, token_ids(ask), make, longest(ask.module))
    if isinstance(found, str):
        ask.notes.append(f"text alone was run, without an {modality.name}: {found}")
        return
    ask.length = found.ids.shape[1]
    if "mm_token_type_ids" in ask.names:
        ask.made["mm_token_type_ids"] = (found.ids == token).long()
    ask.made.update(
        input_ids=found.ids, **{key: item for key, item in found.inputs.items() if key in ask.names}
    )


_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
