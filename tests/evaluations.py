"""Small evaluations for the tests of the metrics, the analysis, the report and the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eecs598.metrics.evaluation import Evaluation
from fcos.results import export_text

CLASS_NAMES = ["cat", "a < b"]  # a name that HTML would misread
# One detection of each kind.
TRUTHS = {  # image -> box and label of each object
    "first": [([10, 10, 50, 50], 0), ([60, 60, 90, 90], 1)],
    "second": [([20, 20, 80, 80], 0)],
    "third": [([5, 5, 95, 55], 1)],
    "fourth": [],
}
DETECTIONS = {  # image -> box, label and score of each detection
    "first": [
        ([10, 10, 50, 50], 0, 0.9),  # true
        ([11, 10, 50, 50], 0, 0.8),  # duplicate
        ([60, 60, 90, 90], 0, 0.7),  # class
    ],
    "second": [
        ([20, 20, 80, 45], 0, 0.6),  # localization
        ([20, 20, 80, 40], 1, 0.5),  # both
    ],
    "third": [],  # missed
    "fourth": [([0, 0, 30, 30], 1, 0.4)],  # background
}
KINDS = {"duplicate", "class", "localization", "both", "missed", "background"}


def one_image(detections: list[tuple], truths: list[tuple]) -> tuple[dict, dict]:
    """Detections (label, score, box) and ground truth (label, box[, difficult])."""
    labels, scores, boxes = zip(*detections, strict=True) if detections else ((), (), ())
    prediction = {
        "boxes": np.array(boxes, dtype=float).reshape(-1, 4),
        "labels": np.array(labels),
        "scores": np.array(scores),
    }
    target = {
        "boxes": np.array([truth[1] for truth in truths], dtype=float).reshape(-1, 4),
        "labels": np.array([truth[0] for truth in truths]),
        "difficult": np.array([truth[2:] == (True,) for truth in truths], dtype=bool),
    }
    return prediction, target


def make_evaluation(folder: Path, scale: float = 1.0, drop: tuple[str, ...] = ()) -> Evaluation:
    """Images of 200 x 200 pixels in ``folder``, seen by the detector at 100 times ``scale``."""
    predictions, targets, paths = [], [], []
    for number, name in enumerate(TRUTHS):
        path = folder / f"{name}.png"
        Image.new("RGB", (200, 200), (60 * number, 90, 120)).save(path)
        paths.append(str(path))
        found = [] if name in drop else DETECTIONS[name]
        predictions.append(
            {
                "boxes": scale * torch.tensor([row[0] for row in found]).float().reshape(-1, 4),
                "labels": torch.tensor([row[1] for row in found], dtype=torch.int64),
                "scores": torch.tensor([row[2] for row in found]).float(),
            }
        )
        objects = TRUTHS[name]
        targets.append(
            {
                "boxes": scale * torch.tensor([row[0] for row in objects]).float().reshape(-1, 4),
                "labels": torch.tensor([row[1] for row in objects], dtype=torch.int64),
            }
        )
    side = int(100 * scale)
    return Evaluation(
        CLASS_NAMES,
        paths,
        [(side, side)] * len(paths),
        predictions,
        targets,
        score_thresh=0.05,
        levels={"p3": (0, 25), "p4": (25, float("inf"))},
    )


def export(evaluation: Evaluation, folder: Path) -> Path:
    """The text files of an evaluation."""
    export_text(evaluation, folder)
    return folder
