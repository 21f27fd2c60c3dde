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
import collections.abc
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType
from unittest import mock

import torch
import torch.utils.model_zoo
import torchvision
from torch.overrides import TorchFunctionMode

from eecs598.grading.result import isolated, place_of
from eecs598.grading.submission import PUBLIC_NAMES, Submission

__all__ = ["PARTS", "Loaded", "index_of", "load_submission", "parse_file", "unload"]

PARTS = tuple(PUBLIC_NAMES)

# What of a submission is its author's own work: as much of it as possible is kept. The rest was
# handed out, and there is a whole one to replace a broken one with.
OWN_WORK = {"common", "one_stage_detector"}

THEIRS, OURS = "submission", "ours"  # the packages below which their and our files are imported

SKIPPED_FOLDERS = {"__MACOSX", "__pycache__", "node_modules", "site-packages"}
MAX_DEPTH = 6  # of folders in a submission
MAX_REPAIRS = 20  # pieces that are left out of a file before it is given up
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
        _changes.enter_context(_fixed_weights())
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
# Files
# --------------------------------------------------------------------------------------------


def index_of(folder: Path) -> dict[str, Path]:
    """The Python files of a submission by the name they are imported with.

    The root is the highest folder with a part of the assignment, that with most of them where
    there are several.
    """
    by_path = {}
    for path in _python_files(folder):
        # Some programs for Windows pack "A4\\common.py" as the name of a file.
        relative = PurePosixPath(str(path.relative_to(folder)).replace("\\", "/"))
        by_path[relative] = path
    roots = {path.parent for path in by_path if path.stem in PARTS}

    def rank(root: PurePosixPath) -> tuple[int, int, str]:
        parts = sum(root / f"{part}.py" in by_path for part in PARTS)
        return -parts, len(root.parts), str(root)

    root = min(roots, key=rank, default=PurePosixPath("."))
    names = {}
    for path, file in sorted(by_path.items()):
        if path.is_relative_to(root):
            parts = path.relative_to(root).with_suffix("").parts
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
            if not name.endswith(".py") or name.startswith("."):
                continue
            is_file = os.path.isfile(path)
            if path.is_symlink():  # it may lead anywhere on this machine
                is_file = is_file and path.resolve().is_relative_to(inside)
            # Where one may not even ask, reading it will say why.
            if is_file or not os.path.lexists(path):
                yield path


