"""Checks of data set, training loop and export: mutants fail them."""

from __future__ import annotations

import pytest

from tests.grading.checks.mutants import Mutant, assert_intended_failures

MUTANTS = [
    # Data
    Mutant(
        "validation cropped",
        "a4_helper",
        "if self.crop:",
        "if True:",
        {"dataset": "validation"},
    ),
    Mutant(
        "boxes not cropped",
        "a4_helper",
        "boxes = _crop_boxes(boxes, left, top, side)",
        "pass",
        {"dataset": "training"},
    ),
    Mutant(
        "boxes not resized",
        "a4_helper",
        "[scale_x, scale_y, scale_x, scale_y, 1.0]",
        "[1.0, scale_y, 1.0, scale_y, 1.0]",
        {"dataset": "validation"},
    ),
    Mutant(
        "boxes that are gone stay",
        "a4_helper",
        "return cropped.masked_fill(gone, -1.0)",
        "return cropped",
        {"dataset": "crop removes"},
    ),
    Mutant(
        "padded with 0",
        "a4_helper",
        "torch.full((max_boxes, 5), -1.0)",
        "torch.zeros(max_boxes, 5)",
        {"dataset": "padded"},
    ),
    Mutant(
        "padded to 40 boxes",
        "a4_helper",
        "torch.full((max_boxes, 5), -1.0)",
        "torch.full((40, 5), -1.0)",
        {"dataset": "45 objects"},
    ),
    Mutant(
        "not normalised",
        "a4_helper",
        "str(path), normalized(pixels), padded",
        "str(path), pixels / 255, padded",
        {"dataset": "normalised"},
    ),
    # Training loop
    Mutant(
        "gradients pile up",
        "a4_helper",
        "solver.zero_grad(set_to_none=True)",
        "pass",
        {"train_detector": "momentum"},
    ),
    Mutant(
        "no momentum",
        "a4_helper",
        "LambdaLR(solver, factor)",
        "LambdaLR(solver, factor)\n    solver.param_groups[0]['momentum'] = 0.0",
        {"train_detector": "momentum"},
    ),
    Mutant(
        "learning rate stays",
        "a4_helper",
        "LambdaLR(solver, factor)",
        "LambdaLR(solver, lambda step: 1.0)",
        {"train_detector": "learning rate"},
    ),
    Mutant(
        "one loss forgotten",
        "a4_helper",
        "loss = sum(losses.values())",
        'loss = losses["loss_cls"]',
        {"train_detector": "every loss"},
    ),
    Mutant(
        "one step too few",
        "a4_helper",
        "_endless(train_loader, max_iters - done)",
        "_endless(train_loader, max_iters - done - 1)",
        {"train_detector": "max_iters"},
    ),
    # Export
    Mutant(
        "images without detections skipped",
        "a4_helper",
        "write_text_format(output_dir, name, prediction, target, classes)",
        'len(prediction["boxes"]) and write_text_format(\n'
        "                output_dir, name, prediction, target, classes\n"
        "            )",
        {"evaluation_export": "every image"},
    ),
    Mutant(
        "thresholds swapped",
        "a4_helper",
        "test_score_thresh=score_thresh",
        "test_score_thresh=nms_thresh",
        {"evaluation_export": "thresholds"},
    ),
    Mutant(
        "padding exported",
        "a4_helper",
        "gt_boxes[0][gt_boxes[0, :, 4] >= 0]",
        "gt_boxes[0].clamp(min=0)",
        {"evaluation_export": "ground-truth"},
    ),
    Mutant(
        "output_dir ignored",
        "a4_helper",
        "write_text_format(output_dir,",
        'write_text_format("mAP/input",',
        {"evaluation_export": "output_dir"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)
