"""The report of an evaluation as a page: one HTML file that needs no network and no server.

The page is made from the files in ``templates`` with Jinja; this module computes what they show.
Notebooks show the same figures with ``figures_html``.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from eecs598.data import read_image
from eecs598.metrics import Evaluation, PrecisionRecall
from eecs598.report.analysis import Analysis, Comparison
from eecs598.runtime import atomic_write

NUM_BINS = 20  # of the histogram of scores
# Square roots of areas, in pixels of the image as the detector saw it.
SIZE_EDGES = (0, 16, 32, 64, 96, 128, math.inf)
CURVE_POINTS = 100  # a small figure shows no more
MAX_MISTAKES = 400
MISTAKES_OF_ONE_SORT = 6  # kind and class
CROP_SIDE = 240  # longer side of a picture, in pixels
FALSE_KINDS = ("background", "class", "localization", "both", "duplicate")


def write_report(
    path: str | os.PathLike[str],
    analysis: Analysis,
    *,
    title: str,
    facts: Sequence[str] = (),
    footer: str = "",
    comparison: Comparison | None = None,
) -> None:
    """Write the report of an evaluation.

    Args:
        path: the HTML file to write.
        analysis: what ``analyze`` returned for the evaluation.
        title: the heading.
        facts: short phrases below the heading: data, settings, versions.
        footer: a sentence at the end, such as the command.
        comparison: what ``compare`` returned for another evaluation of the same images.
    """
    context = _figure_context(analysis)
    figures = _environment().get_template("figures.html")
    page = (
        _environment()
        .get_template("report.html")
        .render(
            **context,
            title=title,
            facts=facts,
            footer=footer,
            sections=_sections(analysis, comparison),
            metrics=analysis.metrics,
            diagnostics=analysis.metrics["diagnostics"],
            tiles=_tiles(analysis),
            comparison=comparison and _comparison_context(comparison, analysis.metrics),
            mistakes=_mistakes(analysis),
            figures=lambda: Markup(figures.render(**context)),
        )
    )
    with atomic_write(path) as unfinished:
        # File names may hold bytes that are not text.
        unfinished.write_text(page, encoding="utf-8", errors="replace")


def figures_html(analysis: Analysis) -> str:
    """Return the figures alone, with their style, to be shown in a notebook."""
    environment = _environment()
    figures = environment.get_template("figures.html").render(**_figure_context(analysis))
    style = environment.get_template("report.css").render()
    return f'<style>{style}</style><div class="fcos-report">{figures}</div>'


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eecs598.report"),
        # The style and the script are files of this project that hold no data.
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["points"] = lambda value: _signed(100 * value)
    return environment


def _percent(share: float | None, unit: str = " %") -> str:
    return "–" if share is None else f"{100 * share:.1f}{unit}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _sections(analysis: Analysis, comparison: Comparison | None) -> list[tuple[str, str]]:
    """Return what the navigation lists: anchor and name."""
    sections = [("warnings", "What looks wrong")] if analysis.diagnostics else []
    sections.append(("summary", "Summary"))
    if comparison:
        sections.append(("comparison", "Comparison"))
    return [
        *sections,
        ("classes", "Classes"),
        ("curves", "Precision and recall"),
        ("errors", "Errors"),
        ("scores", "Scores and sizes"),
        ("confusion", "Confusion"),
        ("mistakes", "Mistakes"),
    ]


def _tiles(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Return the headline numbers: name, value and a note."""
    metrics = analysis.metrics
    low, high = (100 * end for end in metrics["interval"])
    tiles = [
        (
            f"mAP at IoU {metrics['iou_threshold']:g}",
            _percent(metrics["mAP"]),
            f"95 % interval {low:.1f} to {high:.1f}; as in the course, without difficult objects",
        ),
        _devkit_tile(metrics["devkit"]),
        ("11-point mAP", _percent(metrics["mAP_11_point"]), "as in VOC 2007"),
    ]
    if metrics["coco"]:
        for key, name, note in (
            ("AP", "COCO AP", "IoU 0.5 to 0.95"),
            ("AP75", "COCO AP75", "IoU 0.75"),
            ("AR_100", "COCO recall", "IoU 0.5 to 0.95"),
        ):
            tiles.append((name, _percent(metrics["coco"][key]), note))
    if metrics["best_threshold"] is not None:
        note = f"of all classes, at scores of {metrics['best_threshold']:.2f} and more"
        tiles.append(("best F1", _percent(metrics["best_f1"]), note))
    tiles.append(("images", f"{metrics['num_images']:,}", ""))
    tiles.append(("objects", f"{sum(metrics['num_ground_truth'].values()):,}", ""))
    note = f"with scores above {metrics['score_thresh']:g}"
    tiles.append(("detections", f"{sum(metrics['num_detections'].values()):,}", note))
    return tiles


