"""How large q·k can become, proven from the weights of each head, and how large it typically is.

Every side of a score is q = M u + b for a normalised input u. What is known of ‖u‖ and of the singular values
of M bounds ‖q‖, and |q·k| ≤ ‖q‖‖k‖. Rotary position embedding turns q and k and changes neither norm, so the
bound survives it; the tighter ‖M_qᵀ M_k‖₂ does not. This file must not know layouts: `Layer.score_terms` says
where the rows of each head lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from attncli.records import Anomaly, HeadRows, Layer, Measurement, Norm, ScoreSide, ScoreTerm
from attncli.weights.values import TensorValues, output_rows, unread


@dataclass(frozen=True, slots=True)
class BoundIngredients:
    """What the bound of one layer rests on. `input_norm`: "rms", "layer" or "l2" (several: joined by " + ");
    None where a side without a norm after its projection has no known norm before it: no bound exists."""

    layer: str
    input_norm: str | None
    biases: bool
    query_norm: bool
    key_norm: bool
    terms: int


@dataclass(frozen=True, slots=True)
class ScoreBounds:
    """`measurements`: `score_bound` and `score_typical` of each query head. `skipped`: one anomaly for each
    layer that was not bounded, "unread-values" or "no-score-terms", `subject` the layer's id."""

    measurements: tuple[Measurement, ...]
    ingredients: tuple[BoundIngredients, ...]
    skipped: tuple[Anomaly, ...]


def score_bounds(
    layers: Iterable[Layer], values: TensorValues, progress: Callable[[str], None] | None = None
) -> ScoreBounds:
    """Per query head, before scaling: `score_bound`, the largest |q·k| any input can cause, and
    `score_typical`, its root mean square over independent inputs of unit variance.

    With W, b the rows of one head [d, D] and its bias [d], g, β the gain and bias [D] of the norm before it:

        RMSNorm    x = g∘u, ‖u‖ ≤ √D               M = W diag(g),              b' = b
        LayerNorm  x = g∘u + β, ‖u‖ ≤ √D, u ⊥ 1    M = W diag(g) (I − 11ᵀ/D),  b' = Wβ + b
        unit norm  x = g∘u, ‖u‖ ≤ 1                M = W diag(g),              b' = b
        q = M u + b',  ‖q‖ ≤ ‖u‖ ‖M‖₂ + ‖b'‖,  ‖M‖₂² the largest eigenvalue of the Gram matrix M Mᵀ [d, d]

    A norm after the projection (q/k-norm) replaces all that, since it may also enlarge a small q:
    q = g∘u + β with ‖u‖ ≤ √size (1 for unit norm), so ‖q‖ ≤ ‖u‖ max|g| + ‖β‖ over the head's own gains.
    score_bound = Σ over terms of ‖q‖‖k‖. Where a side has neither norm it is infinite: nothing limits the
    input. Gram matrices are float64 and the bound is widened by their rounding, at least by 1e-9 of itself.
    It holds for exact arithmetic on the stored weights: a run in bfloat16 rounds u, q and k, and each
    rounding can add 2^-8 of itself.

    score_typical, for u of identity covariance (projected for LayerNorm), C = M Mᵀ or diag(g²), without
    positions, terms independent: E[(q·k)²] = Σ (tr(C_q C_k) + b_kᵀ C_q b_k + b_qᵀ C_k b_q) + (Σ b_q·b_k)².

    A head with a NaN or Inf weight has bound inf and typical None. Key rows that several query heads share
    are computed once. `progress` gets each layer's id when it is done.
    """
    measurements: list[Measurement] = []
    ingredients: list[BoundIngredients] = []
    skipped: list[Anomaly] = []
    for layer in layers:
        reader = _Reader(values)
        try:
            heads = _layer_scores(layer, reader)
        except _UnreadableError as reason:
            skipped.append(Anomaly(reason.kind, layer.id, reason.evidence))
        else:
            ingredients.append(_ingredients(layer, reader))
            for head, (bound, typical) in enumerate(heads):
                measurements.append(Measurement("score_bound", layer.id, bound, head=head, high=bound))
                measurements.append(Measurement("score_typical", layer.id, typical, head=head))
        if progress is not None:
            progress(layer.id)
    return ScoreBounds(tuple(measurements), tuple(ingredients), tuple(skipped))


