"""Time of all metrics of a report, compared with the same measures that each match anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.average_precision import NUM_CLASSES, random_boxes
from benchmarks.timing import Row, side_by_side
from eecs598.metrics import (
    Evaluation,
    Matches,
    analyze_errors,
    bootstrap_map,
    coco_metrics,
    confusion_matrix,
    find_diagnostics,
    match_detections,
    precision_recall_curves,
    score_matches,
)
from eecs598.report import analyze

NUM_IMAGES, NUM_DETECTIONS, MAX_OBJECTS = 1255, 335_000, 30
REPETITIONS = 5


def rows(device: str) -> Iterator[Row]:
    """Time ``analyze`` next to its measures called one by one, each on matches of its own."""
    evaluation = make_evaluation()
    question = f"all metrics of a report of {NUM_IMAGES:,} images, {NUM_DETECTIONS:,} detections"

    def ours() -> dict[str, Any]:
        # Another evaluation each time: one keeps its matches.
        return analyze(dataclasses.replace(evaluation)).metrics

    times = side_by_side(ours, lambda: _each_matched_anew(evaluation), REPETITIONS)
    yield Row(question, "ours, every measure matching anew", *times, None)


def make_evaluation() -> Evaluation:
    """Return random detections as a detector makes them: many of low scores, a third near objects.

    Most images have a few objects, one in fifty many.
    """
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for count in rng.multinomial(NUM_DETECTIONS, [1 / NUM_IMAGES] * NUM_IMAGES).tolist():
        number = int(rng.geometric(0.4)) + (rng.random() < 0.02) * int(rng.integers(MAX_OBJECTS))
        objects = random_boxes(rng, min(number, MAX_OBJECTS))
        labels = rng.integers(0, NUM_CLASSES, len(objects))
        boxes, found = random_boxes(rng, count), rng.integers(0, NUM_CLASSES, count)
        near = rng.random(count) < 1 / 3
        chosen = rng.integers(0, len(objects), count)
        boxes[near] = objects[chosen[near]] + rng.normal(0, 10, (int(near.sum()), 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        found[near] = labels[chosen[near]]
        predictions.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(found),
                "scores": torch.tensor(0.05 + 0.95 * rng.beta(0.6, 6, count), dtype=torch.float32),
            }
        )
        targets.append(
            {"boxes": torch.tensor(objects, dtype=torch.float32), "labels": torch.tensor(labels)}
        )
    return Evaluation(
        class_names=[f"class {label}" for label in range(NUM_CLASSES)],
        image_paths=[f"{image}.jpg" for image in range(NUM_IMAGES)],
        image_sizes=[(320, 320)] * NUM_IMAGES,
        predictions=predictions,
        targets=targets,
        score_thresh=0.05,
    )


def _each_matched_anew(evaluation: Evaluation) -> None:
    """Compute the measures one by one, as from the tensors."""

    def matches() -> Matches:
        return match_detections(evaluation.predictions, evaluation.targets, evaluation.class_names)

    score_matches(matches())
    precision_recall_curves(matches())
    analyze_errors(matches())
    bootstrap_map(matches())
    confusion_matrix(matches())
    find_diagnostics(matches(), evaluation.image_sizes)
    coco_metrics(matches())
