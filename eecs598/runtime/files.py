"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["claimed", "remove_unfinished", "replacing", "write_json"]


_MARK = ".part"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside ``path`` to write to; it becomes ``path`` once the block ends without error.

    Missing parent folders are made. The suffix stays, since libraries choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{_MARK}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file)  # the content reaches the disk before the name does
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what ``replacing`` left in a folder when its process was killed."""
    for path in Path(folder).glob(f".*{_MARK}*"):
        path.unlink()


@contextlib.contextmanager
def claimed(folder: str | os.PathLike) -> Iterator[None]:
    """Within the block, no other process that asks for this folder gets it.

    Raises:
        ValueError: another process of this machine has it. What a killed process left is no
            obstacle.
    """
    path = Path(folder) / ".lock"
    try:
        host, pid = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        host = pid = None
    if host == platform.node() and _is_running(int(pid)):
        raise ValueError(
            f"process {pid} is working in {folder}. Wait for it, or stop it; if that is some other "
            f"program, remove {path}."
        )
    path.write_text(f"{platform.node()} {os.getpid()}", encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere, asking would end the process
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
