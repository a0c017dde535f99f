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
from torch.utils.checkpoint import checkpoint

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
    # Whether some change would cure it; where none does, nothing is claimed.
    provable: bool = True
    # What stands in the line that the origin is in.
    line: str = ""

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


# --- in modules that lie in one another ---------------------------------------------------------------


class Tokens(nn.Module):
    """Embedding → blocks → logits. `mask_of`: the mask of one layer, from the tokens and the layer's number."""

    def __init__(self, mask_of: Callable[[Tensor, int], Tensor], layers: int = 2) -> None:
        super().__init__()
        self.mask_of = mask_of
        self.embedding, self.head = nn.Embedding(20, 32), nn.Linear(32, 20)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, self.mask_of(tokens, number))
        return self.head(x)


def predicted(tokens: Tensor) -> Callable[[Any], Any]:
    """Cross entropy of the tokens themselves; token 0 is padding."""
    return lambda model: functional.cross_entropy(
        model(tokens).flatten(0, 1), tokens.flatten(), ignore_index=0
    )


def window_full_of_padding(healthy: bool) -> Built:
    """The second layer sees three tokens far: in the shorter sample some queries see padding only."""
    places = torch.arange(12)
    far = (places[:, None] - places[None]).abs() >= 3
    tokens = torch.arange(1, 13).repeat(2, 1)
    tokens[1, 11 if healthy else 4 :] = 0

    def mask_of(tokens: Tensor, layer: int) -> Tensor:
        hidden = (tokens == 0)[:, None, None] | (far if layer else torch.tensor(False))
        return torch.zeros(hidden.shape).masked_fill(hidden, -INF)

    return Tokens(mask_of), predicted(tokens)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False)
        return x


def block_that_is_computed_twice(healthy: bool) -> Built:
    """Activation checkpointing repeats the forward pass, and the fault in it, during the backward pass."""
    mask = torch.zeros(2, 1, 1, 4)
    mask[1, ..., 1 if healthy else 0 :] = -INF
    return Checkpointed(), trained_with_mask(torch.randn(2, 4, 32), mask)


