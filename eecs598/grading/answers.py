"""Convert what a submission returns to plain data: tensors, numbers, strings, lists and dicts.

A submission may return objects of its own classes. Their methods may claim to be equal to anything,
or compute something else than was asked for. So every value that comes from a submission goes
through ``to_plain_data`` before a check compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping, ValuesView
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PlainDataProxy", "to_plain_data"]

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
_CONVERSIONS: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (str, str.__str__),
    (PurePath, PurePath.__str__),
)

MAX_ITEMS = 10_000  # read from an iterator, which may be endless


class _OpaqueValue:
    """A placeholder for an object that no check can use; it is equal to nothing."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return f"an object of class {self._kind}"

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"expected values, got {self!r}")


def to_plain_data(value: Any) -> Any:
    """Return the same value without any code of its class.

    Tensors, arrays, numbers, strings, paths, and dicts, lists and tuples with all they contain, are
    converted from derived classes to those of Python, NumPy and PyTorch; gradients still flow
    through tensors. Other mappings become dicts, and iterators become lists. Modules are returned
    as they are, so their outputs have to be converted, too. Anything else becomes a placeholder
    that is equal to nothing.
    """
    kind = type(value)  # unlike ``value.__class__``, it can't be forged
    if any(kind is known for known in _PLAIN):  # "in" would call the class's own ``__eq__``
        return value
    if issubclass(kind, Tensor):
        if kind is Tensor and not vars(value):
            return value
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.as_subclass(value, Tensor)  # also drops attributes set on the instance
    if issubclass(kind, dict):
        return {to_plain_data(key): to_plain_data(item) for key, item in dict.items(value)}
    for sequence in (list, tuple):
        if issubclass(kind, sequence):
            return sequence(to_plain_data(item) for item in sequence.__iter__(value))
    if issubclass(kind, Mapping):
        return to_plain_data(dict(value))
    if issubclass(kind, (Iterator, KeysView, ValuesView)):
        return to_plain_data(list(islice(value, MAX_ITEMS)))
    if issubclass(kind, np.ndarray):
        if value.dtype.hasobject:
            return to_plain_data(np.ndarray.tolist(value))
        return np.array(value, subok=False)
    if issubclass(kind, np.generic):
        return to_plain_data(np.generic.item(value))
    for base, convert in _CONVERSIONS:
        if issubclass(kind, base):
            return convert(value)
    if issubclass(kind, (nn.Module, _OpaqueValue)):
        return value
    return _OpaqueValue(type.__getattribute__(kind, "__name__"))


class PlainDataProxy:
    """A module or data set of a submission whose functions and items give plain data.

    Classes and other data among its attributes are returned as they are.

    Attributes:
        wrapped: the module or data set itself.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["wrapped"], name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *args, **kwargs: to_plain_data(value(*args, **kwargs))

    def __getitem__(self, index: Any) -> Any:
        return to_plain_data(self.wrapped[index])

    def __len__(self) -> int:
        return len(self.wrapped)
