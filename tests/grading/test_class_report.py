"""Results of a class: nearly identical submissions, the table and the pages."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from eecs598.grading import (
    CheckResult,
    Graded,
    ProbeResult,
    Report,
    SimilarPair,
    format_pairs,
    labels_of,
    load_rubric,
    similar_pairs,
    write_csv,
    write_pages,
)
from tests.grading.styles import write


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Four different solutions, and a copy of one with other names and comments."""
    parent = tmp_path_factory.mktemp("class")
    found = {f"student {n}": write(n, parent / f"student {n}") for n in (0, 1, 2, 8)}
    copy = parent / "copy"
    shutil.copytree(found["student 1"], copy)
    for file in copy.iterdir():
        text = file.read_text().replace("keep", "chosen").replace("alive", "left_over")
        file.write_text("# my own work\n" + re.sub(r"\bmatched\b", "pairs", text))
    return {**found, "copy": copy}


def test_a_copy_with_other_names_is_found(folders):
    pairs = similar_pairs(folders)
    assert [(pair.first, pair.second) for pair in pairs] == [("student 1", "copy")]
    assert pairs[0].share > 0.95 and "nms" in pairs[0].functions
    assert "student 1 and copy\n" in format_pairs(pairs)


def test_long_names_of_a_pair_are_whole():
    pair = SimilarPair("a" * 150, "b" * 150, 1.0, ("nms",) * 100)
    _, names, functions = format_pairs([pair]).split("\n")
    assert names == f"  100%  {'a' * 150} and {'b' * 150}"
    assert functions.startswith("        nms, nms") and functions.endswith(" ...")


def test_copies_are_found_even_if_most_are_copies(folders):
    same = {f"{n}": folders["student 0"] for n in range(4)}
    assert [pair.share for pair in similar_pairs(same)] == [1.0] * 6
    assert similar_pairs({"empty": folders["copy"].parent / "no", "one": folders["copy"]}) == []


def test_code_too_deep_to_compare_is_left_out(folders, tmp_path):
    (tmp_path / "common.py").write_text(f"def nms(b, s):\n    return {' + '.join(['b'] * 900)}\n")
    assert similar_pairs({"deep": tmp_path, "one": folders["copy"]}) == []


def make_report(name: str, *wrong: str, error: str | None = None) -> Report:
    rubric = load_rubric()
    problem = "expected <1>, got 2 & more"
    results = [
        CheckResult(
            check,
            [
                ProbeResult(label, problem if check in wrong else None, "print(nms(x))")
                for label in labels_of(check)
            ],
        )
        for check in rubric.checks
    ]
    graded = Graded(name, results=[] if error else results, error=error, notes=["used: all"])
    return Report(graded, rubric.grade(graded.results))


@pytest.fixture
def reports() -> list[Report]:
    return [
        make_report("=HYPERLINK(1)"),
        make_report("b <i>", "nms", "deltas"),
        make_report("b  i", "nms"),
        make_report("d", error="can't be graded"),
    ]


def test_the_table_has_a_row_for_each_and_a_column_for_each_section(reports, tmp_path):
    write_csv(tmp_path / "grades.csv", reports)
    rows = list(csv.DictReader((tmp_path / "grades.csv").open(encoding="utf-8")))
    assert rows[0]["points"] == "100.0" and rows[0]["nms"] == "12.0"
    assert [row["submission"] for row in rows[1:]] == ["'=HYPERLINK(1)", "b <i>", "b  i", "d"]
    assert float(rows[2]["nms"]) == 0
    assert float(rows[2]["points"]) == 82 and float(rows[3]["points"]) == 88
    assert rows[4]["error"] == "can't be graded"


def test_the_pages(reports, tmp_path):
    write_pages(tmp_path / "pages", reports, [SimilarPair("b", "c", 0.93, ("nms",))])
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "pages").iterdir()}
    assert len(pages) == 5
    index = pages.pop("index.html")
    links = re.findall(r'<a href="([^"]+)"', index)
    assert set(links) == set(pages)
    # Three were graded, and two of them missed the questions of nms.
    assert re.search(r"<td>no boxes</td><td class=\"n\">2 \(67 %\)</td>", index)
    assert index.index("no boxes") < index.index("boxes without class id")
    assert "Median 88 of 100" in index and "93 %" in index
    wrong = next(text for text in pages.values() if "82 of 100" in text)
    assert "b &lt;i&gt;" in wrong and "expected &lt;1&gt;, got 2 &amp; more" in wrong
    assert "<pre>print(nms(x))</pre>" in wrong
    assert wrong.index("Non-maximum suppression") < wrong.index("Deltas from")
    assert "accuses" not in wrong and "93 %" not in "".join(pages.values())
