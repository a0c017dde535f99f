"""A model given by name: which layers are kept, and what is said of patterns that fit none."""

from pathlib import Path

import pytest
import torch

import attncli
from attncli.api import measure_model
from attncli.errors import UsageError

STACK = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]

def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())

def batch():
    return (torch.randn(2, 5, 8),)
"""


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    file = tmp_path / "stack.py"
    file.write_text(STACK, encoding="utf-8")
    return file


def kept(stack: Path, *layers: str) -> tuple[list[str], list[str]]:
    """Paths of the layers kept, and the notes about patterns."""
    report = measure_model("entropy", f"{stack}:build", input=f"{stack}:batch", layers=layers, device="cpu")
    return [layer.path for layer in report.layers], [note for note in report.notes if "--layer" in note]


def test_a_pattern_without_a_match_is_named_where_others_have_one(stack: Path) -> None:
    assert kept(stack, "0.*", "2.attn", "7", "7") == (
        ["0.attention"],
        ["no attention call matches --layer 2.attn, 7"],
    )
    assert kept(stack, "0.*", "2") == (["0.attention", "2.attention"], [])


def test_patterns_that_all_fit_nothing_are_an_error(stack: Path) -> None:
    with pytest.raises(UsageError, match=r"no attention call matches --layer 9, x\."):
        kept(stack, "9", "x")


def test_a_line_of_the_users_own_code_is_shown_from_the_working_directory_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    file = tmp_path / "code" / "mine.py"
    source = "def attend(q, k, v):\n    return (q @ k.mT).softmax(-1) @ v\n"
    file.write_text(source, encoding="utf-8")
    names: dict[str, object] = {}
    exec(compile(source, str(file), "exec"), names)
    q = torch.randn(3, 1, 2, 4, 8)

    def line(attend: object) -> str | None:
        return attncli.measure(attend, *q).calls[0].source

    monkeypatch.chdir(tmp_path)
    assert line(names["attend"]) == f"{Path('code', 'mine.py')}:2"
    monkeypatch.chdir(tmp_path / "code")
    assert line(names["attend"]) == "mine.py:2"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert line(names["attend"]) == f"{file}:2"
