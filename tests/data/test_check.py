"""The look through a data set: every fault is found, counted and named, and nothing else is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from eecs598.data.check import check_data
from eecs598.data.check_report import DataReport, format_report
from eecs598.data.locations import Level

SIZE = (96, 64)
UPRIGHT, TURNED = 1, 6  # EXIF orientations
NAMES = {"train": ["t0", "t1", "t2"], "val": ["v0", "v1"]}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", SIZE, (40 * number, 100, 200 - 30 * number))


LEVELS = (Level(8, 0, 64), Level(16, 64, 128), Level(32, 128, math.inf))


def check(root: Path, **options) -> DataReport:
    return check_data(root, progress=False, **{"levels": LEVELS, **options})


def kinds(report: DataReport) -> dict[str, int]:
    return {problem.kind: problem.count for problem in report.problems}


@pytest.fixture
def voc(voc_folder) -> Path:
    """Three training and two validation images; the second has two objects, the third none."""
    numbers = {name: n for n, name in enumerate([*NAMES["train"], *NAMES["val"]])}
    objects = {
        "t0": [("cube", 8, 8, 40, 40)],
        "t1": [("cube", 1, 1, 96, 64), ("dice", 10, 20, 26, 36)],
        "t2": [],
        "v0": [("dice", 50, 10, 90, 20)],
        "v1": [("cube", 4, 4, 12, 20)],
    }
    return voc_folder(
        {
            split: {name: (picture(numbers[name]), objects[name]) for name in names}
            for split, names in NAMES.items()
        }
    )


def image(root: Path, name: str) -> Path:
    return root / f"JPEGImages/{name}.jpg"


def change(root: Path, name: str, old: str, new: str) -> None:
    path = root / f"Annotations/{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def add_object(root: Path, name: str, label: str, *box: float) -> None:
    corners = "".join(
        f"<{tag}>{value}</{tag}>"
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    xml = f"<object><name>{label}</name><bndbox>{corners}</bndbox></object></annotation>"
    change(root, name, "</annotation>", xml)


def turn(root: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(9).save(image(root, name), exif=exif)


def swap_size(root: Path, name: str) -> None:
    change(root, name, "<width>96</width><height>64", "<width>64</width><height>96")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


# ---------------------------------------------------------------------------------------
# A good set
# ---------------------------------------------------------------------------------------


def test_numbers(voc):
    report = check(voc, image_size=32)
    assert report.problems == [] and not report.has_errors and report.layout == "voc"
    train, val = report.splits["train"], report.splits["val"]
    assert (train.images, train.images_without_objects, train.objects) == (3, 1, 3)
    assert train.objects_per_class == {"cube": 2, "dice": 1}
    assert train.most_objects == 2 and Path(train.fullest_image) == Path("JPEGImages/t1.jpg")
    assert (val.images, val.images_without_objects, val.objects) == (2, 0, 2)
    # Areas 32 * 32, 95 * 63 and 16 * 16; the shorter side of 64 shrinks to 32.
    assert train.box_size == [16.0, 24.0, 32.0, 54.7, 77.4]
    assert train.box_size_resized == [8.0, 12.0, 16.0, 27.3, 38.7]
    assert train.shorter_side == [64] * 5 and train.longer_side == [96] * 5


def test_difficult_objects_are_left_out(voc):
    change(voc, "t1", "<difficult>0", "<difficult>1")
    train = check(voc).splits["train"]
    assert train.objects_per_class == {"cube": 1, "dice": 1} and train.most_objects == 1


def test_report_as_text_and_as_json(voc):
    report = check(voc)
    text = format_report(report)
    rows = [line.split() for line in text.splitlines()]
    assert ["images", "3", "2"] in rows and ["cube", "2", "1"] in rows
    assert ["shorter", "side", *["64"] * 10] in rows
    assert text.endswith("Good: nothing wrong was found.")

    add_object(voc, "t2", "dice", 5, 5, 5, 9)
    text = format_report(check(voc))
    assert "WARNING: boxes without width or height (1)\n    JPEGImages" in text
    assert text.splitlines()[-1].startswith("Usable: 1 kind of warning.")

    for name in NAMES["train"] + NAMES["val"]:
        image(voc, name).unlink()
    report = check(voc)
    text = format_report(report)
    assert "ERROR: image files that are missing (5)" in text and "and 2 more" in text
    assert text.splitlines()[-1].startswith("Not ready: 1 kind of error, 1 kind of warning.")

    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["has_errors"] is True and plain["splits"]["val"]["objects"] == 2
    assert [problem["kind"] for problem in plain["problems"]] == ["missing", "flat"]


# ---------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------

# (kind, level, what the example says, how the set is broken)
FAULTS = [
    ("missing", "error", "t1.jpg: missing", lambda r: image(r, "t1").unlink()),
    (
        "unreadable",
        "error",
        "t1.jpg: it is in none of the formats AVIF",
        lambda r: image(r, "t1").write_bytes(b"x" * 99),
    ),
    ("unreadable", "error", "t1.jpg: the file is empty", lambda r: image(r, "t1").write_bytes(b"")),
    (
        "unreadable",
        "error",
        "t1.jpg: it is in none of the formats AVIF",  # Pillow has it, training does not
        lambda r: Image.new("RGB", (64, 48)).save(image(r, "t1"), "TGA"),
    ),
    (
        "unreadable",
        "error",
        "t1.jpg: its pixels have values from -1 to -1",
        lambda r: Image.new("F", (64, 48), -1.0).save(image(r, "t1"), "TIFF"),
    ),
    (
        "unreadable",
        "error",
        "t1.jpg: it has 3 x 151 pixels, one side more than 50 times",
        lambda r: Image.new("RGB", (3, 151)).save(image(r, "t1")),
    ),
    ("unreadable", "error", "t1.jpg: image file is trunc", lambda r: truncate(image(r, "t1"))),
    ("annotation", "error", "t0.xml cannot be read", lambda r: change(r, "t0", "<name>", "<nam>")),
    (
        "annotation",
        "error",
        "t0.xml, object 2: box [26.0, 20.0, 10.0, 36.0] has x2 < x1",
        lambda r: add_object(r, "t0", "cube", 26, 20, 10, 36),
    ),
    (
        "annotation",
        "error",
        "t0.xml cannot be read",
        lambda r: (r / "Annotations/t0.xml").unlink(),
    ),
    (
        "size",
        "error",
        "t0.jpg: 96 x 64 in the file, 96 x 65 in",
        lambda r: change(r, "t0", "<height>64", "<height>65"),
    ),
    ("size", "error", "t0.jpg: 96 x 64 in the file, 64 x 96 in", lambda r: swap_size(r, "t0")),
    (
        "size",
        "error",
        "t0.jpg: 96 x 64 in the file, 64 x 96 in",
        lambda r: swap_size(r, "t0") or turn(r, "t0", 3),  # still 96 wide when turned
    ),
    (
        "leaves",
        "warning",
        "cube [5, 5, 80, 40] in 64 x 96",  # of the turned picture, to which the boxes belong
        lambda r: (
            swap_size(r, "t0") or turn(r, "t0", TURNED) or add_object(r, "t0", "cube", 5, 5, 80, 40)
        ),
    ),
    ("orientation", "warning", "t0.jpg: orientation 3", lambda r: turn(r, "t0", 3)),
    (
        "orientation",
        "warning",
        "t0.jpg: orientation 6",
        lambda r: change(r, "t0", "<width>96", "<width>0") or turn(r, "t0", TURNED),
    ),
    (
        "outside",
        "error",
        "t0.jpg: cube [96, 5, 99, 9] in 96 x 64",
        lambda r: add_object(r, "t0", "cube", 96, 5, 99, 9),
    ),
    (
        "outside",
        "error",
        "cube [5, -9, 20, 0]",
        lambda r: add_object(r, "t0", "cube", 5, -9, 20, 0),
    ),
    (
        "leaves",
        "warning",
        "t0.jpg: cube [-2, 5, 30, 40] in 96 x 64",
        lambda r: add_object(r, "t0", "cube", -2, 5, 30, 40),
    ),
    (
        "leaves",
        "warning",
        "cube [50, 50, 60, 65.5]",
        lambda r: add_object(r, "t0", "cube", 50, 50, 60, 65.5),
    ),
    (
        "flat",
        "warning",
        "t0.jpg: cube [5, 5, 30, 5] in 96 x 64",
        lambda r: add_object(r, "t0", "cube", 5, 5, 30, 5),
    ),
    # At a shorter side of 224, 2 px of 64 become 7: the cube lies between the locations at y = 20
    # and 28, the dice around the one at 20.
    (
        "unseen",
        "warning",
        "cube: 1 of 3 at 224 px; 0 at 336, 0 at 448, 0 at 672, 0 at 896",
        lambda r: (
            add_object(r, "t0", "cube", 5, 6, 20, 8) or add_object(r, "t0", "dice", 5, 5, 9, 7)
        ),
    ),
    (
        "alike",
        "warning",
        "'Cube' 1 times, as in JPEGImages/t2.jpg; 'cube' 3 times, as in JPEGImages/t0.jpg",
        lambda r: add_object(r, "t2", "Cube", 8, 8, 40, 40),
    ),
    (
        "alike",
        "warning",
        "'di ce' 1 times, as in JPEGImages/t2.jpg; 'dice' 2 times, as in JPEGImages/t1.jpg",
        lambda r: add_object(r, "t2", "di ce", 8, 8, 40, 40),
    ),
    (
        "listed",
        "error",
        "t1.jpg: 3 times in train",
        lambda r: (r / "ImageSets/Main/train.txt").write_text("t1\nt0\nt1\nt2\nt1\n"),
    ),
    (
        "twice",
        "warning",
        "t0.jpg: cube [8, 8, 40, 40]",
        lambda r: add_object(r, "t0", "cube", 8, 8, 40, 40),
    ),
    (
        "unknown",
        "error",
        "'cubes', 1 times in val, never in train",
        lambda r: change(r, "v1", "<name>cube", "<name>cubes"),
    ),
    (
        "shared",
        "warning",
        "v0.jpg of val is JPEGImages/t2.jpg of train",
        lambda r: shutil.copy(image(r, "t2"), image(r, "v0")),
    ),
    (
        "split",
        "error",
        "no split 'val'",
        lambda r: (r / "ImageSets/Main/val.txt").unlink(),
    ),
]


@pytest.mark.parametrize(("kind", "level", "says", "damage"), FAULTS)
def test_fault(voc, kind, level, says, damage):
    damage(voc)
    report = check(voc)
    assert kinds(report) == {kind: 1}
    problem = report.problems[0]
    assert problem.level == level and report.has_errors is (level == "error")
    assert says in problem.examples[0].replace("\\", "/") and problem.advice.endswith((".", "?"))


@pytest.mark.parametrize(
    "change_it",
    [
        lambda r: add_object(r, "t0", "cube", -1, 0, 97, 65),  # rounding, or counted from 0
        lambda r: add_object(r, "t0", "cube", 5, 5, 30, 6.2),  # 4.2 px at 224
        lambda r: add_object(r, "t0", "dice", 8, 8, 40, 40),  # another class may have the same box
        lambda r: turn(r, "t0", UPRIGHT),
        lambda r: turn(r, "t0", TURNED),  # the annotation's size is that of the pixels as stored
        lambda r: swap_size(r, "t0") or turn(r, "t0", TURNED),  # that of the upright picture
        lambda r: change(r, "t0", "<size>", "<shape>") or change(r, "t0", "</size>", "</shape>"),
        lambda r: shutil.copy(image(r, "t0"), image(r, "t1")),  # within one split
    ],
)
def test_no_fault(voc, change_it):
    change_it(voc)
    assert kinds(check(voc)) == {}


def test_nothing_stops_the_walk(voc):
    image(voc, "t0").unlink()
    change(voc, "t1", "<name>", "<nam>")
    truncate(image(voc, "t2"))
    add_object(voc, "v0", "dice", 300, 300, 310, 310)
    change(voc, "v1", "<height>64", "<height>70")
    report = check(voc)
    assert kinds(report) == dict.fromkeys(
        ["annotation", "missing", "unreadable", "size", "outside"], 1
    ) | {"unknown": 1}  # dice is left in val only
    levels = [problem.level for problem in report.problems]
    assert levels == sorted(levels)  # errors before warnings
    assert report.splits["val"].objects == 3


def test_split_without_objects(voc):
    for name in NAMES["val"]:
        (voc / f"Annotations/{name}.xml").write_text("<annotation></annotation>")
    report = check(voc)
    assert kinds(report) == {"empty": 1} and report.splits["val"].box_size == []
    assert format_report(report).endswith("Repair the errors before training.")


def test_image_size_decides_what_is_too_small(voc):
    (problem,) = check(voc, image_size=8).problems
    assert problem.kind == "unseen" and problem.count == 1
    # Of the cubes, the smaller lies from 1 to 5, around the location at 4. The dice lies from
    # (1.25, 2.5) to (3.25, 4.5); at 16 px it is from 5 to 9 in y, between the locations 4 and 12.
    assert problem.examples == ["dice: 1 of 1 at 8 px; 0 at 12, 1 at 16, 0 at 24, 0 at 32"]
    assert kinds(check(voc, image_size=224)) == {}
    assert kinds(check(voc, image_size=8, levels=())) == {}
    (problem,) = check(voc, splits=("val", "train"), image_size=8, levels=LEVELS[1:]).problems
    assert [example.split(" at ")[0] for example in problem.examples] == [
        "cube: 1 of 1",
        "dice: 1 of 1",
    ]


def test_difficult_objects_have_class_names_too(voc):
    add_object(voc, "t2", "CUBE", 8, 8, 40, 40)
    change(voc, "t2", "<name>CUBE</name>", "<name>CUBE</name><difficult>1</difficult>")
    assert kinds(check(voc)) == {"alike": 1}


@pytest.mark.parametrize(("kind", "level", "says", "damage"), FAULTS)
def test_the_cheap_check_says_the_same(voc, kind, level, says, damage):
    damage(voc)
    whole, cheap = check(voc), check(voc, decode=False)
    needs_pixels = kind in ("shared", "orientation") or "pixels have" in says or "trunc" in says
    if needs_pixels:
        assert kind not in kinds(cheap)
        return
    assert cheap.problems == whole.problems
    assert cheap.splits == whole.splits


def test_the_cheap_check_is_fast(voc, monkeypatch):
    """It decodes nothing; only headers are read."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("an image is decoded"))
    assert kinds(check(voc, decode=False)) == {}