def _devkit_tile(devkit: Mapping[str, Any] | None) -> tuple[str, str, str]:
    name = "mAP by the devkit's rule"
    if devkit is None:
        return name, _percent(None), "it is not known which objects are difficult"
    note = f"a match to one of {devkit['num_difficult']:,} difficult objects counts neither way"
    return name, _percent(devkit["mAP"]), note


def _comparison_context(comparison: Comparison, metrics: Mapping[str, Any]) -> dict[str, Any]:
    result, other = comparison.difference, comparison.other
    low, high = result.low, result.high
    difference = _signed(100 * result.difference)
    verdict = (
        "0 is outside of the interval: the difference is more than the choice of images explains."
        if result.exceeds
        else "0 is inside the interval: with other images the difference could be the other way."
    )
    return {
        "name": comparison.name,
        "sentence": f"mAP {_percent(metrics['mAP'])} here and "
        f"{_percent(other['mAP'])} there: a difference of {difference} points, 95 % "
        f"interval {_signed(100 * low)} to {_signed(100 * high)} (bootstrap over the same images). "
        + verdict,
        "rows": [
            {"name": name, "this": ap, "other": other["AP"][name]}
            | {"difference": ap - other["AP"][name]}
            for name, ap in metrics["AP"].items()
        ],
    }


# --------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------


def _figure_context(analysis: Analysis) -> dict[str, Any]:
    metrics = analysis.metrics
    threshold = metrics["best_threshold"]
    return {
        "classes": _class_rows(analysis),
        "error_rows": _error_rows(analysis),
        "score_bins": _score_bins(analysis),
        "threshold": threshold,
        "score_thresh": f"{metrics['score_thresh']:g}",
        "threshold_text": "–" if threshold is None else f"{threshold:.2f}",
        "recall_by_size": _recall_by_size(analysis),
        "recall_by_level": _recall_by_level(analysis),
        "matrix_names": [*analysis.evaluation.class_names, "background"],
        "matrix": [
            [(int(count), count / max(1, sum(row))) for count in row]
            for row in metrics["confusion_matrix"]
        ],
    }


def _class_rows(analysis: Analysis) -> list[dict[str, Any]]:
    metrics, matches = analysis.metrics, analysis.matches
    shown = matches.score >= (metrics["best_threshold"] or 0.0)
    rows = []
    for label, name in enumerate(analysis.evaluation.class_names):
        curve = analysis.curves.get(name)
        of_class = shown & (matches.label == label)
        rows.append(
            {
                "name": name,
                "ap": metrics["AP"].get(name),
                "objects": metrics["num_ground_truth"][name],
                "true": int((of_class & matches.is_tp).sum()),
                "false": int((of_class & matches.is_fp).sum()),
                "f1": curve.best_f1 if curve else None,
                "threshold": curve.best_f1_threshold if curve else None,
                "curve": _curve(curve) if curve else None,
                "dot": _best_point(curve) if curve else None,
            }
        )
    return sorted(rows, key=lambda row: -1 if row["ap"] is None else row["ap"], reverse=True)


def _curve(curve: PrecisionRecall) -> list[tuple[float, float]]:
    """Return points of a curve of precision over recall, as many as a small figure can show."""
    if not len(curve.recall):
        return []
    recalls = np.linspace(curve.recall[0], curve.recall[-1], CURVE_POINTS)
    shown = np.unique(np.searchsorted(curve.recall, recalls).clip(max=len(curve.recall) - 1))
    return [(float(curve.recall[i]), float(curve.precision[i])) for i in shown]


def _best_point(curve: PrecisionRecall) -> tuple[float, float] | None:
    if curve.best_f1_threshold is None:
        return None
    best = int(np.flatnonzero(curve.scores == curve.best_f1_threshold)[-1])
    return float(curve.recall[best]), float(curve.precision[best])


