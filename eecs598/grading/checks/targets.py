"""Checks of the training targets: matching, deltas, box decoding and centerness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eecs598.grad import rel_error
from eecs598.grading.checks import reference
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.result import CheckResult, call_snippet, expect, expect_close, show
from eecs598.grading.submission import Submission

__all__ = ["check_box_decoding", "check_centerness", "check_deltas", "check_matching"]

BACKGROUND = (-1.0,) * 5

# The boxes and locations of the assignment's cells.
CELL_BOXES = torch.tensor(
    [[10.0, 15, 100, 115, 1], [30, 20, 40, 30, 1], [120, 100, 200, 200, 1]],
)
CELL_LOCATIONS = torch.tensor([[30.0, 40], [32, 29], [125, 150]])


def check_matching(submission: Submission) -> CheckResult:
    """Check ``fcos_match_locations_to_gt`` on constructed cases and against its definition."""
    result = CheckResult("matching")
    box = (10.0, 10.0, 40.0, 40.0, 2.0)

    def wide(right: float) -> tuple[float, ...]:
        """Return a box whose farthest side is ``right`` pixels from the location (50, 50)."""
        return (40.0, 40.0, 50.0 + right, 60.0, 1.0)

    inner, outer = (15.0, 15.0, 35.0, 35.0, 0.0), (5.0, 5.0, 45.0, 45.0, 4.0)
    # For each label: level, location, boxes, index of the box that it matches.
    cases: dict[str, list[tuple[str, Sequence[float], list[Sequence[float]], int | None]]] = {
        "inside and outside": [
            ("p3", (20.0, 30.0), [box], 0),
            ("p3", (50.0, 30.0), [box], None),
            ("p3", (20.0, 5.0), [box], None),
        ],
        "a location on the side of a box is outside": [
            ("p3", (10.0, 20.0), [box], None),
            ("p3", (20.0, 40.0), [box], None),
        ],
        "the level's range of sizes": [
            ("p3", (50.0, 50.0), [wide(63)], 0),
            ("p4", (50.0, 50.0), [wide(63)], None),
            ("p3", (50.0, 50.0), [wide(65)], None),
            ("p4", (50.0, 50.0), [wide(65)], 0),
            ("p4", (50.0, 50.0), [wide(127)], 0),
            ("p5", (50.0, 50.0), [wide(127)], None),
            ("p4", (50.0, 50.0), [wide(129)], None),
            ("p5", (50.0, 50.0), [wide(129)], 0),
        ],
        "both ends of the range are open": [
            ("p3", (50.0, 50.0), [wide(64)], None),
            ("p4", (50.0, 50.0), [wide(64)], None),
            ("p4", (50.0, 50.0), [wide(128)], None),
            ("p5", (50.0, 50.0), [wide(128)], None),
        ],
        "no lower bound on p3, no upper bound on p5": [
            ("p3", (20.0, 20.0), [(19.0, 19.0, 21.0, 21.0, 0.0)], 0),
            ("p5", (50.0, 50.0), [wide(2000)], 0),
        ],
        "the smallest box wins": [
            ("p3", (20.0, 20.0), [inner, outer], 0),
            ("p3", (20.0, 20.0), [outer, inner], 1),
            ("p3", (12.0, 12.0), [inner, outer], 1),
        ],
        "a smaller box of another level does not count": [
            ("p4", (50.0, 50.0), [(45.0, 45.0, 55.0, 55.0, 3.0), wide(100)], 1),
        ],
        "padding matches nothing": [
            ("p3", (20.0, 20.0), [BACKGROUND, box, BACKGROUND], 1),
            ("p3", (4.0, 4.0), [BACKGROUND, BACKGROUND], None),
        ],
    }
    for label, group in cases.items():
        with result.probe(label):
            for level, point, candidates, index in group:
                _expect_match(submission, level, [point], candidates, [index])

    with result.probe("random boxes against the definition"):
        generator = torch.Generator().manual_seed(0)
        # 4 to 512 pixels; at halves, so that no location lies on a side.
        sizes = (2 ** (2 + 7 * torch.rand(12, 2, generator=generator))).round()
        corners = (300 * torch.rand(12, 2, generator=generator) - sizes / 4).round() + 0.5
        classes = torch.randint(20, (12, 1), generator=generator)
        rows = torch.cat([corners, corners + sizes, classes], dim=1).tolist()
        points = (8 * torch.randint(40, (60, 2), generator=generator) + 4.0).tolist()
        for level in STRIDES:
            matches = [reference.best_box(level, x, y, rows) for x, y in points]
            _expect_match(submission, level, points, rows, matches)

    with result.probe("input unchanged"):
        boxes = torch.tensor([box, BACKGROUND])
        before = boxes.clone()
        _match(submission, [(20.0, 20.0), (4.0, 4.0)], boxes)
        expect_close("gt_boxes after fcos_match_locations_to_gt", boxes, before)
    return result


def _match(
    submission: Submission, points: Sequence[Sequence[float]], boxes: Tensor
) -> dict[str, Tensor]:
    """Match the same locations on each level."""
    locations = {level: torch.tensor(points) for level in STRIDES}
    return submission.one_stage_detector.fcos_match_locations_to_gt(locations, STRIDES, boxes)


def _expect_match(
    submission: Submission,
    level: str,
    points: Sequence[Sequence[float]],
    boxes: Sequence[Sequence[float]],
    matches: Sequence[int | None],
) -> None:
    got = _match(submission, points, torch.tensor(boxes))[level]
    expected = [BACKGROUND if match is None else boxes[match] for match in matches]
    expect(
        isinstance(got, Tensor) and got.shape == (len(points), 5),
        f"{len(points)} locations on {level}: expected a tensor of shape ({len(points)}, 5), got "
        f"{show(got)}",
    )
    for point, got_box, expected_box in zip(points, got, expected, strict=True):
        # If there are many boxes, the sentence names those that contain the location.
        x, y = point
        near = [b for b in boxes if len(boxes) < 4 or min(reference.ltrb(x, y, b)) > 0]
        snippet = call_snippet(
            "one_stage_detector.fcos_match_locations_to_gt",
            {level: torch.tensor([point])},
            STRIDES,
            torch.tensor(near),
        )
        what = f"location {show(point)} on {level}, {len(near)} boxes"
        expect_close(what, got_box, expected_box, snippet=snippet)


def check_deltas(submission: Submission) -> CheckResult:
    """Check ``fcos_get_deltas_from_locations``: the assignment's cell, background, strides."""
    result = CheckResult("deltas")
    osd = submission.one_stage_detector

    with result.probe("left, top, right, bottom in strides"):
        for stride in (8, 32):
            for location, box in zip(CELL_LOCATIONS, CELL_BOXES, strict=True):
                got = osd.fcos_get_deltas_from_locations(location[None], box[None], stride=stride)
                x, y = location.tolist()
                expected = torch.tensor([reference.ltrb(x, y, box.tolist())]) / stride
                name = "one_stage_detector.fcos_get_deltas_from_locations"
                snippet = call_snippet(name, location[None], box[None], stride)
                expect_close(f"stride {stride}", got, expected, 1e-6, snippet)

    with result.probe("boxes without class id"):
        got = osd.fcos_get_deltas_from_locations(CELL_LOCATIONS, CELL_BOXES[:, :4], stride=8)
        expected = osd.fcos_get_deltas_from_locations(CELL_LOCATIONS, CELL_BOXES, stride=8)
        expect_close("boxes of shape (3, 4) instead of (3, 5)", got, expected, 1e-6)
        got = osd.fcos_get_deltas_from_locations(CELL_LOCATIONS, torch.full((3, 4), -1.0), stride=8)
        expect_close("background boxes of shape (3, 4)", got, [[-1.0] * 4] * 3)

    with result.probe("background deltas are -1"):
        location = torch.tensor([[100.0, 200.0]])
        got = osd.fcos_get_deltas_from_locations(location, torch.full((1, 5), -1.0), stride=8)
        expect_close("location [100, 200], box [-1, -1, -1, -1, -1]", got, [[-1.0] * 4])

    with result.probe("background among boxes"):
        boxes = CELL_BOXES.clone()
        boxes[1] = -1
        got = osd.fcos_get_deltas_from_locations(CELL_LOCATIONS, boxes, stride=8)
        alone = osd.fcos_get_deltas_from_locations(CELL_LOCATIONS[:1], boxes[:1], stride=8)
        expect_close("row 1 of three is background: deltas of row 1", got[1], [-1.0] * 4)
        expect_close("row 1 of three is background: deltas of row 0", got[0], alone[0], 1e-6)

    with result.probe("input unchanged"):
        boxes, locations = CELL_BOXES.clone(), CELL_LOCATIONS.clone()
        boxes[1] = -1
        before = boxes.clone()
        osd.fcos_get_deltas_from_locations(locations, boxes, stride=8)
        expect_close("gt_boxes after the call", boxes, before)
        expect_close("locations after the call", locations, CELL_LOCATIONS)
    return result


