"""Import the modules of a submission, even if some of its files are broken or missing.

The files of a submission are imported below a package of their own, ``submission``, so that they
can't replace modules of the grader: ``import eecs598`` in a file of the submission finds the
submission's ``eecs598``, and the same statement in the grader finds the grader's. The importing
file decides, because each file runs with its own ``__import__`` among its builtins.

What is tolerated in the files of a submission:

* syntax errors and notebook magics: the function or class that contains them is left out;
* errors at import: if a top-level statement of ``common.py`` or ``one_stage_detector.py`` raises,
  loading continues with the next statement;
* packages that are not installed: importing them works, using them raises;
* pretrained weights: fixed random weights are given instead, and nothing is downloaded;
* a GPU that is taken for granted: the CPU is used;
* a few names that libraries have removed since the assignment was written.

The notes of the result list all of this. A function that a file lacks is looked for in the other
files of the submission and in its notebooks. What is found nowhere, and a file that can't be
imported, is replaced by the reference solution's; so are functions that are missing or wrong where
other parts call them (``eecs598.grading.submission.with_ours``). The process
should be used for one submission only: changes to libraries stay until ``unload`` or the next
submission.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from eecs598.grading.compatibility import AbsentPackage, LibraryChanges
from eecs598.grading.result import isolated, place_of
from eecs598.grading.source import NOTEBOOK_SUFFIX, definitions, index_modules, parse_file
from eecs598.grading.submission import (
    GRADER,
    OURS,
    PARTS,
    PUBLIC_NAMES,
    THEIRS,
    Submission,
)

__all__ = ["Loaded", "load_submission", "unload"]

# The parts that students write: as much of them as possible is kept. The other part was handed out,
# so a broken one is replaced as a whole.
OWN_WORK_PARTS = ("common", "one_stage_detector")
OWN_WORK = set(OWN_WORK_PARTS)

MISSING = "missing"  # why a part is replaced that is in no file of its name

MAX_NOTES = 40


@dataclass(frozen=True)
class Loaded:
    """A submission ready for the checks.

    Attributes:
        submission: its modules; some may be the reference solution's, see
            ``Submission.replaced``.
        notes: one line each: which files were used and which replaced, what could not be imported
            and why, and what was changed to run it here.
    """

    submission: Submission
    notes: list[str]


def load_submission(folder: str | os.PathLike, fallback_folder: str | os.PathLike) -> Loaded:
    """Import the three modules of a submission.

    Nothing is written to the folder. What its files print is dropped, what they raise is noted, and
    what they change in this process is undone.

    Args:
        folder: of the submission; its files may lie in a folder inside it.
        fallback_folder: folder of the reference solution's ``common.py``,
            ``one_stage_detector.py`` and ``a4_helper.py``.

    Raises:
        ValueError: the folder does not exist, or a file of the reference solution is missing.
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
    files = index_modules(folder)
    ours = {part: fallback_folder / f"{part}.py" for part in PARTS}
    finder = _SubmissionFinder(files, ours)
    _changes.callback(finder.remove)
    with _preserved_process_state():
        finder.install()
        modules = {part: finder.load_part(part) for part in PARTS}
        finder.find_elsewhere(modules)
        finder.mark_reference_code(modules)
    submission = Submission(
        modules["common"],
        modules["one_stage_detector"],
        modules["a4_helper"],
        replaced=finder.replaced,
        ours=lambda part: importlib.import_module(f"{OURS}.{part}"),
    )
    return Loaded(submission, [finder.summary(), *finder.notes])


_changes = contextlib.ExitStack()  # to be undone before the next submission


def unload() -> None:
    """Undo what the last ``load_submission`` changed in this process."""
    _changes.close()


@contextlib.contextmanager
def _preserved_process_state() -> Iterator[None]:
    """Undo changes that files often make to the whole process when they are imported."""
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


