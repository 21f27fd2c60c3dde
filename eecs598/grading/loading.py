"""Imports what somebody handed in, as it comes.

The files of a submission are imported below a package of their own, ``submission``, so that
nothing of the grader carries their names: ``import eecs598`` in a file of the submission gives the
submission's ``eecs598``, and the same line in the grader gives the grader's. What decides is the
importing file, because each file runs with an ``__import__`` of its own among its builtins.

A file of the submission

* may hold syntax errors and lines of a notebook: the function or class they are in is left out;
* may fail half-way: where a statement at the top level of ``common.py`` or
  ``one_stage_detector.py`` raises, the next one follows;
* may import packages that are not installed: importing them works, using them raises;
* may ask for pretrained weights: it gets fixed random ones, and nothing is downloaded;
* may ask for a GPU: it gets the CPU;
* may use a few names that its libraries have dropped since.

Of all this the notes of the result tell. A file that is missing or can't be imported, and a
function that a file lacks, is replaced by that of another folder, and so are functions that are
not written yet where others call them (``eecs598.grading.submission.completed``). The process is
expected to be one made for this submission: the changes to libraries stay until ``unload`` or the
next submission.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from eecs598.grading.compatibility import AbsentPackage, LibraryChanges
from eecs598.grading.result import isolated, place_of
from eecs598.grading.source import index_of, parse_file
from eecs598.grading.submission import PARTS, PUBLIC_NAMES, Submission

__all__ = ["Loaded", "load_submission", "unload"]

# What of a submission is its author's own work: as much of it as possible is kept. The rest was
# handed out, and there is a whole one to replace a broken one with.
OWN_WORK = {"common", "one_stage_detector"}

THEIRS, OURS = "submission", "ours"  # the packages below which their and our files are imported

SKIPPED_FOLDERS = {"__MACOSX", "__pycache__", "node_modules", "site-packages"}
MAX_NOTES = 40


@dataclass(frozen=True)
class Loaded:
    """A submission ready for the checks.

    Attributes:
        submission: its modules; some may be ours, see ``Submission.replaced``.
        notes: what is to be known about it, a line each: which files are theirs and which ours,
            what could not be imported and why, what was changed to run it here.
    """

    submission: Submission
    notes: list[str]


def load_submission(folder: str | os.PathLike, fallback_folder: str | os.PathLike) -> Loaded:
    """Import the three modules of a submission.

    Nothing is written to the folder, and whatever its files print, raise or change in this
    process ends up in the notes or is undone.

    Args:
        folder: what was handed in; the files may lie in a folder inside it.
        fallback_folder: where our ``common.py``, ``one_stage_detector.py`` and ``a4_helper.py``
            lie.

    Raises:
        ValueError: the folder does not exist, or ours are not where they should be.
    """
    folder, fallback_folder = Path(folder), Path(fallback_folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected that of a submission.")
    missing = [part for part in PARTS if not (fallback_folder / f"{part}.py").is_file()]
    if missing:
        raise ValueError(
            f"{fallback_folder} has no {missing[0]}.py; expected the folder of the modules that "
            "replace what a submission lacks."
        )
    unload()
    files = index_of(folder)
    ours = {part: fallback_folder / f"{part}.py" for part in PARTS}
    loading = _Loading(files, ours)
    _changes.callback(loading.remove)
    with _as_before():
        loading.install()
        modules = {part: loading.load_part(part) for part in PARTS}
        loading.disown(modules)
    submission = Submission(
        **modules,
        replaced=loading.replaced,
        ours=lambda part: importlib.import_module(f"{OURS}.{part}"),
    )
    return Loaded(submission, [loading.summary(), *loading.notes])


_changes = contextlib.ExitStack()  # what has to be undone before the next submission


def unload() -> None:
    """Undo what the last ``load_submission`` changed in this process."""
    _changes.close()


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what importing a file easily changes for everybody."""
    folder, dtype, path = os.getcwd(), torch.get_default_dtype(), list(sys.path)
    with isolated(), torch.enable_grad():
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)
            sys.path[:] = path


# --------------------------------------------------------------------------------------------
# Importing
# --------------------------------------------------------------------------------------------


