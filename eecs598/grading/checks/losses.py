"""Checks of the training step: the losses against their formulas, and whether they fall.

So that the right losses are known, the network is replaced by a stub with given predictions, see
``eecs598.grading.checks.stubs``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eecs598.grading.answers import to_plain_data
from eecs598.grading.checks import reference
from eecs598.grading.checks.network import with_random_weights
from eecs598.grading.checks.stubs import Predictions, locations_of, stub_detector
from eecs598.grading.result import CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import OWN_GROUND, Settings, Submission, training

__all__ = [
    "BATCH_SIZE",
    "LOSSES",
    "SIDE",
    "LossCase",
    "Overfitted",
    "check_losses",
    "check_training",
    "make_boxes",
    "overfit",
    "run_loss_case",
]

LOSSES = ("loss_cls", "loss_box", "loss_ctr")

# Those of the assignment's training batches.
BATCH_SIZE, SIDE = 16, 224


class LossCase(NamedTuple):
    """A batch and the predictions for it.

    Attributes:
        description: for the sentence about a wrong loss.
        images: ``(B, 3, H, W)``.
        gt_boxes: ``(B, M, 5)``, padded with -1.
        uniform_rows: class logits, deltas and centerness logit of all locations; random unless
            given.
        snippet: the input in more words, as comments in Python.
    """

    description: str
    images: Tensor
    gt_boxes: Tensor
    uniform_rows: list[list[float]] | None = None
    snippet: str = ""

    def predictions(
        self, locations: Mapping[str, Tensor], num_classes: int = OWN_GROUND.num_classes
    ) -> Predictions:
        """Return class logits, deltas and centerness logits ``(B, N, C)`` per level."""
        generator = torch.Generator().manual_seed(0)
        shapes = {level: (len(self.images), len(points)) for level, points in locations.items()}
        if self.uniform_rows is None:
            return [
                {
                    level: torch.randn(*s, c, generator=generator).to(self.images.dtype)
                    for level, s in shapes.items()
                }
                for c in (num_classes, 4, 1)
            ]
        return [
            {level: torch.tensor(row).repeat(*s, 1) for level, s in shapes.items()}
            for row in self.uniform_rows
        ]


# A case that can be computed by hand: the location (12, 12) of p3 is the only one that its box
# matches.
ONE_LOCATION = LossCase(
    f"{BATCH_SIZE} images, one location of p3 is foreground in each",
    torch.zeros(BATCH_SIZE, 3, SIDE, SIDE),
    torch.tensor([[[9.0, 10, 18, 17, 2]]]).repeat(BATCH_SIZE, 1, 1),
    [[0.5 if n == 2 else -4.0 for n in range(20)], [1.0, 2.0, 3.0, 4.0], [0.5]],
    f"# {BATCH_SIZE} images of {SIDE} x {SIDE}, in each the box [9, 10, 18, 17] of class 2, which "
    "the location [12, 12] of p3 matches.\n"
    "# Predicted at each location: class logits -4, of class 2 0.5; deltas [1, 2, 3, 4]; "
    "centerness logit 0.5.",
)


def make_boxes(
    batch_size: int, height: int, width: int, num_classes: int = OWN_GROUND.num_classes
) -> Tensor:
    """Return boxes ``(B, 4, 5)`` of many sizes, padded with -1; each image has two at least.

    Their coordinates have fractions, so that no location lies on a side of a box or at the end of
    a level's range of sizes.
    """
    boxes = torch.full((batch_size, 4, 5), -1.0)
    for image in range(batch_size):
        shift = 1.3 * image
        rows = [
            (0.05 * width + shift, 0.11 * height, 0.52 * width, 0.61 * height - shift),
            (0.16 * width, 0.17 * height + shift, 0.45 * width + shift, 0.51 * height),
            (0.031 * width, 0.047 * height, 0.93 * width - shift, 0.94 * height - shift),
            (0.61 * width, 0.7 * height, 0.61 * width + 18, 0.7 * height + 17),
        ]
        for row, (x1, y1, x2, y2) in enumerate(rows[image % 3 :]):
            label = (7 * row + image) % num_classes
            corners = (round(value) + 0.3 for value in (x1, y1, x2, y2))
            boxes[image, row] = torch.tensor([*corners, label])
    return boxes


SEVERAL_BOXES = LossCase(
    f"{BATCH_SIZE} images with 2 to 4 boxes, random predictions",
    torch.zeros(BATCH_SIZE, 3, SIDE, SIDE),
    make_boxes(BATCH_SIZE, SIDE, SIDE),
)


class _LossSteps(NamedTuple):
    """Losses of training steps on given predictions.

    Attributes:
        got: the submission's losses of each step.
        expected: the right losses of each step.
        foreground: number of foreground locations per image.
        batch_size: number of images.
    """

    got: list[dict[str, Tensor]]
    expected: list[dict[str, float]]
    foreground: float
    batch_size: int

    @property
    def divisor(self) -> float:
        """The right divisor of the first step."""
        return self.batch_size * (0.9 * reference.FIRST_AVERAGE + 0.1 * self.foreground)

    def divisor_factor(self) -> float | None:
        """Return the factor by which at least two losses are wrong; None if no two agree.

        Such a common factor means that the divisor is wrong, not the losses.
        """
        got, expected = self.got[0], self.expected[0]
        ratios = sorted(
            float(got[name]) / expected[name] for name in LOSSES if name in got and expected[name]
        )
        agreeing = [a for a, b in pairwise(ratios) if a > 0 and math.isclose(a, b, rel_tol=1e-4)]
        return agreeing[0] if agreeing else None


def check_losses(submission: Submission) -> CheckResult:
    """Check ``FCOS`` in training mode: the formula of each loss, background, divisor."""
    result = CheckResult("losses")
    steps = once(lambda: run_loss_case(submission, SEVERAL_BOXES, num_steps=2))
    small_step = once(lambda: run_loss_case(submission, ONE_LOCATION, num_steps=1))

    with result.probe("a dict of three finite scalars"):
        losses = steps().got[0]
        expect(
            sorted(losses) == sorted(LOSSES),
            f"expected the keys {list(LOSSES)}, got {show(list(losses))}",
        )
        for name, value in losses.items():
            expect(
                isinstance(value, Tensor) and value.numel() == 1 and bool(value.isfinite()),
                f"{name}: expected a finite scalar, got {show(value)}",
            )

    for name, formula in (
        ("loss_cls", "sum of the focal loss (alpha 0.25, gamma 2) over all locations and classes"),
        ("loss_box", "sum of 0.25 * L1 of the deltas over foreground locations"),
        ("loss_ctr", "sum of the binary cross entropy over foreground locations"),
    ):
        with result.probe(f"{name} follows its formula"):
            for case, run in ((ONE_LOCATION, small_step()), (SEVERAL_BOXES, steps())):
                # The next probe tests the divisor, which is common to the losses.
                factor = run.divisor_factor() or 1.0
                expect(name in run.got[0], f"expected it among the losses, got {list(run.got[0])}")
                expected, loss = run.expected[0][name] * factor, float(run.got[0][name])
                expect(
                    math.isclose(loss, expected, rel_tol=1e-4),
                    f"{case.description}: expected {expected:.5g}, got {loss:.5g}, "
                    f"{loss / expected:.4g} times as much",
                    f"# {name} is the {formula},\n# here {expected * run.divisor / factor:.6g}, "
                    f"divided by {_divisor(run)}.\n{case.snippet}".rstrip(),
                )

    with result.probe("divided by images and the moving average of foreground"):
        common_factor = steps().divisor_factor()
        got = "losses off by different factors"
        if common_factor is not None:
            got = f"losses {common_factor:.4g} times as large"
        expect(
            common_factor is not None and abs(common_factor - 1) < 1e-4,
            f"first batch, {steps().foreground:g} foreground locations per image: expected sums "
            f"divided by {_divisor(steps())}, got {got}",
        )

    with result.probe("the moving average moves on"):
        first, second = (float(losses["loss_cls"]) for losses in steps().got)
        before, after = (losses["loss_cls"] for losses in steps().expected)
        expect(first > 0, f"the same batch once more: expected loss_cls above 0, got {first:g}")
        expect(
            math.isclose(second / first, after / before, rel_tol=1e-4),
            f"the same batch once more: expected losses {after / before:.4g} times those before, "
            f"got {second / first:.4g} times",
            "# moving average = 0.9 * moving average + 0.1 * foreground locations per image",
        )

    with result.probe("no box and centerness loss from background"):
        padding = SEVERAL_BOXES._replace(gt_boxes=torch.full_like(SEVERAL_BOXES.gt_boxes, -1.0))
        run = run_loss_case(submission, padding, num_steps=1)
        for name in ("loss_box", "loss_ctr"):
            loss = float(run.got[0][name])
            expect(loss == 0, f"images without boxes: expected {name} 0, got {show(loss)}")

    with result.probe("one image without boxes among others"):
        mixed = SEVERAL_BOXES.gt_boxes.clone()
        mixed[1] = -1
        run = run_loss_case(submission, SEVERAL_BOXES._replace(gt_boxes=mixed), num_steps=1)
        for name in LOSSES:
            loss = float(run.got[0][name])
            expect(
                math.isfinite(loss) and loss > 0,
                f"second image of {BATCH_SIZE} without boxes: expected a finite {name} above 0, "
                f"got {show(loss)}",
            )

    with result.probe("input unchanged"):
        locations = locations_of(submission, SEVERAL_BOXES.images)
        detector = training(stub_detector(submission, SEVERAL_BOXES.predictions(locations)))
        images, gt_boxes = torch.randn_like(SEVERAL_BOXES.images), SEVERAL_BOXES.gt_boxes.clone()
        images_before = images.clone()
        detector(images, gt_boxes)
        expect_close("images after a training step", images, images_before)
        expect_close("gt_boxes after a training step", gt_boxes, SEVERAL_BOXES.gt_boxes)
    return result


def _divisor(run: _LossSteps) -> str:
    return f"{run.batch_size} * (0.9 * 150 + 0.1 * {run.foreground:g})"


def run_loss_case(
    submission: Submission, case: LossCase, num_steps: int, settings: Settings = OWN_GROUND
) -> _LossSteps:
    """Compute the submission's losses and the right ones for the same batch, step after step."""
    locations = locations_of(submission, case.images)
    predictions = case.predictions(locations, settings.num_classes)
    sums, foreground = reference.sums_of_losses(locations, predictions, case.gt_boxes)
    detector = training(stub_detector(submission, predictions, settings))

    got: list[dict[str, Tensor]] = []
    expected: list[dict[str, float]] = []
    average = reference.FIRST_AVERAGE
    for _ in range(num_steps):
        losses = to_plain_data(detector(case.images.clone(), case.gt_boxes.clone()))
        expect(isinstance(losses, dict), f"expected a dict of losses, got {show(losses)}")
        got.append(losses)
        average = 0.9 * average + 0.1 * foreground
        expected.append({name: s / (len(case.images) * average) for name, s in sums.items()})
    return _LossSteps(got, expected, foreground, len(case.images))


