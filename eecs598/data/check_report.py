"""The report of a data set's check: its problems and numbers, and how they are shown as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "DataReport", "Problem", "SplitSummary", "format_problems", "format_report"]

# The kinds of problems: level, description, advice. An error stops training or teaches the detector
# something wrong; a warning may be intended. Reports keep this order.
KINDS = {
    "split": (
        "error",
        "splits that can't be read",
        "Training stops at them: add or repair the file.",
    ),
    "annotation": (
        "error",
        "annotations that can't be read",
        "Training stops at them: correct or remove each one. A file is read up to its first fault, "
        "so check again afterwards.",
    ),
    "missing": (
        "error",
        "image files that are missing",
        "Training stops at them: complete the images, or take them off the list.",
    ),
    "unreadable": (
        "error",
        "image files that can't be used",
        "Training stops at them: copy or download them again, or take them off the list.",
    ),
    "size": (
        "error",
        "images of another size than their annotation says",
        "Training stops at them: the boxes belong to a picture of another size. Use the images "
        "that were annotated, or correct the annotations.",
    ),
    "outside": (
        "error",
        "boxes that are completely outside the image",
        "Correct them; are the coordinates in pixels, x before y, and in COCO x, y, width, height?",
    ),
    "listed": (
        "error",
        "images that one split lists more than once",
        "Training stops at them: they would count more than once, in the mAP, too. List each image "
        "once, with all its objects.",
    ),
    "empty": (
        "error",
        "splits without any object",
        "There is nothing to learn or to measure: check that annotations and images belong "
        "together.",
    ),
    "unknown": (
        "error",
        "classes that only the later splits have",
        "They can't be learned and count as 0 in the mAP: correct the spelling, or add training "
        "images.",
    ),
    "flat": (
        "warning",
        "boxes without width or height",
        "No location is inside, so nothing is learned from them: correct or remove them.",
    ),
    "leaves": (
        "warning",
        "boxes that leave the image",
        "Training clips them. If there are many, are the boxes x, y, width, height in COCO and "
        "corners in VOC?",
    ),
    "unseen": (
        "warning",
        "classes with objects that are too small to be learned at this image size",
        "The detector has no location inside their boxes, so it learns nothing from them: train "
        "with a larger --image-size. If all are too small, are the coordinates in pixels?",
    ),
    "alike": (
        "warning",
        "class names that differ only in case, spaces or the way a character is written",
        "They are learned as different classes: if they are one, give them one name.",
    ),
    "orientation": (
        "warning",
        "photographs with an EXIF orientation",
        "The annotations do not say whether the boxes are for the pixels as they are stored, which "
        "is how training reads these files: look at one of them, or turn the files themselves, for "
        "example with ImageMagick's `mogrify -auto-orient`.",
    ),
    "twice": (
        "warning",
        "boxes given more than once",
        "The same class and corners in one image: remove all but one.",
    ),
    "shared": (
        "warning",
        "image files that another split has, too, byte for byte",
        "Validation is then measured on what was trained on: keep each image in one split.",
    ),
}


@dataclass
class SplitSummary:
    """Numbers of one split, without difficult objects and crowd regions.

    Attributes:
        images: number of images on the split's list.
        images_without_objects: number of images that show background only.
        objects: number of objects.
        objects_per_class: number of objects of each class, by name.
        most_objects: largest number of objects in one image.
        fullest_image: the image that has them.
        box_size: square root of the box area in pixels of the file, quantiles 0, 25, 50, 75 and
            100 %; empty where there is no box.
        box_size_resized: the same in images resized to a shorter side of
            ``DataReport.image_size``.
        shorter_side: of the image files that could be decoded, the same quantiles.
        longer_side: likewise.
    """

    images: int = 0
    images_without_objects: int = 0
    objects: int = 0
    objects_per_class: dict[str, int] = field(default_factory=dict)
    most_objects: int = 0
    fullest_image: str = ""
    box_size: list[float] = field(default_factory=list)
    box_size_resized: list[float] = field(default_factory=list)
    shorter_side: list[float] = field(default_factory=list)
    longer_side: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Problem:
    """All problems of one kind.

    Attributes:
        level: ``"error"`` (training stops or learns something wrong) or ``"warning"``.
        kind: a short, stable name such as ``"missing"``.
        description: what is wrong, in words.
        advice: what to do about it.
        count: how many images, boxes, classes or records.
        examples: the first few, each beginning with the file.
    """

    level: str
    kind: str
    description: str
    advice: str
    count: int
    examples: list[str]


@dataclass(frozen=True)
class DataReport:
    """The result of ``check_data``.

    Attributes:
        root: the data folder or COCO JSON file.
        layout: ``"coco"`` or ``"voc"``.
        image_size: shorter side in pixels of resized images.
        splits: summary of each split that could be read.
        problems: errors first.
    """

    root: str
    layout: str
    image_size: int
    splits: dict[str, SplitSummary]
    problems: list[Problem]

    @property
    def has_errors(self) -> bool:
        """Whether there is a problem of level ``"error"``."""
        return any(problem.level == "error" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return {**asdict(self), "has_errors": self.has_errors}


def format_report(report: DataReport) -> str:
    """Format a report for a terminal: a table, the problems, and a verdict in one line."""
    lines = [f"{report.root} ({report.layout.upper()} layout)", *_table(report)]
    for problem in report.problems:
        lines += ["", format_problems([problem])]
    return "\n".join([*lines, "", _verdict(report)])


def format_problems(problems: Iterable[Problem]) -> str:
    """Format problems for a terminal: what is wrong, examples, advice."""
    lines = []
    for problem in problems:
        lines.append(f"{problem.level.upper()}: {problem.description} ({problem.count})")
        lines += [f"    {example}" for example in problem.examples]
        if problem.count > len(problem.examples):
            lines.append(f"    and {problem.count - len(problem.examples)} more")
        lines.append(f"  {problem.advice}")
    return "\n".join(lines)


def _table(report: DataReport) -> list[str]:
    summaries = report.splits.values()
    rows: list[tuple[str, list[Any]]] = [
        ("", list(report.splits)),
        ("images", [s.images for s in summaries]),
        ("  without objects", [s.images_without_objects for s in summaries]),
        ("objects", [s.objects for s in summaries]),
        ("  in the fullest image", [s.most_objects for s in summaries]),
        ("    which is", [Path(s.fullest_image).name or "-" for s in summaries]),
        ("pixels: min 25% 50% 75% max", ["" for _ in summaries]),
        ("  shorter side", [_numbers(s.shorter_side) for s in summaries]),
        ("  longer side", [_numbers(s.longer_side) for s in summaries]),
        ("  box, root of its area", [_numbers(s.box_size) for s in summaries]),
        (f"  box, image at {report.image_size}", [_numbers(s.box_size_resized) for s in summaries]),
        ("objects per class", ["" for _ in summaries]),
    ]
    for name in sorted({name for s in summaries for name in s.objects_per_class}):
        rows.append((f"  {name}", [s.objects_per_class.get(name, 0) for s in summaries]))
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(str(row[1][i])) for row in rows) for i in range(len(summaries))]
    return [
        "  ".join(
            [
                f"{label:<{label_width}}",
                *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)),
            ]
        ).rstrip()
        for label, cells in rows
    ]


def _numbers(quantiles: list[float]) -> str:
    return " ".join(f"{value:.0f}" for value in quantiles) or "-"


def _verdict(report: DataReport) -> str:
    levels = Counter(problem.level for problem in report.problems)
    if not levels:
        return "Good: nothing wrong was found."
    counts = ", ".join(
        f"{levels[level]} kind{'s' * (levels[level] > 1)} of {level}" for level in sorted(levels)
    )
    if report.has_errors:
        return f"Not ready: {counts}. Repair the errors before training."
    return f"Usable: {counts}. Look at them, then train."
