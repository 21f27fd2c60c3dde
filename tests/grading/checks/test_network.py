"""Checks of backbone, head and greetings: mutants fail them."""

from __future__ import annotations

import pytest

from tests.grading.checks.mutants import Mutant, assert_intended_failures

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
        {"other_sizes": "does not divide"},
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
        "nn.Conv2d(box_channels, 4, kernel_size=3, padding=1)",
        "nn.Conv2d(box_channels, 4, kernel_size=1)",
        {"head": "3x3"},
    ),
    # Greetings
    Mutant(
        "another greeting",
        "a4_helper",
        "Hello from a4_helper.py!",
        "Hello",
        {"hello": "hello_helper"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)
