"""check: what its one run sees is what each command sees on its own, and it costs one load and one run."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import attncli
from attncli import api
from attncli.api import check_model
from attncli.errors import UsageError
from attncli.records import Measurement

CODE = """
import math
import torch
from torch import nn

builds, runs = [], []

class Attention(nn.Module):
    def __init__(self, scale=None, hide=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.scale, self.hide = 8 ** -0.5 if scale is None else scale, hide

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * self.scale
        if self.hide:
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x.device), -math.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, 32))

class Model(nn.Module):
    def __init__(self, *layers, assertive=False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.assertive = assertive

    def forward(self, x):
        runs.append(1)
        for layer in self.layers:
            x = layer(x)
        if self.assertive:
            assert not x.isnan().any(), "the output is nan"
        return x

def build(*, wrong=lambda model: None, **settings):
    builds.append(1)
    torch.manual_seed(0)
    model = Model(Attention(**settings), Attention())
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.weight *= 4
        wrong(model)
    return model

def healthy():
    return build()

def bad_weight():
    return build(wrong=lambda model: model.layers[1].out.weight[3].fill_(math.nan))

class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, 4, 8).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        probs = (q @ k.mT / 8 ** 0.5).softmax(-1)
        return x + self.out((probs @ v).transpose(1, 2).reshape(b, t, 32))

def dead_head():
    torch.manual_seed(0)
    model = Model(Separate())
    with torch.no_grad():
        model.layers[0].v_proj.weight[8:16].zero_()
    return model

def hidden():
    return build(hide=True)

def hidden_and_asserted():
    model = build(hide=True)
    model.assertive = True
    return model

def unscaled():
    return build(scale=12.0)

def broken():
    model = build()
    model.layers[1].forward = lambda x: x @ torch.ones(3)
    return model

def no_attention():
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU())

def batch():
    torch.manual_seed(1)
    return (torch.randn(2, 12, 32),)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "code.py"
    file.write_text(CODE, encoding="utf-8")
    return file


@pytest.fixture
def check(code: Path) -> Callable[..., api.Report]:
    def run(build: str, **settings: Any) -> api.Report:
        return check_model(f"{code}:{build}", input=f"{code}:batch", device="cpu", **settings)

    return run


def codes(report: api.Report) -> list[str]:
    return [finding.code for finding in report.findings]


# --- each part is what its own command says -----------------------------------------------------------


def test_a_healthy_model_is_clean_in_every_part(check: Callable[..., api.Report]) -> None:
    report = check("healthy")
    assert (report.command, report.verdict, report.findings, report.origins) == ("check", "clean", (), ())
    assert (len(report.layers), len(report.calls), report.exit_code("note")) == (2, 2, 0)
    assert report.run is not None
    assert report.run["calls_measured"] == 2
    assert report.run["operators"] == sum(report.run["operators_by_phase"].values()) > 10
    assert report.run["headroom_bits"]["float32"]["bits"] > 100


@pytest.mark.parametrize("build", ["healthy", "dead_head", "unscaled", "hidden"])
def test_the_calls_and_their_numbers_are_those_of_entropy_and_overflow(
    build: str, check: Callable[..., api.Report], code: Path
) -> None:
    together = check(build)
    alone = api.measure_model("entropy", f"{code}:{build}", input=f"{code}:batch", device="cpu")
    of_calls = [row for row in together.measurements if row.call is not None]
    assert repr(together.calls) == repr(alone.calls)
    assert repr(of_calls) == repr(list(alone.measurements))
    assert {c for c in codes(alone) if c != "ATT506"} <= set(codes(together))


def test_the_values_are_those_of_inspect_on_the_saved_weights(
    check: Callable[..., api.Report], tmp_path: Path, code: Path
) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    save_file(namespace["dead_head"]().state_dict(), tmp_path / "saved.safetensors")
    saved = attncli.inspect(tmp_path / "saved.safetensors", values=True)
    together = check("dead_head")

    def values(rows: tuple[Measurement, ...]) -> dict[tuple[str, str], Any]:
        return {(r.layer, r.metric): r.value for r in rows if r.metric in METRICS}

    assert values(together.measurements) == pytest.approx(values(saved.measurements), rel=1e-6)
    assert len(values(saved.measurements)) == 5 * 8


METRICS = ("nan_count", "inf_count", "absmax", "rms", "zero_fraction")


