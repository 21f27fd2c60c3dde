"""A submission's modules, and the small detector that several checks build from them."""

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

from eecs598.grading.answers import PlainDataProxy
from eecs598.grading.result import CheckFailure, isolated, once, show

__all__ = [
    "GRADER",
    "PARTS",
    "PUBLIC_NAMES",
    "Submission",
    "build",
    "completed",
    "evaluating",
    "training",
]

NUM_CLASSES = 3
FPN_CHANNELS = 16

# The names that the assignment asks for and the checks use, apart from the greetings.
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

GRADER = "eecs598.grading"  # the package of the grader, whose modules no submission may change


@dataclass(frozen=True, eq=False)
class Submission:
    """The three imported modules of the assignment.

    Attributes:
        common: ``common.py``.
        one_stage_detector: ``one_stage_detector.py``.
        a4_helper: ``a4_helper.py``.
        replaced: the modules, or names in modules as "module.name", that are not the submission's
            own, each with the reason. Their behavior says nothing about the submission.
        ours: a function that returns the reference module of a name. Its functions are used in
            place of those that are not written yet; without it, nothing is replaced.
    """

    common: ModuleType | PlainDataProxy
    one_stage_detector: ModuleType | PlainDataProxy
    a4_helper: ModuleType | PlainDataProxy
    replaced: Mapping[str, str] = field(default_factory=dict)
    ours: Callable[[str], ModuleType] | None = None

    def detector(self) -> nn.Module:
        """Return a new small FCOS of ``NUM_CLASSES`` classes, always with the same weights."""
        try:
            return copy.deepcopy(self._template())
        except Exception:  # it may hold what can't be copied, such as outputs of a dummy pass
            return self._build()

    def detector_with(self, **parts: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Return the small detector with some of its modules replaced.

        Args:
            parts: for the name of an attribute, ``backbone`` or ``pred_net``, a function that
                makes the replacement from the detector's own module.
        """
        template, replacements = self._template(), {}
        for name, make in parts.items():
            own = getattr(template, name, None)
            if not isinstance(own, nn.Module):
                raise CheckFailure(
                    f"FCOS: expected a module as the attribute {name}, got {show(own)}"
                )
            replacements[id(own)] = make(own)
        try:
            return copy.deepcopy(template, replacements)  # its memo: these count as copied already
        except Exception:
            detector = self._build()
            for name, make in parts.items():
                setattr(detector, name, make(getattr(detector, name)))
            return detector

    @cached_property
    def feature_maps(self) -> object:
        """Output of the detector's backbone for a small image; None if it fails."""
        with contextlib.suppress(Exception, SystemExit), isolated(), torch.no_grad():
            backbone: Any = self.detector().backbone
            return evaluating(backbone)(torch.zeros(1, 3, 64, 64))
        return None

    @cached_property
    def plain_proxy(self) -> Submission:
        """The same submission with modules whose functions return plain data, for the checks."""
        return Submission(
            PlainDataProxy(self.common),
            PlainDataProxy(self.one_stage_detector),
            PlainDataProxy(self.a4_helper),
            self.replaced,
        )

    @cached_property
    def _template(self) -> Callable[[], nn.Module]:
        # Built once: most of the time of a check would go into building backbones.
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
        """Name, own object and reference object of each function and class not written yet."""
        if self.ours is None:
            return []
        return [
            (name, getattr(getattr(self, part), name), getattr(self.ours(part), name))
            for (part, name), call in _SMALLEST_CALLS.items()
            if _is_unwritten(getattr(getattr(self, part), name, None), call)
        ]

    @cached_property
    def _completed(self) -> Submission:
        unwritten = {
            f"{part}.{name}": "it is not written yet"
            for part, name in _SMALLEST_CALLS
            if any(name == stand_in for stand_in, _, _ in self._stand_ins)
        }
        replaced = {**self.replaced, **unwritten}
        return Submission(self.common, self.one_stage_detector, self.a4_helper, replaced)


@contextmanager
def completed(submission: Submission) -> Iterator[Submission]:
    """Replace what a submission has not written yet by the reference solution's, for the block.

    So a part that is written can be judged before the rest is. A function that is wrong is not
    replaced: the parts that call it fail with it.
    """
    stand_ins = submission._stand_ins
    if not stand_ins:
        yield submission
        return
    with ExitStack() as stack:
        for name, own, reference in stand_ins:
            for module in (submission.common, submission.one_stage_detector):
                if getattr(module, name, None) is own:  # one may have imported it from the other
                    stack.enter_context(mock.patch.object(module, name, reference))
        yield submission._completed


def _try_head(network: type[nn.Module]) -> object:
    return network(2, 4, [4])({"p3": torch.zeros(1, 4, 2, 2)})


_BOX = torch.tensor([[10.0, 10, 40, 40, 2]])
_LOCATION = torch.tensor([[20.0, 20]])
# The smallest call of each function and class that other parts of the detector use.
_SMALLEST_CALLS: dict[tuple[str, str], Callable[[Any], object]] = {
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


def _is_unwritten(function: Any, call: Callable[[Any], object]) -> bool:
    """Whether the smallest call returns None, or containers of nothing but None."""
    try:
        with isolated(), torch.no_grad():
            return _holds_nothing(call(function))
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
    """Put a module in training mode and return it, which its own ``train`` may not do."""
    model.train()
    return model


def evaluating(model: nn.Module) -> nn.Module:
    """Put a module in evaluation mode and return it."""
    model.eval()
    return model


def build(network: type[nn.Module], **settings: object) -> nn.Module:
    """Construct a network, always with the same random weights.

    If its constructor takes ``weights``, it is told not to load pretrained ones.

    Raises:
        CheckFailure: what was constructed is not a module.
    """
    if "weights" in inspect.signature(network).parameters:
        settings["weights"] = None
    with isolated():
        model = network(**settings)
    if not isinstance(model, nn.Module):
        raise CheckFailure(f"{network.__name__} is not a torch.nn.Module")
    return model
