"""Location n and prediction n are the same place: proved by behavior, not by shapes.

With another order the two are mirror images of each other across the diagonal of the feature map.
Training still converges and mAP halves, so nothing but a test like this one tells.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import get_fpn_location_coords
from eecs598.metrics.average_precision import average_precision
from one_stage_detector import FCOS


def weighted_centers(detector: FCOS, height: int, width: int, per_level: int):
    """For some locations of each level: the location, and where the image's gradient lies.

    Near the border the image cuts the receptive field, over 300 px wide at p5, on one side, and
    what is left has its center elsewhere; so locations closer than 40 px to it are left out.
    """
    images = torch.rand(1, 3, height, width, requires_grad=True)
    feats = detector.backbone(images)
    predictions = detector.pred_net(feats)
    locations = get_fpn_location_coords(
        {level: feat.shape for level, feat in feats.items()}, detector.backbone.fpn_strides
    )
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for level, points in locations.items():
        to_border = torch.minimum(points, torch.tensor([width, height]) - points).amin(1)
        inner = (to_border >= 40).nonzero().flatten()
        for n in inner[torch.linspace(0, len(inner) - 1, per_level).long()].tolist():
            output = sum(prediction[level][0, n].sum() for prediction in predictions)
            (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
            # Squared, because a deep network has a faint gradient everywhere.
            weight = gradient.square().sum(dim=(0, 1))
            weight = weight / weight.sum()
            center = torch.stack([(weight * x).sum(), (weight * y).sum()])
            yield level, points[n], center


@pytest.mark.parametrize("height, width", [(160, 352), (352, 160)])
def test_the_gradient_of_a_prediction_lies_around_its_location(height, width):
    torch.manual_seed(0)
    detector = FCOS(4, 16, [16], weights=None).eval()
    compared = 0
    for level, location, center in weighted_centers(detector, height, width, per_level=12):
        distance = (center - location).norm()
        assert distance < 64, (level, location, center)
        # Where a row-major reader would put prediction n: on a square map, the mirror image.
        stride = detector.backbone.fpn_strides[level]
        rows, columns = height // stride, width // stride
        column, row = (location / stride).long().tolist()
        n = column * rows + row
        row_major = torch.tensor([n % columns + 0.5, n // columns + 0.5]) * stride
        for other in (row_major, location.flip(0)):
            if (other - location).norm() > 2 * stride:
                compared += 1
                assert distance < (center - other).norm(), (level, location, center, other)
    assert compared > 30


def corner_image(rng: torch.Generator, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright square near the top right or the bottom left corner, never in both."""
    size, margin = (
        int(torch.randint(low, high, (), generator=rng)) for low, high in ((20, 32), (0, 8))
    )
    far = side - size - margin
    x, y = (far, margin) if torch.rand((), generator=rng) < 0.5 else (margin, far)
    image = 0.2 * torch.randn(3, side, side, generator=rng)
    image[:, y : y + size, x : x + size] += 1.5
    return image, torch.tensor([[x, y, x + size, y + size, 0]], dtype=torch.float32)


class SmallStages(nn.Sequential):
    """Three stages of stride 8, 16 and 32 that learn in seconds."""

    def __init__(self) -> None:
        def stage(i: int, o: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(i, o, 2 * stride - 1, stride, stride - 1)
            return nn.Sequential(convolution, nn.BatchNorm2d(o), nn.ReLU())

        c3 = nn.Sequential(stage(3, 16, 2), stage(16, 24, 2), stage(24, 32, 2))
        super().__init__(c3, stage(32, 32, 2), stage(32, 32, 2))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        c3 = self[0](images)
        c4 = self[1](c3)
        return {"c3": c3, "c4": c4, "c5": self[2](c4)}


def test_a_trained_detector_finds_objects_that_lie_only_off_the_diagonal(monkeypatch):
    monkeypatch.setattr("common._build_backbone", lambda *_: SmallStages())
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    side = 96
    detector = FCOS(1, 32, [32], weights=None).train()
    solver = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    for _ in range(150):
        images, boxes = zip(*(corner_image(rng, side) for _ in range(8)), strict=True)
        loss = sum(detector(torch.stack(images), torch.stack(boxes)).values())
        solver.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        solver.step()

    detector.eval()
    images, boxes = zip(*(corner_image(rng, side) for _ in range(40)), strict=True)
    predictions = detector.predict(torch.stack(images), 0.05, 0.6)
    targets = [{"boxes": b[:, :4], "labels": b[:, 4].long()} for b in boxes]
    mirrored = [{"boxes": b[:, [1, 0, 3, 2]], "labels": b[:, 4].long()} for b in boxes]
    assert average_precision(predictions, targets, ["square"])["mAP"] > 0.5
    assert average_precision(predictions, mirrored, ["square"])["mAP"] < 0.1