@pytest.mark.parametrize("build", ["healthy", "hidden", "bad_weight"])
def test_the_origins_are_those_of_nan_check(build: str, check: Callable[..., api.Report], code: Path) -> None:
    together = check(build)
    alone = api.nan_check_model(f"{code}:{build}", input=f"{code}:batch", device="cpu")
    assert together.origins == alone.origins
    assert (together.run or {})["operators"] == (alone.run or {})["operators"]
    assert {c for c in codes(together) if c.startswith("ATT7")} == set(codes(alone))


@pytest.mark.parametrize(
    ("build", "found"),
    [
        ("bad_weight", ["ATT201", "ATT702"]),
        ("dead_head", ["ATT202"]),
        ("hidden", ["ATT701"]),
        ("unscaled", ["ATT410"]),
    ],
)
def test_a_fault_is_found_by_name(build: str, found: list[str], check: Callable[..., api.Report]) -> None:
    report = check(build)
    assert [c for c in codes(report) if c in found] == found
    assert "ATT506" not in codes(report)  # that scores are NaN is no news beside where it was born
    assert report.exit_code("warning") == 1


def test_the_cause_of_nan_is_proved_unless_told_otherwise(check: Callable[..., api.Report]) -> None:
    assert [origin.confirmed for origin in check("hidden").origins] == [True]
    assert [origin.confirmed for origin in check("hidden", confirm=False).origins] == [None]


# --- one load, one run --------------------------------------------------------------------------------


def counted(code: Path, build: str) -> tuple[int, int]:
    """How often the model was built and run."""
    file = code.with_name("counting.py")
    tail = """
import atexit, pathlib
def told():
    pathlib.Path(__file__).with_suffix(".txt").write_text(f"{len(builds)} {len(runs)}")
class Told(Model):
    def forward(self, x):
        out = super().forward(x)
        told()
        return out
Plain, Model = Model, Told
"""
    file.write_text(CODE.replace("def build(", f"{tail}\ndef build(", 1), encoding="utf-8")
    check_model(f"{file}:{build}", input=f"{file}:batch", device="cpu")
    builds, runs = file.with_suffix(".txt").read_text().split()
    return int(builds), int(runs)


def test_a_healthy_model_is_built_once_and_run_once(code: Path) -> None:
    assert counted(code, "healthy") == (1, 1)


def test_only_what_must_be_proved_runs_again(code: Path) -> None:
    builds, runs = counted(code, "hidden")
    assert builds == 1
    assert runs > 1


def test_weights_that_the_scan_found_sound_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from attncli.trace import nonfinite

    looked: set[int] = set()
    at_once = nonfinite.at_once

    def remember(tensor: torch.Tensor) -> tuple[float, float]:
        looked.add(tensor.data_ptr())
        return at_once(tensor)

    monkeypatch.setattr(nonfinite, "at_once", remember)
    torch.manual_seed(0)
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 12, 32)
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert attncli.check(model, x, x, x).findings == ()
    assert x.data_ptr() in looked
    assert looked.isdisjoint(weights.values())
    with torch.no_grad():
        model.in_proj_weight[3, 4] = math.nan
    report = attncli.check(model, x, x, x)
    assert weights["in_proj_weight"] in looked
    assert [(origin.op, origin.tensor) for origin in report.origins] == [("leaf", "in_proj_weight")]


# --- a run that stops ---------------------------------------------------------------------------------


def test_a_run_that_stops_at_nan_is_told_with_what_it_saw(check: Callable[..., api.Report]) -> None:
    report = check("hidden_and_asserted")
    assert "ATT701" in codes(report)
    assert len(report.calls) == 2
    assert report.exit_code() == 1


def test_a_run_that_fails_by_itself_is_an_error(check: Callable[..., api.Report]) -> None:
    with pytest.raises(attncli.AttncliError, match="the forward pass failed"):
        check("broken")


def test_a_model_without_attention_is_not_observed(check: Callable[..., api.Report]) -> None:
    report = check("no_attention")
    assert (report.verdict, report.exit_code()) == ("unobserved", 3)


# --- layers, expectations -----------------------------------------------------------------------------


def test_expectations_are_part_of_the_check(check: Callable[..., api.Report]) -> None:
    assert check("healthy", expect=["heads=4,kv_heads=4,head_dim=8,layers=2,mask=none"]).findings == ()
    report = check("healthy", expect=["heads=5"])
    assert codes(report) == ["ATT801", "ATT801"]
    with pytest.raises(UsageError, match="nothing is called 'hats'"):
        check("healthy", expect=["hats=5"])


