"""A journal of predictions: results are kept as they come, so that a stopped run can go on.

Each process appends the results of its images to a file of its own, one JSON object per line, which
begins with the number of the image. At the end, one process puts them in order into one JSON file.
Only the place of each line is kept in memory, whatever the number of images.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from eecs598.runtime import atomic_write, write_json

__all__ = ["Journal", "Totals"]

_FACTS = "journal.json"
_LINES = "journal-{}.jsonl"


class Totals(NamedTuple):
    """What a complete run has found."""

    images: int
    skipped: int
    detections: int


class Journal:
    """The results so far of a run over numbered images, in a folder.

    Args:
        folder: of the run, which exists.
        num_images: results are numbered from 0 to ``num_images - 1``.
    """

    def __init__(self, folder: Path, num_images: int) -> None:
        self.folder = folder
        self._files = np.full(num_images, -1, dtype=np.int32)
        self._offsets = np.zeros(num_images, dtype=np.int64)
        self._paths: list[Path] = []

    @property
    def exists(self) -> bool:
        """Whether the folder holds a journal."""
        return (self.folder / _FACTS).is_file()

    def begin(self, facts: dict[str, Any]) -> None:
        """Start a journal.

        Args:
            facts: what decides the results, as values that JSON can hold.
        """
        write_json(self.folder / _FACTS, facts)

    def check(self, facts: dict[str, Any]) -> None:
        """Compare the facts of the stopped run with those of now.

        Raises:
            ValueError: they differ, so that the results would not belong together.
        """
        with open(self.folder / _FACTS, encoding="utf-8") as file:
            before = json.load(file)
        names = [name for name in facts if facts[name] != before.get(name)]
        if names:
            raise ValueError(
                f"the prediction in {self.folder} can't go on: {', '.join(names)} differ from "
                "those of its start. Give what was given then, or choose another folder with --out."
            )

    def read(self) -> np.ndarray:
        """Find the complete lines of all processes.

        Returns:
            The numbers of the images without a result, in order.
        """
        self._files.fill(-1)
        self._paths = sorted(self.folder.glob(_LINES.format("*")))
        for number, path in enumerate(self._paths):
            with open(path, "rb") as file:
                offset = 0
                for line in file:
                    index = _number(line)
                    if index is not None and 0 <= index < len(self._files):
                        self._files[index], self._offsets[index] = number, offset
                    offset += len(line)
        return np.flatnonzero(self._files < 0)

    @contextlib.contextmanager
    def appending(self, process: int) -> Iterator[BinaryIO]:
        """Open the file of a process, without the half line that a crash may have left."""
        path = self.folder / _LINES.format(process)
        with open(path, "ab+") as file:
            file.truncate(_end_of_last_line(file))
            yield file

    @staticmethod
    def write(file: BinaryIO, index: int, result: dict[str, Any]) -> None:
        """Append the result of an image; it is with the operating system when this returns."""
        file.write(json.dumps({"index": index, **result}).encode() + b"\n")
        file.flush()

    def merge(self, path: Path, facts: dict[str, Any]) -> Totals:
        """Write all results into one JSON file, in the order of the images.

        Args:
            path: of the file; it is written atomically.
            facts: its first entries; ``images`` and ``skipped``, a line each, follow.

        Raises:
            ValueError: images without a result.
        """
        missing = self.read()
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(self._files)} images have no result in {self.folder}: all "
                "processes need the same folder, on a disk that their machines share."
            )
        skipped: list[int] = []
        detections = written = 0
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(each, "rb")) for each in self._paths]

            def result(index: int) -> dict[str, Any]:
                file = files[self._files[index]]
                file.seek(self._offsets[index])
                entry = json.loads(file.readline())
                del entry["index"]
                return entry

            unfinished = stack.enter_context(atomic_write(path))
            out = stack.enter_context(open(unfinished, "w", encoding="utf-8"))
            out.write(json.dumps(facts, indent=1)[:-2] + ',\n "images": [')
            for index in range(len(self._files)):
                entry = result(index)
                if "error" in entry:
                    skipped.append(index)
                    continue
                out.write((",\n  " if written else "\n  ") + json.dumps(entry))
                written += 1
                detections += len(entry["detections"])
            out.write('\n ],\n "skipped": [')
            lines = (json.dumps(result(index)) for index in skipped)
            out.write(
                "".join(("\n  " if i == 0 else ",\n  ") + line for i, line in enumerate(lines))
            )
            out.write("\n ]\n}\n")
        return Totals(written, len(skipped), detections)

    def remove(self) -> None:
        """Remove the files of the journal, whose content is in the merged file now."""
        for path in (*self.folder.glob(_LINES.format("*")), self.folder / _FACTS):
            path.unlink(missing_ok=True)


def _number(line: bytes) -> int | None:
    """Return the number of the image that a line is about; None for a line that is not whole."""
    try:
        return json.loads(line)["index"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _end_of_last_line(file: BinaryIO) -> int:
    """Return the position after the last line feed of a file."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65_536)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
