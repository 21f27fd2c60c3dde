"""Check of a data set before training: every problem with its count, examples and advice.

Every image is decoded and every box is compared with it. A problem does not end the check::

    from eecs598.data import check_data, format_report

    print(format_report(check_data("data/mine")))
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from eecs598.data import coco, voc
from eecs598.data.images import orientation_of, read_image, shows_upright
from eecs598.data.index import data_layout

__all__ = ["DataReport", "Problem", "SplitSummary", "check_data", "format_report"]

# In pixels of the resized image: half a stride of level p3. Most likely no location is inside a box
# with a shorter side than this.
TINY_SIDE = 4.0
# How far a box may leave the image, in pixels of the file: rounding, and counting from 0 or from 1.
OVERHANG = 1.0
EXAMPLES = 3  # files shown for each problem

# The kinds of problems: level, description, advice. An error stops training or teaches the detector
# something wrong; a warning may be intended. Reports keep this order.
_KINDS = {
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
        "image files that can't be decoded",
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
    "tiny": (
        "warning",
        "tiny boxes",
        "They can hardly be found: train with larger images, or mark them as difficult. If all are "
        "tiny, are the coordinates in pixels?",
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


def check_data(
    root: str | os.PathLike[str],
    splits: Sequence[str] = ("train", "val"),
    *,
    image_size: int = 224,
    progress: bool = True,
) -> DataReport:
    """Read all annotations and decode all images of a data set.

    Args:
        root: folder in VOC layout or with COCO instances, or a COCO JSON file.
        splits: to check; the first is the one to be trained on.
        image_size: shorter side in pixels that training will resize images to.
        progress: show a progress bar.

    Raises:
        ValueError: ``root`` has none of the splits. Problems inside are reported, not raised.
    """
    if not splits:
        raise ValueError("no splits to check were given; expected names such as train and val")
    layout = data_layout(root, splits)
    found = _Findings(Path(os.path.abspath(root)))
    read = {"coco": _read_coco, "voc": _read_voc}[layout]
    summaries: dict[str, SplitSummary] = {}
    first_split: dict[bytes, tuple[str, str]] = {}  # digest -> split and name of the first image
    for split in splits:
        try:
            entries = read(found, split)
        except ValueError as error:
            found.add("split", str(error))
            continue
        files = _read_files(entries, split, progress)
        for entry, file in zip(entries, files, strict=True):
            _check_image(found, entry, file)
            _check_boxes(found, entry, file.size or entry.size, image_size)
            _check_shared(found, entry, file, split, first_split)
        summaries[split] = _summarize(found, entries, files, image_size)
        if not summaries[split].objects:
            found.add("empty", split)
    _check_classes(found, summaries, splits)
    return DataReport(str(root), layout, image_size, summaries, found.problems())


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """One image as its annotation describes it."""

    path: Path
    objects: list[dict[str, Any]]
    size: tuple[int, int] | None


@dataclass
class _File:
    """One image file: its size and EXIF orientation, or why it can't be read.

    The size is at first that of the stored pixels, then that of the picture that the boxes are for.
    """

    size: tuple[int, int] | None = None
    orientation: int = 1
    digest: bytes | None = None
    fault: tuple[str, str] | None = None  # kind, reason


class _Findings:
    """The problems found so far, by kind, with file names relative to the data folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {kind: [] for kind in _KINDS}

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(example)

    def name(self, path: Path) -> str:
        folder = self.root.parent if self.root.is_file() else self.root
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)

    def problems(self) -> list[Problem]:
        return [
            Problem(level, kind, description, advice, self.counts[kind], self.examples[kind])
            for kind, (level, description, advice) in _KINDS.items()
            if self.counts[kind]
        ]


def _read_coco(found: _Findings, split: str) -> list[_Entry]:
    faults: list[str] = []
    images = coco.read_split(found.root, split, problems=faults)
    for fault in faults:
        found.add("annotation", fault)
    return [
        _Entry(image.path, [item for item in image.objects if not item["difficult"]], image.size)
        for image in images
    ]


def _read_voc(found: _Findings, split: str) -> list[_Entry]:
    # The course's index comes first, as in training.
    if voc.index_path(found.root, split).is_file():
        images = voc.load_annotations(found.root, split, require_images=False)
        return [
            _Entry(image.path, [o for o in image.objects if not o["difficult"]], image.size)
            for image in images
        ]
    entries = []
    for annotation, image in voc.list_files(found.root, split):
        entry = _Entry(image, [], None)
        entries.append(entry)
        try:
            objects, entry.size = voc.read_annotation(annotation)
            entry.objects = [item for item in objects if not item["difficult"]]
        except ValueError as error:
            found.add("annotation", str(error))
    return entries


def _read_files(entries: list[_Entry], split: str, progress: bool) -> list[_File]:
    # Decoding releases the interpreter lock, so threads share the work.
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        files = pool.imap(_read_file, [entry.path for entry in entries], chunksize=8)
        bar = tqdm(files, desc=split, total=len(entries), unit="image", disable=not progress)
        return list(bar)


def _read_file(path: Path) -> _File:
    if not os.path.isfile(path):
        return _File(fault=("missing", "missing"))
    try:
        image = read_image(path, upright=False)
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except (ValueError, OSError) as error:
        return _File(fault=("unreadable", str(error).split(" can't be read as an image: ")[-1]))
    return _File((image.height, image.width), orientation_of(image), digest)


