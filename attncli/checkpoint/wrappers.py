"""Names without what training wrappers put into them: one rule per wrapper, the same for every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def strip_wrappers(names: Sequence[str]) -> list[str]:
    """The names without what training wrappers put into them, in the same order.

    - `_orig_mod`, `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`, `_forward_module`, `_fpw_module`,
      `model_ema`: anywhere; no module of a model is called so.
    - `base_layer` (PEFT): anywhere but at the end. `base_model.model.` (PEFT): at the start.
    - `module`, `net`, `student`, `teacher`, `state_dict`: at the start, if every dotted name has it.
    - `module` as the second segment, if every name below that first segment has it (one part of the model
      was wrapped for data parallelism). Deeper it is kept: it is then a residual branch or the like
      (LeViT's `encoder.stages.0.layers.0.module.queries`).
    - `model` at the start, if every name has it and it wraps a model whose own names follow: the second
      segments hold `model` again, or a base (`transformer`, `bert`, …) beside a head (`lm_head`, …).
      Otherwise `model.` is the model's own (Hugging Face).

    Repeated until nothing changes. Names that would collide stay as they were.

    >>> strip_wrappers(["module._orig_mod.h.0.attn.weight", "module._orig_mod.h.1.attn.weight"])
    ['h.0.attn.weight', 'h.1.attn.weight']
    """
    if not _may_be_wrapped(names):
        return list(names)
    paths = [_without_private(name.split(".")) for name in names]
    for _ in range(_MAX_WRAPPERS):
        shorter = _strip_once(paths)
        if shorter == paths:
            break
        paths = shorter
    stripped = [".".join(path) for path in paths]
    kept = list(stripped)
    while True:
        # Putting one name back can meet another that was stripped to it: repeat until all differ.
        counts = Counter(kept)
        following = [name if counts[short] > 1 else short for name, short in zip(names, kept, strict=True)]
        if following == kept:
            return kept
        kept = following


def _may_be_wrapped(names: Sequence[str]) -> bool:
    """A quick look that most checkpoints end with: no wrapper's word anywhere, no single leading segment."""
    text = "\n".join(names)
    if any(word in text for word in (*_PRIVATE_WRAPPERS, "base_layer", "base_model", "module")):
        return True
    heads = {name.partition(".")[0] for name in names if "." in name}
    if len(heads) != 1:
        return False
    seconds = {name.split(".", 2)[1] for name in names if "." in name}
    return not heads.isdisjoint(_LEADING_WRAPPERS) or (heads == {"model"} and _second_names_a_model(seconds))


# --- one pass ----------------------------------------------------------------------------------


def _without_private(path: list[str]) -> list[str]:
    last = len(path) - 1
    return [
        segment
        for i, segment in enumerate(path)
        if i == last or not (segment in _PRIVATE_WRAPPERS or (segment == "base_layer" and i > 0))
    ]


def _strip_once(paths: list[list[str]]) -> list[list[str]]:
    paths = [path[2:] if path[:2] == ["base_model", "model"] and len(path) > 2 else path for path in paths]
    dotted = [path for path in paths if len(path) > 1]
    if not dotted:
        return paths
    first = {path[0] for path in dotted}
    if len(first) == 1:
        head = next(iter(first))
        if head in _LEADING_WRAPPERS or (head == "model" and _wraps_a_model(dotted)):
            return [path[1:] if len(path) > 1 else path for path in paths]
    second: dict[str, set[str]] = {}
    for path in dotted:
        second.setdefault(path[0], set()).add(path[1] if len(path) > 2 else "")
    inner = {head for head, segments in second.items() if segments == {"module"}}
    if inner:
        return [[path[0], *path[2:]] if path[0] in inner and len(path) > 2 else path for path in paths]
    return paths


def _wraps_a_model(paths: list[list[str]]) -> bool:
    return _second_names_a_model({path[1] for path in paths})


def _second_names_a_model(second: set[str]) -> bool:
    if "model" in second:
        return True
    return not second.isdisjoint(_BASES) and not second.isdisjoint(_HEADS)


# --- tables -------------------------------------------------------------------------------------------

_PRIVATE_WRAPPERS = frozenset({
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module",
    "model_ema",
})  # fmt: skip
# Deeper nesting than any trainer makes; a hostile file may claim hundreds of levels.
_MAX_WRAPPERS = 16
_LEADING_WRAPPERS = frozenset({"module", "net", "student", "teacher", "state_dict"})
# Base models of transformers and the heads that stand beside them in their own names.
_BASES = frozenset({
    "transformer", "bert", "roberta", "deberta", "distilbert", "electra", "albert", "gpt_neox", "vit", "deit",
    "swin", "t5", "backbone", "rwkv", "esm", "xlm_roberta", "camembert", "longformer", "mpnet",
})  # fmt: skip
_HEADS = frozenset({"lm_head", "classifier", "score", "qa_outputs", "cls", "embed_out", "pre_classifier"})