def test_course_index_is_what_counts(voc):
    index = [["JPEGImages/t0.jpg", [{"name": "dice", "xyxy": [1, 2, 30, 40]}]], ["gone.jpg", []]]
    (voc / "voc07_train.json").write_text(json.dumps(index))
    report = check(voc)
    assert report.splits["train"].objects_per_class == {"dice": 1}
    assert kinds(report) == {"missing": 1, "unknown": 1}
    (voc / "voc07_train.json").write_text("[[")
    assert kinds(check(voc)) == {"split": 1}


# ---------------------------------------------------------------------------------------
# COCO
# ---------------------------------------------------------------------------------------


def test_coco(tmp_path):
    categories = [{"id": 1, "name": "cube"}, {"id": 2, "name": "dice"}]

    def record(image_id, category_id, *bbox, **more):
        return {"image_id": image_id, "category_id": category_id, "bbox": bbox, **more}

    for split, records in {
        "train": [
            record(0, 1, 0, 0, 96, 64),
            record(0, 2, 5, 5, 9, 9, iscrowd=1),
            record(1, 2, 5, 5, 9, -9),
            record(1, 7, 5, 5, 9, 9),
            record(1, 1, 80, 50, 30, 30),
        ],
        "val": [record(0, 2, 5, 5, 20, 20)],
    }.items():
        folder = tmp_path / split
        folder.mkdir()
        images = []
        for number in range(2):
            picture(number + 2 * (split == "val")).save(folder / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        images[1]["height"] = 63 if split == "val" else 64
        content = {"images": images, "categories": categories, "annotations": records}
        (folder / "_annotations.coco.json").write_text(json.dumps(content))

    for root in (tmp_path, tmp_path / "train/_annotations.coco.json"):
        report = check(root)
        assert report.layout == "coco"
        assert report.splits["train"].objects_per_class == {"cube": 2}
        assert kinds(report) == {"annotation": 2, "size": 1, "unknown": 1, "leaves": 1}
        examples = {problem.kind: problem.examples for problem in report.problems}
        assert "annotations[2]: bbox [5, 5, 9, -9]" in examples["annotation"][0]
        assert "annotations[3]: category_id 7" in examples["annotation"][1]
        assert examples["leaves"][0].endswith("1.png: cube [80, 50, 110, 80] in 96 x 64")


# ---------------------------------------------------------------------------------------
# Arguments and real data
# ---------------------------------------------------------------------------------------


def test_no_data(tmp_path, voc):
    with pytest.raises(ValueError, match="no data in .*instances_train"):
        check(tmp_path)
    with pytest.raises(ValueError, match="no splits"):
        check(voc, splits=())
    with pytest.raises(ValueError, match="no split 'test'"):
        check(voc, splits=("test",))


def test_progress(voc, capsys):
    check_data(voc)
    assert "val: 100%" in capsys.readouterr().err


def test_some_of_voc2007(tmp_path, voc2007_dir):
    original = voc2007_dir / "VOCdevkit/VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    for split in ("train", "val"):
        ids = (original / f"ImageSets/Main/{split}.txt").read_text().split()[:40]
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("\n".join(ids))
        for name in ids:
            shutil.copy(original / f"JPEGImages/{name}.jpg", tmp_path / "JPEGImages")
            shutil.copy(original / f"Annotations/{name}.xml", tmp_path / "Annotations")
    report = check(tmp_path, splits=("train",))
    assert report.problems == [] and report.splits["train"].images == 40
    # So few images leave classes of val out of train; nothing else is wrong.
    assert set(kinds(check(tmp_path))) <= {"unknown"}
