"""Numeric faults that people really met, each with its ground truth as data and its healthy twin.

A builder takes `healthy` and returns (model, step): the same little program with and without the fault. What is true
stands beside it: the phase and the operators at which the value is born (of several, whichever is named is right),
the causes that say it rightly, and the module or tensor. `source`: the thread it is taken from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, Callable[[Any], Any]]
INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Fault:
    build: Callable[[bool], Built]
    source: str
    phase: str
    ops: tuple[str, ...]
    causes: tuple[str, ...]
    module: str = ""
    tensor: str | None = None
    # The step gives finite numbers, which are wrong.
    silent: bool = False
    # Of a gradient, the forward operator (or autograd function) that it belongs to.
    forward: str = ""

    @property
    def name(self) -> str:
        return self.build.__name__


class Apply(nn.Module):
    """A function of tensors as the forward of a module; what it is given by name are its parameters and buffers."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


class Attention(nn.Module):
    """Multi-head self-attention, written out. `scaled`: whether q is divided by √d before the product."""

    def __init__(self, width: int = 32, heads: int = 2, scaled: bool = True) -> None:
        super().__init__()
        self.heads, self.scaled = heads, scaled
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            layer(x).view(batch, tokens, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        if self.scaled:
            q = q * q.size(-1) ** -0.5
        scores = q @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        return self.o((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), Attention(**options)
        self.wi, self.wo = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.wo(functional.relu(self.wi(x)))


def weight(*shape: int, of: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * of)


def forward_only(*args: Tensor) -> Callable[[Any], Any]:
    def step(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(*args)

    return step


def trained(*args: Tensor) -> Callable[[Any], Any]:
    """A loss, whose backward pass nan_check runs."""
    return lambda model: model(*args).float().pow(2).mean()


def alone(*args: Tensor) -> Callable[[Any], Any]:
    return lambda model: model(*args)


# --- attention and its masks --------------------------------------------------------------------------


def row_of_minus_inf(healthy: bool) -> Built:
    mask = torch.zeros(3, 6)
    mask[2, 0 if healthy else slice(None)] = -INF
    model = Apply(lambda self, x: torch.softmax(x @ self.w + mask, -1), w=weight(4, 6))
    return model, trained(torch.randn(3, 4))


def sample_of_padding(healthy: bool) -> Built:
    padding = torch.tensor([[False] * 5, [not healthy] + [True] * 4])
    x = torch.randn(2, 5, 8)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    return model, lambda model: model(x, x, x, key_padding_mask=padding)[0].pow(2).mean()


def nan_to_num_hides_it(healthy: bool) -> Built:
    mask = torch.zeros(3, 6)
    mask[1, 1 if healthy else slice(None)] = -INF
    model = Apply(lambda self, x: torch.softmax(x @ self.w + mask, -1).nan_to_num(), w=weight(4, 6))
    return model, trained(torch.randn(3, 4))


def left_padding(healthy: bool) -> Built:
    """Causal and padded: the first queries of a left-padded sample see no key at all."""
    causal = torch.full((4, 4), -INF).triu(1)
    padding = torch.zeros(2, 1, 1, 4)
    if not healthy:
        padding[1, ..., :2] = -INF
    return Block(), trained_with_mask(torch.randn(2, 4, 32), causal + padding)


def trained_with_mask(x: Tensor, mask: Tensor) -> Callable[[Any], Any]:
    return lambda model: model(x, mask).pow(2).mean()


def scores_beyond_float16(healthy: bool) -> Built:
    q = torch.ones(1, 2, 4, 8).half() * (12 if healthy else 120)
    model = Apply(lambda self, q: torch.softmax((q @ q.transpose(-1, -2)) * 8**-0.5, -1) @ q)
    return model, forward_only(q)


def scores_without_a_scale(healthy: bool) -> Built:
    model = Block(heads=1, scaled=healthy)
    with torch.no_grad():
        model.attention.q.weight.copy_(torch.eye(32) * 60)
        model.attention.k.weight.copy_(torch.eye(32) * 60)
    return model.half(), forward_only(torch.randn(2, 5, 32).half())


def minimum_added_twice(healthy: bool) -> Built:
    """A sample that is all padding: finite minima are an even softmax, twice as large they are −inf."""
    padding = torch.zeros(2, 1, 1, 4)
    padding[1] = torch.finfo(torch.float32).min
    x = torch.randn(2, 4, 32)
    return Block(), lambda model: model(x, padding if healthy else padding + padding).pow(2).mean()


def minimum_of_another_dtype(healthy: bool) -> Built:
    low = torch.finfo(torch.float16 if healthy else torch.float32).min
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 2] = low

    def step(model: nn.Module) -> Any:
        with torch.no_grad():
            return model(torch.ones(1, 4, 32).half(), mask.half())

    return Block().half(), step


def zero_times_infinity(healthy: bool) -> Built:
    keep = torch.ones(1, 1, 4, 4)
    keep[..., 3] = 0

    def step(model: nn.Module) -> Any:
        mask = torch.zeros_like(keep).masked_fill(keep == 0, -INF) if healthy else (1 - keep) * -INF
        return model(torch.ones(1, 4, 32), mask).pow(2).mean()

    return Block(), step


def mask_of_the_wrong_sign(healthy: bool) -> Built:
    hidden = torch.tensor([False, False, False, True])
    model = Apply(
        lambda self, x: torch.softmax((x @ self.w).masked_fill(hidden, -INF if healthy else INF), -1),
        w=weight(4, 4),
    )
    return model, trained(torch.randn(3, 4))


def window_that_sees_nothing(healthy: bool) -> Built:
    """A sliding window over a cache that is shorter than its distance."""
    tokens = torch.arange(6)
    distance = tokens[:, None] - tokens[None]
    seen = (distance >= (0 if healthy else 3)) & (distance < 5)
    mask = torch.zeros(6, 6).masked_fill(~seen, -INF)
    return Block(), trained_with_mask(torch.randn(1, 6, 32), mask)


def slots_never_written(healthy: bool) -> Built:
    values = torch.randn(1, 2, 8, 4)
    values[:, :, 6:] = 0 if healthy else NAN
    seen = torch.arange(8) < 6

    def attend(self: nn.Module, q: Tensor) -> Tensor:
        scores = (q @ self.keys.transpose(-1, -2)).masked_fill(~seen, -INF)
        return torch.softmax(scores, -1) @ self.values

    return Apply(attend, keys=torch.randn(1, 2, 8, 4), values=values), forward_only(torch.randn(1, 2, 3, 4))


def memory_read_before_it_is_written(healthy: bool) -> Built:
    seen = torch.arange(8) < 6

    def attend(self: nn.Module, q: Tensor) -> Tensor:
        values = torch.empty(1, 2, 8, 4)
        values[:, :, : 8 if healthy else 6] = 1.0
        scores = (q @ self.keys.transpose(-1, -2)).masked_fill(~seen, -INF)
        return torch.softmax(scores, -1) @ values

    return Apply(attend, keys=torch.randn(1, 2, 8, 4)), forward_only(torch.randn(1, 2, 3, 4))


def softmax_without_the_maximum(healthy: bool) -> Built:
    def attend(self: nn.Module, x: Tensor) -> Tensor:
        scores = torch.bmm(x @ self.q, (x @ self.k).transpose(1, 2)) * (1 / 8 if healthy else 1.0)
        exponentials = scores.exp()
        return exponentials / exponentials.sum(-1, keepdim=True) @ x

    return Apply(attend, q=weight(64, 64, of=0.3), k=weight(64, 64, of=0.3)), trained(torch.randn(2, 5, 64))


def temperature_of_zero(healthy: bool) -> Built:
    model = Apply(lambda self, x: torch.softmax(x @ self.w / self.temperature, -1), w=weight(4, 6),
                  temperature=torch.tensor(0.7 if healthy else 0.0))  # fmt: skip
    return model, forward_only(torch.randn(3, 4))


# --- float16 ------------------------------------------------------------------------------------------


def feed_forward_beyond_float16(healthy: bool) -> Built:
    model = Block().half()
    with torch.no_grad():
        model.wi.weight.fill_(2.0)
        model.wo.weight.fill_(1.0 if healthy else 60.0)
    norm = nn.LayerNorm(32).half()

    def step(model: nn.Module) -> Any:
        with torch.no_grad():
            return norm(model(torch.ones(1, 3, 32).half()))

    return model, step


def residual_beyond_float16(healthy: bool) -> Built:
    x = torch.full((1, 3, 8), 20_000.0 if healthy else 60_000.0).half()
    x[..., 0] = 1.0
    model = Apply(
        lambda self, x: functional.layer_norm(x + x * self.share, (8,)), share=torch.tensor(0.5).half()
    )
    return model, forward_only(x)


def squares_beyond_float16(healthy: bool) -> Built:
    x = torch.randn(2, 3, 8).half()
    x[0, 0] *= 2 if healthy else 400
    model = Apply(lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.w,
                  w=nn.Parameter(torch.ones(8).half()))  # fmt: skip
    return model, forward_only(x)


def sigmoid_that_is_one(healthy: bool) -> Built:
    logits = nn.Parameter(torch.tensor([3.0 if healthy else 12.0, 0.0]).half())
    return Apply(lambda self: -torch.log(1 - torch.sigmoid(self.logits)).mean(), logits=logits), alone()


def eps_that_is_zero(healthy: bool) -> Built:
    x = torch.randn(3, 8).half()
    x[1] = 0
    eps = 1e-5 if healthy else 1e-9
    model = Apply(
        lambda self, x: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.w,
        w=nn.Parameter(torch.ones(8).half()),
    )
    return model, forward_only(x)


def loss_scale_too_high(healthy: bool) -> Built:
    scale = 1.0 if healthy else 2.0**24
    x = torch.randn(8, 4) * 30
    model = Apply(
        lambda self, x: (x.half() @ self.w).float().pow(2).mean() * scale,
        w=nn.Parameter(torch.randn(4, 4).half() * 3),
    )
    return model, alone(x)


def sum_beyond_float16(healthy: bool) -> Built:
    x = torch.full((2, 400), 100.0 if healthy else 300.0).half()
    return Apply(
        lambda self, x: x / x.cumsum(-1)[..., -1:] * self.one, one=torch.ones(1).half()
    ), forward_only(x)


def cast_beyond_float16(healthy: bool) -> Built:
    x = torch.full((2, 4), 100.0 if healthy else 1e5)
    return Apply(lambda self, x: self.linear(x.half())), with_linear(x)


def with_linear(x: Tensor) -> Callable[[Any], Any]:
    def step(model: nn.Module) -> Any:
        model.linear = nn.Linear(4, 4).half()
        with torch.no_grad():
            return model(x)

    return step


# --- singular points ----------------------------------------------------------------------------------


def root_of_zero(healthy: bool) -> Built:
    model = Apply(
        lambda self: self.w.pow(2).sum().sqrt(), w=nn.Parameter(torch.full((4,), 1.0 if healthy else 0.0))
    )
    return model, alone()


def where_with_exp(healthy: bool) -> Built:
    x = nn.Parameter(torch.tensor([1.0, 2.0, 20.0 if healthy else 200.0]))
    return Apply(lambda self: torch.where(self.x < 100, torch.exp(self.x), self.x).sum(), x=x), alone()


def where_with_sqrt(healthy: bool) -> Built:
    x = nn.Parameter(torch.tensor([1.0, 4.0, 4.0 if healthy else -4.0]))
    return Apply(lambda self: torch.where(self.x > 0, torch.sqrt(self.x), self.x).sum(), x=x), alone()


def where_with_division(healthy: bool) -> Built:
    x = nn.Parameter(torch.tensor([1.0, 2.0, 1.0 if healthy else 0.0]))
    return Apply(lambda self: torch.where(self.x != 0, 1 / self.x, torch.zeros(3)).sum(), x=x), alone()


def log_of_softmax(healthy: bool) -> Built:
    logits = nn.Parameter(torch.tensor([[0.0, 2.0 if healthy else 200.0]]))
    return Apply(lambda self: -torch.softmax(self.logits, -1).log()[0, 0], logits=logits), alone()


def labels_all_ignored(healthy: bool) -> Built:
    labels = torch.full((12,), -100)
    if healthy:
        labels[3] = 2
    model = Apply(lambda self, x: functional.cross_entropy(x @ self.w, labels), w=weight(4, 5))
    return model, alone(torch.randn(12, 4))


def count_of_zero(healthy: bool) -> Built:
    mask = torch.full((4,), 1.0 if healthy else 0.0)
    return Apply(lambda self: (self.w * mask).sum() / mask.sum(), w=weight(4)), alone()


def deviation_of_one_sample(healthy: bool) -> Built:
    model = Apply(
        lambda self: ((self.w - self.w.mean()) / (self.w.std() + 1e-6)).sum(), w=weight(2 if healthy else 1)
    )
    return model, alone()


def constant_row_without_eps(healthy: bool) -> Built:
    x = torch.randn(2, 8)
    x[1, 1 if healthy else slice(None)] = 3.0
    model = Apply(
        lambda self, x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.w, w=weight(8)
    )
    return model, forward_only(x)


def entropy_by_hand(healthy: bool) -> Built:
    hidden = torch.zeros(2, 5)
    hidden[:, 4] = -1e4 if healthy else -INF

    def entropy(self: nn.Module) -> Tensor:
        logits = self.w + hidden
        return -(functional.softmax(logits, -1) * functional.log_softmax(logits, -1)).sum()

    return Apply(entropy, w=weight(2, 5)), alone()


def cosine_of_zero(healthy: bool) -> Built:
    """A similarity by hand: the norm of an empty sentence is 0."""
    x = torch.randn(3, 8)
    x[1] = 1.0 if healthy else 0.0
    model = Apply(lambda self, x: (x @ self.w) / (x @ self.w).norm(dim=-1, keepdim=True), w=weight(8, 8))
    return model, trained(x)


def distance_to_itself(healthy: bool) -> Built:
    w = torch.randn(3, 4)
    if not healthy:
        w[1] = w[0]

    def distances(self: nn.Module) -> Tensor:
        difference = self.w[:, None] - self.w[None] + (torch.eye(3)[..., None] if healthy else 0)
        return difference.pow(2).sum(-1).sqrt().sum()

    return Apply(distances, w=nn.Parameter(w)), alone()


def fractional_power_of_zero(healthy: bool) -> Built:
    w = nn.Parameter(torch.tensor([1.0, 2.0, 1.0 if healthy else 0.0]))
    return Apply(lambda self: self.w.pow(0.5).sum(), w=w), alone()


def power_of_a_negative_number(healthy: bool) -> Built:
    w = nn.Parameter(torch.tensor([1.0, 2.0, 2.0 if healthy else -2.0]))
    return Apply(lambda self: self.w.pow(1.7).sum(), w=w), alone()


def divergence_with_log_of_zero(healthy: bool) -> Built:
    q = torch.tensor([[0.5, 0.5, 0.1 if healthy else 0.0]])
    model = Apply(
        lambda self: (torch.softmax(self.w, -1) * (torch.softmax(self.w, -1).log() - q.log())).sum(),
        w=weight(1, 3),
    )
    return model, alone()


def gumbel_of_a_uniform_zero(healthy: bool) -> Built:
    uniform = torch.tensor([[0.5, 0.2, 0.1 if healthy else 0.0]])
    model = Apply(
        lambda self: (
            torch.softmax(self.w - torch.log(-torch.log(uniform)) * (1 if healthy else -1), -1).pow(2).sum()
        ),
        w=weight(1, 3),
    )
    return model, alone()


def arc_cosine_of_one(healthy: bool) -> Built:
    w = nn.Parameter(torch.tensor([0.5, 0.9 if healthy else 1.0]))
    return Apply(lambda self: torch.acos(self.w).sum(), w=w), alone()


def masked_action_is_taken(healthy: bool) -> Built:
    """A policy whose log-probability of the action that was taken is −inf."""
    allowed = torch.tensor([[True, True, False], [True, True, True]])
    actions = torch.tensor([0 if healthy else 2, 1])

    def loss(self: nn.Module, x: Tensor) -> Tensor:
        logits = (x @ self.w).masked_fill(~allowed, -INF)
        return functional.cross_entropy(logits, actions)

    return Apply(loss, w=weight(4, 3)), alone(torch.randn(2, 4))


def exp_of_a_log_variance(healthy: bool) -> Built:
    """The KL term of a variational autoencoder whose log-variance ran away."""
    w = nn.Parameter(torch.tensor([1.0, 2.0 if healthy else 95.0]))
    return Apply(lambda self: -0.5 * (1 + self.w - self.w.exp()).sum(), w=w), alone()


def rotary_division_by_zero(healthy: bool) -> Built:
    steps = torch.arange(0, 8, 2).float()

    def rotated(self: nn.Module, x: Tensor) -> Tensor:
        frequencies = 1.0 / (10_000.0 if healthy else 0.0) ** (steps / 8)
        return x[..., :4] * torch.cos(frequencies) * self.w

    return Apply(rotated, w=weight(4)), forward_only(torch.randn(2, 3, 8))


def variance_of_a_batch_of_one(healthy: bool) -> Built:
    def normed(self: nn.Module, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.var(0) + 1e-5).sqrt() * self.w

    return Apply(normed, w=weight(4)), forward_only(torch.randn(2 if healthy else 1, 4))


# --- leaves -------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.output = nn.Embedding(50, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.embedding(tokens)))


def rare_token(healthy: bool) -> Built:
    model, tokens = Tagger(), torch.arange(10).view(2, 5)
    with torch.no_grad():
        model.embedding.weight[37] = NAN
    tokens[1, 3] = 36 if healthy else 37
    return model, lambda model: model(tokens).pow(2).mean()


def norm_weight_of_inf(healthy: bool) -> Built:
    model, tokens = Tagger(), torch.arange(10).view(2, 5)
    if not healthy:
        with torch.no_grad():
            model.norm.weight[3] = INF
    return model, lambda model: model(tokens).pow(2).mean()


def feature_of_nan(healthy: bool) -> Built:
    x = torch.randn(2, 3, 4)
    if not healthy:
        x[1, 2, 3] = NAN
    return nn.Linear(4, 8), trained(x)


def running_variance_of_nan(healthy: bool) -> Built:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    if not healthy:
        model[1].running_var[2] = NAN
    return model, trained(torch.randn(3, 4))


# --- backward and optimiser ---------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """A backward pass of one's own that divides by a count of 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(count)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (count,) = ctx.saved_tensors
        return (gradients[0] - gradients[0]) / count, None


def backward_of_ones_own(healthy: bool) -> Built:
    count = torch.tensor(1.0 if healthy else 0.0)
    return Apply(lambda self: Halved.apply(self.w, count).sum(), w=weight(3)), alone()


def learning_rate_too_large(healthy: bool) -> Built:
    model, x, y = Block(), torch.randn(2, 4, 32), torch.randn(2, 4, 32)

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2 if healthy else 1e30)
        for _ in range(3):
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        return loss

    return model, step


def clipping_spreads_it(healthy: bool) -> Built:
    model = Apply(lambda self: (self.a * 2).sum() + self.b.pow(2).sum().sqrt(), a=weight(3),
                  b=nn.Parameter(torch.full((3,), 1.0 if healthy else 0.0)))  # fmt: skip

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = model()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return model, step


def optimiser_eps_of_zero(healthy: bool) -> Built:
    """A parameter without any gradient so far: its second moment is 0, and so is eps."""
    model = Apply(lambda self: (self.a * torch.tensor([1.0, 0.0, 1.0])).sum(), a=weight(3))

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-8 if healthy else 0.0)
        loss = model()
        loss.backward()
        optimizer.step()
        return loss

    return model, step


