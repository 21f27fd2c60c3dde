"""Check of a data set before training: every problem with its count, examples and advice.

Every image is decoded, or only its header is read, and every box is compared with it. A problem
does not end the check::

    from eecs598.data import check_data, format_report

    print(format_report(check_data("data/mine")))
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from eecs598.data import coco, voc
from eecs598.data.check_report import KINDS, DataReport, Problem, SplitSummary
from eecs598.data.images import (
    orientation_of,
    read_header,
    read_image,
    resized_size,
    shows_upright,
)
from eecs598.data.index import data_layout
from eecs598.data.locations import Level, hold_location

__all__ = ["check_data"]

# How far a box may leave the image, in pixels of the file: rounding, and counting from 0 or from 1.
OVERHANG = 1.0
EXAMPLES = 3  # files shown for each problem
# Times the image size: where it is counted how many objects would hold a location.
LARGER = (1.5, 2, 3, 4)


def check_data(
    root: str | os.PathLike[str],
    splits: Sequence[str] = ("train", "val"),
    *,
    image_size: int = 224,
    levels: Sequence[Level] = (),
    decode: bool = True,
    progress: bool = True,
) -> DataReport:
    """Read all annotations and all images of a data set.

    Args:
        root: folder in VOC layout or with COCO instances, or a COCO JSON file.
        splits: to check; the first is the one to be trained on.
        image_size: shorter side in pixels that training will resize images to.
        levels: where the detector predicts, to find the objects of the first split in which it
            has no location. Without any, they are not looked for.
        decode: decode all images. Otherwise only their headers are read, which takes less than a
            second for 5,000 images, but finds no damaged pixels and no images that two splits have.
        progress: show a progress bar while images are decoded.

    Raises:
        ValueError: ``root`` has none of the splits. Problems inside are reported, not raised.
    """
    if not splits:
        raise ValueError("no splits to check were given; expected names such as train and val")
    layout = data_layout(root, splits)
    found = _Findings(Path(os.path.abspath(root)))
    read = {"coco": _read_coco, "voc": _read_voc}[layout]
    summaries: dict[str, SplitSummary] = {}
    names: dict[str, tuple[int, str]] = {}  # class -> how often, and the first image
    first_split: dict[bytes, tuple[str, str]] = {}  # digest -> split and name of the first image
    for split in splits:
        try:
            entries = read(found, split)
        except ValueError as error:
            found.add("split", str(error))
            continue
        files = _read_files(entries, split, progress) if decode else _read_headers(entries)
        _check_listed(found, entries, split)
        for entry, file in zip(entries, files, strict=True):
            _check_image(found, entry, file)
            _check_boxes(found, entry, file.size or entry.size)
            _check_shared(found, entry, file, split, first_split)
        summaries[split] = _summarize(found, entries, files, image_size)
        if not summaries[split].objects:
            found.add("empty", split)
        _count_names(found, entries, names)
        if split == splits[0] and levels:
            _check_unseen(found, entries, files, image_size, levels)
    _check_classes(found, summaries, splits)
    _check_names(found, names)
    return DataReport(str(root), layout, image_size, summaries, found.problems())


# ---------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------


@dataclass
class _Entry:
    """One image as its annotation describes it: all objects, and those that count."""

    path: Path
    all_objects: list[dict[str, Any]] = field(default_factory=list)
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.objects = [item for item in self.all_objects if not item["difficult"]]


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
        self.examples: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def add(self, kind: str, example: str, limit: int | None = EXAMPLES) -> None:
        self.counts[kind] += 1
        if limit is None or len(self.examples[kind]) < limit:
            self.examples[kind].append(example)

    def name(self, path: Path) -> str:
        folder = self.root.parent if self.root.is_file() else self.root
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)

    def problems(self) -> list[Problem]:
        return [
            Problem(level, kind, description, advice, self.counts[kind], self.examples[kind])
            for kind, (level, description, advice) in KINDS.items()
            if self.counts[kind]
        ]


def _read_coco(found: _Findings, split: str) -> list[_Entry]:
    faults: list[str] = []
    images = coco.read_split(found.root, split, problems=faults)
    for fault in faults:
        found.add("annotation", fault)
    return [_Entry(image.path, image.objects, image.size) for image in images]


def _read_voc(found: _Findings, split: str) -> list[_Entry]:
    # The course's index comes first, as in training.
    if voc.index_path(found.root, split).is_file():
        images = voc.load_annotations(found.root, split, require_images=False)
        return [_Entry(image.path, image.objects, image.size) for image in images]
    entries = []
    for annotation, path in voc.list_files(found.root, split):
        try:
            entries.append(_Entry(path, *voc.read_annotation(annotation)))
        except ValueError as error:
            found.add("annotation", str(error))
            entries.append(_Entry(path))
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
        return _File(fault=("unreadable", _reason(error)))
    return _File((image.height, image.width), orientation_of(image), digest)


def _read_headers(entries: list[_Entry]) -> list[_File]:
    return [_read_header(entry) for entry in entries]


def _read_header(entry: _Entry) -> _File:
    try:
        return _File(*read_header(entry.path, entry.size))
    except ValueError as error:
        if not os.path.isfile(entry.path):
            return _File(fault=("missing", "missing"))
        return _File(fault=("unreadable", _reason(error)))


def _reason(error: Exception) -> str:
    return str(error).split(" can't be read as an image: ")[-1]


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


def _check_listed(found: _Findings, entries: list[_Entry], split: str) -> None:
    for path, count in Counter(entry.path for entry in entries).items():
        if count > 1:
            found.add("listed", f"{found.name(path)}: {count} times in {split}")


def _check_boxes(found: _Findings, entry: _Entry, size: tuple[int, int] | None) -> None:
    seen = set()
    for item in entry.objects:
        kind = _box_fault(item["xyxy"], size)
        if kind is not None:
            found.add(kind, _describe(found, entry, item, size))
        key = item["name"], *item["xyxy"]
        if key in seen:
            found.add("twice", _describe(found, entry, item, None))
        seen.add(key)


def _box_fault(box: list[float], size: tuple[int, int] | None) -> str | None:
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


def _count_names(
    found: _Findings, entries: list[_Entry], names: dict[str, tuple[int, str]]
) -> None:
    for entry in entries:
        for item in entry.all_objects:
            count, first = names.get(item["name"]) or (0, found.name(entry.path))
            names[item["name"]] = count + 1, first


def _check_names(found: _Findings, names: dict[str, tuple[int, str]]) -> None:
    """Look for names that become equal without spaces, case and ways to write one character."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        key = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        alike.setdefault(key, []).append(name)
    for group in alike.values():
        if len(group) > 1:
            words = (f"{name!r} {names[name][0]} times, as in {names[name][1]}" for name in group)
            found.add("alike", "; ".join(words))


