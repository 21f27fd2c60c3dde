"""The devkit's download, against a local server, and its extraction."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eecs598.data import voc, voc_download
from tests.data.devkit import TRAIN_INDEX, make_devkit


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
    monkeypatch.setattr(voc_download, "RETRY_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


def md5_of(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def fetch(root: Path, server: Server, *ways: str, **settings) -> Path:
    settings = {"md5": md5_of(server.body), "timeout": 5.0, **settings}
    return voc_download.download_voc2007(
        root, sources=[server.url(way) for way in ways], **settings
    )


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
    with pytest.raises(ConnectionError) as caught:
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
        with pytest.raises(ConnectionError, match=r"(?s)/x\.tar: .*refused.*no url: .*tried 1"):
            voc_download.download_voc2007(tmp_path / "data", sources=sources, retries=1)
    assert names_in(tmp_path / "data") == [] and names_in(cwd) == []


def test_archive_in_root_is_used_and_kept(tmp_path, cwd, archive):
    (tmp_path / voc_download.ARCHIVE_NAME).write_bytes(archive)
    voc_download.download_voc2007(tmp_path, sources=(), md5=md5_of(archive))
    assert voc.build_index(tmp_path, "train") == TRAIN_INDEX
    assert (tmp_path / voc_download.ARCHIVE_NAME).read_bytes() == archive


def test_half_an_archive_in_root_is_not_used(tmp_path, cwd, archive):
    half = tmp_path / voc_download.ARCHIVE_NAME
    half.write_bytes(archive[:5000])
    with pytest.raises(ConnectionError, match=re.escape(str(half)) + ".*MD5"):
        voc_download.download_voc2007(tmp_path, sources=(), md5=md5_of(archive))
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
        voc_download.download_voc2007(tmp_path / "data", sources=())


@pytest.mark.parametrize("settings", [{"timeout": 0.0}, {"timeout": -1.0}, {"retries": 0}])
def test_download_settings_out_of_range(tmp_path, settings):
    with pytest.raises(ValueError, match="expected timeout > 0"):
        voc_download.download_voc2007(tmp_path, sources=(), **settings)


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

    monkeypatch.setattr(voc_download, "extract_archive", half)
    with pytest.raises(OSError, match="disk full"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []


def test_devkit_published_by_another_process_meanwhile(tmp_path, cwd, server, monkeypatch):
    extract = voc_download.extract_archive

    def race(archive, destination):
        extract(archive, destination)
        make_devkit(tmp_path / "data" / "VOCdevkit" / "VOC2007")

    monkeypatch.setattr(voc_download, "extract_archive", race)
    assert fetch(tmp_path / "data", server, "good").is_dir()
    assert names_in(tmp_path / "data") == ["VOCdevkit"]


def test_rename_error_is_not_hidden(tmp_path, cwd, server, monkeypatch):
    def rename(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(voc_download.os, "rename", rename)
    with pytest.raises(PermissionError, match="read-only"):
        fetch(tmp_path / "data", server, "good")
    assert not (tmp_path / "data" / "VOCdevkit" / "VOC2007").exists()


def test_archive_of_something_else(tmp_path, cwd, server):
    server.body = tar_bytes(tar_member("VOCdevkit/VOC2007/JPEGImages/1.jpg"))
    with pytest.raises(ValueError, match="has no Annotations, ImageSets/Main in VOCdevkit"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []


def test_published_constants():
    assert len(voc_download.ARCHIVE_SOURCES) == 2
    assert all(
        url.endswith("/" + voc_download.ARCHIVE_NAME) for url in voc_download.ARCHIVE_SOURCES
    )
    assert "umich" in voc_download.ARCHIVE_SOURCES[0]
    assert re.fullmatch("[0-9a-f]{32}", voc_download.ARCHIVE_MD5)


def test_verify_md5(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    voc_download.verify_md5(path, md5_of(b"abc").upper())
    with pytest.raises(ValueError, match=f"file has MD5 {md5_of(b'abc')}, expected 0123"):
        voc_download.verify_md5(path, "0123")


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
        voc_download.extract_archive(path, tmp_path / "out" / "deep")
    with pytest.raises(ValueError, match=voc_download.ARCHIVE_NAME):
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
        voc_download.extract_archive(path, tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"<html>not here</html>" * 100])
def test_not_an_archive(tmp_path, data):
    path = tmp_path / "page.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"page\.tar, at its beginning"):
        voc_download.extract_archive(path, tmp_path / "out")


def test_truncated_archive_with_its_own_md5_is_not_published(tmp_path, cwd, server):
    server.body = cut_in_member(server.body)
    with pytest.raises(ValueError, match="Download it again|download it again"):
        fetch(tmp_path / "data", server, "good")
    assert names_in(tmp_path / "data") == []
