"""Check that nothing depends on the assignment's own sizes, number of classes or data type.

Each line changes one of them. What fails with the assignment's own already has cost its points
there, and is not asked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eecs598.grading.answers import to_plain_data
from eecs598.grading.checks.detector import HUGE, THREE_APART, make_inference_case, three_results
from eecs598.grading.checks.losses import BATCH_SIZE, LOSSES, SIDE, LossCase, make_boxes
from eecs598.grading.checks.losses import run_loss_case as run_losses
from eecs598.grading.checks.network import convolutions
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.checks.stubs import map_shapes
from eecs598.grading.result import (
    CheckFailure,
    CheckResult,
    call_snippet,
    expect,
    expect_close,
    show,
)
from eecs598.grading.submission import (
    OWN_GROUND,
    Settings,
    Submission,
    build,
    evaluating,
    training,
)

__all__ = ["Ground", "ask_locations", "check_other_sizes"]


class Ground(NamedTuple):
    """What a question is asked with.

    Attributes:
        batch_size: number of images.
        height: of the images.
        width: of the images.
        settings: of the detector.
        dtype: of images, boxes and network.
    """

    batch_size: int
    height: int
    width: int
    settings: Settings = OWN_GROUND
    dtype: torch.dtype = torch.float32

    @property
    def words(self) -> str:
        """The ground in words."""
        return f"{self.batch_size} images of {self.height} x {self.width}"


SMALL = Ground(2, 64, 64)
NOTEBOOK = Ground(BATCH_SIZE, SIDE, SIDE)

# What each line changes.
LINES: dict[str, Callable[[Ground], Ground]] = {
    "square images of another size, another batch size": lambda g: Ground(3, 96, 96),
    "images that are not square": lambda g: g._replace(width=g.width + 96),
    "images whose sides 32 does not divide": lambda g: g._replace(
        height=g.height + 9, width=g.width + 9
    ),
    "another number of classes": lambda g: g._replace(settings=Settings(num_classes=3)),
    "other channels, a longer stem": lambda g: g._replace(
        settings=Settings(fpn_channels=24, stem_channels=(48, 40, 32))
    ),
    "float64": lambda g: g._replace(dtype=torch.float64),
}

Question = Callable[[Submission, Ground], None]


def check_other_sizes(submission: Submission) -> CheckResult:
    """Check other images, classes, channels and data types than the assignment's, one at a time."""
    result = CheckResult("other_sizes")
    grounds: dict[Question, Ground | None] = {}
    reasons: dict[Question, str] = {}

    def own_ground(question: Question) -> Ground | None:
        """Return the smallest of the assignment's grounds with a right answer; None if none has."""
        if question not in grounds:
            grounds[question] = None
            # Those with stubs take no time, so they have to be right on both.
            order = (NOTEBOOK, SMALL) if question in WITH_STUBS else (SMALL, NOTEBOOK)
            for ground in order:
                try:
                    question(submission, ground)
                except Exception as error:
                    reasons[question] = " ".join(f"{error}".split())
                    if question in WITH_STUBS:
                        break
                else:
                    grounds[question] = ground
                    if question not in WITH_STUBS:
                        break
        return grounds[question]

    for label, change in LINES.items():
        with result.probe(label):
            if not any(own_ground(question) for question in WHOLE):
                raise CheckFailure(
                    f"the detector fails on images of {SIDE} x {SIDE}, too: {reasons[WHOLE[0]]}"
                )
            for question in (ask_locations, _ask_head, *WITH_STUBS, *WHOLE):
                if (ground := own_ground(question)) is not None:
                    question(submission, change(ground))
            if label == "float64":
                _ask_precision(submission)
    return result


# --------------------------------------------------------------------------------------------
# Questions
# --------------------------------------------------------------------------------------------


