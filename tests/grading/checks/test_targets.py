"""Checks of the training targets: mutants fail them."""

from __future__ import annotations

import pytest

from tests.grading.checks.mutants import Mutant, assert_intended_failures

MUTANTS = [
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
        "cost = sides.prod(dim=-1)[:, None]",
        "cost = (1 / sides.prod(dim=-1))[:, None]",
        {"matching": "smallest box", "losses": "loss_box"},
    ),
    Mutant(
        "size ranges ignored",
        "one_stage_detector",
        "matches &= (largest > lower) & (largest < upper)",
        "pass",
        {"matching": "level's range", "losses": "loss_box"},
    ),
    Mutant(
        "sign of right and bottom",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return (_distances(locations, gt_boxes) / stride * locations.new_tensor([1, 1, -1, -1]))",
        {"deltas": "left, top"},
    ),
    Mutant(
        "deltas in pixels",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return _distances(locations, gt_boxes)",
        {"deltas": "left, top"},
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
        {"box_decoding": "in strides"},
    ),
    Mutant(
        "centerness without the root",
        "one_stage_detector",
        ".masked_fill(background, 1.0).sqrt()",
        ".masked_fill(background, 1.0)",
        {"centerness": "1e-7"},
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
        {"centerness": "formula"},
    ),
    Mutant(
        "deltas in float32",
        "one_stage_detector",
        "return (_distances(locations, gt_boxes) / stride)",
        "return (_distances(locations.float(), gt_boxes.float()) / stride)",
        {"other_sizes": "float64"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)
