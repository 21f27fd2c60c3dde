"""Stubs for backbone and head with known outputs, to test the rest of the detector.

A stub head returns given predictions, and a stub backbone takes no time. The rest of the detector
may use more of them than their outputs, so each stub has the attributes and parameters of the
module that it replaces, and returns its outputs in the same kind of container.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.submission import OWN_GROUND, Settings, Submission

__all__ = ["Predictions", "locations_of", "map_shapes", "stub_detector"]

Predictions = list[dict[str, Tensor]]  # class logits, deltas and centerness logits per level


def stub_detector(
    submission: Submission, predictions: Predictions, settings: Settings = OWN_GROUND
) -> nn.Module:
    """Return the submission's detector with stubs, which makes the given predictions."""
    example = submission.feature_maps
    return submission.detector_with(
        settings,
        backbone=lambda original: _StubBackbone(original, example, settings.fpn_channels),
        pred_net=lambda original: _StubHead(
            original, predictions, _like(example, _small_maps(settings.fpn_channels))
        ),
    )


def locations_of(submission: Submission, images: Tensor) -> dict[str, Tensor]:
    """Return the submission's locations ``(N, 2)`` per level for images ``(B, 3, H, W)``."""
    shapes = map_shapes(images.shape, OWN_GROUND.fpn_channels)
    options = {} if images.dtype == torch.float32 else {"dtype": images.dtype}
    return submission.common.get_fpn_location_coords(shapes, STRIDES, **options)


def _small_maps(channels: int) -> dict[str, Tensor]:
    """Return feature maps of one small image."""
    shapes = map_shapes((1, 3, 64, 64), channels)
    return {level: torch.zeros(shape) for level, shape in shapes.items()}


def map_shapes(images: Sequence[int], channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shape ``(B, channels, H', W')`` of each level for images ``(B, 3, H, W)``."""
    return {
        level: (images[0], channels, *(math.ceil(side / stride) for side in images[-2:]))
        for level, stride in STRIDES.items()
    }


class _Stub(nn.Module):
    """A module with the attributes and parameters of another one."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # nn.Module would register it as a child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Return those of the original."""
        return self.original.named_parameters(*args, **kwargs)


class _StubBackbone(_Stub):
    """A backbone that returns zeros of the right shapes, which a stub head does not use."""

    fpn_strides = STRIDES

    def __init__(self, original: nn.Module, example: object, out_channels: int) -> None:
        super().__init__(original)
        self.example = example
        self.out_channels = out_channels

    def forward(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """Return a feature map (B, C, H, W) per level."""
        images = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        shapes = map_shapes(images.shape, self.out_channels)
        maps = {level: images.new_zeros(shape) for level, shape in shapes.items()}
        return _like(self.example, maps)


class _StubHead(_Stub):
    """A head that returns given predictions."""

    def __init__(
        self, original: nn.Module, predictions: Predictions, feats: Mapping[str, Tensor]
    ) -> None:
        super().__init__(original)
        self.predictions = predictions
        self.feats = feats  # of one small image

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """Return the predictions in the same containers as the original head does."""
        example: object = None
        # Other checks test the original head. Its containers do not depend on the images.
        args = tuple(self.feats if isinstance(x, Mapping) else x for x in args)
        kwargs = {k: self.feats if isinstance(x, Mapping) else x for k, x in kwargs.items()}
        with contextlib.suppress(Exception), torch.no_grad():
            example = self.original(*args, **kwargs)
        parts = example if isinstance(example, (list, tuple)) else ()
        if len(parts) != len(self.predictions):
            return [dict(values) for values in self.predictions]
        outputs = [_like(*pair) for pair in zip(parts, self.predictions, strict=True)]
        if hasattr(example, "_make"):  # a named tuple
            return example._make(outputs)
        return tuple(outputs) if isinstance(example, tuple) else outputs


def _like(example: object, values: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return values in a mapping of the same class as the example; in a dict if that fails."""
    if not isinstance(example, Mapping) or type(example) is dict:
        return dict(values)
    try:
        mapping: Any = copy.copy(example)
        mapping.update(values)
        return mapping
    except Exception:
        return dict(values)
