"""A submission's modules, the detectors that checks build from them, and what replaces a part.

What is asked first is asked on the assignment's own ground: square images whose sides 32 divides,
20 classes, 64 channels, float32. ``checks/other_sizes.py`` asks for the rest.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import nn

from eecs598.grading.answers import PlainDataProxy
from eecs598.grading.result import CheckFailure, isolated, once, show

__all__ = [
    "GRADER",
    "OURS",
    "PARTS",
    "PUBLIC_NAMES",
    "OWN_GROUND",
    "THEIRS",
    "Verdict",
    "WORDS",
    "Settings",
    "Submission",
    "build",
    "evaluating",
    "is_unwritten",
    "training",
    "with_ours",
]


class Settings(NamedTuple):
    """The arguments of ``FCOS``."""

    num_classes: int = 20
    fpn_channels: int = 64
    stem_channels: tuple[int, ...] = (64, 64)


OWN_GROUND = Settings()  # those of the assignment's first detector

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

# The functions and classes that others of a detector call, by what results call them.
WORDS = {
    "common.DetectorBackboneWithFPN": "backbone",
    "one_stage_detector.FCOSPredictionNetwork": "prediction network",
    "common.get_fpn_location_coords": "locations",
    "one_stage_detector.fcos_match_locations_to_gt": "matching",
    "one_stage_detector.fcos_get_deltas_from_locations": "deltas",
    "one_stage_detector.fcos_apply_deltas_to_locations": "boxes from deltas",
    "one_stage_detector.fcos_make_centerness_targets": "centerness targets",
    "common.nms": "nms",
    "common.class_spec_nms": "class_spec_nms",
}

# The packages below which the files of the submission and of the reference solution are imported.
THEIRS, OURS = "submission", "ours"

GRADER = "eecs598.grading"  # the package of the grader, whose modules no submission may change


# missing: not written; unusable: it ran out of time, or ended its process.
Verdict = Literal["right", "wrong", "missing", "unusable"]


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
            place of those that are missing or wrong; without it, nothing is replaced.
        verdicts: name as "module.name" -> what its own check said. It grows while checks run.
        written: names of wrong functions that are known to be written. It grows, too.
    """

    common: ModuleType | PlainDataProxy
    one_stage_detector: ModuleType | PlainDataProxy
    a4_helper: ModuleType | PlainDataProxy
    replaced: Mapping[str, str] = field(default_factory=dict)
    ours: Callable[[str], ModuleType] | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)

    def detector(self, settings: Settings = OWN_GROUND) -> nn.Module:
        """Return a new FCOS, always with the same weights."""
        try:
            return copy.deepcopy(self._template(settings))
        except Exception:  # it may hold what can't be copied, such as outputs of a dummy pass
            return self._build(settings)

    def detector_with(
        self, settings: Settings = OWN_GROUND, **parts: Callable[[nn.Module], nn.Module]
    ) -> nn.Module:
        """Return a detector with some of its modules replaced.

        Args:
            settings: of the detector.
            parts: for the name of an attribute, ``backbone`` or ``pred_net``, a function that
                makes the replacement from the detector's own module.
        """
        template, replacements = self._template(settings), {}
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
            detector = self._build(settings)
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

    def _template(self, settings: Settings) -> nn.Module:
        # Built once: most of the time of a check would go into building backbones.
        if settings not in self._templates:
            self._templates[settings] = once(lambda: self._build(settings))
        return self._templates[settings]()

    @cached_property
    def _templates(self) -> dict[Settings, Callable[[], nn.Module]]:
        return {}

    def _build(self, settings: Settings) -> nn.Module:
        return build(
            self.one_stage_detector.FCOS,
            num_classes=settings.num_classes,
            fpn_channels=settings.fpn_channels,
            stem_channels=list(settings.stem_channels),
        )


def is_unwritten(submission: Submission, name: str) -> bool:
    """Whether the smallest call of a function returns None, or containers of nothing but None.

    Args:
        submission: its code is called.
        name: one of ``WORDS``.
    """
    try:
        with isolated(), torch.no_grad():
            return _holds_nothing(_SMALLEST_CALLS[name](_look_up(submission, name)))
    except NotImplementedError:
        return True
    except (Exception, SystemExit):
        return False  # something is written, and it fails


def _look_up(submission: Submission, name: str) -> Any:
    module, _, attribute = name.partition(".")
    return getattr(getattr(submission, module), attribute, None)


@contextmanager
def with_ours(submission: Submission, names: Iterable[str]) -> Iterator[Submission]:
    """Replace functions and classes of a submission by the reference solution's, for the block.

    So a fault costs the points of its own part, and what calls it is judged without it.

    Args:
        submission: it knows the reference solution.
        names: what to replace, as "module.name".
    """
    if submission.ours is None or not names:
        yield submission
        return
    with ExitStack() as stack:
        for name in names:
            own, attribute = _look_up(submission, name), name.partition(".")[2]
            reference = getattr(submission.ours(name.partition(".")[0]), attribute)
            for module in _modules_of(submission):
                if getattr(module, attribute, None) is own:  # others may have imported it
                    stack.enter_context(mock.patch.object(module, attribute, reference))
        words = {name: "judged with ours" for name in names}
        yield Submission(
            submission.common,
            submission.one_stage_detector,
            submission.a4_helper,
            {**submission.replaced, **words},
        )


def _modules_of(submission: Submission) -> list[Any]:
    """Return the modules of a submission, with those that its files import from each other."""
    others = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(f"{THEIRS}.") and isinstance(module, ModuleType)
    ]
    named = (submission.common, submission.one_stage_detector)
    return [*named, *(module for module in others if all(module is not one for one in named))]


def _try_head(network: type[nn.Module]) -> object:
    return network(2, 4, [4])({"p3": torch.zeros(1, 4, 2, 2)})


_BOX = torch.tensor([[10.0, 10, 40, 40, 2]])
_LOCATION = torch.tensor([[20.0, 20]])
# The smallest call of each function and class that other parts of the detector use.
_SMALLEST_CALLS: dict[str, Callable[[Any], object]] = {
    "common.DetectorBackboneWithFPN": lambda cls: evaluating(cls(8))(torch.zeros(1, 3, 64, 64)),
    "common.get_fpn_location_coords": lambda f: f({"p3": (1, 8, 2, 2)}, {"p3": 8}),
    "common.nms": lambda f: f(_BOX[:, :4].clone(), torch.ones(1), 0.5),
    "common.class_spec_nms": lambda f: f(_BOX[:, :4].clone(), torch.ones(1), torch.ones(1)),
    "one_stage_detector.FCOSPredictionNetwork": _try_head,
    "one_stage_detector.fcos_match_locations_to_gt": lambda f: f(
        {"p3": _LOCATION.clone()}, {"p3": 8}, _BOX.clone()
    ),
    "one_stage_detector.fcos_get_deltas_from_locations": lambda f: f(
        _LOCATION.clone(), _BOX.clone(), 8
    ),
    "one_stage_detector.fcos_apply_deltas_to_locations": lambda f: f(
        torch.ones(1, 4), _LOCATION.clone(), 8
    ),
    "one_stage_detector.fcos_make_centerness_targets": lambda f: f(torch.ones(1, 4)),
}


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