def _read(path: Path) -> str:
    """The text of a source file, whichever editor wrote it."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", errors="replace")
    try:
        return importlib.util.decode_source(raw)
    except (SyntaxError, UnicodeDecodeError):
        return raw.decode("cp1252", errors="replace")


def parse_file(path: Path, file: str) -> tuple[ast.Module, list[str]]:
    """Parse a file, without the pieces that are no Python.

    Args:
        path: where it lies.
        file: how to call it.

    Returns:
        The tree, and a note on each piece left out.

    Raises:
        SyntaxError: nothing can be made of it.
    """
    lines = _read(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    notes = _resolve_conflicts(lines, file)
    while True:
        try:
            return ast.parse("\n".join(lines)), notes
        except SyntaxError as error:
            if error.lineno is None or len(notes) == MAX_REPAIRS:
                raise
            # After "def f():" without a body, Python points to the line where it missed it.
            earlier = re.search(r"expected an indented block after .* on line (\d+)", str(error))
            number = int(earlier[1]) if earlier else error.lineno
            number = min(max(number, 1), len(lines)) - 1
            line = lines[number].strip()
            if line.startswith(("%", "!")):
                lines[number] = re.sub(r"\S.*", "pass", lines[number])
                notes.append(f"{file}, line {number + 1}: {line[:40]!r} is for notebooks; left out")
                continue
            # A method by itself; what is around it, if that was not the reason.
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
                indent = re.match(r"\s*", first)[0]
                lines[start] = f"{indent}{_PLACEHOLDER}"  # a class needs something in it


_PLACEHOLDER = "pass  # left out"


def _method(lines: list[str], number: int) -> tuple[int, int] | None:
    """First line and end of the method around a line, unless it was left out before."""

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
    """First line and end of the top-level statement around a line."""

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
    """Keep the first side where Git has left both."""
    notes, side = [], None
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
        self.cuda_is_cpu = False
        self.folder = next((theirs[part].parent.name for part in PARTS if part in theirs), None)

    def install(self) -> None:
        for package in (THEIRS, OURS):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = []
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
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
                    return _Absent(name)
                if error.name == top:
                    return _Absent(top)
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
            _adapt(self.loading, tree, file)
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


class _Absent(ModuleType):
    """Stands in for a package that is not installed, and for all that is in it."""

    __path__: list[str] = []
    __all__: list[str] = []

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def _refuse(self, *args: object, **kwargs: object) -> None:
        package = self.__name__.partition(".")[0]
        raise ModuleNotFoundError(f"{self.__name__} was used, and {package} is not installed here")

    __call__ = __iter__ = __getitem__ = __enter__ = __mro_entries__ = _refuse


# --------------------------------------------------------------------------------------------
# What has changed since, and what there is not
# --------------------------------------------------------------------------------------------

# Names that libraries have dropped, by the module that had them. They are put back where a file
# names them.
DROPPED = {
    "numpy": {"float": float, "int": int, "object": object, "Inf": float("inf")},
    "PIL.Image": {"ANTIALIAS": 1},  # LANCZOS
    "collections": {name: getattr(collections.abc, name) for name in collections.abc.__all__},
}


def _adapt(loading: _Loading, tree: ast.Module, file: str) -> None:
    """Make up for what a file expects of libraries and machine."""
    for line, module_name, name in _dropped_names(tree):
        module = importlib.import_module(module_name)
        if not hasattr(module, name):
            value = DROPPED[module_name][name]
            _changes.enter_context(mock.patch.object(module, name, value, create=True))
            loading.note(f"{file}, line {line}: {module_name}.{name} is gone from newer versions")
    if (line := _line_of_cuda(tree)) is not None:
        loading.note(f"{file}, line {line}: asks for a GPU whether there is one or not; given CPU")
        if not loading.cuda_is_cpu:
            loading.cuda_is_cpu = True
            _changes.enter_context(_cuda_is_cpu())


def _dropped_names(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of each use of a dropped name."""
    short = {"np": "numpy", "numpy": "numpy", "Image": "PIL.Image", "collections": "collections"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = short.get(node.value.id)
            if node.attr in DROPPED.get(module, ()):
                yield node.lineno, module, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module in DROPPED:
            for alias in node.names:
                if alias.name in DROPPED[node.module]:
                    yield node.lineno, node.module, alias.name


def _line_of_cuda(node: ast.AST) -> int | None:
    """The first line that asks for a GPU without looking whether there is one."""
    if isinstance(node, ast.Compare):
        return None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.lineno if re.fullmatch(r"cuda(:\d*)?", node.value) else None
    if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "cuda":
        return node.lineno
    if isinstance(node, ast.Attribute) and re.fullmatch(
        r"torch\.cuda\.(synchronize|\w+Tensor)", ast.unparse(node)
    ):
        return node.lineno
    if isinstance(node, (ast.If, ast.IfExp)) and "cuda" in ast.unparse(node.test):
        return None  # it looks
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Dict):
        children = node.values  # keys are names
    elif isinstance(node, ast.Subscript):
        children = [node.value]
    lines = (_line_of_cuda(child) for child in children)
    return next((line for line in lines if line is not None), None)


class _CpuInstead(TorchFunctionMode):
    """Reads a request for a GPU as one for the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        kwargs = {name: self._on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*(self._on_cpu(value) for value in args), **kwargs)

    @staticmethod
    def _on_cpu(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "cuda" else value
        return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


@contextlib.contextmanager
def _cuda_is_cpu() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in dir(torch.cuda):
            if name.endswith("Tensor"):
                on_cpu = getattr(torch, name)
                stack.enter_context(mock.patch.object(torch.cuda, name, on_cpu))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda device=None: None))
        stack.enter_context(_CpuInstead())
        yield


@contextlib.contextmanager
def _fixed_weights() -> Iterator[None]:
    """Give fixed random weights to whoever wants to download some, and hide GPUs."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (torch.hub, "load_state_dict_from_url"),
            (torch.utils.model_zoo, "load_url"),
            (torchvision.models._api, "load_state_dict_from_url"),
            (torchvision._internally_replaced_utils, "load_state_dict_from_url"),
        ):
            stack.enter_context(mock.patch.object(module, name, _state_dict_from_url))
        stack.enter_context(mock.patch.object(torch.hub, "load", _load_from_hub))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
        yield


def _state_dict_from_url(url: str, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
    return dict(_random_state_dict(_network_of(url)))


def _network_of(url: str) -> str:
    """Name of the network of torchvision that some weights belong to."""
    names = torchvision.models.list_models()
    for name in names:
        if any(weights.url == url for weights in torchvision.models.get_model_weights(name)):
            return name
    name = PurePosixPath(url).stem.rpartition("-")[0]  # regnet_x_400mf-adf1edd5.pth
    if name not in names:
        raise ModuleNotFoundError(f"{url} can't be downloaded: there is no network here")
    return name


@functools.cache
def _random_state_dict(name: str) -> dict[str, torch.Tensor]:
    with isolated():
        return torchvision.models.get_model(name, weights=None).state_dict()


def _load_from_hub(repository: str, model: str, *args: object, **kwargs: object) -> object:
    if not str(repository).startswith("pytorch/vision"):
        raise ModuleNotFoundError(f"{repository} can't be downloaded: there is no network here")
    kwargs = {key: kwargs[key] for key in kwargs if key not in ("pretrained", "weights")}
    return torchvision.models.get_model(model, weights=None, **kwargs)
