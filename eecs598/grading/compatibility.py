"""Make up for what a submission expects of this machine and of older libraries."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from types import ModuleType
from unittest import mock

import torch
import torch.utils.model_zoo
import torchvision
from torch.overrides import TorchFunctionMode

from eecs598.grading.result import isolated

__all__ = ["AbsentPackage", "LibraryChanges"]


class AbsentPackage(ModuleType):
    """Stands in for a package that is not installed, and for all that is in it."""

    __path__: list[str] = []
    __all__: list[str] = []

    def __getattr__(self, name: str) -> AbsentPackage:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentPackage(f"{self.__name__}.{name}")

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


class LibraryChanges:
    """Changes to libraries for one submission, which ``undo`` takes back together."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._stack = contextlib.ExitStack()
        self._cuda_is_cpu = False

    def install(self) -> None:
        """Make the changes that every submission gets."""
        self._stack.enter_context(_fixed_weights())

    def adapt(self, tree: ast.Module, file: str) -> None:
        """Make up for what a file expects of libraries and machine."""
        for line, module_name, name in _dropped_names(tree):
            module = importlib.import_module(module_name)
            if not hasattr(module, name):
                value = DROPPED[module_name][name]
                self._stack.enter_context(mock.patch.object(module, name, value, create=True))
                self._note(f"{file}, line {line}: {module_name}.{name} is gone from newer versions")
        if (line := _line_of_cuda(tree)) is not None:
            self._note(
                f"{file}, line {line}: asks for a GPU whether there is one or not; given CPU"
            )
            if not self._cuda_is_cpu:
                self._cuda_is_cpu = True
                self._stack.enter_context(_cuda_is_cpu())

    def undo(self) -> None:
        """Take all changes back."""
        self._stack.close()


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
