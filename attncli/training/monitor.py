"""The light watch over a training run: what each step did, and a call when one goes wrong.

It changes nothing of the run: it reads the loss at `backward()`, the norms of the gradients before an update and of
the parameters after it, and writes down what outside its modules a step is made of (`program`). Whatever fails in
here is told once and switches the watch off; the run goes on as it would.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attncli.records import Optimizer, Step
from attncli.training.around import around_module, is_functional_call, is_written_down
from attncli.training.buffers import Buffers, Inputs
from attncli.training.checks import bad, held, is_sharded, norms
from attncli.training.copies import Copies, Update, danger
from attncli.training.guard import Guard
from attncli.training.loaders import Batch, Loaders
from attncli.training.models import Roots
from attncli.training.processes import Processes
from attncli.training.program import Program, Span, flat, span_begins
from attncli.training.sightings import Listener, Sighting
from attncli.training.sizes import Sizes, all_finite, rate_of


@dataclass
class _Now:
    """What was seen of the step that is running.

    `bad_loss`: the kind of value of a loss that was not finite, with its batch and the line of its backward pass.
    `clipped`: the norm that was computed to clip the gradients; `bad_at_clip`: which of them were bad then.
    `sampled`: modules whose attention was measured. `unscaled`: losses as they were before a loss scaler.
    """

    losses: list[Tensor] = field(default_factory=list)
    bad_loss: str = ""
    bad_batch: Batch | None = None
    bad_place: str | None = None
    clipped: Tensor | None = None
    bad_at_clip: list[tuple[Tensor, str]] = field(default_factory=list)
    is_updated: bool = False
    norm: float | None = None
    copies: Copies | None = None
    sampled: set[int] = field(default_factory=set)
    has_begun: bool = False
    unscaled: dict[int, tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=dict)

    def loss(self) -> float | None:
        """The mean over micro-batches."""
        return sum(map(float, self.losses)) / len(self.losses) if self.losses else None


class Monitor(Guard):
    """Hears from the hooks. `every`: the attention of one step in so many is looked at.

    `wants`: whether an optimiser is watched.
    """

    def __init__(
        self, listener: Listener, *, every: int = 50, wants: Callable[[Any], bool] = lambda optimizer: True
    ) -> None:
        self.listener, self.every, self.wants = listener, every, wants
        self.step = 1
        self.program = Program()
        super().__init__(self.program)
        self.loaders = Loaders()
        self.processes = Processes()
        self.buffers = Buffers()
        self.inputs = Inputs()
        self.steps: deque[Step] = deque(maxlen=_KEPT)
        self.roots = Roots()
        self.sizes = Sizes(self.roots)
        self.optimizers: dict[int, Optimizer] = {}
        self.faults = 0
        self._now = _Now()
        self._depth = 0
        self.is_in_backward = False
        self._around: Any = None
        self._inputs: Any = None
        self._given: tuple[Any, ...] = ()
        self._begin = 0
        self._weights: dict[str, Tensor] | None = None
        self._was_open = False
        self._sample: AbstractContextManager[None] | None = None
        self._taken: dict[int, int] = {}
        self._scaler: Any = None
        self._skips = 0
        self._faulty = 0
        self._spoiled = False

    def has_begun(self) -> bool:
        return bool(self.roots.modules or self.steps)

    def gave_up(self, error: Exception) -> None:
        self._now.copies = None
        self.listener.broken(error)

    @property
    def may_measure(self) -> tuple[Callable[..., Any], ...]:
        return self.enters, self.leaves

    # --- modules --------------------------------------------------------------------------------------

    def goes_deeper(self, change: int) -> bool:
        """Counts a call inside another one, which is most of them: it begins (1) or ends (-1)."""
        if not self._depth or self._depth + change < 1 or self.paused or self.is_in_backward or self.failed:
            return False
        if threading.get_ident() != self._thread or torch._C._get_tracing_state() is not None:
            return False
        self._depth += change
        return True

    def enters(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The outermost module is about to be called."""
        if self.is_in_backward:
            return
        self._depth = 1
        self._was_open = self.functions.is_open
        self.functions.close()
        self._around = None
        if not torch.is_grad_enabled():
            return
        self.roots.add(module)
        self.buffers.before(module, first=not self._now.has_begun)
        self._now.has_begun = True
        self._given = args
        self._inputs = self.inputs.before(module, args)
        self._around = around_module()
        self._begin = span_begins()
        self._weights = dict(module.named_parameters()) if is_functional_call() else None
        if self._due(module):
            self._sample = self.listener.sampling(module, self.step)
            if self._sample is not None:
                self._sample.__enter__()

    def leaves(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The outermost module returned `output`, or None where it raised."""
        if self.is_in_backward or not self._depth:
            return
        self._depth = 0
        if self._sample is not None:
            sample, self._sample = self._sample, None
            self._now.sampled.add(id(module))
            sample.__exit__(None, None, None)
            self._look_at(module, output)
        if self._around is not None and output is not None:
            if len(args) == len(self._given):
                # What its own pre-hooks put in their place they will put there again.
                args = self._given
            args = self.inputs.after(module, args, self._inputs)
            if self._due(module):
                self._now.sampled.add(id(module))
                with self.silent():
                    self.listener.sample_again(module, args, kwargs, self.step)
                self._look_at(module, output)
            span = Span(self._begin, span_begins())
            self.program.module_called(module, args, kwargs, output, self._around, span, self._weights)
            self._given, self._weights = (), None
            self._was_open = True
        if self._was_open:
            self.functions.open()

    def _look_at(self, module: nn.Module, output: Any) -> None:
        """A sampled call: NaN in what it returns, which the loss need not show. Inf hides things on purpose."""
        tensors = (one for one in flat(output) if isinstance(one, Tensor) and one.is_floating_point())
        if any(bad(one) == "nan" for one in tensors):
            self.listener.output_is_bad(module, self.step)

    def _due(self, module: nn.Module) -> bool:
        return bool(self.every) and self.step % self.every == 0 and id(module) not in self._now.sampled

    # --- the loss -------------------------------------------------------------------------------------

    def backward_begins(self, args: Any, kwargs: Any) -> None:
        self.functions.close()
        self.program.backward_called(args, kwargs)
        roots = args[0] if args else kwargs.get("tensors")
        roots = [roots] if isinstance(roots, Tensor) else list(roots or ())
        found = ""
        for root in roots:
            if not isinstance(root, Tensor) or not root.is_floating_point():
                continue
            loss = self._without_scale(root)
            if loss.numel() == 1:
                self._now.losses.append(held(loss))
            # On another device the answer is waited for once, together with the gradients.
            found = found or (bad(loss) if loss.device.type == "cpu" else "")
        self.is_in_backward = True
        if found and not self._now.bad_loss:
            # The script may see it and leave the step out; and other processes would wait for this one in the
            # collectives of their backward passes. So it is told when the update is about to be made.
            self._now.bad_loss, self._now.bad_place = found, self.listener.place()
            self._now.bad_batch = self.loaders.of([one.tensor for one in self.program.given()])
            if self.processes.world > 1:
                self.processes.call(self.step)

    def backward_ends(self) -> None:
        self.is_in_backward = False

    def scaled(self, scaler: Any, outputs: Any, result: Any) -> None:
        """A loss scaler multiplied a loss."""
        self._scaler = scaler if scaler.is_enabled() else None
        if isinstance(outputs, Tensor) and isinstance(result, Tensor) and result is not outputs:
            self._now.unscaled = {id(result): (weakref.ref(result), outputs)}

    def _without_scale(self, loss: Tensor) -> Tensor:
        known = self._now.unscaled.get(id(loss))
        return known[1] if known is not None and known[0]() is loss else loss

    # --- the update -----------------------------------------------------------------------------------

    def shared(self, tensors: Callable[[], Sequence[Tensor]], sizes: str) -> Tensor | None:
        """`norms` or `largest` of tensors that lie in parts in several processes, over all parts; otherwise None.

        All of those processes ask for it at the same place, and one whose watch has failed still answers: it is no
        part of what is guarded.
        """
        if self.paused or self.is_in_backward or self.processes.world < 2 or is_written_down():
            return None
        found = tensors()
        if not any(is_sharded(one) for one in found):
            return None
        from attncli.training import shards

        of: Callable[[Sequence[Tensor]], Tensor] = getattr(shards, sizes)
        return of(found)

    def clips(self, gradients: Sequence[Tensor], norm: Tensor, shared: Tensor | None = None) -> None:
        """The norm of gradients was computed to clip them: what is bad is still where it was born.

        It is no fault yet: many scripts look at the norm, and leave such a step out.
        """
        self._now.clipped = norm if shared is None else shared.norm()
        if self._scaler is not None or bool(torch.isfinite(self._now.clipped).all()):
            return
        owned = {id(p.grad): p for p in self.roots.parameters() if p.grad is not None}
        if shared is not None:
            sizes = zip(gradients, shared.tolist(), strict=False)
            found = [(owned.get(id(one), one), "nan") for one, size in sizes if not math.isfinite(size)]
        else:
            found = [(owned.get(id(one), one), kind) for one in gradients if (kind := bad(one))]
        self._now.bad_at_clip = found

    def cleared(self, parameters: Sequence[Tensor]) -> None:
        """Gradients were set to zero: what was gathered before is not a part of the update."""
        self._now.clipped = None
        self._now.bad_at_clip = []
        if self.program.cleared(parameters):
            self._now.losses.clear()
            if self.processes.world < 2:  # the others know of it already
                self._now.bad_loss, self._now.bad_batch, self._now.bad_place = "", None, None

    def update_begins(self, optimizer: Any, shared: Tensor | None = None) -> BaseException | None:
        """The gradients are complete; the parameters are about to be changed. `shared`: norms over all processes."""
        self.functions.close()
        if not self.wants(optimizer):
            return None
        parameters = stepped(optimizer)
        rate = rate_of(optimizer)
        if id(optimizer) not in self.optimizers:
            self.optimizers[id(optimizer)] = _described(optimizer, parameters)
        error = None
        if not self._is_left_out(optimizer):
            if shared is not None:
                self._now.norm = float(self._now.clipped if self._now.clipped is not None else shared.norm())
                error = self._bad_parts(parameters, shared, optimizer)
            else:
                self._now.norm, fine = self._looked(optimizer, parameters)
                if not fine:
                    error = self._bad_gradients(parameters, optimizer)
        if shared is None:
            self.sizes.before(optimizer, parameters)
        late = next(
            (kind for loss in self._now.losses if loss.device.type != "cpu" and (kind := bad(loss))), ""
        )
        if error is None and (late or self._now.bad_loss):
            error = self._wrong("loss", late or self._now.bad_loss)
        if error is None and (called := self.processes.called(self.step)) is not None:
            self.faults += 1
            with self.silent():
                error = self.listener.was_called(called)
        if error is None:
            before = [step for step in self.steps if not step.skipped]
            update = Update(
                optimizer,
                self._taken.get(id(optimizer), 0),
                self._now.norm,
                rate,
                [step.gradient_norm for step in before if step.gradient_norm is not None],
                [step.learning_rate for step in before if step.learning_rate is not None],
            )
            self._now.copies = Copies(optimizer) if danger(update) else None
        return error

    def update_ends(self, optimizer: Any, shared: Tensor | None = None) -> BaseException | None:
        """The parameters were changed. `shared`: their largest magnitudes over all processes."""
        if not self.wants(optimizer):
            return None
        if self._is_left_out(optimizer):
            return self.skipped(optimizer, self._scaler)
        parameters = stepped(optimizer)
        self._taken[id(optimizer)] = self._taken.get(id(optimizer), 0) + 1
        every = self._now.copies is not None
        sizes = self.sizes.after(optimizer, parameters, self.step, shared, every=every)
        error = None
        if not all_finite(sizes):
            spoiled = [(one, kind) for one in parameters if (kind := bad(one))]
            if not spoiled and shared is not None:
                spoiled = [
                    (p, "nan") for p, one in zip(parameters, shared, strict=True) if not one.isfinite()
                ]
            if spoiled:
                copies = self._now.copies if not self._spoiled else None
                if copies is not None:
                    copies.exchange()
                self._now.is_updated = True
                error = self._bad_gradients(parameters, optimizer)  # written to after they were looked at
                names = [one for one, _ in spoiled]
                error = error or self._wrong("parameter", spoiled[0][1], names, optimizer, copies)
                if copies is not None and error is None:
                    copies.exchange()
        self._now.copies = None
        self._ended(rate_of(optimizer), skipped=False)
        return error

    def skipped(self, optimizer: Any, scaler: Any) -> BaseException | None:
        """A loss scaler found bad gradients and left the update out, which is no fault unless it goes on for ever."""
        if not self.wants(optimizer):
            return None
        self._skips += 1
        error = None
        collapsed = self._skips >= MOST_SKIPS or float(scaler.get_scale()) < LOWEST_SCALE
        if collapsed or self._now.bad_loss or self.processes.called(self.step) == self.step:
            found = [(p, kind) for p in stepped(optimizer) if p.grad is not None and (kind := bad(p.grad))]
            kind = found[0][1] if found else ""
            seen: Literal["gradient", "loss scale"] = "loss scale" if collapsed else "gradient"
            error = self._wrong(seen, kind, [p for p, _ in found], optimizer)
        self._now.norm = None
        self._ended(rate_of(optimizer), skipped=True)
        return error

    def _is_left_out(self, optimizer: Any) -> bool:
        """Whether a fused optimiser, which a loss scaler leaves the decision to, will not make this update."""
        found = getattr(optimizer, "found_inf", None)
        return self._scaler is not None and found is not None and bool(found)

    def _looked(self, optimizer: Any, parameters: Sequence[Tensor]) -> tuple[float | None, bool]:
        """The 2-norm of all gradients, and whether they are finite."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return None, True
        if self._now.clipped is not None:
            norm = float(self._now.clipped)
            if math.isfinite(norm):
                return norm, True
        norm = float(norms(gradients).norm())
        scale = getattr(optimizer, "grad_scale", None)  # which a fused optimiser takes out by itself
        if isinstance(scale, Tensor):
            norm /= float(scale)
        return norm, math.isfinite(norm) or not any(bad(one) for one in gradients)

    def _bad_gradients(self, parameters: Sequence[Tensor], optimizer: Any) -> BaseException | None:
        found = [(p, kind) for p in parameters if p.grad is not None and (kind := bad(p.grad))]
        if not found:
            return None
        found = self._now.bad_at_clip or found  # clipping spreads one to all
        return self._wrong("gradient", found[0][1], [p for p, _ in found], optimizer)

    def _bad_parts(
        self, parameters: Sequence[Tensor], shared: Tensor, optimizer: Any
    ) -> BaseException | None:
        """Gradients that are bad in any process: all of them stop, whose own parts may be fine."""
        found = [p for p, size in zip(parameters, shared.tolist(), strict=False) if not math.isfinite(size)]
        if not found:
            return None
        kind = next((kind for p in found if p.grad is not None and (kind := bad(p.grad))), "nan")
        return self._wrong("gradient", kind, found, optimizer)

    # --- steps ----------------------------------------------------------------------------------------

    def _ended(self, rate: float | None, *, skipped: bool) -> None:
        scale = float(self._scaler.get_scale()) if self._scaler is not None else None
        step = Step(self.step, self._now.loss(), self._now.norm, rate, scale, skipped, *self.sizes.largest)
        self.steps.append(step)
        self._spoiled = self._spoiled and (skipped or self._faulty == self.step)
        self._skips = self._skips if skipped else 0
        self._now = _Now()
        self.functions.handed.clear()
        self.functions.failed = None  # an error that the script has caught; its tensors are let go
        self.program.step_ended()
        # What is done to a batch before a module gets it, and models without modules, are a part of the next step.
        self.functions.open()
        self.step += 1
        self.listener.stepped(step)

    @property
    def scales_loss(self) -> bool:
        """Whether what backward passes begin at is a loss times a scale."""
        return self._scaler is not None

    def spoiled(self) -> int:
        """How many parameters are not finite now."""
        with self.silent():
            return sum(bool(bad(one)) for one in self.roots.parameters())

    def so_far(self) -> Step:
        """The step that is running, as far as it went."""
        rate = self.steps[-1].learning_rate if self.steps else None
        return Step(self.step, self._now.loss(), self._now.norm, rate)

    def _wrong(
        self,
        seen: Literal["loss", "gradient", "parameter", "loss scale"],
        value: str,
        parameters: Sequence[Tensor] = (),
        optimizer: Any = None,
        copies: Copies | None = None,
    ) -> BaseException | None:
        """Tells the listener, once a step, and not again while every step since the last fault goes wrong too."""
        if self._faulty == self.step:
            return None
        self._faulty = self.step
        self.faults += 1
        if self._spoiled:
            return None
        self._spoiled = True
        if self._now.bad_loss and seen == "gradient":
            seen, value, parameters = "loss", self._now.bad_loss, ()
        with self.silent():
            sighting = Sighting(
                self.step,
                seen,
                value,
                parameters,
                optimizer,
                copies,
                self._now.bad_batch,
                self._now.is_updated,
                self._now.bad_place if seen == "loss" else None,
            )
            return self.listener.went_wrong(sighting)


def told_on_stderr(text: str) -> None:
    print(f"attncli: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the only voice in a script of others


def stepped(optimizer: Any) -> list[Tensor]:
    """The parameters that this update changes."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _described(optimizer: Any, parameters: Sequence[Tensor]) -> Optimizer:
    dtypes = [str(one.dtype).removeprefix("torch.") for one in parameters]
    group = optimizer.param_groups[0] if optimizer.param_groups else {}
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in group.items()
        if name != "params" and isinstance(value, (int, float, bool, str, tuple, type(None)))
    }
    return Optimizer(type(optimizer).__name__, max(set(dtypes), key=dtypes.count) if dtypes else "", settings)


# --- settings -----------------------------------------------------------------------------------------

_KEPT = 64
# The floor of Megatron-LM and DeepSpeed, and torch's documentation of GradScaler: below 1 something is wrong.
LOWEST_SCALE = 1.0
# A scale that is kept above that floor and never recovers.
MOST_SKIPS = 32
