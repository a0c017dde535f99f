"""The house: who may import whom, and who may import torch, read from the imports of every module."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_checkpoints import llama_folder

import attncli

PACKAGE = Path(attncli.__file__).parent
FLOORS = {
    "records": 0,
    "errors": 0,
    "checkpoint": 1,
    "layout": 1,
    "weights": 1,
    "model": 1,
    "trace": 1,
    "training": 1,
    "rules": 1,
    "topics": 1,
    "render": 1,
    "api": 2,
    "cli": 3,
    "callbacks": 3,
    "__main__": 4,
    "pytest_plugin": 4,
    "pre_commit": 4,
}
# The only modules that may hold tensors. api.py reaches them by name, inside the functions that read values.
TENSOR_SIDE = (
    "attncli.checkpoint.values",
    "attncli.checkpoint.dequantize",
    "attncli.weights",
    "attncli.model",
    "attncli.trace",
    "attncli.training",
    # They are classes of other libraries.
    "attncli.callbacks",
)
TENSOR_LIBRARIES = {"torch", "numpy", "scipy", "safetensors", "transformers", "gguf", "tensorflow", "jax"}


class Import(NamedTuple):
    """`target` is a dotted name; `lazy`: inside a function, or for type checkers only."""

    target: str
    line: int
    lazy: bool


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, module: str = "attncli") -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.split(".")[: -child.level]
                    base = ".".join([*above, *([base] if base else [])])
                found.extend(Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing_only = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            walk(child, lazy or inside or typing_only)

    walk(ast.parse(source), False)
    return found


@cache
def house() -> tuple[tuple[str, list[Import]], ...]:
    """Every module of attncli and what it imports."""
    modules = [(module_name(file), file) for file in sorted(PACKAGE.rglob("*.py"))]
    return tuple((name, imports_of(file.read_text(encoding="utf-8"), name)) for name, file in modules)


def room(dotted: str) -> str | None:
    """ "attncli.layout.heads" → "layout"; None for the package itself (its version, its lazy API)."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else None


def holds_tensors(dotted: str) -> bool:
    return any(dotted == module or dotted.startswith(f"{module}.") for module in TENSOR_SIDE)


def broken_floors(module: str, imports: list[Import]) -> list[str]:
    """What `module` imports from above, or from another room of its own floor."""
    here = room(module)
    if here is None:  # attncli/__init__.py: only for type checkers, otherwise on first use
        return [f"{module}:{i.line}: {i.target}" for i in imports if room(i.target) and not i.lazy]
    broken = []
    for item in imports:
        there = room(item.target)
        if item.target.split(".")[0] != "attncli" or there is None or there == here:
            continue
        if FLOORS[there] >= FLOORS[here]:
            broken.append(f"{module}:{item.line}: {item.target}")
    return broken


def heavy_imports(module: str, imports: list[Import]) -> list[str]:
    if holds_tensors(module):
        return []
    return [
        f"{module}:{item.line}: {item.target}"
        for item in imports
        if item.target.split(".")[0] in TENSOR_LIBRARIES
        or (holds_tensors(item.target) and not (room(module) == "api" and item.lazy))
    ]


def test_every_file_belongs_to_a_room_with_a_floor():
    for module, _ in house():
        assert module == "attncli" or room(module) in FLOORS, module


def test_imports_point_down_and_rooms_of_one_floor_do_not_know_each_other():
    assert [line for module, imports in house() for line in broken_floors(module, imports)] == []


def test_only_the_tensor_side_imports_torch_or_numpy():
    assert [line for module, imports in house() for line in heavy_imports(module, imports)] == []


# What --help names.
TABLES_OF_OPTIONS = ("attncli.render.FORMATS", "attncli.render.format_of")


def test_the_command_line_imports_the_pipelines_and_rich_only_where_they_are_used():
    early = [
        f"{module}: {item.target}"
        for module, imports in house()
        for item in imports
        if room(module) == "cli"
        and not item.lazy
        and item.target not in TABLES_OF_OPTIONS
        and (item.target.split(".")[0] == "rich" or (room(item.target) or "errors") not in ("cli", "errors"))
    ]
    assert early == []


