"""COCO: read annotation files (instances_*.json) into the index that ``voc.py`` gives, too.

Format: Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312, and
https://cocodataset.org/#format-data. These parts of the JSON file are read::

    "images"       id, file_name, and width and height where they are given
    "categories"   id, name
    "annotations"  image_id, category_id, bbox = [x, y, width, height], iscrowd

Boxes become XYXY in pixels of the image file. Regions with ``iscrowd: 1`` are treated like VOC's
difficult objects. Ids may be any whole numbers::

    from eecs598.data import load_index

    image_path, objects = load_index("data/coco", "train")[0]
"""

from __future__ import annotations

import glob
import os
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from eecs598.data.annotation import ImageAnnotation
from eecs598.runtime import read_json

__all__ = [
    "candidates",
    "class_names",
    "find_instances",
    "load_annotations",
    "load_index",
    "read_split",
]

# Words for a split in file and folder names; "valid" is what Roboflow writes.
_ALIASES = {"val": ("val", "valid", "validation")}
_SPLIT_WORDS = ("train", "val", "valid", "validation", "test")


# ---------------------------------------------------------------------------------------
# Finding the files
# ---------------------------------------------------------------------------------------


def find_instances(root: str | os.PathLike[str], split: str) -> Path | None:
    """Find the instances file of a split; return None where there is none.

    Raises:
        ValueError: ``root/annotations`` has several files for the split, or ``root`` is a JSON file
            and neither its name nor that of its folder has the word for a split.
    """
    return next((path for path in candidates(root, split) if path.is_file()), None)


def candidates(root: str | os.PathLike[str], split: str) -> list[Path]:
    """List the paths at which the instances file of a split is looked for, in this order.

    - ``root/annotations/instances_{split}.json``, or the only ``instances_{split}*.json`` there, as
      in ``instances_train2017.json``;
    - ``root/{split}/_annotations.coco.json``;
    - where ``root`` is a JSON file itself: that file, or its name and that of its folder with the
      word for its split replaced by the word for ``split``.

    The split "val" may also be called "valid" or "validation".

    Raises:
        ValueError: as ``find_instances``.
    """
    root = Path(os.path.abspath(root))
    if root.is_file():
        return _siblings(root, split)
    folder = root / "annotations"
    exact = folder / f"instances_{split}.json"
    # A letter would make it another word: instances_trainval.json is not the split "train".
    similar = [
        path
        for path in sorted(folder.glob(f"instances_{glob.escape(split)}*.json"))
        if not path.name.removeprefix(f"instances_{split}")[0].isalpha()
    ]
    if len(similar) > 1 and exact not in similar:
        raise ValueError(
            f"{folder} has several files for the split {split!r}: "
            f"{', '.join(path.name for path in similar)}. Give one of them as the data, or name it "
            f"{exact.name}"
        )
    exported = [root / word / "_annotations.coco.json" for word in _words(split)]
    return list(dict.fromkeys([exact, *similar, *exported]))


def _words(split: str) -> tuple[str, ...]:
    return _ALIASES.get(split, (split,))


def _siblings(path: Path, split: str) -> list[Path]:
    """List the file itself if it is that of the split, or the paths that its name suggests."""
    known = sorted({*_SPLIT_WORDS, split}, key=len, reverse=True)
    words = "|".join(map(re.escape, known))
    in_name = re.compile(f"(?<![A-Za-z])({words})(?![A-Za-z])")
    in_folder = re.compile(f"^({words})(?=[0-9]*$)")  # train, train2017, but not train_of_thought
    found = in_name.search(path.stem) or in_folder.search(path.parent.name)
    if found is None:
        raise ValueError(
            f"{path}: neither the name of the file nor that of its folder says which split it is. "
            f"Expected one of the words {', '.join(known)}, as in instances_train.json; rename it"
        )
    if found[1] in _words(split):
        return [path]
    places = []
    for other in _words(split):
        name = in_name.sub(other, path.stem) + path.suffix
        folder = path.parent.parent / in_folder.sub(other, path.parent.name)
        places += [folder / name, path.parent / name]
    return [place for place in dict.fromkeys(places) if place != path]


