"""What the pre-commit hooks run: several files, shards as their folder, the worst exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import llama_folder, llama_shapes, write_safetensors

import attncli.cli
from attncli.pre_commit import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def test_each_file_is_inspected_and_the_worst_exit_code_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama_folder(folder / "good")
    llama_folder(folder / "bad", num_attention_heads=5)
    files = [f"{name}/model.safetensors" for name in ("bad", "good")]
    assert main(["inspect", files[1]]) == 0
    capsys.readouterr()
    assert main(["inspect", *files]) == 1
    out = capsys.readouterr().out
    assert "bad/model.safetensors" in out
    assert out.endswith("2 attention layers; no findings.\n")
    assert main(["inspect", "missing.safetensors", *files]) == 2
    assert "missing.safetensors" in capsys.readouterr().err


def test_options_go_to_every_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_folder(folder / "a", num_attention_heads=5)
    llama_folder(folder / "b", num_attention_heads=5)
    files = ["a/model.safetensors", "b/model.safetensors"]
    assert main(["inspect", "--fail-on=never", "-q", *files]) == 0
    assert capsys.readouterr().out == ""


def test_shards_are_read_together_and_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_folder(folder / "m")
    (folder / "m" / "model.safetensors").unlink()
    shapes = llama_shapes(2)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [dict(list(shapes.items())[:7]), dict(list(shapes.items())[7:])]
    for name, half in zip(names, halves, strict=True):
        write_safetensors(folder / "m" / name, half)
    index = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "m" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    assert main(["inspect", *(f"m/{name}" for name in names)]) == 0
    assert capsys.readouterr().out.count("sharded safetensors · 2 files") == 1


def test_ctrl_c_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def interrupted() -> int:
        ran.append(sys.argv)
        return 130

    monkeypatch.setattr(attncli.cli, "run", interrupted)
    assert main(["check", "--quiet", "a.gguf", "b.gguf"]) == 130
    assert ran == [["attncli", "check", "--quiet", "a.gguf"]]