class Translator(nn.Module):
    """An encoder-decoder; token 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 32), nn.Embedding(20, 32)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == 0
        memory = self.encoder(self.source(source), src_key_padding_mask=padding)
        return self.head(self.cross(self.target(target), memory, memory, key_padding_mask=padding)[0])


def empty_source_sentence(healthy: bool) -> Built:
    source, target = torch.randint(1, 20, (3, 5)), torch.randint(1, 20, (3, 6))
    source[1, 1 if healthy else 0 :] = 0
    return Translator(), lambda model: functional.cross_entropy(
        model(source, target).flatten(0, 1), target.flatten()
    )


class Neighbours(nn.Module):
    """D^(−1/2) A D^(−1/2). `fill`: what replaces the Inf of a node without edges."""

    def __init__(self, fill: float | None) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, adjacency: Tensor) -> Tensor:
        inverse = adjacency.sum(-1).pow(-0.5)
        if self.fill is not None:
            inverse = inverse.masked_fill(inverse == INF, self.fill)
        return inverse[:, None] * adjacency * inverse


class Graph(nn.Module):
    def __init__(self, fill: float | None) -> None:
        super().__init__()
        self.neighbours, self.first, self.second = Neighbours(fill), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        weights = self.neighbours(adjacency)
        return weights @ self.second((weights @ self.first(x)).relu())


def isolated_node(healthy: bool) -> Built:
    """Healthy: its Inf is filled with 0, as graph libraries do."""
    adjacency = torch.ones(5, 5)
    adjacency[3] = adjacency[:, 3] = 0
    return Graph(0.0 if healthy else None), trained(torch.randn(5, 8), adjacency)


class LinearAttention(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).relu(), self.k(x).relu(), self.v(x)
        normaliser = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True) + self.eps
        return self.o(q @ (k.transpose(1, 2) @ v) / normaliser)


def linear_attention_without_features(healthy: bool) -> Built:
    model = nn.Sequential(nn.Linear(8, 16), LinearAttention(1e-6 if healthy else 0.0), nn.Linear(16, 4))
    with torch.no_grad():
        model[1].q.bias.fill_(-50.0)
    return model, trained(torch.randn(2, 5, 8))


def gradient_penalty(healthy: bool) -> Built:
    """The norm of a gradient that is 0, in a loss: the backward pass of a backward pass."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))
    with torch.no_grad():
        model[2].weight.zero_()
    x = torch.randn(4, 6, requires_grad=True)

    def step(model: nn.Module) -> Tensor:
        scores = model(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        norms = (slope.pow(2).sum(-1) + (1e-12 if healthy else 0.0)).sqrt()
        return scores.mean() + 10 * (norms - 1).pow(2).mean()

    return model, step


def adam_in_float16(healthy: bool) -> Built:
    """Rows of the embedding that no token asks for have gradient 0, and an eps of 1e-8 is 0 as well."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].requires_grad_(False).weight.fill_(1.0)
    tokens = torch.tensor([0, 1, 2])

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.Adam(model.parameters(), eps=1e-4 if healthy else 1e-8)
        loss = model(tokens).float().pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    return model, step


class StatisticsPooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(1), x.var(1).sqrt()], -1)


def deviation_of_constant_frames(healthy: bool) -> Built:
    x = torch.randn(2, 5, 4)
    if not healthy:
        x[1] = x[1, :1]
    return nn.Sequential(nn.Linear(4, 8), StatisticsPooling(), nn.Linear(16, 3)), trained(x)


class TwoTowers(nn.Module):
    """Images and texts in one space. `logit_scale`: the logarithm of the learned inverse temperature."""

    def __init__(self, logit_scale: float) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(5, 8)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image = functional.normalize(self.image(image), dim=-1)
        text = functional.normalize(self.text(text), dim=-1)
        return self.logit_scale.exp() * image @ text.t()


def temperature_that_ran_away(healthy: bool) -> Built:
    images, texts = torch.randn(4, 6), torch.randn(4, 5)
    return TwoTowers(4.6 if healthy else 100.0), lambda model: functional.cross_entropy(
        model(images, texts), torch.arange(4)
    )


def ratio_of_policies(healthy: bool) -> Built:
    """An action that the old policy found impossible; its advantage is 0, and clipping comes too late."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LogSoftmax(-1))
    x, actions = torch.randn(4, 4), torch.tensor([[0], [1], [2], [0]])
    old = torch.tensor([-1.2, -1.2, -3.0 if healthy else -120.0, -1.2])
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5])

    def step(model: nn.Module) -> Tensor:
        ratios = (model(x).gather(1, actions).squeeze(1) - old).exp()
        return -torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).mean()

    return model, step


