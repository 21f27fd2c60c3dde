"""COCO's metrics: hand counts, and the numbers of ``faster-coco-eval``."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.coco import coco_metrics
from eecs598.metrics.matching import Matches, match_detections
from tests.evaluations import one_image

KEYS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)
SMALL, MEDIUM, LARGE = (0, 0, 20, 20), (100, 0, 150, 50), (200, 0, 300, 100)
LARGE_82 = (200, 0, 300, 82)  # overlaps LARGE by 0.82: a match at 7 of the 10 thresholds
FAR = (400, 400, 500, 500)


def matched(detections: list[tuple], truths: list[tuple]) -> Matches:
    """One image; see ``one_image``."""
    prediction, target = one_image(detections, truths)
    return match_detections([prediction], [target], ["cat", "dog"])


# What is not named is None.
CASES = {
    "all found": (
        [(0, 0.9, SMALL), (0, 0.8, MEDIUM), (1, 0.7, LARGE)],
        [(0, SMALL), (0, MEDIUM), (1, LARGE)],
        {
            **dict.fromkeys(KEYS, 1),
            "AR_1": 0.75,  # one of the two cats, the dog
        },
    ),
    "one of two found, of any size": (
        [(0, 0.9, SMALL)],
        [(0, SMALL), (0, MEDIUM)],
        {
            # Recall reaches 0.5: 51 of the 101 recalls.
            **dict.fromkeys(("AP", "AP50", "AP75"), 51 / 101),
            **{"AP_small": 1, "AP_medium": 0, "AR_small": 1, "AR_medium": 0},
            **dict.fromkeys(("AR_1", "AR_10", "AR_100"), 0.5),
        },
    ),
    "a false positive first": (
        [(0, 0.9, FAR), (0, 0.8, LARGE_82)],
        [(0, LARGE)],
        {
            **{"AP": 0.35, "AP50": 0.5, "AP75": 0.5, "AP_large": 0.35},
            **{"AR_1": 0, "AR_10": 0.7, "AR_100": 0.7, "AR_large": 0.7},
        },
    ),
    # A detection inside the difficult box is left out however little of the box it covers, and a
    # second one, too.
    "difficult": (
        [(0, 0.9, FAR), (0, 0.85, (400, 400, 420, 420)), (0, 0.8, LARGE)],
        [(0, LARGE), (0, FAR, True)],
        {
            **dict.fromkeys(("AP", "AP50", "AP75", "AP_large"), 1),
            **{"AR_1": 0, "AR_10": 1, "AR_100": 1, "AR_large": 1},
        },
    ),
    "no detections": (
        [],
        [(0, LARGE)],
        {key: 0 for key in KEYS if "small" not in key and "medium" not in key},
    ),
    "no ground truth": ([(0, 0.9, SMALL)], [], {}),
    "only difficult": ([(0, 0.9, SMALL)], [(0, SMALL, True)], {}),
    # Boxes without an area overlap nothing, themselves neither; a small one is there to be found.
    "a line": (
        [(0, 0.9, (0, 0, 0, 9))],
        [(0, (0, 0, 0, 9))],
        {key: 0 for key in KEYS if "medium" not in key and "large" not in key},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_hand_counts(case):
    detections, truths, expected = CASES[case]
    matches = matched(detections, truths)
    result = coco_metrics(matches)
    assert tuple(result) == KEYS
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result == pytest.approx({**dict.fromkeys(KEYS), **expected})
    assert result == library_metrics(matches)


def test_ap50_agrees_with_ours_where_the_definitions_meet():
    """Objects far from each other, and our boxes smaller by the pixel that we count in addition."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for _ in range(80):
        corner = np.array([[0, 0], [100, 0], [0, 100]]) + rng.integers(0, 20, (3, 2))
        boxes = np.hstack([corner, corner + rng.integers(20, 60, (3, 2))])
        labels = rng.integers(0, 2, 3)
        chosen = rng.integers(0, 3, 6)
        moved = boxes[chosen] + rng.integers(-5, 6, (6, 4))
        named = np.where(rng.random(6) < 0.8, labels[chosen], 1 - labels[chosen])
        predictions.append({"boxes": moved, "labels": named, "scores": rng.random(6)})
        targets.append({"boxes": boxes, "labels": labels})

    def shrunk(images: list[dict]) -> list[dict]:
        return [{**image, "boxes": image["boxes"] - [0, 0, 1, 1]} for image in images]

    names = ["cat", "dog"]
    theirs = coco_metrics(match_detections(predictions, targets, names))
    for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        ours = average_precision(shrunk(predictions), shrunk(targets), names, threshold)["mAP"]
        assert 0.1 < ours < 0.8
        assert theirs[key] == pytest.approx(ours, abs=0.01)
    assert theirs["AP_large"] is None
    backward = coco_metrics(match_detections(predictions[::-1], targets[::-1], names))
    assert backward == pytest.approx(theirs)


