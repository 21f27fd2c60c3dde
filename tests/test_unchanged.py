"""Results that must not change with the code: metrics, text files and points, to the last digit.

``unchanged.json`` was written by the code before the library was divided into rooms (commit
6dedd03). A change that is meant to alter a result writes the file anew and says why.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import a4_helper
import common
import one_stage_detector
from eecs598.grading import Submission, load_rubric, run_checks
from eecs598.metrics import Evaluation, read_text_format, score_folder
from eecs598.report import analyze, compare
from tests.evaluations import export

CLASSES = ["bird", "cow", "dog", "potted plant", "train"]
EXPECTED = json.loads(Path(__file__).with_name("unchanged.json").read_text(encoding="utf-8"))


def made_up_detections(seed: int, num_images: int = 60) -> tuple[list[dict], list[dict]]:
    """Predictions and targets of images of 320 x 240: found, missed, doubled, shifted, confused."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for image in range(num_images):
        count = int(rng.integers(0, 7))
        corners = rng.uniform((0, 0), (220, 150), (count, 2))
        boxes = np.hstack([corners, corners + rng.uniform(8, 90, (count, 2))]).round(1)
        labels = rng.integers(0, len(CLASSES), count)
        found = rng.random(count) < 0.8
        shift = rng.normal(0, 6, (count, 4))
        seen = np.vstack([boxes + shift, boxes[::2] + rng.normal(0, 12, boxes[::2].shape)])
        seen_labels = np.hstack([np.where(rng.random(count) < 0.2, 1, labels), labels[::2]])
        stray = rng.uniform(0, 150, (3, 2))
        seen = np.vstack([seen[:count], seen[count:], np.hstack([stray, stray + 40])])
        seen_labels = np.hstack([seen_labels, rng.integers(0, len(CLASSES), 3)])
        kept = np.hstack([found, np.ones(len(seen) - count, dtype=bool)])
        kept &= (seen[:, 2:] > seen[:, :2]).all(axis=1)
        scores = rng.uniform(0.05, 1, len(seen)).round(2)  # with ties
        predictions.append(
            {
                "boxes": torch.tensor(seen[kept].round(2), dtype=torch.float32).clamp(min=0),
                "labels": torch.tensor(seen_labels[kept]),
                "scores": torch.tensor(scores[kept], dtype=torch.float32),
            }
        )
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
        }
        if image % 3 == 0:
            target["difficult"] = torch.tensor(rng.random(count) < 0.3)
        targets.append(target)
    return predictions, targets


def evaluation(predictions: list[dict], targets: list[dict]) -> Evaluation:
    count = len(predictions)
    return Evaluation(
        CLASSES,
        [f"images/{number:03d}.jpg" for number in range(count)],
        [(240, 320)] * count,
        predictions,
        targets,
        score_thresh=0.05,
        levels={"p3": (0, 64), "p4": (64, 128), "p5": (128, float("inf"))},
    )


def same(value: Any, expected: Any) -> bool:
    """Whether results are equal, but for the last bit of sums, which processors round apart."""
    if isinstance(expected, dict):
        return value.keys() == expected.keys() and all(
            same(value[k], expected[k]) for k in expected
        )
    if isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    return (
        value == pytest.approx(expected, rel=1e-13)
        if isinstance(expected, float)
        else value == expected
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics(seed):
    metrics = json.loads(json.dumps(analyze(evaluation(*made_up_detections(seed))).metrics))
    assert metrics.pop("devkit") is None
    expected = EXPECTED[f"metrics {seed}"]
    if metrics["coco"] is None:  # its library is not installed
        expected = {**expected, "coco": None}
    assert same(metrics, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_text_files_and_their_score(tmp_path, seed):
    export(evaluation(*made_up_detections(seed)), tmp_path)
    digest = hashlib.sha256()
    for file in sorted(tmp_path.rglob("*.txt")):
        digest.update(f"{file.relative_to(tmp_path).as_posix()}\n".encode() + file.read_bytes())
    assert digest.hexdigest() == EXPECTED[f"text {seed}"]
    assert same(score_folder(tmp_path), EXPECTED[f"folder {seed}"])


def test_comparison(tmp_path):
    (predictions, targets), (other, _) = made_up_detections(0), made_up_detections(1)
    export(evaluation(other, targets), tmp_path)
    comparison = compare(evaluation(predictions, targets), read_text_format(tmp_path), "other")
    result = {"other": comparison.other, **comparison.difference.to_dict()}
    assert same(json.loads(json.dumps(result)), EXPECTED["comparison"])


def test_points_of_this_repository():
    results = run_checks(Submission(common, one_stage_detector, a4_helper))
    grade = load_rubric().grade(results)
    points = {item.name: [item.score, item.max_score] for item in grade.items}
    assert points == EXPECTED["points"]
