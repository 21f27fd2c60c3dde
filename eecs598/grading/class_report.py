"""Results of a class: a table for a spreadsheet, and pages for handing back."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from eecs598.grading.reports import Report
from eecs598.grading.similarity import SimilarPair
from eecs598.runtime import atomic_write

__all__ = ["write_csv", "write_pages"]

BINS = 10  # of the histogram of points
MAX_QUESTIONS = 15  # in the table of those that most people missed


def write_csv(path: str | os.PathLike[str], reports: Sequence[Report]) -> None:
    """Write a row per submission and a column per section of the rubric."""
    with atomic_write(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        items = reports[0].items
        table.writerow(["submission", "points", *(item.name for item in items), "error"])
        table.writerow(["", reports[0].max_score, *(item.max_score for item in items), ""])
        for report in reports:
            scores = [item.score for item in report.items]
            error = report.graded.error or ""
            table.writerow([_cell(report.graded.folder), report.score, *scores, _cell(error)])


def _cell(text: str) -> str:
    # A spreadsheet would compute what begins like a formula.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


@dataclass(frozen=True)
class _Question:
    """A question of the rubric and how many missed it."""

    section: str
    label: str
    missed: int
    share: float


def write_pages(
    folder: str | os.PathLike[str], reports: Sequence[Report], pairs: Sequence[SimilarPair]
) -> None:
    """Write ``index.html`` for staff, and a page per submission for handing back.

    Args:
        folder: is made if it does not exist.
        reports: of the submissions.
        pairs: of nearly identical submissions; they are in the index only.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    names = _page_names(reports)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eecs598.grading"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("submission.html")
    for report, name in zip(reports, names, strict=True):
        _write(Path(folder, name), page.render(report=report))
    graded = [report for report in reports if report.graded.error is None]
    index = environment.get_template("index.html").render(
        rows=sorted(zip(reports, names, strict=True), key=lambda row: -row[0].score),
        bars=_histogram(graded),
        questions=_most_missed(graded),
        median=_median([report.score for report in graded]),
        graded=graded,
        pairs=pairs,
    )
    _write(Path(folder, "index.html"), index)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace")


def _page_names(reports: Sequence[Report]) -> list[str]:
    names: list[str] = []
    for report in reports:
        stem = re.sub(r"[^\w.-]+", "_", report.graded.folder).strip("._") or "submission"
        stem = "page_index" if stem == "index" else stem[-80:]
        number = 1
        while (name := f"{stem}{f'_{number}' if number > 1 else ''}.html") in names:
            number += 1
        names.append(name)
    return names


def _histogram(reports: Sequence[Report]) -> list[dict[str, float]]:
    """Return the bars of the distribution of points: bounds, number, and height in percent."""
    if not reports:
        return []
    most = reports[0].max_score
    bins = Counter(min(int(BINS * report.score / most), BINS - 1) for report in reports)
    highest = max(bins.values())
    return [
        {
            "low": most * n / BINS,
            "high": most * (n + 1) / BINS,
            "count": bins[n],
            "height": 100 * bins[n] / highest,
        }
        for n in range(BINS)
    ]


def _most_missed(reports: Sequence[Report]) -> list[_Question]:
    missed: Counter[tuple[str, str]] = Counter()
    for report in reports:
        for item in report.items:
            for fault in item.faults:
                if fault.points:
                    missed.update((item.title, label) for label in fault.labels)
    return [
        _Question(section, label, number, number / len(reports))
        for (section, label), number in missed.most_common(MAX_QUESTIONS)
    ]


def _median(scores: list[float]) -> float:
    scores = sorted(scores)
    return (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2 if scores else 0.0
