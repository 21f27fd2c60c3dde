"""COCO's metrics: hand counts, and our own where the definitions meet."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.coco import coco_metrics
from eecs598.metrics.matching import Matches, match_detections
from tests.evaluations import one_image

pytest.importorskip("faster_coco_eval")

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


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match="faster-coco-eval, which is not installed"):
        coco_metrics(matched([(0, 0.9, SMALL)], [(0, SMALL)]))
