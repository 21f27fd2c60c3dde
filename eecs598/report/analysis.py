"""All metrics of one evaluation for its report, and its comparison with another one.

``analyze(evaluation).metrics`` are the plain numbers that ``metrics.json`` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from eecs598.metrics import (
    Diagnostic,
    DifferenceResult,
    ErrorAnalysis,
    Evaluation,
    Matches,
    PrecisionRecall,
    TextFormat,
    analyze_errors,
    bootstrap_difference,
    bootstrap_map,
    coco_metrics,
    confusion_matrix,
    find_broken_numbers,
    find_diagnostics,
    image_names,
    match_detections,
    precision_recall,
    precision_recall_curves,
    score_matches,
)


@dataclass(frozen=True)
class Analysis:
    """All results about one evaluation.

    Attributes:
        evaluation: what was analyzed.
        metrics: what ``average_precision`` returns, with ``score_thresh``, ``mAP_11_point``,
            ``interval`` (95 % of the mAP), ``best_f1`` of all classes together and the
            ``best_threshold`` that gives it, ``classes`` (best F1 and threshold of each),
            ``confusion_matrix`` at that threshold, ``errors``, ``diagnostics``, ``coco``
            (None where ``faster-coco-eval`` is not installed) and ``devkit``: the ``mAP``,
            ``mAP_11_point`` and ``AP`` by the VOC devkit's rule, and ``num_difficult`` objects
            (None where it is not known which objects are difficult). All others are by the
            course's rule, for which difficult objects do not exist.
        matches: the detections matched to the ground truth, by the course's rule.
        curves: precision over recall of each class with ground truth.
        errors: the kind of each error.
        diagnostics: what looks wrong.
    """

    evaluation: Evaluation
    metrics: dict[str, Any]
    matches: Matches
    curves: dict[str, PrecisionRecall]
    errors: ErrorAnalysis
    diagnostics: list[Diagnostic]


@dataclass(frozen=True)
class Comparison:
    """How an evaluation compares with another one of the same images.

    Attributes:
        name: of the other evaluation.
        other: what ``average_precision`` returns for it.
        difference: the difference of the mAP, with its interval.
    """

    name: str
    other: Mapping[str, Any]
    difference: DifferenceResult


def analyze(evaluation: Evaluation) -> Analysis:
    """Compute everything that the report of an evaluation shows.

    The detections are matched once, and every measure takes these matches.

    Raises:
        ValueError: detections or ground truth that can't be matched, or no ground truth.
    """
    try:
        matches = evaluation.matches
    except ValueError as error:
        # Such numbers have no metrics, but a diagnostic may explain where they come from.
        broken = find_broken_numbers(evaluation.predictions, len(evaluation.class_names))
        reasons = [diagnostic.message for diagnostic in broken]
        raise ValueError("\n".join([str(error), *reasons])) from error
    metrics = score_matches(matches)
    curves, overall = precision_recall_curves(matches), precision_recall(matches)
    errors = analyze_errors(matches)
    interval = bootstrap_map(matches)
    diagnostics = find_diagnostics(
        evaluation.input_matches, evaluation.input_sizes or evaluation.image_sizes
    )
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
        confusion_matrix=confusion_matrix(matches, overall.best_f1_threshold or 0.0).tolist(),
        errors=errors.to_dict(),
        diagnostics=[diagnostic.message for diagnostic in diagnostics],
        coco=coco_metrics(matches) if find_spec("faster_coco_eval") is not None else None,
        devkit=_devkit_metrics(evaluation),
    )
    return Analysis(evaluation, metrics, matches, curves, errors, diagnostics)


def _devkit_metrics(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the average precision by the VOC devkit's rule, None where that is not known."""
    matches = evaluation.devkit_matches
    if matches is None:
        return None
    result = score_matches(matches)
    return {
        "mAP": result["mAP"],
        "mAP_11_point": score_matches(matches, "11-point")["mAP"],
        "AP": result["AP"],
        "num_difficult": int(matches.gt_difficult.sum()),
    }


def check_comparable(
    class_names: Sequence[str], names: Sequence[str], other: TextFormat, other_name: str
) -> None:
    """Check that another evaluation has the same images and classes, before this one is made.

    Args:
        class_names: the classes of this evaluation.
        names: what ``image_names`` returns for it.
        other: what ``read_text_format`` read of the other one.
        other_name: the name of the other one, for messages.

    Raises:
        ValueError: it has other images, or classes that this one lacks.
    """
    strangers = sorted(set(names) ^ set(other.image_names))
    if strangers:
        whose = "this evaluation" if strangers[0] in names else other_name
        raise ValueError(
            f"{other_name} has {len(other.image_names)} images and this evaluation {len(names)}; "
            f"{len(strangers)} are in only one of them, such as {strangers[0]} in {whose}. "
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
        other: what ``read_text_format`` read. Its boxes may be in pixels of another image size:
            they are scored in those of this evaluation. Its difficult objects are left out.
        other_name: the name of the other one, for messages and the report.

    Raises:
        ValueError: the other one has other images, objects or classes.
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
    for place_here, (name, target) in enumerate(zip(names, evaluation.targets, strict=True)):
        if target.get("difficult") is None:  # the course's rule here, so also there
            targets[place_here] = _ordinary(targets[place_here])
        if not _same_objects(target, targets[place_here]):
            raise ValueError(
                f"the ground truth of {name} in {other_name} has other objects than this "
                "evaluation; compare evaluations of the same data."
            )
        scale = _scale(target["boxes"], targets[place_here]["boxes"])
        found = predictions[place_here]
        predictions[place_here] = {**found, "boxes": found["boxes"] * scale}
    theirs = match_detections(predictions, evaluation.targets, evaluation.class_names)
    return Comparison(
        other_name, score_matches(theirs), bootstrap_difference(evaluation.matches, theirs)
    )


def _ordinary(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[~target["difficult"]] for name, values in target.items()}


def _scale(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return factors (4,) that bring boxes of their image to ours, by the objects of both.

    Without objects in the image they are 1: wherever a detection is, it is false.
    """
    factors = torch.ones(4, dtype=torch.float64)
    for axis in (0, 1):
        if len(ours) and theirs[:, axis::2].max() > 0:
            ratio = ours[:, axis::2].max().double() / theirs[:, axis::2].max()
            factors[axis::2] = ratio.cpu()
    return factors


def _same_objects(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether these are the same objects in the same order, in images of any two sizes."""
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
