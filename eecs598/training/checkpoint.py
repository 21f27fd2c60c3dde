"""Checkpoints: files with a trained model, its settings, and the state that training resumes from.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, so that it can be loaded with
``weights_only=True``: reading one never runs code from the file. A plain state dict, as the
assignment saves it (``torch.save(detector.state_dict(), "fcos_detector.pt")``), is read as a
checkpoint without settings and class names. It may also be wrapped as other programs do it: see
``find_state_dict``.
"""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eecs598.runtime import atomic_write

__all__ = [
    "find_state_dict",
    "load_checkpoint",
    "load_weights_file",
    "random_states",
    "restore_random_states",
    "save_checkpoint",
]

_REQUIRED_KEYS = ("model", "settings", "classes")

# What programs put in front of the names of weights: DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")


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
    content = {"model": model, "settings": settings, "classes": classes, **more}
    with atomic_write(path) as unfinished, open(unfinished, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # On a full disk, PyTorch hides the error of the file behind one of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


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
    checkpoint = load_weights_file(path)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key in _REQUIRED_KEYS if key not in entries]
    if not missing:
        return entries
    state = find_state_dict(checkpoint)
    if state is None:
        raise ValueError(
            f"{path} is neither a checkpoint of `fcos train`, since it lacks "
            f"{', '.join(missing)}, nor a state dict."
        )
    return {"model": state, "settings": None, "classes": None}


def load_weights_file(path: str | os.PathLike) -> Any:
    """Load what ``torch.save`` wrote onto the CPU, without running code from the file.

    Raises:
        ValueError: the file holds something else; the message says what.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises almost anything
        raise ValueError(
            f"{path} can't be read as a checkpoint: {_describe_content(path) or repr(error)}. "
            "Expected a checkpoint of `fcos train`, or a state dict that torch.save wrote."
        ) from error


def find_state_dict(content: Any) -> dict[str, Tensor] | None:
    """Find the state dict in what a weights file holds, in whichever of the usual wrappings.

    It may be the content itself or its entry ``"state_dict"`` or ``"model"``, and its keys may
    begin with ``module.`` (``DistributedDataParallel``) or ``_orig_mod.`` (``torch.compile``),
    which are taken off.

    Returns:
        The state dict; None where there is none.
    """
    if not isinstance(content, Mapping):
        return None
    for state in (content, content.get("state_dict"), content.get("model")):
        if not isinstance(state, Mapping) or not state:
            continue
        if all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
            return _without_wrappers(state)
    return None


def _without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what stands in front of every key."""
    while prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _describe_content(path: str | os.PathLike) -> str | None:
    """Say what a file holds that is no checkpoint; None for what can't be told."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        return "it is empty"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except zipfile.BadZipFile:
            return "it is damaged"
        if not any(name.endswith("/data.pkl") for name in names):
            return f"it is a zip file of something else ({', '.join(names[:3]) or 'nothing'})"
        return None
    if start.startswith(b"PK"):
        return "it is cut off: the file of a checkpoint that was not written or copied to its end"
    try:
        first_line = start.decode("utf-8").split("\n")[0][:40]
    except UnicodeDecodeError:
        return None
    return f"it is text that begins with {first_line!r}" if first_line.isprintable() else None


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