def check_box_decoding(submission: Submission) -> CheckResult:
    """Check ``fcos_apply_deltas_to_locations``: reconstruction, background, negative deltas."""
    result = CheckResult("box_decoding")
    osd = submission.one_stage_detector

    def decode(deltas: list[float], location: list[float], stride: int) -> Tensor:
        return osd.fcos_apply_deltas_to_locations(
            torch.tensor([deltas]), torch.tensor([location]), stride=stride
        )

    with result.probe("the assignment's boxes are reconstructed with relative error 0"):
        # From deltas that are exact in binary, whatever the submission's own deltas are.
        deltas = torch.cat(
            [CELL_LOCATIONS - CELL_BOXES[:, :2], CELL_BOXES[:, 2:4] - CELL_LOCATIONS], 1
        )
        boxes = osd.fcos_apply_deltas_to_locations(deltas / 8, CELL_LOCATIONS, stride=8)
        expect_close("deltas of the cell's boxes, stride 8", boxes, CELL_BOXES[:, :4])
        expect(rel_error(CELL_BOXES[:, :4], boxes) == 0, "expected relative error 0")

    with result.probe("deltas are in strides"):
        for stride in (8, 32):
            expected = [[100.0 - stride, 200 - 2 * stride, 100 + 3 * stride, 200 + 4 * stride]]
            got = decode([1.0, 2.0, 3.0, 4.0], [100.0, 200.0], stride)
            expect_close(f"deltas [1, 2, 3, 4] at [100, 200], stride {stride}", got, expected, 1e-6)

    with result.probe("the box of background is the location"):
        got = decode([-1.0] * 4, [100.0, 200.0], 8)
        expect_close("deltas [-1, -1, -1, -1] at [100, 200]", got, [[100.0, 200, 100, 200]])

    with result.probe("negative deltas count as 0"):
        got = decode([-0.5, 1.0, 2.0, -3.0], [100.0, 200.0], 8)
        what = "deltas [-0.5, 1, 2, -3] at [100, 200], stride 8"
        expect_close(what, got, [[100.0, 192, 116, 200]], 1e-6)

    with result.probe("input unchanged"):
        deltas, locations = torch.tensor([[-1.0, 2, -3, 4]]), torch.tensor([[100.0, 200]])
        osd.fcos_apply_deltas_to_locations(deltas, locations, stride=8)
        expect_close("deltas [-1, 2, -3, 4] after the call", deltas, [[-1.0, 2, -3, 4]])
        expect_close("location [100, 200] after the call", locations, [[100.0, 200]])
    return result


