"""Files: text and JSON read with clear errors, atomic writes, a lock for a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "atomic_write",
    "folder_lock",
    "read_json",
    "read_text",
    "remove_unfinished",
    "write_json",
]

_MARK = ".part"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a text file in UTF-8, with or without a byte order mark; line breaks stay as they are.

    Raises:
        ValueError: the file can't be read, or is in another encoding.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}. Save it in "
            "that encoding"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: the file can't be read, or is not JSON.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        value = json.loads(data.decode(json.detect_encoding(data)))
        if _SURROGATE.search(data):  # a half of a pair could be neither printed nor written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} can't be read as JSON: it is not in {error.encoding.upper()}: {error.reason} "
            f"at byte {error.start}. Save it in UTF-8"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} can't be read as JSON: {error}. Export or download it again"
        ) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that it is either whole or, after an error, as it was before.

    Missing parent folders are made.

    Args:
        path: of the file.

    Yields:
        A path beside ``path`` to write to, with the same suffix, since libraries choose a format
        by it. It is renamed to ``path`` when the block ends without an error, and removed
        otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{_MARK}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file)  # the content must reach the disk before the new name does
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # Python does not name the file of a write that fails, as on a full disk.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove the files that ``atomic_write`` left in a folder when its process was killed."""
    for path in Path(folder).glob(f".*{_MARK}*"):
        path.unlink()


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from entering this block for the same folder.

    The lock is one of the operating system on the file ``.lock`` in the folder. It ends with its
    process, however that ends, so there is no stale lock that two processes could take over at the
    same time. Where there are no such locks (Windows, some network file systems), nothing is kept
    out.

    Raises:
        ValueError: another process holds the lock.
    """
    path = Path(folder) / ".lock"
    file = _open_locked(path)
    if file is None:
        holder = ""
        with contextlib.suppress(OSError):  # it may leave in this moment
            holder = path.read_text(encoding="utf-8")
        raise ValueError(
            f"{holder or 'another process'} is working in {folder}. Wait for it, or stop it."
        )
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_locked(path: Path) -> IO[str] | None:
    """Open a file and lock it; None where another process holds the lock."""
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
        # The file may have been removed by its holder between the two calls.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
