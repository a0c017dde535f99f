"""The same answers on a GPU as on a CPU: kernels, streams and graphs, loss scales, steps that move between them.

What costs little is asked of both; where no GPU is found, that half is skipped.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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

SCRIPT = Path(__file__).parent / "training_scripts" / "real" / "on_a_device.py"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
on_gpu = [pytest.mark.gpu, GPU]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
B, H, K, T, D = 2, 8, 2, 64, 64

# --- measuring ----------------------------------------------------------------------------------------


def drawn(device: str, dtype: torch.dtype, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, T, D, generator=generator) for n in (H, heads, heads))
    return (2 * q).to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.double() @ k.mT * D**-0.5).cpu()


def backends() -> Iterator[Any]:
    for backend in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if backend in ("MATH", "FLASH_ATTENTION"):
                yield pytest.param("cpu", backend, dtype, id=f"cpu-{backend}-{dtype}")
            if backend in ("MATH", "EFFICIENT_ATTENTION") or dtype != torch.float32:
                yield pytest.param("cuda", backend, dtype, id=f"cuda-{backend}-{dtype}", marks=on_gpu)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("device", "backend", "dtype"), list(backends()))
def test_every_kernel_is_measured_as_the_reference_says(
    device: str, backend: str, dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = drawn(device, dtype)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        report = attncli.measure(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v
        )
    scores = scores_of(q, k)
    if causal:
        scores = scores.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    assert_measured(report, scores, tolerance=1e-3)
    assert (report.run or {})["calls_measured"] == 1


@devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", ["bias", "bool", "grouped"])
def test_masks_and_shared_heads(device: str, masked: str, dtype: torch.dtype) -> None:
    q, k, v = drawn(device, dtype, K if masked == "grouped" else H)
    scores = scores_of(q, k)
    given: dict[str, Any] = {}
    if masked == "bias":
        given["attn_mask"] = torch.randn(1, H, T, T, device=device, dtype=dtype)
        scores = scores + given["attn_mask"].double().cpu()
    elif masked == "bool":
        given["attn_mask"] = torch.rand(B, 1, T, T, device=device) < 0.7
        scores = scores.masked_fill(~given["attn_mask"].cpu(), -math.inf)
    else:
        given["enable_gqa"] = True
    report = attncli.measure(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **given), q, k, v)
    assert_measured(report, scores, tolerance=1e-3)


@pytest.mark.gpu
@GPU
def test_a_compiled_flex_attention() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = drawn("cuda", torch.float16)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device="cuda")
    attend = torch.compile(flex_attention)
    report = attncli.measure(lambda q, k, v: attend(q, k, v, block_mask=mask), q, k, v)
    scores = scores_of(q, k).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
    assert_measured(report, scores, tolerance=1e-3)


@devices
def test_an_encoder_in_float16_is_seen_whole(device: str) -> None:
    layer = nn.TransformerEncoderLayer(D * 2, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval().to(device).half()
    padding = torch.zeros(3, 10, dtype=torch.bool, device=device)
    padding[1, 6:] = True
    x = torch.randn(3, 10, D * 2, device=device).half()
    with torch.no_grad():
        report = attncli.measure(model, x, src_key_padding_mask=padding)
    run = report.run or {}
    assert (run["calls_seen"], run["calls_measured"]) == (2, 2)


@pytest.mark.gpu
@GPU
def test_memory_of_a_gpu_grows_with_the_tokens_alone() -> None:
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


@devices
def test_an_overflow_in_float16_is_named_and_proved(device: str) -> None:
    model = Attention(40.0).to(device).half()
    x = torch.ones(2, 5, D, device=device, dtype=torch.float16)
    report = attncli.nan_check(model, lambda model: model(x).float().square().mean())
    first = report.origins[0]
    assert (first.cause, first.confirmed, first.value) == ("overflow-scores", True, "+inf")


@devices
def test_a_row_of_padding_is_named_and_proved(device: str) -> None:
    model = Attention(1.0).to(device)
    mask = torch.zeros(3, 1, 5, device=device)
    mask[2] = -math.inf
    x = torch.randn(3, 5, D, device=device)
    report = attncli.nan_check(model, lambda model: model(x, mask).square().mean())
    first = report.origins[0]
    assert (first.cause, first.confirmed) == ("masked-row", True)
    assert (first.at or {})["batch"] == 2


@devices
@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
def test_nan_in_the_values_of_attention_leads_to_the_input(device: str, backend: str) -> None:
    q, k, v = drawn(device, torch.float16)
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


def script(device: str, *options: str, watch: tuple[str, ...] | None = None) -> Ended:
    command = [sys.executable, *(("-m", "attncli", "nan-check", *watch) if watch is not None else ())]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [*command, str(SCRIPT), "--device", device, *options],
        capture_output=True, text=True, timeout=400, check=False, env=environment,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


# A CPU has tests of its own for most of this.
HEALTHY = (
    ("cpu", "--amp", "bfloat16", "--fused", "--clip"),
    ("cuda",),
    ("cuda", "--clip"),
    ("cuda", "--fused"),
    ("cuda", "--amp", "bfloat16"),
    ("cuda", "--amp", "float16", "--clip"),
    ("cuda", "--amp", "float16", "--fused"),
    ("cuda", "--compile", "default"),
    ("cuda", "--compile", "reduce-overhead", "--amp", "bfloat16"),
    ("cuda", "--graph"),
    ("cuda", "--graph", "--fused"),
    ("cuda", "--wrap", "ddp", "--amp", "float16"),
    ("cuda", "--wrap", "fsdp", "--clip"),
)


def on_their_device(cases: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    for case in cases:
        options = case if isinstance(case[0], str) else case[0]
        yield pytest.param(
            *(case if options is not case else (case,)),
            id=" ".join(options),
            marks=() if options[0] == "cpu" else on_gpu,
        )


@pytest.mark.parametrize("options", list(on_their_device(HEALTHY)))
def test_a_training_is_the_same_to_the_last_bit(options: tuple[str, ...], tmp_path: Path) -> None:
    plain = script(*options)
    assert plain.code == 0, plain.err[-3000:]
    watched = script(*options, watch=("--every", "5", "--log", str(tmp_path / "log.jsonl")))
    assert watched.out == plain.out, watched.err[-3000:]
    assert watched.code == 0
    if "--graph" not in options:
        assert "watched, nothing went wrong" in watched.err, watched.err[-3000:]
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [5, 10, 15, 20]


# Options of the script, and of its fault: where it is seen, and its cause.
FAULTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("cpu", "--fault", "scores", "--amp", "float16"), "loss", "overflow-scores"),
    (("cuda", "--fault", "scores", "--amp", "float16"), "loss", "overflow-scores"),
    (("cuda", "--fault", "scores", "--amp", "float16", "--wrap", "ddp"), "loss", "overflow-scores"),
    (("cuda", "--fault", "loss"), "loss", "log-of-zero"),
    (("cuda", "--fault", "loss", "--amp", "bfloat16", "--compile", "default"), "loss", "log-of-zero"),
    (("cpu", "--fault", "sample"), "loss", "bad-input"),
    (("cuda", "--fault", "sample"), "loss", "bad-input"),
    (("cuda", "--fault", "sample", "--wrap", "fsdp"), "loss", "bad-input"),
    (("cuda", "--fault", "scale", "--amp", "float16", "--at", "1"), "loss scale", "singular-gradient"),
    (("cuda", "--fault", "scale", "--amp", "float16", "--fused", "--at", "1"), "loss scale", "singular-gradient"),
    (("cuda", "--fault", "scale", "--clip"), "gradient", "singular-gradient"),
)  # fmt: skip


@pytest.mark.parametrize(("options", "seen", "cause"), list(on_their_device(FAULTS)))
def test_a_fault_is_named_and_its_capsule_shows_it_on_every_device(
    options: tuple[str, ...], seen: str, cause: str, tmp_path: Path
) -> None:
    file, capsule = tmp_path / "report.json", tmp_path / "capsule"
    ended = script(*options, watch=("--format", "json", "-o", str(file), "--capsule", str(capsule)))
    assert ended.code == 1, ended.err[-3000:]
    report = json.loads(file.read_text())
    fault = report["run"]["training"]["fault"]
    told = json.dumps([fault, report["origins"], report["notes"]], indent=1)
    assert (fault["seen"], fault["withheld"], fault["reproduced"]) == (seen, True, True), told
    if seen != "loss scale":
        assert fault["step"] == 14, told
    first = report["origins"][0]
    assert (first["cause"], first["confirmed"]) == (cause, True), told
    if "sample" in options:
        assert (fault["batch"]["index"], fault["batch"]["item"]) == (13, 8 * 13 + 3), told
    if "--wrap" in options:
        return
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        again = replay_capsule(capsule, device=device)
        assert again.origins, told
        assert (again.origins[0].cause, again.origins[0].phase) == (first["cause"], first["phase"])


@devices
def test_a_capsule_of_a_cpu_shows_its_fault_elsewhere(device: str, tmp_path: Path) -> None:
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
    report = replay_capsule(tmp_path / "c", device=device)
    assert [(one.cause, one.confirmed) for one in report.origins] == [("masked-row", True)]
    assert report.environment["device"].startswith(device)


@devices
def test_the_random_states_are_the_script_s(device: str) -> None:
    def states(step: Callable[[], Any]) -> list[Tensor]:
        torch.manual_seed(3)
        for _ in range(6):
            step()
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]

    def training() -> Callable[[], None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 1)).to(device)
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            model(torch.randn(4, D, device=device)).square().mean().backward()
            optimizer.step()

        return step

    plain = states(training())
    step = training()
    with attncli.watch(every=2):
        watched = states(step)
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
