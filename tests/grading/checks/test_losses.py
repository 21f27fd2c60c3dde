"""Checks of losses and training step: mutants fail them."""

from __future__ import annotations

import pytest
import torch

from eecs598.grading import Submission
from eecs598.grading.checks.losses import overfit
from tests.grading.checks.mutants import OURS, Mutant, assert_intended_failures

MUTANTS = [
    Mutant(
        "20 classes",
        "one_stage_detector",
        "classes = torch.arange(class_logits.shape[-1]",
        "classes = torch.arange(20",
        {"other_sizes": "number of classes"},
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
        {"losses": "no box and centerness loss from background"},
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
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)


@pytest.mark.parametrize("seed", range(3))
def test_right_work_passes_by_far_from_any_weights(seed):
    # The check's limit is 95 %. Close to it, rounding on another processor would change the points.
    torch.manual_seed(seed)
    ours = Submission(OURS.common, OURS.one_stage_detector, OURS.a4_helper)
    losses = overfit(ours, batch_size=2, side=64, num_steps=10)
    for name in ("loss_cls", "loss_box"):
        assert losses.trained[name] < 0.7 * losses.untrained[name], name