class Overfitted(NamedTuple):
    """The result of a few training steps on one batch.

    Attributes:
        trained: losses with the weights after the steps.
        untrained: losses with the weights before the steps.
        gradients: those of the first step, by name of the parameter.
        steps: what was done, in words.
    """

    trained: dict[str, float]
    untrained: dict[str, float]
    gradients: dict[str, Tensor | None]
    steps: str


def check_training(submission: Submission) -> CheckResult:
    """Check that a few optimizer steps on one batch reduce the losses."""
    result = CheckResult("training")

    @once
    def overfitted() -> Overfitted:
        try:
            return overfit(submission, 2, 64, num_steps=10)
        except Exception:
            # With fixed sizes it may work on the assignment's batches only, which take longer.
            return overfit(submission, BATCH_SIZE, SIDE, num_steps=8)

    def expect_fall(got: float, untrained: float, what: str) -> None:
        steps = overfitted().steps
        expect(got >= 0, f"{steps}: expected {what} not to be negative, got {got:.4g}")
        expect(
            got < 0.95 * untrained,
            f"{steps}: expected {what} to fall below 95 % of {untrained:.4g}, got {got:.4g}",
        )

    with result.probe("the sum of the losses falls on one batch"):
        run = overfitted()
        expect_fall(sum(run.trained.values()), sum(run.untrained.values()), "the sum of the losses")

    for name in ("loss_cls", "loss_box"):  # loss_ctr can't fall below the entropy of its targets
        with result.probe(f"{name} falls on one batch"):
            run = overfitted()
            expect_fall(run.trained[name], run.untrained[name], name)

    with result.probe("gradients reach pyramid, head and backbone"):
        backbone_has_some = False
        for name, gradient in overfitted().gradients.items():
            reached = gradient is not None and bool(gradient.isfinite().all())
            if "fpn_params" in name or name.startswith("pred_net"):
                got = "none" if gradient is None else "NaN or infinity"
                expect(
                    reached, f"one training step: expected a finite gradient of {name}, got {got}"
                )
            else:  # layers may be frozen, or unused parts of the classification network
                backbone_has_some |= reached
        expect(
            backbone_has_some,
            "one step: expected gradients of the backbone, got none",
        )
    return result