def _error_rows(analysis: Analysis) -> list[tuple[str, float, str, str]]:
    gains, counts = analysis.errors.gains, analysis.errors.counts
    largest = max(1e-9, *gains.values())
    return [
        (kind, max(0.0, gain) / largest, f"{100 * gain:.1f} ({counts[kind]:,})", "bad")
        for kind, gain in gains.items()
    ]


def _score_bins(analysis: Analysis) -> list[tuple[int, int]]:
    """Return the numbers of true and of false positives in equal bins of the score."""
    matches = analysis.matches
    edges = np.linspace(0, 1, NUM_BINS + 1)
    true, _ = np.histogram(matches.score[matches.is_tp], edges)
    false, _ = np.histogram(matches.score[matches.is_fp], edges)
    return list(zip(true.tolist(), false.tolist(), strict=True))


def _recall_by_size(analysis: Analysis) -> list[tuple[str, float, str, str]]:
    boxes, found = _objects(analysis)
    sizes = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    rows = []
    for low, high in zip(SIZE_EDGES[:-1], SIZE_EDGES[1:], strict=True):
        name = f"{low} and more" if high == math.inf else f"{low} to {high}"
        rows += _recall_row(name, found[(sizes >= low) & (sizes < high)])
    return rows


def _recall_by_level(analysis: Analysis) -> list[tuple[str, float, str, str]]:
    """Group objects by the level that is responsible for a location at their center."""
    boxes, found = _objects(analysis)
    distance = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) / 2
    rows = []
    for name, (low, high) in analysis.evaluation.levels.items():
        rows += _recall_row(name, found[(distance >= low) & (distance < high)])
    return rows


def _recall_row(name: str, found: Tensor) -> list[tuple[str, float, str, str]]:
    if not len(found):
        return []
    recall = float(found.float().mean())
    return [(name, recall, f"{100 * recall:.0f} % of {len(found):,}", "good")]


def _objects(analysis: Analysis) -> tuple[Tensor, Tensor]:
    """Return the boxes (M, 4) of all objects as the detector saw them, and which are found (M,)."""
    matches = analysis.evaluation.input_matches
    counted = ~matches.gt_difficult
    boxes, found = matches.gt_box[counted], matches.gt_found[counted]
    return torch.from_numpy(boxes).float(), torch.from_numpy(found)


# --------------------------------------------------------------------------------------------
# Mistakes
# --------------------------------------------------------------------------------------------


def _mistakes(analysis: Analysis) -> list[dict[str, Any]]:
    """Return the most telling mistakes of each kind and class, each with a picture."""
    described = (_mistake(analysis, *which) for which in _telling_mistakes(analysis))
    return [mistake for mistake in described if mistake is not None]


def _telling_mistakes(analysis: Analysis) -> list[tuple[str, int]]:
    """Return kind and row of confident false positives and of large objects that are missed.

    The row is that of the detection, or of the ground truth box where it is missed. Mistakes are
    ranked by their score, or by the share of the image that the object fills.
    """
    matches, errors = analysis.matches, analysis.errors
    sides = matches.gt_box[:, 2:] - matches.gt_box[:, :2]
    image_areas = np.array([math.prod(size) for size in analysis.evaluation.image_sizes])
    shares = sides.prod(axis=1) / image_areas[matches.gt_image]
    sorts = [
        (kind, errors.kind == kind, matches.label, matches.score, matches.image, matches.index)
        for kind in FALSE_KINDS
    ]
    missed = errors.gt_missed
    sorts.append(("missed", missed, matches.gt_label, shares, matches.gt_image, matches.gt_index))
    ranked: list[tuple[int, float, str, int, int, int]] = []
    num_sorts = 0
    for kind, of_kind, labels, weights, images, indices in sorts:
        for label in np.unique(labels[of_kind]):
            rows = np.flatnonzero(of_kind & (labels == label))
            first = np.lexsort((-indices[rows], -images[rows], -weights[rows]))
            ranked += [
                (rank, -float(weights[row]), kind, int(images[row]), int(indices[row]), int(row))
                for rank, row in enumerate(rows[first[:MISTAKES_OF_ONE_SORT]])
            ]
            num_sorts += 1
    # The first of every kind and class, then all second ones: none crowds out the others.
    return [(kind, row) for _, _, kind, _, _, row in sorted(ranked)[: max(MAX_MISTAKES, num_sorts)]]


