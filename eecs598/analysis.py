"""All that is asked about the detections of a data set, in one place.

evaluation = Evaluation(class_names, image_paths, image_sizes, predictions, targets)
analysis = analyse(evaluation)
analysis.metrics             # plain numbers: what ``metrics.json`` holds
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eecs598.coco_metrics import coco_metrics
from eecs598.error_analysis import ErrorAnalysis, analyse_errors, confusion_matrix
from eecs598.evaluation import Evaluation
from eecs598.metrics import (
    Matches,
    PrecisionRecall,
    TextFormat,
    average_precision,
    match_detections,
    precision_recall_curves,
)
from eecs598.sanity import Smell, find_smells
from eecs598.uncertainty import DifferenceResult, bootstrap_difference, bootstrap_map

__all__ = ["Analysis", "Comparison", "analyse", "compare"]


@dataclass(frozen=True)
class Analysis:
    """The answers; ``metrics`` has those that are plain numbers.

    Attributes:
        evaluation: what was analysed.
        metrics: what ``average_precision`` returns, with ``score_thresh``, ``mAP_11_point``,
            ``interval`` (95 % of the mAP), ``best_f1`` of all classes together and the
            ``best_threshold`` that gives it, ``classes`` (best F1 and threshold of each),
            ``confusion_matrix`` at that threshold, ``errors``, ``smells`` and ``coco``; the last
            is None where its library is not installed.
        matches: what each detection is worth.
        curves: precision over recall of each class with ground truth.
        errors: the kind of each error.
        smells: what looks wrong.
    """

    evaluation: Evaluation
    metrics: dict[str, Any]
    matches: Matches
    curves: dict[str, PrecisionRecall]
    errors: ErrorAnalysis
    smells: list[Smell]


@dataclass(frozen=True)
class Comparison:
    """Two sets of detections of the same images.

    Attributes:
        name: of the other one.
        this, other: what ``average_precision`` returns for each.
        difference: of the mAP, with its interval.
    """

    name: str
    this: Mapping[str, Any]
    other: Mapping[str, Any]
    difference: DifferenceResult


def analyse(evaluation: Evaluation) -> Analysis:
    """Work out everything that the report of an evaluation shows.

    Raises:
        ValueError: for input that ``average_precision`` does not take.
    """
    given = (evaluation.predictions, evaluation.targets, evaluation.class_names)
    metrics = average_precision(*given)
    matches = match_detections(*given)
    curves = precision_recall_curves(*given)
    errors = analyse_errors(*given)
    interval = bootstrap_map(*given)
    smells = find_smells(*given, image_sizes=evaluation.image_sizes)
    best_f1, threshold = _best_f1(matches)
    metrics.update(
        score_thresh=evaluation.score_thresh,
        mAP_11_point=average_precision(*given, method="11-point")["mAP"],
        interval=[interval.low, interval.high],
        best_f1=best_f1,
        best_threshold=threshold,
        classes={
            name: {"best_f1": curve.best_f1, "best_threshold": curve.best_f1_threshold}
            for name, curve in curves.items()
        },
        confusion_matrix=confusion_matrix(*given, score_threshold=threshold or 0.0).tolist(),
        errors=errors.to_dict(),
        smells=[smell.message for smell in smells],
        coco=_coco(given),
    )
    return Analysis(evaluation, metrics, matches, curves, errors, smells)


def compare(evaluation: Evaluation, other: TextFormat, name: str) -> Comparison:
    """Compare an evaluation with detections that another one exported.

    Args:
        evaluation: this one.
        other: what ``metrics.read_text_format`` read. Its boxes may be in pixels of another image
            size.
        name: of the other one.

    Raises:
        ValueError: detections of other images or other objects.
    """
    names = [Path(path).stem for path in evaluation.image_paths]
    place = {image: i for i, image in enumerate(other.image_names)}
    if set(place) != set(names):
        raise ValueError(
            f"{name} has {len(place)} images and this evaluation {len(names)}, of which "
            f"{len(set(place) & set(names))} are the same; compare evaluations of the same split."
        )
    label = {word: i for i, word in enumerate(evaluation.class_names)}
    if unknown := set(other.class_names) - set(label):
        raise ValueError(
            f"{name} has the classes {sorted(unknown)}, which are not among "
            f"{list(evaluation.class_names)}; compare detectors of the same classes."
        )
    labels = torch.tensor([label[word] for word in other.class_names])
    order = [place[image] for image in names]
    predictions, targets = (
        [{**items[i], "labels": labels[items[i]["labels"]]} for i in order]
        for items in (other.predictions, other.targets)
    )
    for image, ours, theirs in zip(names, evaluation.targets, targets, strict=True):
        if not torch.equal(ours["labels"].sort()[0], theirs["labels"].sort()[0]):
            raise ValueError(
                f"the ground truth of {image} in {name} has other objects than this evaluation; "
                "compare evaluations of the same data."
            )
    return Comparison(
        name,
        average_precision(evaluation.predictions, evaluation.targets, evaluation.class_names),
        average_precision(predictions, targets, evaluation.class_names),
        bootstrap_difference(
            evaluation.predictions,
            predictions,
            evaluation.targets,
            evaluation.class_names,
            targets_b=targets,
        ),
    )


def _best_f1(matches: Matches) -> tuple[float, float | None]:
    """The best F1 of all classes together, and the score threshold that gives it."""
    counted = ~matches.ignored
    score, true = matches.score[counted], matches.true[counted]
    if not len(score):
        return 0.0, None
    # A threshold keeps or drops equal scores together.
    last = np.flatnonzero(np.append(score[1:] < score[:-1], True))
    hits = np.cumsum(true)[last]
    f1 = 2 * hits / (last + 1 + matches.num_ground_truth.sum())
    best = int(f1.argmax())
    return float(f1[best]), float(score[last[best]])


def _coco(given: tuple) -> dict[str, float] | None:
    if importlib.util.find_spec("faster_coco_eval") is None:
        return None
    return coco_metrics(*given)
