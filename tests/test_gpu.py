"""What only a GPU shows: its kernels, its streams and graphs, its loss scale, and a step that moves between devices."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from traced import assert_measured, only

import attncli
from attncli.api.capsules import replay_capsule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SCRIPT = Path(__file__).parent / "training_scripts" / "real" / "on_gpu.py"
B, H, K, T, D = 2, 8, 2, 256, 64

# --- measuring ----------------------------------------------------------------------------------------


def drawn(dtype: torch.dtype, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, T, D, generator=generator) for n in (H, heads, heads))
    return (2 * q).to("cuda", dtype), k.to("cuda", dtype), v.to("cuda", dtype)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.mT * D**-0.5).cpu()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_every_kernel_is_measured_as_the_reference_says(
    backend: str, dtype: torch.dtype, causal: bool
) -> None:
    if backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION") and dtype == torch.float32:
        pytest.skip("this kernel has no float32")
    q, k, v = drawn(dtype)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        report = attncli.measure(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v
        )
    scores = scores_of(q, k)
    if causal:
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    assert_measured(report, scores, tolerance=1e-3)
    assert (report.run or {})["calls_measured"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", ["bias", "bool", "grouped", "dropout"])
def test_masks_shared_heads_and_dropout_on_a_gpu(masked: str, dtype: torch.dtype) -> None:
    q, k, v = drawn(dtype, K if masked == "grouped" else H)
    scores = scores_of(q, k)
    given: dict[str, Any] = {}
    if masked == "bias":
        given["attn_mask"] = torch.randn(1, H, T, T, device="cuda", dtype=dtype)
        scores = scores + given["attn_mask"].double().cpu()
    elif masked == "bool":
        given["attn_mask"] = torch.rand(B, 1, T, T, device="cuda") < 0.7
        scores = scores.masked_fill(~given["attn_mask"].cpu(), -math.inf)
    elif masked == "dropout":
        given["dropout_p"] = 0.2
    else:
        given["enable_gqa"] = True
    report = attncli.measure(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given), q, k, v)
    assert_measured(report, scores, tolerance=1e-3)


def test_a_compiled_flex_attention_on_a_gpu() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = drawn(torch.float16)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention)
    report = attncli.measure(lambda q, k, v: attend(q, k, v, block_mask=mask), q, k, v)
    scores = scores_of(q, k).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    assert_measured(report, scores, tolerance=1e-3)


def test_an_encoder_in_float16_is_seen_whole() -> None:
    layer = nn.TransformerEncoderLayer(D * 2, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().cuda().half()
    padding = torch.zeros(3, 10, dtype=torch.bool, device="cuda")
    padding[1, 6:] = True
    with torch.no_grad():
        report = attncli.measure(
            model, torch.randn(3, 10, D * 2, device="cuda").half(), src_key_padding_mask=padding
        )
    run = report.run or {}
    assert (run["calls_seen"], run["calls_measured"]) == (2, 2)


def test_memory_grows_with_the_tokens_alone() -> None:
    """Float16 at 16,384 tokens: one matrix of scores would take 6 GB in float32."""
    q, k, v = (torch.randn(1, 6, 16_384, D, device="cuda", dtype=torch.float16) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = attncli.measure(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)
    assert only(report).kernel in ("flash (CUDA)", "efficient (CUDA)", "cuDNN")
    assert torch.cuda.max_memory_allocated() - before < 1 << 30


# --- NaN ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Scores that are not scaled, in the dtype of the model."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D, bias=False) for _ in range(3))
        with torch.no_grad():
            for one in (self.q, self.k):
                one.weight.copy_(gain * torch.eye(D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        if mask is not None:
            scores = scores + mask
        return scores.softmax(-1) @ self.v(x)


def test_an_overflow_in_float16_is_named_and_proved() -> None:
    model = Attention(40.0).cuda().half()
    x = torch.ones(2, 5, D, device="cuda", dtype=torch.float16)
    report = attncli.nan_check(model, lambda model: model(x).float().square().mean())
    first = report.origins[0]
    assert (first.cause, first.confirmed, first.value) == ("overflow-scores", True, "+inf")


def test_a_row_of_padding_is_named_and_proved() -> None:
    model = Attention(1.0).cuda()
    mask = torch.zeros(3, 1, 5, device="cuda")
    mask[2] = -math.inf
    x = torch.randn(3, 5, D, device="cuda")
    report = attncli.nan_check(model, lambda model: model(x, mask).square().mean())
    first = report.origins[0]
    assert (first.cause, first.confirmed) == ("masked-row", True)
    assert (first.at or {})["batch"] == 2


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_nan_in_the_values_of_a_fused_kernel_leads_to_the_input(backend: str) -> None:
    q, k, v = drawn(torch.float16)
    v[1, 3, 7, 5] = math.nan

    def step(model: nn.Module) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, model(v)).float().sum()

    report = attncli.nan_check(nn.Identity(), step)
    assert [(one.phase, one.value) for one in report.origins] == [("input", "nan")]


# --- training -----------------------------------------------------------------------------------------


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def script(*options: str, watch: tuple[str, ...] | None = None, cwd: Path | None = None) -> Ended:
    command = [sys.executable, *(("-m", "attncli", "nan-check", *watch) if watch is not None else ())]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    done = subprocess.run(
        [*command, str(SCRIPT), *options],
        capture_output=True, text=True, timeout=400, check=False, env=environment, cwd=cwd,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


HEALTHY = (
    (),
    ("--clip",),
    ("--fused",),
    ("--amp", "bfloat16"),
    ("--amp", "float16", "--clip"),
    ("--amp", "float16", "--fused"),
    ("--compile", "default"),
    ("--compile", "reduce-overhead", "--amp", "bfloat16"),
    ("--graph",),
    ("--graph", "--fused"),
    ("--wrap", "ddp", "--amp", "float16"),
    ("--wrap", "fsdp", "--clip"),
)


@pytest.mark.parametrize("options", HEALTHY, ids=" ".join)
def test_a_training_is_the_same_to_the_last_bit(options: tuple[str, ...], tmp_path: Path) -> None:
    plain = script(*options)
    assert plain.code == 0, plain.err[-3000:]
    watched = script(*options, watch=("--every", "5", "--log", str(tmp_path / "log.jsonl")))
    assert watched.out == plain.out, watched.err[-3000:]
    assert watched.code == 0
    assert "watched, nothing went wrong" in watched.err or "--graph" in options, watched.err[-3000:]
    if "--graph" not in options:
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [5, 10, 15, 20]


# Options of the script, and of its fault: where it is seen, its cause, whether that is proved.
FAULTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("--fault", "scores", "--amp", "float16"), "loss", "overflow-scores"),
    (("--fault", "scores", "--amp", "float16", "--wrap", "ddp"), "loss", "overflow-scores"),
    (("--fault", "loss"), "loss", "log-of-zero"),
    (("--fault", "loss", "--amp", "bfloat16", "--compile", "default"), "loss", "log-of-zero"),
    (("--fault", "sample",), "loss", "bad-leaf"),
    (("--fault", "sample", "--wrap", "fsdp"), "loss", "bad-leaf"),
    (("--fault", "scale", "--amp", "float16", "--at", "1"), "loss scale", "singular-gradient"),
    (("--fault", "scale", "--amp", "float16", "--fused", "--at", "1"), "loss scale", "singular-gradient"),
    (("--fault", "scale", "--clip"), "gradient", "singular-gradient"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "seen", "cause"), FAULTS, ids=[" ".join(one[0]) for one in FAULTS])
def test_a_fault_is_named(options: tuple[str, ...], seen: str, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    ended = script(
        *options, watch=("--format", "json", "-o", str(file), "--capsule", str(tmp_path / "capsule"))
    )
    assert ended.code == 1, ended.err[-3000:]
    report = json.loads(file.read_text())
    fault = report["run"]["training"]["fault"]
    told = json.dumps([fault, report["origins"], report["notes"]], indent=1)
    assert fault["seen"] == seen, told
    if seen != "loss scale":
        assert fault["step"] == 14, told
    assert fault["withheld"], told
    assert fault["replayed"], told
    first = report["origins"][0]
    assert first["cause"] == cause, told
    assert first["confirmed"] in ((True, None) if cause == "bad-leaf" else (True,)), told
    if "sample" in options:
        assert fault["batch"]["index"] == 13, told
        assert fault["batch"]["item"] == 8 * 13 + 3, told
    if "--wrap" in options:
        return
    for device in ("cuda", "cpu"):
        again = replay_capsule(tmp_path / "capsule", device=device)
        assert again.origins, told
        assert (again.origins[0].cause, again.origins[0].phase) == (first["cause"], first["phase"])


def test_an_exploding_learning_rate_leaves_the_weights_from_before(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    ended = script("--fault", "rate", watch=("--format", "json", "-o", str(file)))
    assert ended.code == 1, ended.err[-3000:]
    report = json.loads(file.read_text())
    assert report["run"]["training"]["fault"]["step"] in (14, 15)
    assert any("lr" in str(one) or "learning rate" in one["message"] for one in report["findings"]), report[
        "findings"
    ]


def test_a_capsule_of_a_cpu_replays_on_a_gpu(tmp_path: Path) -> None:
    model = Attention(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = torch.zeros(3, 1, 5)
    mask[2] = -math.inf

    def train() -> None:
        for number in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 5, D), mask if number == 2 else None).square().mean().backward()
            optimizer.step()

    with pytest.raises(attncli.TrainingFault), attncli.watch(model, optimizer, capsule=tmp_path / "c"):
        train()
    for device in ("cpu", "cuda"):
        report = replay_capsule(tmp_path / "c", device=device)
        assert [(one.cause, one.confirmed) for one in report.origins] == [("masked-row", True)]
        assert report.environment["device"].startswith(device)


def test_the_random_state_of_the_gpu_is_the_script_s(tmp_path: Path) -> None:
    def states(step: Callable[[], Any]) -> list[Tensor]:
        torch.manual_seed(3)
        for _ in range(6):
            step()
        return [torch.get_rng_state(), torch.cuda.get_rng_state()]

    def training() -> Callable[[], None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 1)).cuda()
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            model(torch.randn(4, D, device="cuda")).square().mean().backward()
            optimizer.step()

        return step

    plain = states(training())
    step = training()
    with attncli.watch(every=2):
        watched = states(step)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