def ask_locations(submission: Submission, ground: Ground) -> None:
    """Expect the right locations, in any order, or raise ``CheckFailure``."""
    images = (ground.batch_size, 3, ground.height, ground.width)
    shapes = map_shapes(images, ground.settings.fpn_channels)
    options: dict[str, Any] = {} if ground.dtype == torch.float32 else {"dtype": ground.dtype}
    got = submission.common.get_fpn_location_coords(shapes, STRIDES, **options)
    snippet = call_snippet("common.get_fpn_location_coords", shapes, STRIDES, **options)
    for level, stride in STRIDES.items():
        *_, height, width = shapes[level]
        name = f"get_fpn_location_coords, {level} with H={height}, W={width}"
        expect(
            isinstance(got[level], Tensor) and got[level].shape == (height * width, 2),
            f"{name}: expected shape {(height * width, 2)}, got {show(got[level])}",
            snippet,
        )
        points = {tuple(row) for row in got[level].tolist()}
        rows, columns = range(height), range(width)
        centers = {(stride * (j + 0.5), stride * (i + 0.5)) for i in rows for j in columns}
        if points != centers:
            missing, extra = sorted(centers - points), sorted(points - centers)
            raise CheckFailure(
                f"{name}: expected location {show(missing[0] if missing else None)}, which is "
                f"missing, got {show(extra[0] if extra else None)}, which does not exist",
                snippet,
            )
        kind = got[level].dtype
        expect(kind == ground.dtype, f"{name}: expected {ground.dtype}, got {kind}", snippet)


def _ask_head(submission: Submission, ground: Ground) -> None:
    num_classes, in_channels, stem = ground.settings
    model: Any = build(
        submission.one_stage_detector.FCOSPredictionNetwork,
        num_classes=num_classes,
        in_channels=in_channels,
        stem_channels=list(stem),
    ).to(ground.dtype)
    name = f"FCOSPredictionNetwork({num_classes}, {in_channels}, {list(stem)})"
    chain = list(zip((in_channels, *stem), stem, strict=False))
    for part, sizes in (
        ("stem_cls", chain),
        ("stem_box", chain),
        ("pred_cls", [(stem[-1], num_classes)]),
        ("pred_box", [(stem[-1], 4)]),
        ("pred_ctr", [(stem[-1], 1)]),
    ):
        layers = convolutions(getattr(model, part))
        channels = to_plain_data([(conv.in_channels, conv.out_channels) for conv in layers])
        expect(channels == sizes, f"{name}.{part}: expected channels {sizes}, got {channels}")


def _ask_losses(submission: Submission, ground: Ground) -> None:
    batch_size, height, width, settings, dtype = ground
    images = torch.zeros(batch_size, 3, height, width, dtype=dtype)
    boxes = make_boxes(batch_size, height, width, settings.num_classes).to(dtype)
    case = LossCase(ground.words, images, boxes)
    run = run_losses(submission, case, num_steps=1, settings=settings)
    for name in LOSSES:
        loss, expected = float(run.got[0][name]), run.expected[0][name]
        expect(
            math.isclose(loss, expected, rel_tol=1e-4),
            f"{name} of {ground.words}, {settings.num_classes} classes, random predictions: "
            f"expected {expected:.5g}, got {loss:.5g}",
        )


def _ask_inference(submission: Submission, ground: Ground) -> None:
    if ground.settings != OWN_GROUND or ground.dtype != torch.float32:
        return  # the stub that this uses knows no others
    scale = 1 if ground.height >= SIDE else 2  # as THREE_APART needs
    size = (scale * ground.height, scale * ground.width)
    case = make_inference_case(submission, THREE_APART, size)
    boxes, _, scores = case.detect()
    what = f"detections in an image of {size[0]} x {size[1]}: number of boxes"
    expect(len(boxes) == 3, f"{what}: expected 3, got {len(boxes)}")
    by_score = boxes[scores.argsort(descending=True)]
    expect_close(f"detected boxes in an image of {size[0]} x {size[1]}", by_score, case.boxes, 1e-3)
    boxes, _, _ = make_inference_case(submission, [HUGE], size).detect()
    what = f"a box that surrounds an image of height {size[0]} and width {size[1]}"
    expect_close(what, boxes, [[0.0, 0, size[1], size[0]]])


