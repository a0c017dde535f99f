"""Records → findings. Every rule is a row of `RULES`; every threshold stands in its rule, with its source."""

from __future__ import annotations

from collections.abc import Iterable

from attncli.records import SEVERITIES, Finding
from attncli.rules.bounds import BOUND_RULES, overflow_measurements
from attncli.rules.calls import CALL_RULES
from attncli.rules.differences import DIFFERENCE_RULES, Compared, judge_changes
from attncli.rules.entropy import ENTROPY_RULES
from attncli.rules.expectations import EXPECTABLE, EXPECTATION_RULES, NONE
from attncli.rules.files import FILE_RULES
from attncli.rules.layouts import LAYOUT_RULES
from attncli.rules.masks import MASK_RULES
from attncli.rules.origins import ORIGIN_RULES
from attncli.rules.rule import Observed, Rule
from attncli.rules.scales import SCALE_RULES
from attncli.rules.scores import SCORE_RULES
from attncli.rules.training import TRAINING_RULES, early_warnings
from attncli.rules.values import VALUE_RULES

__all__ = [
    "EXPECTABLE",
    "NONE",
    "RULES",
    "Compared",
    "Observed",
    "Rule",
    "early_warnings",
    "gravest_first",
    "judge",
    "judge_changes",
    "overflow_measurements",
]


def judge(observed: Observed) -> tuple[Finding, ...]:
    """Every finding of every rule, the gravest first; inside one severity in the order of the rules."""
    return gravest_first(finding for rule in RULES for finding in rule.check(rule, observed))


def gravest_first(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity)))


RULES: tuple[Rule, ...] = (
    *FILE_RULES,
    *LAYOUT_RULES,
    *VALUE_RULES,
    *BOUND_RULES,
    *CALL_RULES,
    *MASK_RULES,
    *SCALE_RULES,
    *SCORE_RULES,
    *ENTROPY_RULES,
    *ORIGIN_RULES,
    *TRAINING_RULES,
    *EXPECTATION_RULES,
    *DIFFERENCE_RULES,
)
