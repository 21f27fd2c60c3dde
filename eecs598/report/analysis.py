"""All that is asked about the detections of a data set, in one place.

evaluation = Evaluation(class_names, image_paths, image_sizes, predictions, targets)
analysis = analyse(evaluation)
analysis.metrics             # plain numbers: what ``metrics.json`` holds
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eecs598.metrics import (
    DifferenceResult,
    ErrorAnalysis,
    Evaluation,
    Matches,
    PrecisionRecall,
    Smell,
    TextFormat,
    analyse_errors,
    average_precision,
    bootstrap_difference,
    bootstrap_map,
    coco_metrics,
    confusion_matrix,
    curves_of_matches,
    find_smells,
    image_names,
    match_detections,
    precision_recall,
    score_matches,
)

__all__ = ["Analysis", "Comparison", "analyse", "check_comparable", "compare"]


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
    """An evaluation beside another one of the same images.

    Attributes:
        name: of the other one.
        other: what ``average_precision`` returns for it.
        difference: of the mAP, with its interval.
    """

    name: str
    other: Mapping[str, Any]
    difference: DifferenceResult


def analyse(evaluation: Evaluation) -> Analysis:
    """Work out everything that the report of an evaluation shows.

    Raises:
        ValueError: for input that ``average_precision`` does not take.
    """
    given = (evaluation.predictions, evaluation.targets, evaluation.class_names)
    smells = find_smells(*given, image_sizes=evaluation.image_sizes)
    try:
        matches = match_detections(*given)
    except ValueError as error:
        # Broken numbers have no metrics; what else is wrong with them is worth knowing.
        raise ValueError("\n".join([str(error), *(smell.message for smell in smells)])) from error
    metrics = score_matches(matches)
    curves, overall = curves_of_matches(matches), precision_recall(matches)
    errors = analyse_errors(*given)
    interval = bootstrap_map(*given)
    metrics.update(
        score_thresh=evaluation.score_thresh,
        mAP_11_point=score_matches(matches, "11-point")["mAP"],
        interval=[interval.low, interval.high],
        best_f1=overall.best_f1,
        best_threshold=overall.best_f1_threshold,
        classes={
            name: {"best_f1": curve.best_f1, "best_threshold": curve.best_f1_threshold}
            for name, curve in curves.items()
        },
        confusion_matrix=confusion_matrix(
            *given, score_threshold=overall.best_f1_threshold or 0.0
        ).tolist(),
        errors=errors.to_dict(),
        smells=[smell.message for smell in smells],
        coco=_coco(given),
    )
    return Analysis(evaluation, metrics, matches, curves, errors, smells)


def check_comparable(
    class_names: Sequence[str], names: Sequence[str], other: TextFormat, other_name: str
) -> None:
    """See that another evaluation is of the same images, before this one is made.

    Args:
        class_names, names: of this evaluation, see ``evaluation.image_names``.
        other, other_name: see ``compare``.

    Raises:
        ValueError: it is of other images, or has other classes.
    """
    strangers = sorted(set(names) ^ set(other.image_names))
    if strangers:
        whose = "this evaluation" if strangers[0] in names else other_name
        raise ValueError(
            f"{other_name} has {len(other.image_names)} images and this evaluation {len(names)}; "
            f"{len(strangers)} are in one of them alone, such as {strangers[0]} in {whose}. "
            "Compare evaluations of the same split."
        )
    if unknown := set(other.class_names) - set(class_names):
        raise ValueError(
            f"{other_name} has the classes {sorted(unknown)}, which are not among "
            f"{list(class_names)}; compare detectors of the same classes."
        )


def compare(evaluation: Evaluation, other: TextFormat, other_name: str) -> Comparison:
    """Compare an evaluation with detections that another one exported.

    Args:
        evaluation: this one.
        other: what ``metrics.read_text_format`` read. Its boxes may be in pixels of another image
            size.
        other_name: of the other one.

    Raises:
        ValueError: detections of other images or other objects.
    """
    names = image_names(evaluation.image_paths)
    check_comparable(evaluation.class_names, names, other, other_name)
    place = {name: i for i, name in enumerate(other.image_names)}
    label = {name: i for i, name in enumerate(evaluation.class_names)}
    labels = torch.tensor([label[name] for name in other.class_names])
    predictions, targets = (
        [{**items[place[name]], "labels": labels[items[place[name]]["labels"]]} for name in names]
        for items in (other.predictions, other.targets)
    )
    for name, ours, theirs in zip(names, evaluation.targets, targets, strict=True):
        if not _same_objects(ours, theirs):
            raise ValueError(
                f"the ground truth of {name} in {other_name} has other objects than this "
                "evaluation; compare evaluations of the same data."
            )
    return Comparison(
        other_name,
        average_precision(predictions, targets, evaluation.class_names),
        bootstrap_difference(
            evaluation.predictions,
            predictions,
            evaluation.targets,
            evaluation.class_names,
            targets_b=targets,
        ),
    )


def _same_objects(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether these are the same objects in the same order, in images of any two sizes."""
    if not torch.equal(ours["labels"].cpu(), theirs["labels"]):
        return False
    none = torch.zeros(len(theirs["labels"]), dtype=torch.bool)
    if not torch.equal(ours.get("difficult", none), theirs.get("difficult", none)):
        return False
    boxes, others = (target["boxes"].cpu().double() for target in (ours, theirs))
    if not len(boxes):
        return True
    # Sides are rounded to whole pixels, so the scale is not quite the same in x and y.
    return torch.allclose(boxes / boxes.max(), others / others.max(), atol=0.03)


def _coco(given: tuple) -> dict[str, float] | None:
    if importlib.util.find_spec("faster_coco_eval") is None:
        return None
    return coco_metrics(*given)
