"""Download of PASCAL VOC 2007: fetch the archive, verify its checksum, extract it safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path, PurePosixPath, PureWindowsPath

import wget
from tqdm.auto import tqdm

from eecs598.data import voc

ARCHIVE_NAME = "VOCtrainval_06-Nov-2007.tar"
ARCHIVE_MD5 = "c52e279531787c972589f7e41ab4ae64"
ARCHIVE_SOURCES: tuple[str, ...] = (
    "https://web.eecs.umich.edu/~justincj/data/VOCtrainval_06-Nov-2007.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtrainval_06-Nov-2007.tar",
)
RETRY_PAUSE = 2.0  # seconds between two tries of one source


def download_voc2007(
    root: str | os.PathLike[str],
    *,
    sources: Sequence[str] = ARCHIVE_SOURCES,
    md5: str = ARCHIVE_MD5,
    timeout: float = 30.0,
    retries: int = 3,
) -> Path:
    """Download the devkit of VOC 2007 with its train and val splits into ``root``.

    Where the devkit exists already, nothing is downloaded. An archive named ``ARCHIVE_NAME`` in
    ``root`` with the right MD5 is used in place of a download and kept; a downloaded archive is
    removed once it is extracted. Everything is prepared in a temporary folder inside ``root`` and
    renamed as the last step, so ``VOCdevkit/VOC2007`` is either whole or absent, and a failure
    leaves nothing behind.

    Args:
        root: data folder, made if it does not exist.
        sources: URLs of the archive, tried in this order.
        md5: hexadecimal MD5 of the archive.
        timeout: seconds without data from the server after which a try has failed. While a
            transfer runs, it is the default of all new sockets of the process.
        retries: tries for each source.

    Returns:
        ``root/VOCdevkit/VOC2007``.

    Raises:
        ValueError: an argument is out of range, ``root/VOCdevkit/VOC2007`` exists and is
            incomplete, or the archive is not a whole VOC 2007 devkit.
        ConnectionError: the archive could be downloaded from no source; the message has the reason
            for each.
    """
    if timeout <= 0 or retries < 1:
        raise ValueError(
            f"timeout is {timeout} and retries is {retries}; expected timeout > 0 seconds and "
            "retries >= 1"
        )
    root = Path(root)
    devkit = root / "VOCdevkit"
    target = devkit / "VOC2007"
    for folder in (root, devkit, target):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; expected a folder. Move it or choose another")
    if target.exists():
        voc.check_complete(target)
        return target

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".voc2007-", dir=root) as staging_name:
        staging = Path(staging_name)
        archive = _find_or_download(root, staging, sources, md5, timeout, retries)
        extract_archive(archive, staging / "extracted")
        extracted = staging / "extracted" / "VOCdevkit" / "VOC2007"
        missing = voc.missing_folders(extracted)
        if missing:
            raise ValueError(
                f"{archive.name} has no {', '.join(missing)} in VOCdevkit/VOC2007; expected "
                f"the VOC 2007 devkit with {', '.join(voc.REQUIRED_FOLDERS)}"
            )
        devkit.mkdir(exist_ok=True)
        try:
            os.rename(extracted, target)
        except OSError:
            # Another process may have finished the same download in the meantime.
            if voc.missing_folders(target):
                raise
    return target


def verify_md5(path: str | os.PathLike[str], md5: str) -> None:
    """Raise ValueError unless the file's MD5 is the hexadecimal ``md5``."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != md5.lower():
        raise ValueError(
            f"{Path(path).name} has MD5 {digest.hexdigest()}, expected {md5}: it is truncated or "
            "another file. Download it again"
        )


def extract_archive(archive: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Extract an uncompressed tar archive of files and folders into ``destination``.

    Raises:
        ValueError: the archive is truncated or no tar archive, or a member is a link or a
            device, or has a path outside ``destination``. Nothing is written outside
            ``destination``; members before the refused one may have been extracted.
    """
    member = None
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                _check_member(member)
                tar.extract(member, destination, filter="data")
    except tarfile.TarError as error:
        place = f"member {member.name!r}" if member else "its beginning"
        raise ValueError(
            f"cannot extract {archive}, at {place}: {error}. Expected a whole tar archive whose "
            "files and folders all stay in the folder it is extracted to; download it again"
        ) from error
    if not _has_end_mark(archive):
        last = f"after member {member.name!r}" if member else "at its beginning"
        raise ValueError(
            f"{archive} ends {last} without the end mark of a tar archive: it is truncated. "
            "Download it again"
        )


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuse what the ``data`` filter would rename (absolute paths) or allow (links)."""
    if PurePosixPath(member.name).is_absolute() or PureWindowsPath(member.name).is_absolute():
        raise tarfile.TarError("it has an absolute path")
    if not (member.isfile() or member.isdir()):
        raise tarfile.TarError("it is a link or a device")


def _has_end_mark(archive: str | os.PathLike[str]) -> bool:
    """Return whether two blocks of zeros end the archive.

    ``tarfile`` itself accepts an archive that was cut between two members.
    """
    with open(archive, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1024))
        return not any(file.read())


def _find_or_download(
    root: Path, staging: Path, sources: Sequence[str], md5: str, timeout: float, retries: int
) -> Path:
    """Return the user's own archive in ``root`` if it is whole, or a download in ``staging``."""
    failures = []
    own = root / ARCHIVE_NAME
    if own.is_file():
        try:
            verify_md5(own, md5)
            return own
        except ValueError as error:
            failures.append(f"{own}: {error}")

    archive = staging / ARCHIVE_NAME
    for url in sources:
        for attempt in range(retries):
            if attempt:
                time.sleep(RETRY_PAUSE)
            try:
                _transfer(url, archive, timeout)
                verify_md5(archive, md5)
                return archive
            except (OSError, HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
                _empty_folder(staging)
        failures.append(f"{url}: {reason} (tried {retries} times)")
    raise ConnectionError(
        "could not download the VOC 2007 archive:\n"
        + "".join(f"  - {failure}\n" for failure in failures or ["no source was given"])
        + f"By hand: download {ARCHIVE_NAME} (MD5 {md5}) with a browser, extract it, and put its "
        f"VOCdevkit/ folder into {root}, or put the archive itself there and try again."
    )


def _transfer(url: str, target: Path, timeout: float) -> None:
    """Download ``url`` to ``target`` with a progress bar; a stall raises TimeoutError."""
    with tqdm(desc=target.name, unit="B", unit_scale=True, unit_divisor=1024) as progress:

        def bar(current: int, total: int, width: int) -> None:
            if total > 0:  # -1 where the server does not give the length
                progress.total = total
                progress.update(current - progress.n)

        with _socket_timeout(timeout):
            # With a folder in ``out``, wget puts its temporary file there and not into the
            # current directory.
            wget.download(url, out=str(target), bar=bar)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default timeout of sockets, which ``wget`` uses: it has no timeout of its own."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
