"""Mutated files of every kind that the library reads: each ends in a result or a clear error.

    python -m tests.data.fuzz --count 100000 --seed 1

A case is one file with one to three mutations: bytes flipped, cut, removed or doubled; tags, keys
and lines likewise; values in place of others, such as texts, NaN, huge and negative numbers; other
encodings; deep nesting; nothing at all. What is read must be in the file, and an error must be a
``ValueError`` that names it.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import json
import math
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eecs598.data import Level, annotated_size, check_data, class_names, load_instances, read_image
from eecs598.metrics import score_folder

SECONDS = 10  # for one case; it takes milliseconds

VALUES = (
    *("", " ", "nan", "inf", "-inf", "-1", "0", "1", "1e9", "1e40", "1e308", "1e999", "-1e30"),
    *("99999999999999999999", "9" * 5000, "1_0", "0x10", "１２", "٣", "1,5", "true", "null", "cat"),
    *("猫", "\u00e8", "\x00", "\ufeff", "a b", "../x", "/", "a\nb", "&amp;", "<", '"', "[]", "{}"),
)
JSON_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**63, 10**400, -(10**30), 1.5, 1e9, 1e40, 1e308),
    *(math.nan, math.inf, -math.inf, "", "cat", "1", "\ud800", "\x00", "a" * 5000, "../x", "/"),
    *([], {}, [[]], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], {"id": 1}, ["1", "2", "3", "4"]),
)
ENCODINGS = ("gbk", "big5", "shift_jis", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1")


# --------------------------------------------------------------------------------------------
# Mutations
# --------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damage a file without knowing what it is."""
    changed = bytearray(data)
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 8, 64)))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice((1, 1, 3, 20))):
                if changed:
                    changed[rng.randrange(len(changed))] = rng.randrange(256)
        case 1:
            del changed[start:]
        case 2:
            del changed[start:end]
        case 3:
            changed[end:end] = data[start:end] * rng.choice((1, 1, 30))
        case 4:
            changed[start:start] = rng.randbytes(rng.choice((1, 2, 8)))
        case 5:
            changed[start:end] = bytes(end - start)
        case 6:
            changed = bytearray(rng.choice((b"", data + data, b"\x00" * 100, data[::-1])))
    return bytes(changed)


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Change values, tags or lines of a text, or its encoding."""
    text = data.decode("utf-8", errors="replace")
    parts = re.split(r"(<[^<>]*>|\s+)", text)  # tags, spaces and what is between them
    places = [number for number, part in enumerate(parts) if part and not part.isspace()]
    if not places:
        return data
    here, there = rng.choice(places), rng.choice(places)
    match rng.randrange(8):
        case 0 | 1:
            parts[here] = rng.choice(VALUES)
        case 2:
            parts[here] = ""
        case 3:
            parts[here] *= 2
        case 4:
            parts[here], parts[there] = parts[there], parts[here]
        case 5:
            low, high = sorted((here, there))
            parts[high:high] = parts[low:high]
        case 6:
            tag = rng.choice(("annotation", "object", "bndbox", "x"))
            depth = rng.choice((1, 3, 2000))
            parts[here] = f"<{tag}>" * depth + parts[here] + f"</{tag}>" * depth
        case 7:
            declared = rng.choice((*ENCODINGS, "klingon", "idna", "utf-7", "cp037"))
            line = f'<?xml version="1.0" encoding="{declared}"?>' if rng.random() < 0.6 else ""
            return (line + text).encode(rng.choice(ENCODINGS), errors="replace")
    return "".join(parts).encode("utf-8", errors="surrogatepass")


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change, remove or double an entry anywhere in a JSON document."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    containers = [value for value in _values(document) if isinstance(value, dict | list) and value]
    if not containers:
        return mutate_bytes(data, rng)
    container = rng.choice(containers)
    key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    match rng.randrange(6):
        case 0 | 1 | 2:
            container[key] = rng.choice(JSON_VALUES)
        case 3:
            del container[key]
        case 4:
            if isinstance(container, list):
                container.append(container[key])
            else:
                container[rng.choice(("id", "x", "bbox", "images"))] = container[key]
        case 5:
            text = json.dumps(container[key])
            depth = rng.choice((1, 3, 5000))
            container[key] = "@@"
            return json.dumps(document).replace('"@@"', "[" * depth + text + "]" * depth).encode()
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def _values(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _values(each)


# --------------------------------------------------------------------------------------------
# Kinds of files: each function runs one case in a folder of its own
# --------------------------------------------------------------------------------------------


def _box(x1: float, y1: float, x2: float, y2: float) -> str:
    return f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"


XML = f"""<annotation><folder>x</folder><filename>a.png</filename>
<size><width>48</width><height>32</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>{_box(1, 2, 20.5, 30)}
<part><name>head</name>{_box(3, 4, 5, 6)}</part></object>
<object><name>dining table</name><difficult>1</difficult>{_box(7, 8, 40, 31)}</object>
<object><name>猫</name>{_box(9, 10, 11, 12)}</object></annotation>""".encode()
COCO = json.dumps(
    {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 48, "height": 32} for n in range(2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "猫"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 20.5, 28], "iscrowd": 0},
            {"id": 2, "image_id": 0, "category_id": 5, "bbox": [3, 4, 5, 6], "iscrowd": 1},
            {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 0, 48, 32]},
        ],
    }
).encode()
COURSE_INDEX = json.dumps(
    [
        ["./here/JPEGImages/a.png", [{"name": "cat", "xyxy": [1, 2, 20.5, 30]}]],
        ["./here/JPEGImages/b.png", [{"name": "猫", "xyxy": [3, 4, 5, 6]}]],
    ]
).encode()
TRUTH = "cat 1 2 20.5 30\ndining table 3 4 5 6 difficult\n猫 7 8 9 10\n".encode()
DETECTIONS = "cat 0.9 1 2 20 30\ncat 0.5 0 0 4 4\n猫 0.25 7 8 9 10\n".encode()
LIST = b"a\nb 1\n\n"


def make_folder(folder: Path) -> None:
    """Make a data set for each kind of file, of which its cases change that one file."""
    picture = Image.new("RGB", (48, 32), "teal")
    for voc in (folder / "xml", folder / "list", folder / "index"):
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (voc / part).mkdir(parents=True)
        for name in "ab":
            picture.save(voc / f"JPEGImages/{name}.png")
            (voc / f"Annotations/{name}.xml").write_bytes(XML)
        (voc / "ImageSets/Main/train.txt").write_bytes(LIST)
    (folder / "coco/annotations").mkdir(parents=True)
    for number in range(2):
        picture.save(folder / f"coco/annotations/{number}.png")
    for texts in (folder / "truth", folder / "detections"):
        for kind, content in (("ground-truth", TRUTH), ("detection-results", DETECTIONS)):
            (texts / kind).mkdir(parents=True)
            for name in "ab":
                (texts / kind / f"{name}.txt").write_bytes(content)


def numbers_in(data: bytes) -> set[float]:
    """All numbers in a text of unknown encoding, rounded as float32 rounds them."""
    found = set()
    for encoding in ("utf-8", "utf-16", "utf-16-le", "utf-32", "gbk"):
        text = html.unescape(data.decode(encoding, errors="ignore"))
        for token in re.split(r"[<>\s]+", text):
            with contextlib.suppress(ValueError):
                found.add(_as_float32(float(token)))
    return found


def _as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def boxes_of(root: Path) -> list[list[float]]:
    """Read the training split of a data set as training does; the check must not fail on it."""
    check_data(root, ("train",), levels=[Level(8, 0, 64)], decode=False)
    instances = load_instances(root, "train", class_names(root, ("train",)))
    return [box for instance in instances for box in instance.boxes[:, :4].tolist()]


def run_xml(folder: Path, data: bytes) -> None:
    """An annotation of VOC."""
    (folder / "xml/Annotations/a.xml").write_bytes(data)
    allowed = numbers_in(data) | numbers_in(XML)
    for box in boxes_of(folder / "xml"):
        assert set(box) <= allowed, f"{box} is not in the file"


def run_list(folder: Path, data: bytes) -> None:
    """The list of a split."""
    (folder / "list/ImageSets/Main/train.txt").write_bytes(data)
    for box in boxes_of(folder / "list"):
        assert set(box) <= numbers_in(XML)


def run_coco(folder: Path, data: bytes) -> None:
    """An instances file of COCO."""
    (folder / "coco/annotations/instances_train.json").write_bytes(data)
    boxes = boxes_of(folder / "coco")
    given = [
        value["bbox"]
        for value in _values(json.loads(data))
        if isinstance(value, dict) and isinstance(value.get("bbox"), list)
    ]
    allowed = [
        [_as_float32(value) for value in (x, y, x + width, y + height)]
        for x, y, width, height in (box for box in given if len(box) == 4 and _are_numbers(box))
    ]
    for box in boxes:
        assert box in allowed, f"{box} is not in the file"


def run_course_index(folder: Path, data: bytes) -> None:
    """The course's index."""
    (folder / "index/voc07_train.json").write_bytes(data)
    # The difficult objects come from the XML file.
    allowed = [[7.0, 8.0, 40.0, 31.0]] + [
        [_as_float32(number) for number in value]
        for value in _values(json.loads(data) if _is_json(data) else [])
        if isinstance(value, list) and len(value) == 4 and _are_numbers(value)
    ]
    for box in boxes_of(folder / "index"):
        assert box in allowed, f"{box} is not in the file"


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e300 for value in values)


