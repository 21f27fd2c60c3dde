"""Checkpoints: files with a trained model, its settings, and the state that training resumes from.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that it can be loaded with
``weights_only=True``: reading one never runs code from the file. A plain state dict, as the
assignment saves it (``torch.save(detector.state_dict(), "fcos_detector.pt")``), is read as a
checkpoint without settings and class names.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eecs598.runtime import atomic_write

__all__ = [
    "load_checkpoint",
    "random_states",
    "restore_random_states",
    "save_checkpoint",
]

_REQUIRED_KEYS = ("model", "settings", "classes")


def save_checkpoint(
    path: str | os.PathLike,
    model: dict[str, Tensor],
    settings: dict[str, Any],
    classes: list[str],
    **more: Any,
) -> None:
    """Write a checkpoint. Until the file is complete, the old one stays in its place.

    Args:
        path: of the file.
        model: state dict of the detector.
        settings: of the run, as ``Settings.to_dict`` returns them.
        classes: class names in the order of their ids.
        more: further entries, such as the iteration.
    """
    with atomic_write(path) as unfinished:
        torch.save({"model": model, "settings": settings, "classes": classes, **more}, unfinished)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint, or a plain state dict, onto the CPU.

    Returns:
        What ``save_checkpoint`` was given; for a plain state dict, ``settings`` and ``classes``
        are None.

    Raises:
        ValueError: no such file, or neither of the two.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file; expected a checkpoint that `fcos train` wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if entries and all(isinstance(value, Tensor) for value in entries.values()):
        return {"model": dict(entries), "settings": None, "classes": None}
    missing = [key for key in _REQUIRED_KEYS if key not in entries]
    if missing:
        raise ValueError(
            f"{path} is neither a checkpoint of `fcos train`, since it lacks "
            f"{', '.join(missing)}, nor a state dict."
        )
    return checkpoint


def random_states() -> dict[str, Any]:
    """Return the states of the random generators of Python, NumPy and PyTorch (CPU, this GPU)."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the random generators into the states that ``random_states`` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = states["numpy"]
    key = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
