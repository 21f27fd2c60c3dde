"""The VOC index, against made data and against the data set itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eecs598.data import voc
from tests.data.devkit import OBJECTS, TRAIN_INDEX, box_xml, make_devkit, object_xml


@pytest.fixture
def root(tmp_path) -> Path:
    make_devkit(tmp_path / "data" / "VOCdevkit" / "VOC2007")
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------
# The devkit's files
# ---------------------------------------------------------------------------------------


def test_find_voc_folder(tmp_path, root):
    folder = root / "VOCdevkit" / "VOC2007"
    assert {voc.find_voc_folder(start) for start in (root, root / "VOCdevkit", folder)} == {folder}
    make_devkit(root / "VOCdevkit" / "VOC2012")
    assert voc.find_voc_folder(root) == folder  # VOC2007 is preferred
    other = make_devkit(tmp_path / "other" / "VOCdevkit" / "shapes")
    (tmp_path / "other" / "VOCdevkit" / "readme.txt").write_text("not a folder")
    assert voc.find_voc_folder(tmp_path / "other") == other


def test_find_voc_folder_errors(tmp_path, root):
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        voc.find_voc_folder(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="^looked for one folder with Annotations"):
        voc.find_voc_folder(empty)
    make_devkit(empty / "VOCdevkit" / "a")
    make_devkit(empty / "VOCdevkit" / "b")
    with pytest.raises(ValueError, match="several VOC folders .*: a, b"):
        voc.find_voc_folder(empty)
    make_devkit(root / "VOCdevkit" / "VOC2012")
    os.rename(root / "VOCdevkit/VOC2007/Annotations", root / "VOCdevkit/VOC2007/Elsewhere")
    with pytest.raises(ValueError, match="VOC2007 is incomplete: Annotations missing"):
        voc.find_voc_folder(root)


def test_read_annotation(tmp_path):
    path = tmp_path / "a.xml"
    no_flag = "<object><name> bus </name>" + box_xml((4, 4, 4, 4)) + "</object>"
    objects = "".join(object_xml(*item) for item in OBJECTS["000001"])
    size = "<size><width>48</width><height>32</height></size>"
    path.write_text(f"<annotation>{size}{objects}{no_flag}</annotation>")
    found = voc.read_annotation(path)
    assert found.objects == [
        {"name": "dog", "xyxy": [1.0, 2.0, 30.0, 40.0], "difficult": False},
        {"name": "cat", "xyxy": [5.5, 6.5, 7.5, 8.5], "difficult": True},
        {"name": "bus", "xyxy": [4.0, 4.0, 4.0, 4.0], "difficult": False},
    ]
    assert found.size == (32, 48)


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_size_that_is_not_given(tmp_path, size):
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{size}</annotation>")
    assert voc.read_annotation(path) == ([], None)


GOOD_BOX = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation><object>", "cannot be read"),
        ("", "cannot be read"),
        ("<html></html>", "begins with <html>"),
        (f"<object>{box_xml(GOOD_BOX)}</object>", "object 1 has no <name>"),
        (f"<object><name> </name>{box_xml(GOOD_BOX)}</object>", "object 1 has no <name>"),
        ("<object><name>a</name></object>", "object 1 has no <bndbox>"),
        (
            f"<object><name>a</name><part>{box_xml(GOOD_BOX)}</part></object>",
            "object 1 has no <bndbox>",
        ),
        (
            "<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>",
            "object 1: box .* expected four numbers",
        ),
        (object_xml("a", GOOD_BOX, "maybe"), "<difficult> is 'maybe'"),
        (object_xml("a", (1, 2, "wide", 4), 0), "expected four numbers"),
        (object_xml("a", (1, 2, "nan", 4), 0), "expected finite numbers"),
        (object_xml("a", (1, 2, 3, "1e999"), 0), "expected finite numbers"),
        (object_xml("a", GOOD_BOX, 0) + object_xml("b", (5, 1, 4, 9), 0), "object 2: .*x2 < x1"),
        (object_xml("a", (1, 5, 9, 4), 0), "y2 < y1"),
    ],
)
def test_read_annotation_errors(tmp_path, xml, message):
    path = tmp_path / "bad.xml"
    path.write_text(f"<annotation>{xml}</annotation>" if xml.startswith("<object") else xml)
    with pytest.raises(ValueError, match=message) as caught:
        voc.read_annotation(path)
    assert str(path) in str(caught.value)


def test_missing_annotation(root):
    (root / "VOCdevkit/VOC2007/Annotations/000002.xml").unlink()
    with pytest.raises(ValueError, match=r"000002\.xml cannot be read"):
        voc.build_index(root, "train")


def test_read_split(root):
    main = root / "VOCdevkit/VOC2007/ImageSets/Main"
    (main / "car_train.txt").write_text("000001 -1\r\n\n000002  1\n000003  0\n  \nscene 12\n")
    assert voc.read_split(root, "train") == ["000001", "000002"]
    assert voc.read_split(root, "car_train") == ["000001", "000002", "000003", "scene 12"]


def test_read_split_errors(root):
    main = root / "VOCdevkit/VOC2007/ImageSets/Main"
    (main / "aeroplane_train.txt").write_text("000001 1\n")
    with pytest.raises(ValueError, match="'test'.*splits there: train, val, aeroplane_train$"):
        voc.read_split(root, "test")
    (main / "test.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match=r"test\.txt is empty"):
        voc.read_split(root, "test")


# ---------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------


def test_build_index(root):
    assert voc.build_index(root, "train") == TRAIN_INDEX
    assert voc.build_index(root, "val")[0][1] == []
    inside = voc.build_index(root / "VOCdevkit" / "VOC2007", "train")
    assert inside[0][0] == "./here/JPEGImages/000001.jpg"


def test_image_file_names(root):
    images = root / "VOCdevkit/VOC2007/JPEGImages"
    for name in ("000001.png", "000001.jpeg", "000001.txt"):
        (images / name).write_bytes(b"")
    os.rename(images / "000002.jpg", images / "000002.PNG")
    names = [Path(path).name for path, _ in voc.build_index(root, "train")]
    assert names == ["000001.jpg", "000002.PNG"]
    os.rename(images / "000002.PNG", images / "000002.JPeG")
    assert voc.load_index(root, "train")[1][0].name == "000002.JPeG"
    (images / "000002.JPeG").unlink()
    assert voc.build_index(root, "train")[1][0].endswith("/000002.jpg")


def write_json(root: Path, index, split: str = "train") -> Path:
    path = root / f"voc07_{split}.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


def test_load_index_from_xml_and_from_json_agree(root, monkeypatch):
    from_xml = voc.load_index(root, "train")
    write_json(root, voc.build_index(root, "train"))
    (root / "VOCdevkit/VOC2007/Annotations/000001.xml").unlink()  # not needed any more
    assert voc.load_index(root, "train") == from_xml
    image = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000001.jpg"
    assert from_xml[0] == (image, [{"name": "dog", "xyxy": [1.0, 2.0, 30.0, 40.0]}])
    monkeypatch.chdir(root.parent)
    relative = voc.load_index("data", "train")
    assert relative == from_xml and relative[0][0].is_absolute()


@pytest.mark.parametrize("prefix", ["./here/", "", "./", "absolute"])
def test_load_index_paths(root, prefix):
    prefix = root.as_posix() + "/" if prefix == "absolute" else prefix
    write_json(root, [[f"{prefix}VOCdevkit/VOC2007/JPEGImages/000003.jpg", []]])
    path = root / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000003.jpg"
    assert voc.load_index(root, "train") == [(path, [])]


def test_load_index_boxes_are_floats(root):
    write_json(root, TRAIN_INDEX)
    values = [v for _, objects in voc.load_index(root, "train") for v in objects[0]["xyxy"]]
    assert values == [1, 2, 30, 40, 3, 3, 9, 9] and {type(v) for v in values} == {float}


IMAGE = "VOCdevkit/VOC2007/JPEGImages/000001.jpg"
GOOD_OBJECT = {"name": "dog", "xyxy": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('[["a', "can't be read as JSON"),
        ([], "expected a list with an entry"),
        ({"a": 1}, "expected a list with an entry"),
        ([[IMAGE, []], IMAGE], r"entry 1 is .*expected \[path, \[objects\]\]"),
        ([[IMAGE, []], [IMAGE]], "entry 1 is"),
        ([[3, []]], "entry 0 is"),
        ([[IMAGE, {}]], "entry 0 is"),
        ([[IMAGE, [GOOD_OBJECT, "dog"]]], "entry 0 has the object 'dog'; expected"),
        ([[IMAGE, [{"xyxy": [1, 2, 3, 4]}]]], "entry 0 has the object"),
        ([[IMAGE, [{"name": "", "xyxy": [1, 2, 3, 4]}]]], "entry 0 has the object"),
        ([[IMAGE, [{"name": "dog", "xyxy": 3}]]], "entry 0 has the object"),
        ([[IMAGE, [{"name": "dog", "xyxy": [1, 2, 3, "4"]}]]], "entry 0 has the object"),
        ([[IMAGE, [{"name": "dog", "xyxy": [1, 2, 3]}]]], "entry 0: .*expected four numbers"),
        ([[IMAGE, [{"name": "dog", "xyxy": [1, 2, 3, 10**400]}]]], "expected four numbers"),
        ([[IMAGE, [{"name": "dog", "xyxy": [1, 2, 3, float("nan")]}]]], "finite numbers"),
        ([[IMAGE, []], [IMAGE, [{"name": "dog", "xyxy": [9, 2, 3, 4]}]]], "entry 1: .*x2 < x1"),
        ([[IMAGE, [{"name": "dog", "xyxy": [1, 9, 3, 4]}]]], "entry 0: .*y2 < y1"),
    ],
)
def test_load_index_json_errors(root, index, message):
    path = write_json(root, index)
    with pytest.raises(ValueError, match=message) as caught:
        voc.load_index(root, "train")
    assert str(path) in str(caught.value)


def test_load_index_json_of_bytes(root):
    (root / "voc07_train.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"voc07_train\.json can't be read .*not in UTF-16"):
        voc.load_index(root, "train")


@pytest.mark.parametrize("with_json", [False, True])
def test_load_index_missing_images(root, with_json):
    if with_json:
        write_json(root, voc.build_index(root, "train"))
    (root / "VOCdevkit/VOC2007/JPEGImages/000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 image files .*000002\.jpg"):
        voc.load_index(root, "train")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "there is no folder"),
        (lambda path: path.mkdir(), "looked for one folder with"),
        (lambda path: make_devkit(path / "VOCdevkit/VOC2007"), "splits there: train, val"),
    ],
)
def test_load_index_with_neither_json_nor_xml(tmp_path, make, reason):
    root = tmp_path / "data"
    make(root)
    with pytest.raises(ValueError) as caught:
        voc.load_index(root, "test")
    message = str(caught.value)
    assert f"{root / 'voc07_test.json'}: not there" in message
    assert reason in message and "download_voc2007" in message


DIFFICULT_CAT = {"name": "cat", "xyxy": [5.5, 6.5, 7.5, 8.5], "difficult": True}


def test_difficult_objects_and_sizes_are_those_of_the_xml_with_and_without_json(root):
    xml = root / "VOCdevkit/VOC2007/Annotations/000001.xml"
    size = "<annotation><size><width>48</width><height>32</height></size>"
    xml.write_text(xml.read_text().replace("<annotation>", size))
    from_xml = voc.load_annotations(root, "train")
    assert from_xml[0].size == (32, 48) and from_xml[1].size is None
    assert from_xml[0].objects[1] == DIFFICULT_CAT and from_xml[0].difficult_known
    write_json(root, voc.build_index(root, "train"))
    assert voc.load_annotations(root, "train") == from_xml


def test_the_json_file_decides_on_the_ordinary_objects(root):
    cat = {"name": "cat", "xyxy": [5.5, 6.5, 7.5, 8.5]}
    cow = {"name": "cow", "xyxy": [1, 1, 2, 2]}
    write_json(root, [[IMAGE, [cow, cat]]])
    (found,) = voc.load_annotations(root, "train")
    # The dog of the XML file is not there, and its difficult cat is counted, once.
    assert found.objects == [{**cow, "difficult": False}, {**cat, "difficult": False}]
    write_json(root, [[IMAGE, [cow]]])
    (found,) = voc.load_annotations(root, "train")
    assert found.objects == [{**cow, "difficult": False}, DIFFICULT_CAT]


def test_without_xml_it_is_not_known_what_is_difficult(root):
    write_json(root, TRAIN_INDEX)
    (root / "VOCdevkit/VOC2007/Annotations/000001.xml").unlink()
    first, second = voc.load_annotations(root, "train")
    assert not first.difficult_known and first.size is None and len(first.objects) == 1
    assert second.difficult_known


def test_class_names(root):
    assert voc.class_names(root) == ["bird", "car", "cat", "dog"]
    assert voc.class_names(root, ("train", "test")) == ["car", "cat", "dog"]
    write_json(root, TRAIN_INDEX)  # holds no difficult object, unlike the XML
    assert voc.class_names(root) == ["bird", "car", "dog"]
    json_only = root.parent / "json"
    json_only.mkdir()
    write_json(json_only, TRAIN_INDEX, "val")
    assert voc.class_names(json_only) == ["car", "dog"]


def test_class_names_errors(tmp_path, root):
    with pytest.raises(ValueError, match="Splits looked for: test; found: none"):
        voc.class_names(root, ("test",))
    with pytest.raises(ValueError, match="Splits looked for: train, val; found: none"):
        voc.class_names(tmp_path / "nowhere")
    write_json(root, [[IMAGE, []]])
    with pytest.raises(ValueError, match="found: train"):
        voc.class_names(root, ("train",))
    write_json(root, "{")
    with pytest.raises(ValueError, match="read as JSON"):
        voc.class_names(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_xml_gives_the_course_index_exactly(voc2007_dir, split):
    with open(voc2007_dir / f"voc07_{split}.json", encoding="utf-8") as file:
        assert voc.build_index(voc2007_dir, split) == json.load(file)


def test_voc2007_class_names(voc2007_dir):
    assert len(voc.VOC2007_CLASSES) == 20
    assert voc.class_names(voc2007_dir) == list(voc.VOC2007_CLASSES)
    assert len(voc.load_index(voc2007_dir, "val")) == len(voc.read_split(voc2007_dir, "val"))


def test_a_list_of_paths_is_named(root):
    path = root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    path.write_text("/data/JPEGImages/000001.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt lists '/data/.*expected the names"):
        voc.read_split(root, "train")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_names_that_no_file_can_have(root, name):
    write_json(root, [[f"./here/JPEGImages/{name}.jpg", []]])
    with pytest.raises(ValueError, match="1 of the 1 image files .* are missing"):
        voc.load_index(root, "train")


# ---------------------------------------------------------------------------------------
# Encodings
# ---------------------------------------------------------------------------------------


def xml_of(name: str, encoding: str, declared: str | None) -> bytes:
    first_line = "" if declared is None else f'<?xml version="1.0" encoding="{declared}"?>\n'
    xml = f"{first_line}<annotation>{object_xml(name, GOOD_BOX, 0)}</annotation>"
    return xml.encode(encoding)


@pytest.mark.parametrize(
    ("name", "encoding", "declared"),
    [
        ("猫", "gbk", "gbk"),
        ("鼠標", "big5", "Big5"),
        ("猫", "gb18030", "GB18030"),
        ("ネコ", "shift_jis", "Shift_JIS"),
        ("ネコ", "iso2022_jp", "ISO-2022-JP"),
        ("고양이", "euc_kr", "euc-kr"),
        ("кот", "cp1251", "windows-1251"),
        ("forêt", "latin-1", "ISO-8859-1"),
        ("猫", "utf-8", "utf-8"),
        ("猫", "utf-8", None),
        ("猫", "utf-8-sig", "utf-8"),
        ("è", "utf-8", "utf-8"),
        ("è", "utf-8-sig", None),
        ("forêt", "utf-8", None),
        ("кошка", "utf-8", None),
        ("猫", "utf-16", "utf-16"),
        ("è", "utf-16", None),
    ],
)
def test_encodings_of_xml(tmp_path, name, encoding, declared):
    path = tmp_path / "a.xml"
    path.write_bytes(xml_of(name, encoding, declared))
    assert [item["name"] for item in voc.read_annotation(path).objects] == [name]


@pytest.mark.parametrize(
    ("name", "encoding", "declared", "message"),
    [
        ("狗", "gbk", None, "its bytes are not UTF-8, and it names no other.*Save it as UTF-8"),
        # These two bytes are UTF-8, too.
        ("猫", "gbk", None, "the class name 'è' in UTF-8 would be '猫' in GBK. Let its first line"),
        ("狗", "gbk", "utf-8", "says that it is in utf-8, and it is not"),
        ("ü", "latin-1", "gbk", "'gbk' codec can't decode"),
        ("cat", "utf-8", "klingon", "unknown encoding: klingon"),
        ("cat", "utf-8", "rot13", "not a text encoding"),
        ("cat", "utf-8", "unicode_escape", "unicode_escape is no encoding of a text"),
        ("cat", "utf-8", "idna", "idna is no encoding of a text"),
        ("cat", "utf-8", "utf-16", "cannot be read"),
    ],
)
def test_encodings_of_xml_errors(tmp_path, name, encoding, declared, message):
    path = tmp_path / "bad.xml"
    path.write_bytes(xml_of(name, encoding, declared))
    with pytest.raises(ValueError, match=message) as caught:
        voc.read_annotation(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_entities_of_xml_do_not_unfold_without_end(tmp_path, encoding):
    entities = '<!ENTITY a0 "猫">' + "".join(
        f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12)
    )
    xml = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE annotation [{entities}]>'
    path = tmp_path / "bomb.xml"
    path.write_bytes(f"{xml}<annotation><name>&a11;</name></annotation>".encode(encoding))
    with pytest.raises(ValueError, match="limit on input amplification"):
        voc.read_annotation(path)


def test_lists_are_utf8(root):
    path = root / "VOCdevkit/VOC2007/ImageSets/Main/train.txt"
    path.write_bytes("猫\n".encode("utf-8-sig"))
    assert voc.read_split(root, "train") == ["猫"]
    path.write_bytes("猫二\n".encode("gbk"))
    with pytest.raises(ValueError, match=r"train\.txt is not a text file in UTF-8: .*Save it in"):
        voc.read_split(root, "train")


@pytest.mark.parametrize("value", [True, 1e9, "1_0"])
def test_what_is_no_coordinate(tmp_path, root, value):
    write_json(root, [[IMAGE, [{"name": "dog", "xyxy": [0, 0, 5, value]}]]])
    with pytest.raises(ValueError, match="finite numbers|four numbers|has the object"):
        voc.load_index(root, "train")
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{object_xml('dog', (0, 0, 5, value), 0)}</annotation>")
    with pytest.raises(ValueError, match="finite numbers|four numbers"):
        voc.read_annotation(path)
