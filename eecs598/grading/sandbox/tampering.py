"""Detect when the code of a submission changes the code that grades it.

A submission runs in the process of its checks, so it can reach their functions and those of the
libraries that they call. ``Watch`` records these before any code of the submission runs, reports
what was replaced since, and restores it. ``broken_tools`` calls functions whose right results are
known, so it also detects changes in places that ``Watch`` does not record.

Code that is written to circumvent this can do so. See docs/grading-for-staff.md.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import math
import os
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torchvision.ops import nms

import eecs598
from eecs598.grading.result import CheckFailure, CheckResult, expect, expect_close, isolated
from eecs598.grading.source import index_modules, parse_file
from eecs598.grading.submission import GRADER

__all__ = ["Watch", "broken_tools", "suspicious_code"]

_MISSING = object()


class Watch:
    """The state of everything that the modules of the grader refer to, when this was created.

    That is their own functions and classes, and the contents of the modules and classes that they
    name, such as ``torch``, ``math`` or ``Tensor``. A submission may add names to those unless
    they hide others.

    Attributes:
        modules: the guarded modules of the grader: all that are loaded.
    """

    def __init__(self) -> None:
        self.modules = {
            name: module
            for name, module in list(sys.modules.items())
            if module and f"{name}.".startswith(f"{GRADER}.")
        }
        own = list(self.modules.values())
        places: dict[int, ModuleType | type] = {id(place): place for place in (*own, builtins)}
        for module in own:
            for value in vars(module).values():
                if isinstance(value, (ModuleType, type)):
                    places.setdefault(id(value), value)
        self._own = {id(module) for module in own}
        self._places = list(places.values())
        self._contents = [dict(vars(place)) for place in self._places]
        self._inherited = [_inherited(place) for place in self._places]
        functions = {
            id(value): value
            for contents in self._contents
            for value in contents.values()
            if isinstance(value, FunctionType)
        }
        self._functions = [(function, _parts(function)) for function in functions.values()]

    def restore(self) -> list[str]:
        """Restore everything, and return the names of what had been replaced."""
        replaced = []
        for place, contents, inherited in zip(
            self._places, self._contents, self._inherited, strict=True
        ):
            now = vars(place)
            # Values that were None are caches of libraries, filled on first use.
            names = {
                name
                for name, value in contents.items()
                if value is not None and now.get(name, self) is not value
            }
            added = now.keys() - contents.keys()
            if id(place) in self._own:
                names |= {name for name in added if hasattr(builtins, name)}
            names |= added & inherited
            for name in sorted(names):
                if _is_bookkeeping(place, name):
                    continue
                if _restore_value(place, name, contents.get(name, _MISSING)):
                    replaced.append(f"{place.__name__}.{name}")
        for function, parts in self._functions:
            if _differ(parts, _parts(function)):
                replaced.append(f"the code of {function.__module__}.{function.__qualname__}")
                function.__code__, function.__defaults__, function.__kwdefaults__ = parts[:3]
                for cell, value in zip(function.__closure__ or (), parts[3:], strict=True):
                    cell.cell_contents = value
        return replaced


def _inherited(place: ModuleType | type) -> set[str]:
    """Return the names that a class inherits; a name added to it may hide one of these."""
    if not isinstance(place, type):
        return set()
    return {name for base in place.__mro__[1:] for name in vars(base)}


def _is_bookkeeping(place: ModuleType | type, name: str) -> bool:
    """Whether Python and its libraries change a name themselves, or programs may set it."""
    if place is sys:
        return True
    return name in ("filters", "__warningregistry__") or name.startswith("_abc_")


def _restore_value(place: ModuleType | type, name: str, value: Any) -> bool:
    try:
        if value is _MISSING:
            delattr(place, name)
        else:
            setattr(place, name, value)
    except (AttributeError, TypeError):
        return False  # what can't be set can't have been replaced
    return True


def _parts(function: FunctionType) -> tuple[Any, ...]:
    """Return what decides how a function behaves: code, defaults and closure."""
    cells = [_contents(cell) for cell in function.__closure__ or ()]
    return (function.__code__, function.__defaults__, function.__kwdefaults__, *cells)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return _MISSING


def _differ(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return any(a is not b for a, b in zip(before, now, strict=True))


def broken_tools() -> list[str]:
    """Return the names of functions that checks rely on and that give wrong results."""
    right, wrong = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]])
    scores = torch.tensor([0.3, 0.9, 0.5])
    with isolated():
        works = {
            "expect": _refuses(expect, False, "no"),
            "expect_close": _refuses(expect_close, "a row", wrong, right)
            and _refuses(expect_close, "a row", right[:2], right)
            and not _refuses(expect_close, "a row", right, right),
            "CheckResult": _records_failures(),
            "torch.isclose": torch.isclose(wrong, right).tolist() == [True, True, False],
            "torch.allclose": not torch.allclose(wrong, right) and torch.allclose(right, right),
            "torch.equal": not torch.equal(wrong, right) and torch.equal(right, right),
            "math.isclose": not math.isclose(1.0, 2.0) and math.isclose(2.0, 2.0),
            "torchvision.ops.nms": nms(boxes, scores, 0.5).tolist() == [1, 2],
        }
    return [name for name, is_right in works.items() if is_right is not True]


def _refuses(function: Any, *arguments: Any) -> bool:
    try:
        function(*arguments)
    except CheckFailure:
        return True
    return False


def _records_failures() -> bool:
    result = CheckResult("example")
    with result.probe("right"):
        pass
    with result.probe("wrong"):
        raise CheckFailure("as it should be")
    return result.passed == ["right"] and result.failed == ["wrong: as it should be"]


# --------------------------------------------------------------------------------------------
# Suspicious code
# --------------------------------------------------------------------------------------------

# Modules and names that a solution of the assignment does not need.
SUSPICIOUS_MODULES = {
    "_thread",
    "builtins",
    "ctypes",
    "gc",
    "importlib",
    "marshal",
    "multiprocessing",
    "ours",
    "signal",
    "subprocess",
    "threading",
}
SUSPICIOUS_NAMES = {
    "__builtins__",
    "__closure__",
    "__code__",
    "__globals__",
    "__import__",
    "__subclasses__",
    "_current_frames",
    "_exit",
    "_getframe",
    "addaudithook",
    "as_subclass",
    "currentframe",
    "f_back",
    "f_globals",
    "f_locals",
    "getppid",
    "setprofile",
    "settrace",
    "tb_frame",
}
# Methods by which a returned object could hide its contents.
SUSPICIOUS_METHODS = {"__eq__", "__ne__", "__torch_dispatch__", "__torch_function__"}
SUSPICIOUS_CALLS = {"eval", "exec"}  # as functions; every network has a method eval
MAX_SOURCE = 2**20  # bytes of a file that is searched


def suspicious_code(folder: str | os.PathLike) -> list[str]:
    """List lines of a submission that a person should look at: code that a solution does not need.

    It proves nothing, and code that is written to avoid it can do so.

    Returns:
        File, line and what was found there; files that can't be searched are listed, too.
    """
    lines = []
    for name, path in index_modules(Path(folder)).items():
        try:
            if _is_ours(name, path):
                continue
            if path.suffix == ".py" and path.stat().st_size > MAX_SOURCE:
                lines.append(f"{path.relative_to(folder)} is larger than 1 MiB")
                continue
            tree, _ = parse_file(path, path.name)
        except OSError as error:
            lines.append(f"{path.relative_to(folder)} can't be read: {error.strerror}")
            continue
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            lines.append(f"{path.relative_to(folder)} can't be looked at: it is no Python")
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.stmt, ast.expr)))
        found = sorted({(n.lineno, what) for n in nodes if (what := _suspicion(n))})
        lines += [f"{path.relative_to(folder)}, line {n}: {what}" for n, what in found]
    return lines[:50]


def _is_ours(name: str, path: Path) -> bool:
    """Whether a file is an unchanged copy of this project's."""
    root = Path(eecs598.__file__).parents[1]  # of the repository, or site-packages
    ours = root.joinpath(*name.split("."))
    for file in (ours.with_suffix(".py"), ours / "__init__.py"):
        with contextlib.suppress(OSError):
            if file.read_bytes() == path.read_bytes():
                return True
    return False


def _suspicion(node: ast.AST) -> str | None:
    """Say what is suspicious about a node of a syntax tree; None if nothing is."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [getattr(node, "module", None) or ""]
        modules += [alias.name for alias in node.names]
        if any(name.startswith(GRADER) for name in modules):
            return "imports the grader"
        named = {name.partition(".")[0] for name in modules[: None if not modules[0] else 1]}
        if named & SUSPICIOUS_MODULES:
            return f"imports {', '.join(sorted(named & SUSPICIOUS_MODULES))}"
    if isinstance(node, ast.FunctionDef) and node.name in SUSPICIOUS_METHODS:
        return f"defines {node.name}"
    if isinstance(node, ast.Attribute) and node.attr in SUSPICIOUS_NAMES:
        return node.attr
    if isinstance(node, ast.Name) and node.id in SUSPICIOUS_NAMES:
        return node.id
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return f"{node.func.id}()" if node.func.id in SUSPICIOUS_CALLS else None
    return None
