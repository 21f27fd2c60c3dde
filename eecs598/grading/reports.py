"""Format grading results: text, a table of many submissions, JSON, and Gradescope's format."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eecs598.grading.rubric import Grade, GradedItem
from eecs598.grading.sandbox.isolation import LAYERS
from eecs598.grading.sandbox.runner import Graded
from eecs598.grading.similarity import SimilarPair

__all__ = ["Report", "format_pairs", "format_table", "format_text", "to_dict", "to_gradescope"]

MAX_FAILURES = 6  # shown per item in the text; the other formats have all
MAX_SNIPPET_LINES = 6
WIDTH = 160  # of a line of the text
MAX_OUTPUT = 2000  # characters of a submission's output, in the text


@dataclass(frozen=True)
class Report:
    """A graded submission and its points."""

    graded: Graded
    grade: Grade

    @property
    def items(self) -> Sequence[GradedItem]:
        """Lines of the rubric with the submission's scores."""
        return self.grade.items

    @property
    def score(self) -> float:
        """Points of the submission."""
        return self.grade.total

    @property
    def max_score(self) -> float:
        """Points of the whole rubric."""
        return self.grade.max_total

    @property
    def is_full(self) -> bool:
        """Whether the submission was graded and has all points."""
        return self.graded.error is None and self.score >= self.max_score

    @property
    def shown_items(self) -> list[GradedItem]:
        """Lines of the rubric, those that cost most first, without those that say nothing."""
        said = [item for item in self.items if item.max_score > 0 or item.faults]
        return sorted(said, key=lambda item: (-item.lost, not item.faults))


def format_text(report: Report, explain: bool = False) -> str:
    """Format all results of a submission as text for people.

    Args:
        report: of the submission.
        explain: nothing is shortened. Otherwise no line but the first, with the folder's name, has
            more than ``WIDTH`` characters.
    """
    graded = report.graded
    head = f"{graded.folder}: {_points(report)} points"
    if graded.error is not None:
        return f"{head}\n  {graded.error}"
    lines = []
    if costly := [item for item in report.shown_items if item.lost > 0]:
        first = ", ".join(f"{item.title} ({item.lost:g})" for item in costly[:3])
        lines.append(f"  Mend first (points to gain): {first}")
    lines.append("")
    explained: dict[str, str] = {}  # problem -> title of the item that has shown it
    for item in report.shown_items:
        lines += _item_lines(item, explained, explain)
    for title, sentences in (
        ("What a reviewer would say (no points)", graded.findings),
        ("How it was run", [*graded.notes, _describe_protections(graded)]),
        ("For a person to look at", graded.suspicious),
    ):
        if sentences:
            lines += ["", f"  {title}"]
            for sentence in sentences:
                lines += _wrapped(sentence, "    - ", explain)
    if graded.output.strip():
        lines += ["", "  What it printed"]
        printed = graded.output.strip() if explain else _excerpt(graded.output)
        lines += [f"    | {line}" for line in printed.splitlines()]
    # The folder's name may be long, and the points stand after it.
    return "\n".join([head, *(lines if explain else map(_shortened, lines))])


def _item_lines(item: GradedItem, explained: dict[str, str], explain: bool) -> list[str]:
    mark = "--" if item.lost > 0 else ".." if item.faults else "ok"
    points = f"{item.score:>5g} of {item.max_score:g}" if item.max_score else "no points"
    ours = f" (judged with our {', '.join(item.with_ours)})" if item.with_ours else ""
    lines = [f"  {mark} {points:11} {item.title}{ours}"]
    shown = item.faults if explain else item.faults[:MAX_FAILURES]
    for fault in shown:
        cost = f"-{fault.points:g}" if fault.points else "note"
        sentence = fault.sentence
        if fault.problem in explained and not explain:
            label = sentence.removesuffix(fault.problem)
            sentence = f"{label}as under {explained[fault.problem]!r}"
        explained.setdefault(fault.problem, item.title)
        lines.append(f"       {cost:>5}  {sentence}")
        lines += _snippet_lines(fault.snippet, explain) if fault.snippet else []
    if (rest := len(item.faults) - len(shown)) > 0:
        lines.append(f"              and {rest} more (--explain)")
    return lines


def _snippet_lines(snippet: str, explain: bool) -> list[str]:
    lines = [f"                {line}" for line in snippet.splitlines()]
    if explain or (len(lines) <= MAX_SNIPPET_LINES and max(map(len, lines)) <= WIDTH):
        return lines
    return ["                # the input is long: --explain prints it"]


