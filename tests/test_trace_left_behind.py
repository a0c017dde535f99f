"""A traced model is afterwards what it was, computed what it would have, and held no more memory."""

import gc
import math
import random
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import attncli


class Block(nn.Module):
    def __init__(self, fails: BaseException | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))
        self.fails = fails
        self.on_run: Callable[[], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 4).permute(2, 0, 3, 1, 4)
        self.seen += 1
        probs = self.drop(((q @ k.mT) / 2).softmax(-1))
        x = x + self.out((probs @ v).transpose(1, 2).reshape(b, t, 16))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        if self.on_run is not None:
            self.on_run()
        if self.fails is not None:
            raise self.fails
        return x


def surroundings() -> dict[str, Any]:
    """All global state that tracing changes, or might."""
    return {
        "hooks before": len(nn.modules.module._global_forward_pre_hooks),
        "hooks after": len(nn.modules.module._global_forward_hooks),
        "always called": len(nn.modules.module._global_forward_hooks_always_called),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "random": torch.get_rng_state().sum().item(),
        "python random": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": len(_get_current_function_mode_stack()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
    }


def state(model: nn.Module) -> dict[str, Any]:
    return {
        **{
            name: (id(p), p.detach().clone(), p.grad, p.requires_grad) for name, p in model.named_parameters()
        },
        **{name: (id(b), b.detach().clone(), b._version >= 0, None) for name, b in model.named_buffers()},
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, (place, value, *rest) in before.items():
        assert after[name][0] == place, name
        assert torch.equal(after[name][1], value), name
        assert list(after[name][2:]) == rest, name


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fails", [None, ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_nothing_is_left_behind_also_when_the_forward_raises(
    train: bool, fails: BaseException | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(fails)).train(train)
    x = torch.randn(2, 6, 16)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    around, inside = surroundings(), state(model)
    if fails is None:
        assert len(attncli.measure(model, x).calls) == 2
    else:
        with pytest.raises(type(fails)):
            attncli.measure(model, x)
    assert surroundings() == around
    assert_same_state(inside, state(model))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(module.training == train for module in model.modules())


def test_the_fast_path_stays_off_for_those_who_had_it_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        attncli.measure(Block().eval(), torch.randn(2, 6, 16))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("train", [False, True])
def test_a_traced_forward_gives_bitwise_what_an_untraced_one_gives(train: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
    whole = nn.Sequential(model, layer, nn.GRU(16, 16, batch_first=True)).train(train)
    x = torch.randn(2, 6, 16)
    seen: list[Tensor] = []

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        out: Tensor = whole(x)[0]
        seen.append(out)
        return out

    before = state(whole)
    # The encoder layer's fast path is another kernel, which tracing says that it turns off.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            run(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.no_grad():
        for name, buffer in whole.named_buffers():
            buffer.copy_(before[name][1])
    with torch.random.fork_rng():
        attncli.measure(run, x)
    assert torch.equal(seen[0], seen[1])


# --- memory -------------------------------------------------------------------------------------------


def alive() -> int:
    """Bytes of all tensors that Python knows of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}.values())


def test_no_activation_lives_longer_because_of_the_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(12))).eval()
    x = torch.randn(1, 200, 16)
    seen: list[int] = []
    for block in model:
        block.on_run = lambda: seen.append(alive())
    gc.collect()
    gc.disable()  # cycles would hide what is held until the next collection
    try:
        with torch.no_grad():
            model(x)
        untraced, seen[:] = list(seen), []
        report = attncli.measure(model, x)
    finally:
        gc.enable()
    assert len(report.calls) == 12
    scores = 4 * 200 * 200 * 4
    # Biases and single numbers stay; no matrix of scores, and no activation of an earlier layer.
    assert max(seen) - max(untraced) < scores / 4
    assert seen[-1] - seen[1] < 12 * 2048


@pytest.mark.parametrize("kind", ["explicit", "fused", "masked", "linear", "contrastive", "broadcast"])
def test_no_tensor_outlives_the_measurement(kind: str) -> None:
    watched: list[Any] = []

    def keep(*tensors: Tensor) -> None:
        watched.extend(weakref.ref(tensor) for tensor in tensors)

    def run(x: Tensor) -> None:
        q, k, v = (x * factor for factor in (1.0, 2.0, 3.0))
        keep(q, k, v)
        if kind == "fused":
            keep(nn.functional.scaled_dot_product_attention(q, k, v))
            return
        scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) if kind == "broadcast" else q @ k.mT
        keep(scores)
        if kind == "contrastive":
            keep(scores.softmax(-1))
            return
        if kind == "masked":
            mask = torch.zeros(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
            keep(mask)
            scores = scores + mask
        probs = scores if kind == "linear" else scores.softmax(-1)
        keep(probs, probs @ v)

    gc.collect()
    gc.disable()
    try:
        attncli.measure(run, torch.randn(2, 3, 40, 20))
        assert watched
        assert not [ref for ref in watched if ref() is not None]
    finally:
        gc.enable()