def run_truth(folder: Path, data: bytes) -> None:
    """A text file of ground truth; a second image has an unchanged one."""
    (folder / "truth/ground-truth/a.txt").write_bytes(data)
    assert 0 <= score_folder(folder / "truth")["mAP"] <= 1


def run_detections(folder: Path, data: bytes) -> None:
    """A text file of detections."""
    (folder / "detections/detection-results/a.txt").write_bytes(data)
    assert 0 <= score_folder(folder / "detections")["mAP"] <= 1


def run_image(folder: Path, data: bytes) -> None:
    """An image file; its pixels, its size, and its upright copy."""
    path = folder / "image"
    path.write_bytes(data)
    image = read_image(path, upright=False)
    assert image.mode == "RGB" and annotated_size(path, None) == image.size[::-1]
    assert sorted(read_image(path).size) == sorted(image.size)


def images() -> list[bytes]:
    """A small file of each format that is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (picture, "JPEG", {"exif": exif}),
        (picture, "JPEG", {"progressive": True}),
        (picture.convert("CMYK"), "JPEG", {}),
        (picture, "PNG", {"exif": exif}),
        (picture.convert("RGBA"), "PNG", {}),
        (picture.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200), "PNG", {}),
        (picture.convert("P"), "GIF", {}),
        (picture, "BMP", {}),
        (picture, "WEBP", {"lossless": True}),
        (picture, "TIFF", {}),
        (picture, "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(pixels[:, :, 0].astype(np.float32) / 255), "TIFF", {}),
        (picture, "PPM", {}),
    ]
    files = []
    for image, format_, options in kinds:
        stream = io.BytesIO()
        image.save(stream, format_, **options)
        files.append(stream.getvalue())
    return files


Case = tuple[Callable[[Path, bytes], None], list[bytes], list[Callable]]
KINDS: dict[str, Case] = {
    "xml": (run_xml, [XML], [mutate_bytes, mutate_text, mutate_text]),
    "list": (run_list, [LIST], [mutate_bytes, mutate_text]),
    "coco": (run_coco, [COCO], [mutate_bytes, mutate_json, mutate_json, mutate_json]),
    "course index": (run_course_index, [COURSE_INDEX], [mutate_bytes, mutate_json, mutate_json]),
    "ground truth": (run_truth, [TRUTH], [mutate_bytes, mutate_text, mutate_text]),
    "detections": (run_detections, [DETECTIONS], [mutate_bytes, mutate_text, mutate_text]),
    "image": (run_image, images(), [mutate_bytes]),
}


# --------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail in a block that takes longer; only where there are alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def run_case(folder: Path, kind: str, seed: int) -> str:
    """Run one case in a folder that ``make_folder`` made.

    Returns:
        ``"read"``, or the message of the error.

    Raises:
        Exception: what must not happen: another error than a ValueError that names the file.
    """
    rng = random.Random(f"{kind} {seed}")
    run, originals, mutations = KINDS[kind]
    data = rng.choice(originals)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(mutations)(data, rng)
    try:
        with time_limit(SECONDS):
            run(folder, data)
    except ValueError as error:
        message = str(error)
        # UnicodeError and the like come from Python and not from us.
        assert type(error) is ValueError, f"{type(error).__name__}: {message}"
        assert str(folder) in message, f"the message does not name the file: {message}"
        message.encode()  # it can be printed
        return message
    return "read"


def run_cases(count: int, seed: int, report: Callable[[str], Any] = print) -> Counter[str]:
    """Run cases of all kinds in turn; return how many were read, refused and wrong."""
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        make_folder(Path(name))
        for number in range(count):
            kind = list(KINDS)[number % len(KINDS)]
            try:
                outcome = run_case(Path(name), kind, seed + number)
                results[f"{kind}: {'read' if outcome == 'read' else 'refused'}"] += 1
            except Exception as error:
                results[f"{kind}: wrong"] += 1
                text = f"{type(error).__name__}: {error}".encode(errors="replace").decode()
                report(f"{kind}, {seed + number}: {text[:300]}")
    return results


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of Pillow, about damaged files
    start = time.monotonic()
    results = run_cases(args.count, args.seed)
    for name, number in sorted(results.items()):
        print(f"{name:24} {number:7}")
    print(f"{args.count} cases, {time.monotonic() - start:.0f} s")
    return int(any(name.endswith("wrong") for name in results))


if __name__ == "__main__":
    sys.exit(main())
