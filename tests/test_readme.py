"""What the README shows is what the commands print, and what it names exists."""

import re

from make_readme import README, ROOT, filled


def test_output_and_rules_in_the_readme_are_real() -> None:
    text = README.read_text(encoding="utf-8")
    assert "<!-- output: attncli inspect examples/dates/dates.safetensors -->" in text
    assert filled(text) == text, "run: python tests/make_readme.py"


def test_files_that_the_readme_links_exist() -> None:
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_ci_runs_the_readme_test_command_word_for_word() -> None:
    command = "pip install -e '.[test]' && pytest"
    assert f"$ {command}\n" in README.read_text(encoding="utf-8")
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
