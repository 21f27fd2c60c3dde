"""The one door for data, whichever way its annotations are written down.

A data folder is COCO where an instances file is found (`coco.candidates` says where) and
otherwise in VOC layout (`eecs598.data.voc`). Both give the same index.

    from eecs598.data.index import class_names, load_index

    classes = class_names("data/mine")
    image_path, objects = load_index("data/mine", "train")[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from eecs598.data import coco, voc

__all__ = ["class_names", "data_layout", "load_index"]


def data_layout(
    root: str | Path, splits: Sequence[str] = ("train", "val")
) -> Literal["coco", "voc"]:
    """The layout in which `root`, a folder or a COCO JSON file, has any of the splits.

    Raises:
        ValueError: it has none of them, or several COCO files for one split.
    """
    if any(coco.find_instances(root, split) is not None for split in splits):
        return "coco"
    if any(voc.has_split(root, split) for split in splits):
        return "voc"
    raise ValueError(_nothing_there(root, splits))


def _nothing_there(root: str | Path, splits: Sequence[str]) -> str:
    places = [str(path) for split in splits for path in coco.candidates(root, split)]
    message = f"no data in {root}. Looked for COCO instances as {', '.join(places)}: not there. "
    if Path(root).is_file():
        return message + "Put one of these files there, or give the folder of the data"
    try:
        voc.load_index(root, splits[0])
    except ValueError as error:
        message += f"VOC: {error}"
    return message


def load_index(root: str | Path, split: str) -> list[tuple[Path, list[dict]]]:
    """Loads one split, without difficult objects and crowd regions.

    Returns:
        (absolute image path, `[{"name": str, "xyxy": [x1, y1, x2, y2]}, ...]`) for each image,
        boxes as floats in pixels.

    Raises:
        ValueError: there is no such split in either layout, or as the layout's own `load_index`.
    """
    layout = data_layout(root, (split,))
    return (coco if layout == "coco" else voc).load_index(root, split)


def class_names(root: str | Path, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Sorted names of all classes that occur in those of the `splits` that exist.

    Raises:
        ValueError: none of the splits exists, none has an object, or as `load_index`.
    """
    layout = data_layout(root, splits)
    return (coco if layout == "coco" else voc).class_names(root, splits)
