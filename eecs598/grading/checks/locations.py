"""Checks of the locations: their coordinates, and whether predictions have the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecs598.grad import rel_error
from eecs598.grading.answers import to_plain_data
from eecs598.grading.checks.network import convolutions
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.result import CheckFailure, CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import Submission, build, evaluating

__all__ = [
    "ORDER_ADVICE",
    "check_location_coords",
    "check_location_order",
    "expect_local_gradients",
    "expect_responses_in_place",
    "find_cell",
]

ORDER_ADVICE = "Flatten the head's maps in the order of get_fpn_location_coords"


def check_location_coords(submission: Submission) -> CheckResult:
    """Check ``get_fpn_location_coords`` on the assignment's maps."""
    result = CheckResult("location_coords")

    def coords(level: str, height: int, width: int) -> Tensor:
        # Always all three levels, because a submission may refer to them by name.
        shapes = {name: (2, 64, height, width) for name in STRIDES}
        return submission.common.get_fpn_location_coords(shapes, STRIDES)[level]

    with result.probe("first five of each level, relative error 0"):
        for level, stride in STRIDES.items():
            side = 224 // stride
            expected = torch.tensor([[stride / 2, stride * (n + 0.5)] for n in range(5)])
            got = coords(level, side, side)
            shape = (side * side, 2)
            expect(
                tuple(got.shape) == shape,
                f"{level} of shape (2, 64, {side}, {side}): expected {shape}, got {show(got)}",
            )
            expect_close(f"first five of {level}, stride {stride}", got[:5], expected)
            expect(rel_error(expected, got[:5]) == 0, f"{level}: expected relative error 0")

    with result.probe("all of them, at half strides in both directions"):
        for level, stride in STRIDES.items():
            side = 224 // stride
            points = {tuple(row) for row in coords(level, side, side).tolist()}
            steps = [stride * (n + 0.5) for n in range(side)]
            missing = sorted({(x, y) for x in steps for y in steps} - points)
            expect(
                not missing,
                f"{level} of shape (2, 64, {side}, {side}), stride {stride}: expected a location "
                f"{show(missing[0]) if missing else None}, got none there",
            )

    with result.probe("each location once"):
        got = coords("p3", 28, 28)
        different = len({tuple(row) for row in got.tolist()})
        expect(
            len(got) == different == 784,
            f"H=28, W=28: expected 784 different locations, got {different} among {len(got)}",
        )

    with result.probe("float32 unless told otherwise"):
        kind = coords("p3", 28, 28).dtype
        expect(kind == torch.float32, f"no dtype given: expected torch.float32, got {kind}")
    return result


def _cells(locations: Tensor) -> Tensor:
    """Return row and column ``(N, 2)`` of each location, from the rank of its coordinates.

    The rank is used so that only the order is tested: coordinates that are off by half a stride
    still give the right cell.
    """
    columns = locations[:, 0].unique(return_inverse=True)[1]
    rows = locations[:, 1].unique(return_inverse=True)[1]
    return torch.stack([rows, columns], dim=1)


def find_cell(locations: Tensor, row: int, column: int) -> int:
    """Return the index of the location of a cell.

    Args:
        locations: ``(N, 2)``, of one level.
        row: of the feature map.
        column: of the feature map.

    Raises:
        CheckFailure: no location, or more than one, belongs to that cell.
    """
    found = (_cells(locations) == torch.tensor([row, column])).all(dim=1).nonzero()
    if len(found) != 1:
        raise CheckFailure(
            f"get_fpn_location_coords: expected one location at row {row}, column {column} of a "
            f"map, got {len(found)}"
        )
    return int(found[0])


def check_location_order(submission: Submission) -> CheckResult:
    """Check that prediction n belongs to location n; the order itself is free.

    The head flattens its maps and ``get_fpn_location_coords`` lists the locations. If one goes row
    by row and the other column by column, each location is paired with the prediction of another
    place. Such a detector trains, and reaches about half of the accuracy.
    """
    result = CheckResult("location_order")

    for height, width in ((3, 5), (5, 3), (4, 4)):
        with result.probe(f"a feature at one cell of a {height} x {width} map"):
            expect_responses_in_place(submission, height, width)

    detector = once(submission.detector)
    for height, width in ((64, 224), (224, 64)):
        with result.probe(f"image gradients of predictions, image {height} x {width}"):
            expect_local_gradients(submission, evaluating(detector()), height, width)
    return result


