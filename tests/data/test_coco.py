"""COCO instances files: found where they lie, read into VOC's index, refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from eecs598.data import coco, index, voc
from eecs598.data.shapes import write_shapes

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 10**20, "name": " cat "}, {"id": 3, "name": "emu"}]
IMAGES = [
    {"id": 5, "file_name": "b.png", "width": 48, "height": 32},
    {"id": -1, "file_name": "a.png"},
    {"id": 0, "file_name": "c.png", "width": 48, "height": 32},
]
ANNOTATIONS = [
    {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3.5, 4]},
    {"id": 2, "image_id": 5, "category_id": 10**20, "bbox": [0, 0, 0, 9], "iscrowd": 0},
    {"id": 3, "image_id": 0, "category_id": 10**20, "bbox": [9, 8, 7, 6], "iscrowd": 1},
    {"id": 4, "image_id": 0, "category_id": 7, "bbox": [5, 5, 5, 5]},
]
INDEX = [
    ("b.png", [{"name": "cat", "xyxy": [0.0, 0.0, 0.0, 9.0]}]),
    ("a.png", []),
    (
        "c.png",
        [{"name": "dog", "xyxy": [1.0, 2.0, 4.5, 6.0]}, {"name": "dog", "xyxy": [5, 5, 10, 10]}],
    ),
]


def document(**changes) -> dict:
    whole = {"images": IMAGES, "categories": CATEGORIES, "annotations": ANNOTATIONS}
    return json.loads(json.dumps({**whole, **changes}))


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (48, 32)).save(folder / name)
    return folder


def index_in(folder: Path) -> list:
    return [(folder / name, objects) for name, objects in INDEX]


@pytest.fixture
def root(tmp_path) -> Path:
    """`images` and `annotations/instances_train.json`."""
    write(tmp_path / "data/annotations/instances_train.json", document())
    write_images(tmp_path / "data/images")
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------
# Where the files lie
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "given", "split", "images"),
    [
        ("annotations/instances_train.json", "", "train", "images"),
        ("annotations/instances_train.json", "", "train", "annotations"),
        ("annotations/instances_train.json", "", "train", "train"),
        ("annotations/instances_train.json", "", "train", ""),
        ("annotations/instances_train2017.json", "", "train", "train2017"),
        ("annotations/instances_val_v2.json", "", "val", "val"),
        ("annotations/instances_odd one.json", "", "odd one", "odd one"),
        ("train/_annotations.coco.json", "", "train", "train"),
        ("val/_annotations.coco.json", "", "val", "val"),
        ("valid/_annotations.coco.json", "", "val", "valid"),
        ("annotations/instances_train2017.json", "itself", "train", "train2017"),
        ("train.json", "itself", "train", "images"),
        ("validation.json", "itself", "val", ""),
        ("train.json", "val.json", "train", "train"),
        ("my-valid-boxes.json", "my-train-boxes.json", "val", "valid"),
        ("annotations/instances_val2017.json", "annotations/instances_train2017.json", "val", ""),
        ("val/_annotations.coco.json", "train/_annotations.coco.json", "val", "val"),
        ("valid/_annotations.coco.json", "train/_annotations.coco.json", "val", "valid"),
        ("val/instances_val.json", "train/instances_train.json", "val", "val"),
    ],
)
def test_layouts(tmp_path, monkeypatch, file, given, split, images):
    write(tmp_path / "data" / file, document())
    folder = write_images(tmp_path / "data" / images)
    if given == "itself":
        given = file
    elif given:
        write(tmp_path / "data" / given, document(images=[]))
    assert index.load_index(tmp_path / "data" / given, split) == index_in(folder)
    monkeypatch.chdir(tmp_path)
    assert index.load_index(f"data/{given}", split) == index_in(folder)


@pytest.mark.parametrize("name", ["instances_trainval.json", "captions_train.json", "train.json"])
def test_other_files_are_not_the_split(tmp_path, name):
    write(tmp_path / "annotations" / name, document())
    assert coco.find_instances(tmp_path, "train") is None


def test_several_files_of_a_split(tmp_path):
    for year in (2014, 2017):
        write(tmp_path / f"annotations/instances_train{year}.json", document())
    with pytest.raises(ValueError, match=r"several files .*train2014\.json, instances_train2017"):
        index.load_index(tmp_path, "train")
    exact = write(tmp_path / "annotations/instances_train.json", document())
    assert coco.find_instances(tmp_path, "train") == exact


def test_json_file_of_no_split(tmp_path):
    path = write(tmp_path / "boxes.json", document())
    with pytest.raises(ValueError, match=r"boxes\.json: neither .* says which split it is"):
        coco.load_index(path, "train")
    path = write(tmp_path / "train.json", document())
    with pytest.raises(ValueError, match=r"Looked for .*/val\.json, .*/valid\.json"):
        index.load_index(path, "val")


# ---------------------------------------------------------------------------------------
# Content
# ---------------------------------------------------------------------------------------


def test_values_are_those_of_the_voc_index(root):
    entries = coco.load_index(root, "train")
    values = [v for _, objects in entries for item in objects for v in item["xyxy"]]
    assert {type(v) for v in values} == {float} and len(values) == 12
    assert all(list(item) == ["name", "xyxy"] for _, objects in entries for item in objects)


def test_read_split(root):
    images = coco.read_split(root, "train")
    assert [image.size for image in images] == [(32, 48), None, (32, 48)]
    assert [item["difficult"] for item in images[2].objects] == [False, True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(root, encoding):
    text = json.dumps(document(categories=[{"id": 7, "name": "köpek"}, *CATEGORIES[1:]]))
    write(root / "annotations/instances_train.json", text.encode(encoding))
    assert coco.class_names(root) == ["cat", "köpek"]


@pytest.mark.parametrize(
    "pattern", ["{}", "./{}", "deep/../{}", "..\\images\\{}", "../images/{}", "{absolute}"]
)
def test_file_names(root, pattern):
    images = json.loads(json.dumps(IMAGES))
    for image in images:
        absolute = str(root / "images" / image["file_name"])
        image["file_name"] = pattern.format(image["file_name"], absolute=absolute)
    (root / "images/deep").mkdir()
    write(root / "annotations/instances_train.json", document(images=images))
    assert coco.load_index(root, "train") == index_in(root / "images")


def test_class_names(root):
    assert index.class_names(root) == ["cat", "dog"]  # no emu was annotated
    crowd_only = [ANNOTATIONS[2]]
    write(root / "annotations/instances_val.json", document(annotations=crowd_only))
    assert index.class_names(root, ("val",)) == ["cat"]
    write(root / "annotations/instances_val.json", document(annotations=[]))
    with pytest.raises(ValueError, match="Splits looked for: val, test; found: val"):
        index.class_names(root, ("val", "test"))


def changed(records: list, number: int, **fields) -> list:
    """A copy of a list of records with one changed; a field of None is removed."""
    records = json.loads(json.dumps(records))
    records[number] = {k: v for k, v in {**records[number], **fields}.items() if v is not None}
    return records


def bad_box(*bbox) -> dict:
    return {"annotations": changed(ANNOTATIONS, 1, bbox=list(bbox))}


# What is wrong, and the record that the message names.
BAD_RECORDS = [
    ({"categories": [*CATEGORIES, {"id": 9, "name": "dog"}]}, r"categories\[3\]: name 'dog'"),
    ({"categories": [*CATEGORIES, {"id": 3, "name": "yak"}]}, r"categories\[3\]: the id 3 is take"),
    ({"categories": changed(CATEGORIES, 2, name=" ")}, r"categories\[2\]: name ''"),
    ({"categories": changed(CATEGORIES, 2, name=5)}, r"categories\[2\]: 'name' is 5, .* a text"),
    ({"categories": changed(CATEGORIES, 2, id=None)}, r"categories\[2\] is .* without 'id'"),
    ({"images": changed(IMAGES, 1, file_name=None)}, r"images\[1\] is .* without 'file_name'"),
    ({"images": changed(IMAGES, 1, id=5)}, r"images\[1\]: the id 5 is taken"),
    ({"images": [*IMAGES, "d.png"]}, r"images\[3\] is 'd\.png', without 'file_name'"),
    ({"annotations": [*ANNOTATIONS, None]}, r"annotations\[4\] is None, without 'image_id'"),
    ({"annotations": changed(ANNOTATIONS, 0, image_id="0")}, r"\[0\]: 'image_id' is '0', .* whole"),
    ({"annotations": changed(ANNOTATIONS, 0, image_id=99)}, r"\[0\]: image_id 99 is not in 'ima"),
    ({"annotations": changed(ANNOTATIONS, 0, category_id=4)}, r"\[0\]: category_id 4 is not in 'c"),
    ({"annotations": changed(ANNOTATIONS, 1, bbox=None)}, r"annotations\[1\] is .* without 'bbox'"),
    ({"annotations": changed(ANNOTATIONS, 2, iscrowd=2)}, r"annotations\[2\]: iscrowd is 2"),
    ({"annotations": changed(ANNOTATIONS, 1, bbox="1 2 3 4")}, r"\[1\]: 'bbox' is .* a list"),
    (bad_box(1, 2, 3), r"annotations\[1\]: bbox \[1, 2, 3\], expected"),
    (bad_box(1, 2, 3, "4"), r"annotations\[1\]: bbox"),
    (bad_box(1, 2, -3, 4), r"annotations\[1\]: bbox"),
    (bad_box(1, 2, 3, -1e-9), r"annotations\[1\]: bbox"),
    (bad_box(1, 2, 3, float("nan")), r"annotations\[1\]: bbox"),
    (bad_box(float("-inf"), 2, 3, 4), r"annotations\[1\]: bbox"),
    (bad_box(1, 10**400, 3, 4), r"annotations\[1\]: bbox"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_RECORDS)
def test_bad_records(root, changes, message):
    path = write(root / "annotations/instances_train.json", document(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        coco.load_index(root, "train")
    assert str(path) in str(caught.value)
    problems = []
    images = coco.read_split(root, "train", problems=problems)
    assert problems[0] == str(caught.value)
    # The rest of the file is there: three images, the last with two objects and a crowd region.
    assert len(images) in (2, 3) and len(images[-1].objects) >= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read as JSON"),
        (b"{", "can't be read as JSON"),
        (b"\xff\xff\xff", "can't be read as JSON"),
        (b"[" * 100_000, "can't be read as JSON"),
        ([], r"holds \[\]; expected a COCO instances file"),
        ([["a.png", []]], "expected a COCO instances file"),
        ({}, "has no list 'categories', but only {}"),
        ({"info": {}, "images": []}, "has no list 'categories', but only info, images"),
        (document(images={}), "has no list 'images', but {}"),
        (document(images=[], annotations=[]), "has no images"),
    ],
)
def test_files_that_are_no_instances(root, content, message):
    path = write(root / "annotations/instances_train.json", content)
    for problems in (None, []):
        with pytest.raises(ValueError, match=message) as caught:
            coco.read_split(root, "train", problems=problems)
        assert str(path) in str(caught.value)


def test_missing_images(root):
    (root / "images/b.png").unlink()  # the first one
    with pytest.raises(ValueError, match=r"1 of the 3 image files .* first is .*images/b\.png"):
        coco.load_index(root, "train")
    for name in ("a.png", "c.png"):
        (root / "images" / name).unlink()
    with pytest.raises(ValueError, match="3 of the 3 image files .*data/images, .*data/train"):
        coco.load_index(root, "train")


# ---------------------------------------------------------------------------------------
# Both layouts
# ---------------------------------------------------------------------------------------


def as_coco(index: list) -> dict:
    """An index as a COCO document with absolute paths and ids of its own choice."""
    names = sorted({item["name"] for _, objects in index for item in objects}, reverse=True)
    annotations = []
    for number, (_, objects) in enumerate(index):
        for item in objects:
            x1, y1, x2, y2 = item["xyxy"]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": 100 - number,
                    "category_id": 90 - names.index(item["name"]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    return {
        "images": [{"id": 100 - n, "file_name": str(path)} for n, (path, _) in enumerate(index)],
        "categories": [{"id": 90 - n, "name": name} for n, name in enumerate(names)],
        "annotations": annotations,
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", num_train=6, num_val=3)


def test_generated_set_is_the_same_in_both_layouts(tmp_path, shapes):
    for split in ("train", "val"):
        content = as_coco(voc.load_index(shapes, split))
        write(tmp_path / f"annotations/instances_{split}.json", content)
    for split in ("train", "val"):
        found = index.load_index(tmp_path, split)
        assert found == index.load_index(shapes, split) and any(o for _, o in found)
    difficult_too = voc.class_names(shapes)
    assert set(index.class_names(tmp_path)) <= set(difficult_too)
    assert index.class_names(shapes) == difficult_too


def test_voc2007_is_the_same_in_both_layouts(tmp_path, voc2007_dir):
    index = voc.load_index(voc2007_dir, "val")[:200]
    write(tmp_path / "annotations/instances_val.json", as_coco(index))
    for (path, objects), (old_path, old_objects) in zip(
        coco.load_index(tmp_path, "val"), index, strict=True
    ):
        assert path == old_path
        assert [item["name"] for item in objects] == [item["name"] for item in old_objects]
        for item, old in zip(objects, old_objects, strict=True):
            assert item["xyxy"] == pytest.approx(old["xyxy"], abs=1e-9)


def test_data_layout(tmp_path, root, shapes):
    assert index.data_layout(shapes) == "voc"
    assert index.data_layout(root) == "coco"
    with pytest.raises(ValueError, match="no data"):
        index.data_layout(root, ("test",))
    both = tmp_path / "both"
    (both / "annotations").mkdir(parents=True)
    (both / "voc07_train.json").write_text(json.dumps([["a.png", []]]))
    assert index.data_layout(both) == "voc"
    write(both / "annotations/instances_train.json", document())
    assert index.data_layout(both) == "coco"


def test_no_data_names_both_layouts(tmp_path):
    with pytest.raises(ValueError) as caught:
        index.load_index(tmp_path, "train")
    message = str(caught.value)
    for place in ("instances_train.json", "_annotations.coco.json", "voc07_train.json", "JPEGIm"):
        assert place in message
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        index.class_names(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [{"bbox": [True, 0, 5, 5]}, {"image_id": True}])
def test_true_is_no_number(tmp_path, change):
    record = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5], **change}
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [record],
    }
    path = tmp_path / "instances_train.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"annotations\[0\]: .*True"):
        coco.read_split(path, "train")


def test_json_in_another_encoding(tmp_path):
    path = tmp_path / "instances_train.json"
    path.write_bytes('{"images": "狗"}'.encode("gbk"))
    with pytest.raises(ValueError, match=r"train\.json can't be read as JSON: it is not in UTF-8"):
        coco.read_split(path, "train")
    for name in ('"\\ud83d"', '"x\\uDE00"'):  # half of a character
        path.write_text(f'{{"images": [{{"id": 1, "file_name": {name}}}]}}')
        with pytest.raises(ValueError, match=r"train\.json can't be read as JSON: .*surrogates"):
            coco.read_split(path, "train")
    path.write_text('{"images": "\\ud83d\\ude00"}')
    with pytest.raises(ValueError, match="no list 'categories'"):
        coco.read_split(path, "train")