# ---------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------


def _check_image(found: _Findings, entry: _Entry, file: _File) -> None:
    name = found.name(entry.path)
    if file.fault is not None:
        kind, reason = file.fault
        found.add(kind, f"{name}: {reason}")
    if file.size is None:
        return
    stored = file.size
    try:
        if shows_upright(entry.path, stored, file.orientation, entry.size):
            file.size = entry.size
            return
    except ValueError:
        assert entry.size is not None  # an image without one is never refused
        sizes = f"{_by(stored)} in the file, {_by(entry.size)} in the annotation"
        found.add("size", f"{name}: {sizes}")
        return
    if file.orientation in range(2, 9):
        # A size that would differ in the turned image shows that the boxes are for the stored one.
        is_clear = file.orientation >= 5 and stored[0] != stored[1]
        if entry.size is None or not is_clear:
            found.add("orientation", f"{name}: orientation {file.orientation}")


def _by(size: tuple[int, int]) -> str:
    height, width = size
    return f"{width} x {height}"


def _check_boxes(
    found: _Findings, entry: _Entry, size: tuple[int, int] | None, image_size: int
) -> None:
    seen = set()
    for item in entry.objects:
        kind = _box_fault(item["xyxy"], size, image_size)
        if kind is not None:
            found.add(kind, _describe(found, entry, item, size))
        key = item["name"], *item["xyxy"]
        if key in seen:
            found.add("twice", _describe(found, entry, item, None))
        seen.add(key)


def _box_fault(box: list[float], size: tuple[int, int] | None, image_size: int) -> str | None:
    """Return the kind of the worst problem of a box, or None."""
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        return "flat"
    if size is None:
        return None
    height, width = size
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        return "outside"
    if min(x1, y1) < -OVERHANG or x2 > width + OVERHANG or y2 > height + OVERHANG:
        return "leaves"
    if min(x2 - x1, y2 - y1) * image_size / min(size) < TINY_SIDE:
        return "tiny"
    return None


def _describe(
    found: _Findings, entry: _Entry, item: dict[str, Any], size: tuple[int, int] | None
) -> str:
    corners = ", ".join(f"{value:g}" for value in item["xyxy"])
    of_image = f" in {_by(size)}" if size else ""
    return f"{found.name(entry.path)}: {item['name']} [{corners}]{of_image}"


def _check_shared(
    found: _Findings,
    entry: _Entry,
    file: _File,
    split: str,
    first_split: dict[bytes, tuple[str, str]],
) -> None:
    if file.digest is None:
        return
    name = found.name(entry.path)
    other_split, other = first_split.setdefault(file.digest, (split, name))
    if other_split != split:
        found.add("shared", f"{name} of {split} is {other} of {other_split}")


def _check_classes(
    found: _Findings, summaries: dict[str, SplitSummary], splits: Sequence[str]
) -> None:
    if splits[0] not in summaries:
        return
    trained = summaries[splits[0]].objects_per_class
    for split, summary in summaries.items():
        for name, count in summary.objects_per_class.items():
            if name not in trained:
                found.add("unknown", f"{name!r}, {count} times in {split}, never in {splits[0]}")


# ---------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------


def _summarize(
    found: _Findings, entries: list[_Entry], files: list[_File], image_size: int
) -> SplitSummary:
    counts = Counter(item["name"] for entry in entries for item in entry.objects)
    fullest = max(entries, key=lambda entry: len(entry.objects))
    sizes = [file.size for file in files if file.size is not None]
    return SplitSummary(
        images=len(entries),
        images_without_objects=sum(not entry.objects for entry in entries),
        objects=counts.total(),
        objects_per_class=dict(sorted(counts.items())),
        most_objects=len(fullest.objects),
        fullest_image=found.name(fullest.path) if fullest.objects else "",
        box_size=_quantiles(_box_sizes(entries)),
        box_size_resized=_quantiles(
            box_size * image_size / min(file.size)
            for entry, file in zip(entries, files, strict=True)
            if file.size is not None
            for box_size in _box_sizes([entry])
        ),
        shorter_side=_quantiles(map(min, sizes)),
        longer_side=_quantiles(map(max, sizes)),
    )


def _box_sizes(entries: list[_Entry]) -> Iterator[float]:
    for entry in entries:
        for item in entry.objects:
            x1, y1, x2, y2 = item["xyxy"]
            yield ((x2 - x1) * (y2 - y1)) ** 0.5


def _quantiles(values: Iterable[float]) -> list[float]:
    """Return minimum, quartiles and maximum, rounded to a tenth of a pixel."""
    numbers = list(values)
    return np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]).round(1).tolist() if numbers else []


# ---------------------------------------------------------------------------------------
# Report as text
# ---------------------------------------------------------------------------------------


def format_report(report: DataReport) -> str:
    """Format a report for a terminal: a table, the problems, and a verdict in one line."""
    lines = [f"{report.root} ({report.layout.upper()} layout)", *_table(report)]
    for problem in report.problems:
        lines += ["", f"{problem.level.upper()}: {problem.description} ({problem.count})"]
        lines += [f"    {example}" for example in problem.examples]
        if problem.count > len(problem.examples):
            lines.append(f"    and {problem.count - len(problem.examples)} more")
        lines.append(f"  {problem.advice}")
    return "\n".join([*lines, "", _verdict(report)])


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