def overfit(submission: Submission, batch_size: int, side: int, num_steps: int) -> Overfitted:
    """Train the detector on one batch of square images for a few steps."""
    images = torch.randn(batch_size, 3, side, side)
    gt_boxes = make_boxes(batch_size, side, side)
    detector: Any = training(submission.detector())
    # The head's initial weights of 0.01 would take a hundred steps to grow.
    with_random_weights(detector.pred_net.stem_cls)
    with_random_weights(detector.pred_net.stem_box)
    before = [parameter.detach().clone() for parameter in detector.parameters()]
    gradients = {}
    # With a higher rate, and batch norm over few values, the losses of right work may rise.
    optimizer = torch.optim.Adam(detector.parameters(), lr=5e-4)
    for step in range(num_steps):
        optimizer.zero_grad()
        sum(to_plain_data(detector(images, gt_boxes)).values()).backward()
        if step == 0:
            gradients = {
                name: None if parameter.grad is None else to_plain_data(parameter.grad).clone()
                for name, parameter in detector.named_parameters()
            }
        optimizer.step()
    # The divisor falls from 150 to the foreground of this batch, so the losses may rise even
    # if the detector learns. So the losses of the weights before are computed now, too, and
    # first, because the later of two calls has the lower divisor.
    after = [parameter.detach().clone() for parameter in detector.parameters()]
    untrained, trained = (
        _losses_with(detector, weights, images, gt_boxes) for weights in (before, after)
    )
    steps = f"{num_steps} steps of Adam on one batch of {batch_size} images"
    return Overfitted(trained, untrained, gradients, steps)


@torch.no_grad()
def _losses_with(
    detector: nn.Module, weights: Sequence[Tensor], images: Tensor, gt_boxes: Tensor
) -> dict[str, float]:
    """Load weights into a detector and return its losses."""
    for parameter, values in zip(detector.parameters(), weights, strict=True):
        parameter.copy_(values)
    return {name: float(loss) for name, loss in to_plain_data(detector(images, gt_boxes)).items()}
