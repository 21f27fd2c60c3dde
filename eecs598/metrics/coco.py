"""The twelve numbers of the COCO evaluation, through `faster-coco-eval`.

Definitions: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312, and
https://cocodataset.org/#detection-eval. They differ from those of `metrics`: corners are points,
so that a box is ``x2 - x1`` wide; a detection takes the best box still free; precision is
sampled at 101 recalls; and at most 100 detections an image and class are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eecs598.metrics.matching import match_detections

# In the order in which the library gives them.
_NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


def coco_metrics(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
) -> dict[str, float | None]:
    """Average precision and recall as COCO defines them.

    ``AP`` and all ``AR`` are means over the IoU thresholds 0.5, 0.55, ..., 0.95. Small boxes have
    an area below 32 x 32, large ones above 96 x 96 pixels of the image that the boxes belong to:
    scaling an image moves its boxes from one size to another. ``AR_10`` is the recall with 10
    detections an image and class.

    Difficult boxes are given as COCO's crowds: they are not to be found, and a detection is left
    out when it takes no other box and the share of *its* area inside a difficult box of its class
    reaches the threshold.

    Args:
        predictions, targets, class_names: as for :func:`eecs598.metrics.average_precision`.

    Returns:
        ``AP, AP50, AP75, AP_small, AP_medium, AP_large, AR_1, AR_10, AR_100, AR_small, AR_medium,
        AR_large``: fractions, None where there is no ground truth (of that size).

    Raises:
        ValueError: for input that is not as above, or without `faster-coco-eval`.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ValueError(
            "COCO's metrics need the package faster-coco-eval, which is not installed; install it "
            'with: pip install -e ".[coco]"'
        ) from error

    # Checks the input and brings it into plain columns; the matching itself is the library's.
    columns = match_detections(predictions, targets, class_names)
    truth = _annotations(
        columns.truth_image,
        columns.truth_label,
        columns.truth_box,
        "iscrowd",
        columns.truth_difficult,
    )
    found = _annotations(columns.image, columns.label, columns.box, "score", columns.score)
    data = {
        "images": [{"id": image} for image in range(columns.num_images)],
        "categories": [
            {"id": label, "name": name} for label, name in enumerate(columns.class_names)
        ],
    }
    evaluation = COCOeval_faster(
        COCO({**data, "annotations": truth}, print_function=_say_nothing),
        COCO({**data, "annotations": found}, print_function=_say_nothing),
        iouType="bbox",
        print_function=_say_nothing,
    )
    evaluation.run()
    values = np.asarray(evaluation.stats)[: len(_NAMES)].tolist()
    return {name: None if value < 0 else value for name, value in zip(_NAMES, values, strict=True)}


def _annotations(
    images: np.ndarray, labels: np.ndarray, boxes: np.ndarray, key: str, values: np.ndarray
) -> list[dict[str, Any]]:
    """One record a box, as in a file of COCO; ids from 1, since 0 means none to the library."""
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


def _say_nothing(*_: object) -> None:
    """Takes the place of the library's output."""
