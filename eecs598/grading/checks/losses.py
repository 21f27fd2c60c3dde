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
from eecs598.grading.submission import NUM_CLASSES, Submission, training

__all__ = ["SEVERAL_BOXES", "LossCase", "check_losses", "check_training"]

LOSSES = ("loss_cls", "loss_box", "loss_ctr")


class LossCase(NamedTuple):
    """A batch and the predictions for it.

    Attributes:
        description: for the sentence about a wrong loss.
        images: ``(B, 3, H, W)``.
        gt_boxes: ``(B, M, 5)``, padded with -1.
        uniform_rows: class logits, deltas and centerness logit of all locations; random unless
            given.
    """

    description: str
    images: Tensor
    gt_boxes: Tensor
    uniform_rows: list[list[float]] | None = None

    def predictions(self, locations: Mapping[str, Tensor]) -> Predictions:
        """Return class logits, deltas and centerness logits ``(B, N, C)`` per level."""
        generator = torch.Generator().manual_seed(0)
        shapes = {level: (len(self.images), len(points)) for level, points in locations.items()}
        if self.uniform_rows is None:
            return [
                {level: torch.randn(*s, c, generator=generator) for level, s in shapes.items()}
                for c in (NUM_CLASSES, 4, 1)
            ]
        return [
            {level: torch.tensor(row).repeat(*s, 1) for level, s in shapes.items()}
            for row in self.uniform_rows
        ]


# A case that can be computed by hand: the location (12, 12) of p3 is the only one that its box
# matches.
ONE_LOCATION = LossCase(
    "an image of 64 x 64, the box [9, 10, 18, 17] of class 2, which the location [12, 12] of p3 "
    "matches; predicted everywhere: class logits [0.5, 0, -0.5], deltas [1, 2, 3, 4], centerness "
    "logit 0.5",
    torch.zeros(1, 3, 64, 64),
    torch.tensor([[[9.0, 10, 18, 17, 2]]]),
    [[0.5, 0.0, -0.5], [1.0, 2.0, 3.0, 4.0], [0.5]],
)
# Fractional coordinates, so that no location lies on a side of a box or at the end of a level's
# range of sizes.
SEVERAL_BOXES = LossCase(
    "2 images of 64 x 192 with 3 boxes and 1 box, random predictions",
    torch.zeros(2, 3, 64, 192),
    torch.tensor(
        [
            [[10.3, 8.7, 45.2, 37.9, 0], [14.6, 11.1, 33.4, 30.3, 2], [2.1, 3.3, 94.6, 60.2, 1]],
            [[1.7, 2.4, 188.9, 61.3, 2], [-1] * 5, [-1] * 5],
        ]
    ),
)


class _LossSteps(NamedTuple):
    """Losses of training steps on given predictions.

    Attributes:
        got: the submission's losses of each step.
        expected: the right losses of each step.
        foreground: number of foreground locations per image.
    """

    got: list[dict[str, Tensor]]
    expected: list[dict[str, float]]
    foreground: float

    def divisor_factor(self) -> float | None:
        """Return the factor by which at least two losses are wrong; None if no two agree.

        Such a common factor means that the divisor is wrong, not the losses.
        """
        got, expected = self.got[0], self.expected[0]
        ratios = sorted(float(got[name]) / expected[name] for name in LOSSES if name in got)
        agreeing = [a for a, b in pairwise(ratios) if a > 0 and math.isclose(a, b, rel_tol=1e-4)]
        return agreeing[0] if agreeing else None