class Gated(nn.Module):
    """The feed-forward layer of Llama. `gain`: how far training has blown up two of its weights."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)
        with torch.no_grad():
            self.gate.weight.mul_(gain)
            self.up.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def gated_units_beyond_float16(healthy: bool) -> Built:
    model = nn.Sequential(Gated(1.0), Gated(60.0 if healthy else 900.0), nn.LayerNorm(16)).half()
    return model, forward_only(torch.randn(2, 5, 16).half())


class Whitened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(x)
        return u * torch.tensor([3.0, 2.0, 1.0]) @ vh


def whitening_of_equal_variances(healthy: bool) -> Built:
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 1.0])) if healthy else torch.eye(3))
    return nn.Sequential(layer, Whitened(), nn.Linear(3, 2)), trained(torch.eye(3))


class LogPower(nn.Module):
    """The spectrum of short pieces of sound. `floor`: what is added to the power before the logarithm."""

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, wave: Tensor) -> Tensor:
        power = torch.fft.rfft(wave.unfold(-1, 16, 8) * self.window).abs().pow(2)
        return (power + self.floor).log()


def silence_in_the_sound(healthy: bool) -> Built:
    wave = torch.randn(2, 64)
    wave[1, 20:50] = 0
    model = nn.Sequential(LogPower(1e-10 if healthy else 0.0), nn.LayerNorm(9), nn.Linear(9, 4))
    return model, trained(wave)


class Spans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, span: Tensor) -> Tensor:
        return self.score(self.body(x)[span]).mean()


def mean_of_an_empty_span(healthy: bool) -> Built:
    span = torch.zeros(2, 5, dtype=torch.bool)
    span[0, 1] = healthy
    return Spans(), alone(torch.randn(2, 5, 4), span)


class MaskedMean(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        total = (x * keep[..., None]).sum(1)
        return total.div_(keep.sum(1, keepdim=True))


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.pool, self.head = nn.Embedding(9, 8), MaskedMean(), nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.pool(self.embedding(tokens), (tokens != 0).float()))


def empty_sentence_in_place(healthy: bool) -> Built:
    return Sentences(), trained(torch.tensor([[1, 2, 3], [1 if healthy else 0, 0, 0]]))


class Sampler(nn.Module):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(9, 32), Block(), nn.Linear(32, 9)
        self.temperature = temperature

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.layer(self.embedding(tokens)))[:, -1] / self.temperature
        return torch.multinomial(logits.softmax(-1), 1)


def sampling_that_stops(healthy: bool) -> Built:
    """torch.multinomial raises: "probability tensor contains either inf, nan or element < 0"."""
    return Sampler(0.7 if healthy else 0.0), forward_only(torch.tensor([[1, 2, 3]]))


class FeedForward(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.wi, self.wo, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)
        with torch.no_grad():
            self.wi.weight.mul_(100)
            self.wo.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.wo(self.wi(x).relu()))


def product_under_autocast(healthy: bool) -> Built:
    """The weights are float32; autocast computes their product in float16."""
    x = torch.randn(2, 5, 4)

    def step(model: nn.Module) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            return model(x)

    return nn.Sequential(nn.Linear(4, 16), FeedForward(20 if healthy else 5000), nn.Linear(16, 3)), step


class Repeated(nn.Module):
    """One block again and again, as in ALBERT; the stream grows with every pass."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.block, self.norm, self.passes = nn.Linear(16, 16), nn.LayerNorm(16), passes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            x = x * 4 + self.block(self.norm(x))
        return self.norm(x)


def stream_that_grows_beyond_float16(healthy: bool) -> Built:
    return Repeated(2 if healthy else 6).half(), forward_only((torch.randn(1, 3, 16) * 100).half())


@torch.library.custom_op("attncli_faults::normed", mutates_args=())
def normed(x: Tensor, broken: bool) -> Tensor:
    """A kernel that nothing can look into; where `broken`, its gradient holds NaN."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


@torch.library.custom_op("attncli_faults::normed_backward", mutates_args=())
def normed_backward(gradient: Tensor, broken: bool) -> Tensor:
    result = gradient.clone()
    if broken:
        result[0, 0] = NAN
    return result


def _kept(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.broken = inputs[1]


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.attncli_faults.normed_backward(gradient, ctx.broken), None


normed.register_autograd(_gradient, setup_context=_kept)


class KernelNorm(nn.Module):
    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.attncli_faults.normed(x, self.broken)


def kernel_whose_gradient_is_nan(healthy: bool) -> Built:
    model = nn.Sequential(nn.Linear(4, 8), KernelNorm(not healthy), nn.Linear(8, 2))
    return model, trained(torch.randn(3, 4))


class TwoHeads(nn.Module):
    def __init__(self, floor: float) -> None:
        super().__init__()
        self.mean, self.power, self.floor = nn.Linear(4, 3), nn.Linear(4, 3), floor

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        mean = (self.mean(x) * keep).sum() / keep.sum()
        return {"mean": mean, "power": self.power(x).clamp(min=self.floor).log()}


def two_at_once(healthy: bool) -> Built:
    """Two faults that have nothing to do with each other, each seen in an output of its own."""
    keep = torch.full((3, 1), 1.0 if healthy else 0.0)
    return TwoHeads(0.1 if healthy else 0.0), forward_only(torch.randn(3, 4), keep)


# --- in kernels and losses of torch -------------------------------------------------------------------


def smoothing_over_masked_classes(healthy: bool) -> Built:
    """Label smoothing gives every class a share, also those that were masked away."""
    hidden = torch.tensor([False, False, False, False, True])

    def step(model: nn.Module) -> Tensor:
        logits = model(x).masked_fill(hidden, -INF)
        return functional.cross_entropy(logits, labels, label_smoothing=0.0 if healthy else 0.1)

    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5)), step


def transcript_longer_than_the_sound(healthy: bool) -> Built:
    frames = 12 if healthy else 3
    x, labels = torch.randn(frames, 1, 6), torch.tensor([[1, 2, 3, 4, 1]])
    sizes = torch.tensor([frames]), torch.tensor([5])
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5), nn.LogSoftmax(-1))
    return model, lambda model: functional.ctc_loss(model(x), labels, *sizes)


@torch.library.custom_op("attncli_faults::attention", mutates_args=())
def kernel_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As fused kernels did: NaN for a query that may attend to nothing."""
    return (q @ k.transpose(-1, -2) * q.size(-1) ** -0.5 + mask).softmax(-1) @ v


class KernelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.o(torch.ops.attncli_faults.attention(q, k, v, mask))


class KernelLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KernelAttention() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def left_padding_in_a_kernel(healthy: bool) -> Built:
    mask = torch.full((2, 4, 4), -INF).triu(1)
    if not healthy:
        mask[1, :, :2] = -INF
    return KernelLayers(), forward_only(torch.randn(2, 4, 16), mask)


class Pair(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.query, self.passage = nn.Linear(5, 8, bias=False), nn.Linear(5, 8, bias=False)
        self.eps = eps

    def forward(self, query: Tensor, passage: Tensor) -> Tensor:
        query = functional.normalize(self.query(query), dim=-1, eps=self.eps)
        passage = functional.normalize(self.passage(passage), dim=-1, eps=self.eps)
        return query @ passage.t()


def empty_passage_in_float16(healthy: bool) -> Built:
    queries, passages = torch.randn(3, 5).half(), torch.randn(3, 5).half()
    passages[2] = 0
    return Pair(1e-4 if healthy else 1e-12).half(), forward_only(queries, passages)


class Focal(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        probs = torch.sigmoid(logits)
        hits = torch.where(labels > 0, probs, 1 - probs)
        return -((1 - hits).pow(self.gamma) * hits.clamp(min=1e-6).log()).mean()


class Detector(nn.Module):
    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(4, 1), Focal(gamma)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.body(x).squeeze(-1), labels)


def focal_loss_of_a_sure_hit(healthy: bool) -> Built:
    model, x = Detector(2.0 if healthy else 0.5), torch.randn(3, 4)
    x[1] = 30.0
    with torch.no_grad():
        model.body.weight.fill_(1.0)
    return model, alone(x, torch.ones(3))


def clipping_in_float16(healthy: bool) -> Built:
    """Every gradient is finite, their norm is not in float16: clipping makes them all 0."""
    model, x = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 4)).half(), torch.ones(4, 8).half()

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        loss = model(x).float().sum() * (10.0 if healthy else 8000.0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return model, step


def weight_norm_of_a_dead_row(healthy: bool) -> Built:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    if not healthy:
        with torch.no_grad():
            layer.parametrizations.weight.original1[2] = 0
    return nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(), nn.Linear(6, 2)), trained(torch.randn(3, 4))


def variance_below_zero(healthy: bool) -> Built:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()).eval()
    model[1].running_var[2] = 1e-3 if healthy else -1e-3
    return model, trained(torch.randn(2, 3, 9))


