"""The modules under test, and the small detector that several checks use."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

from torch import nn

from eecs598.grading.result import Wrong, isolated

__all__ = ["Submission", "build"]

NUM_CLASSES = 3


@dataclass(frozen=True, eq=False)
class Submission:
    """The three imported modules of the assignment."""

    common: ModuleType
    one_stage_detector: ModuleType
    a4_helper: ModuleType

    def detector(self) -> nn.Module:
        """A small FCOS of ``NUM_CLASSES`` classes with random weights, a new copy each time."""
        return copy.deepcopy(self._detector)

    @cached_property
    def _detector(self) -> nn.Module:
        # Built once, because most of the time of a check would go into building backbones.
        return build(
            self.one_stage_detector.FCOS,
            num_classes=NUM_CLASSES,
            fpn_channels=16,
            stem_channels=[16, 16],
        )


def build(network: type[nn.Module], **settings: object) -> nn.Module:
    """Construct a network, always with the same random weights.

    Where its constructor takes ``weights``, no pretrained ones are looked for.
    """
    if "weights" in inspect.signature(network).parameters:
        settings["weights"] = None
    with isolated():
        model = network(**settings)
    if not isinstance(model, nn.Module):
        raise Wrong(f"{network.__name__} is not a torch.nn.Module")
    return model
