"""Files that hold a trained model with what is needed to build it again.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that it can be loaded with
``weights_only=True``: reading one never runs code from the file.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from eecs598.files import replacing

__all__ = ["load_checkpoint", "save_checkpoint"]

_REQUIRED_KEYS = ("model", "settings", "classes")


def save_checkpoint(
    path: str | os.PathLike,
    model: dict[str, torch.Tensor],
    settings: dict[str, Any],
    classes: list[str],
    **more: Any,
) -> None:
    """Write a checkpoint; a reader never meets half a file.

    Args:
        path: of the file.
        model: state dict.
        settings: what the model is built with.
        classes: class names in the order of their ids.
        more: further entries.
    """
    with replacing(path) as unfinished:
        torch.save({"model": model, "settings": settings, "classes": classes, **more}, unfinished)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        ValueError: no such file, or not a checkpoint of ``save_checkpoint``.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; expected a checkpoint that `fcos train` wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    missing = [
        key for key in _REQUIRED_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint
    ]
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of `fcos train`: it lacks {', '.join(missing)}."
        )
    return checkpoint
