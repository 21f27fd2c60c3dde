"""Fine-tuning: start a training run from all weights of a detector instead of its backbone's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from eecs598.deploy import pretrained_names, read_checkpoint
from eecs598.training import ModelSettings, Settings, find_state_dict, load_weights_file
from one_stage_detector import FCOS

__all__ = ["read_start", "start_from", "with_architecture"]

# The settings that decide which weights a detector has and what its outputs mean.
_ARCHITECTURE = (
    "backbone",
    "fpn_channels",
    "stem_channels",
    "box_stem_channels",
    "head_norm",
    "level_scales",
    "quality",
)

# The weights with an entry per class.
_PER_CLASS = ("pred_net.pred_cls.weight", "pred_net.pred_cls.bias")


def with_architecture(given: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the settings that were given those that their ``weights`` imply.

    Args:
        given: value by the name of the setting.

    Returns:
        The same, and where ``weights`` are those of a whole detector, its architecture. Weights of
        a backbone alone fit to any pyramid and head.

    Raises:
        ValueError: weights that are neither a name nor a file, or a file of something else.
    """
    start = read_start(given["weights"]) if "weights" in given else None
    if start is None:
        return dict(given)
    model = Settings.from_dict(start["settings"]).model
    return {**{name: getattr(model, name) for name in _ARCHITECTURE}, **given}


def read_start(weights: str) -> dict[str, Any] | None:
    """Read the whole detector that training is to start from.

    Args:
        weights: the setting of that name.

    Returns:
        What ``eecs598.deploy.read_checkpoint`` returns; None for weights of a backbone alone.

    Raises:
        ValueError: neither a name nor a file, or a file of something else.
    """
    if weights in ("default", "none"):
        return None
    if weights in pretrained_names() or weights.endswith(".safetensors"):
        start = read_checkpoint(weights)
    elif not os.path.isfile(weights):
        raise ValueError(
            f"--weights {weights} is not a file; expected weights of the backbone, a checkpoint of "
            f"`fcos train`, or one of {', '.join(['default', 'none', *pretrained_names()])}."
        )
    else:
        content = load_weights_file(weights)
        state = find_state_dict(content)
        if state is None or _PER_CLASS[0] not in state:
            return None
        start = {"model": state, "settings": content.get("settings")}
        start["classes"] = content.get("classes")
    if start["settings"] is None and _PER_CLASS[0] in start["model"]:
        raise ValueError(
            f"--weights {weights} is a plain state dict of a detector, which does not tell its "
            "backbone and classes; give a checkpoint that `fcos train` wrote."
        )
    return None if start["settings"] is None else start


def start_from(
    detector: FCOS, start: dict[str, Any], settings: ModelSettings, class_names: Sequence[str]
) -> None:
    """Load the weights of a whole detector into a new one.

    Classes of the same name keep their weights; the others start anew.

    Args:
        detector: as it was built, from random weights.
        start: what ``read_start`` returned.
        settings: of the new detector.
        class_names: of the new detector, in the order of their ids.

    Raises:
        ValueError: the two have another architecture.
    """
    theirs = Settings.from_dict(start["settings"]).model
    for name in _ARCHITECTURE:
        ours, other = getattr(settings, name), getattr(theirs, name)
        if ours != other:
            raise ValueError(
                f"--weights {settings.weights} is a detector with {name} {other}, and {ours} was "
                "given; leave that option out."
            )
    state, names, old = dict(start["model"]), list(class_names), list(start["classes"])
    kept = [name for name in names if name in old]
    for key, new in detector.state_dict().items():
        if key in _PER_CLASS:
            value = new.clone()  # (C, ...), as the detector was built
            value[[names.index(name) for name in kept]] = state[key][
                [old.index(name) for name in kept]
            ]
            state[key] = value
    detector.load_state_dict(state)
    anew = ", ".join(name for name in names if name not in old)
    print(
        f"{settings.weights}: {len(kept)} of {len(names)} classes keep their weights"
        + (f"; these start anew: {anew}" if anew else "")
    )