@torch.no_grad()
def expect_responses_in_place(submission: Submission, height: int, width: int) -> None:
    """Expect a feature at one cell to change the prediction that belongs to the cell's location.

    Raises:
        CheckFailure: another prediction changes most.
    """
    model = build(
        submission.one_stage_detector.FCOSPredictionNetwork,
        num_classes=2,
        in_channels=1,
        stem_channels=[2],
    )
    evaluating(model)
    for conv in convolutions(model):
        # Only the center of each kernel, so that a cell does not affect its neighbors.
        middle = conv.kernel_size[0] // 2
        conv.weight.zero_()
        conv.weight[:, :, middle, middle] = 1.0
    shapes = {level: (1, 1, height, width) for level in STRIDES}
    locations = submission.common.get_fpn_location_coords(shapes, STRIDES)["p3"]
    feats = torch.eye(height * width).view(-1, 1, height, width)  # one cell per image
    silent, responses = (
        to_plain_data(model({level: maps for level in STRIDES}))
        for maps in (torch.zeros_like(feats), feats)
    )
    for name, before, after in zip(
        ("class logits", "deltas", "centerness logits"), silent, responses, strict=True
    ):
        strongest = (after["p3"] - before["p3"]).abs().sum(dim=-1).argmax(dim=1)
        for cell, got in enumerate(strongest.tolist()):
            row, column = divmod(cell, width)
            expected = find_cell(locations, row, column)
            expect(
                got == expected,
                f"feature at row {row}, column {column} (H={height}, W={width}): expected its "
                f"{name} at index {expected}, that of its location {show(locations[expected])}, "
                f"got index {got}. {ORDER_ADVICE}",
            )


def expect_local_gradients(submission: Submission, detector: Any, height: int, width: int) -> None:
    """Expect the image gradient of a prediction to lie around its location, on every level.

    Raises:
        CheckFailure: it is nearer to the location that the other order would give.
    """
    images = torch.randn(1, 3, height, width, requires_grad=True)
    feats = to_plain_data(detector.backbone(images))
    predictions = to_plain_data(detector.pred_net(feats))
    all_locations = submission.common.get_fpn_location_coords(
        {level: feat.shape for level, feat in feats.items()},
        to_plain_data(detector.backbone.fpn_strides),
    )
    for level, locations in all_locations.items():
        elsewhere = _in_the_other_order(locations)
        apart = (locations - elsewhere).norm(dim=1)
        n = int(apart.argmax())
        total = sum(values[level][0, n].sum() for values in predictions)
        (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
        x, y = _center(gradient[0])
        center = torch.tensor([x, y])
        near, far = (center - locations[n]).norm(), (center - elsewhere[n]).norm()
        expect(
            bool(near < far),
            f"{level}, prediction {n}: expected it to depend on the image around its location "
            f"{show(locations[n])}, got a gradient centered at ({x:.0f}, {y:.0f}), nearer to "
            f"{show(elsewhere[n])}. {ORDER_ADVICE}",
        )


def _center(gradient: Tensor) -> tuple[float, float]:
    """Return the center (x, y) of an image gradient (3, H, W), weighted by its square."""
    weights = gradient.double().square().sum(dim=0)
    expect(bool(weights.sum() > 0), "expected an image gradient, got 0 everywhere")
    weights /= weights.sum()
    height, width = weights.shape
    x = (weights.sum(dim=0) * (torch.arange(width) + 0.5)).sum().item()
    y = (weights.sum(dim=1) * (torch.arange(height) + 0.5)).sum().item()
    return x, y


def _in_the_other_order(locations: Tensor) -> Tensor:
    """Return the locations (N, 2) in the other order: row by row, or column by column."""
    rows, columns = _cells(locations).unbind(dim=1)
    num_rows, num_columns = int(rows.max()) + 1, int(columns.max()) + 1
    by_columns = locations[(columns * num_rows + rows).argsort()]
    by_rows = locations[(rows * num_columns + columns).argsort()]
    return by_rows if torch.equal(locations, by_columns) else by_columns
