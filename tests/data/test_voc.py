"""The devkit's download against a local server, and the index against the data itself."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from eecs598.data import voc

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "voc2007").is_dir(), reason="../shared/voc2007 is not here"
)

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


# ---------------------------------------------------------------------------------------
# Made data
# ---------------------------------------------------------------------------------------


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


def tar_bytes(*members: tarfile.TarInfo, folder: Path | None = None) -> bytes:
    """A tar archive of `folder/VOCdevkit` and, after it, of `members`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if folder is not None:
            tar.add(folder / "VOCdevkit", "VOCdevkit")
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def tar_member(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 5 if kind == tarfile.REGTYPE else 0
    return member


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("made")
    make_devkit(folder / "VOCdevkit" / "VOC2007")
    return tar_bytes(folder=folder)


@pytest.fixture
def root(tmp_path) -> Path:
    make_devkit(tmp_path / "data" / "VOCdevkit" / "VOC2007")
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------
# Server
# ---------------------------------------------------------------------------------------


class Server:
    """Serves the archive on 127.0.0.1; the path says in which way. Counts the requests."""

    def __init__(self, archive: bytes):
        self.body = archive
        self.requests: list[str] = []
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        way = handler.path.strip("/")
        if way == "absent":
            handler.send_error(404)
            return
        body = self.body
        if way == "wrong":
            body = body[::-1]
        if way == "flaky" and len(self.requests) == 1:
            body = body[:100]
        handler.send_response(200)
        if way != "unsized":
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        half = way in ("stall", "truncated", "unsized")
        handler.wfile.write(body[: len(body) // 2] if half else body)
        if way == "stall":
            handler.wfile.flush()
            self.released.wait(20)

    def url(self, way: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/{way}"

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(archive):
    server = Server(archive)
    yield server
    server.close()


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty current directory, a short pause, and no proxy between test and server."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(voc, "RETRY_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


def md5_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def fetch(root: Path, server: Server, *ways: str, **settings) -> Path:
    settings = {"md5": md5_of(server.body), "timeout": 5.0, **settings}
    return voc.download_voc2007(root, sources=[server.url(way) for way in ways], **settings)


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---------------------------------------------------------------------------------------
# Download
# ---------------------------------------------------------------------------------------


def test_download_then_second_call_without_request(tmp_path, cwd, server, capsys):
    root = tmp_path / "new" / "data"
    folder = fetch(root, server, "good")
    assert "100%" in capsys.readouterr().err
    assert folder == root / "VOCdevkit" / "VOC2007"
    assert voc.build_index(root, "train") == TRAIN_INDEX
    assert all(path.stat().st_size for path, _ in voc.load_index(root, "train"))
    assert server.requests == ["/good"]
    assert fetch(root, server, "good") == folder
    assert server.requests == ["/good"]
    assert names_in(root) == ["VOCdevkit"] and names_in(cwd) == []


def test_download_into_a_relative_root(cwd, server):
    assert fetch(Path("data"), server, "good") == Path("data/VOCdevkit/VOC2007")
    assert names_in(cwd) == ["data"] and names_in(cwd / "data") == ["VOCdevkit"]


def test_stall_falls_to_second_source_and_restores_socket_timeout(tmp_path, cwd, server):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(77.0)
    try:
        fetch(tmp_path / "data", server, "stall", "good", timeout=0.3, retries=2)
        assert socket.getdefaulttimeout() == 77.0
    finally:
        socket.setdefaulttimeout(before)
    assert server.requests == ["/stall", "/stall", "/good"]
    assert voc.build_index(tmp_path / "data", "train") == TRAIN_INDEX
    assert names_in(tmp_path / "data") == ["VOCdevkit"] and names_in(cwd) == []


@pytest.mark.parametrize("way", ["truncated", "unsized", "wrong", "absent"])
def test_bad_source_then_good_source(tmp_path, cwd, server, way):
    fetch(tmp_path / "data", server, way, "good", retries=2)
    assert server.requests == [f"/{way}", f"/{way}", "/good"]
    assert voc.build_index(tmp_path / "data", "train") == TRAIN_INDEX


def test_second_try_of_the_same_source(tmp_path, cwd, server):
    fetch(tmp_path / "data", server, "flaky")
    assert server.requests == ["/flaky", "/flaky"]


def test_every_source_fails(tmp_path, cwd, server):
    ways = ["absent", "truncated", "unsized", "wrong", "stall"]
    with pytest.raises(RuntimeError) as caught:
        fetch(tmp_path / "data", server, *ways, timeout=0.3, retries=1)
    lines = str(caught.value).splitlines()
    reasons = ["404", "retrieval incomplete", "MD5", "MD5", "timed out"]
    for line, way, reason in zip(lines[1:6], ways, reasons, strict=True):
        assert server.url(way) in line and reason in line
    assert "By hand" in lines[6] and str(tmp_path / "data") in lines[6]
    assert names_in(tmp_path / "data") == [] and names_in(cwd) == []


def test_no_server_and_unusable_url(tmp_path, cwd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        sources = [f"http://127.0.0.1:{free.getsockname()[1]}/x.tar", "no url"]
        with pytest.raises(RuntimeError, match=r"(?s)/x\.tar: .*refused.*no url: .*tried 1"):
            voc.download_voc2007(tmp_path / "data", sources=sources, retries=1)
    assert names_in(tmp_path / "data") == [] and names_in(cwd) == []


def test_archive_in_root_is_used_and_kept(tmp_path, cwd, archive):
    (tmp_path / voc.ARCHIVE_NAME).write_bytes(archive)
    voc.download_voc2007(tmp_path, sources=(), md5=md5_of(archive))
    assert voc.build_index(tmp_path, "train") == TRAIN_INDEX
    assert (tmp_path / voc.ARCHIVE_NAME).read_bytes() == archive


def test_half_an_archive_in_root_is_not_used(tmp_path, cwd, archive):
    half = tmp_path / voc.ARCHIVE_NAME
    half.write_bytes(archive[:5000])
    with pytest.raises(RuntimeError, match=re.escape(str(half)) + ".*MD5"):
        voc.download_voc2007(tmp_path, sources=(), md5=md5_of(archive))
    assert half.exists() and not (tmp_path / "VOCdevkit").exists()


def test_incomplete_devkit_is_reported_and_left_alone(tmp_path, cwd, server):
    own = tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / "mine.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(ValueError, match="incomplete: Annotations, ImageSets/Main missing"):
        fetch(tmp_path, server, "good")
    assert own.read_bytes() == b"mine" and server.requests == []


@pytest.mark.parametrize("place", ["data", "data/VOCdevkit", "data/VOCdevkit/VOC2007"])
def test_file_where_a_folder_belongs(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        voc.download_voc2007(tmp_path / "data", sources=())


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"timeout": -1.0}, {"retries": 0}])
def test_download_settings_out_of_range(tmp_path, settings):
    with pytest.raises(ValueError, match="expected timeout > 0"):
        voc.download_voc2007(tmp_path, sources=(), **settings)


def test_other_devkits_survive(tmp_path, cwd, server):
    sibling = tmp_path / "VOCdevkit" / "VOC2012" / "note.txt"
    sibling.parent.mkdir(parents=True)
    sibling.write_text("keep")
    fetch(tmp_path, server, "good")
    assert sibling.read_text() == "keep"
    assert names_in(tmp_path / "VOCdevkit") == ["VOC2007", "VOC2012"]


def test_failed_extraction_publishes_nothing(tmp_path, cwd, server, monkeypatch):
    def half(archive, destination):
        make_devkit(Path(destination) / "VOCdevkit" / "VOC2007")
        raise OSError("disk full")

    monkeypatch.setattr(voc, "extract_archive", half)
    with pytest.raises(OSError, match="disk full"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []


def test_devkit_published_by_another_process_meanwhile(tmp_path, cwd, server, monkeypatch):
    extract = voc.extract_archive

    def race(archive, destination):
        extract(archive, destination)
        make_devkit(tmp_path / "data" / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr(voc, "extract_archive", race)
    assert fetch(tmp_path / "data", server, "good").is_dir()
    assert names_in(tmp_path / "data") == ["VOCdevkit"]


def test_rename_error_is_not_hidden(tmp_path, cwd, server, monkeypatch):
    def rename(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(voc.os, "rename", rename)
    with pytest.raises(PermissionError, match="read-only"):
        fetch(tmp_path / "data", server, "good")
    assert not (tmp_path / "data" / "VOCdevkit" / "VOC2007").exists()


def test_archive_of_something_else(tmp_path, cwd, server):
    server.body = tar_bytes(tar_member("VOCdevkit/VOC2007/JPEGImages/1.jpg"))
    with pytest.raises(ValueError, match="has no Annotations, ImageSets/Main in VOCdevkit"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []


def test_published_constants():
    assert len(voc.VOC2007_CLASSES) == 20 and list(voc.VOC2007_CLASSES) == sorted(
        set(voc.VOC2007_CLASSES)
    )
    assert len(voc.ARCHIVE_SOURCES) == 2
    assert all(url.endswith("/" + voc.ARCHIVE_NAME) for url in voc.ARCHIVE_SOURCES)
    assert "umich" in voc.ARCHIVE_SOURCES[0] and re.fullmatch("[0-9a-f]{32}", voc.ARCHIVE_MD5)


def test_verify_md5(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    voc.verify_md5(path, md5_of(b"abc").upper())
    with pytest.raises(ValueError, match=f"file has MD5 {md5_of(b'abc')}, expected 0123"):
        voc.verify_md5(path, "0123")


# ---------------------------------------------------------------------------------------
# Extraction
# ---------------------------------------------------------------------------------------

HOSTILE = {
    "parent": [tar_member("../evil")],
    "nested parent": [tar_member("VOCdevkit/../../evil")],
    "windows": [tar_member("C:/evil")],
    "symlink": [tar_member("evil", kind=tarfile.SYMTYPE, link="../..")],
    "write through symlink": [
        tar_member("evil", kind=tarfile.SYMTYPE, link=".."),
        tar_member("evil/evil"),
    ],
    "hard link": [tar_member("evil", kind=tarfile.LNKTYPE, link="../secret")],
    "fifo": [tar_member("evil", kind=tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize("kind", [*HOSTILE, "absolute"])
def test_member_that_leaves_its_folder(tmp_path, cwd, server, kind):
    members = HOSTILE.get(kind) or [tar_member(str(tmp_path / "evil"))]
    before = names_in(tmp_path)
    server.body = tar_bytes(*members)
    path = tmp_path / "hostile.tar"
    path.write_bytes(server.body)
    with pytest.raises(ValueError, match=r"hostile\.tar, at member '.*evil'"):
        voc.extract_archive(path, tmp_path / "out" / "deep")
    with pytest.raises(ValueError, match=voc.ARCHIVE_NAME):
        fetch(tmp_path / "data", server, "good")
    written = [entry for entry in tmp_path.rglob("*") if "evil" in entry.name]
    assert written == []
    assert set(names_in(tmp_path)) - set(before) <= {"hostile.tar", "out", "data"}
    assert names_in(tmp_path / "data") == [] and names_in(cwd) == []


def cut_in_member(data: bytes) -> bytes:
    return data[: data.rindex(b"\xff\xd9")]  # inside the last JPEG


def cut_between_members(data: bytes) -> bytes:
    return data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0")


def cut_in_header(data: bytes) -> bytes:
    return cut_between_members(data) + b"VOCdevkit/"


@pytest.mark.parametrize(
    "cut", [cut_in_member, cut_between_members, cut_in_header, lambda data: data[:100]]
)
def test_truncated_archive(tmp_path, archive, cut):
    path = tmp_path / "cut.tar"
    path.write_bytes(cut(archive))
    with pytest.raises(ValueError, match=r"cut\.tar"):
        voc.extract_archive(path, tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"<html>not here</html>" * 100])
def test_not_an_archive(tmp_path, data):
    path = tmp_path / "page.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"page\.tar, at its beginning"):
        voc.extract_archive(path, tmp_path / "out")


def test_truncated_archive_with_its_own_md5_is_not_published(tmp_path, cwd, server):
    server.body = cut_in_member(server.body)
    with pytest.raises(ValueError, match="Download it again|download it again"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []


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
    path.write_text(f"<annotation>{objects}{no_flag}</annotation>")
    assert voc.read_annotation(path) == [
        {"name": "dog", "xyxy": [1.0, 2.0, 30.0, 40.0], "difficult": False},
        {"name": "cat", "xyxy": [5.5, 6.5, 7.5, 8.5], "difficult": True},
        {"name": "bus", "xyxy": [4.0, 4.0, 4.0, 4.0], "difficult": False},
    ]


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
    full = voc.build_index(root, "train", include_difficult=True)
    assert full[0][1] == [
        {"name": "dog", "xyxy": [1, 2, 30, 40], "difficult": False},
        {"name": "cat", "xyxy": [5.5, 6.5, 7.5, 8.5], "difficult": True},
    ]
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
    (root / "VOCdevkit/VOC2007/Annotations/000001.xml").unlink()  # not looked at any more
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
        ('[["a', "is not valid JSON"),
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
    with pytest.raises(ValueError, match=r"voc07_train\.json is not valid JSON"):
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
    with pytest.raises(ValueError, match="not valid JSON"):
        voc.class_names(root)


@needs_shared
@pytest.mark.parametrize("split", ["train", "val"])
def test_xml_gives_the_course_index_exactly(split):
    root = SHARED / "voc2007"
    with open(root / f"voc07_{split}.json", encoding="utf-8") as file:
        assert voc.build_index(root, split) == json.load(file)


@needs_shared
def test_voc2007_class_names():
    root = SHARED / "voc2007"
    assert voc.class_names(root) == list(voc.VOC2007_CLASSES)
    assert len(voc.load_index(root, "val")) == len(voc.read_split(root, "val"))
