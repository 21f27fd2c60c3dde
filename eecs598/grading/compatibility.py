"""Replace packages, weights and devices that a submission needs and this machine does not have.

That is: packages that are not installed, pretrained weights, a GPU, and names that libraries have
removed.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.utils.model_zoo
import torchvision
from torch.overrides import TorchFunctionMode

from eecs598.grading.result import isolated

__all__ = ["AbsentPackage", "LibraryChanges"]


class AbsentPackage(ModuleType):
    """A substitute for a package that is not installed, and for all it contains; its use raises."""

    __path__: list[str] = []
    __all__: list[str] = []

    def __getattr__(self, name: str) -> AbsentPackage:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentPackage(f"{self.__name__}.{name}")

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        package = self.__name__.partition(".")[0]
        raise ModuleNotFoundError(f"{self.__name__} was used, and {package} is not installed here")

    __call__ = __iter__ = __getitem__ = __enter__ = __mro_entries__ = _refuse


# --------------------------------------------------------------------------------------------
# Changes to libraries
# --------------------------------------------------------------------------------------------

# Names that libraries have removed, by module. They are added again if a file uses them.
REMOVED_NAMES: dict[str, dict[str, object]] = {
    "numpy": {"float": float, "int": int, "object": object, "Inf": float("inf")},
    "PIL.Image": {"ANTIALIAS": 1},  # LANCZOS
    "collections": {name: getattr(collections.abc, name) for name in collections.abc.__all__},
}


class LibraryChanges:
    """Changes to libraries for one submission.

    Args:
        note: called with a sentence for each change that a file makes necessary.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._stack = contextlib.ExitStack()
        self._cuda_is_cpu = False

    def install(self) -> None:
        """Replace pretrained weights, and hide GPUs; every submission gets these changes."""
        self._stack.enter_context(_fixed_weights())

    def adapt(self, tree: ast.Module, file: str) -> None:
        """Add the removed names that a file uses, and run it on the CPU if it requires a GPU.

        Args:
            tree: the parsed file.
            file: its name in notes.
        """
        for line, module_name, name in _removed_names(tree):
            module = importlib.import_module(module_name)
            if not hasattr(module, name):
                value = REMOVED_NAMES[module_name][name]
                self._stack.enter_context(mock.patch.object(module, name, value, create=True))
                self._note(f"{file}, line {line}: {module_name}.{name} is gone from newer versions")
        if (cuda_line := _line_of_cuda(tree)) is not None:
            self._note(
                f"{file}, line {cuda_line}: asks for a GPU whether there is one or not; given CPU"
            )
            if not self._cuda_is_cpu:
                self._cuda_is_cpu = True
                self._stack.enter_context(_cuda_as_cpu())

    def undo(self) -> None:
        """Undo all changes."""
        self._stack.close()


def _removed_names(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Find each use of a removed name: its line, module and name."""
    short = {"np": "numpy", "numpy": "numpy", "Image": "PIL.Image", "collections": "collections"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = short.get(node.value.id, "")
            if node.attr in REMOVED_NAMES.get(module, {}):
                yield node.lineno, module, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module in REMOVED_NAMES:
            for alias in node.names:
                if alias.name in REMOVED_NAMES[node.module]:
                    yield node.lineno, node.module, alias.name


def _line_of_cuda(node: ast.AST) -> int | None:
    """Return the first line that requires a GPU without testing whether there is one."""
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
        return None  # it tests for one
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Dict):
        children = node.values  # "cuda" as a key is a name
    elif isinstance(node, ast.Subscript):
        children = [node.value]
    lines = (_line_of_cuda(child) for child in children)
    return next((line for line in lines if line is not None), None)


class _CudaAsCpu(TorchFunctionMode):
    """A mode in which PyTorch functions that are told to use a GPU use the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        options = {name: self._on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*(self._on_cpu(value) for value in args), **options)

    @staticmethod
    def _on_cpu(value: object) -> object:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "cuda" else value
        return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


@contextlib.contextmanager
def _cuda_as_cpu() -> Iterator[None]:
    """Run everything that requires a GPU on the CPU."""
    with contextlib.ExitStack() as stack:
        for name in dir(torch.cuda):
            if name.endswith("Tensor"):
                on_cpu = getattr(torch, name)
                stack.enter_context(mock.patch.object(torch.cuda, name, on_cpu))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda device=None: None))
        stack.enter_context(_CudaAsCpu())
        yield


@contextlib.contextmanager
def _fixed_weights() -> Iterator[None]:
    """Return fixed random weights instead of downloading pretrained ones, and hide GPUs."""
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
    """Return the name of the torchvision network that the weights at a URL belong to."""
    names = torchvision.models.list_models()
    for name in names:
        if any(weights.url == url for weights in torchvision.models.get_model_weights(name)):
            return name
    name = PurePosixPath(url).stem.rpartition("-")[0]  # such as regnet_x_400mf-adf1edd5.pth
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