def _ask_training(submission: Submission, ground: Ground) -> None:
    """Run the detector with its own network in training mode."""
    batch_size, height, width, settings, dtype = ground
    detector = _detector(submission, ground)
    images = torch.randn(batch_size, 3, height, width, dtype=dtype)
    gt_boxes = make_boxes(batch_size, height, width, settings.num_classes).to(dtype)
    with torch.no_grad():
        _expect_shapes(detector, images[:1], settings)
        losses = to_plain_data(training(detector)(images, gt_boxes))
    loss = sum(losses.values())
    expect(
        bool(loss.isfinite()),
        f"{ground.words} of {dtype}: expected a finite loss, got {show(loss)}",
    )


def _ask_detection(submission: Submission, ground: Ground) -> None:
    """Run the detector with its own network in evaluation mode."""
    detector = _detector(submission, ground)
    images = torch.randn(1, 3, ground.height, ground.width, dtype=ground.dtype)
    with torch.no_grad():
        found = evaluating(detector)(images, test_score_thresh=0.0, test_nms_thresh=0.5)
    boxes, classes, scores = three_results(to_plain_data(found))
    what = f"an image of {ground.height} x {ground.width} of {ground.dtype}, score threshold 0"
    expect(
        len(boxes) == len(classes) == len(scores) > 0,
        f"{what}: expected detections, got {len(boxes)} boxes and {len(scores)} scores",
    )
    expect(
        bool(boxes.isfinite().all() and scores.isfinite().all()),
        f"{what}: expected finite boxes and scores, got NaN or infinity",
    )


def _detector(submission: Submission, ground: Ground) -> Any:
    detector = submission.detector(ground.settings)
    return detector if ground.dtype == torch.float32 else detector.to(ground.dtype)


def _expect_shapes(detector: nn.Module, images: Tensor, settings: Settings) -> None:
    """Expect feature maps of the right shapes from the backbone of a detector."""
    backbone: Any = getattr(detector, "backbone", None)
    if not isinstance(backbone, nn.Module):
        return
    levels = to_plain_data(evaluating(backbone)(images))
    for level, shape in map_shapes(images.shape, settings.fpn_channels).items():
        got = tuple(levels[level].shape)
        what = f"backbone, {level} of an image {tuple(images.shape)}"
        expect(got == shape, f"{what}: expected {shape}, got {got}")


def _ask_precision(submission: Submission) -> None:
    """Expect targets and boxes to differ for inputs that differ in float64, but not in float32."""
    osd = submission.one_stage_detector
    location = torch.tensor([[12.0, 20.0]], dtype=torch.float64)
    step = 2**-30
    boxes, deltas = (
        [torch.tensor([[*row]], dtype=torch.float64) for row in rows]
        for rows in (
            ((10.0, 10.0, 20.0, 37.0, 1.0), (10.0, 10.0, 20.0, 37.0 + step, 1.0)),
            ((0.25, 1.25, 1.0, 2.125), (0.25 + step, 1.25, 1.0, 2.125)),
        )
    )
    name = "fcos_get_deltas_from_locations"
    _expect_two(name, "box", boxes, lambda x: osd.fcos_get_deltas_from_locations(location, x, 8))
    name = "fcos_apply_deltas_to_locations"
    _expect_two(
        name, "deltas", deltas, lambda x: osd.fcos_apply_deltas_to_locations(x, location, 8)
    )
    name = "fcos_make_centerness_targets"
    _expect_two(name, "deltas", deltas, osd.fcos_make_centerness_targets)


def _expect_two(
    name: str, what: str, inputs: list[Tensor], function: Callable[[Tensor], Tensor]
) -> None:
    one, other = (function(x) for x in inputs)
    expect(isinstance(one, Tensor), f"{name}: expected a tensor, got {show(one)}")
    expect(
        not torch.equal(one, other),
        f"{name} of {what} {show(inputs[0][0])} and {2**-30:.2g} more in float64: expected "
        f"different values, got twice {show(one)} of {one.dtype}",
    )


WITH_STUBS: tuple[Question, ...] = (_ask_losses, _ask_inference)
WHOLE: tuple[Question, ...] = (_ask_training, _ask_detection)
