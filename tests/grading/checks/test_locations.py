"""Checks of the locations and their order: mutants fail them."""

from __future__ import annotations

import pytest

from eecs598.grading import run_checks
from tests.grading.checks.mutants import LOCATIONS, Mutant, assert_intended_failures, failures, load

MUTANTS = [
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
        {"location_coords": "first five", "location_order": "3 x 5"},
    ),
    Mutant(
        "height and width swapped",
        "common",
        "height, width = shape[-2:]",
        "width, height = shape[-2:]",
        {"location_order": "3 x 5", "other_sizes": "not square"},
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
        {"other_sizes": "float64"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)


def test_either_order_of_locations_is_consistent():
    submission = load(
        ("common", LOCATIONS, "torch.stack(grid, dim=-1).transpose(0, 1).flatten(0, 1)"),
        ("one_stage_detector", "feats.permute(0, 3, 2, 1)", "feats.permute(0, 2, 3, 1)"),
    )
    # The assignment prints the first five locations, and they are the only thing that is wrong.
    assert failures(run_checks(submission)) == {
        "location_coords": ["first five of each level, relative error 0"]
    }