def _check_unseen(
    found: _Findings,
    entries: list[_Entry],
    files: list[_File],
    image_size: int,
    levels: Sequence[Level],
) -> None:
    """Count the objects of each class without a location, at the image size and at larger ones."""
    rows = [
        (*item["xyxy"], *size, item["name"])
        for entry, file in zip(entries, files, strict=True)
        if (size := file.size or entry.size) is not None
        for item in entry.objects
        if _box_fault(item["xyxy"], size) not in ("flat", "outside")
    ]
    if not rows:
        return
    *columns, names = zip(*rows, strict=True)
    table = np.array(columns, dtype=np.float64).T
    boxes, originals = table[:, :4], table[:, 4:]  # (M, 4) XYXY, (M, 2) height and width
    unseen = {}  # image size -> (M,) bool
    for side in (image_size, *(round(image_size * factor) for factor in LARGER)):
        resized = np.array([resized_size(int(h), int(w), side) for h, w in originals])
        scale = np.tile((resized / originals)[:, ::-1], 2)
        unseen[side] = ~hold_location(
            np.clip(boxes * scale, 0, np.tile(resized[:, ::-1], 2)), levels
        )
    labels = np.array(names)
    for name in sorted(set(names)):
        counts = {side: int(flags[labels == name].sum()) for side, flags in unseen.items()}
        if counts[image_size]:
            larger = ", ".join(f"{n} at {side}" for side, n in list(counts.items())[1:])
            total = (labels == name).sum()
            found.add(
                "unseen",
                f"{name}: {counts[image_size]} of {total} at {image_size} px; {larger}",
                limit=None,
            )


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