def _wrapped(sentence: str, begin: str, explain: bool) -> list[str]:
    if explain:
        return [f"{begin}{sentence}"]
    return textwrap.wrap(sentence, WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))


def _shortened(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."


def format_table(reports: Sequence[Report]) -> str:
    """Format one line per submission, with its points and the items that cost some."""
    width = max(len(report.graded.folder) for report in reports)
    lines = [f"{'submission':{width}}  points       remarks  to look at  lost"]
    for report in reports:
        lost = ", ".join(
            f"{item.name} {item.score:g}/{item.max_score:g}"
            for item in report.items
            if item.score < item.max_score
        )
        what = report.graded.error or lost or "nothing"
        counts = f"{len(report.graded.findings):<7}  {len(report.graded.suspicious):<10}"
        lines.append(f"{report.graded.folder:{width}}  {_points(report):11}  {counts}  {what}")
    scores = sorted(report.score for report in reports if report.graded.error is None)
    if not scores:
        return "\n".join(lines)
    middle = (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2
    lines.append(
        f"{len(scores)} submissions: lowest {scores[0]:g}, median {middle:g}, "
        f"highest {scores[-1]:g}, all points {sum(r.is_full for r in reports)}"
    )
    return "\n".join(lines)


def format_pairs(pairs: Sequence[SimilarPair]) -> str:
    """Format the pairs of nearly identical submissions, each followed by what is most alike."""
    lines = ["Nearly identical code, which accuses nobody and says where to look:"]
    for pair in pairs:
        lines.append(f"  {pair.share:4.0%}  {pair.first} and {pair.second}")
        if pair.functions:
            lines.append(_shortened(f"        {', '.join(pair.functions)}"))
    return "\n".join(lines)


def to_dict(report: Report) -> dict[str, Any]:
    """Return all results of a submission in a form that can be saved as JSON."""
    graded = report.graded
    return {
        "folder": graded.folder,
        "error": graded.error,
        "score": report.score,
        "max_score": report.max_score,
        "items": [
            {
                "name": item.name,
                "title": item.title,
                "score": item.score,
                "max_score": item.max_score,
                "failures": item.failures,
                "faults": [asdict(fault) for fault in item.faults],
                "with_ours": item.with_ours,
            }
            for item in report.items
        ],
        "checks": {
            result.name: {probe.label: probe.problem for probe in result.probes}
            for result in graded.results
        },
        "findings": graded.findings,
        "notes": graded.notes,
        "suspicious": graded.suspicious,
        "output": graded.output,
        "protections": graded.protections,
        "seconds": graded.seconds,
    }


def to_gradescope(report: Report) -> dict[str, Any]:
    """Return the contents of Gradescope's ``results.json``.

    Source: Gradescope's documentation of autograders, "Output format".
    """
    graded = report.graded
    tests = [
        _gradescope_test(
            item.title,
            "\n".join(_item_lines(item, {}, explain=False)[1:]),
            score=item.score,
            max_score=item.max_score,
            status="failed" if item.lost > 0 else "passed",
        )
        for item in report.items
        if item.max_score > 0 or item.faults
    ]
    if graded.findings:
        text = "\n".join(graded.findings)
        tests.append(_gradescope_test("What a reviewer would say (no points)", text))
    output = [graded.error] if graded.error is not None else list(graded.notes)
    if graded.output.strip():
        output += ["", "What the submission printed:", _excerpt(graded.output)]
    return {
        "score": report.score,
        "execution_time": graded.seconds,
        "output": "\n".join(output),
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
        # Not a hidden test: with one of those, Gradescope shows students no total.
        "extra_data": {"for_staff": [*graded.suspicious, _describe_protections(graded)]},
    }


def _gradescope_test(name: str, output: str, **fields: Any) -> dict[str, Any]:
    test = {"name": name, "score": 0, "max_score": 0, "status": "passed"}
    return {**test, "output": output, "output_format": "text", "visibility": "visible", **fields}


def _points(report: Report) -> str:
    return f"{report.score:g} of {report.max_score:g}"


def _describe_protections(graded: Graded) -> str:
    """Say which protections were active, and what a submission could do without the others."""
    missing = [harm for layer, harm in LAYERS.items() if layer not in graded.protections]
    if graded.error is not None:
        return "nothing of it was run"
    text = f"confined: {', '.join(graded.protections) or 'not at all'}"
    return f"{text}. On this machine it could {'; '.join(missing)}" if missing else text


def _excerpt(text: str) -> str:
    text = text.strip()
    if len(text) <= MAX_OUTPUT:
        return text
    return f"{text[: MAX_OUTPUT // 2]}\n...\n{text[-MAX_OUTPUT // 2 :]}"
