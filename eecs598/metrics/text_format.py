"""Read and write a folder of text files: detections and ground truth of each image.

The format is that of the script https://github.com/Cartucho/mAP.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from eecs598.metrics.matching import check_class_names, gather_detections, gather_ground_truth
from eecs598.runtime import atomic_write, read_text

DETECTIONS_FOLDER = "detection-results"
GROUND_TRUTH_FOLDER = "ground-truth"

_MAX_NUMBER = 1e100  # the areas of larger boxes could overflow


class TextFormat(NamedTuple):
    """What a folder of text files holds, in the form that ``match_detections`` takes."""

    image_names: list[str]  # file names without ".txt", in the order of the images below
    predictions: list[dict[str, torch.Tensor]]  # boxes (K, 4) float64, labels, scores float64
    targets: list[dict[str, torch.Tensor]]  # boxes (M, 4) float64, labels, difficult
    class_names: list[str]  # those of the files, sorted


def read_text_format(folder: str | os.PathLike[str]) -> TextFormat:
    """Read a folder of text files, one pair of files per image.

    ``folder/ground-truth/NAME.txt`` has lines ``class x1 y1 x2 y2``, with ``difficult`` at the end
    for a difficult box; ``folder/detection-results/NAME.txt`` has ``class score x1 y1 x2 y2``.
    A class name may contain spaces, a file may be empty. Images come in the order of their sorted
    file names. An image without a file of detections counts as one without detections, and a
    warning says so.

    Args:
        folder: holds the two folders above, as ``write_text_format`` writes them.

    Returns:
        Names, predictions and targets of all images, and the classes. Numbers are float64, which
        keeps every digit of the files.

    Raises:
        ValueError: a missing folder, detections without a ground truth file, a malformed line,
            or files that are all empty.
    """
    return read_folder(Path(folder))


def read_folder(folder: Path) -> TextFormat:
    """Read as ``read_text_format``; a warning points at the caller of the public function."""
    gt_folder, detection_folder = folder / GROUND_TRUTH_FOLDER, folder / DETECTIONS_FOLDER
    files, detection_files = _list_text_files(gt_folder), _list_text_files(detection_folder)
    if not files:
        raise ValueError(f"{gt_folder} has no .txt file; write one for every image")
    strangers = sorted(set(detection_files) - set(files))
    if strangers:
        raise ValueError(
            f"{_enumerate(strangers)} in {detection_folder} without a file of that name in "
            f"{gt_folder}; write a ground truth file for every image (empty where it shows no "
            "object), or remove the detections of images that are not to be scored"
        )
    missing = sorted(set(files) - set(detection_files))
    if missing:
        warnings.warn(
            f"{_enumerate(missing)} missing in {detection_folder}: scored as images without "
            "detections, all their boxes missed",
            stacklevel=3,
        )

    gt_lines = _read_lines(gt_folder, files, with_score=False)
    detection_lines = _read_lines(detection_folder, files, with_score=True, skip=set(missing))
    names = sorted({*gt_lines.names, *detection_lines.names})
    if not names:
        raise ValueError(f"the {len(files)} images of {folder} have no ground truth box at all")
    index = {name: label for label, name in enumerate(names)}
    gt_values = np.array(gt_lines.values, dtype=np.float64).reshape(-1, 4)
    # Columns score, x1, y1, x2, y2.
    values = np.array(detection_lines.values, dtype=np.float64).reshape(-1, 5)
    targets = {
        "boxes": gt_values,
        "labels": np.array([index[name] for name in gt_lines.names], dtype=np.int64),
        "difficult": np.array(gt_lines.difficult, dtype=bool),
    }
    predictions = {
        "boxes": values[:, 1:],
        "labels": np.array([index[name] for name in detection_lines.names], dtype=np.int64),
        "scores": values[:, 0],
    }
    return TextFormat(
        [file.removesuffix(".txt") for file in files],
        _split_by_image(predictions, detection_lines.images, len(files)),
        _split_by_image(targets, gt_lines.images, len(files)),
        names,
    )


def write_text_format(
    folder: str | os.PathLike[str],
    name: str,
    prediction: Mapping[str, Any],
    target: Mapping[str, Any],
    class_names: Sequence[str],
) -> None:
    """Write the pair of files of one image, in the format that ``read_text_format`` reads.

    Numbers keep all their digits: a folder scores exactly as the tensors that it was written from,
    as long as the images have the order of their file names.

    Args:
        folder: where to write ``detection-results/NAME.txt`` and ``ground-truth/NAME.txt``; made
            if absent.
        name: the image's name, without a folder.
        prediction: ``boxes`` (K, 4), ``labels`` (K,), ``scores`` (K,); K may be 0.
        target: ``boxes`` (M, 4), ``labels`` (M,), optionally ``difficult`` (M,) bool; M may be 0.
        class_names: the C names; ``class_names[label]`` names a label.

    Raises:
        ValueError: input that is not as above, or names that the format cannot hold.
    """
    if not name or "\0" in name or Path(name).name != name:
        raise ValueError(f"the image name {name!r} cannot name a file; pass it without a folder")
    names = check_class_names(class_names)
    detections = gather_detections([prediction], len(names))
    ground_truth = gather_ground_truth([target], len(names))

    detection_lines = [
        f"{names[label]} {score!r} {_format_box(box)}\n"
        for label, score, box in zip(
            detections.label, detections.score.tolist(), detections.box.tolist(), strict=True
        )
    ]
    gt_lines = [
        f"{names[label]} {_format_box(box)}{' difficult' if difficult else ''}\n"
        for label, box, difficult in zip(
            ground_truth.label, ground_truth.box.tolist(), ground_truth.difficult, strict=True
        )
    ]
    for kind, lines in ((DETECTIONS_FOLDER, detection_lines), (GROUND_TRUTH_FOLDER, gt_lines)):
        with atomic_write(Path(folder) / kind / f"{name}.txt") as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8", newline="\n")


class _Lines(NamedTuple):
    """The lines of all files of a folder, in order."""

    images: list[int]
    names: list[str]
    values: list[float]  # the numbers of all lines, one line after the other
    difficult: list[bool]


def _list_text_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; scoring needs a folder that holds {GROUND_TRUTH_FOLDER}/ "
            f"and {DETECTIONS_FOLDER}/ with one .txt file per image in each"
        )
    names = (name for name in os.listdir(folder) if name.endswith(".txt"))
    # A killed process leaves what it began to write under a hidden name.
    return sorted(name for name in names if not name.startswith("."))


def _read_lines(
    folder: Path, files: list[str], with_score: bool, skip: Set[str] = frozenset()
) -> _Lines:
    lines = _Lines([], [], [], [])
    for image, file in enumerate(files):
        if file in skip:
            continue
        # Plain strings: building a Path for each of thousands of files costs as much as reading.
        path = os.path.join(folder, file)
        for number, line in enumerate(read_text(path).split("\n"), start=1):
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
            lines.values.extend(values)
            lines.difficult.append(difficult)
    return lines


def _parse_line(line: str, with_score: bool) -> tuple[str, list[float], bool]:
    """Split a line into class, numbers and difficult flag.

    It is split from the right, because the class name on the left may contain spaces.
    """
    difficult = False
    if not with_score:
        rest, *last = line.rsplit(None, 1)
        if last == ["difficult"]:
            line, difficult = rest, True
    name, *fields = line.rsplit(None, 5 if with_score else 4)
    values = [float(field) for field in fields]
    x1, y1, x2, y2 = values[-4:]  # too few fields fail here
    # The limit also refuses NaN and infinity. Python's numbers may have underscores.
    numbers = all(abs(value) < _MAX_NUMBER for value in values) and "_" not in "".join(fields)
    if len(values) != 4 + with_score or not numbers or x2 < x1 or y2 < y1:
        raise ValueError("not a box")
    return name, values, difficult


def _split_by_image(
    columns: dict[str, np.ndarray], images: list[int], num_images: int
) -> list[dict[str, torch.Tensor]]:
    """Cut the columns of all images, in image order, into one mapping per image."""
    sizes = np.bincount(np.array(images, dtype=np.int64), minlength=num_images).tolist()
    parts = (torch.from_numpy(column).split(sizes) for column in columns.values())
    return [dict(zip(columns, image, strict=True)) for image in zip(*parts, strict=True)]


def _format_box(box: list[float]) -> str:
    return " ".join(map(repr, box))


def _enumerate(files: list[str]) -> str:
    shown = ", ".join(files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} ({shown}{more})"