def check_losses(submission: Submission) -> CheckResult:
    """Check ``FCOS`` in training mode: the formula of each loss, background, divisor."""
    result = CheckResult("losses")
    steps = once(lambda: _run_loss_case(submission, SEVERAL_BOXES, num_steps=2))
    small_step = once(lambda: _run_loss_case(submission, ONE_LOCATION, num_steps=1))

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
                divisor = len(case.images) * (0.9 * 150 + 0.1 * run.foreground) / factor
                expect(
                    math.isclose(loss, expected, rel_tol=1e-4),
                    f"{case.description}: expected {expected:.6g} = {expected * divisor:.6g} / "
                    f"{divisor:.6g}, the {formula}, divided by images and moving average, got "
                    f"{loss:.6g}, {loss / expected:.6g} times as much",
                )

    with result.probe("divided by images and the moving average of foreground"):
        common_factor = steps().divisor_factor()
        got = "losses off by different factors"
        if common_factor is not None:
            got = f"losses {common_factor:.4g} times as large"
        expect(
            common_factor is not None and abs(common_factor - 1) < 1e-4,
            f"first batch, 2 images with {steps().foreground:g} foreground locations per image: "
            f"expected the sums divided by {_divisor(steps().foreground, 2)}, got {got}",
        )

    with result.probe("the moving average moves on"):
        first, second = (float(losses["loss_cls"]) for losses in steps().got)
        before, after = (losses["loss_cls"] for losses in steps().expected)
        expect(first > 0, f"the same batch once more: expected loss_cls above 0, got {first:g}")
        expect(
            math.isclose(second / first, after / before, rel_tol=1e-4),
            "the same batch once more: expected average = 0.9 * average + 0.1 * foreground "
            f"locations per image, and so losses {after / before:.4g} times those before, got "
            f"{second / first:.4g} times",
        )

    with result.probe("no box and centerness loss from background"):
        padding = SEVERAL_BOXES._replace(gt_boxes=torch.full((2, 3, 5), -1.0))
        run = _run_loss_case(submission, padding, num_steps=1)
        for name in ("loss_box", "loss_ctr"):
            loss = float(run.got[0][name])
            expect(loss == 0, f"images without boxes: expected {name} 0, got {show(loss)}")

    with result.probe("one image without boxes among others"):
        mixed = SEVERAL_BOXES.gt_boxes.clone()
        mixed[1] = -1
        run = _run_loss_case(submission, SEVERAL_BOXES._replace(gt_boxes=mixed), num_steps=1)
        for name in LOSSES:
            loss = float(run.got[0][name])
            expect(
                math.isfinite(loss) and loss > 0,
                f"second image of two without boxes: expected a finite {name} above 0, got "
                f"{show(loss)}",
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


def _divisor(foreground: float, num_images: int) -> str:
    return f"{num_images} * (0.9 * 150 + 0.1 * {foreground:g})"


def _run_loss_case(submission: Submission, case: LossCase, num_steps: int) -> _LossSteps:
    """Compute the submission's losses and the right ones for the same batch, step after step."""
    locations = locations_of(submission, case.images)
    predictions = case.predictions(locations)
    sums, foreground = reference.sums_of_losses(locations, predictions, case.gt_boxes)
    detector = training(stub_detector(submission, predictions))

    got: list[dict[str, Tensor]] = []
    expected: list[dict[str, float]] = []
    average = reference.FIRST_AVERAGE
    for _ in range(num_steps):
        losses = to_plain_data(detector(case.images.clone(), case.gt_boxes.clone()))
        expect(isinstance(losses, dict), f"expected a dict of losses, got {show(losses)}")
        got.append(losses)
        average = 0.9 * average + 0.1 * foreground
        expected.append({name: s / (len(case.images) * average) for name, s in sums.items()})
    return _LossSteps(got, expected, foreground)


class _Overfitted(NamedTuple):
    """The result of a few training steps on one batch.

    Attributes:
        trained: losses with the weights after the steps.
        untrained: losses with the weights before the steps.
        gradients: those of the first step, by name of the parameter.
    """

    trained: dict[str, float]
    untrained: dict[str, float]
    gradients: dict[str, Tensor | None]


def check_training(submission: Submission) -> CheckResult:
    """Check that a few optimizer steps on one small batch reduce the losses."""
    result = CheckResult("training")
    num_steps = 24

    @once
    def overfitted() -> _Overfitted:
        images = torch.randn(2, 3, 64, 96)
        gt_boxes = torch.tensor(
            [
                [[6.0, 8, 44, 40, 0], [40, 20, 90, 60, 1]],
                [[10.0, 4, 80, 60, 2], [-1] * 5],
            ]
        )
        detector: Any = training(submission.detector())
        # The head's initial weights of 0.01 would take a hundred steps to grow.
        with_random_weights(detector.pred_net.stem_cls)
        with_random_weights(detector.pred_net.stem_box)
        before = [parameter.detach().clone() for parameter in detector.parameters()]
        gradients = {}
        optimizer = torch.optim.Adam(detector.parameters(), lr=1.5e-3)
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
        return _Overfitted(trained, untrained, gradients)

    def expect_fall(got: float, untrained: float, what: str) -> None:
        steps = f"{num_steps} steps of Adam on one batch of 2 images"
        expect(got >= 0, f"{steps}: expected {what} not to be negative, got {got:.4g}")
        expect(
            got < 0.95 * untrained,
            f"{steps}: expected {what} to fall below 95 % of the untrained {untrained:.4g}, got "
            f"{got:.4g}",
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


@torch.no_grad()
def _losses_with(
    detector: nn.Module, weights: Sequence[Tensor], images: Tensor, gt_boxes: Tensor
) -> dict[str, float]:
    """Load weights into a detector and return its losses."""
    for parameter, values in zip(detector.parameters(), weights, strict=True):
        parameter.copy_(values)
    return {name: float(loss) for name, loss in to_plain_data(detector(images, gt_boxes)).items()}