def check_centerness(submission: Submission) -> CheckResult:
    """Check ``fcos_make_centerness_targets``: the assignment's cell, background, the formula."""
    result = CheckResult("centerness")
    osd = submission.one_stage_detector

    with result.probe("the assignment's values to 1e-7"):
        deltas = torch.tensor([[2.5, 3.125, 8.75, 9.375], [0.25, 1.125, 1, 0.125], [-1] * 4])
        expected = torch.tensor([0.30860671401, 0.1666666716, -1.0])
        got = osd.fcos_make_centerness_targets(deltas)
        snippet = call_snippet("one_stage_detector.fcos_make_centerness_targets", deltas)
        expect_close("deltas of the cell", got, expected, 1e-6, snippet)
        error = rel_error(got, expected)
        expect(error < 1e-7, f"relative error of the cell: expected below 1e-7, got {error:.3g}")

    with result.probe("background is -1"):
        got = osd.fcos_make_centerness_targets(torch.full((2, 4), -1.0))
        expect_close("two rows of deltas [-1, -1, -1, -1]", got, [-1.0, -1.0])

    with result.probe("1 at the center, 0 on a side"):
        for row, target in (([3.0, 5.0, 3.0, 5.0], 1.0), ([0.0, 2.0, 3.0, 2.0], 0.0)):
            got = osd.fcos_make_centerness_targets(torch.tensor([row]))
            expect_close(f"deltas {show(row)}", got, [target], 1e-6)

    with result.probe("random deltas against the formula"):
        generator = torch.Generator().manual_seed(0)
        for row in (torch.randint(1, 41, (50, 4), generator=generator) / 4).tolist():
            got = osd.fcos_make_centerness_targets(torch.tensor([row]))
            expect_close(f"deltas {show(row)}", got, [reference.centerness(*row)], 1e-5)

    with result.probe("input unchanged"):
        deltas = torch.tensor([[1.0, 2, 3, 4], [-1, -1, -1, -1]])
        before = deltas.clone()
        osd.fcos_make_centerness_targets(deltas)
        expect_close("deltas after the call", deltas, before)
    return result
