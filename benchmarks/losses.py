"""Which part of a training step are matching, targets and losses, and how does it grow with boxes?

The network's outputs are computed once and stand in for it, so that what is left is timed forwards
and backwards, next to the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.detector import BATCH_SIZE, SIDE, batch, channels_last, make_detector, training_step
from benchmarks.timing import Row, side_by_side
from one_stage_detector import FCOS


def rows(device: str) -> Iterator[Row]:
    """From 1 to 40 boxes an image. The losses are float32, the step is in the default settings."""
    detector = channels_last(make_detector(device)).train()
    for count in (1, 10, 40):
        images, gt_boxes = batch(device, boxes_per_image=count)
        step = training_step(detector, channels_last(images), gt_boxes, "auto")
        stand_in = make_detector(device).train()
        outputs = _outputs(stand_in, images)
        stand_in._run_network = lambda _images, outputs=outputs: outputs

        def losses_alone(detector=stand_in, images=images, gt_boxes=gt_boxes) -> None:
            sum(detector(images, gt_boxes).values()).backward()

        question = f"losses, {BATCH_SIZE} images of {SIDE} px, {count} boxes each"
        yield Row(question, "the training step", *side_by_side(losses_alone, step), 0.06)


def _outputs(detector: FCOS, images: Tensor) -> tuple[dict[str, Tensor], ...]:
    """Those of the network, as the ends of which gradients are asked for."""
    with torch.no_grad():
        locations, *predictions = detector._run_network(images)
    return locations, *(
        {level: values.requires_grad_() for level, values in p.items()} for p in predictions
    )