def library_metrics(matches: Matches) -> dict[str, float | None]:
    """The same numbers by ``faster-coco-eval``."""
    library = pytest.importorskip("faster_coco_eval")

    def records(prefix: str, **more: np.ndarray) -> list[dict]:
        image, label, box = (getattr(matches, prefix + name) for name in ("image", "label", "box"))
        rows = []
        for row, (x1, y1, x2, y2) in enumerate(box.tolist()):
            width, height = x2 - x1, y2 - y1
            rows.append(
                {
                    "id": row + 1,
                    "image_id": int(image[row]),
                    "category_id": int(label[row]),
                    "bbox": [x1, y1, width, height],
                    "area": width * height,
                    **{name: values[row].item() for name, values in more.items()},
                }
            )
        return rows

    document = {
        "images": [{"id": image} for image in range(matches.num_images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(matches.class_names)],
    }
    truth = {**document, "annotations": records("gt_", iscrowd=matches.gt_difficult.astype(int))}
    found = {**document, "annotations": records("", score=matches.score)}
    evaluation = library.COCOeval_faster(
        library.COCO(truth), library.COCO(found), iouType="bbox", print_function=lambda *_: None
    )
    evaluation.run()
    values = np.asarray(evaluation.stats)[:12].tolist()
    return {key: None if value < 0 else value for key, value in zip(KEYS, values, strict=True)}


@pytest.mark.parametrize("seed", range(8))
def test_every_number_is_that_of_the_library(seed):
    """Crowds, ties, boxes of all sizes, and more than 100 detections of a class in an image."""
    rng = np.random.default_rng(seed)
    images = []
    for image in range(30):
        count = int(rng.integers(1, 6))
        corner = rng.integers(0, 60, (count, 2))
        objects = np.hstack([corner, corner + rng.integers(4, 160, (count, 2))])
        labels, difficult = rng.integers(0, 2, count), rng.random(count) < 0.2
        number = 300 if image == 0 else rng.integers(20)
        chosen = rng.integers(0, count, number)
        boxes = objects[chosen] + rng.integers(-3, 4, (number, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        named = np.where(rng.random(number) < 0.8, labels[chosen], 1 - labels[chosen])
        scores = rng.choice([0.25, 0.5, 0.75], number) if seed % 2 else rng.random(number)
        found = zip(named, scores, boxes.tolist(), strict=True)
        there = zip(labels, objects.tolist(), difficult.tolist(), strict=True)
        # Images without objects or without detections, too.
        images.append(one_image(list(found), list(there) if image % 7 != 1 else []))
    matches = match_detections(*zip(*images, strict=True), ["cat", "dog"])
    assert np.bincount(matches.image * 2 + matches.label).max() > 100
    result = coco_metrics(matches)
    assert all(0 < value < 1 for value in result.values())
    assert result == library_metrics(matches)