class Partition(nn.Module):
    """A sum over what is allowed, in log space, as structured losses written by hand hold it."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.emission, self.fill = nn.Linear(4, 5), fill

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        scores = self.emission(x).masked_fill(~allowed, self.fill)
        largest = scores.max(-1, keepdim=True).values
        return (scores - largest).exp().sum(-1).log().add(largest.squeeze(-1)).sum()


def logsumexp_of_nothing(healthy: bool) -> Built:
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed[1] = False
    return Partition(-1e4 if healthy else -INF), alone(torch.randn(3, 4), allowed)


# --- healthy, although NaN and Inf occur --------------------------------------------------------------

PLACES = torch.arange(6)
DISTANCES = PLACES[:, None] - PLACES[None]
PADDED = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]])


def masked(mask_of: Callable[[Tensor], Tensor]) -> Built:
    return Tokens(lambda tokens, _: mask_of(tokens)), predicted(PADDED)


def padding_of_minus_inf() -> Built:
    return masked(lambda tokens: torch.zeros(2, 1, 1, 6).masked_fill((tokens == 0)[:, None, None], -INF))


def causal_mask_of_minus_inf() -> Built:
    return masked(lambda _: torch.full((6, 6), -INF).triu(1))


def sliding_window_of_minus_inf() -> Built:
    return masked(lambda _: torch.zeros(6, 6).masked_fill((DISTANCES < 0) | (DISTANCES >= 3), -INF))


def logarithm_of_a_mask() -> Built:
    return masked(lambda tokens: (tokens != 0).float().log()[:, None, None])


def alibi() -> Built:
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return masked(lambda _: -DISTANCES.abs() * slopes + torch.full((6, 6), -INF).triu(1))


def padding_of_the_smallest_number() -> Built:
    """Also where a sample is padding and nothing else."""
    least = torch.finfo(torch.float32).min
    model = Tokens(lambda tokens, _: (1 - (tokens != 0).float())[:, None, None] * least)
    return model, trained(torch.stack([PADDED[1], torch.zeros(6, dtype=torch.long)]))


def padding_of_the_smallest_number_in_float16() -> Built:
    model = Tokens(lambda tokens, _: (tokens == 0).half()[:, None, None] * torch.finfo(torch.float16).min)
    return model.half(), forward_only(PADDED)


def buckets_of_distances() -> Built:
    """T5: the logarithm of distance 0 becomes an integer, and `where` does not choose it."""

    def bias(_: Tensor) -> Tensor:
        far = 2 + (torch.log(DISTANCES.abs().float() / 2) / math.log(4) * 2).long().clamp(max=1)
        return torch.where(DISTANCES.abs() < 2, DISTANCES.abs(), far.clamp(0, 3)).float() * 0.1

    return masked(bias)


def mask_from_outside() -> Built:
    return Block(), trained_with_mask(torch.randn(2, 4, 32), torch.full((4, 4), -INF).triu(1))


class Refilled(nn.Module):
    """What an empty row of the softmax gives is filled with 0, and so are its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(hidden, -INF)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ v


def empty_row_that_is_filled() -> Built:
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[1, 2] = hidden[0, :, 3] = True
    return Refilled(), trained(torch.randn(2, 4, 8), hidden)


def empty_row_of_a_fused_kernel() -> Built:
    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    seen[..., 2, :] = False
    model = Apply(lambda self, x: functional.scaled_dot_product_attention(x @ self.w, x, x, attn_mask=seen),
                  w=weight(4, 4))  # fmt: skip
    return model, trained(torch.randn(2, 2, 4, 4))


def memory_that_is_overwritten() -> Built:
    def rows(self: nn.Module, x: Tensor) -> Tensor:
        result = torch.empty(3, 4)
        cache = torch.empty(3, 4).fill_(NAN)
        for row in range(3):
            result[row] = x[row] @ self.w
        cache[:] = result.detach()
        return result + cache

    return Apply(rows, w=weight(4, 4)), trained(torch.randn(3, 4))


def product_that_leaves_out_what_was_there() -> Built:
    """`baddbmm` with beta=0 does not read its first operand."""

    def scores(self: nn.Module, x: Tensor) -> Tensor:
        filled = torch.baddbmm(torch.full((2, 4, 4), NAN), x @ self.w, x.transpose(1, 2), beta=0)
        empty = torch.baddbmm(torch.empty(2, 4, 4), x @ self.w, x.transpose(1, 2), beta=0)
        return (filled + empty).softmax(-1)

    return Apply(scores, w=weight(8, 8)), trained(torch.randn(2, 4, 8))


def sampling_of_the_best() -> Built:
    """Logits that are not among the best are −inf; they are drawn from, and returned."""

    def draw(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ self.w
        logits = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -INF)
        return torch.multinomial(logits.softmax(-1), 1), logits

    return Apply(draw, w=weight(4, 9)), forward_only(torch.randn(2, 4))


