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
        "pixels, boxes = crop_center(pixels, boxes)",
        "pixels, _ = crop_center(pixels, boxes)",
        {"dataset": "training"},
    ),
    Mutant(
        "boxes not resized",
        "a4_helper",
        "pixels, boxes = self.images.resized(index)",
        "pixels, boxes = self.images.resized(index)[0], self.instances[index][1]",
        {"dataset": "validation"},
    ),
    Mutant(
        "boxes that are gone stay",
        "a4_helper",
        "return make_item(path, pixels, boxes, self.images.max_boxes)",
        "return make_item(path, pixels, boxes.clamp(min=0), self.images.max_boxes)",
        {"dataset": "crop removes"},
    ),
    Mutant(
        "padded with 0",
        "a4_helper",
        "return make_item(path, pixels, boxes, self.images.max_boxes)",
        "padded = torch.zeros(self.images.max_boxes, 5)\n"
        "        padded[: len(boxes)] = boxes\n"
        "        return *make_item(path, pixels, boxes, len(boxes))[:2], padded",
        {"dataset": "padded"},
    ),
    Mutant(
        "padded to 40 boxes",
        "a4_helper",
        "return make_item(path, pixels, boxes, self.images.max_boxes)",
        "return make_item(path, pixels, boxes, 40)",
        {"dataset": "45 objects"},
    ),
    Mutant(
        "not normalized",
        "a4_helper",
        "return make_item(path, pixels, boxes, self.images.max_boxes)",
        "name, _, padded = make_item(path, pixels, boxes, self.images.max_boxes)\n"
        "        return name, pixels / 255, padded",
        {"dataset": "normalized"},
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
        "loss = functools.reduce(torch.add, losses.values())",
        'loss = losses["loss_cls"]',
        {"train_detector": "every loss"},
    ),
    Mutant(
        "one step too few",
        "a4_helper",
        "_repeat(train_loader, max_iters - done)",
        "_repeat(train_loader, max_iters - done - 1)",
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
