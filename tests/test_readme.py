"""What the README shows is what the commands print, and what it names exists."""

import math
import re

from make_readme import PICTURE, README, ROOT, SHOWN, filled, picture

from attncli.cli import app


def test_output_and_rules_in_the_readme_are_real() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- output: attncli inspect examples/dates/dates.safetensors -->" in text
    assert "<!-- output: attncli entropy examples/dates/model.py:build" in text
    assert alike(filled(text), text), "run: python tests/make_readme.py"


def test_the_terminal_picture_is_real_and_fetches_nothing() -> None:
    drawn = PICTURE.read_text(encoding="utf-8")
    assert alike(picture(), drawn), "run: python tests/make_readme.py"
    words = " ".join(re.findall(r">([^<]+)</text>", drawn)).replace("&#160;", " ")
    assert all(command in words for command in SHOWN)
    assert re.findall(r"(?:https?:)?//[^ \"]+", drawn) == ["http://www.w3.org/2000/svg"]


def test_every_command_stands_in_the_readme_with_real_output() -> None:
    text = README.read_text(encoding="utf-8")
    commands = [command.name for command in app.registered_commands]
    assert {"inspect", "entropy", "overflow", "nan-check", "check", "diff", "explain", "rules"} == set(
        commands
    )
    shown = re.findall(r"<!-- output: (?:.*; )?attncli (\S+) .*-->", text)
    assert set(commands) - set(shown) == {"rules"}  # its table stands there whole
    assert "<!-- rules -->" in text


def alike(first: str, second: str) -> bool:
    """The same text, with numbers that may differ by the rounding of another processor's arithmetic."""
    parts = [re.split(_NUMBER, re.sub(_DIFFERENCE, "", text)) for text in (first, second)]
    numbers = [re.findall(_NUMBER, re.sub(_DIFFERENCE, "", text)) for text in (first, second)]
    words = [[" ".join(part.split()) for part in split] for split in parts]
    return words[0] == words[1] and all(
        math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=0.011) for a, b in zip(*numbers, strict=True)
    )


def test_alike_sees_a_changed_word_and_a_changed_number() -> None:
    line = "0  0.63  1.28 (largest difference 2e-07)"
    assert alike(line, "0  0.63  1.29 (largest difference 9e-08)")
    assert not alike(line, "0  0.63  1.38 (largest difference 2e-07)")
    assert not alike(line, "0  0.63  1.28 (smallest difference 2e-07)")


def test_files_that_the_readme_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_ci_runs_the_readme_test_command_word_for_word() -> None:
    command = "pip install -e '.[test]' && pytest"
    assert f"$ {command}\n" in README.read_text(encoding="utf-8")
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


_NUMBER = r"\d+(?:\.\d+)?"
_DIFFERENCE = r"largest difference [\de.+-]+"
