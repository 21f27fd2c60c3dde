"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["remove_unfinished", "replacing", "write_json"]


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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
