"""The modules under test, and the small detector that several checks use."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from eecs598.grading.answers import Answering
from eecs598.grading.result import Wrong, expect, isolated, once, show

__all__ = ["PARTS", "PUBLIC_NAMES", "Submission", "build", "completed", "evaluating", "training"]

NUM_CLASSES = 3
FPN_CHANNELS = 16

# What the assignment asks for and the checks call, apart from the greetings.
PUBLIC_NAMES = {
    "common": ("DetectorBackboneWithFPN", "get_fpn_location_coords", "nms", "class_spec_nms"),
    "one_stage_detector": (
        "FCOSPredictionNetwork",
        "fcos_match_locations_to_gt",
        "fcos_get_deltas_from_locations",
        "fcos_apply_deltas_to_locations",
        "fcos_make_centerness_targets",
        "FCOS",
    ),
    "a4_helper": ("VOC2007DetectionTiny", "train_detector", "inference_with_detector"),
}
PARTS = tuple(PUBLIC_NAMES)


@dataclass(frozen=True, eq=False)
class Submission:
    """The three imported modules of the assignment.

    Attributes:
        replaced: which of them, or which "module.name" in them, are not the submission's own, and
            why. What they do says nothing about the submission.
        ours: gives our module of a name, to stand in for what is not written yet; without it,
            nothing does.
    """

    common: ModuleType | Answering
    one_stage_detector: ModuleType | Answering
    a4_helper: ModuleType | Answering
    replaced: Mapping[str, str] = field(default_factory=dict)
    ours: Callable[[str], ModuleType] | None = None

    def detector(self) -> nn.Module:
        """A small FCOS of ``NUM_CLASSES`` classes with random weights, a new copy each time."""
        try:
            return copy.deepcopy(self._template())
        except Exception:  # it may hold what can't be copied, such as results of a dummy pass
            return self._build()

    def detector_with(self, **parts: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The same with other modules in place of some of its own, which are not copied.

        Args:
            parts: makes the other module from the detector's own, by the name of the attribute:
                ``backbone`` or ``pred_net``.
        """
        template, others = self._template(), {}
        for name, make in parts.items():
            own = getattr(template, name, None)
            expect(
                isinstance(own, nn.Module),
                f"FCOS: expected a module as the attribute {name}, got {show(own)}",
            )
            others[id(own)] = make(own)
        try:
            return copy.deepcopy(template, others)  # what stands in the memo counts as copied
        except Exception:
            detector = self._build()
            for name, make in parts.items():
                setattr(detector, name, make(getattr(detector, name)))
            return detector

    @cached_property
    def feature_maps(self) -> object:
        """What its backbone gives for a small image; None where it fails."""
        with contextlib.suppress(Exception, SystemExit), isolated(), torch.no_grad():
            return evaluating(self.detector().backbone)(torch.zeros(1, 3, 64, 64))

    @cached_property
    def answering(self) -> Submission:
        """The same for the checks, which get plain values from all functions of its modules."""
        modules = (self.common, self.one_stage_detector, self.a4_helper)
        return Submission(*map(Answering, modules), self.replaced)

    @cached_property
    def _template(self) -> Callable[[], nn.Module]:
        # Built once, because most of the time of a check would go into building backbones.
        return once(self._build)

    def _build(self) -> nn.Module:
        return build(
            self.one_stage_detector.FCOS,
            num_classes=NUM_CLASSES,
            fpn_channels=FPN_CHANNELS,
            stem_channels=[16, 16],
        )

    @cached_property
    def _stand_ins(self) -> list[tuple[str, Any, Any]]:
        """Name, theirs and ours of each function and class that is not written yet."""
        if self.ours is None:
            return []
        return [
            (name, getattr(getattr(self, part), name), getattr(self.ours(part), name))
            for (part, name), trial in _TRIALS.items()
            if _is_unwritten(getattr(getattr(self, part), name, None), trial)
        ]

    @cached_property
    def _completed(self) -> Submission:
        unwritten = {
            f"{part}.{name}": "it is not written yet"
            for part, name in _TRIALS
            if any(name == stand_in for stand_in, _, _ in self._stand_ins)
        }
        modules = (self.common, self.one_stage_detector, self.a4_helper)
        return Submission(*modules, {**self.replaced, **unwritten})


@contextmanager
def completed(submission: Submission) -> Iterator[Submission]:
    """The submission with ours in place of what it has not written, such as ``pass``.

    So what is written is judged without having to wait for the rest. A function that is wrong is
    not replaced: whoever calls it meets its faults.
    """
    stand_ins = submission._stand_ins
    if not stand_ins:
        yield submission
        return
    with ExitStack() as stack:
        for name, theirs, ours in stand_ins:
            for module in (submission.common, submission.one_stage_detector):
                if getattr(module, name, None) is theirs:  # one may have imported it from the other
                    stack.enter_context(mock.patch.object(module, name, ours))
        yield submission._completed


def _try_head(network: type[nn.Module]) -> object:
    return network(2, 4, [4])({"p3": torch.zeros(1, 4, 2, 2)})


_BOX = torch.tensor([[10.0, 10, 40, 40, 2]])
_LOCATION = torch.tensor([[20.0, 20]])
# The smallest use of what other parts of the detector call.
_TRIALS: dict[tuple[str, str], Callable[[Any], object]] = {
    ("common", "DetectorBackboneWithFPN"): lambda cls: evaluating(cls(8))(
        torch.zeros(1, 3, 64, 64)
    ),
    ("common", "get_fpn_location_coords"): lambda f: f({"p3": (1, 8, 2, 2)}, {"p3": 8}),
    ("common", "nms"): lambda f: f(_BOX[:, :4].clone(), torch.ones(1), 0.5),
    ("common", "class_spec_nms"): lambda f: f(_BOX[:, :4].clone(), torch.ones(1), torch.ones(1)),
    ("one_stage_detector", "FCOSPredictionNetwork"): _try_head,
    ("one_stage_detector", "fcos_match_locations_to_gt"): lambda f: f(
        {"p3": _LOCATION.clone()}, {"p3": 8}, _BOX.clone()
    ),
    ("one_stage_detector", "fcos_get_deltas_from_locations"): lambda f: f(
        _LOCATION.clone(), _BOX.clone(), 8
    ),
    ("one_stage_detector", "fcos_apply_deltas_to_locations"): lambda f: f(
        torch.ones(1, 4), _LOCATION.clone(), 8
    ),
    ("one_stage_detector", "fcos_make_centerness_targets"): lambda f: f(torch.ones(1, 4)),
}


def _is_unwritten(function: Any, trial: Callable[[Any], object]) -> bool:
    try:
        with isolated(), torch.no_grad():
            return _holds_nothing(trial(function))
    except NotImplementedError:
        return True
    except (Exception, SystemExit):
        return False  # something is written, and it fails


def _holds_nothing(value: object) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(_holds_nothing(item) for item in value)
    return value is None


def training(model: nn.Module) -> nn.Module:
    """The same module in training mode; its own ``train`` need not return it."""
    model.train()
    return model


def evaluating(model: nn.Module) -> nn.Module:
    """The same module in evaluation mode."""
    model.eval()
    return model


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
