"""A small VOC devkit, written by hand."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

# (name, box, difficult) of each image
OBJECTS = {
    "000001": [("dog", (1, 2, 30, 40), 0), ("cat", (5.5, 6.5, 7.5, 8.5), 1)],
    "000002": [("car", (3, 3, 9, 9), 0)],
    "000003": [("bird", (1, 1, 4, 4), 1)],
}
SPLITS = {"train": ["000001", "000002"], "val": ["000003"]}
TRAIN_INDEX = [
    ["./here/VOCdevkit/VOC2007/JPEGImages/000001.jpg", [{"name": "dog", "xyxy": [1, 2, 30, 40]}]],
    ["./here/VOCdevkit/VOC2007/JPEGImages/000002.jpg", [{"name": "car", "xyxy": [3, 3, 9, 9]}]],
]


def box_xml(box) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    return "<bndbox>" + "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags) + "</bndbox>"


def object_xml(name, box, difficult) -> str:
    # The part comes first, so that a search through all descendants would find its box.
    part = f"<part><name>head</name>{box_xml((90, 91, 92, 93))}</part>"
    return (
        f"<object><name>{name}</name>{part}<difficult>{difficult}</difficult>"
        f"{box_xml(box)}</object>"
    )


def make_devkit(folder: Path) -> Path:
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    for image_id, objects in OBJECTS.items():
        xml = "".join(object_xml(*item) for item in objects)
        (folder / f"Annotations/{image_id}.xml").write_text(f"<annotation>{xml}</annotation>")
        Image.new("RGB", (48, 32), "teal").save(folder / f"JPEGImages/{image_id}.jpg")
    for split, ids in SPLITS.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids) + "\n")
    return folder