# --- one layer ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of one term, all H query heads: largest norms [H], covariances [H, d, d], means [H, d].

    `covariances` and `means` are float64 and indexed through `place`: query head → row.
    """

    norms: torch.Tensor
    covariances: torch.Tensor
    means: torch.Tensor
    place: torch.Tensor


class _UnreadableError(Exception):
    """Why one layer has no bound; never leaves this file."""

    def __init__(self, kind: str, evidence: dict[str, object]) -> None:
        super().__init__(kind)
        self.kind = kind
        self.evidence = evidence


def _layer_scores(layer: Layer, reader: _Reader) -> list[tuple[float, float | None]]:
    """(score_bound, score_typical) of each query head."""
    if not layer.score_terms:
        raise _UnreadableError("no-score-terms", {"layout": layer.layout})
    heads = len(layer.score_terms[0].query.rows.starts)
    bound = torch.zeros(heads, dtype=torch.float64)
    variance, mean = torch.zeros_like(bound), torch.zeros_like(bound)
    for term in layer.score_terms:
        _check_heads(term, heads)
        query, key = _side(term.query, reader), _side(term.key, reader)
        # 0 · inf: a side that is zero keeps the score zero, whatever the other may become.
        product = term.factor * query.norms[query.place] * key.norms[key.place]
        bound += torch.where((query.norms[query.place] == 0) | (key.norms[key.place] == 0), 0.0, product)
        for head in range(heads):
            i, j = query.place[head], key.place[head]
            c_q, c_k, b_q, b_k = query.covariances[i], key.covariances[j], query.means[i], key.means[j]
            spread = (c_q * c_k).sum() + b_k @ c_q @ b_k + b_q @ c_k @ b_q
            variance[head] += term.factor**2 * spread
            mean[head] += term.factor * (b_q @ b_k)
    typical = (variance + mean.square()).sqrt().tolist()
    # NaN weights: nothing is proven, so the bound is infinite.
    bounds = torch.nan_to_num(bound, nan=math.inf, posinf=math.inf).tolist()
    return [
        (limit, expected if math.isfinite(expected) else None)
        for limit, expected in zip(bounds, typical, strict=True)
    ]


def _check_heads(term: ScoreTerm, heads: int) -> None:
    for side in (term.query, term.key):
        rows = side.rows
        consistent = (
            len(rows.starts) == heads
            and rows.width == term.query.rows.width
            and (rows.bias is None or len(rows.bias_starts) == heads)
            and (side.after is None or len(side.after_starts) == heads)
        )
        if not consistent:
            raise _UnreadableError(
                "unread-values", {"reason": "heads of query and key do not pair up", "tensor": rows.tensor}
            )


def _side(side: ScoreSide, reader: _Reader) -> _Side:
    """Each distinct place (rows, bias, gain) once; grouped query heads share it."""
    rows = side.rows
    places: dict[tuple[int, int, int], int] = {}
    place = [
        places.setdefault(
            (
                rows.starts[head],
                rows.bias_starts[head] if rows.bias is not None else 0,
                side.after_starts[head] if side.after is not None else 0,
            ),
            len(places),
        )
        for head in range(len(rows.starts))
    ]
    starts, bias_starts, after_starts = ([key[axis] for key in places] for axis in range(3))
    if side.after is not None:
        norms, covariances, means = _normed_after(side.after, after_starts, rows.width, reader)
    else:
        norms, covariances, means = _projected(side, starts, bias_starts, reader)
    return _Side(norms, covariances, means, torch.tensor(place))


def _normed_after(
    norm: Norm, starts: list[int], width: int, reader: _Reader
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms [P], covariances [P, d, d] and means [P, d] of q = g∘u + β; the projection plays no part."""
    gain, offset = reader.gain(norm), reader.offset(norm)
    if gain is None:
        gains = torch.ones(len(starts), width, dtype=torch.float64)
    else:
        gains = _slices(gain, starts, width, norm.weight or "")
    means = torch.zeros_like(gains)
    if offset is not None:
        means = _slices(offset, starts, width, norm.bias or "")
    size = norm.size or (width if gain is None else gain.numel())
    length, spread = (1.0, 1.0 / size) if norm.kind == "l2" else (math.sqrt(size), 1.0)
    norms = (length * gains.abs().amax(dim=1) + torch.linalg.vector_norm(means, dim=1)) * (1 + _MARGIN)
    return norms, torch.diag_embed(gains.square() * spread), means


