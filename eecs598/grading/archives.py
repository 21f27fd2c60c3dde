"""Find submissions in what a course exports: folders, zip files, and folders of these.

Gradescope exports a folder ``submission_...`` per submission, Canvas a zip file per submission or,
where students upload single files, all files of the class in one folder with a prefix per student.
"""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

__all__ = ["Found", "find_submissions"]

KEPT = (".py", ".ipynb", ".zip")  # what a grader reads; weights and pictures stay packed
# Files that are unpacked, and their bytes: of an archive in another one, and of all together.
MAX_FILES, MAX_TOTAL_FILES = 5000, 200_000
MAX_BYTES, MAX_TOTAL_BYTES = 2**28, 2**32
MAX_DEPTH = 3  # of archives in archives
CODE = (".py", ".ipynb")

# Name of the student, "LATE", two numbers, name of the file, number of the attempt.
CANVAS_FILE = re.compile(r"([^_]+(?:_LATE)?_\d+_\d+)_(.+?)(?:-\d+)?(\.\w+)")
GRADESCOPE_FOLDER = re.compile(r"submission_\d+")


@dataclass(frozen=True)
class Found:
    """A submission to grade.

    Attributes:
        name: shown in results.
        folder: of its files; None if it can't be unpacked.
        error: why not.
    """

    name: str
    folder: Path | None
    error: str | None = None


def find_submissions(paths: Sequence[str], work_folder: Path) -> list[Found]:
    """List the submissions of folders and zip files.

    Args:
        paths: a submission each, or an export of several.
        work_folder: an empty folder, for what is unpacked.
    """
    finder = _Finder(work_folder)
    submissions, taken = [], Counter[str]()
    for path in paths:
        for found in finder.find(Path(path), path, 0):
            taken[found.name] += 1
            if taken[found.name] > 1:  # whoever comes second may only pretend to be this student
                found = replace(found, name=f"{found.name} ({taken[found.name]})")
            submissions.append(found)
    return submissions


class _Finder:
    def __init__(self, work_folder: Path) -> None:
        self._work_folder = work_folder
        self._number = 0
        self._files_left = MAX_TOTAL_FILES
        self._bytes_left = MAX_TOTAL_BYTES

    def _new_folder(self) -> Path:
        self._number += 1
        folder = self._work_folder / f"{self._number:04}"
        folder.mkdir()
        return folder

    def find(self, path: Path, name: str, depth: int) -> Iterator[Found]:
        if path.is_file() and path.suffix.lower() == ".zip":
            folder = self._new_folder()
            try:
                max_files, max_bytes = self._files_left, self._bytes_left
                if depth:  # one at the top may be the export of a whole class
                    max_files, max_bytes = min(max_files, MAX_FILES), min(max_bytes, MAX_BYTES)
                files, size = _unpack(path, folder, max_files, max_bytes)
                self._files_left -= files
                self._bytes_left -= size
            except Exception as error:  # of zipfile, zlib, lzma, ..., whatever a student sends
                shutil.rmtree(folder)
                yield Found(name, None, f"can't be unpacked: {error}")
                return
            yield from self._find_in_folder(folder, name, depth + 1)
        else:
            yield from self._find_in_folder(path, name, depth)

    def _find_in_folder(self, folder: Path, name: str, depth: int) -> Iterator[Found]:
        try:
            entries = sorted(entry for entry in folder.iterdir() if entry.name[0] not in "._")
        except OSError:
            yield Found(name, folder)  # the grader says why it can't be read
            return
        archives = [e for e in entries if e.suffix.lower() == ".zip" and e.is_file()]
        folders = [e for e in entries if e.is_dir() and not e.is_symlink()]
        code = [e for e in entries if e.suffix in CODE]
        students = {m[1] for e in code if (m := CANVAS_FILE.fullmatch(e.name))}
        if len(entries) == 1 and folders and depth > 0:
            yield from self._find_in_folder(folders[0], name, depth)
        elif students and all(CANVAS_FILE.fullmatch(e.name) for e in code):
            yield from self._split(code, students)
            for archive in archives:
                yield from self.find(archive, archive.stem, depth)
        elif archives and not code and depth < MAX_DEPTH:
            single = len(archives) == 1 and not folders
            for archive in archives:
                yield from self.find(archive, name if single else archive.stem, depth)
            for one in folders:
                if any(file.suffix in CODE for file in one.rglob("*")):
                    yield from self._find_in_folder(one, one.name, depth)
        elif not code and folders and all(GRADESCOPE_FOLDER.fullmatch(f.name) for f in folders):
            for one in folders:
                yield from self._find_in_folder(one, one.name, depth)
        else:
            yield Found(name, folder)

    def _split(self, files: list[Path], students: set[str]) -> Iterator[Found]:
        """Sort the single files of a class into a folder per student."""
        for student in sorted(students):
            folder = self._new_folder()
            for file in files:
                match = CANVAS_FILE.fullmatch(file.name)
                if match and match[1] == student and not file.is_symlink():
                    shutil.copyfile(file, folder / f"{match[2]}{match[3]}")
            yield Found(student, folder)


def _unpack(archive: Path, folder: Path, max_files: int, max_bytes: int) -> tuple[int, int]:
    """Unpack the source files of an archive into a folder, and nothing outside of it.

    Args:
        archive: a zip file.
        folder: to unpack into.
        max_files: to unpack at most.
        max_bytes: the same.

    Returns:
        The number of files that were unpacked, and of their bytes.

    Raises:
        ValueError: a member would leave the folder, or the archive has too much in it.
    """
    with zipfile.ZipFile(archive) as packed:
        files, size = 0, 0
        for member in packed.infolist():
            # Some programs for Windows write backslashes.
            path = PurePosixPath(member.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", str(path)):
                raise ValueError(f"{member.filename!r} leads out of its folder")
            is_link = stat.S_ISLNK(member.external_attr >> 16)
            if member.is_dir() or is_link or path.suffix.lower() not in KEPT:
                continue
            files += 1
            if files > max_files:
                raise ValueError(f"more than {max_files} files of code and archives")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # The sizes in an archive may be wrong, so bytes are counted.
            with packed.open(member) as source, target.open("wb") as unpacked:
                while data := source.read(2**20):
                    size += len(data)
                    if size > max_bytes:
                        raise ValueError(f"more than {max_bytes / 2**20:.0f} MB unpacked")
                    unpacked.write(data)
        return files, size
