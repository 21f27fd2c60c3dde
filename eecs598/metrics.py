"""Average precision of object detections, from tensors or from a folder of text files.

The definition is that of the VOC 2010+ development kit (Everingham et al., "The Pascal Visual
Object Classes Challenge: A Retrospective", IJCV 2015) as the script https://github.com/Cartucho/mAP
applies it to text files:

- detections are taken by falling score; equal scores in image order, then in the order given;
- each takes the ground truth of its image and class that it overlaps most, of several equal ones
  the first; widths and heights count inclusive pixels, ``x2 - x1 + 1``;
- with an overlap (IoU) of at least the threshold it is a true positive if no earlier detection took
  that box, and otherwise a false positive; if the box is difficult it counts neither way;
- difficult boxes are not in the total that recall is measured against;
- average precision (AP) is the area under the precision envelope over all points;
- mAP is the mean over the classes that have ground truth that is not difficult.

Symbols: K detections, M ground truth boxes, C classes, P pairs of a detection and a ground truth
box of its image and class. Boxes are XYXY in pixels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from eecs598.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DETECTIONS_FOLDER = "detection-results"
GROUND_TRUTH_FOLDER = "ground-truth"


class _Detections(NamedTuple):
    """All detections of a data set, image after image."""

    images: np.ndarray  # (K,) int64
    labels: np.ndarray  # (K,) int64
    boxes: np.ndarray  # (K, 4) float64
    scores: np.ndarray  # (K,) float64


class _GroundTruth(NamedTuple):
    """All ground truth boxes of a data set, image after image."""

    images: np.ndarray  # (M,) int64
    labels: np.ndarray  # (M,) int64
    boxes: np.ndarray  # (M, 4) float64
    difficult: np.ndarray  # (M,) bool


def average_precision(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> dict[str, Any]:
    """Score the detections of a data set against its ground truth.

    Args:
        predictions: one mapping an image, of tensors or arrays ``boxes`` (K, 4) XYXY in pixels,
            ``labels`` (K,) in 0..C-1 and ``scores`` (K,). An image without detections has K = 0.
        targets: one mapping an image, in the same order: ``boxes`` (M, 4), ``labels`` (M,) and,
            where known, ``difficult`` (M,) bool. No padding.
        class_names: the C names; ``class_names[label]`` names a label.
        iou_threshold: the least overlap of a true positive, in 0..1.

    Returns:
        Plain numbers, ready for JSON. Precisions are fractions; ``AP`` has the classes with ground
        truth that is not difficult, the counts have every class; ``num_ground_truth`` leaves out
        difficult boxes, and detections that match one are in ``num_detections`` alone::

            {"mAP": 0.75, "AP": {"cat": 0.5, "dog": 1.0}, "iou_threshold": 0.5, "num_images": 2,
             "num_ground_truth": {...}, "num_detections": {...},
             "true_positives": {...}, "false_positives": {...}}

    Raises:
        ValueError: for input that is not as above, or with no ground truth to score against.

    Example:
        >>> boxes = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
        >>> labels = torch.tensor([0])
        >>> predictions = [{"boxes": boxes, "labels": labels, "scores": torch.tensor([0.9])}]
        >>> average_precision(predictions, [{"boxes": boxes, "labels": labels}], ["cat"])["mAP"]
        1.0
    """
    _check_threshold(iou_threshold)
    names = _check_class_names(class_names)
    if len(predictions) != len(targets):
        raise ValueError(
            f"got predictions of {len(predictions)} images and targets of {len(targets)}; "
            "pass one of each for every image, in the same order"
        )
    detections = _gather_detections(predictions, len(names))
    ground_truth = _gather_ground_truth(targets, len(names))
    return _score(detections, ground_truth, names, len(targets), iou_threshold)


def score_folder(folder: str | os.PathLike[str], iou_threshold: float = 0.5) -> dict[str, Any]:
    """Score a folder of text files, one pair of files an image.

    ``folder/ground-truth/NAME.txt`` has lines ``class x1 y1 x2 y2``, with ``difficult`` at the end
    for a difficult box; ``folder/detection-results/NAME.txt`` has ``class score x1 y1 x2 y2``.
    A class name may contain spaces, a file may be empty. Images come in the order of their sorted
    file names. An image without a file of detections counts as one without detections, and a
    warning says so.

    Args:
        folder: holds the two folders above; :func:`write_text_format` writes such a folder.
        iou_threshold: the least overlap of a true positive, in 0..1.

    Returns:
        What :func:`average_precision` returns; the classes are those of the files, sorted by name.

    Raises:
        ValueError: for a missing folder, detections without a ground truth file, a malformed line,
            or no ground truth to score against.
    """
    _check_threshold(iou_threshold)
    folder = Path(folder)
    truth_folder, detection_folder = folder / GROUND_TRUTH_FOLDER, folder / DETECTIONS_FOLDER
    files, detection_files = _list_text_files(truth_folder), _list_text_files(detection_folder)
    if not files:
        raise ValueError(f"{truth_folder} has no .txt file; write one for every image")
    strangers = sorted(set(detection_files) - set(files))
    if strangers:
        raise ValueError(
            f"{_enumerate(strangers)} in {detection_folder} without a file of that name in "
            f"{truth_folder}; write a ground truth file for every image (empty where it shows no "
            "object), or remove the detections of images that are not to be scored"
        )
    missing = sorted(set(files) - set(detection_files))
    if missing:
        warnings.warn(
            f"{_enumerate(missing)} missing in {detection_folder}: scored as images without "
            "detections, all their boxes missed",
            stacklevel=2,
        )

    truths = _read_folder(truth_folder, files, with_score=False)
    found = _read_folder(detection_folder, files, with_score=True, skip=set(missing))
    names = sorted({*truths.names, *found.names})
    index = {name: label for label, name in enumerate(names)}
    ground_truth = _GroundTruth(
        images=np.array(truths.images, dtype=np.int64),
        labels=np.array([index[name] for name in truths.names], dtype=np.int64),
        boxes=np.array(truths.values, dtype=np.float64).reshape(-1, 4),
        difficult=np.array(truths.difficult, dtype=bool),
    )
    values = np.array(found.values, dtype=np.float64).reshape(-1, 5)  # score, x1, y1, x2, y2
    detections = _Detections(
        images=np.array(found.images, dtype=np.int64),
        labels=np.array([index[name] for name in found.names], dtype=np.int64),
        boxes=values[:, 1:],
        scores=values[:, 0],
    )
    return _score(detections, ground_truth, names, len(files), iou_threshold)


def write_text_format(
    folder: str | os.PathLike[str],
    name: str,
    prediction: Mapping[str, Any],
    target: Mapping[str, Any],
    class_names: Sequence[str],
) -> None:
    """Write the pair of files of one image, in the format that :func:`score_folder` reads.

    Numbers keep all their digits, so that a folder scores exactly as the tensors it was written
    from, as long as the images have the order of their file names.

    Args:
        folder: gets ``detection-results/NAME.txt`` and ``ground-truth/NAME.txt``; made if absent.
        name: the image's name, without a folder.
        prediction: ``boxes`` (K, 4), ``labels`` (K,), ``scores`` (K,); K may be 0.
        target: ``boxes`` (M, 4), ``labels`` (M,), optionally ``difficult`` (M,) bool; M may be 0.
        class_names: the C names; ``class_names[label]`` names a label.

    Raises:
        ValueError: for input that is not as above, or names that the format cannot hold.
    """
    if not name or "\0" in name or Path(name).name != name:
        raise ValueError(f"the image name {name!r} cannot name a file; pass it without a folder")
    names = _check_class_names(class_names)
    detections = _gather_detections([prediction], len(names))
    ground_truth = _gather_ground_truth([target], len(names))

    detection_lines = [
        f"{names[label]} {score!r} {_format_box(box)}\n"
        for label, score, box in zip(
            detections.labels, detections.scores.tolist(), detections.boxes.tolist(), strict=True
        )
    ]
    truth_lines = [
        f"{names[label]} {_format_box(box)}{' difficult' if difficult else ''}\n"
        for label, box, difficult in zip(
            ground_truth.labels, ground_truth.boxes.tolist(), ground_truth.difficult, strict=True
        )
    ]
    for kind, lines in ((DETECTIONS_FOLDER, detection_lines), (GROUND_TRUTH_FOLDER, truth_lines)):
        with replacing(Path(folder) / kind / f"{name}.txt") as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8", newline="\n")


def format_table(result: Mapping[str, Any]) -> str:
    """Lay out a result of :func:`average_precision` or :func:`score_folder` for a terminal.

    One line a class: AP in percent, and the numbers of ground truth boxes, true positives and
    false positives. The last line is the mAP.
    """
    last = f"mAP@{result['iou_threshold']:g}"
    width = max(len(name) for name in [*result["AP"], last])
    lines = [f"{'class':<{width}}  {'AP %':>6}  {'boxes':>6}  {'true':>6}  {'false':>6}"]
    for name, ap in result["AP"].items():
        columns = ("num_ground_truth", "true_positives", "false_positives")
        counts = "".join(f"  {result[column][name]:>6}" for column in columns)
        lines.append(f"{name:<{width}}  {100 * ap:>6.2f}{counts}")
    lines.append(f"{last:<{width}}  {100 * result['mAP']:>6.2f}")
    return "\n".join(lines)


def plot_average_precision(
    result: Mapping[str, Any], path: str | os.PathLike[str] | None = None
) -> Axes:
    """Draw the AP of every class as horizontal bars, best on top, with the mAP in the title.

    Args:
        result: what :func:`average_precision` or :func:`score_folder` returned.
        path: where to save the figure; its suffix chooses the format. A saved figure does not go
            through pyplot and so needs no display. Without a path, pyplot shows the figure as
            usual (a notebook draws it below the cell).

    Returns:
        The axes.
    """
    ranked = sorted(result["AP"].items(), key=lambda item: item[1], reverse=True)
    percent = [100 * ap for _, ap in ranked]
    size = (7.0, 1.3 + 0.27 * len(ranked))  # inches: bars keep their height
    if path is None:
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=size, layout="constrained")
    else:
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")

    axes = figure.add_subplot()
    bars = axes.barh(range(len(ranked)), percent, height=0.72, color="#3b76af")
    axes.bar_label(bars, [f"{value:.1f}" for value in percent], padding=4, fontsize=9)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)  # best on top
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"average precision at IoU {result['iou_threshold']:g} (%)")
    axes.set_title(f"mAP {100 * result['mAP']:.1f} %", fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    if path is not None:
        with replacing(path) as unfinished:
            figure.savefig(unfinished, dpi=150, format=Path(path).suffix[1:] or "png")
    return axes


def _score(
    detections: _Detections,
    ground_truth: _GroundTruth,
    names: list[str],
    num_images: int,
    iou_threshold: float,
) -> dict[str, Any]:
    num_classes = len(names)
    totals = _count(ground_truth.labels[~ground_truth.difficult], num_classes)
    scored = np.flatnonzero(totals)
    if not len(scored):
        raise ValueError(
            f"the {num_images} images have no ground truth box that is not difficult, so average "
            "precision is not defined; check that the right annotations were given"
        )
    by_score = np.argsort(-detections.scores, kind="stable")
    detections = _Detections(*(column[by_score] for column in detections))
    best, match = _best_overlaps(detections, ground_truth, num_classes)

    matched = best >= iou_threshold
    ignored = matched & ground_truth.difficult[match]
    claims = np.flatnonzero(matched & ~ignored)
    # Detections are sorted, so the first claim of a box is the one with the highest score.
    _, first_claims = np.unique(match[claims], return_index=True)
    true = np.zeros(len(matched), dtype=bool)
    true[claims[first_claims]] = True
    false = ~true & ~ignored

    ap = {}
    for label in scored:
        of_class = (detections.labels == label) & ~ignored
        ap[names[label]] = _area_under_envelope(true[of_class], int(totals[label]))
    counts = {
        "num_ground_truth": totals,
        "num_detections": _count(detections.labels, num_classes),
        "true_positives": _count(detections.labels[true], num_classes),
        "false_positives": _count(detections.labels[false], num_classes),
    }
    return {
        "mAP": math.fsum(ap.values()) / len(ap),
        "AP": ap,
        "iou_threshold": float(iou_threshold),
        "num_images": num_images,
        **{key: dict(zip(names, value.tolist(), strict=True)) for key, value in counts.items()},
    }


def _best_overlaps(
    detections: _Detections, ground_truth: _GroundTruth, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The overlap (K,) of each detection with the box it overlaps most, and that box's index (K,).

    Both are -1 where the image has no box of the class.
    """
    # With the ground truth sorted by image and class, a detection's candidates are one slice, and
    # a stable sort leaves them in the order of the file.
    truth_keys = ground_truth.images * num_classes + ground_truth.labels
    truth_order = np.argsort(truth_keys, kind="stable")
    truth_keys = truth_keys[truth_order]
    keys = detections.images * num_classes + detections.labels
    first = np.searchsorted(truth_keys, keys, side="left")  # (K,)
    counts = np.searchsorted(truth_keys, keys, side="right") - first  # (K,)

    starts = np.cumsum(counts) - counts  # (K,) each detection's first pair
    pair_detection = np.repeat(np.arange(len(keys)), counts)  # (P,)
    pairs = np.arange(len(pair_detection))
    pair_truth = truth_order[pairs - np.repeat(starts - first, counts)]  # (P,)
    overlaps = _overlaps(detections.boxes[pair_detection], ground_truth.boxes[pair_truth])

    best = np.full(len(keys), -1.0)
    match = np.full(len(keys), -1)
    some = counts > 0  # reduceat knows no empty slices
    best[some] = np.maximum.reduceat(overlaps, starts[some])
    winners = np.where(overlaps == best[pair_detection], pairs, len(pairs))
    match[some] = pair_truth[np.minimum.reduceat(winners, starts[some])]
    return best, match


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of box i with other i, in inclusive pixels: (P, 4), (P, 4) -> (P,); -1 where disjoint."""
    top_left = np.maximum(boxes[:, :2], others[:, :2])
    bottom_right = np.minimum(boxes[:, 2:], others[:, 2:])
    width, height = (bottom_right - top_left + 1).T
    intersection = width * height
    union = _areas(boxes) + _areas(others) - intersection
    # Two negative sides have a positive product, so both signs are looked at.
    overlapping = (width > 0) & (height > 0)
    return np.divide(intersection, union, out=np.full(len(boxes), -1.0), where=overlapping)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _area_under_envelope(true: np.ndarray, total: int) -> float:
    """AP of one class from its true positives (K,), by falling score, among ``total`` boxes."""
    precision = np.cumsum(true) / np.arange(1, len(true) + 1)
    # The envelope: the best precision at this recall or any higher one.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall grows by 1 / total at each true positive and nowhere else.
    return float(envelope[true].sum() / total)


def _count(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels, minlength=num_classes)


def _gather_detections(predictions: Sequence[Mapping[str, Any]], num_classes: int) -> _Detections:
    images, labels, boxes = _gather_boxes(predictions, "predictions", ("scores",), num_classes)
    scores = _concatenate([prediction["scores"] for prediction in predictions])
    scores = scores.astype(np.float64, copy=False)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise ValueError(
            f"predictions[{images[wrong[0]]}] has a score {scores[wrong[0]]}; scores must be "
            "finite: look for NaN in the network's output"
        )
    return _Detections(images, labels, boxes, scores)


def _gather_ground_truth(targets: Sequence[Mapping[str, Any]], num_classes: int) -> _GroundTruth:
    images, labels, boxes = _gather_boxes(targets, "targets", (), num_classes)
    difficult = np.zeros(len(images), dtype=bool)
    flagged = np.array([target.get("difficult") is not None for target in targets], dtype=bool)
    if flagged.any():
        flags = [targets[index]["difficult"] for index in np.flatnonzero(flagged)]
        difficult[flagged[images]] = _concatenate(flags)
    return _GroundTruth(images, labels, boxes, difficult)


def _gather_boxes(
    items: Sequence[Mapping[str, Any]], what: str, more_keys: tuple[str, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the shapes and values of all images, join them: image index, labels, boxes."""
    sizes = [_check_shapes(item, f"{what}[{index}]", more_keys) for index, item in enumerate(items)]
    images = np.repeat(np.arange(len(items)), np.array(sizes, dtype=np.int64))

    given = _concatenate([item["labels"] for item in items])
    with np.errstate(invalid="ignore"):  # NaN is reported below
        labels = given.astype(np.int64)
    wrong = np.flatnonzero((labels != given) | (labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the label {given[wrong[0]]}, expected whole numbers "
            f"0..{num_classes - 1} for {num_classes} class names; remove padding (-1) and check "
            "that the class names are those of the data"
        )
    boxes = _concatenate([item["boxes"] for item in items]).astype(np.float64, copy=False)
    boxes = boxes.reshape(-1, 4)
    good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] >= boxes[:, :2]).all(axis=1)
    wrong = np.flatnonzero(~good)
    if len(wrong):
        raise ValueError(
            f"{what}[{images[wrong[0]]}] has the box {boxes[wrong[0]].tolist()}, expected finite "
            "x1, y1, x2, y2 with x1 <= x2 and y1 <= y2; convert boxes of another form first"
        )
    return images, labels, boxes