def beams() -> Built:
    """All beams but the first begin at −inf."""

    def search(self: nn.Module) -> tuple[Tensor, Tensor]:
        scores, tokens = torch.tensor([[0.0, -INF, -INF]]), torch.zeros(1, 3, dtype=torch.long)
        for _ in range(3):
            scores, best = (self.w[tokens].log_softmax(-1) + scores[..., None]).flatten(1).topk(3)
            tokens = best % 9
        return scores, tokens

    return Apply(search, w=weight(9, 9)), forward_only()


def router_of_experts() -> Built:
    def mixed(self: nn.Module, x: Tensor) -> Tensor:
        logits = x @ self.router
        best = logits.topk(2, -1)
        shares = torch.full_like(logits, -INF).scatter(-1, best.indices, best.values).softmax(-1)
        return torch.einsum("te,edf,td->tf", shares, self.experts, x)

    return Apply(mixed, router=weight(8, 4), experts=weight(4, 8, 8)), trained(torch.randn(3, 8))


def softmax_in_pieces() -> Built:
    """A running maximum that begins at −inf, as flash attention holds it."""

    def attend(self: nn.Module, x: Tensor) -> Tensor:
        q, largest, total, result = x @ self.w, torch.full((6, 1), -INF), torch.zeros(6, 1), torch.zeros(6, 8)
        for piece in x.split(2):
            scores = q @ piece.t()
            larger = torch.maximum(largest, scores.amax(-1, keepdim=True))
            shrink, exponentials = (largest - larger).exp(), (scores - larger).exp()
            total = total * shrink + exponentials.sum(-1, keepdim=True)
            result, largest = result * shrink + exponentials @ piece, larger
        return result / total

    return Apply(attend, w=weight(8, 8)), trained(torch.randn(6, 8))


def scaler_that_recovers() -> Built:
    x, y = torch.randn(16, 8), torch.randn(16, 4)

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = functional.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return loss

    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), step


def logarithm_that_selects_nothing() -> Built:
    keep = torch.tensor([1.0, 0.0, 1.0])
    return Apply(lambda self, x: (x @ self.w + keep.log()).argmax(-1), w=weight(4, 3)), forward_only(
        torch.randn(3, 4)
    )


def nan_that_nothing_depends_on() -> Built:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x @ self.w
        self.statistic = ((y - y) / (y - y)).detach().max()
        return y

    return Apply(forward, w=weight(4, 4), unused=torch.full((3,), NAN)), trained(torch.randn(3, 4))


def slots_that_are_cut_off() -> Built:
    keys = torch.randn(8, 4)
    keys[5:] = NAN
    model = Apply(
        lambda self, x: (x @ self.w @ self.keys[:5].t()).softmax(-1) @ self.keys[:5],
        w=weight(4, 4),
        keys=keys,
    )
    return model, trained(torch.randn(3, 4))


def bad_row_that_no_token_asks_for() -> Built:
    model = Tagger()
    with torch.no_grad():
        model.embedding.weight[37] = NAN
    return model, trained(torch.arange(10).view(2, 5))


def missing_values_that_are_replaced() -> Built:
    x = torch.randn(3, 4)
    x[1, 2] = NAN
    model = Apply(
        lambda self, x: torch.cat([x.nan_to_num(0.0), x.isnan().float()], -1) @ self.w, w=weight(8, 2)
    )
    return model, trained(x)


def missing_labels_that_are_left_out() -> Built:
    x, labels = torch.randn(4, 4), torch.randn(4, 2)
    labels[1, 0] = NAN
    return nn.Linear(4, 2), lambda model: (model(x) - labels)[~labels.isnan()].pow(2).mean()


def where_with_a_harmless_input() -> Built:
    def root(self: nn.Module, x: Tensor) -> Tensor:
        y = x @ self.w
        return torch.where(y > 0, torch.where(y > 0, y, 1.0).sqrt(), y)

    return Apply(root, w=weight(4, 4)), trained(torch.randn(4, 4))


