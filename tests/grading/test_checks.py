"""The assignment's checks: this repository passes them, and wrong variants of it do not."""

from __future__ import annotations

import ast
import math
import random
import sys
from collections import OrderedDict, UserDict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import sigmoid_focal_loss

import a4_helper
import common
import one_stage_detector
from eecs598 import grading
from eecs598.grading import CHECKS, CheckResult, Submission, run_checks
from eecs598.grading.checks.reference import sums_of_losses
from eecs598.grading.result import Wrong, expect_close

MODULES = ("common", "one_stage_detector", "a4_helper")
OURS = Submission(common, one_stage_detector, a4_helper)


@pytest.mark.parametrize("name", CHECKS)
def test_this_repository_passes(name):
    (result,) = run_checks(OURS, [name])
    assert result.name == name
    assert len(result.passed) >= 3
    assert result.failed == []


# --------------------------------------------------------------------------------------------
# Wrong variants
# --------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """A change of one module, and every check that must fail on it.

    ``fails`` gives for each of these checks (a part of) the label of one of the probes that fail.
    """

    name: str
    module: str
    old: str  # occurs in the module's source exactly once
    new: str
    fails: dict[str, str]


LOCATIONS = "torch.stack(grid, dim=-1).flatten(0, 1)"
DISTANCES = "torch.cat([locations - boxes[..., :2], boxes[..., 2:4] - locations], dim=-1)"

# In place of the fast one, to be changed without knowing how that works.
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
    # Backbone and pyramid
    Mutant(
        "dummy pass in training mode",
        "common",
        "features = backbone.eval()(images)",
        "features = backbone.train()(images)",
        {"backbone": "batch-norm"},
    ),
    Mutant(
        "no top-down pathway",
        "common",
        'merged + F.interpolate(top_down, size=merged.shape[-2:], mode="nearest")',
        "merged",
        {"backbone": "top-down"},
    ),
    Mutant(
        "upsampling by a factor of two",
        "common",
        "top_down, size=merged.shape[-2:], mode",
        "top_down, scale_factor=2, mode",
        {"backbone": "97 x 130", "sizes_and_dtypes": "65 x 105"},
    ),
    Mutant(
        "1x1 output convolutions",
        "common",
        "nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)",
        "nn.Conv2d(out_channels, out_channels, kernel_size=1)",
        {"backbone": "fpn_params"},
    ),
    # Head
    Mutant(
        "pred_cls.bias 0",
        "one_stage_detector",
        "nn.init.constant_(self.pred_cls.bias, -math.log(99))",
        "pass",
        {"head": "pred_cls.bias"},
    ),
    Mutant(
        "weights 0.05",
        "one_stage_detector",
        "std=0.01",
        "std=0.05",
        {"head": "N(0, 0.01)"},
    ),
    Mutant(
        "biases not 0",
        "one_stage_detector",
        "nn.init.zeros_(module.bias)",
        "pass",
        {"head": "biases 0"},
    ),
    Mutant(
        "no ReLU in the stems",
        "one_stage_detector",
        "layers.append(nn.ReLU())",
        "layers.append(nn.Identity())",
        {"head": "ReLU"},
    ),
    Mutant(
        "centerness from the class stem",
        "one_stage_detector",
        "self.pred_ctr(box_feats)",
        "self.pred_ctr(class_feats)",
        {"head": "centerness"},
    ),
    Mutant(
        "1x1 prediction convolution",
        "one_stage_detector",
        "nn.Conv2d(channels, 4, kernel_size=3, padding=1)",
        "nn.Conv2d(channels, 4, kernel_size=1)",
        {"head": "3x3"},
    ),
    # Locations
    Mutant(
        "head flattened row by row",
        "one_stage_detector",
        "feats.permute(0, 3, 2, 1)",
        "feats.permute(0, 2, 3, 1)",
        {"location_order": "image gradients"},
    ),
    Mutant(
        "only the deltas flattened row by row",
        "one_stage_detector",
        "deltas[level] = _flatten_x_major(self.pred_box(box_feats))",
        "deltas[level] = self.pred_box(box_feats).flatten(2).transpose(1, 2)",
        {"location_order": "3 x 5"},
    ),
    Mutant(
        "locations row by row",
        "common",
        LOCATIONS,
        "torch.stack(grid, dim=-1).transpose(0, 1).flatten(0, 1)",
        {"location_coords": "first five", "location_order": "image gradients"},
    ),
    Mutant(
        "x and y swapped",
        "common",
        LOCATIONS,
        "torch.stack(grid[::-1], dim=-1).flatten(0, 1)",
        {"location_coords": "x spans", "location_order": "3 x 5"},
    ),
    Mutant(
        "height and width swapped",
        "common",
        "height, width = shape[-2:]",
        "width, height = shape[-2:]",
        {"location_coords": "x spans", "location_order": "3 x 5"},
    ),
    Mutant(
        "half a stride missing",
        "common",
        "y = stride * (torch.arange(height, dtype=dtype, device=device) + 0.5)",
        "y = stride * torch.arange(height, dtype=dtype, device=device)",
        {"location_coords": "first five"},
    ),
    Mutant(
        "always float32",
        "common",
        LOCATIONS,
        f"{LOCATIONS}.float()",
        {"location_coords": "dtype"},
    ),
    # Targets
    Mutant(
        "sides count as inside",
        "one_stage_detector",
        "distances.amin(dim=-1) > 0",
        "distances.amin(dim=-1) >= 0",
        {"matching": "side of a box"},
    ),
    Mutant(
        "lower end of the range closed",
        "one_stage_detector",
        "largest > lower",
        "largest >= lower",
        {"matching": "ends of the range"},
    ),
    Mutant(
        "upper end of the range closed",
        "one_stage_detector",
        "largest < upper",
        "largest <= upper",
        {"matching": "ends of the range"},
    ),
    Mutant(
        "lower bound on p3",
        "one_stage_detector",
        ".masked_fill(strides == finest, 0)",
        "",
        {"matching": "no lower bound", "losses": "loss_box"},
    ),
    Mutant(
        "largest box wins",
        "one_stage_detector",
        "areas = areas[:, None].masked_fill",
        "areas = (1 / areas)[:, None].masked_fill",
        {"matching": "smallest box", "losses": "loss_box"},
    ),
    Mutant(
        "size ranges ignored",
        "one_stage_detector",
        "& (largest > lower) & (largest < upper)",
        "",
        {"matching": "level's range", "losses": "loss_box"},
    ),
    Mutant(
        "sign of right and bottom",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return (_distances(locations, gt_boxes) / stride * locations.new_tensor([1, 1, -1, -1]))",
        {"deltas": "left, top", "losses": "loss_box", "training": "the sum"},
    ),
    Mutant(
        "deltas in pixels",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return _distances(locations, gt_boxes)",
        {"deltas": "left, top", "losses": "loss_box"},
    ),
    Mutant(
        "deltas of background from its -1",
        "one_stage_detector",
        ".masked_fill(background, -1.0)\n\n\ndef fcos_apply",
        "\n\n\ndef fcos_apply",
        {"deltas": "background"},
    ),
    Mutant(
        "negative deltas not clipped",
        "one_stage_detector",
        "deltas.clamp(min=0) * stride",
        "deltas * stride",
        {"box_decoding": "negative deltas"},
    ),
    Mutant(
        "deltas clipped in place",
        "one_stage_detector",
        "deltas.clamp(min=0) * stride",
        "deltas.clamp_(min=0) * stride",
        {"box_decoding": "input unchanged"},
    ),
    Mutant(
        "boxes of every level with stride 8",
        "one_stage_detector",
        "deltas.clamp(min=0) * stride",
        "deltas.clamp(min=0) * 8",
        {"box_decoding": "in strides", "inference": "boxes of each level"},
    ),
    Mutant(
        "centerness without the root",
        "one_stage_detector",
        ".masked_fill(background, 1.0).sqrt()",
        ".masked_fill(background, 1.0)",
        {"centerness": "1e-7", "losses": "loss_ctr"},
    ),
    Mutant(
        "centerness of background 0",
        "one_stage_detector",
        ".sqrt().masked_fill(background, -1.0)",
        ".sqrt().masked_fill(background, 0.0)",
        {"centerness": "background"},
    ),
    Mutant(
        "centerness of one axis",
        "one_stage_detector",
        "farther = torch.maximum(left, right) * torch.maximum(top, bottom)",
        "farther = torch.maximum(left, right) * torch.minimum(top, bottom)",
        {"centerness": "formula", "losses": "loss_ctr"},
    ),
    Mutant(
        "deltas in float32",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return (_distances(locations.float(), gt_boxes.float()) / stride)",
        {"sizes_and_dtypes": "targets and boxes in float64"},
    ),
    # Losses
    Mutant(
        "20 classes",
        "one_stage_detector",
        "classes = torch.arange(class_logits.shape[-1]",
        "classes = torch.arange(20",
        {"losses": "three finite", "training": "gradients", "sizes_and_dtypes": "one class"},
    ),
    Mutant(
        "mean instead of sum",
        "one_stage_detector",
        '"loss_box": loss_box.sum() / divisor',
        '"loss_box": loss_box.mean() / divisor',
        {"losses": "loss_box"},
    ),
    Mutant(
        "no quarter in the box loss",
        "one_stage_detector",
        "0.25 * F.l1_loss",
        "F.l1_loss",
        {"losses": "loss_box"},
    ),
    Mutant(
        "smooth L1",
        "one_stage_detector",
        "F.l1_loss",
        "F.smooth_l1_loss",
        {"losses": "loss_box"},
    ),
    Mutant(
        "alpha 0.75",
        "one_stage_detector",
        "alpha=0.25",
        "alpha=0.75",
        {"losses": "loss_cls"},
    ),
    Mutant(
        "sigmoid before the focal loss",
        "one_stage_detector",
        "sigmoid_focal_loss(class_logits, target",
        "sigmoid_focal_loss(class_logits.sigmoid(), target",
        {"losses": "loss_cls", "training": "loss_cls"},
    ),
    Mutant(
        "class ids from 1",
        "one_stage_detector",
        "(targets.boxes[..., 4:] == classes)",
        "(targets.boxes[..., 4:] + 1 == classes)",
        {"losses": "loss_cls"},
    ),
    Mutant(
        "box loss of background",
        "one_stage_detector",
        "loss_box = loss_box.masked_fill(background[..., None], 0.0)",
        "pass",
        {"losses": "no box and centerness loss from background"},
    ),
    Mutant(
        "centerness loss of background",
        "one_stage_detector",
        "loss_ctr = loss_ctr.masked_fill(background, 0.0)",
        "pass",
        {"losses": "no box and centerness loss from background", "training": "the sum"},
    ),
    Mutant(
        "not divided by the images",
        "one_stage_detector",
        "normalizer.clamp(min=1.0) * batch_size",
        "normalizer.clamp(min=1.0)",
        {"losses": "divided by"},
    ),
    Mutant(
        "divided by the foreground of the batch",
        "one_stage_detector",
        "normalizer.clamp(min=1.0) * batch_size",
        "(~background).sum().clamp(min=1)",
        {"losses": "divided by"},
    ),
    Mutant(
        "moving average 0.99",
        "one_stage_detector",
        "mul_(0.9).add_(0.1 * foreground_per_image)",
        "mul_(0.99).add_(0.01 * foreground_per_image)",
        {"losses": "divided by"},
    ),
    Mutant(
        "moving average starts anew",
        "one_stage_detector",
        "normalizer.mul_(0.9)",
        "normalizer.fill_(135.0)",
        {"losses": "moves on"},
    ),
    Mutant(
        "box stem without gradient",
        "one_stage_detector",
        "self.stem_box(feats)\n",
        "self.stem_box(feats).detach()\n",
        {"training": "gradients"},
    ),
    Mutant(
        "losses rise",
        "one_stage_detector",
        '"loss_box": loss_box.sum()',
        '"loss_box": -loss_box.sum()',
        {"losses": "loss_box", "training": "loss_box"},
    ),
    # Non-maximum suppression
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
        {"nms": "0.3, exactly"},
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
        {"class_spec_nms": "do not suppress", "inference": "no NMS between classes"},
    ),
    Mutant(
        "classes shifted apart in float32",
        "common",
        "return _greedy_nms(boxes, scores, class_ids, iou_threshold)",
        "offset = class_ids * (boxes.max() + 1) if len(boxes) else class_ids\n"
        "    return nms(boxes + offset[:, None], scores, iou_threshold)",
        {"class_spec_nms": "large coordinates"},
    ),
    # Inference
    Mutant(
        "class sigmoid missing",
        "one_stage_detector",
        "_join_predictions(outputs.class_logits).sigmoid()",
        "_join_predictions(outputs.class_logits)",
        {"inference": "score", "sizes_and_dtypes": ""},
    ),
    Mutant(
        "sigmoid twice",
        "one_stage_detector",
        "_join_predictions(outputs.class_logits).sigmoid()",
        "_join_predictions(outputs.class_logits).sigmoid().sigmoid()",
        {"inference": "score is sqrt"},
    ),
    Mutant(
        "score without the root",
        "one_stage_detector",
        "(class_probs * centerness).sqrt()",
        "(class_probs * centerness)",
        {"inference": "score"},
    ),
    Mutant(
        "score without centerness",
        "one_stage_detector",
        "(class_probs * centerness).sqrt()",
        "class_probs",
        {"inference": "score"},
    ),
    Mutant(
        "least probable class",
        "one_stage_detector",
        "all_class_probs.max(dim=-1)",
        "all_class_probs.min(dim=-1)",
        {"inference": "most probable class"},
    ),
    Mutant(
        "score threshold ignored",
        "one_stage_detector",
        "scores > score_thresh",
        "scores > min(score_thresh, 0.25)",
        {"inference": "score threshold"},
    ),
    Mutant(
        "boxes not clipped",
        "one_stage_detector",
        "boxes = clip_boxes_to_image(boxes, image_size)",
        "pass",
        {"inference": "clipped"},
    ),
    Mutant(
        "clipped to width and height swapped",
        "one_stage_detector",
        "clip_boxes_to_image(boxes, image_size)",
        "clip_boxes_to_image(boxes, image_size[::-1])",
        {"inference": "clipped"},
    ),
    Mutant(
        "clipped to 224 pixels",
        "one_stage_detector",
        "clip_boxes_to_image(boxes, image_size)",
        "boxes.clamp(0, 224)",
        {"inference": "clipped"},
    ),
    Mutant(
        "NMS threshold ignored",
        "one_stage_detector",
        "class_spec_nms(boxes, scores, class_ids, nms_thresh)",
        "class_spec_nms(boxes, scores, class_ids, 0.6)",
        {"inference": "NMS threshold"},
    ),
    Mutant(
        "no NMS",
        "one_stage_detector",
        "class_spec_nms(boxes, scores, class_ids, nms_thresh)",
        "scores.argsort(descending=True)",
        {"inference": "NMS within a class"},
    ),
    Mutant(
        "three results in another order",
        "one_stage_detector",
        '        )[0]\n        return found["boxes"], found["labels"], found["scores"]\n\n'
        "    @torch.no_grad()\n    def predict",
        '        )[0]\n        return found["boxes"], found["scores"], found["labels"]\n\n'
        "    @torch.no_grad()\n    def predict",
        {"inference": "score"},
    ),
    Mutant(
        "predictions clipped in place",
        "one_stage_detector",
        "deltas = _join_predictions(outputs.deltas)\n        boxes",
        "deltas = _join_predictions({k: v.clamp_(min=0) for k, v in outputs.deltas.items()})\n"
        "        boxes",
        {"inference": "input unchanged"},
    ),
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
        "not normalised",
        "a4_helper",
        "return make_item(path, pixels, boxes, self.images.max_boxes)",
        "name, _, padded = make_item(path, pixels, boxes, self.images.max_boxes)\n"
        "        return name, pixels / 255, padded",
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
    Mutant(
        "another greeting",
        "a4_helper",
        "Hello from a4_helper.py!",
        "Hello",
        {"hello": "hello_helper"},
    ),
]

# What a change of a module can reach: nothing of common.py imports the two others.
HELPER_CHECKS = {"hello", "dataset", "train_detector", "evaluation_export"}
COMMON_ONLY = {"backbone", "location_coords", "nms", "class_spec_nms"}
REACHABLE = {
    "common": (set(CHECKS) - HELPER_CHECKS) | {"hello"},
    "one_stage_detector": (set(CHECKS) - HELPER_CHECKS - COMMON_ONLY) | {"hello"},
    "a4_helper": HELPER_CHECKS,
}


class TinyStages(nn.Module):
    """Stands in for the classification network, so that a wrong variant is judged in a second."""

    def __init__(self) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, stride + 1, stride, padding=stride // 2),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )

        self.c3, self.c4, self.c5 = stage(3, 8, 8), stage(8, 12, 2), stage(12, 20, 2)

    def forward(self, images):
        c3 = self.c3(images)
        c4 = self.c4(c3)
        return {"c3": c3, "c4": c4, "c5": self.c5(c4)}


def load(*changes: tuple[str, str, str]) -> Submission:
    """Fresh copies of the three modules with a tiny backbone.

    Args:
        changes: module, text in its source, text to put there.
    """
    loaded = {}
    before = {name: sys.modules[name] for name in MODULES}
    try:
        for name in MODULES:
            file = before[name].__file__
            source = Path(file).read_text(encoding="utf-8")
            for module, old, new in changes:
                if module == name:
                    assert source.count(old) == 1, f"{source.count(old)} times in {name}.py: {old}"
                    source = source.replace(old, new)
            # Under the module's own name, so that the next one imports this copy.
            loaded[name] = sys.modules[name] = ModuleType(name)
            exec(compile(source, file, "exec"), loaded[name].__dict__)
    finally:
        sys.modules.update(before)
    loaded["common"]._build_backbone = lambda name, weights: TinyStages()
    return Submission(**loaded)


def failures(results: list[CheckResult]) -> dict[str, list[str]]:
    """Labels of the probes that failed, by check."""
    return {
        result.name: [probe.label for probe in result.probes if probe.problem is not None]
        for result in results
        if not result.ok
    }


def test_the_tiny_backbone_passes():
    # Otherwise, what a wrong variant fails would say nothing about the variant.
    assert failures(run_checks(load())) == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_wrong_variants_fail_the_intended_checks(mutant):
    results = run_checks(load((mutant.module, mutant.old, mutant.new)), REACHABLE[mutant.module])
    failed = failures(results)
    sentences = [sentence for result in results for sentence in result.failed]
    assert set(failed) == set(mutant.fails), sentences
    for check, label in mutant.fails.items():
        assert any(label in found for found in failed[check]), sentences
    for sentence in sentences:
        assert "\n" not in sentence and len(sentence) < 600
        assert ("expected" in sentence and "got" in sentence) or "raised" in sentence, sentence


def test_the_plain_nms_passes():
    submission = load(("common", "def _greedy_nms(", PLAIN_NMS))
    assert failures(run_checks(submission, ["nms", "class_spec_nms", "inference"])) == {}


def test_every_check_has_a_wrong_variant():
    assert {check for mutant in MUTANTS for check in mutant.fails} == set(CHECKS)


# --------------------------------------------------------------------------------------------
# Other correct implementations
# --------------------------------------------------------------------------------------------


def test_either_order_of_locations_is_consistent():
    submission = load(
        ("common", LOCATIONS, "torch.stack(grid, dim=-1).transpose(0, 1).flatten(0, 1)"),
        ("one_stage_detector", "feats.permute(0, 3, 2, 1)", "feats.permute(0, 2, 3, 1)"),
    )
    # The assignment prints the first five locations, and they are the only thing that is wrong.
    assert failures(run_checks(submission)) == {
        "location_coords": ["first five of each level, relative error 0"]
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class_spec_nms(boxes, scores, class_ids, nms_thresh)\n", "{}.flip(0)\n"),
        ('"labels": labels[own],', '"labels": labels[own].float(),'),
        (
            'self.register_buffer("loss_normalizer", torch.tensor(150.0))',
            "self.loss_normalizer = torch.tensor(150.0)",
        ),
    ],
    ids=["detections unsorted", "class ids as floats", "average not a buffer"],
)
def test_details_that_the_assignment_leaves_open_pass(old, new):
    submission = load(("one_stage_detector", old, new.format(old.strip())))
    assert failures(run_checks(submission, ["losses", "training", "inference"])) == {}


def test_networks_without_the_keyword_weights_are_built():
    submission = load()

    class PlainFCOS(submission.one_stage_detector.FCOS):
        def __init__(self, num_classes, fpn_channels, stem_channels):
            super().__init__(num_classes, fpn_channels, stem_channels)

    class PlainBackbone(submission.common.DetectorBackboneWithFPN):
        def __init__(self, out_channels):
            super().__init__(out_channels)

    submission.one_stage_detector.FCOS = PlainFCOS
    submission.common.DetectorBackboneWithFPN = PlainBackbone
    assert failures(run_checks(submission, ["backbone", "inference"])) == {}


class Predictions(NamedTuple):
    cls: dict
    box: dict
    ctr: dict


class ByAttribute(dict):
    __getattr__ = dict.__getitem__


def uses_parts_by_name(modules: Submission) -> None:
    class Backbone(modules.common.DetectorBackboneWithFPN):
        def forward(self, images):
            return ByAttribute(super().forward(images))

    class Head(modules.one_stage_detector.FCOSPredictionNetwork):
        def __init__(self, num_classes, *args, **kwargs):
            super().__init__(num_classes, *args, **kwargs)
            self.num_classes = num_classes

        def forward(self, feats):
            return Predictions(*super().forward(feats))

    class Detector(modules.one_stage_detector.FCOS):
        def forward(self, images, gt_boxes=None, **thresholds):
            assert self.pred_net.num_classes == self.num_classes
            images = images.to(next(self.backbone.parameters()).device)
            feats = self.backbone(images=images)
            assert feats.p3.shape[-1] >= self.pred_net(feats=feats).ctr["p3"].shape[-1]
            return super().forward(images, gt_boxes, **thresholds)

    modules.one_stage_detector.DetectorBackboneWithFPN = Backbone
    modules.common.DetectorBackboneWithFPN = Backbone
    modules.one_stage_detector.FCOSPredictionNetwork = Head
    modules.one_stage_detector.FCOS = Detector


def returns_nothing_from_train(modules: Submission) -> None:
    for module, name in (
        (modules.common, "DetectorBackboneWithFPN"),
        (modules.one_stage_detector, "FCOSPredictionNetwork"),
        (modules.one_stage_detector, "FCOS"),
    ):
        cls = getattr(module, name)

        def train(self, mode=True, cls=cls):
            super(cls, self).train(mode)

        setattr(module, name, type(name, (cls,), {"train": train}))


def names_the_levels(modules: Submission) -> None:
    coords = modules.common.get_fpn_location_coords

    def coords_of_three(shapes, strides, **options):
        levels = ("p3", "p4", "p5")
        return coords({p: shapes[p] for p in levels}, {p: strides[p] for p in levels}, **options)

    class Head(modules.one_stage_detector.FCOSPredictionNetwork):
        def forward(self, feats):
            return super().forward({level: feats[level] for level in ("p3", "p4", "p5")})

    modules.common.get_fpn_location_coords = coords_of_three
    modules.one_stage_detector.FCOSPredictionNetwork = Head


def cannot_be_copied(modules: Submission) -> None:
    class Detector(modules.one_stage_detector.FCOS):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.dummy_out = self.backbone(torch.zeros(1, 3, 64, 64))

    modules.one_stage_detector.FCOS = Detector


def returns_other_containers(modules: Submission) -> None:
    class Detector(modules.one_stage_detector.FCOS):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            return UserDict(found) if isinstance(found, dict) else iter(found)

    match = modules.one_stage_detector.fcos_match_locations_to_gt
    modules.one_stage_detector.FCOS = Detector
    modules.one_stage_detector.fcos_match_locations_to_gt = lambda *args: OrderedDict(match(*args))


@pytest.mark.parametrize(
    "change",
    [
        uses_parts_by_name,
        returns_nothing_from_train,
        names_the_levels,
        cannot_be_copied,
        returns_other_containers,
    ],
    ids=lambda change: change.__name__,
)
def test_other_styles_pass(change):
    submission = load()
    change(submission)
    results = run_checks(submission, set(CHECKS) - HELPER_CHECKS)
    assert [sentence for result in results for sentence in result.failed] == []


# --------------------------------------------------------------------------------------------
# Whatever a submission does
# --------------------------------------------------------------------------------------------


def test_empty_modules_fail_everything():
    results = run_checks(Submission(*(ModuleType(name) for name in MODULES)))
    assert [result.name for result in results] == list(CHECKS)
    assert all(result.failed and not result.passed for result in results)


@pytest.mark.parametrize("answer", [None, 0, torch.zeros(3)], ids=["None", "0", "a tensor"])
def test_functions_that_are_not_written_yet_fail(answer):
    submission = load()
    for module in (submission.common, submission.one_stage_detector, submission.a4_helper):
        for name in module.__all__:
            if callable(getattr(module, name)) and not name.startswith("hello"):
                setattr(module, name, lambda *args, **kwargs: answer)
    results = {result.name: result for result in run_checks(submission)}
    assert [name for name, result in results.items() if result.ok] == ["hello"]


@pytest.mark.parametrize("error", [ValueError("no\nidea"), SystemExit(1), RecursionError("deep")])
def test_what_a_probe_raises_is_its_answer(error):
    result = CheckResult("example")
    with result.probe("fails"):
        raise error
    with result.probe("goes on"):
        pass
    assert result.passed == ["goes on"]
    assert result.failed == [
        f"fails: raised {type(error).__name__}: {' '.join(str(error).split())}"
    ]
    assert not result.ok


def test_interrupts_are_not_answers():
    with pytest.raises(KeyboardInterrupt), CheckResult("example").probe("interrupted"):
        raise KeyboardInterrupt


def test_the_caller_notices_nothing(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    submission = load(
        (
            "common",
            "_check_nms_inputs(boxes, scores, iou_threshold)\n    return",
            "import random, sys, warnings\n    import numpy as np\n"
            "    print('noise'); print('noise', file=sys.stderr); warnings.warn('noise')\n"
            "    random.random(); np.random.rand(); torch.rand(1)\n    return",
        )
    )
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_checks(submission)
    assert before == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert capsys.readouterr() == ("", "")
    assert list(recwarn) == []
    assert Path.cwd() == tmp_path and list(tmp_path.iterdir()) == []


def test_results_do_not_depend_on_what_ran_before():
    # A wrong variant, because its sentences hold numbers.
    change = ("one_stage_detector", "0.25 * F.l1_loss", "F.l1_loss")
    alone = run_checks(load(change), ["losses"])
    torch.manual_seed(7)
    submission = load(change)
    run_checks(submission, ["location_order", "inference"])
    assert run_checks(submission, ["losses"]) == alone


def test_grading_imports_nothing_from_the_top_level():
    imported = set()
    for file in Path(grading.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert "eecs598" in imported
    assert not imported & {*MODULES, "fcos"}


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="'speed'.*'hello'"):
        run_checks(OURS, ["nms", "speed"])


def test_checks_run_in_the_order_of_the_assignment():
    names = [result.name for result in run_checks(load(), ["deltas", "hello", "centerness"])]
    assert names == ["hello", "deltas", "centerness"]


# --------------------------------------------------------------------------------------------
# Comparisons
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        (torch.tensor([1.0, 2.5]), "call: expected [1, 2], got [1, 2.5]"),
        (torch.tensor([1.0, math.nan]), "call: expected [1, 2], got [1, nan]"),
        (torch.tensor([[1.0, 2.0]]), "call: expected shape (2,), got (1, 2)"),
        ([1.0, 2.0], "call: expected a tensor, got [1, 2]"),
        (None, "call: expected a tensor, got None"),
    ],
)
def test_expect_close_names_the_difference(got, sentence):
    with pytest.raises(Wrong) as wrong:
        expect_close("call", got, [1.0, 2.0], tolerance=0.1)
    assert str(wrong.value) == sentence


def test_expect_close_shows_one_row_of_many():
    got = torch.zeros(6, 2)
    got[3, 1] = 1
    with pytest.raises(Wrong, match=r"^call, row 3: expected \[0, 0\], got \[0, 1\]$"):
        expect_close("call", got, torch.zeros(6, 2))


def test_expect_close_accepts_what_is_close():
    expect_close("call", torch.tensor([1.0, 2.0], dtype=torch.float64), [1.0, 2.0])
    expect_close("call", torch.tensor([1.0, 2.05]), [1.0, 2.0], tolerance=0.05)
    expect_close("call", torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def test_reference_losses_agree_with_torchvision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 3, generator=generator)
    locations = {"p3": torch.tensor([[4.0 + 8 * n, 12.0] for n in range(6)])}
    boxes = torch.tensor([[[1.0, 2.0, 30.0, 25.0, 2.0]]])  # holds the first four locations
    zeros = [{"p3": logits}, {"p3": torch.zeros(1, 6, 4)}, {"p3": torch.zeros(1, 6, 1)}]
    sums, foreground = sums_of_losses(locations, zeros, boxes)
    target = torch.zeros(1, 6, 3)
    target[0, :4, 2] = 1
    expected = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2.0, reduction="sum")
    assert foreground == 4
    assert sums["loss_cls"] == pytest.approx(expected.item(), rel=1e-6)
    # left + right is the width, top + bottom the height, in strides.
    assert sums["loss_box"] == pytest.approx(4 * 0.25 * (29 + 23) / 8)
    # With logit 0 the cross entropy is log 2 whatever the target.
    assert sums["loss_ctr"] == pytest.approx(4 * math.log(2))
