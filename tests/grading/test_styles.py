"""Correct solutions in other styles keep full points."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eecs598.grading import Graded, Options, grade_folders, load_rubric
from tests.grading.styles import SOLUTIONS, write

REPOSITORY = Path(__file__).resolve().parents[2]

# The first three use every piece; the next three are in other files. The rest is a soak test.
QUICK = range(6)


def graded(numbers: range, folder: Path, checks: tuple[str, ...]) -> dict[int, Graded]:
    os.chmod(folder, 0o755)
    folders = [write(number, folder / f"style {number}") for number in numbers]
    options = Options(checks=checks, findings=False, timeout=60, total_timeout=300)
    return dict(zip(numbers, grade_folders(folders, REPOSITORY, options), strict=True))


def losses(results: dict[int, Graded]) -> dict[int, list[str]]:
    rubric = load_rubric()
    return {
        number: [f"{item.name} -{item.lost}: {item.failures}" for item in grade.items if item.lost]
        for number, one in results.items()
        if (grade := rubric.grade(one.results)).total < grade.max_total
    }


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[int, Graded]:
    checks = tuple(load_rubric().checks)
    return graded(QUICK, tmp_path_factory.mktemp("styles"), checks)


def test_other_styles_keep_full_points(quick):
    assert losses(quick) == {}


@pytest.mark.soak
def test_all_styles_keep_full_points(tmp_path):
    assert losses(graded(SOLUTIONS, tmp_path, tuple(load_rubric().checks))) == {}


def test_functions_are_found_wherever_they_are(quick):
    (one_file,) = (n for n in quick[3].notes if n.startswith("not in common.py"))
    assert one_file.startswith("not in common.py, found in one_stage_detector.py: Detector")
    notebook = [note for note in quick[4].notes if "found in A4 final.ipynb: " in note]
    assert len(notebook) == 2