def _projected(
    side: ScoreSide, starts: list[int], bias_starts: list[int], reader: _Reader
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms [P], covariances [P, d, d] and means [P, d] of q = M u + b."""
    rows, norm = side.rows, side.before
    weight = reader.matrix(rows)
    width, inputs = rows.width, weight.shape[1]
    if min(starts) < 0 or max(starts) + width > weight.shape[0]:
        raise _UnreadableError(
            "unread-values", {"reason": "rows of a head lie outside the tensor", "tensor": rows.tensor}
        )
    gain, offset = (reader.gain(norm), reader.offset(norm)) if norm is not None else (None, None)
    size = (norm.size if norm is not None else 0) or inputs
    for vector, name in ((gain, norm and norm.weight), (offset, norm and norm.bias)):
        if vector is not None and vector.numel() != inputs:
            raise _UnreadableError(
                "unread-values", {"reason": "gain and projection differ in width", "tensor": str(name)}
            )
    if inputs % size:
        raise _UnreadableError(
            "unread-values", {"reason": "norm and projection differ in width", "tensor": rows.tensor}
        )
    bias = reader.vector(rows.bias) if rows.bias is not None else None
    means = torch.zeros(len(starts), width, dtype=torch.float64)
    if bias is not None:
        means = _slices(bias, bias_starts, width, rows.bias or "").clone()

    covariances = torch.empty(len(starts), width, width, dtype=torch.float64)
    rounding = torch.zeros(len(starts), dtype=torch.float64)
    batch = max(1, _BATCH_BYTES // (width * inputs * 8))
    for first in range(0, len(starts), batch):
        chunk = slice(first, min(first + batch, len(starts)))
        m_PdD = torch.stack([weight[start : start + width] for start in starts[chunk]]).double()
        if offset is not None:
            means[chunk] += m_PdD @ offset
        if gain is not None:
            m_PdD *= gain
        if norm is not None and norm.kind == "layer":
            # The rows of each group of `size` inputs lose their mean: u has none to meet it.
            rounding[chunk] = 4 * size * _EPSILON * torch.linalg.matrix_norm(m_PdD)
            groups = m_PdD.view(*m_PdD.shape[:2], -1, size)
            groups -= groups.mean(dim=-1, keepdim=True)
        covariances[chunk] = m_PdD @ m_PdD.mT
    spectral = _spectral_norms(covariances, inputs) + rounding
    if norm is None:
        length, spread = math.inf, 1.0
    elif norm.kind == "l2":
        length, spread = math.sqrt(inputs / size), 1.0 / size
    else:
        length, spread = math.sqrt(inputs), 1.0
    reach = torch.where(spectral == 0, 0.0, length * spectral)
    norms = reach + torch.linalg.vector_norm(means, dim=1) * (1 + _MARGIN)
    return norms, covariances * spread, means


def _spectral_norms(gram_Pdd: torch.Tensor, inputs: int) -> torch.Tensor:
    """Upper ends of ‖M‖₂ [P], M [d, inputs], from M Mᵀ in float64. NaN where M is not finite.

    Each entry of the Gram matrix errs by at most D·ε·‖row‖‖row‖, so the matrix by D·ε·trace ≤ D·d·ε·λ;
    the eigenvalue solver adds a few d·ε·λ. The norm errs by half of that relative to itself.
    """
    width = gram_Pdd.shape[-1]
    finite = torch.isfinite(gram_Pdd).flatten(1).all(dim=1)
    safe = torch.where(finite[:, None, None], gram_Pdd, 0.0)
    largest = torch.linalg.eigvalsh(safe)[:, -1].clamp(min=0)
    margin = max(_MARGIN, 2 * (inputs + 16) * width * _EPSILON)
    return torch.where(finite, largest.sqrt() * (1 + margin), torch.nan)


def _slices(vector: torch.Tensor, starts: list[int], width: int, name: str) -> torch.Tensor:
    """[P, width]: the part of `vector` that starts at each of `starts`."""
    if min(starts) < 0 or max(starts) + width > vector.numel():
        raise _UnreadableError(
            "unread-values", {"reason": "a head's gain or bias lies outside the tensor", "tensor": name}
        )
    return torch.stack([vector[start : start + width] for start in starts])


def _ingredients(layer: Layer, reader: _Reader) -> BoundIngredients:
    sides = [side for term in layer.score_terms for side in (term.query, term.key)]
    open_sides = [side for side in sides if side.after is None]
    kinds = {side.before.kind if side.before is not None else None for side in open_sides}
    known = sorted(kind for kind in kinds if kind is not None)
    return BoundIngredients(
        layer=layer.id,
        input_norm=None if None in kinds or not known else " + ".join(known),
        biases=any(
            (side.after is None and side.rows.bias is not None)
            or any(norm is not None and norm.bias is not None for norm in (side.before, side.after))
            for side in sides
        ),
        query_norm=all(term.query.after is not None for term in layer.score_terms),
        key_norm=all(term.key.after is not None for term in layer.score_terms),
        terms=len(layer.score_terms),
    )


class _Reader:
    """The tensors of one layer. Holds the last projection only: q and k of a fused one follow each other."""

    def __init__(self, values: TensorValues) -> None:
        self._values = values
        self._vectors: dict[str, torch.Tensor] = {}
        self._matrix: tuple[str, torch.Tensor] | None = None

    def matrix(self, rows: HeadRows) -> torch.Tensor:
        """The projection as [out, in] in its stored dtype."""
        if self._matrix is None or self._matrix[0] != rows.tensor:
            self._matrix = None
            self._matrix = (rows.tensor, self._load(rows.tensor))
        return output_rows(self._matrix[1], rows.out_axis)

    def vector(self, name: str) -> torch.Tensor:
        """A bias or gain, flat, float64."""
        if name not in self._vectors:
            self._vectors[name] = self._load(name).reshape(-1).double()
        return self._vectors[name]

    def gain(self, norm: Norm) -> torch.Tensor | None:
        """The gain of `norm`, None where it is 1."""
        if norm.weight is None:
            return None
        weight = self.vector(norm.weight)
        return weight + 1 if norm.plus_one else weight

    def offset(self, norm: Norm) -> torch.Tensor | None:
        return self.vector(norm.bias) if norm.bias is not None else None

    def _load(self, name: str) -> torch.Tensor:
        tensor = self._values.find(name)
        if tensor is None or not self._values.available(tensor):
            anomaly = unread(name, tensor)
            raise _UnreadableError(anomaly.kind, {"tensor": name, **anomaly.evidence})
        loaded = self._values.load(tensor)
        return loaded if loaded.is_floating_point() and loaded.element_size() > 1 else loaded.float()


# Widening of every bound, far above float64 rounding and far below anything a reader could see.
_MARGIN = 1e-9
_EPSILON = 2.0**-53
_BATCH_BYTES = 64 << 20
