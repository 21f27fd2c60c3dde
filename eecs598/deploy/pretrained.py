"""Trained detectors as safetensors files: those that come along, by name, and any other by path.

A file holds the weights and, as metadata, everything that is needed to use them: ``classes``,
``settings``, and what the file says of itself (training data, mAP, license). Every value of the
metadata is JSON. Reading such a file never runs code from it.

Matrices and convolutions are stored in float16. Biases and batch norm, 1 % of the file, stay in
float32: running variances may lie outside the range of float16. All are read as float32.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eecs598.runtime import atomic_write
from eecs598.training import load_checkpoint

__all__ = ["WEIGHTS_FOLDER", "pretrained_names", "read_checkpoint", "write_weights"]

WEIGHTS_FOLDER = Path(__file__).with_name("weights")

_SUFFIX = ".safetensors"
_REQUIRED = ("classes", "settings")


def pretrained_names() -> list[str]:
    """Return the names of the trained detectors that come along."""
    return sorted(path.stem for path in WEIGHTS_FOLDER.glob(f"*{_SUFFIX}"))


def read_checkpoint(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the trained detector that a name or a path stands for, onto the CPU.

    Args:
        checkpoint: a name among ``pretrained_names()``, which comes before a file of the same name
            (``./voc2007`` is that file); otherwise a file: of ``write_weights``, a checkpoint of
            ``fcos train``, or a plain state dict.

    Returns:
        ``model`` (state dict), ``settings`` and ``classes``, both None for a plain state dict, and
        whatever else the file holds.

    Raises:
        ValueError: no such name or file, or a file of something else.
    """
    name = os.fspath(checkpoint)
    if name in pretrained_names():
        return _read_weights(WEIGHTS_FOLDER / f"{name}{_SUFFIX}")
    path = Path(name)
    if not path.is_file():
        raise ValueError(_not_found(name))
    return _read_weights(path) if path.suffix == _SUFFIX else load_checkpoint(path)


def write_weights(
    path: str | os.PathLike[str],
    model: Mapping[str, Tensor],
    *,
    settings: Mapping[str, Any],
    classes: Sequence[str],
    **facts: Any,
) -> None:
    """Write a detector as a safetensors file that ``read_checkpoint`` reads.

    Args:
        path: of the file; it must end in ``.safetensors``.
        model: state dict of the detector.
        settings: of its training run, as ``Settings.to_dict`` returns them.
        classes: class names in the order of their ids.
        facts: further metadata, as values that JSON can hold.

    Raises:
        ValueError: another suffix, or a weight that float16 can't hold.
    """
    if Path(path).suffix != _SUFFIX:
        raise ValueError(f"{path} given; expected a file name that ends in {_SUFFIX}.")
    metadata = {"settings": dict(settings), "classes": list(classes), **facts}
    stored = {name: _to_stored(name, value) for name, value in model.items()}
    with atomic_write(path) as unfinished:
        save_file(stored, unfinished, {key: json.dumps(value) for key, value in metadata.items()})


def _to_stored(name: str, value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    if value.dtype != torch.float32 or value.dim() < 2:
        return value
    half = value.half()
    if not half.isfinite().all():
        raise ValueError(f"{name} has values up to {value.abs().max():g}; float16 holds 65504.")
    return half


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            model = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} can't be read as safetensors: {error}. It is cut off, or something else; "
            "get the file again."
        ) from error
    model = {k: v.float() if v.dtype == torch.float16 else v for k, v in model.items()}
    if not all(key in metadata for key in _REQUIRED):  # as other programs write it
        return {"model": model, "settings": None, "classes": None}
    try:
        facts = {key: json.loads(value) for key, value in metadata.items()}
    except ValueError as error:
        raise ValueError(f"{path} has metadata that is not JSON: {error}.") from error
    return {**facts, "model": model}


def _not_found(name: str) -> str:
    """Say that a checkpoint is not there, and what may have been meant."""
    names, path = pretrained_names(), Path(name)
    files = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(name, names)
    close += [str(path.parent / each) for each in difflib.get_close_matches(path.name, files)]
    known = f", or a name: {', '.join(names)}" if names else ""
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{name} is not a file; expected a checkpoint that `fcos train` wrote{known}.{hint}"