class _Loading(importlib.abc.MetaPathFinder):
    """One submission: finds its files and says which import means which of them."""

    def __init__(self, theirs: dict[str, Path], ours: dict[str, Path]) -> None:
        self.files = {THEIRS: theirs, OURS: ours}
        self.notes: list[str] = []
        self.replaced: dict[str, str] = {}  # part -> why it is ours
        self.failed: set[str] = set()  # what raised when it was imported
        self.changes = LibraryChanges(self.note)
        self.folder = next((theirs[part].parent.name for part in PARTS if part in theirs), None)

    def install(self) -> None:
        self.changes.install()
        for package in (THEIRS, OURS):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        self.changes.undo()
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name.split(".")[0] in (THEIRS, OURS)]:
            del sys.modules[name]

    def note(self, sentence: str) -> None:
        sentence = " ".join(sentence.split())
        if sentence not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(sentence)

    def summary(self) -> str:
        """Which of the files are theirs and which ours, in one line."""
        theirs = [f"{part}.py" for part in PARTS if part not in self.replaced]
        ours = [f"{part}.py ({self.replaced[part]})" for part in PARTS if part in self.replaced]
        ours += [name.partition(".")[2] for name in self.replaced if "." in name]
        own_library = any(name.startswith(f"{THEIRS}.eecs598") for name in sys.modules)
        (theirs if own_library else ours).append("eecs598")
        words = [f"{' and '.join(theirs)} of the submission"] if theirs else []
        words += [f"our {' and '.join(ours)}"] if ours else []
        return f"used: {'; '.join(words)}"

    def load_part(self, part: str) -> ModuleType:
        """A part of the submission, or ours."""
        if part not in self.files[THEIRS]:
            others = sorted(name for name in self.files[THEIRS] if "." not in name)
            found = f"; found: {', '.join(f'{name}.py' for name in others[:6])}" if others else ""
            self.replaced[part] = "missing"
            if part in OWN_WORK:
                self.note(f"{part}.py is missing{found}")
            return importlib.import_module(f"{OURS}.{part}")
        if module := self.try_import(f"{THEIRS}.{part}"):
            return module
        self.replaced[part] = "theirs can't be imported"
        return importlib.import_module(f"{OURS}.{part}")

    def fill_in(self, module: ModuleType, part: str) -> None:
        """Give a module of theirs ours of what it lacks, for others to import."""
        for name in PUBLIC_NAMES[part]:
            if not hasattr(module, name):
                ours = importlib.import_module(f"{OURS}.{part}")
                setattr(module, name, getattr(ours, name))
                self.replaced[f"{part}.{name}"] = f"{part}.py does not define it"

    def disown(self, modules: dict[str, ModuleType]) -> None:
        """Note which public names of a submission stand for what is ours, however it got there."""
        for part, module in modules.items():
            for name in PUBLIC_NAMES[part] if part not in self.replaced else ():
                origin = str(getattr(getattr(module, name), "__module__", ""))
                if origin in PARTS or origin.startswith((f"{OURS}.", __package__)):
                    self.replaced.setdefault(f"{part}.{name}", "it is ours")

    def try_import(self, name: str) -> ModuleType | None:
        """Import a file of the submission; where that fails, note why and return None."""
        if name in self.failed:
            return None
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:
            self.failed.add(name)
            file = self.name_of(name)
            where = place_of(error) or file
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            if isinstance(error, SyntaxError) and error.lineno:
                where = f"{file}, line {error.lineno}"
            self.note(f"{where}: {type(error).__name__}: {reason}; {file} can't be imported")
            return None

    def name_of(self, fullname: str) -> str:
        """A file's name as its author knows it."""
        package, _, name = fullname.partition(".")
        path = self.files[package].get(name)
        folder = name.replace(".", "/")
        return f"{folder}/__init__.py" if path and path.stem == "__init__" else f"{folder}.py"

    # Called by the import system ------------------------------------------------------------

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if fullname in PARTS and path is None:
            # Past the import statements, which find theirs; where this package is installed, it
            # would be ours.
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        if package not in self.files or not name:
            return None
        files = self.files[package]
        has_children = any(other.startswith(f"{name}.") for other in files)
        if name not in files:  # a folder without __init__.py, or nothing
            return (
                importlib.machinery.ModuleSpec(fullname, None, is_package=True)
                if has_children
                else None
            )
        spec = importlib.machinery.ModuleSpec(
            fullname,
            _Loader(self, files[name]),
            origin=str(files[name]),
            is_package=has_children or files[name].stem == "__init__",
        )
        spec.has_location = True
        return spec

    # Called by import statements ------------------------------------------------------------

    def importer(self, package: str, lenient_lines: set[int]) -> Callable:
        """The ``__import__`` of a file.

        Args:
            package: whether the file is one of theirs or of ours.
            lenient_lines: of import statements whose failing the file itself deals with.
        """

        def import_(name, globals=None, locals=None, fromlist=(), level=0):
            if level > 0:
                return builtins.__import__(name, globals, locals, fromlist, level)
            top, _, rest = name.partition(".")
            if fromlist and top == self.folder and rest.partition(".")[0] in PARTS:
                name = top = rest  # from A4.common import ..., where the files lie in A4
            for candidate in self.packages_for(top, package):
                if self.try_import(f"{candidate}.{name}") is not None:
                    module = builtins.__import__(
                        f"{candidate}.{name}", globals, locals, fromlist, 0
                    )
                    return module if fromlist else sys.modules[f"{candidate}.{top}"]
            try:
                if top == OURS and package == THEIRS:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=OURS)
                return builtins.__import__(name, globals, locals, fromlist, 0)
            except ModuleNotFoundError as error:
                line = sys._getframe(1).f_lineno
                if package == OURS or line in lenient_lines or error.name is None:
                    raise
                if not (name == error.name or name.startswith(f"{error.name}.")):
                    raise  # a package that is here and lacks another one
                file = self.name_of(globals["__name__"])
                self.note(
                    f"{file}, line {line}: {error.name} is not installed here; what uses it can't "
                    "be judged"
                )
                if fromlist:
                    return AbsentPackage(name)
                if error.name == top:
                    return AbsentPackage(top)
                return builtins.__import__(top, globals, locals, (), 0)

        return import_

    def packages_for(self, top: str, package: str) -> list[str]:
        """Where to look for a module, before it is looked for among what is installed."""
        if package == OURS:
            return [OURS] if top in PARTS else []
        found = [THEIRS] if self.has(top) else []
        return [*found, OURS] if top in PARTS else found

    def has(self, top: str) -> bool:
        return any(name == top or name.startswith(f"{top}.") for name in self.files[THEIRS])