def test_modules_are_imported_by_name_in_known_places_only():
    dynamic = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "import_module",
                "__import__",
                "exec",
                "eval",
            ):
                dynamic.add((module_name(file), ast.unparse(node.args[0]).replace('"', "'")))
    assert dynamic <= {
        ("attncli", "home"),
        ("attncli.api", "f'attncli.api.{home}'"),
        ("attncli.callbacks", "f'attncli.callbacks.{_HOMES[name]}'"),
        ("attncli.callbacks.lightning", "_PACKAGE"),
        ("attncli.checkpoint.formats", "f'attncli.checkpoint.{room}'"),
        ("attncli.render", "f'attncli.render.{self.module}'"),
        # The user's script, which attncli is asked to run.
        ("attncli.cli.script", "compile(source, file, 'exec', dont_inherit=True)"),
        # Libraries of custom operators, with --trust.
        ("attncli.trace.operators", "name"),
        ("attncli.cli.settings", "'tomllib' if sys.version_info >= (3, 11) else 'tomli'"),
    }


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("attncli.records", "from attncli.errors import AttncliError", True),
        ("attncli.records", "import json", False),
        ("attncli.layout.heads", "from attncli.records import Layer", False),
        ("attncli.layout.heads", "from attncli.layout.names import Site", False),
        ("attncli.layout.heads", "from .names import Site", False),
        ("attncli.layout.heads", "from attncli.checkpoint import open_checkpoint", True),
        ("attncli.layout.heads", "from attncli import rules", True),
        ("attncli.layout.heads", "from ..rules import judge", True),
        ("attncli.render.table", "def f():\n    from attncli import api", True),
        ("attncli.rules", "if TYPE_CHECKING:\n    from attncli.cli import run", True),
        ("attncli.api", "import attncli.cli.output", True),
        ("attncli.api", "import attncli.layout", False),
        ("attncli.cli.inspect", "def f():\n    from attncli import api", False),
        ("attncli.cli.inspect", "from attncli import __version__", False),
        ("attncli", "from attncli.api import inspect", True),
        ("attncli", "if TYPE_CHECKING:\n    from attncli.api import inspect", False),
    ],
)
def test_the_reader_of_floors_sees_an_import_upwards(module, source, broken):
    assert bool(broken_floors(module, imports_of(source, module))) is broken


@pytest.mark.parametrize(
    ("module", "source", "heavy"),
    [
        ("attncli.render.table", "import torch", True),
        ("attncli.render.table", "def f():\n    import torch.nn", True),
        ("attncli.checkpoint.gguf", "if TYPE_CHECKING:\n    from numpy import ndarray", True),
        ("attncli.checkpoint.gguf", "class A:\n  def f(self):\n    with x:\n      import gguf", True),
        ("attncli.checkpoint.values", "import torch", False),
        ("attncli.checkpoint.folder", "from attncli.checkpoint.values import Values", True),
        ("attncli.checkpoint.folder", "from attncli.checkpoint import values", True),
        ("attncli.api", "from attncli.weights import score_bounds", True),
        ("attncli.api", "def f():\n    from attncli.weights import score_bounds", False),
        ("attncli.api", "def f():\n    import torch", True),
    ],
)  # fmt: skip
def test_the_reader_of_imports_sees_torch_wherever_it_hides(module, source, heavy):
    assert bool(heavy_imports(module, imports_of(source, module))) is heavy


# --- what really gets imported ------------------------------------------------------------------------


def loaded_modules(code: str, folder: Path) -> list[str]:
    """The names in sys.modules of a fresh interpreter after `code`, whose own output is dropped."""
    script = f"import sys, json\ntry:\n    {code}\nexcept SystemExit: pass\n"
    script += "json.dump(list(sys.modules), sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    modules: list[str] = json.loads(done.stderr)
    return modules


def command(*arguments: str) -> str:
    return f"sys.argv[1:] = {list(arguments)}; from attncli.__main__ import main; main()"


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("inspect", "--help")])
def test_help_and_version_import_no_reader_and_no_tensor_library(arguments, tmp_path):
    loaded = loaded_modules(command(*arguments), tmp_path)
    assert "attncli.cli" in loaded
    assert TENSOR_LIBRARIES.isdisjoint(loaded)
    early = ("attncli.checkpoint", "attncli.layout", "attncli.rules", "attncli.records", "attncli.topics")
    assert not {m for m in loaded if m.startswith(early)}


@pytest.mark.parametrize("output_format", ["table", "json"])
def test_inspecting_headers_imports_no_tensor_library(output_format, tmp_path):
    llama_folder(tmp_path / "model")
    loaded = loaded_modules(command("inspect", "model", "--format", output_format), tmp_path)
    assert "attncli.rules" in loaded
    others = ("attncli.api.checking", "attncli.api.forward", "attncli.api.differences", "attncli.topics")
    assert set(others).isdisjoint(loaded)
    assert TENSOR_LIBRARIES.isdisjoint(loaded)


def test_importing_attncli_imports_nothing_but_itself(tmp_path):
    loaded = loaded_modules("import attncli", tmp_path)
    assert {m for m in loaded if m.startswith("attncli")} == {"attncli"}
    assert {"torch", "numpy", "typer", "rich"}.isdisjoint(loaded)


def test_the_whole_header_side_can_be_imported_without_a_tensor_library(tmp_path):
    header_side = [
        module for module, _ in house() if not holds_tensors(module) and module != "attncli.__main__"
    ]
    assert len(header_side) > 25
    loaded = loaded_modules("import " + ", ".join(header_side), tmp_path)
    assert set(header_side) <= set(loaded)
    assert TENSOR_LIBRARIES.isdisjoint(loaded)
