"""Numbers that float64 cannot hold either, points outside a function's domain, and advice that fits the case.

Of a result that even float64 cannot hold a proof by widening is none: the operator is held where it fits instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attncli
from attncli.records import Origin
from attncli.trace.nan import find
from attncli.trace.steps import NOTHING_BEFORE, Before

F16, F32, F64 = torch.float16, torch.float32, torch.float64
HELD, REPLACED, WIDENED = "held at 0.5 where {op} overflows", "1 in place of what {op} made", "in float64"


class Applied(nn.Module):
    """A function of one parameter."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], *values: float, dtype: torch.dtype = F32
    ) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.tensor(values, dtype=dtype))

    def forward(self) -> Tensor:
        return self.function(self.w)


class Attention(nn.Module):
    """Without values: what it gives are mixtures of its inputs. `by_hand`: a softmax that subtracts no maximum."""

    def __init__(self, size: float, scale: float, by_hand: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale, self.by_hand = scale, by_hand
        self.q, self.k = (nn.Linear(16, 16, bias=False, dtype=dtype) for _ in range(2))
        for layer in (self.q, self.k):
            layer.weight.data.copy_(torch.eye(16) * size)

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.q(x) * self.scale) @ self.k(x).mT
        if not self.by_hand:
            return scores.softmax(-1) @ x
        shares = scores.exp()
        return shares / shares.sum(-1, keepdim=True) @ x


def origin_of(model: nn.Module, *args: Tensor) -> Origin:
    report = attncli.nan_check(model, lambda model: model(*args).sum())
    assert len(report.origins) == 1, [one.message for one in report.origins]
    assert "{" not in report.origins[0].message
    return report.origins[0]


def applied(function: Callable[[Tensor], Tensor], *values: float, dtype: torch.dtype = F32) -> Origin:
    return origin_of(Applied(function, *values, dtype=dtype))


def attended(size: float, scale: float, by_hand: bool, dtype: torch.dtype) -> Origin:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return origin_of(Attention(size, scale, by_hand, dtype), x)


# --- numbers that float64 cannot hold -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, F32, F64], ids=str)
@pytest.mark.parametrize("op", ["exp", "exp2", "expm1", "sinh", "cosh"])
def test_an_exponential_beyond_float64_is_proved_by_an_input_that_fits(op: str, dtype: torch.dtype) -> None:
    origin = applied(getattr(torch, op), 0.25, 4646.0, dtype=dtype)
    assert (origin.cause, origin.op, origin.confirmed) == ("overflow-exp", op, True)
    assert (
        origin.evidence["proof"]
        == f"with the input of {op} held at 0.5 where {op} overflows: the symptom is gone"
    )
    assert origin.message.startswith(f"{op}({4648 if dtype == F16 else 4646}) is beyond")


@pytest.mark.parametrize(
    ("function", "values", "dtype", "cause", "op", "proof"),
    [
        (lambda w: (w.exp() - 1).square(), (0.5, 600.0), F32, "overflow-exp", "exp", HELD),
        (lambda w: w.exp(), (0.5, 100.0), F32, "overflow-exp", "exp", WIDENED),
        (lambda w: w**10, (0.5, 1e38), F32, "overflow-square", "pow", HELD),
        (lambda w: w**2, (0.5, 1e30), F32, "overflow-square", "pow", WIDENED),
        (lambda w: w.square(), (0.5, 1e200), F64, "overflow-square", "pow", HELD),
        (lambda w: 2.0**w, (0.5, 5000.0), F32, "overflow-square", "pow", HELD),
        (lambda w: torch.tensor([[2.0], [1e10]]) ** w, (0.5, 5000.0), F32, "overflow-square", "pow", HELD),
        (lambda w: w**-2, (0.5, 1e-200), F64, "overflow-square", "pow", HELD),
        (lambda w: w * w, (0.5, 1e200), F64, "overflow-factor", "mul", REPLACED),
        (lambda w: w / 1e-200, (0.5, 1e200), F64, "overflow-factor", "div", REPLACED),
        (lambda w: 1 / w, (0.5, 1e-40), F32, "overflow-factor", "reciprocal", WIDENED),
        (lambda w: w + w, (0.5, 1.5e308), F64, "overflow-sum", "add", REPLACED),
        (lambda w: w[:, None] @ w[None], (0.5, 1e200), F64, "overflow-product", "mm", REPLACED),
        (lambda w: torch.conv1d(w[None], w[None, None]), (1e200,), F64, "overflow-product", "convolution", REPLACED),
        (lambda w: w.sum(), (1e308, 1e308), F64, "overflow-reduction", "sum", REPLACED),
        (lambda w: w.var(), (1e200, -1e200), F64, "overflow-reduction", "var", REPLACED),
        (lambda w: w.norm(), (1e200, 1e200), F64, "overflow-reduction", "linalg_vector_norm", REPLACED),
        (lambda w: w.prod(), (1e10,) * 100, F32, "overflow-reduction", "prod", REPLACED),
        (lambda w: w.prod(), (1e10,) * 10, F32, "overflow-reduction", "prod", WIDENED),
    ],
)  # fmt: skip
def test_an_overflow_is_widened_where_float64_has_room_and_held_where_it_has_not(
    function: Callable[[Tensor], Tensor],
    values: tuple[float, ...],
    dtype: torch.dtype,
    cause: str,
    op: str,
    proof: str,
) -> None:
    origin = applied(function, *values, dtype=dtype)
    assert (origin.cause, origin.op, origin.confirmed) == (cause, op, True), origin.message
    assert proof.format(op=op) in origin.evidence["proof"]
    assert not any(word in origin.message for word in (" inf", "nan", "None"))