def _image_folders(root: Path, path: Path, split: str) -> list[Path]:
    """List the folders that ``file_name`` may be relative to, in the order of the search."""
    if root.is_file():
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
    names = ("images", path.stem.removeprefix("instances_"), *_words(split))
    return list(dict.fromkeys([path.parent, root, *(root / name for name in names)]))


# ---------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------


def load_index(root: str | os.PathLike[str], split: str) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Load one split, without crowd regions.

    Returns:
        For each image, in the file's order, its absolute path and its objects, each
        ``{"name": str, "xyxy": [x1, y1, x2, y2]}``, boxes as floats in pixels of the file. An image
        without objects has an empty list.

    Raises:
        ValueError: as ``load_annotations``.
    """
    return [(image.path, image.ordinary) for image in load_annotations(root, split)]


def load_annotations(root: str | os.PathLike[str], split: str) -> list[ImageAnnotation]:
    """Load one split, with crowd regions and image sizes.

    ``file_name`` is relative to the first of these folders that has the image: that of the JSON
    file, ``root``, ``root/images``, ``root/X`` where the file is ``instances_X.json``,
    ``root/{split}``. Forward and backward slashes both separate folders.

    Returns:
        The images in the file's order, boxes as floats in pixels of the file.

    Raises:
        ValueError: there is no such split, the file is broken, or image files are missing.
    """
    path = _require_instances(root, split)
    images = read_split(root, split)
    missing = [image.path for image in images if not os.path.isfile(image.path)]
    if missing:
        folders = _image_folders(Path(os.path.abspath(root)), path, split)
        raise ValueError(
            f"{path}: {len(missing)} of the {len(images)} image files are missing, the first is "
            f"{missing[0]}. Complete the images; file_name may be relative to "
            f"{', '.join(map(str, folders))}"
        )
    return images


def class_names(
    root: str | os.PathLike[str], splits: Sequence[str] = ("train", "val")
) -> list[str]:
    """Return the sorted names of the categories that occur in those of the ``splits`` that exist.

    Crowd regions count, too, as difficult objects do in VOC.

    Raises:
        ValueError: none of the splits exists, none has an annotation, or as ``load_index``.
    """
    present = [split for split in splits if find_instances(root, split) is not None]
    names = {
        item["name"]
        for split in present
        for image in read_split(root, split)
        for item in image.objects
    }
    if not names:
        raise ValueError(
            f"no annotations in {root}. Splits looked for: {', '.join(splits)}; found: "
            f"{', '.join(present) or 'none'}. Give another folder or other splits"
        )
    return sorted(names)


def read_split(
    root: str | os.PathLike[str], split: str, *, problems: list[str] | None = None
) -> list[ImageAnnotation]:
    """Read the instances file of a split; image files may be missing.

    Args:
        root: data folder or JSON file, see ``candidates``.
        split: "train", "val" or any other.
        problems: where given, a record that is wrong is left out and its description added here,
            in place of an error.

    Raises:
        ValueError: there is no such split, the file is no instances file, or a record is wrong.
    """
    path = _require_instances(root, split)
    images = _read_instances(path, problems)
    folders = _image_folders(Path(os.path.abspath(root)), path, split)
    # Where a few images are missing, the folder is that of the first one that exists.
    folder = next(
        (folder for image in images for folder in folders if os.path.isfile(folder / image.path)),
        folders[0],
    )
    for image in images:
        image.path = Path(os.path.normpath(folder / image.path))
    return images


def _require_instances(root: str | os.PathLike[str], split: str) -> Path:
    path = find_instances(root, split)
    if path is None:
        looked = ", ".join(map(str, candidates(root, split)))
        raise ValueError(f"no COCO instances of split {split!r}. Looked for {looked}: not there")
    return path


# ---------------------------------------------------------------------------------------
# The JSON file
# ---------------------------------------------------------------------------------------


def _read_instances(path: Path, problems: list[str] | None) -> list[ImageAnnotation]:
    """Read the images with their objects, in the file's order, paths as in ``file_name``."""
    document = _read_json(path)
    names: dict[int, str] = {}
    images: dict[int, ImageAnnotation] = {}
    for where, record in _records(path, document, "categories"):
        with _noted(problems):
            name = _get(record, "name", str, where).strip()
            if not name or name in names.values():
                raise ValueError(
                    f"{where}: name {name!r}, expected one that is not empty and not taken; merge "
                    "the categories or rename one"
                )
            names[_new_id(record, names, where)] = name
    for where, record in _records(path, document, "images"):
        with _noted(problems):
            file_name = _get(record, "file_name", str, where).replace("\\", "/")
            size = record.get("height"), record.get("width")
            given = all(type(side) is int and side > 0 for side in size)
            image_id = _new_id(record, images, where)
            images[image_id] = ImageAnnotation(Path(file_name), size=size if given else None)
    for where, record in _records(path, document, "annotations"):
        with _noted(problems):
            image = _look_up(images, record, "image_id", "images", where)
            image.objects.append(_read_object(record, names, where))
    if not images:
        raise ValueError(f'{path} has no images; expected at least one in its list "images"')
    return list(images.values())


