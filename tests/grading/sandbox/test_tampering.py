"""What the sandbox guards against changes: every module of the grader, wherever it lies."""

from __future__ import annotations

import pkgutil
import sys

import eecs598.grading
from eecs598.grading.sandbox.tampering import Watch
from eecs598.grading.submission import GRADER


def modules_of_the_grader() -> set[str]:
    """Names of all modules of the grader, as its folder lists them."""
    package = eecs598.grading
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return {package.__name__, *(module.name for module in found)}


def test_every_module_of_the_grader_is_guarded():
    assert eecs598.grading.__name__ == GRADER
    names = modules_of_the_grader()
    assert names <= set(sys.modules), "import them where the sandbox is imported"
    assert set(Watch().modules) == names
    assert len(names) > 25
    assert {f"{GRADER}.checks", f"{GRADER}.sandbox", f"{GRADER}.checks.nms"} <= names


def test_what_is_replaced_in_any_module_is_restored():
    watch = Watch()
    for name, module in watch.modules.items():
        own = next(key for key, value in vars(module).items() if key[0] != "_" and value)
        before = getattr(module, own)
        setattr(module, own, "replaced")
        assert watch.restore() == [f"{name}.{own}"]
        assert getattr(module, own) is before


def test_code_that_is_replaced_in_any_module_is_restored():
    watch = Watch()
    functions = {
        id(value): value
        for name, module in watch.modules.items()
        if name != f"{GRADER}.sandbox.tampering"  # which does the comparing
        for value in vars(module).values()
        if type(value) is type(modules_of_the_grader)
        and value.__module__ == module.__name__
        and value.__closure__ is None
    }
    assert len(functions) > 100
    for function in functions.values():
        before = function.__code__
        function.__code__ = (lambda *_, **__: None).__code__
        assert watch.restore() == [f"the code of {function.__module__}.{function.__qualname__}"]
        assert function.__code__ is before
