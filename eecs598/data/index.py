"""The index of a data set: load VOC or COCO annotations in one format.

A data folder is COCO where an instances file is found (``coco.candidates`` says where) and
otherwise in VOC layout (``eecs598.data.voc``). Both give the same index::

    from eecs598.data import class_names, load_index

    classes = class_names("data/mine")
    image_path, objects = load_index("data/mine", "train")[0]
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from eecs598.data import coco, voc

__all__ = [
    "IGNORED",
    "Instance",
    "class_names",
    "data_layout",
    "load_index",
    "load_instances",
]

# The number of an image's first pixel in its annotation: VOC's corners are the first and the last
# pixel of an object, counted from 1; COCO's are edges, counted from 0.
_FIRST_PIXEL = {"voc": 1, "coco": 0}

# Stands for the class id of a box that is neither taught as an object nor as background.
IGNORED = -2.0


class Instance(NamedTuple):
    """One image of a data set, with all its objects.

    Attributes:
        path: of the image file, absolute.
        boxes: ``(M, 5)`` float32: x1, y1, x2, y2 in pixels of the annotated image, class id.
        difficult: ``(M,)`` bool: VOC's ``difficult``, COCO's ``iscrowd``. They come last.
        size: height and width of the annotated image, or None where the annotation has none.
        difficult_known: whether the annotation says which objects are difficult. The course's JSON
            index without the devkit's XML does not have them.
        first_pixel: what the annotation calls the first column and row of the image, 1 in VOC and 0
            in COCO. ``boxes`` are the annotation's own numbers, as the course's are.
    """

    path: Path
    boxes: Tensor
    difficult: Tensor
    size: tuple[int, int] | None = None
    difficult_known: bool = True
    first_pixel: int = 0

    @property
    def ordinary(self) -> Tensor:
        """The boxes that are not difficult: all that the course's index has."""
        return self.boxes[~self.difficult]

    @property
    def with_ignored(self) -> Instance:
        """The same image; objects that are difficult are ordinary ones of the class ``IGNORED``."""
        rows = self.boxes.clone()
        rows[self.difficult, 4] = IGNORED
        return self._replace(boxes=rows, difficult=torch.zeros_like(self.difficult))

    @property
    def with_edges(self) -> Instance:
        """The same image; boxes reach from edge to edge of their pixels, the first edge being 0."""
        offset = self.boxes.new_tensor([self.first_pixel, self.first_pixel, 0, 0, 0])
        return self._replace(boxes=self.boxes - offset, first_pixel=0)


def data_layout(
    root: str | os.PathLike[str], splits: Sequence[str] = ("train", "val")
) -> Literal["coco", "voc"]:
    """Return the layout in which ``root``, a folder or a COCO JSON file, has any of the splits.

    Raises:
        ValueError: it has none of them, or several COCO files for one split.
    """
    if any(coco.find_instances(root, split) is not None for split in splits):
        return "coco"
    if any(voc.has_split(root, split) for split in splits):
        return "voc"
    raise ValueError(_no_data_message(root, splits))


def _no_data_message(root: str | os.PathLike[str], splits: Sequence[str]) -> str:
    places = [str(path) for split in splits for path in coco.candidates(root, split)]
    message = f"no data in {root}. Looked for COCO instances as {', '.join(places)}: not there. "
    if Path(root).is_file():
        return message + "Put one of these files there, or give the folder of the data"
    try:
        voc.load_index(root, splits[0])
    except ValueError as error:
        message += f"VOC: {error}"
    return message


def load_index(root: str | os.PathLike[str], split: str) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Load one split, without difficult objects and crowd regions.

    Args:
        root: data folder, or a COCO JSON file.
        split: ``"train"``, ``"val"`` or any other.

    Returns:
        For each image its absolute path and its objects, each
        ``{"name": str, "xyxy": [x1, y1, x2, y2]}``, boxes as floats in pixels of the file.

    Raises:
        ValueError: there is no such split in either layout, an annotation is broken, or image
            files are missing.
    """
    layout = data_layout(root, (split,))
    return (coco if layout == "coco" else voc).load_index(root, split)


def load_instances(
    root: str | os.PathLike[str], split: str, classes: Sequence[str]
) -> list[Instance]:
    """Load one split as tensors, with difficult objects and crowd regions.

    Args:
        root: data folder, or a COCO JSON file.
        split: ``"train"``, ``"val"`` or any other.
        classes: class names in the order of their ids. Difficult objects of other classes are left
            out.

    Raises:
        ValueError: as ``load_index``, or the class of an object is not in ``classes``.
    """
    layout = data_layout(root, (split,))
    class_ids = {name: number for number, name in enumerate(classes)}
    instances: list[Instance] = []
    images = (coco if layout == "coco" else voc).load_annotations(root, split)
    if twice := [path for path, count in Counter(i.path for i in images).items() if count > 1]:
        raise ValueError(
            f"split {split!r} of {root} lists {len(twice)} images more than once, the first is "
            f"{twice[0]}. They would count more than once, in the mAP, too: list each image once, "
            "with all its objects"
        )
    for image in images:
        rows, difficult = [], []
        for item in sorted(image.objects, key=lambda item: item["difficult"]):
            if item["name"] in class_ids:
                rows.append([*item["xyxy"], class_ids[item["name"]]])
                difficult.append(item["difficult"])
            elif not item["difficult"]:
                raise ValueError(
                    f"{image.path.name} has an object of class {item['name']!r}, which is not in "
                    f"the list of classes {list(classes)}. Pass classes= with the names of the "
                    "data."
                )
        instances.append(
            Instance(
                image.path,
                torch.tensor(rows, dtype=torch.float32).reshape(-1, 5),
                torch.tensor(difficult, dtype=torch.bool),
                image.size,
                image.difficult_known,
                _FIRST_PIXEL[layout],
            )
        )
    return instances


def class_names(
    root: str | os.PathLike[str], splits: Sequence[str] = ("train", "val")
) -> list[str]:
    """Return the sorted names of all classes that occur in those of the ``splits`` that exist.

    Difficult objects and crowd regions count, too.

    Raises:
        ValueError: none of the splits exists, none has an object, or as ``load_index``.
    """
    layout = data_layout(root, splits)
    return (coco if layout == "coco" else voc).class_names(root, splits)
