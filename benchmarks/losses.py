"""Time of matching, targets and losses: their share of a training step, and growth with boxes.

The network's outputs are computed once, so that only ``FCOSLoss`` is timed, forward and backward,
next to a whole training step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.detector import BATCH_SIZE, SIDE, batch, channels_last, make_detector, training_step
from benchmarks.timing import Row, side_by_side
from one_stage_detector import FCOS, NetworkOutputs


def rows(device: str) -> Iterator[Row]:
    """Time from 1 to 40 boxes per image: losses in float32, the step in the default settings."""
    detector = channels_last(make_detector(device)).train()
    for count in (1, 10, 40):
        images, gt_boxes = batch(device, boxes_per_image=count)
        step = training_step(detector, channels_last(images), gt_boxes, "auto")
        other = make_detector(device).train()
        losses = functools.partial(_losses, other, _leaf_outputs(other, images), gt_boxes)
        question = f"losses, {BATCH_SIZE} images of {SIDE} px, {count} boxes each"
        yield Row(question, "the training step", *side_by_side(losses, step), 0.06)


def _losses(detector: FCOS, outputs: NetworkOutputs, gt_boxes: Tensor) -> None:
    losses = detector.criterion(outputs, gt_boxes, detector.loss_normalizer)
    torch.stack(list(losses.values())).sum().backward()


def _leaf_outputs(detector: FCOS, images: Tensor) -> NetworkOutputs:
    """Return the network's outputs as leaves of the graph, at which gradients end."""
    with torch.no_grad():
        locations, *predictions = detector.network_outputs(images)
    return NetworkOutputs(
        locations,
        *(
            {level: values.requires_grad_() for level, values in per_level.items()}
            for per_level in predictions
        ),
    )
