"""The twelve metrics of the COCO evaluation, computed by ``faster-coco-eval``.

Definitions: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312, and
https://cocodataset.org/#detection-eval. They differ from those of
``eecs598.metrics.average_precision``: corners are points, so that a box is ``x2 - x1`` wide; a
detection takes the best box that is still free; precision is sampled at 101 recalls; and at most
100 detections per image and class count.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np

from eecs598.metrics.matching import Matches

# In the order in which the library returns them.
_NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


def coco_metrics(matches: Matches) -> dict[str, float | None]:
    """Return average precision and average recall as COCO defines them.

    ``AP`` and all ``AR`` are means over the IoU thresholds 0.5, 0.55, ..., 0.95. Small boxes have
    an area of up to 32 x 32, large ones of at least 96 x 96 pixels of the image that the boxes
    belong to: scaling an image moves its boxes from one size to another. ``AR_10`` is the recall
    with 10 detections per image and class.

    Difficult boxes are taken as COCO's crowds: they are not to be found, and a detection that takes
    no other box is left out when the share of *its* area inside a difficult box of its class
    reaches the threshold.

    Args:
        matches: what ``match_detections`` returned, at any threshold. COCO's matching is another
            one and done by the library; only the boxes are taken.

    Returns:
        ``AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium,
        AR_large``: fractions, None where there is no ground truth (of that size).

    Raises:
        ValueError: ``faster-coco-eval`` is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ValueError(
            "COCO's metrics need the package faster-coco-eval, which is not installed; install it "
            'with: pip install -e ".[coco]"'
        ) from error

    with _garbage_collection_paused():
        gt = _annotations(
            matches.gt_image, matches.gt_label, matches.gt_box, "iscrowd", matches.gt_difficult
        )
        found = _annotations(matches.image, matches.label, matches.box, "score", matches.score)
        data = {
            "images": [{"id": image} for image in range(matches.num_images)],
            "categories": [
                {"id": label, "name": name} for label, name in enumerate(matches.class_names)
            ],
        }
        evaluation = COCOeval_faster(
            COCO({**data, "annotations": gt}, print_function=_print_nothing),
            COCO({**data, "annotations": found}, print_function=_print_nothing),
            iouType="bbox",
            print_function=_print_nothing,
        )
        evaluation.run()
    values = np.asarray(evaluation.stats)[: len(_NAMES)].tolist()
    return {name: None if value < 0 else value for name, value in zip(_NAMES, values, strict=True)}


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause it while a record is made per box, none of which is garbage: a sixth faster."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _annotations(
    images: np.ndarray, labels: np.ndarray, boxes: np.ndarray, key: str, values: np.ndarray
) -> list[dict[str, Any]]:
    """Return one record per box, as in a file of COCO; ids from 1, since 0 is none there."""
    corners, sizes = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    rows = zip(
        images.tolist(),
        labels.tolist(),
        np.hstack([corners, sizes]).tolist(),
        sizes.prod(axis=1).tolist(),
        values.tolist(),
        strict=True,
    )
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": box,
            "area": area,
            key: value,
        }
        for number, (image, label, box, area, value) in enumerate(rows, start=1)
    ]


def _print_nothing(*_: object) -> None:
    """Take the place of the library's output."""
