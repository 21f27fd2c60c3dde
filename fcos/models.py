"""Detectors built from settings, from a checkpoint or from a plain state dict."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import PretrainedWeightsWarning
from eecs598.data import VOC2007_CLASSES, class_names
from eecs598.deploy import read_checkpoint
from eecs598.training import ModelSettings, Settings
from fcos.fine_tuning import read_start, start_from
from one_stage_detector import FCOS

__all__ = ["TrainedDetector", "build_detector", "load_detector"]


class TrainedDetector(NamedTuple):
    """A detector with what is known of its training."""

    detector: FCOS
    settings: Settings
    class_names: list[str]  # in the order of their ids


def build_detector(
    settings: ModelSettings,
    num_classes: int,
    class_names: Sequence[str] = (),
    *,
    load_weights: bool = True,
) -> FCOS:
    """Build FCOS; unlike in a notebook, a start without the wanted weights is an error.

    Args:
        settings: of the model.
        num_classes: number of classes, C.
        class_names: the C names, by which classes keep the weights of a whole detector.
        load_weights: start from the weights that the settings name, of the backbone or of a whole
            detector; without, from random ones, since those of a checkpoint are loaded afterwards.

    Raises:
        ValueError: a setting that ``FCOS`` does not take, or weights that can't be loaded.
    """
    kwargs = settings.kwargs()
    start = read_start(settings.weights) if load_weights else None
    if start is not None or not load_weights:
        kwargs["weights"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainedWeightsWarning)
        try:
            detector = FCOS(num_classes, **kwargs)
        except PretrainedWeightsWarning as warning:
            raise ValueError(
                f"{warning}\nGive the backbone's weights as --weights FILE, or start from random "
                "ones on purpose with --weights none."
            ) from None
    if start is not None:
        start_from(detector, start, settings, class_names)
    return detector


def load_detector(
    path: str | os.PathLike,
    *,
    backbone: str,
    data: str | None = None,
    classes: str | None = None,
    image_size: int | None = None,
    classes_per_location: int | None = None,
) -> TrainedDetector:
    """Load the detector of a checkpoint, or of a plain state dict.

    Args:
        path: name of a detector that comes along, or a file that ``fcos train``,
            ``eecs598.deploy.write_weights`` or ``torch.save(detector.state_dict(), path)`` wrote.
        backbone: of a plain state dict, which does not name it.
        data: folder of a data set that has the class names of a plain state dict.
        classes: those names themselves, comma between them.
        image_size: in place of the one in training.
        classes_per_location: likewise.

    Raises:
        ValueError: a file that is neither, or that does not fit to what was given.
    """
    checkpoint = read_checkpoint(path)
    state, names = checkpoint["model"], checkpoint["classes"]
    if names is not None and classes is not None:
        raise ValueError(
            f"{path} has class names: {', '.join(names)}. Leave out --classes, which is for "
            "plain state dicts."
        )
    if checkpoint["settings"] is None:
        settings = _settings_from_shapes(state, path, backbone)
        names = _class_names(state, path, data, classes)
    else:
        settings = Settings.from_dict(checkpoint["settings"])
    given = {"image_size": image_size, "classes_per_location": classes_per_location}
    settings = settings.replace(**{name: n for name, n in given.items() if n is not None})
    detector = build_detector(settings.model, len(names), load_weights=False)
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds the weights of another model than its settings say: {error}"
        ) from error
    detector.to(memory_format=torch.channels_last)  # as in training: most processors are faster
    return TrainedDetector(detector, settings, names)


def _settings_from_shapes(
    state: dict[str, Any], path: str | os.PathLike, backbone: str
) -> Settings:
    """Find out the settings from the shapes in a plain state dict."""

    def weights(prefix: str) -> list[Tensor]:
        return [value for name, value in state.items() if name.startswith(prefix)]

    fpn = weights("backbone.fpn_params.")
    if not fpn or "pred_net.pred_cls.bias" not in state:
        raise ValueError(
            f"{path} is a state dict, but not one of FCOS: it has no weights of the "
            f"{'head' if fpn else 'feature pyramid'} (keys such as {', '.join(list(state)[:3])})."
        )

    def stem(name: str) -> tuple[tuple[int, ...], bool]:
        """Return the channels of a stem's convolutions, and whether it has group norm."""
        values = weights(f"pred_net.{name}.")
        channels = tuple(len(value) for value in values if value.dim() == 4)
        # A convolution has a weight and a bias, and so has a group norm.
        return channels, len(values) > 2 * len(channels)

    stem_channels, class_norm = stem("stem_cls")
    box_stem_channels, box_norm = stem("stem_box")
    model = ModelSettings(
        backbone=backbone,
        fpn_channels=len(fpn[0]),
        stem_channels=stem_channels,
        box_stem_channels=None if box_stem_channels == stem_channels else box_stem_channels,
        head_norm="group" if class_norm else "group_box" if box_norm else "none",
        level_scales=bool(weights("pred_net.scales.")),
    )
    return Settings(model=model)


def _class_names(
    state: dict[str, Any], path: str | os.PathLike, data: str | None, classes: str | None
) -> list[str]:
    """Name the classes of a plain state dict: as given, as in the data, or VOC's where they fit."""
    count = len(state["pred_net.pred_cls.bias"])
    if classes is not None:
        names = classes.split(",")
    else:
        names = class_names(data) if data is not None else []
        if count == len(VOC2007_CLASSES) and set(names) <= set(VOC2007_CLASSES):
            if data is None:
                print(f"fcos: no class names in {path}; VOC assumed", file=sys.stderr)
            return list(VOC2007_CLASSES)
    if count != len(names):
        raise ValueError(
            f"{path} has {count} classes; {len(names)} names were given: {names}. A "
            "plain state dict has no class names; give those that it was trained on, by the data "
            "or, for pictures, as --classes A,B,C."
        )
    return names