class _Loader(importlib.abc.Loader):
    """Runs one file. Other than Python's own loader it leaves no compiled file behind."""

    def __init__(self, loading: _Loading, path: Path) -> None:
        self.loading = loading
        self.path = path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        file = self.loading.name_of(module.__name__)
        tree, notes = parse_file(self.path, file)
        for sentence in notes:
            self.loading.note(sentence)
        importer = self.loading.importer(package, _lines_of_guarded_imports(tree))
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importer}
        if package == THEIRS:
            self.loading.changes.adapt(tree, file)
        self._run(module, tree, file, keep_going=package == THEIRS and name in OWN_WORK)
        if package == THEIRS and name in PARTS:
            self.loading.fill_in(module, name)
        if package == OURS:
            # A star import of what was handed out brings along all it has imported itself, and
            # submissions rely on that.
            module.__dict__.pop("__all__", None)

    def _run(self, module: ModuleType, tree: ast.Module, file: str, keep_going: bool) -> None:
        futures = {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module == "__future__"
            for alias in node.names
        }
        flags = 0
        for name in futures:
            flags |= getattr(__future__, name).compiler_flag
        module.__doc__ = ast.get_docstring(tree)
        for node in tree.body:
            statement = ast.Module([node], type_ignores=[])
            try:
                code = compile(statement, self.path, "exec", flags=flags, dont_inherit=True)
                exec(code, module.__dict__)
            except (Exception, SystemExit) as error:
                if not keep_going:
                    raise
                what = f" ({_describe(node)})" if _describe(node) else ""
                where = place_of(error) or f"{file}, line {node.lineno}"
                self.loading.note(
                    f"{where}{what}: {type(error).__name__}: {error}; the rest of {file} is judged "
                    "without it"
                )


def _describe(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"def {node.name}"
    return ""


def _lines_of_guarded_imports(tree: ast.Module) -> set[int]:
    """Lines of imports inside ``try`` with ``except ImportError`` or wider."""
    wide = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}
    lines = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try):
            continue
        caught = {
            getattr(name, "id", None)
            for handler in node.handlers
            for name in ast.walk(handler.type or ast.Name("Exception"))
        }
        if caught & wide:
            for statement in node.body:
                lines |= {
                    inner.lineno
                    for inner in ast.walk(statement)
                    if isinstance(inner, (ast.Import, ast.ImportFrom))
                }
    return lines