class _SubmissionFinder(importlib.abc.MetaPathFinder):
    """Finder of one submission's files, which decides which file an import statement means."""

    def __init__(self, theirs: dict[str, Path], ours: dict[str, Path]) -> None:
        self.files = {THEIRS: theirs, OURS: ours}
        self.notes: list[str] = []
        self.replaced: dict[str, str] = {}  # part, or "part.name" -> why it was replaced
        self.failed: set[str] = set()  # modules that raised when they were imported
        self.changes = LibraryChanges(self.note)
        self.folder = next((theirs[part].parent.name for part in PARTS if part in theirs), None)

    def install(self) -> None:
        """Prepare the process for importing the submission."""
        self.changes.install()
        for package in (THEIRS, OURS):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Undo ``install``, and forget the imported modules."""
        self.changes.undo()
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name.split(".")[0] in (THEIRS, OURS)]:
            del sys.modules[name]

    def note(self, sentence: str) -> None:
        """Add a note, on one line, unless it exists already."""
        sentence = " ".join(sentence.split())
        if sentence not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(sentence)

    def summary(self) -> str:
        """Say in one line which files are the submission's and which the reference solution's."""
        theirs = [
            f"{part}.py"
            for part in PARTS
            if part not in self.replaced and part in self.files[THEIRS]
        ]
        if not theirs and len(self.replaced.keys() & OWN_WORK) < len(OWN_WORK):
            theirs = ["other files"]
        ours = [f"{part}.py ({self.replaced[part]})" for part in PARTS if part in self.replaced]
        ours += [name.partition(".")[2] for name in self.replaced if "." in name]
        own_library = any(name.startswith(f"{THEIRS}.eecs598") for name in sys.modules)
        (theirs if own_library else ours).append("eecs598")
        words = [f"{' and '.join(theirs)} of the submission"] if theirs else []
        words += [f"our {' and '.join(ours)}"] if ours else []
        return f"used: {'; '.join(words)}"

    def load_part(self, part: str) -> ModuleType:
        """Return a part of the submission, or the reference one if that can't be imported."""
        if part not in self.files[THEIRS]:
            others = sorted(name for name in self.files[THEIRS] if "." not in name)
            names = ", ".join(self.name_of(f"{THEIRS}.{name}") for name in others[:6])
            found = f"; found: {names}" if others else ""
            self.replaced[part] = MISSING
            if part in OWN_WORK:
                self.note(f"{part}.py is missing{found}")
            return importlib.import_module(f"{OURS}.{part}")
        if module := self.try_import(f"{THEIRS}.{part}"):
            return module
        self.replaced[part] = "theirs can't be imported"
        return importlib.import_module(f"{OURS}.{part}")

    def find_elsewhere(self, modules: dict[str, ModuleType]) -> None:
        """Take what a part lacks from the other files and notebooks of the submission.

        Args:
            modules: by name of the part. A part of which anything is found becomes a module of the
                submission.
        """
        defined: dict[str, set[str]] = {}
        for part in OWN_WORK_PARTS:
            whole = part in self.replaced
            if whole and self.replaced[part] != MISSING:
                continue
            found: dict[str, ModuleType] = {}
            lacking = [n for n in PUBLIC_NAMES[part] if whole or f"{part}.{n}" in self.replaced]
            if lacking and not defined:
                defined = {
                    name: definitions(path)
                    for name, path in self.files[THEIRS].items()
                    if not name.startswith("eecs598.")
                }
            for name in lacking:
                for file in sorted(
                    defined, key=lambda file: (file.endswith(NOTEBOOK_SUFFIX), file)
                ):
                    if file != part and name in defined[file]:
                        module = self.try_import(f"{THEIRS}.{file}")
                        if module is not None and hasattr(module, name):
                            found[name] = module
                            break
            if not found:
                continue
            if whole:
                theirs = ModuleType(f"{THEIRS}.{part}")
                theirs.__dict__.update(
                    {k: v for k, v in vars(modules[part]).items() if not k.startswith("__")}
                )
                modules[part] = theirs
                del self.replaced[part]
                for name in PUBLIC_NAMES[part]:
                    self.replaced[f"{part}.{name}"] = "no file defines it"
            for name, module in found.items():
                setattr(modules[part], name, getattr(module, name))
                self.replaced.pop(f"{part}.{name}", None)
            self._note_places(part, found)

    def _note_places(self, part: str, found: dict[str, ModuleType]) -> None:
        """Note where the functions and classes of a part were found."""
        files: dict[str, list[str]] = {}
        for name, module in found.items():
            files.setdefault(self.name_of(module.__name__), []).append(name)
        for file, names in files.items():
            self.note(f"not in {part}.py, found in {file}: {', '.join(names)}")

    def fill_gaps(self, module: ModuleType, part: str) -> None:
        """Add the reference functions that a module of the submission lacks, for its importers."""
        for name in PUBLIC_NAMES[part]:
            if not hasattr(module, name):
                ours = importlib.import_module(f"{OURS}.{part}")
                setattr(module, name, getattr(ours, name))
                self.replaced[f"{part}.{name}"] = f"{part}.py does not define it"

    def mark_reference_code(self, modules: dict[str, ModuleType]) -> None:
        """Mark the submission's names that refer to code of the reference solution as replaced."""
        for part, module in modules.items():
            for name in PUBLIC_NAMES[part] if part not in self.replaced else ():
                origin = str(getattr(getattr(module, name), "__module__", ""))
                if origin in PARTS or origin.startswith((f"{OURS}.", GRADER)):
                    self.replaced.setdefault(f"{part}.{name}", "it is ours")

    def try_import(self, name: str) -> ModuleType | None:
        """Import a file of the submission; if that fails, note why and return None."""
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
        """Return the file name of a module as its author knows it."""
        package, _, name = fullname.partition(".")
        path = self.files[package].get(name)
        if path and path.suffix == ".ipynb":
            return path.name
        folder = name.replace(".", "/")
        return f"{folder}/__init__.py" if path and path.stem == "__init__" else f"{folder}.py"

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module below the two packages; called by the import system."""
        package, _, name = fullname.partition(".")
        if fullname in PARTS and path is None:
            # Import statements find the submission's file before they get here. Other ways of
            # importing would find the reference solution where it is installed.
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        if package not in self.files or not name:
            return None
        files = self.files[package]
        has_children = any(other.startswith(f"{name}.") for other in files)
        if name not in files:  # a folder without __init__.py, or no such module
            return (
                importlib.machinery.ModuleSpec(fullname, None, is_package=True)
                if has_children
                else None
            )
        spec = importlib.machinery.ModuleSpec(
            fullname,
            _FileLoader(self, files[name]),
            origin=str(files[name]),
            is_package=has_children or files[name].stem == "__init__",
        )
        spec.has_location = True
        return spec

    def importer(self, package: str, guarded_lines: set[int]) -> Callable[..., ModuleType]:
        """Make the ``__import__`` function of a file.

        Args:
            package: ``THEIRS`` for a file of the submission, ``OURS`` for a reference file.
            guarded_lines: lines of import statements whose errors the file itself handles.
        """

        def import_(
            name: str,
            globals: Mapping[str, object] | None = None,
            locals: Mapping[str, object] | None = None,
            fromlist: Sequence[str] = (),
            level: int = 0,
        ) -> ModuleType:
            if level > 0:
                return builtins.__import__(name, globals, locals, fromlist, level)
            top, _, rest = name.partition(".")
            if fromlist and top == self.folder and rest.partition(".")[0] in PARTS:
                name = top = rest  # "from A4.common import ...", if the files lie in A4
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
                if package == OURS or line in guarded_lines or error.name is None:
                    raise
                if not (name == error.name or name.startswith(f"{error.name}.")):
                    raise  # the package is installed, and one that it needs is not
                file = self.name_of(str((globals or {})["__name__"]))
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
        """Return the packages to search for a module before the installed ones."""
        if package == OURS:
            return [OURS] if top in PARTS else []
        found = [THEIRS] if self.has(top) else []
        return [*found, OURS] if top in PARTS else found

    def has(self, top: str) -> bool:
        """Whether the submission has a module or folder of that name."""
        return any(name == top or name.startswith(f"{top}.") for name in self.files[THEIRS])


class _FileLoader(importlib.abc.Loader):
    """Loader of one file. Unlike Python's own, it writes no compiled file."""

    def __init__(self, finder: _SubmissionFinder, path: Path) -> None:
        self.finder = finder
        self.path = path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Let the import system create the module as usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the file in the module's namespace."""
        package, _, name = module.__name__.partition(".")
        file = self.finder.name_of(module.__name__)
        tree, notes = parse_file(self.path, file)
        for sentence in notes:
            self.finder.note(sentence)
        importer = self.finder.importer(package, _lines_of_guarded_imports(tree))
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importer}
        if package == THEIRS:
            self.finder.changes.adapt(tree, file)
        keeps = name in OWN_WORK or name.endswith(NOTEBOOK_SUFFIX)
        self._run(module, tree, file, keep_going=package == THEIRS and keeps)
        if package == THEIRS and name in PARTS:
            self.finder.fill_gaps(module, name)
        if package == OURS:
            # A star import of the handed out file also gives what that file imported, and
            # submissions rely on this.
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
                self.finder.note(
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
    """Return the lines of imports inside ``try`` with ``except ImportError`` or wider."""
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