def scaler_that_never_recovers(healthy: bool) -> Built:
    """Healthy: a loss scaler skips a few steps and recovers."""
    model, x, y = nn.Linear(8, 4), torch.randn(16, 8), torch.randn(16, 4)
    kept = torch.ones(4) if healthy else torch.tensor([1.0, 0.0, 1.0, 1.0])

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
        for _ in range(24):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                error = model(x).float() - y
            loss = (error * kept).pow(2).mean() + (0 if healthy else (error * 0).pow(2).sum(0).sqrt().sum())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss

    return model, step


# --- tables -------------------------------------------------------------------------------------------

PT, HF = "pytorch/pytorch", "huggingface/transformers"
SOFTMAX, PRODUCT = ("_softmax",), ("bmm", "mm", "addmm", "baddbmm")

FAULTS: tuple[Fault, ...] = (
    Fault(row_of_minus_inf, f"{PT} 103749", "forward", SOFTMAX, ("masked-row",)),
    Fault(sample_of_padding, f"{PT} 160064", "forward", SOFTMAX, ("masked-row",)),
    Fault(nan_to_num_hides_it, "huggingface/trl 7252", "forward", SOFTMAX, ("masked-row",)),
    Fault(left_padding, f"{HF} 32390", "forward", SOFTMAX, ("masked-row",), "attention"),
    Fault(scores_beyond_float16, f"{HF} 28163", "forward", ("bmm",), ("overflow-scores",)),
    Fault(scores_without_a_scale, f"{HF} 33317", "forward", ("bmm",), ("overflow-scores",), "attention"),
    Fault(feed_forward_beyond_float16, f"{HF} 5651", "forward", ("addmm",), ("overflow-product",), "wo"),
    Fault(residual_beyond_float16, f"{HF} 19229", "forward", ("add",), ("overflow-sum",)),
    Fault(minimum_added_twice, "NVIDIA-NeMo/Automodel 2658", "forward", ("add",), ("mask-added-twice",)),
    Fault(
        minimum_of_another_dtype, "facebookresearch/fairseq 3575", "forward", ("_to_copy",), ("mask-cast",)
    ),
    Fault(zero_times_infinity, "lucidrains/reformer-pytorch 26", "forward", ("mul",), ("mask-arithmetic",)),
    Fault(
        mask_of_the_wrong_sign,
        "lucidrains/memory-compressed-attention 2",
        "forward",
        SOFTMAX,
        ("mask-wrong-sign",),
    ),
    Fault(root_of_zero, f"{PT} 2421", "backward", ("div",), ("singular-gradient",), forward="sqrt"),
    Fault(where_with_exp, f"{PT} 68425", "forward", ("exp",), ("where-trap",)),
    Fault(where_with_sqrt, f"{PT} 187297", "forward", ("sqrt",), ("where-trap",)),
    Fault(log_of_softmax, "a loss written by hand", "forward", ("log",), ("log-of-zero",)),
    Fault(sigmoid_that_is_one, "a loss written by hand", "forward", ("log",), ("log-of-zero",)),
    Fault(labels_all_ignored, f"{PT} 70348", "forward", ("nll_loss_forward",), ("label-ignored",)),
    Fault(count_of_zero, "OpenRLHF 583", "forward", ("div",), ("division-by-zero",)),
    Fault(deviation_of_one_sample, f"{PT} 94546", "forward", ("std",), ("empty-reduction",)),
    Fault(squares_beyond_float16, f"{PT} 133085", "forward", ("pow",), ("overflow-square",), silent=True),
    Fault(constant_row_without_eps, "a norm written by hand", "forward", ("div",), ("zero-variance",)),
    Fault(slots_never_written, "vllm 936", "buffer", ("leaf",), ("bad-buffer",), tensor="values"),
    Fault(memory_read_before_it_is_written, "vllm 936", "forward", ("empty",), ("unwritten-memory",)),
    Fault(
        rare_token,
        "allenai/longformer 115",
        "parameter",
        ("leaf",),
        ("bad-embedding-row",),
        "embedding",
        "embedding.weight",
    ),
    Fault(
        norm_weight_of_inf, f"{HF} 48892", "parameter", ("leaf",), ("bad-parameter",), "norm", "norm.weight"
    ),
    Fault(feature_of_nan, "a batch", "input", ("leaf",), ("bad-input",), tensor="input"),
    Fault(learning_rate_too_large, "a training run", "optimizer", ("step",), ("optimizer-step",), module="*"),
    Fault(clipping_spreads_it, f"{PT} 46849", "backward", ("div",), ("singular-gradient",), forward="sqrt"),
    Fault(entropy_by_hand, f"{PT} 40553", "forward", ("mul",), ("mask-arithmetic",)),
    Fault(
        backward_of_ones_own,
        "Dao-AILab/flash-attention 1052",
        "backward",
        ("div",),
        ("division-by-zero",),
        forward="Halved",
    ),
    Fault(temperature_of_zero, "QwenLM/Qwen 620", "forward", ("div",), ("division-by-zero",)),
    Fault(
        loss_scale_too_high,
        "a training run",
        "backward",
        ("_to_copy", "mul", "mm"),
        ("overflow-gradient",),
        forward="ToCopy",
    ),
    Fault(softmax_without_the_maximum, "a softmax written by hand", "forward", ("exp",), ("overflow-exp",)),
    Fault(
        window_that_sees_nothing, "a window beside a cache", "forward", SOFTMAX, ("masked-row",), "attention"
    ),
    Fault(eps_that_is_zero, "a norm in float16", "forward", ("div",), ("eps-underflow",)),
    Fault(
        sum_beyond_float16,
        "a normaliser in float16",
        "forward",
        ("cumsum",),
        ("overflow-reduction", "unexplained"),
        silent=True,
    ),
    Fault(cast_beyond_float16, "features in float16", "forward", ("_to_copy",), ("overflow-cast",)),
    Fault(where_with_division, f"{PT} 68425", "forward", ("reciprocal", "div"), ("where-trap",)),
    Fault(cosine_of_zero, "sentence embeddings", "forward", ("div",), ("division-by-zero",)),
    Fault(
        distance_to_itself, "a contrastive loss", "backward", ("div",), ("singular-gradient",), forward="sqrt"
    ),
    Fault(
        fractional_power_of_zero,
        "a generalised mean",
        "backward",
        ("mul", "pow"),
        ("singular-gradient", "division-by-zero"),
        forward="pow",
    ),
    Fault(power_of_a_negative_number, "a gamma correction", "forward", ("pow",), ("outside-domain",)),
    Fault(divergence_with_log_of_zero, "a divergence by hand", "forward", ("log",), ("log-of-zero",)),
    Fault(gumbel_of_a_uniform_zero, "Gumbel noise", "forward", ("log",), ("log-of-zero",)),
    Fault(
        arc_cosine_of_one,
        "an angular loss",
        "backward",
        ("rsqrt", "div", "mul"),
        ("singular-gradient", "division-by-zero"),
        forward="acos",
    ),
    Fault(masked_action_is_taken, "a masked policy", "forward", ("nll_loss_forward",), ("label-masked",)),
    Fault(exp_of_a_log_variance, "a variational autoencoder", "forward", ("exp",), ("overflow-exp",)),
    Fault(rotary_division_by_zero, "a base of 0", "forward", ("reciprocal", "div"), ("division-by-zero",)),
    Fault(variance_of_a_batch_of_one, "a batch of one", "forward", ("var",), ("empty-reduction",)),
    Fault(
        running_variance_of_nan, "a checkpoint", "buffer", ("leaf",), ("bad-buffer",), "1", "1.running_var"
    ),
    Fault(
        optimiser_eps_of_zero, "Adam with eps=0", "optimizer", ("addcdiv",), ("optimizer-eps",), tensor="a"
    ),
    Fault(
        scaler_that_never_recovers,
        "a training run",
        "backward",
        ("div",),
        ("singular-gradient",),
        forward="sqrt",
    ),
)
