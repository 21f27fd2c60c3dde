"""Checks of non-maximum suppression: mutants fail them."""

from __future__ import annotations

import pytest

from eecs598.grading import run_checks
from tests.grading.checks.mutants import Mutant, assert_intended_failures, failures, load

# A simple NMS in place of the fast one, for mutants that do not depend on the fast one's code.
PLAIN_NMS = """def _greedy_nms(boxes, scores, class_ids, iou_threshold):
    boxes = boxes.float()
    order = scores.argsort(descending=True, stable=True)
    kept = []
    while len(order) > 0:
        best, rest = order[0], order[1:]
        kept.append(best)
        iou = torchvision.ops.box_iou(boxes[best][None], boxes[rest])[0]
        overlap = iou.double() > iou_threshold
        if class_ids is not None:
            overlap &= class_ids[rest] == class_ids[best]
        order = rest[~overlap]
    return torch.stack(kept) if kept else order


def _fast_one("""


def nms_mutant(name: str, old: str, new: str, fails: dict[str, str]) -> Mutant:
    assert PLAIN_NMS.count(old) == 1
    return Mutant(name, "common", "def _greedy_nms(", PLAIN_NMS.replace(old, new), fails)


MUTANTS = [
    nms_mutant(
        "lowest score first",
        "descending=True",
        "descending=False",
        {"nms": "decreasing", "class_spec_nms": "300 boxes"},
    ),
    nms_mutant(
        "IoU equal to the threshold suppresses",
        "iou.double() > iou_threshold",
        "iou.double() >= iou_threshold",
        {"nms": "equal to the threshold"},
    ),
    nms_mutant(
        "threshold rounded to float32",
        "iou.double() > iou_threshold",
        "iou > torch.tensor(iou_threshold)",
        {"nms": "exactly"},
    ),
    nms_mutant(
        "suppressed boxes suppress",
        "    kept = []\n",
        """    gone = torch.zeros(len(order), dtype=torch.bool)
    for n in range(0, len(order), 500):
        first = order[n : n + 500]
        overlap = torchvision.ops.box_iou(boxes[first], boxes[order]) > iou_threshold
        if class_ids is not None:
            overlap &= class_ids[first][:, None] == class_ids[order]
        gone |= overlap.triu(n + 1).any(dim=0)
    return order[~gone]
""",
        {"nms": "suppressed box", "class_spec_nms": "300 boxes"},
    ),
    nms_mutant(
        "inclusive pixels",
        "boxes = boxes.float()",
        "boxes = boxes + boxes.new_tensor([0, 0, 1, 1])",
        {"nms": "touching", "class_spec_nms": "300 boxes"},
    ),
    nms_mutant(
        "boxes rounded in place",
        "boxes = boxes.float()",
        "boxes = boxes.round_()",
        {"nms": "input unchanged", "class_spec_nms": "input unchanged"},
    ),
    Mutant(
        "int32 indices",
        "common",
        "return _greedy_nms(boxes, scores, None, iou_threshold)",
        "return _greedy_nms(boxes, scores, None, iou_threshold).int()",
        {"nms": "int64"},
    ),
    Mutant(
        "no boxes, no result",
        "common",
        "return _greedy_nms(boxes, scores, None, iou_threshold)",
        "return _greedy_nms(boxes, scores, None, iou_threshold) if len(boxes) else None",
        {"nms": "no boxes"},
    ),
    Mutant(
        "classes suppress each other",
        "common",
        "return _greedy_nms(boxes, scores, class_ids, iou_threshold)",
        "return _greedy_nms(boxes, scores, None, iou_threshold)",
        {"class_spec_nms": "do not suppress"},
    ),
    Mutant(
        "classes shifted apart in float32",
        "common",
        "return _greedy_nms(boxes, scores, class_ids, iou_threshold)",
        "offset = class_ids * (boxes.max() + 1) if len(boxes) else class_ids\n"
        "    return nms(boxes + offset[:, None], scores, iou_threshold)",
        {"class_spec_nms": "large coordinates"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)


def test_the_plain_nms_passes():
    submission = load(("common", "def _greedy_nms(", PLAIN_NMS))
    assert failures(run_checks(submission, ["nms", "class_spec_nms", "inference"])) == {}