def test_a_sigmoid_by_hand_that_overflows_to_the_right_number_is_no_fault() -> None:
    """Held at 0.5 its exp would give another number; that is no reason to speak of it."""
    model = Applied(lambda w: 1 / (1 + torch.exp(-w)), -4646.0, 0.5)
    assert attncli.nan_check(model, lambda model: model().sum(), backward=False).origins == ()


def test_two_lines_that_overflow_on_one_tensor_are_not_cured_by_a_change_of_the_first() -> None:
    def both(w: Tensor) -> Tensor:
        first = w.exp()
        second = (2 * w).exp()
        return first + second

    report = attncli.nan_check(Applied(both, 0.5, 4646.0), lambda model: model().sum())
    assert [(one.cause, one.confirmed) for one in report.origins] == [("overflow-exp", True)] * 2


def test_a_power_names_its_base_and_its_exponent() -> None:
    assert (
        applied(lambda w: 2.0**w, 0.5, 200.0).message == "2 to the power 200 is beyond float32 (3.4028e+38)"
    )
    assert applied(lambda w: w ** torch.tensor(3.0), 0.5, 1e30).message.startswith("1e+30 to the power 3 ")


# --- outside the domain -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "value", "cause", "message"),
    [
        *(
            (op, -1.0, "outside-domain", f"{op} of -1 is not a real number")
            for op in ("log", "log2", "log10")
        ),
        *((op, 0.0, "log-of-zero", f"{op} of 0") for op in ("log", "log2", "log10")),
        ("log", -0.0, "log-of-zero", "log of 0"),
        ("log1p", -2.0, "outside-domain", "log1p of -2 is not a real number"),
        ("log1p", -1.0, "log-of-zero", "log1p of -1"),
        ("sqrt", -1.0, "outside-domain", "sqrt of -1 is not a real number"),
        ("rsqrt", -1.0, "outside-domain", "rsqrt of -1 is not a real number"),
        ("rsqrt", 0.0, "division-by-zero", "1 / 0 in rsqrt"),
        ("acos", 2.0, "outside-domain", "acos of 2 is not a real number"),
        ("acos", 1 + 2**-23, "outside-domain", "acos of 1.0000001192092896 is not a real number"),
        ("asin", -2.0, "outside-domain", "asin of -2 is not a real number"),
        ("atanh", 2.0, "outside-domain", "atanh of 2 is not a real number"),
        ("atanh", 1.0, "outside-domain", "atanh of 1 is infinite"),
        ("acosh", 0.25, "outside-domain", "acosh of 0.25 is not a real number"),
        ("logit", 2.0, "outside-domain", "logit of 2 is not a real number"),
        ("logit", 0.0, "outside-domain", "logit of 0 is infinite"),
        ("erfinv", -2.0, "outside-domain", "erfinv of -2 is not a real number"),
    ],
)
def test_a_point_outside_the_domain_is_told_from_a_pole(
    op: str, value: float, cause: str, message: str
) -> None:
    sound = 1.75 if op == "acosh" else 0.75
    origin = applied(getattr(torch, op), sound, value)
    assert (origin.cause, origin.message, origin.confirmed) == (cause, message, True), origin.evidence[
        "proof"
    ]
    outside = origin.message.endswith("not a real number")
    assert ("moved into its domain" in origin.evidence["proof"]) is outside