def test_chosen_layers_are_looked_at_alone(check: Callable[..., api.Report]) -> None:
    report = check("healthy", layers=["1"])
    assert [call.layer for call in report.calls] == ["layers.1"]
    assert [layer.id for layer in report.layers] == ["layers.1"]


# --- a bare checkpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bare.safetensors", "bare.pt"])
def test_a_bare_checkpoint_is_checked_as_far_as_it_goes(name: str, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    state = namespace["bad_weight"]().state_dict()
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    report = check_model(str(tmp_path / name))
    assert (report.command, report.run, report.verdict) == ("check", None, "findings")
    assert "ATT201" in codes(report)
    assert "nan_count" in {row.metric for row in report.measurements}
    assert any(
        note.startswith("not observed: entropy, scores and NaN of a forward pass") for note in report.notes
    )


def test_a_healthy_bare_checkpoint_passes_and_meets_expectations(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    save_file(namespace["healthy"]().state_dict(), tmp_path / "m.safetensors")
    assert check_model(str(tmp_path / "m.safetensors"), expect=["layers=2"]).exit_code("warning") == 0
    assert codes(check_model(str(tmp_path / "m.safetensors"), expect=["layers=3"])) == ["ATT801"]


def test_scores_are_bounded_where_nothing_runs() -> None:
    report = check_model(str(Path(__file__).parent.parent / "examples" / "dates" / "dates.safetensors"))
    assert len([row for row in report.measurements if row.metric == "score_bound"]) == 6 * 4


def test_a_folder_without_config_is_a_bare_checkpoint_too(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(CODE, namespace)
    save_file(namespace["healthy"]().state_dict(), tmp_path / "model.safetensors")
    assert check_model(str(tmp_path)).run is None


def test_what_is_no_model_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary", encoding="utf-8")
    for path in ("notes.txt", "missing.safetensors", ""):
        with pytest.raises(attncli.AttncliError):
            check_model(str(tmp_path / path) if path else "")


# --- what the files say and memory does not -----------------------------------------------------------


def test_a_finding_about_the_files_is_kept_although_loading_smooths_it_out(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=5, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = "model.layers.3.self_attn.q_proj.weight"
    state[name] = state[name].half()
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = check_model(str(tmp_path), device="cpu", seq_len=8)
    assert [(f.code, f.layer) for f in report.findings if f.severity != "note"] == [
        ("ATT104", "model.layers.3.self_attn")
    ]


# --- a model in memory --------------------------------------------------------------------------------


def test_a_model_in_memory_is_checked_and_left_as_it_was() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.3)
    model = nn.Sequential(nn.BatchNorm1d(6), layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    report = attncli.check(model, torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)))
    assert report.verdict == "clean"
    assert [call.layer for call in report.calls] == ["1.self_attn"]
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_function_of_tensors_is_checked_with_its_inputs_by_name() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (query @ key.mT / math.sqrt(8)).softmax(-1) @ value

    q = torch.randn(1, 2, 4, 8)
    bad = q.clone()
    bad[0, 1, 2, 3] = math.nan
    assert attncli.check(attend, 3 * q, q + 0.1, q).exit_code("warning") == 0
    report = attncli.check(attend, q, bad, q)
    assert [(origin.phase, origin.tensor) for origin in report.origins] == [("input", "key")]


def test_what_is_expected_of_a_model_in_memory_is_checked() -> None:
    model = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(1, 5, 32)
    assert attncli.check(model, x, x, x, expect=["heads=4"]).verdict == "clean"
    assert codes(attncli.check(model, x, x, x, expect=["heads=8"])) == ["ATT801"]


def test_the_json_report_of_a_check_holds_every_part(check: Callable[..., api.Report]) -> None:
    report = json.loads(check("hidden").to_json())
    assert report["command"] == "check"
    assert {"operators_by_phase", "headroom_bits", "calls_seen", "calls"} <= set(report["run"])
    assert {row["metric"] for row in report["measurements"]} > {
        "absmax",
        "entropy",
        "dot_absmax",
        "score_max",
    }
    assert len(report["origins"]) == 1
    assert re.fullmatch(r"[0-9a-f]{16}", report["structure"])