def _mistake(analysis: Analysis, kind: str, row: int) -> dict[str, Any] | None:
    """Return what the page says and shows of a mistake; None without a picture."""
    evaluation, matches = analysis.evaluation, analysis.matches
    missed = kind == "missed"
    image = int((matches.gt_image if missed else matches.image)[row])
    index = int((matches.gt_index if missed else matches.index)[row])
    found, target = evaluation.predictions[image], evaluation.targets[image]
    own, others = (target, found) if missed else (found, target)
    box, name = own["boxes"][index].float(), evaluation.class_names[int(own["labels"][index])]
    if missed:
        width, height = (box[2:] - box[:2]).tolist()
        text = f"{name}, {width:.0f} x {height:.0f} pixels"
    else:
        text = f"{name}, score {float(found['scores'][index]):.2f}"

    boxes = [("truth", gt_box) for gt_box in target["boxes"].float()]
    if not missed:
        boxes.append(("found", box))
    around = box
    # The box that the mistake refers to, and otherwise the one that overlaps most.
    overlaps = box_iou(box[None], others["boxes"].float())[0]
    matched_gt = -1 if missed else int(analysis.errors.matched_gt[row])
    partner = int(matches.gt_index[matched_gt]) if matched_gt >= 0 else -1
    if partner < 0 and len(overlaps) and overlaps.max() > 0:
        partner = int(overlaps.argmax())
    if partner >= 0:
        other = others["boxes"][partner].float()
        around = torch.cat([torch.minimum(box, other)[:2], torch.maximum(box, other)[2:]])
        other_name = evaluation.class_names[int(others["labels"][partner])]
        what = "nearest detection:" if missed else "on"
        text += f"; {what} {other_name}, IoU {float(overlaps[partner]):.2f}"
        if missed:
            boxes.append(("found", other))
    picture = _cut_out(evaluation, image, around, boxes)
    if picture is None:
        return None
    file = Path(evaluation.image_paths[image]).name
    return {**picture, "kind": kind, "class_name": name, "text": text, "image": file}


def _cut_out(
    evaluation: Evaluation, image: int, around: Tensor, boxes: Sequence[tuple[str, Tensor]]
) -> dict[str, Any] | None:
    """Return a JPEG of what is around a box, and the boxes in it; None without the file."""
    path, (height, width) = evaluation.image_paths[image], evaluation.image_sizes[image]
    try:
        whole = read_image(path, upright=False)
        if (whole.height > whole.width) != (height > width):  # turned by EXIF, as its boxes are
            whole = read_image(path)
    except ValueError:
        return None
    # Boxes may be in pixels of a resized image.
    scale = torch.tensor([whole.width / width, whole.height / height]).repeat(2)
    x1, y1, x2, y2 = (around * scale).tolist()
    margin = 0.25 * max(x2 - x1, y2 - y1) + 8
    # Ground truth may lie outside its image.
    left = min(max(0, math.floor(x1 - margin)), whole.width - 1)
    top = min(max(0, math.floor(y1 - margin)), whole.height - 1)
    right = max(left + 1, min(whole.width, math.ceil(x2 + margin)))
    bottom = max(top + 1, min(whole.height, math.ceil(y2 + margin)))
    zoom = min(1.0, CROP_SIDE / max(right - left, bottom - top))
    width, height = (max(1, round(side * zoom)) for side in (right - left, bottom - top))
    piece = whole.resize(
        (width, height), Image.Resampling.LANCZOS, (left, top, right, bottom), reducing_gap=2
    )
    stream = io.BytesIO()
    piece.save(stream, "JPEG", quality=82)
    drawn = []
    for kind, box in boxes:
        corners = (box * scale - torch.tensor([left, top]).repeat(2)) * zoom
        x1, y1, x2, y2 = corners.tolist()
        if x1 < width and y1 < height and x2 > 0 and y2 > 0:
            drawn.append((kind, *(round(value, 1) for value in (x1, y1, x2 - x1, y2 - y1))))
    jpeg = base64.b64encode(stream.getvalue()).decode("ascii")
    return {"jpeg": jpeg, "width": width, "height": height, "boxes": drawn}
