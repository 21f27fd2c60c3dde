"""Compute points from the results of checks.

The points of each probe are in ``rubric.toml`` beside this file, which explains its format. Any
other file of this format can be used instead.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from eecs598.grading.checks.registry import CHECKS, labels_of
from eecs598.grading.result import CheckResult, ProbeResult

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Fault", "Grade", "GradedItem", "Rubric", "RubricItem", "load_rubric"]

DEFAULT_PATH = Path(__file__).with_name("rubric.toml")
KEYS = {"title", "check", "points", "probes"}


@dataclass(frozen=True)
class RubricItem:
    """A line of the rubric.

    Attributes:
        name: unique in its rubric.
        title: shown to readers.
        check: a key of ``eecs598.grading.CHECKS``.
        points: for a submission that passes all probes.
        probes: label -> weight; the points are shared out in proportion to the weights.
    """

    name: str
    title: str
    check: str
    points: float
    probes: Mapping[str, float]


@dataclass(frozen=True)
class Fault:
    """One reason for lost points, or a remark without points.

    Attributes:
        labels: of the probes that failed for this reason.
        problem: what was wrong, in one line.
        points: what it costs.
        snippet: lines of Python with the input, "" if the problem has it.
    """

    labels: tuple[str, ...]
    problem: str
    points: float = 0.0
    snippet: str = ""

    @property
    def sentence(self) -> str:
        """The labels and the problem in one line."""
        rest = len(self.labels) - 1
        more = f" (and {rest} more)" if rest else ""
        return f"{self.labels[0]}{more}: {self.problem}"


@dataclass(frozen=True)
class GradedItem:
    """A line of the rubric and a submission's score in it.

    Attributes:
        name: of the line.
        title: shown to readers.
        score: points of the submission.
        max_score: points for passing all probes.
        faults: the reasons for lost points and the remarks, what costs most first.
        with_ours: parts that were the reference solution's here, because the submission's own are
            missing or wrong.
    """

    name: str
    title: str
    score: float
    max_score: float
    faults: list[Fault] = field(default_factory=list)
    with_ours: list[str] = field(default_factory=list)

    @property
    def lost(self) -> float:
        """Lost points."""
        return round(self.max_score - self.score, 2)

    @property
    def failures(self) -> list[str]:
        """One sentence for each fault."""
        return [fault.sentence for fault in self.faults]


@dataclass(frozen=True)
class Grade:
    """The points of a submission."""

    items: list[GradedItem]

    @property
    def total(self) -> float:
        """Sum of the scores."""
        return round(sum(item.score for item in self.items), 2)

    @property
    def max_total(self) -> float:
        """Sum of all points."""
        return round(sum(item.max_score for item in self.items), 2)


@dataclass(frozen=True)
class Rubric:
    """A table of points per check and probe."""

    items: list[RubricItem]

    @property
    def checks(self) -> list[str]:
        """Names of the checks that it uses, in the order of the assignment."""
        return [name for name in CHECKS if any(item.check == name for item in self.items)]

    def grade(self, results: Iterable[CheckResult]) -> Grade:
        """Score a submission.

        Args:
            results: of its checks. Missing checks and missing probes count as failed; those that
                the rubric does not list are ignored.
        """
        by_name = {result.name: result for result in results}
        return Grade([_grade_item(item, by_name.get(item.check)) for item in self.items])


def _grade_item(item: RubricItem, result: CheckResult | None) -> GradedItem:
    failed: dict[str, ProbeResult] = {}
    seen = set()
    for probe in result.probes if result is not None else ():
        seen.add(probe.label)
        if probe.problem is not None:  # if a probe occurs twice, the worse result counts
            failed[probe.label] = probe
    whole = sum(item.probes.values())
    worth = {label: item.points * w / whole if whole else 0.0 for label, w in item.probes.items()}
    score = sum(worth[label] for label in item.probes if label in seen and label not in failed)

    known = labels_of(item.check)
    # A check that could not be run has a single probe with another label.
    shown = [p for p in failed.values() if p.label in item.probes or p.label not in known]
    faults = [_fault(probes, worth) for probes in _by_reason(shown)]
    missing = [label for label in item.probes if label not in seen]
    lost = sum(worth[label] for label in missing)
    if missing and all(label in known for fault in faults for label in fault.labels):
        faults.append(Fault(tuple(missing), "the check did not get so far", round(lost, 2)))
    elif missing:
        faults = [replace(faults[0], points=round(faults[0].points + lost, 2)), *faults[1:]]
    faults.sort(key=lambda fault: -fault.points)
    ours = result.with_ours if result is not None else []
    return GradedItem(item.name, item.title, round(score, 2), item.points, faults, ours)


def _by_reason(probes: Iterable[ProbeResult]) -> list[list[ProbeResult]]:
    """Put together probes that failed for one reason, or that ask the same with other numbers."""
    groups: list[tuple[set[str], list[ProbeResult]]] = []
    for probe in probes:
        # An endless loop is interrupted at varying lines and times.
        reason = re.sub(r" \(\S+\.(py|ipynb), line \d+\)$", "", probe.problem or "")
        reason = re.sub(r"(still running after) \S+ s", r"\1", reason)
        keys = {reason, re.sub(r"[\d.,]+", "#", probe.label)}
        for known, group in groups:
            if known & keys:
                known |= keys
                group.append(probe)
                break
        else:
            groups.append((keys, [probe]))
    return [group for _, group in groups]


def _fault(probes: list[ProbeResult], worth: Mapping[str, float]) -> Fault:
    return Fault(
        tuple(probe.label for probe in probes),
        probes[0].problem or "",
        round(sum(worth.get(probe.label, 0.0) for probe in probes), 2),
        next((probe.snippet for probe in probes if probe.snippet), ""),
    )


def load_rubric(path: str | os.PathLike | None = None) -> Rubric:
    """Read a table of points.

    Args:
        path: of a TOML file in the format of ``rubric.toml``; that one unless given.

    Raises:
        ValueError: the file is missing, is not TOML, or has an invalid key, check, probe or value.
    """
    path = DEFAULT_PATH if path is None else Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"the rubric {path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"the rubric {path} is not TOML: {error}.") from error
    if not table:
        raise ValueError(f"the rubric {path} is empty; expected a section for each item.")
    return Rubric([_read_item(f"the rubric {path}, [{name}]", name, table[name]) for name in table])


def _read_item(where: str, name: str, section: object) -> RubricItem:
    if not isinstance(section, dict):
        raise ValueError(f"{where}: expected a section, got {section!r}.")
    if unknown := sorted(set(section) - KEYS):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; the keys are {sorted(KEYS)}.")
    for key, kind, words in (("title", str, "text"), ("check", str, "the name of a check")):
        if not isinstance(section.get(key), kind):
            raise ValueError(f"{where}: expected {key} = {words}, got {section.get(key)!r}.")
    points = _read_number(f"{where}: points", section.get("points"))
    check = section["check"]
    if check not in CHECKS:
        raise ValueError(f"{where}: there is no check {check!r}; the checks are {list(CHECKS)}.")

    labels = labels_of(check)
    probes = section.get("probes", dict.fromkeys(labels, 1.0))
    if not isinstance(probes, dict):
        raise ValueError(f"{where}: expected probes = a table of labels and weights.")
    if unknown := sorted(set(probes) - set(labels)):
        raise ValueError(
            f"{where}: check {check!r} has no probe {unknown[0]!r}; its probes are {list(labels)}."
        )
    weights = {label: _read_number(f"{where}: {label!r}", w) for label, w in probes.items()}
    if points > 0 and not sum(weights.values()) > 0:
        raise ValueError(f"{where}: {points:g} points and no probe that weighs anything.")
    return RubricItem(name, section["title"], check, points, weights)


def _read_number(what: str, value: object) -> float:
    # True is an int, and NaN is neither above nor below anything.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
        raise ValueError(f"{what}: expected a number from 0, got {value!r}.")
    return float(value)
