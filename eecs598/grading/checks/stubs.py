"""Stand-ins for parts of a detector, so that it is known what must come out of the rest.

A planted head predicts what it was given, a planted backbone takes no time. The rest of the
detector may use more of them than their outputs, so each passes for what it replaces: it has the
attributes and parameters of that, and its outputs come in the same kind of container.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.submission import FPN_CHANNELS, Submission

__all__ = ["Predictions", "locations_of", "plant"]

Predictions = list[dict[str, Tensor]]  # class logits, deltas, centerness logits of each level


def plant(submission: Submission, predictions: Predictions) -> nn.Module:
    """The submission's detector, which sees in any image what is given."""
    example = submission.feature_maps
    return submission.detector_with(
        backbone=lambda original: _PlantedBackbone(original, example),
        pred_net=lambda original: _PlantedHead(original, predictions),
    )


def locations_of(submission: Submission, images: Tensor) -> dict[str, Tensor]:
    """The submission's coordinates for the feature maps of some images."""
    return submission.common.get_fpn_location_coords(_map_shapes(images), STRIDES)


def _map_shapes(images: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the pyramid's maps."""
    return {
        level: (
            len(images),
            FPN_CHANNELS,
            *(math.ceil(side / stride) for side in images.shape[-2:]),
        )
        for level, stride in STRIDES.items()
    }


class _StandIn(nn.Module):
    """Passes for another module."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # past nn.Module, which would register it

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.original.named_parameters(*args, **kwargs)


class _PlantedBackbone(_StandIn):
    """Gives maps of the right shapes with nothing in them; a planted head does not look at them."""

    fpn_strides = STRIDES
    out_channels = FPN_CHANNELS

    def __init__(self, original: nn.Module, example: object) -> None:
        super().__init__(original)
        self.example = example

    def forward(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        images = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        maps = {level: images.new_zeros(shape) for level, shape in _map_shapes(images).items()}
        return _filled(self.example, maps)


class _PlantedHead(_StandIn):
    """Predicts what it was given."""

    def __init__(self, original: nn.Module, predictions: Predictions) -> None:
        super().__init__(original)
        self.predictions = predictions

    def forward(self, *args: Any, **kwargs: Any) -> object:
        example: object = None
        # What it does wrong is the matter of other checks.
        with contextlib.suppress(Exception), torch.no_grad():
            example = self.original(*args, **kwargs)
        parts = example if isinstance(example, (list, tuple)) else ()
        if len(parts) != len(self.predictions):
            return [dict(values) for values in self.predictions]
        filled = [_filled(*pair) for pair in zip(parts, self.predictions, strict=True)]
        if hasattr(example, "_make"):  # a named tuple
            return example._make(filled)
        return tuple(filled) if isinstance(example, tuple) else filled


def _filled(example: object, values: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """A mapping as the example, with other values."""
    if not isinstance(example, Mapping) or type(example) is dict:
        return dict(values)
    try:
        filled = copy.copy(example)
        filled.update(values)
        return filled
    except Exception:
        return dict(values)
