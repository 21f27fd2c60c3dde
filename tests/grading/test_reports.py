"""The text about a submission: what is first, how long lines are, and code that can be pasted."""

from __future__ import annotations

import contextlib
import io
import textwrap

import torch

import common
from eecs598.grading import CheckResult, Graded, ProbeResult, Report, format_text, load_rubric
from eecs598.grading.checks.registry import labels_of
from eecs598.grading.result import call_snippet, show


def report(
    problems: dict[str, dict[str, tuple[str, str]]], folder: str = "mine", **fields: object
) -> Report:
    """Full points, but for the problem and snippet of each label of a check."""
    rubric = load_rubric()
    results = [
        CheckResult(
            check,
            [
                ProbeResult(label, *problems.get(check, {}).get(label, (None, "")))
                for label in labels_of(check)
            ],
        )
        for check in rubric.checks
    ]
    graded = Graded(folder, results=results, **fields)
    return Report(graded, rubric.grade(results))


CHEAP = {"no boxes": ("expected 0, got 1", "print(1)")}
DEAR = {"loss_cls follows its formula": ("expected 1, got 2", "")}
REMARK = {"coordinates below zero": ("expected [0], got [1]", "")}


def test_what_costs_most_is_first_and_remarks_have_a_mark_of_their_own():
    text = format_text(report({"nms": CHEAP, "losses": DEAR, "class_spec_nms": REMARK}))
    _, first, _, *lines = text.splitlines()
    assert first.split(": ")[1].startswith("Losses")
    marks = [line.split()[0] for line in lines if line[2:4] in ("--", "..", "ok")]
    assert marks == ["--", "--", "..", *["ok"] * 9]
    assert lines[0].startswith("  --    13 of 17 Losses: ")
    assert lines[1] == "          -4  loss_cls follows its formula: expected 1, got 2"
    assert lines[3] == "        -0.5  no boxes: expected 0, got 1"
    assert "        note  coordinates below zero: expected [0], got [1]" in lines


def test_what_gives_no_points_is_left_out_unless_it_is_wrong():
    assert "handed out" not in format_text(report({}))


def test_no_line_is_longer_than_160_characters():
    long = {"no boxes": (f"expected {'1, ' * 200}", f"print({'1, ' * 200})")}
    one = report({"nms": long}, findings=["word " * 100], notes=["note " * 90], output="x" * 500)
    text = format_text(one)
    assert max(map(len, text.splitlines())) <= 160
    assert "--explain prints it" in text
    assert f"print({'1, ' * 200})" in format_text(one, explain=True)


def test_a_long_name_leaves_the_points_in_sight():
    one = report({"nms": CHEAP}, folder="a" * 200)
    assert format_text(one).splitlines()[0] == f"{'a' * 200}: 99.5 of 100 points"


def test_the_same_sentence_is_said_once():
    same = "raised NameError: no name (common.py, line 3)"
    labels = labels_of("nms")[:3]
    one = report(
        {
            "nms": {label: (same, "") for label in labels},
            "deltas": {labels_of("deltas")[0]: (same, "")},
        }
    )
    text = format_text(one)
    assert text.count("NameError") == 1
    assert "(and 2 more): raised NameError" in text
    assert "as under 'Non-maximum suppression'" in text


def test_questions_that_differ_in_a_number_are_one_line():
    wrong = {label: (f"got {n}", "") for n, label in enumerate(labels_of("nms")[:3])}
    item = next(item for item in report({"nms": wrong}).items if item.name == "nms")
    assert [len(fault.labels) for fault in item.faults] == [3]
    assert item.faults[0].points == item.lost == 6


def test_snippets_can_be_pasted():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    scores = torch.tensor([0.9, 0.1])
    snippet = call_snippet("common.nms", boxes, scores, 0.5)
    text = format_text(report({"nms": {"ties": ("expected [0], got [1]", snippet)}}))
    lines = [line for line in text.splitlines() if line.startswith(" " * 16)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(textwrap.dedent("\n".join(lines)))
    assert printed.getvalue().strip() == str(common.nms(boxes, scores, 0.5))
    classes = torch.tensor([1, 2])
    namespace: dict[str, torch.Tensor] = {}
    code = call_snippet("common.f", boxes, classes, torch.zeros(0, 4)).split("f(")[1][:-2]
    exec(f"import torch\nvalues = [{code}]", namespace)
    one, two, three = namespace["values"]
    assert torch.equal(one, boxes) and one.dtype == boxes.dtype
    assert torch.equal(two, classes) and two.dtype == classes.dtype
    assert three.shape == (0, 4)


def test_integers_are_shown_as_integers():
    assert show(torch.tensor([3.0, 1048576.0, 0.25])) == "[3, 1048576, 0.25]"