def _check_shapes(item: Mapping[str, Any], what: str, more_keys: tuple[str, ...]) -> int:
    """The number of boxes of one image, once its columns are known to fit together."""
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{what} must be a mapping with boxes and labels, got {type(item).__name__}"
        )
    keys = ["boxes", "labels", *more_keys]
    if item.get("difficult") is not None:
        keys.append("difficult")
    for key in keys:
        if not isinstance(item.get(key), torch.Tensor | np.ndarray):
            raise ValueError(
                f"{what}[{key!r}] must be a tensor or an array, got {type(item.get(key)).__name__}"
            )
    shape = tuple(item["boxes"].shape)
    if len(shape) != 2 or shape[1] != 4:
        raise ValueError(f"{what}['boxes'] must have shape (number of boxes, 4), got {shape}")
    for key in keys[1:]:
        if item[key].shape != shape[:1]:
            raise ValueError(
                f"{what}[{key!r}] must have shape {shape[:1]} to go with boxes of shape {shape}, "
                f"got {tuple(item[key].shape)}"
            )
    return shape[0]


def _concatenate(parts: list[Any]) -> np.ndarray:
    """Join the tensors or arrays of all images at once: one conversion, one transfer from a GPU."""
    if not parts:
        return np.empty(0)
    if all(isinstance(part, torch.Tensor) for part in parts):
        return _to_array(torch.cat(parts))
    return np.concatenate([_to_array(part) for part in parts])


