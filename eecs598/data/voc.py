"""PASCAL VOC: read data in the devkit's layout into an index.

Data set: Everingham et al., "The PASCAL Visual Object Classes Challenge 2007",
http://host.robots.ox.ac.uk/pascal/VOC/voc2007/. An index is the course's own structure,
``[[path, [{"name": str, "xyxy": [x1, y1, x2, y2]}, ...]], ...]``, boxes in pixels of the image
file, paths beginning with ``./here/`` and relative to the data folder. It is read from
``voc07_{split}.json`` or rebuilt from the devkit's XML: on VOC 2007 both hold the same, the
objects that are not marked difficult.

    from eecs598.data import load_index

    image_path, objects = load_index("data", "train")[0]

Any folder in the devkit's layout is read in the same way.
"""

from __future__ import annotations

import codecs
import os
import re
import reprlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eecs598.data.annotation import ImageAnnotation
from eecs598.runtime import read_json, read_text

VOC2007_CLASSES: tuple[str, ...] = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

REQUIRED_FOLDERS = ("Annotations", "ImageSets/Main", "JPEGImages")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_INDEX_ROOT = "./here/"
_BOX_FIELDS = ("xmin", "ymin", "xmax", "ymax")


# ---------------------------------------------------------------------------------------
# The devkit's files
# ---------------------------------------------------------------------------------------


