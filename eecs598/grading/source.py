"""Find, read and parse the Python files of a submission, also those that are partly broken.

Notebooks count as Python files: what their code cells define, without what they run.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from eecs598.grading.submission import PARTS

__all__ = ["definitions", "index_modules", "parse_file"]

SKIPPED_FOLDERS = {"__MACOSX", "__pycache__", "node_modules", "site-packages"}
MAX_DEPTH = 6  # of folders in a submission
MAX_REPAIRS = 20  # pieces to leave out of a file before it counts as unreadable
NOTEBOOK_SUFFIX = "_ipynb"  # of the name under which a notebook is imported
MAX_NOTEBOOK = 2**25  # bytes


def index_modules(folder: Path) -> dict[str, Path]:
    """Return the Python files of a submission by the name under which they are imported.

    The root is the folder that holds most parts of the assignment; of several, the highest one.
    """
    by_path = {}
    for path in _python_files(folder):
        # Some programs for Windows pack "A4\\common.py" as the name of a file.
        relative = PurePosixPath(str(path.relative_to(folder)).replace("\\", "/"))
        by_path[relative] = path
    roots = {path.parent for path in by_path if path.stem in PARTS and path.suffix == ".py"}

    def rank(root: PurePosixPath) -> tuple[int, int, str]:
        parts = sum(root / f"{part}.py" in by_path for part in PARTS)
        return -parts, len(root.parts), str(root)

    root = min(roots, key=rank, default=PurePosixPath("."))
    names = {}
    for relative, file in sorted(by_path.items()):
        if relative.suffix == ".ipynb":
            stem = re.sub(r"\W", "_", str(relative.with_suffix("")))
            names[f"{stem}{NOTEBOOK_SUFFIX}"] = file
        elif relative.is_relative_to(root):
            parts = relative.relative_to(root).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    names.pop("", None)
    return names


def _python_files(folder: Path) -> Iterator[Path]:
    inside = folder.resolve()
    for current, folders, files in os.walk(folder):
        depth = len(Path(current).relative_to(folder).parts)
        folders[:] = sorted(
            name
            for name in folders
            if depth < MAX_DEPTH and name not in SKIPPED_FOLDERS and not name.startswith(".")
        )
        for name in files:
            path = Path(current, name)
            if not name.endswith((".py", ".ipynb")) or name.startswith("."):
                continue
            is_file = os.path.isfile(path)
            if path.is_symlink():  # it may lead anywhere on this machine
                is_file = is_file and path.resolve().is_relative_to(inside)
            # A file that may not even be examined is listed: reading it will say why.
            if is_file or not os.path.lexists(path):
                yield path


def _read(path: Path) -> str:
    """Return the text of a source file, whichever encoding its editor used."""
    if path.suffix == ".ipynb":
        return _code_cells(path)
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return importlib.util.decode_source(raw)
    except (SyntaxError, UnicodeDecodeError):
        return raw.decode("cp1252", errors="replace")


def _code_cells(path: Path) -> str:
    """Return the code of a notebook's cells, without the lines that are for notebooks only.

    Raises:
        SyntaxError: the file is no notebook.
    """
    if path.stat().st_size > MAX_NOTEBOOK:
        raise SyntaxError("a notebook of more than 32 MiB")
    cells = []
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
            if cell["cell_type"] == "code" and not text.startswith("%%bash"):
                if not _is_python(text):
                    text = re.sub(r"(?m)^(\s*)[%!?].*$", r"\1pass", text)
                # If a cell without definitions is broken, nothing is lost that can be judged.
                if _is_python(text) or re.search(r"(?m)^(def|class) ", text):
                    cells.append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SyntaxError("it is no notebook") from error
    return "\n".join(cells)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def definitions(path: Path) -> set[str]:
    """Return the names of the functions and classes that a file defines; none if it is broken."""
    try:
        tree, _ = parse_file(path, path.name)
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return set()
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def _without_runs(tree: ast.Module) -> ast.Module:
    """Return what a notebook defines: imports, functions, classes, and values that these use."""
    kept = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    used = {
        node.id
        for statement in tree.body
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
        if isinstance(node, ast.Name)
    }

    def is_kept(statement: ast.stmt) -> bool:
        if isinstance(statement, kept):
            return True
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.If, ast.Try)):
            stored = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
            return any(isinstance(n.ctx, ast.Store) and n.id in used for n in stored)
        return False

    return ast.Module([node for node in tree.body if is_kept(node)], type_ignores=[])


def parse_file(path: Path, file: str) -> tuple[ast.Module, list[str]]:
    """Parse a file without the pieces that are not valid Python.

    Args:
        path: of the file.
        file: its name in messages.

    Returns:
        The syntax tree, and a note on each piece that was left out.

    Raises:
        SyntaxError: no part of the file can be parsed, or too many pieces are broken.
    """
    lines = _read(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    notes = _resolve_conflicts(lines, file)
    while True:
        try:
            tree = ast.parse("\n".join(lines))
            return (_without_runs(tree) if path.suffix == ".ipynb" else tree), notes
        except SyntaxError as error:
            if error.lineno is None or len(notes) == MAX_REPAIRS:
                raise
            # For "def f():" without a body, Python reports the line where the body should begin.
            earlier = re.search(r"expected an indented block after .* on line (\d+)", str(error))
            number = int(earlier[1]) if earlier else error.lineno
            number = min(max(number, 1), len(lines)) - 1
            line = lines[number].strip()
            if line.startswith(("%", "!")):
                lines[number] = re.sub(r"\S.*", "pass", lines[number])
                notes.append(f"{file}, line {number + 1}: {line[:40]!r} is for notebooks; left out")
                continue
            # First the method alone; if that was not the reason, the statement around it.
            start, end = _method(lines, number) or _top_level_block(lines, number)
            if not any(lines[start:end]):
                raise
            first = _first_code(lines, start, end)
            what = re.match(r"\s*((?:async )?def|class)\s+(\w+)", first)
            name = f"{what[1]} {what[2]}" if what else f"lines {start + 1} to {end}"
            notes.append(
                f"{file}, line {error.lineno}: {type(error).__name__}: {error.msg}; {name} can't "
                "be judged"
            )
            lines[start:end] = [""] * (end - start)
            if first[:1].isspace():
                indent = first[: len(first) - len(first.lstrip())]
                lines[start] = f"{indent}{_PLACEHOLDER}"  # a class can't be empty


_PLACEHOLDER = "pass  # left out"


def _method(lines: list[str], number: int) -> tuple[int, int] | None:
    """Return first line and end of the method around a line; None if it was left out before."""

    def indent(line: str) -> int:
        return len(line.expandtabs()) - len(line.expandtabs().lstrip())

    start = number
    while start >= 0 and not re.match(r"\s+(async )?def ", lines[start]):
        if re.match(r"\S", lines[start]) or lines[start].endswith(_PLACEHOLDER):
            return None
        start -= 1
    if start < 0:
        return None
    end = start + 1
    while end < len(lines) and (
        not lines[end].strip() or indent(lines[end]) > indent(lines[start])
    ):
        end += 1
    if end <= number:
        return None
    while lines[start - 1].lstrip().startswith("@"):
        start -= 1
    return start, end


def _top_level_block(lines: list[str], number: int) -> tuple[int, int]:
    """Return first line and end of the top-level statement around a line."""

    def begins(index: int) -> bool:
        line = lines[index]
        return bool(line) and not line[0].isspace() and line[0] not in ")]}#"

    start = number
    while start > 0 and not begins(start):
        start -= 1
    while start > 0 and lines[start - 1].startswith("@"):
        start -= 1
    end = start
    while end < number or lines[end].startswith("@") and end + 1 < len(lines):
        end += 1  # an error may be in a decorator
    end += 1
    while end < len(lines) and not begins(end):
        end += 1
    return start, end


def _resolve_conflicts(lines: list[str], file: str) -> list[str]:
    """Keep the first side of each conflict that Git has left in a file."""
    notes = []
    side: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("<<<<<<< "):
            notes.append(
                f"{file}, line {number + 1}: an unresolved merge; its first side is judged"
            )
            side, lines[number] = 1, ""
        elif side and line.startswith(">>>>>>> "):
            side, lines[number] = None, ""
        elif side and (side == 2 or line == "======="):
            side, lines[number] = 2, ""
    return notes


def _first_code(lines: list[str], start: int, end: int) -> str:
    return next((line for line in lines[start:end] if not line.startswith("@")), "")
