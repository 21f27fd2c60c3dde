"""Review findings: each is reported for code that has the fault, none for this repository."""

from __future__ import annotations

from pathlib import Path

import pytest

import common
from eecs598.grading.checks import review
from eecs598.grading.checks.review import review_findings
from tests.grading.checks import (
    test_a4_helper,
    test_detector,
    test_locations,
    test_network,
    test_targets,
)
from tests.grading.checks.mutants import LOCATIONS, OURS, load

FOLDER = Path(common.__file__).parent
FILES = (test_network, test_locations, test_targets, test_detector, test_a4_helper)
BY_NAME = {
    mutant.name: (mutant.module, mutant.old, mutant.new)
    for file in FILES
    for mutant in file.MUTANTS
}

# A change of this repository, and words of the one finding that must follow.
FINDINGS = {
    "head row by row": (BY_NAME["head flattened row by row"], "listed in different orders"),
    "only the deltas": (BY_NAME["only the deltas flattened row by row"], "its deltas at index "),
    "dummy pass": (BY_NAME["dummy pass in training mode"], "statistics of 3 batch norms"),
    "skipped images": (BY_NAME["images without detections skipped"], "image without detections"),
    "output_dir": (BY_NAME["output_dir ignored"], "writes nothing to output_dir"),
    "deltas in place": (BY_NAME["deltas clipped in place"], "changes its argument deltas in place"),
    "predictions in place": (
        BY_NAME["predictions clipped in place"],
        "FCOS.inference: changes its argument the deltas of p3 in place, [20, -1, 20, -1] became",
    ),
    "boxes of nms in place": (
        (
            "common",
            "_check_nms_inputs(boxes, scores, iou_threshold)\n    return",
            "boxes.round_()\n    return",
        ),
        "common.py, nms: changes its argument boxes in place, [0.3, 0, 10, 10] became [0, 0",
    ),
    "gt_boxes of matching in place": (
        (
            "one_stage_detector",
            "    sizes = [len(level",
            "    gt_boxes[:, 4] += 1\n    sizes = [len(level",
        ),
        "fcos_match_locations_to_gt: changes its argument gt_boxes in place",
    ),
    "images in place": (
        (
            "one_stage_detector",
            "feats = self.backbone(images)",
            "feats = self.backbone(images.mul_(0.5))",
        ),
        "FCOS.forward: changes its argument images in place",
    ),
    "item": (
        ("one_stage_detector", "loss_cls.sum() / divisor", "loss_cls.sum() / divisor.item()"),
        ".item() in the training step",
    ),
    "condition": (
        (
            "one_stage_detector",
            "loss_box = loss_box.masked",
            "assert background.any()\n        loss_box = loss_box.masked",
        ),
        "a condition on the value of a tensor in the training step",
    ),
    "to cpu": (
        (
            "one_stage_detector",
            "gt_boxes = gt_boxes.to(locations)",
            'gt_boxes = gt_boxes.to("cpu").to(locations)',
        ),
        '.to("cpu") in the training step',
    ),
    "loop over locations": (
        (
            "one_stage_detector",
            "background = targets.boxes[..., 4] < 0",
            "one_by_one = [row[:, 4] < 0 for row in targets.boxes.unbind(1)]\n"
            "        background = torch.stack(one_by_one, 1)",
        ),
        "Python loop over locations",
    ),
    "print": (
        (
            "one_stage_detector",
            "feats = self.backbone(images)",
            'feats = self.backbone(images)\n        print("p3", feats["p3"].shape)',
        ),
        "prints 'p3' in every forward pass",
    ),
    "graph": (
        ("one_stage_detector", "    @torch.no_grad()\n    def predict(", "    def predict("),
        None,  # a4_helper disables gradients
    ),
    "torchvision's nms": (
        (
            "common",
            "return _greedy_nms(boxes, scores, None, iou_threshold)",
            "return torchvision.ops.nms(boxes, scores, iou_threshold)",
        ),
        "calls torchvision's nms",
    ),
    "both in the other order": (
        ("common", LOCATIONS, "torch.stack(grid, dim=-1).transpose(0, 1).flatten(0, 1)"),
        "listed in different orders",
    ),
}


def test_this_repository_has_no_findings():
    assert review_findings(OURS, FOLDER) == []


@pytest.mark.parametrize("name", FINDINGS)
def test_faults_are_found(name):
    change, words = FINDINGS[name]
    found = review_findings(load(change), FOLDER)
    if words is None:
        assert found == []
    else:
        (sentence,) = found
        assert words in sentence
        assert sentence.startswith(("common.py, ", "one_stage_detector.py, ", "a4_helper.py, "))
        assert "\n" not in sentence


def test_detecting_with_gradients_is_found():
    submission = load(
        ("one_stage_detector", "    @torch.no_grad()\n    def predict(", "    def predict("),
        (
            "a4_helper",
            "                with torch.no_grad():\n                    boxes",
            "                if True:\n                    boxes",
        ),
    )
    (sentence,) = review_findings(submission, FOLDER)
    assert "without torch.no_grad()" in sentence


def test_both_orders_changed_is_consistent():
    submission = load(
        ("common", LOCATIONS, "torch.stack(grid, dim=-1).transpose(0, 1).flatten(0, 1)"),
        ("one_stage_detector", "feats.permute(0, 3, 2, 1)", "feats.permute(0, 2, 3, 1)"),
    )
    assert review_findings(submission, FOLDER) == []


def test_a_slow_nms_is_found(monkeypatch):
    monkeypatch.setattr(review, "SLOW_NMS_SECONDS", 0.0)
    (sentence,) = review_findings(OURS, FOLDER)
    assert "common.py, nms: takes" in sentence and "5,000 boxes" in sentence


def test_fixed_sizes_are_found(tmp_path):
    (tmp_path / "one_stage_detector.py").write_text(
        "def f(boxes, size=224):\n    return boxes.clamp(0, 224)\n"
        "class FCOS:\n    def forward(self, x):\n        y = x.view(-1, 20)\n        return y\n"
    )
    (tmp_path / "common.py").write_text(
        "class Backbone:\n    def __init__(self):\n"
        "        x = torch.randn(2, 3, 224, 224)\n        shape = (2, 3, 224, 224)\n"
    )
    found = review_findings(OURS, tmp_path)
    assert [sentence[:52] for sentence in found] == [
        "one_stage_detector.py, line 2, f: 224 is written into"[:52],
        "one_stage_detector.py, line 5, FCOS.forward: 20 is written into"[:52],
    ]


def test_replaced_and_failing_code_has_no_findings(tmp_path):
    submission = load(BY_NAME["images without detections skipped"])
    submission.replaced["a4_helper"] = "missing"
    assert review_findings(submission, FOLDER) == []
    for module in (submission.common, submission.one_stage_detector):
        for name in module.__all__:
            setattr(module, name, lambda *args, **kwargs: None)
    (tmp_path / "common.py").write_bytes(b"\x00")
    assert review_findings(submission, tmp_path) == []