def _read_json(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise ValueError(
            f"{path} holds {reprlib.repr(document)}; expected a COCO instances file, an object "
            "with images, annotations and categories. Export the data as COCO instances"
        )
    return document


def _records(path: Path, document: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """Yield each entry of one of the document's lists, after its place for messages."""
    records = document.get(key)
    if not isinstance(records, list):
        given = reprlib.repr(records) if key in document else f"only {', '.join(document) or '{}'}"
        raise ValueError(
            f"{path} has no list {key!r}, but {given}; expected images, annotations and "
            "categories. Export the data as COCO instances"
        )
    for number, record in enumerate(records):
        yield f"{path}, {key}[{number}]", record


@contextmanager
def _noted(problems: list[str] | None) -> Iterator[None]:
    """Add a ValueError's message to the problems, or raise it where there is no list."""
    try:
        yield
    except ValueError as error:
        if problems is None:
            raise
        problems.append(str(error))


def _get(record: Any, key: str, kind: type, where: str) -> Any:
    """Return ``record[key]``, or raise ValueError where it is missing or of another type."""
    if not isinstance(record, dict) or key not in record:
        raise ValueError(
            f"{where} is {reprlib.repr(record)}, without {key!r}; add it or remove the entry"
        )
    if type(record[key]) is not kind:  # True is an int for Python
        kinds = {int: "a whole number", str: "a text", list: "a list"}
        raise ValueError(
            f"{where}: {key!r} is {reprlib.repr(record[key])}, expected {kinds[kind]}; correct it "
            "or remove the entry"
        )
    return record[key]


def _new_id(record: dict[str, Any], taken: dict[int, Any], where: str) -> int:
    """Return the id of a record, which must differ from those of the records before."""
    number = _get(record, "id", int, where)
    if number in taken:
        raise ValueError(f"{where}: the id {number} is taken; give every entry an id of its own")
    return number


def _look_up(known: dict[int, Any], record: Any, key: str, listed: str, where: str) -> Any:
    """Return the entry of the list ``listed`` to whose id ``record[key]`` refers."""
    number = _get(record, key, int, where)
    if number not in known:
        raise ValueError(
            f"{where}: {key} {number} is not in {listed!r}, which has {len(known)} ids, the first "
            f"{list(islice(known, 3))}; correct it or remove the entry"
        )
    return known[number]


def _read_object(record: dict[str, Any], names: dict[int, str], where: str) -> dict[str, Any]:
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{where}: iscrowd is {reprlib.repr(crowd)}, expected 0 or 1; correct it")
    return {
        "name": _look_up(names, record, "category_id", "categories", where),
        "xyxy": _read_box(_get(record, "bbox", list, where), where),
        "difficult": bool(crowd),
    }


def _read_box(bbox: list[Any], where: str) -> list[float]:
    """Convert x, y, width and height to XYXY; as in VOC, a width or height of 0 is allowed."""
    # The limit also refuses NaN, infinity and integers that are too large for a float.
    numbers = all(type(value) in (int, float) and abs(value) < 1e9 for value in bbox)
    if len(bbox) != 4 or not numbers or bbox[2] < 0 or bbox[3] < 0:
        raise ValueError(
            f"{where}: bbox {reprlib.repr(bbox)}, expected x, y, width and height in pixels, four "
            "finite numbers, the last two not negative; correct it or remove the entry"
        )
    x, y, width, height = map(float, bbox)
    return [x, y, x + width, y + height]