def find_voc_folder(root: str | os.PathLike[str]) -> Path:
    """Find the folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.

    It is ``root`` itself, ``root/VOC2007``, ``root/VOCdevkit/VOC2007``, or, where that does not
    exist, the only such folder in ``root/VOCdevkit``.

    Raises:
        ValueError: there is none, several, or an incomplete ``VOCdevkit/VOC2007``.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; give the data folder or make it first")
    devkit = root / "VOCdevkit"
    preferred = devkit / "VOC2007"
    for folder in (root, root / "VOC2007", preferred):
        if not missing_folders(folder):
            return folder
    if preferred.exists():
        check_complete(preferred)
    found = [folder for folder in sorted(devkit.glob("*")) if not missing_folders(folder)]
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(
            (f"several VOC folders in {devkit}: {names}. " if found else "")
            + f"looked for one folder with {', '.join(REQUIRED_FOLDERS)} as {root}, "
            f"{root / 'VOC2007'} or {devkit / '*'}; give the folder that has them or the one "
            "above VOCdevkit"
        )
    return found[0]


class Annotation(NamedTuple):
    """What one VOC XML file says about its image.

    Attributes:
        objects: ``{"name": str, "xyxy": [x1, y1, x2, y2], "difficult": bool}`` for each object in
            the file's order, boxes as floats in pixels.
        size: height and width of the image; None where they are not whole numbers above 0, since
            some tools leave them out or write 0.
    """

    objects: list[dict[str, Any]]
    size: tuple[int, int] | None


def read_annotation(path: str | os.PathLike[str]) -> Annotation:
    """Read one VOC XML file.

    An object without ``<difficult>`` is not difficult; the boxes of an object's ``<part>`` elements
    are left out.

    Raises:
        ValueError: the file is missing or broken, a field of an object is missing, a coordinate is
            not a finite number, or x2 < x1 or y2 < y1.
    """
    annotation = _parse(path)
    objects = [
        _read_object(element, f"{path}, object {number}")
        for number, element in enumerate(annotation.findall("object"), start=1)
    ]
    return Annotation(objects, _read_size(annotation))


def _read_size(annotation: ElementTree.Element) -> tuple[int, int] | None:
    try:
        height, width = (int(annotation.findtext(f"size/{x}", "")) for x in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _parse(path: str | os.PathLike[str]) -> ElementTree.Element:
    try:
        data = Path(path).read_bytes()
        annotation = _parse_bytes(data)
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        # The last two: an encoding that Python does not know, or bytes that are not in it.
        raise ValueError(f"{path} cannot be read as a VOC XML file: {error}") from error
    if annotation.tag != "annotation":
        raise ValueError(f"{path} begins with <{annotation.tag}>; expected <annotation>")
    if not data.isascii() and not data.startswith(_MARKS) and not _DECLARATION.match(data):
        for name in (element.findtext("name", "") for element in annotation.findall("object")):
            _check_is_utf8(name.strip(), path)
    return annotation


# What says of an XML file in which encoding it is: a byte order mark, or its first line.
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DECLARATION = re.compile(rb"""<\?xml[^>]{1,200}?encoding\s*=\s*["']([A-Za-z][\w.:-]*)["']""")
# The parser reads these itself. Python has codecs for the last ones, but texts are not in them.
_PARSER_ENCODINGS = ("utf-8", "ascii", "iso8859-1", "utf-16", "utf-16-le", "utf-16-be")
_NO_ENCODINGS = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape", "utf-7")


def _parse_bytes(data: bytes) -> ElementTree.Element:
    """Parse XML in any encoding that Python knows; the parser alone knows no Chinese one."""
    declaration = _DECLARATION.match(data)
    if declaration is None:
        try:
            return ElementTree.fromstring(data)
        except ElementTree.ParseError as error:
            if data.startswith(_MARKS) or _is_utf8(data):
                raise
            raise ValueError(
                "its bytes are not UTF-8, and it names no other encoding. Save it as UTF-8, or let "
                'its first line name the encoding, as <?xml version="1.0" encoding="GBK"?> does'
            ) from error
    encoding = declaration[1].decode()
    codec = codecs.lookup(encoding).name
    if codec in _NO_ENCODINGS:
        raise ValueError(f"{encoding} is no encoding of a text. Save it as UTF-8")
    if codec == "utf-8" and not _is_utf8(data):
        raise ValueError(
            f"its first line says that it is in {encoding}, and it is not. Save it as that, or "
            "correct the line"
        )
    # Given a string, the parser ignores what the first line says.
    return ElementTree.fromstring(data if codec in _PARSER_ENCODINGS else data.decode(codec))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_is_utf8(name: str, path: str | os.PathLike[str]) -> None:
    """Raise ValueError for a class name that is UTF-8 by accident only.

    The bytes of one or two Chinese characters in GBK may also be UTF-8: accented letters. No
    language has a class name of several of these and no other letter.
    """
    if not name or not all("\u00c0" <= character <= "\u024f" for character in name):
        return
    try:
        in_gbk = name.encode().decode("gbk")
    except UnicodeDecodeError:
        return
    raise ValueError(
        f"{path} names no encoding, and the class name {name!r} in UTF-8 would be {in_gbk!r} in "
        'GBK. Let its first line name the encoding, as <?xml version="1.0" encoding="GBK"?> does'
    )


def _read_object(element: ElementTree.Element, where: str) -> dict[str, Any]:
    """Read one object; ``where`` begins the message of an error."""
    # find() returns direct children only, and so no box of a <part>.
    name = element.findtext("name", "").strip()
    box = element.find("bndbox")
    if not name or box is None:
        raise ValueError(f"{where} has no {'<bndbox>' if name else '<name>'}; VOC needs both")
    difficult = element.findtext("difficult", "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"{where}: <difficult> is {difficult!r}, expected 0 or 1")
    xyxy = _check_box([box.findtext(field) for field in _BOX_FIELDS], where)
    return {"name": name, "xyxy": xyxy, "difficult": difficult == "1"}


def _check_box(values: Sequence[Any], where: str) -> list[float]:
    """Return four finite floats with x1 <= x2 and y1 <= y2; ``where`` begins an error's message."""
    try:
        x1, y1, x2, y2 = (_number(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where}: box {reprlib.repr(values)}, expected four numbers x1, y1, x2, y2 "
            f"({', '.join(_BOX_FIELDS)} in XML)"
        ) from error
    xyxy = [x1, y1, x2, y2]
    # The limit also refuses NaN and infinity. float32 could not hold the largest numbers.
    if not all(abs(value) < 1e9 for value in xyxy):
        raise ValueError(f"{where}: box {xyxy}, expected finite numbers of pixels")
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{where}: box {xyxy} has x2 < x1 or y2 < y1, expected x1, y1, x2, y2")
    return xyxy


def _number(value: Any) -> float:
    """Return a number of an annotation; Python would also take ``True`` and ``"1_0"``."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


def read_split(root: str | os.PathLike[str], split: str) -> list[str]:
    """Read the image ids of ``ImageSets/Main/{split}.txt``, in the file's order.

    Blank lines are left out, and so is the column of 1, 0 or -1 that the devkit's files for one
    class have.

    Raises:
        ValueError: no devkit, no such split, or no id in it.
    """
    folder = find_voc_folder(root) / "ImageSets" / "Main"
    path = folder / f"{split}.txt"
    if not path.is_file():
        # Names with "_" are the devkit's files for one class; whole splits come first.
        names = sorted((file.stem for file in folder.glob("*.txt")), key=lambda n: ("_" in n, n))
        raise ValueError(f"no split {split!r} in {folder}; splits there: {', '.join(names)}")
    lines = read_text(path).splitlines()
    ids = [re.sub(r"\s+(-1|0|1)$", "", line.strip()) for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"{path} is empty; expected one image id per line")
    if absolute := [image_id for image_id in ids if os.path.isabs(image_id)]:
        raise ValueError(
            f"{path} lists {absolute[0]!r}; expected the names of the files in JPEGImages, without "
            "folder and suffix"
        )
    return ids


def missing_folders(folder: Path) -> list[str]:
    """Return which of the devkit's folders do not exist in ``folder``."""
    return [part for part in REQUIRED_FOLDERS if not (folder / part).is_dir()]


def check_complete(folder: Path) -> None:
    """Raise ValueError unless ``folder`` has the devkit's folders."""
    missing = missing_folders(folder)
    if missing:
        raise ValueError(
            f"{folder} is incomplete: {', '.join(missing)} missing. Add what is missing, or move "
            "the folder away and call download_voc2007 again"
        )


# ---------------------------------------------------------------------------------------
# Index
# ---------------------------------------------------------------------------------------


def build_index(root: str | os.PathLike[str], split: str) -> list[Any]:
    """Build the course's index of one split from the devkit's XML, without difficult objects.

    Args:
        root: data folder, see ``find_voc_folder``.
        split: name of a file in ``ImageSets/Main``, as in ``read_split``.

    Returns:
        ``[[path, [{"name", "xyxy"}, ...]], ...]`` in the split's order, ready for JSON. Where an
        image file does not exist, its path is the one with ``.jpg``.

    Raises:
        ValueError: as ``read_split`` and ``read_annotation``.
    """
    return [
        [_INDEX_ROOT + image.path.relative_to(root).as_posix(), image.ordinary]
        for image in _read_devkit(root, split)
    ]


def _read_devkit(root: str | os.PathLike[str], split: str) -> list[ImageAnnotation]:
    """Read the XML files of one split; image files may be missing."""
    return [
        ImageAnnotation(image, *read_annotation(annotation))
        for annotation, image in list_files(root, split)
    ]


def list_files(root: str | os.PathLike[str], split: str) -> list[tuple[Path, Path]]:
    """List the XML file and the image file of each image of a split, in the split's order.

    The files are not opened. Where an image file does not exist, its path is the one with
    ``.jpg``.

    Raises:
        ValueError: as ``read_split``.
    """
    folder = find_voc_folder(root)
    annotations, images = folder / "Annotations", folder / "JPEGImages"
    names = _image_names(images)
    return [
        (annotations / f"{image_id}.xml", images / names.get(image_id, f"{image_id}.jpg"))
        for image_id in read_split(root, split)
    ]


def _image_names(folder: Path) -> dict[str, str]:
    """Map ids to image file names: ``.jpg`` where it exists, then ``.jpeg``, then ``.png``."""
    files = [Path(name) for name in os.listdir(folder)]
    files = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    files.sort(key=lambda file: (_IMAGE_SUFFIXES.index(file.suffix.lower()), file.suffix != ".jpg"))
    # The last entry of a key wins, so the preferred file comes last.
    return {file.stem: file.name for file in reversed(files)}


def load_index(root: str | os.PathLike[str], split: str) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Load one split, without difficult objects; the arguments are those of ``load_annotations``.

    Returns:
        For each image its absolute path and its objects, each
        ``{"name": str, "xyxy": [x1, y1, x2, y2]}``, boxes as floats in pixels of the file.

    Raises:
        ValueError: as ``load_annotations``.
    """
    return [(image.path, image.ordinary) for image in load_annotations(root, split)]


def load_annotations(
    root: str | os.PathLike[str], split: str, *, require_images: bool = True
) -> list[ImageAnnotation]:
    """Load one split: ``root/voc07_{split}.json``, or the devkit's XML where that is missing.

    Paths in the JSON file use forward slashes; they are relative to ``root``, with or without
    ``./here/``, or absolute. The JSON file decides on the ordinary objects and their order. It has
    neither difficult objects nor image sizes: these are added from ``Annotations/NAME.xml`` beside
    the folder of the image, where that file exists.

    Args:
        root: data folder.
        split: ``"train"``, ``"val"`` or any other.
        require_images: raise an error where image files are missing.

    Returns:
        The images in the split's order.

    Raises:
        ValueError: neither source exists, the JSON file or an XML file is broken or has another
            structure, a box has x2 < x1 or y2 < y1, or image files are missing.
    """
    root = Path(os.path.abspath(root))
    images = [_with_xml(image) for image in _read_images(root, split)]
    missing = [image.path for image in images if not os.path.isfile(image.path)]
    if missing and require_images:
        raise ValueError(
            f"{len(missing)} of the {len(images)} image files of split {split!r} are missing, the "
            f"first is {missing[0]}. Complete the data folder {root}"
        )
    return images


def _with_xml(image: ImageAnnotation) -> ImageAnnotation:
    """Complete an image of the JSON index from its XML file, if there is one."""
    # Unlike Path.is_file, os.path.isfile also answers for names that no file can have.
    xml = image.path.parent.parent / "Annotations" / f"{image.path.stem}.xml"
    if image.difficult_known or not os.path.isfile(xml):
        return image
    found = read_annotation(xml)
    given = [(item["name"], item["xyxy"]) for item in image.objects]
    difficult = [
        item
        for item in found.objects
        # The JSON file may count an object that the XML file flags.
        if item["difficult"] and (item["name"], item["xyxy"]) not in given
    ]
    return ImageAnnotation(image.path, image.objects + difficult, found.size)


def class_names(
    root: str | os.PathLike[str], splits: Sequence[str] = ("train", "val")
) -> list[str]:
    """Return the sorted names of all objects in those of the ``splits`` that exist.

    Where a split is read from XML, difficult objects count, too.

    Raises:
        ValueError: none of the splits exists, none has an object, or as ``load_index``.
    """
    root = Path(os.path.abspath(root))
    present = [split for split in splits if has_split(root, split)]
    names = {
        item["name"]
        for split in present
        for image in _read_images(root, split)
        for item in image.objects
    }
    if not names:
        raise ValueError(
            f"no objects in {root}. Splits looked for: {', '.join(splits)}; found: "
            f"{', '.join(present) or 'none'}. Expected voc07_{{split}}.json or a VOC devkit with "
            "objects; give another folder or other splits"
        )
    return sorted(names)


def index_path(root: str | os.PathLike[str], split: str) -> Path:
    """Return the path of the course's JSON index of a split, which need not exist."""
    return Path(root) / f"voc07_{split}.json"


def has_split(root: str | os.PathLike[str], split: str) -> bool:
    """Return whether ``root`` has a split, as the course's JSON index or in a devkit."""
    if index_path(root, split).is_file():
        return True
    try:
        return (find_voc_folder(root) / "ImageSets" / "Main" / f"{split}.txt").is_file()
    except ValueError:
        return False


def _read_images(root: Path, split: str) -> list[ImageAnnotation]:
    """Read one split from the JSON index alone, or from XML where there is no JSON file."""
    path = index_path(root, split)
    if path.is_file():
        return [
            ImageAnnotation(
                root / name.removeprefix(_INDEX_ROOT),
                [{**item, "difficult": False} for item in objects],
                difficult_known=False,
            )
            for name, objects in _read_json(path)
        ]
    try:
        read_split(root, split)
    except ValueError as error:
        raise ValueError(
            f"no annotations of split {split!r}. Looked for {path}: not there. Looked for a VOC "
            f"devkit: {error}. Put the course's {path.name} and images into {root}, or get the "
            f"devkit with eecs598.data.download_voc2007({str(root)!r})"
        ) from error
    return _read_devkit(root, split)


def _read_json(path: Path) -> list[Any]:
    index = read_json(path)
    if not isinstance(index, list) or not index:
        raise ValueError(f"{path} holds {reprlib.repr(index)}; expected a list with an entry")
    return [_check_entry(entry, f"{path}, entry {n}") for n, entry in enumerate(index)]


def _check_entry(entry: object, where: str) -> list[Any]:
    """Return one entry of the JSON index with boxes of floats, or raise ValueError."""
    match entry:
        case [str(image_path), list(objects)]:
            return [image_path, [_check_object(item, where) for item in objects]]
    raise ValueError(f"{where} is {reprlib.repr(entry)}; expected [path, [objects]]")


def _check_object(item: object, where: str) -> dict[str, Any]:
    match item:
        case {"name": str(name), "xyxy": list(values)} if name and all(
            isinstance(value, (int, float)) for value in values
        ):
            return {"name": name, "xyxy": _check_box(values, where)}
    raise ValueError(
        f"{where} has the object {reprlib.repr(item)}; expected "
        '{"name": str, "xyxy": [x1, y1, x2, y2]}'
    )