def test_the_logarithm_in_xlogy_is_that_of_the_second_operand() -> None:
    for value, cause in ((-2.0, "outside-domain"), (0.0, "log-of-zero")):
        origin = applied(lambda w: torch.xlogy(torch.ones(2), w), 0.5, value)
        assert (origin.cause, origin.evidence["value"], origin.confirmed) == (cause, value, True)


@pytest.mark.parametrize(
    ("function", "values", "cause"),
    [
        (lambda w: (w + 1e-12).log(), (0.5, -2.0), "outside-domain"),
        (lambda w: (w + 1e-12) * 300, (0.5, 300.0), "overflow-factor"),
        (lambda w: (w + 1e-12).log(), (0.5, 0.0), "eps-underflow"),
    ],
)
def test_an_eps_that_underflows_is_blamed_only_where_it_would_have_kept_off_0(
    function: Callable[[Tensor], Tensor], values: tuple[float, ...], cause: str
) -> None:
    origin = applied(function, *values, dtype=F16)
    assert (origin.cause, origin.confirmed) == (cause, True)


# --- advice that fits the case ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "has", "has_not"),
    [
        (lambda: applied(torch.exp, 0.5, 4646.0), "(a log-variance to [-30, 20], say)", "softmax or"),
        (lambda: applied(torch.exp, 0.5, 400.0, dtype=F16), "[-30, 10]", "head_dim"),
        (lambda: applied(torch.sinh, 0.5, 4646.0), "Clamp the input before sinh", "log-variance"),
        (lambda: attended(3.0, 1.0, True, F32), "scale the scores by 1/√head_dim", "Clamp"),
        (lambda: attended(10.0, 0.25, True, F32), "which subtract the maximum.", "head_dim"),
        (lambda: attended(60.0, 1.0, False, F16), "Scale q by 1/√head_dim before the product", "QK"),
        (lambda: attended(300.0, 0.25, False, F16), "QK-norm", "Scale q"),
        (lambda: attended(1e20, 1.0, False, F32), "Scale q", "in float32"),
        (lambda: applied(torch.square, 0.5, 300.0, dtype=F16), "Square in float32", "largest"),
        (lambda: applied(torch.square, 0.5, 1e30), "Divide by the largest magnitude", "float32"),
        (lambda: applied(lambda w: w**-2, 0.5, 1e-30), "Keep the base off 0", "float32"),
        (lambda: applied(lambda w: w * 300, 0.5, 300.0, dtype=F16), "in float32", "smaller ("),
        (lambda: applied(lambda w: w * 1e30, 0.5, 1e30), "Keep its inputs smaller", "in float32"),
        (lambda: applied(lambda w: w * 1e30 * 1e30, 1e-25), "Clip or normalise", "Lower the loss scale"),
        (lambda: applied(lambda w: w[:0].mean() + w.sum(), 1.0), "Skip empty groups", "correction"),
        (lambda: applied(lambda w: torch.linalg.eigh(w.diag())[1], 1.0, 1.0), "jitter", "eps inside"),
    ],
)  # fmt: skip
def test_advice_fits_the_dtype_the_operator_and_the_place(
    origin: Callable[[], Origin], has: str, has_not: str
) -> None:
    advice = origin().advice
    assert has in advice, advice
    assert has_not not in advice, advice


def bad_leaf(before: Before, in_batch: bool = False) -> Origin:
    model = nn.Linear(2, 2)
    batch = torch.ones(1, 2)
    (batch if in_batch else model.weight.data)[0, 0] = math.nan
    found = find(model, lambda model: model(batch).sum(), before=before)
    assert len(found.origins) == 1
    return found.origins[0]


def test_a_parameter_that_is_bad_in_a_later_step_was_written_to_between_two_updates() -> None:
    origin = bad_leaf(Before(14, {}))
    assert (origin.cause, origin.confirmed) == ("bad-parameter", True)
    assert "when this step first reads it" in origin.message
    assert "between two updates" in origin.advice
    assert "SAM" in origin.advice
    assert origin.evidence["steps_before"] == 14


def test_what_is_bad_from_the_start_or_no_parameter_keeps_its_advice() -> None:
    for origin in (bad_leaf(NOTHING_BEFORE), bad_leaf(Before(14, {}), in_batch=True)):
        assert "look in the file, the initialisation, the data" in origin.advice
        assert "when it is first read" in origin.message
