"""Attention calls on the tape: which products are scores, what normalises them, and what they weigh.

A normaliser is attention only if its input comes from a product of two computed tensors and its output
feeds a product with a third. Routers, token heads and pooling over a learned vector fail one of the two.
Numbers are taken the moment the scores pass by; a call counts once its values are met.

Shapes: B batch, H query heads, T queries, S keys, D head size, N any leading axes of a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from attncli.trace import check
from attncli.trace.axes import Axes, Axis, axes, mixes_tokens, numel, of_product, unknown
from attncli.trace.claims import WITH_INPUT, call_of
from attncli.trace.factors import is_random, score_path
from attncli.trace.fused_calls import fused_call, opaque_call
from attncli.trace.layout import layout_of
from attncli.trace.maps import WITHOUT_MAPS, Drawn, Maps, eager_maps
from attncli.trace.ops import Op
from attncli.trace.origins import (
    kind_of,
    parameters_of,
    user_line,
)
from attncli.trace.overflowed import overflows, without_infinities
from attncli.trace.pending import (
    Pending,
    Seen,
    axes_of_product,
    is_done,
    largest_scaled,
    let_go,
    likely_heads,
    unshifted,
)
from attncli.trace.products import (
    Product,
    columns,
    contracted,
    contracts_keys,
    contracts_scores,
    first_key,
    four_axes,
    has_own_axis,
    is_heads,
    largest_dots,
    main_product,
    may_sum_up,
    product_of_factors,
    products,
    summed_factors,
)
from attncli.trace.statistics import (
    eager_statistics,
    row_sums,
)
from attncli.trace.tape import Node, Ran, Ref, Tape, release


@dataclass(slots=True)
class Attention:
    """The listener. `wanted`: whether calls of a module are to be measured (all are seen). `maps`: None draws none.

    `linear`: products of scores and values without a normaliser, which is no attention with an entropy.
    """

    wanted: Callable[[str], bool] = lambda module: True
    on_call: Callable[[int], None] | None = None
    maps: Maps | None = None
    calls: list[Seen] = field(default_factory=list)
    linear: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    _masks: check.Masks = field(default_factory=check.Masks)
    # What still holds tensors: products that may become scores, and scores that wait for their values.
    _open: list[Product | Pending] = field(default_factory=list)
    _made: list[Product | Pending] = field(default_factory=list)
    _factors: list[Node] = field(default_factory=list)

    # --- what the tape asks ---------------------------------------------------------------------------

    def hears(self, op: Op) -> bool:
        return op.heard

    def enters(self, tape: Tape, op: Op, operands: tuple[Ref, ...], run: Ran) -> None:
        """Nothing is asked of operators that have not run."""

    def holds(self, op: Op, operands: tuple[Ref, ...]) -> tuple[bool, ...]:
        """Both sides of a product that may be scores; what is added to scores or masks them."""
        if op.kind == "product":
            pair = operands[-2:]
            if len(pair) == 2 and not any(ref.node.constant for ref in pair):
                return (True,) * len(operands)
            return ()
        if op.kind == "factor" and may_sum_up(op, operands):
            return (True,) * len(operands)
        if op.kind in ("sum", "fill") and any(products(ref.node) for ref in operands):
            return tuple(not ref.node.carries or ref.shape[-1:] == (1,) for ref in operands)
        if op.kind == "factor" and len(operands) == 2 and any(_are_scores(ref.node) for ref in operands):
            # A mask that scores are multiplied by; random ones are dropout.
            return tuple(
                not ref.node.carries and ref.shape[-1:] > (1,) and not is_random(ref.node) for ref in operands
            )
        return ()

    def ran(self, tape: Tape, op: Op, nodes: tuple[Node, ...], run: Ran) -> None:
        if op.kind == "product":
            self._product(tape, nodes, run)
        elif op.kind == "convolution":
            _pass_talking_heads(nodes[0])
        elif op.kind in ("softmax", "log softmax"):
            self._softmax(tape, nodes, run)
        elif op.kind == "sum":
            self._joined(nodes[0])
        elif op.kind in ("exponential", "sigmoid", "relu"):
            self._by_hand(tape, nodes, run)
        elif op.kind == "fused":
            self._fused(tape, nodes, run)
        elif op.kind == "factor" and may_sum_up(op, nodes[0].operands):
            self._factors.append(nodes[0])
            if len(self._factors) > _MOST_FACTORS:
                release(self._factors.pop(0))
        elif op.kind == "total" and op.name == "sum":
            self._summed(tape, nodes[0])
        elif op.kind == "opaque":
            self._add(tape, nodes[0], opaque_call(nodes[0]))

    def dropout_module(self, node: Node, probability: float) -> None:
        """A dropout module was given `node`: in evaluation it leaves no operator, yet its place is known."""
        if probability > 0 and not any(isinstance(thing, Pending) for thing in node.carries):
            for product in products(node):
                product.dropped_out = True

    def close(self) -> None:
        """Lets go of everything that is still held once the run is over."""
        for thing in self._made:
            let_go(thing)
            thing.node.carries = ()  # a node that carries itself would wait for the garbage collector
        for node in self._factors:
            release(node)
        self._factors.clear()
        self._made.clear()
        self._open.clear()

    def _holding(self, thing: Product | Pending) -> None:
        """Remembers what holds tensors; the oldest lets go, for most products turn out to be no scores."""
        self._made.append(thing)
        self._open.append(thing)
        if len(self._open) > _MOST_OPEN:
            let_go(self._open.pop(0))

    # --- products -------------------------------------------------------------------------------------

    def _product(self, tape: Tape, nodes: tuple[Node, ...], run: Ran) -> None:
        node = nodes[0]
        if len(node.operands) < 2:
            return
        first, second = node.operands[-2:]
        if first.node.constant or second.node.constant:
            self._mixed(node, first, second)
            release(node)
            return
        for number, (weights, values) in enumerate(((first, second), (second, first))):
            found = [t for t in weights.node.carries if isinstance(t, Pending)]
            # Two softmaxes in one product (differential attention) are two calls.
            waiting = [
                t for t in found if not t.claimed and numel(t.node.shape) == numel(weights.shape)
            ] or found[-1:]
            for pending in waiting:
                used = _keys_last(_operand(node, run, number), number)
                summed = contracted(axes(weights.node, axes_of_product(pending)), number)
                self._claimed(tape, pending, node, weights, values, used, summed, alone=len(waiting) == 1)
            if waiting:
                release(node)
                return
        for number, (weights, values) in enumerate(((first, second), (second, first))):
            scores = [p for p in products(weights.node) if not p.spent]
            if scores and contracts_keys(weights, number):
                self._without_softmax(tape, scores, node, weights, values, run, number)
                release(node)
                return
        known: dict[int, Axes] = {}
        left, right = axes(first.node, known), axes(second.node, known)
        # Both sides, or a side is folded in a way of its own. Only the usual order then tells heads from queries.
        torn = len(left) == len(right) == 3 and mixes_tokens(left[1]) and mixes_tokens(right[2])
        made = unknown(node.shape) if torn else of_product(node.op.name, left, right, node.shape)
        over_features = torn or not left or any(atom.kind != "position" for atom in left[-1])
        product = Product(node, first, second, made, over_features, mixes_tokens=torn)
        node.carries = (product,)
        self._holding(product)

    def _summed(self, tape: Tape, node: Node) -> None:
        """A matrix product spelled (a * b).sum(dim), its factors broadcast against each other."""
        factors = summed_factors(node)
        if factors is None:
            return
        for weights, values in ((factors.first, factors.second), (factors.second, factors.first)):
            pending = next((t for t in reversed(weights.node.carries) if isinstance(t, Pending)), None)
            if pending is not None:
                if not has_own_axis(values.shape, weights.shape):
                    return  # the sum of a row of masked weights, not of values
                at = factors.axis - len(node.operands[0].shape)
                if weights.tensor is None or -at > len(weights.shape):
                    return
                summed = axes(weights.node, axes_of_product(pending))[at]
                if weights.shape[at] == pending.layout.keys and contracts_scores(summed):
                    used = weights.tensor.movedim(at, -1)
                    self._claimed(tape, pending, node, weights, values, used, summed)
                    release(node.operands[0].node)
                return
        if products(node):
            return
        product = product_of_factors(node, factors)
        if product is not None:
            node.carries = (product,)
            self._holding(product)
            release(node.operands[0].node)

    def _mixed(self, node: Node, first: Ref, second: Ref) -> None:
        """A product with a small weight that keeps the size: heads that talk to each other, not a projection."""
        for scores, weight in ((first, second), (second, first)):
            if not scores.node.carries or not weight.node.constant:
                continue
            small = len(weight.shape) == 2 and max(weight.shape) <= _MOST_TALKING_HEADS
            keeps = numel(node.shape) == numel(scores.shape) and len(weight.shape) == 2
            if small and keeps and len(set(weight.shape)) == 1 and is_heads(scores, weight.shape[0]):
                node.carries = scores.node.carries

    # --- scores that are normalised -------------------------------------------------------------------

    def _softmax(self, tape: Tape, nodes: tuple[Node, ...], run: Ran) -> None:
        node = nodes[0]
        given = node.operands[0].node
        if any(isinstance(thing, Pending) for thing in given.carries):
            return
        axis = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else -1
        probs = run.outputs[0].exp() if node.op.kind == "log softmax" else run.outputs[0]
        self._measured(tape, node, given, run.args[0], probs, axis, "softmax", True)

    def _by_hand(self, tape: Tape, nodes: tuple[Node, ...], run: Ran) -> None:
        """exp, sigmoid or ReLU of scores: whether it is attention shows when it meets its values."""
        node = nodes[0]
        given = node.operands[0].node
        if not products(given) or any(isinstance(thing, Pending) for thing in given.carries):
            return
        scores = run.args[0]
        if not any(numel(given.shape) >= numel(product.node.shape) for product in products(given)):
            return  # a sum or a maximum over the keys, not scores
        if node.op.kind != "exponential":
            self._measured(tape, node, given, scores, run.outputs[0], -1, node.op.kind, True)
            return
        unit = math.log(2) if node.op.name == "exp2" else 1.0
        if run.outputs[0].data_ptr() == scores.data_ptr():  # exp_ has overwritten them
            scores = run.outputs[0].log() / unit
        subtracted = next(
            (ref for ref in given.operands if ref.shape[-1:] == (1,) and ref.tensor is not None), None
        )
        shifted = given.op.kind == "sum" and given.op.name in ("sub", "subtract") and subtracted is not None
        if shifted and subtracted is not None and subtracted.tensor is not None:
            given = given.operands[0].node
            scores = scores + subtracted.tensor
        self._measured(tape, node, given, scores, None, -1, "softmax by hand", shifted, unit)

    def _measured(
        self,
        tape: Tape,
        node: Node,
        given: Node,
        scores: Tensor,
        probs: Tensor | None,
        axis: int,
        normaliser: str,
        subtracts_maximum: bool,
        unit: float = 1.0,
    ) -> None:
        """Takes the numbers of scores that are being normalised, and leaves a `Pending` on the result.

        `unit`: what turns the scores into nats: ln 2 where 2 is raised to them.
        """
        product = main_product([p for p in products(given) if not p.spent])
        if product is None or scores.dim() == 0:
            return
        if not self.wanted(product.node.module):
            self.left_out += 1
            for one in products(given):
                one.spent = True
            node.carries = ()
            return
        path = score_path(given, product.node, product)
        layout = layout_of(
            given, axis, {product.node.serial: product.axes}, likely_heads(product), product.over_features
        )
        real_keys = columns(product, layout.keys_from)
        dots = largest_dots(product, layout)
        threshold = self._masks.visible_above(path, largest_scaled(dots, path), scores.dtype)
        mask_known, visible_above = True, threshold
        shown = unshifted(scores, path)
        if overflows(dots, product) and axis in (-1, scores.dim() - 1):
            shown, mask_known = without_infinities(shown, product, path, self._masks, given.shape)
            visible_above = -math.inf
        shown = shown.movedim(axis, -1)
        shown = shown * unit if unit != 1.0 else shown
        weights = probs.movedim(axis, -1) if probs is not None else shown.softmax(-1)
        sinks = first_key(given, product, layout, real_keys)
        if sinks is not None:
            shown = shown.narrow(-1, sinks, real_keys)
            weights = weights.narrow(-1, sinks, real_keys)
            layout = layout._replace(keys=real_keys)
        shown_BHTS, weights_BHTS = layout.view(shown), layout.view(weights)
        same_tokens = kind_of(tape, product.first.node, product.second.node) != "cross"
        numbers = eager_statistics(
            shown_BHTS,
            weights_BHTS,
            visible_above=visible_above,
            recompute=sinks is None and normaliser.startswith("softmax"),
            same_tokens=same_tokens,
        )
        drawn: tuple[Drawn, ...] = ()
        if self.maps is not None and normaliser not in WITHOUT_MAPS:
            nodes = (product.first.node, product.second.node)
            parameters = parameters_of(*nodes, nodes[1])
            chosen = self.maps.chosen(product.node.module, parameters, layout.batch, layout.heads)
            drawn = eager_maps(
                shown_BHTS, weights_BHTS, chosen, visible_above=visible_above, same_tokens=same_tokens
            )
        if normaliser == "softmax" and probs is not None:
            answer = check.softmax_rows(scores.movedim(axis, -1), probs.movedim(axis, -1))
        else:
            answer = check.Answer(True, None, "")
        replayed = (
            check.score_rows(scores, product, path, threshold)
            if axis in (-1, scores.dim() - 1) and normaliser != "other"
            else None
        )
        recovered = path.scale is not None and (replayed is None or replayed.explained)
        if replayed is not None and replayed.explained and answer.explained:
            answer = replayed._replace(difference=max(answer.difference or 0.0, replayed.difference or 0.0))
        if unit != 1.0 and path.scale is not None:
            path = path._replace(scale=path.scale * unit)
        pending = Pending(
            normaliser,
            product,
            node,
            layout,
            numbers,
            dots,
            path,
            answer,
            product.node.dtype,
            sinks is not None,
            subtracts_maximum,
            user_line(),
            recovered,
            mask_known,
            probs.dtype if probs is not None else scores.dtype,
            drawn=drawn,
        )
        node.carries = (*[p for p in products(given) if p is not product][-2:], product, pending)
        self._holding(pending)

    # --- values ---------------------------------------------------------------------------------------

    def _claimed(
        self,
        tape: Tape,
        pending: Pending,
        node: Node,
        weights: Ref,
        values: Ref,
        used: Tensor,
        summed: Axis,
        *,
        alone: bool = True,
    ) -> None:
        """The weights meet their values: the call is complete. The arguments are those of `call_of`."""
        seen = call_of(tape, pending, self._masks, weights, values, used, summed, alone=alone)
        if seen is None:
            node.carries = ()
            return
        self._add(tape, node, seen)
        if seen.divided_later_of is not None:
            node.carries = (seen,)
        let_go(pending)
        for one in products(weights.node):
            let_go(one)
        self._open = [thing for thing in self._open if not is_done(thing)]

    def _joined(self, node: Node) -> None:
        """Parts of one output whose softmax runs over the keys in chunks: none of them is the whole row."""
        parts: dict[int, list[Seen]] = {}
        for thing in node.carries:
            if isinstance(thing, Seen) and thing.divided_later_of is not None:
                parts.setdefault(thing.divided_later_of, []).append(thing)
        for found in parts.values():
            if len(found) > 1:
                for seen in found:
                    seen.facts["explained"] = False
                    seen.facts["reason"] = (
                        "its softmax runs over the keys in chunks, of which each is a part of a row"
                    )

    def _without_softmax(
        self,
        tape: Tape,
        scores: list[Product],
        node: Node,
        weights: Ref,
        values: Ref,
        run: Ran,
        number: int,
    ) -> None:
        """Scores that meet their values by another way than softmax: another normaliser, or none at all."""
        product = main_product(scores)
        assert product is not None
        path = score_path(weights.node, product.node, product)
        bends = any(step.kind in ("other", "clamp") for step in path.steps) or not path.steps
        shown = _keys_last(_operand(node, run, number), number)
        sums = row_sums(four_axes(shown)) if bends else None
        if sums is None or not (sums[0] > 0.99 and sums[1] < 1.01):
            self.linear[product.node.module] = self.linear.get(product.node.module, 0) + 1
            node.carries = ()
            for one in scores:
                one.spent = True
            return
        self._measured(tape, weights.node, weights.node, shown, shown, -1, "other", True)
        pending = next((t for t in weights.node.carries if isinstance(t, Pending)), None)
        if pending is not None:
            summed = contracted(axes(weights.node, axes_of_product(pending)), number)
            self._claimed(tape, pending, node, weights, values, shown, summed)

    # --- fused kernels --------------------------------------------------------------------------------

    def _fused(self, tape: Tape, nodes: tuple[Node, ...], run: Ran) -> None:
        node = nodes[0]
        module = node.module
        for other in nodes:
            other.carries = ()
        if not self.wanted(module):
            self.left_out += 1
            return
        self._add(tape, node, fused_call(tape, node, run, self.maps))

    def _add(self, tape: Tape, node: Node, seen: Seen) -> None:
        index = len(self.calls)
        self.calls.append(seen)
        node.carries = ()
        node.sources |= tape.source(f"call {index}")
        if self.on_call is not None:
            self.on_call(index + 1)


def _pass_talking_heads(node: Node) -> None:
    """A 1 × 1 convolution over heads mixes scores, and is no projection."""
    scores, weight = node.operands[:2]
    ones = len(weight.shape) > 2 and set(weight.shape[2:]) == {1}
    if scores.node.carries and weight.node.constant and ones and node.shape == scores.shape:
        node.carries = scores.node.carries


def _are_scores(node: Node) -> bool:
    """Whether a value is made of a product that no softmax has seen yet."""
    return bool(products(node)) and not any(isinstance(thing, Pending) for thing in node.carries)


def _operand(node: Node, run: Ran, number: int) -> Tensor:
    """The first (0) or the second (1) factor of a product that has just run."""
    operand: Tensor = run.args[1 + number] if node.op.name in WITH_INPUT else run.args[-2 + number]
    return operand


def _keys_last(weights: Tensor, number: int) -> Tensor:
    """The weights of a product as (…, T, S): the first (0) or the second (1) of its operands."""
    return weights if number == 0 or weights.dim() == 1 else weights.transpose(-1, -2)


# --- tables -------------------------------------------------------------------------------------------

_MOST_TALKING_HEADS = 256
# A broadcast product is summed at once, or it is no matrix product.
_MOST_FACTORS = 4
# Heads in a Python loop make their products one after the other before any is normalised.
_MOST_OPEN = 64