def _to_array(value: Any) -> np.ndarray:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    # NumPy has no bfloat16; float64 holds every smaller type exactly.
    return (value.double() if value.is_floating_point() else value).numpy()


def _check_threshold(iou_threshold: float) -> None:
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in 0..1, got {iou_threshold}")


def _check_class_names(class_names: Sequence[str]) -> list[str]:
    names = [] if isinstance(class_names, str | Mapping) else list(class_names)
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a list of names, one for a label, got {class_names}")
    for name in names:
        # What the text format would not give back: the reader strips lines and splits on newlines.
        if not name or name != name.strip() or "\n" in name:
            raise ValueError(
                f"the class name {name!r} is empty, begins or ends with a space, or has a line "
                "break; choose another name"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"class_names has a name twice: {names}; every label needs its own")
    return names


class _Lines(NamedTuple):
    """The lines of all files of a folder, in order."""

    images: list[int]
    names: list[str]
    values: list[list[float]]
    difficult: list[bool]


def _list_text_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; scoring needs a folder that holds {GROUND_TRUTH_FOLDER}/ "
            f"and {DETECTIONS_FOLDER}/ with one .txt file an image in each"
        )
    return sorted(name for name in os.listdir(folder) if name.endswith(".txt"))


def _read_folder(
    folder: Path, files: list[str], with_score: bool, skip: set[str] = frozenset()
) -> _Lines:
    lines = _Lines([], [], [], [])
    for image, file in enumerate(files):
        if file in skip:
            continue
        # Plain strings: building a Path for each of thousands of files costs as much as reading.
        path = os.path.join(folder, file)
        with open(path, "rb") as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file in UTF-8; save it as one") from error
        for number, line in enumerate(text.split("\n"), start=1):
            line = line.strip()
            if not line:
                continue
            try:
                name, values, difficult = _parse_line(line, with_score)
            except ValueError as error:
                form = "class score x1 y1 x2 y2" if with_score else "class x1 y1 x2 y2 [difficult]"
                raise ValueError(
                    f"{path}, line {number}: {line!r} must have the form '{form}', in finite "
                    "numbers with x1 <= x2 and y1 <= y2; correct or remove the line"
                ) from error
            lines.images.append(image)
            lines.names.append(name)
            lines.values.append(values)
            lines.difficult.append(difficult)
    return lines


def _parse_line(line: str, with_score: bool) -> tuple[str, list[float], bool]:
    """Split a line from the right, because the class name on its left may contain spaces."""
    difficult = False
    if not with_score:
        rest, *last = line.rsplit(None, 1)
        if last == ["difficult"]:
            line, difficult = rest, True
    name, *fields = line.rsplit(None, 5 if with_score else 4)
    values = [float(field) for field in fields]
    x1, y1, x2, y2 = values[-4:]  # too few fields fail here
    if len(values) != 4 + with_score or not all(map(math.isfinite, values)) or x2 < x1 or y2 < y1:
        raise ValueError("not a box")
    return name, values, difficult


def _format_box(box: list[float]) -> str:
    return " ".join(map(repr, box))


def _enumerate(files: list[str]) -> str:
    shown = ", ".join(files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} ({shown}{more})"
