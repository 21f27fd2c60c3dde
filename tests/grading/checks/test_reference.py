"""The slow definitions that checks compare with agree with torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from eecs598.grading.checks.reference import sums_of_losses


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
