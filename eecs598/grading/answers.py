"""What a submission returns, as plain values.

A submission may return objects of classes of its own, and these answer for themselves: they may
say that they are equal to anything, or compute something else than they were asked to. So whatever
comes from a submission goes through ``plain`` before it is judged.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Answering", "plain"]

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    str,
    bytes,
    torch.Size,
    torch.device,
    torch.dtype,
)


MAX_ITEMS = 10_000  # of what might have no end


class _Unknown:
    """Stands for an object that no check has a use for."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"an object of class {self._kind}"

    def __iter__(self) -> Iterator:
        raise TypeError(f"expected values, got {self!r}")


def plain(value: Any) -> Any:
    """The same value without any code of its class.

    Tensors, arrays, numbers, strings, paths and, with what they hold, dicts, lists and tuples of
    derived classes become those of Python, NumPy and PyTorch; autograd goes on through tensors.
    Other mappings become dicts, and what can be gone through once becomes a list. Modules stay, and
    what they return has to come here, too. Anything else becomes a placeholder that is equal to
    nothing.
    """
    kind = type(value)  # which unlike ``value.__class__`` can't be made up
    if any(kind is known for known in _PLAIN):  # "in" would ask the class
        return value
    if issubclass(kind, Tensor):
        if kind is Tensor and not vars(value):
            return value
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.as_subclass(value, Tensor)  # without attributes of its own, too
    if issubclass(kind, dict):
        return {plain(key): plain(item) for key, item in dict.items(value)}
    for base in (list, tuple):
        if issubclass(kind, base):
            return base(plain(item) for item in base.__iter__(value))
    if issubclass(kind, Mapping):
        return plain(dict(value))
    if issubclass(kind, (Iterator, KeysView, ValuesView)):
        return plain(list(islice(value, MAX_ITEMS)))
    if issubclass(kind, np.ndarray):
        if value.dtype.hasobject:
            return plain(np.ndarray.tolist(value))
        return np.array(value, subok=False)
    if issubclass(kind, np.generic):
        return plain(np.generic.item(value))
    for base, convert in (
        (int, int.__int__),
        (float, float.__float__),
        (str, str.__str__),
        (PurePath, PurePath.__str__),
    ):
        if issubclass(kind, base):
            return convert(value)
    if issubclass(kind, (nn.Module, _Unknown)):
        return value
    return _Unknown(type.__getattribute__(kind, "__name__"))


class Answering:
    """A module or a data set of a submission, whose functions and items give plain values.

    Classes and data among its attributes come as they are.

    Attributes:
        wrapped: the module or data set itself.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["wrapped"], name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *args, **kwargs: plain(value(*args, **kwargs))

    def __getitem__(self, index: Any) -> Any:
        return plain(self.wrapped[index])

    def __len__(self) -> int:
        return len(self.wrapped)