def policy_with_masked_actions() -> Built:
    allowed = torch.tensor([[True, True, False], [True, True, True]])

    def loss(self: nn.Module, x: Tensor) -> Tensor:
        logits = (x @ self.w).masked_fill(~allowed, -INF)
        policy = torch.distributions.Categorical(logits=logits)
        return -policy.log_prob(torch.tensor([0, 1])).mean() - 0.01 * policy.entropy().mean()

    return Apply(loss, w=weight(4, 3)), alone(torch.randn(2, 4))


def alignment_that_is_left_out() -> Built:
    x, labels = torch.randn(3, 2, 6), torch.tensor([[1, 2, 3, 4, 1], [1, 2, 0, 0, 0]])
    sizes = torch.tensor([3, 3]), torch.tensor([5, 2])
    model = nn.Sequential(nn.Linear(6, 5), nn.LogSoftmax(-1))
    return model, lambda model: functional.ctc_loss(model(x), labels, *sizes, zero_infinity=True)


def limits_of_infinity() -> Built:
    """Bounds that bind nothing: clamping and clipping at Inf, and a minimum that begins there."""
    x = torch.randn(3, 4)

    def step(model: nn.Module) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters())
        loss = torch.minimum(torch.full((3, 4), INF), model(x)).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), INF, norm_type=INF)
        optimizer.step()
        return loss

    return Apply(
        lambda self, x: (x @ self.w).clamp(self.low, INF), w=weight(4, 4), low=torch.tensor(-INF)
    ), step


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
    Fault(
        window_full_of_padding,
        f"{HF} 45511",
        "forward",
        SOFTMAX,
        ("masked-row",),
        "layers.1.attention",
        line="torch.softmax",
    ),
    Fault(
        block_that_is_computed_twice,
        f"{PT} 103749",
        "forward",
        SOFTMAX,
        ("masked-row",),
        "layers.0.attention",
        line="torch.softmax",
    ),
    Fault(
        empty_source_sentence,
        f"{PT} 160064",
        "forward",
        SOFTMAX,
        ("masked-row",),
        "cross",
        line="self.cross(",
    ),
    Fault(
        isolated_node,
        "biomed-AI/Hist2ST 7",
        "forward",
        ("pow",),
        ("division-by-zero",),
        "neighbours",
        line=".pow(-0.5)",
    ),
    Fault(
        linear_attention_without_features,
        "qitianwu/DIFFormer 3",
        "forward",
        ("div",),
        ("division-by-zero",),
        "1",
        line="/ normaliser",
    ),
    Fault(
        gradient_penalty,
        "keras-team/keras-io 910",
        "backward",
        ("div",),
        ("singular-gradient",),
        forward="sqrt",
        line="slope.pow(2)",
    ),
    Fault(
        adam_in_float16,
        "keras-team/keras 11860",
        "optimizer",
        ("addcdiv",),
        ("optimizer-eps",),
        "*",
        "0.weight",
        line="optimizer.step()",
    ),
    Fault(
        deviation_of_constant_frames,
        f"{PT} 4320",
        "backward",
        ("div",),
        ("singular-gradient",),
        "1",
        forward="sqrt",
        line="x.var(1).sqrt()",
    ),
    Fault(
        temperature_that_ran_away,
        "kornia/kornia 3481",
        "forward",
        ("exp",),
        ("overflow-exp",),
        line="logit_scale.exp()",
    ),
    Fault(ratio_of_policies, "radixark/miles 1363", "forward", ("exp",), ("overflow-exp",), line=".exp()"),
    Fault(
        gated_units_beyond_float16,
        f"{HF} 27179",
        "forward",
        ("mul",),
        ("overflow-factor",),
        "1",
        line="functional.silu",
    ),
    Fault(
        whitening_of_equal_variances,
        f"{PT} 49886",
        "backward",
        ("div", "reciprocal"),
        ("singular-gradient", "division-by-zero"),
        "1",
        forward="svd",
        line="linalg.svd",
    ),
    Fault(
        silence_in_the_sound, "an audio front end", "forward", ("log",), ("log-of-zero",), "0", line=".log()"
    ),
    Fault(mean_of_an_empty_span, "a batch", "forward", ("mean",), ("empty-reduction",), line=".mean()"),
    Fault(
        empty_sentence_in_place,
        "OpenRLHF 583",
        "forward",
        ("div",),
        ("division-by-zero",),
        "pool",
        line="div_(",
    ),
    Fault(
        sampling_that_stops,
        "QwenLM/Qwen 620",
        "forward",
        ("div",),
        ("division-by-zero",),
        line="/ self.temperature",
    ),
    Fault(
        product_under_autocast,
        f"{HF} 12225",
        "forward",
        ("addmm",),
        ("overflow-product",),
        "1.wo",
        line="self.wo(self.wi(x)",
    ),
    Fault(
        stream_that_grows_beyond_float16,
        f"{HF} 19229",
        "forward",
        ("mul",),
        ("overflow-factor",),
        line="x * 4",
    ),
    Fault(
        kernel_whose_gradient_is_nan,
        "Dao-AILab/flash-attention 1052",
        "backward",
        ("normed_backward",),
        ("kernel",),
        "1",
        forward="normed",
        line="attncli_faults.normed(",
    ),
    Fault(
        smoothing_over_masked_classes,
        "candle-org/MindAct 1633",
        "forward",
        ("sum", "neg"),
        ("escaped-fill", "label-masked"),
        line="label_smoothing",
    ),
    Fault(
        transcript_longer_than_the_sound,
        "ypwhs/captcha_break 29",
        "forward",
        ("_ctc_loss",),
        ("unexplained", "kernel", "label-masked"),
        line="ctc_loss",
        provable=False,
    ),
    Fault(
        left_padding_in_a_kernel,
        f"{HF} 32390",
        "forward",
        ("attention",),
        ("kernel", "masked-row"),
        "layers.0",
        line="attncli_faults.attention(",
    ),
    Fault(
        empty_passage_in_float16,
        f"{PT} 32137",
        "forward",
        ("div",),
        ("eps-underflow",),
        line="self.passage(passage)",
    ),
    Fault(
        focal_loss_of_a_sure_hit,
        "kornia/kornia 918",
        "backward",
        ("pow", "mul"),
        ("singular-gradient",),
        "loss",
        forward="pow",
        line=".pow(self.gamma)",
    ),
    # All that clipping leaves is 0: the Inf is seen nowhere.
    Fault(
        clipping_in_float16,
        "facebookresearch/fairscale 263",
        "forward",
        ("linalg_vector_norm", "_foreach_norm"),
        ("overflow-reduction",),
        "*",
        silent=True,
        line="clip_grad_norm_",
    ),
    Fault(
        weight_norm_of_a_dead_row,
        "google/flax 1671",
        "forward",
        ("_weight_norm_interface",),
        ("division-by-zero", "zero-variance"),
        "*",
    ),
    Fault(
        variance_below_zero,
        "facebookresearch/detectron2 3160",
        "forward",
        ("native_batch_norm",),
        ("outside-domain",),
        "1",
    ),
    Fault(
        logsumexp_of_nothing, "tinygrad/tinygrad 17822", "forward", ("sub",), ("masked-row",), line="largest)"
    ),
)

HEALTHY: tuple[Callable[[], Built], ...] = (
    padding_of_minus_inf,
    causal_mask_of_minus_inf,
    sliding_window_of_minus_inf,
    logarithm_of_a_mask,
    alibi,
    padding_of_the_smallest_number,
    padding_of_the_smallest_number_in_float16,
    buckets_of_distances,
    mask_from_outside,
    empty_row_that_is_filled,
    empty_row_of_a_fused_kernel,
    memory_that_is_overwritten,
    product_that_leaves_out_what_was_there,
    sampling_of_the_best,
    beams,
    router_of_experts,
    softmax_in_pieces,
    scaler_that_recovers,
    logarithm_that_selects_nothing,
    nan_that_nothing_depends_on,
    slots_that_are_cut_off,
    bad_row_that_no_token_asks_for,
    missing_values_that_are_replaced,
    missing_labels_that_are_left_out,
    where_with_a_harmless_input,
    policy_with_masked_actions,
    alignment_that_is_left_out,
    limits_of_infinity,
)
