"""Rules and topics as pages: which rules a word means, which commands report them, where to read on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attncli.errors import UsageError
from attncli.records.pages import Block, Column, Facts, Formula, Page, Prose, Table
from attncli.rules import RULES, Rule
from attncli.topics import TOPICS, Topic


def rule_page(words: Sequence[str]) -> Page:
    """The rules that `words` choose (codes, prefixes, names, comma-separated), all without any.

    Errors: `UsageError` for a word that chooses none.
    """
    wanted = [word.strip() for given in words for word in given.split(",") if word.strip()]
    for word in wanted:
        if not _rules(word):
            raise _unknown("attncli rules", "rule", word, _rule_words())
    chosen = [rule for rule in RULES if not wanted or any(rule in _rules(word) for word in wanted)]
    return _listing(chosen, "attncli explain CODE tells all of one rule.")


def explained(words: Sequence[str]) -> Page:
    """The page of a topic or rule, by name, alias, code or prefix; without words, of all there is to explain.

    Errors: `UsageError` for a word that is none of them, with those that are near.
    """
    if not words:
        return _contents()
    word = "-".join(part for given in words for part in given.split())
    name = word.lower().replace("_", "-")
    for topic in TOPICS:
        if name == topic.name or name in topic.aliases:
            return _topic_page(topic)
    rules = _rules(word)
    if len(rules) == 1:
        return _one_rule(rules[0])
    if rules:
        return _listing(rules, f"attncli explain {rules[0].code} tells all of the first of them.")
    known = {name: topic.name for topic in TOPICS for name in (topic.name, *topic.aliases)}
    raise _unknown("attncli explain", "topic and no rule", " ".join(words), {**_rule_words(), **known})


def reported_by(code: str) -> tuple[str, ...]:
    """The commands whose reports may hold findings of the rule, as a user types them, without "attncli"."""
    prefix = max((prefix for prefix in _REPORTED_BY if code.startswith(prefix)), key=len, default="")
    return _REPORTED_BY.get(prefix, ())


# --- which one is meant -------------------------------------------------------------------------------


def _rules(word: str) -> list[Rule]:
    """By code ("ATT410", "att410", "410"), by prefix ("ATT4", "ATT4xx") or by name."""
    name = word.lower().replace("_", "-")
    exact = [rule for rule in RULES if rule.name == name]
    digits = re.fullmatch(r"(?:att)?(\d{0,3})x{0,2}", name)
    if exact or digits is None or not name:
        return exact
    prefix = f"ATT{digits[1]}"
    if not name.startswith("att") and len(digits[1]) != 3:
        return []
    return [rule for rule in RULES if rule.code.startswith(prefix)]


def _rule_words() -> dict[str, str]:
    return {name.lower(): name for rule in RULES for name in (rule.code, rule.name)}


def _unknown(subject: str, what: str, word: str, known: Mapping[str, str]) -> UsageError:
    """`known`: what may be typed → how it is named in the message."""
    near = difflib.get_close_matches(word.lower().replace("_", "-"), known, n=3, cutoff=0.75)
    meant = f"Did you mean {' or '.join(dict.fromkeys(known[name] for name in near))}? " if near else ""
    listing = "attncli rules lists all rules." if subject == "attncli rules" else "attncli explain lists all."
    return UsageError(subject, f"no {what} is named {word!r}.", f"{meant}{listing}")


# --- pages --------------------------------------------------------------------------------------------


def _listing(rules: Sequence[Rule], last: str) -> Page:
    table = Table(
        (Column("rule"), Column("name"), Column("severity"), Column("what it finds")),
        tuple((rule.code, rule.name, rule.severity, rule.what) for rule in rules),
    )
    return Page(_counted(rules), (table, Prose(last)), values=_values([_rule_values(rule) for rule in rules]))


def _one_rule(rule: Rule) -> Page:
    topics = [topic for topic in TOPICS if rule.code in topic.rules]
    rows = [
        ("why it is bad", rule.why),
        ("formula", rule.formula),
        ("threshold", rule.threshold),
        ("provenance", f"{rule.provenance}: {_PROVENANCE[rule.provenance]}"),
        ("source", "attncli's own" if rule.source == "attncli" else rule.source),
        ("example", rule.example),
        ("remedy", rule.remedy),
        ("reported by", _commands(reported_by(rule.code))),
        ("silenced by", f"--ignore {rule.code}"),
    ]
    if topics:
        rows.append(("read on", ", ".join(f"attncli explain {topic.name}" for topic in topics)))
    return Page(
        f"{rule.code} {rule.name}",
        (Prose(rule.what), Facts(tuple(rows))),
        mark=rule.severity,
        values=_values([_rule_values(rule)]),
    )


def _topic_page(topic: Topic) -> Page:
    blocks = topic.blocks()
    names = {rule.code: rule.name for rule in RULES}
    rows = [("sources", "; ".join(topic.sources))]
    if topic.rules:
        rows.append(("rules", ", ".join(f"{code} {names[code]}" for code in topic.rules)))
    rows.append(("commands", _commands(topic.commands)))
    rows.append(("see also", ", ".join(topic.see)))
    values = {
        "name": topic.name,
        "aliases": topic.aliases,
        "title": topic.title,
        "blocks": [_block_values(block) for block in blocks],
        "sources": topic.sources,
        "rules": topic.rules,
        "commands": [f"attncli {command}" for command in topic.commands],
        "see": topic.see,
    }
    return Page(
        f"{topic.name}: {topic.title}", (*blocks, Facts(tuple(rows))), values=_values(topics=[values])
    )


def _contents() -> Page:
    topics = Table(
        (Column("topic"), Column("what it is about")), tuple((topic.name, topic.title) for topic in TOPICS)
    )
    ranges = []
    for prefix, about in _RANGES.items():
        rules = [rule for rule in RULES if rule.code.startswith(prefix)]
        if rules:
            ranges.append((f"{prefix}xx", f"{about} ({_counted(rules)})"))
    values = {
        "topics": [
            {"name": topic.name, "aliases": topic.aliases, "title": topic.title, "rules": topic.rules}
            for topic in TOPICS
        ],
        "ranges": [{"prefix": prefix, "about": about} for prefix, about in _RANGES.items()],
        "rules": [{"code": r.code, "name": r.name, "severity": r.severity, "what": r.what} for r in RULES],
    }
    return Page(
        "Topics of attention, each with numbers computed on the spot, and the rules",
        (
            topics,
            Table((Column("rules"), Column("what they are about")), tuple(ranges)),
            Formula(
                (
                    "attncli explain scaling",
                    "attncli explain ATT410",
                    "attncli explain unscaled-scores",
                    "attncli explain ATT4",
                )
            ),
        ),
        values={"schema": SCHEMA, **values},
    )


def _counted(rules: Sequence[Rule]) -> str:
    return f"{len(rules)} rule{'' if len(rules) == 1 else 's'}"


def _commands(commands: Sequence[str]) -> str:
    return ", ".join(f"attncli {command}" for command in commands)


# --- for a program ------------------------------------------------------------------------------------

SCHEMA = "attncli-explain/1"


def _values(rules: Sequence[dict[str, Any]] = (), topics: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"schema": SCHEMA, "rules": list(rules), "topics": list(topics)}


def _rule_values(rule: Rule) -> dict[str, Any]:
    fields = {name: value for name, value in rule._asdict().items() if name != "check"}
    return {**fields, "commands": [f"attncli {command}" for command in reported_by(rule.code)]}


def _block_values(block: Block) -> dict[str, Any]:
    if isinstance(block, Prose):
        return {"prose": block.text}
    if isinstance(block, Formula):
        return {"formula": block.lines}
    if isinstance(block, Facts):
        return {"facts": dict(block.rows)}
    return {
        "caption": block.caption,
        "columns": [column.name for column in block.columns],
        "rows": block.rows,
    }


# --- tables -------------------------------------------------------------------------------------------

_PROVENANCE = {
    "published": "the threshold stands in the source.",
    "derived": "the threshold follows from arithmetic or from a definition; nobody chose it.",
    "heuristic": "the threshold is attncli's own judgement; no publication gives it, and it may be wrong for a "
    "design that was not met before.",
}

_RANGES = {
    "ATT0": "files: what can and cannot be read, and is it safe",
    "ATT1": "layout: shapes, heads, siblings, configs",
    "ATT2": "values of the weights",
    "ATT3": "bounds of the scores from the weights",
    "ATT4": "how attention is computed: axis, masks, scale, dropout",
    "ATT5": "how large scores are",
    "ATT6": "how concentrated heads are",
    "ATT7": "where NaN and Inf were born, and how training goes wrong",
    "ATT8": "what was expected and is not so",
    "ATT9": "what became worse between two reports",
}

# By the longest prefix of the code; the command that is made for it first.
_REPORTED_BY: dict[str, tuple[str, ...]] = {
    "ATT0": ("inspect", "check"),
    "ATT1": ("inspect", "check", "entropy", "overflow", "nan-check"),
    "ATT105": ("inspect",),
    "ATT2": ("inspect --values", "check"),
    "ATT201": ("inspect --values", "inspect --bounds", "check"),
    "ATT3": ("inspect --bounds", "check"),
    "ATT4": ("entropy", "overflow", "check"),
    "ATT5": ("overflow", "entropy", "check"),
    "ATT6": ("entropy", "overflow", "check"),
    "ATT7": ("nan-check", "check"),
    "ATT703": ("nan-check --steps",),
    "ATT71": ("nan-check",),
    "ATT8": ("check",),
    "ATT9": ("diff",),
}
