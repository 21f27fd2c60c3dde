"""The settings of a training run, in groups, and the recipes: named presets of settings.

A group holds keyword arguments of one part of the program, under the names of its parameters::

    FCOS(num_classes, **settings.model.kwargs())
    train_detector(detector, train_loader, **settings.optimization.kwargs())
    TrainingRun(folder, settings.to_dict(), class_names, **settings.run.kwargs())

A setting is named, typed and documented at its field and nowhere else. It is an option of
``fcos train``, is printed when the training starts, and is saved with every checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "RECIPES",
    "SETTINGS",
    "DataSettings",
    "ModelSettings",
    "OptimizationSettings",
    "RunSettings",
    "Setting",
    "Settings",
    "from_recipe",
]


def _setting(
    default: Any,
    help: str,
    *,
    option: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """Return the field of a setting.

    Args:
        default: the assignment's value.
        help: text for ``fcos train --help``.
        option: shorter name for the command line; that of the field unless given.
        at_least: bound of a number, or of each in a list.
        above: the same, exclusive.
        below: the same, exclusive.
    """
    limits = {"at_least": at_least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "option": option, **limits})


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Settings of one part of the program.

    A ``Literal`` has the choices of a setting. They are not taken from the tables of what is
    implemented, since these need PyTorch; a test compares the two.
    """

    def __post_init__(self) -> None:
        """Check every value; raises ValueError for one out of range."""
        for setting in _settings_of(type(self)):
            setting.check(getattr(self, setting.name))

    def kwargs(self) -> dict[str, Any]:
        """Return the settings as keyword arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(_Group):
    """What the detector consists of: arguments of ``FCOS``."""

    backbone: str = _setting("regnet_x_400mf", "torchvision classification network, or timm:NAME")
    weights: str = _setting(
        "default",
        "of the backbone: default (ImageNet), none or a FILE; of a whole detector, whose "
        "architecture is taken over: voc2007 or a FILE",
    )
    fpn_channels: int = _setting(128, "width of the feature pyramid", at_least=1)
    stem_channels: tuple[int, ...] = _setting(
        (128, 128), "channels of the head's convolutions", option="stem", at_least=1
    )
    box_stem_channels: tuple[int, ...] | None = _setting(
        None, "channels of those before the boxes, if others", option="box-stem", at_least=1
    )
    box_loss: Literal["l1", "giou", "diou"] = _setting("l1", "loss of the boxes")
    quality: Literal["centerness", "iou"] = _setting(
        "centerness", "what the class probability is multiplied with"
    )
    assignment: Literal["size", "atss"] = _setting(
        "size", "of locations to boxes: by the size of a box, or adaptively"
    )
    center_radius: float | None = _setting(None, "center sampling, in strides", above=0)
    head_norm: Literal["none", "group", "group_box"] = _setting(
        "none", "normalization in the head, or before its boxes alone"
    )
    head_dropout: float = _setting(
        0.0, "part of the channels dropped before the class logits", at_least=0, below=1
    )
    level_scales: bool = _setting(False, "a learned scale of the boxes for each level")
    frozen_batch_norm: bool = _setting(False, "keep the backbone's batch-norm statistics")
    drop_path_rate: float = _setting(
        0.0, "stochastic depth of a RegNet or timm backbone", at_least=0, below=1
    )
    classes_per_location: int = _setting(1, "a location detects at most this many", at_least=1)

    def kwargs(self) -> dict[str, Any]:
        """Return the settings as keyword arguments of ``FCOS``."""
        weights = {"default": "DEFAULT", "none": None}.get(self.weights, self.weights)
        return {**super().kwargs(), "weights": weights}


@dataclass(frozen=True, kw_only=True)
class DataSettings(_Group):
    """Which images a training step sees, and how they are varied."""

    batch_size: int = _setting(16, "images per step, over all processes", at_least=1)
    image_size: int = _setting(224, "shorter side in pixels", at_least=1)
    image_sizes: tuple[int, ...] = _setting(
        (), "train on batches of these sizes at random", at_least=1
    )
    augment: tuple[Literal["flip", "zoom", "iou_crop", "photometric", "erasing", "mosaic"], ...] = (
        _setting((), "augmentations of the training images")
    )
    mosaic_off_iters: int = _setting(0, "no mosaics in the last N iterations", at_least=0)
    ignore_difficult: bool = _setting(
        False, "difficult objects and crowd regions are not taught as background"
    )
    pixel_edges: bool = _setting(
        False, "VOC's boxes reach from edge to edge of their pixels, as COCO's do"
    )
    seed: int = _setting(
        0, "of the order of the images, their augmentation and the random weights", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings(_Group):
    """How the weights are found: arguments of ``a4_helper.train_detector``."""

    max_iters: int = _setting(9000, "optimizer steps", option="iters", at_least=1)
    optimizer: Literal["sgd", "adamw"] = _setting("sgd", "optimizer")
    learning_rate: float = _setting(8e-3, "learning rate", option="lr", above=0)
    backbone_lr_factor: float = _setting(1.0, "times lr for the backbone's own layers", above=0)
    weight_decay: float = _setting(1e-4, "weight decay", at_least=0)
    decay_all: bool = _setting(True, "weight decay on biases and norms, too")
    schedule: Literal["step", "cosine"] = _setting("step", "/ 10 after 60 and 90 %%, or down to 0")
    warmup_iters: int = _setting(0, "steps in which the learning rate rises", at_least=0)
    max_grad_norm: float | None = _setting(None, "clip gradients at this norm", above=0)
    ema_decay: float | None = _setting(
        None, "evaluate a moving average of the weights; this part of it stays", above=0, below=1
    )
    amp: Literal["auto", "off"] = _setting("off", "bfloat16 or float16 where the processor has it")
    channels_last: bool = _setting(True, "memory layout that most processors are faster with")
    compile: bool = _setting(False, "torch.compile for backbone, pyramid and head")


@dataclass(frozen=True, kw_only=True)
class RunSettings(_Group):
    """What is written and when: arguments of ``TrainingRun``.

    They change no weight, so a run may be resumed with others.
    """

    checkpoint_every: int = _setting(500, "iterations between two checkpoints (500)", at_least=0)
    keep_every: int = _setting(
        0, "keep the checkpoint of every N-th iteration (of none)", at_least=0
    )
    eval_every: int = _setting(1500, "iterations between two evaluations on val (1500)", at_least=0)
    tensorboard: bool = _setting(False, "write the curves for TensorBoard, too")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a training run on given data ends in, up to rounding.

    The defaults are the assignment's. None, where a type allows it, means "without". No two
    settings have the same name, whatever their group.
    """

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    optimization: OptimizationSettings = dataclasses.field(default_factory=OptimizationSettings)
    run: RunSettings = dataclasses.field(default_factory=RunSettings)

    def values(self) -> dict[str, Any]:
        """Return the value of every setting by its name."""
        return {
            name: value
            for _, group in self._groups()
            for name, value in dataclasses.asdict(group).items()
        }

    def replace(self, **changed: Any) -> Settings:
        """Return settings in which those that are given by name have another value.

        Raises:
            ValueError: a name that is no setting, or a value out of range.
        """
        if unknown := sorted(changed.keys() - self.values().keys()):
            raise ValueError(f"unknown settings {', '.join(unknown)}.")
        return Settings(
            **{
                name: dataclasses.replace(
                    group, **{key: value for key, value in changed.items() if hasattr(group, key)}
                )
                for name, group in self._groups()
            }
        )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return the groups as plain numbers, strings and lists, for JSON and checkpoints."""
        return {
            name: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(group).items()
            }
            for name, group in self._groups()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Read what ``to_dict`` returned, in this version or in an earlier one.

        A setting that did not exist then has its default, which is what was done without it.

        Raises:
            ValueError: a group that is missing, a group or setting that does not exist, or a value
                out of range.
        """
        default = cls()
        groups = {}
        names = [name for name, _ in default._groups()]
        _check_names("groups of settings", values, names, required=names)
        for name, group in default._groups():
            _check_names(f"settings in {name!r}", values[name], dataclasses.asdict(group))
            groups[name] = type(group)(
                **{
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in values[name].items()
                }
            )
        return cls(**groups)

    def __str__(self) -> str:
        """List the settings that decide the result; a star marks what is not the assignment's."""
        default, lines = Settings().values(), []
        for name, value in self.values().items():
            if hasattr(self.run, name):
                continue
            star = " " if value == default[name] else "*"
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"{star} {name:20} {text}".rstrip())
        return "\n".join(lines)

    def _groups(self) -> Iterator[tuple[str, Any]]:
        """Yield the name of each group and the group."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)


def _check_names(
    what: str, given: Any, known: Iterable[str], *, required: Iterable[str] = ()
) -> None:
    """Check that something from a file is a dict with these keys."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} are {given!r}; expected a dict of them.")
    found = set(given)
    for fault, names in {"unknown": found - set(known), "missing": set(required) - found}.items():
        if names:
            raise ValueError(
                f"{fault} {what}: {', '.join(sorted(map(str, names)))}; the file comes from "
                "another version of this project."
            )


# --------------------------------------------------------------------------------------------
# Types and ranges of settings
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting as its field describes it.

    Attributes:
        name: of the field.
        option: of the command line, without dashes in front.
        help: one line on what it is.
        default: the assignment's value.
        kind: type of the value, or of each in a list: bool, int, float or str.
        choices: the values to choose from; empty where there are no fixed ones.
        is_list: whether the value is a tuple.
        allows_none: whether None is a value.
        at_least, above, below: bounds of a number, or of each in a list.
    """

    name: str
    option: str
    help: str
    default: Any
    kind: type
    choices: tuple[str, ...]
    is_list: bool
    allows_none: bool
    at_least: float | None
    above: float | None
    below: float | None

    def parse(self, text: str) -> Any:
        """Return the value for what was typed: ``none`` is None, or nothing in a list.

        Raises:
            ValueError: no such value; the message says what was expected.
        """
        if text == "none" and self.allows_none:
            return None
        if not self.is_list:
            return self._parse_one(text)
        parts = [] if text in ("", "none") else text.split(",")
        return tuple(self._parse_one(part) for part in parts)

    def check(self, value: Any) -> None:
        """Check that a value has the right type and range.

        Raises:
            ValueError: it has not; the message says what was expected.
        """
        if value is None and self.allows_none:
            return
        if self.is_list and not isinstance(value, tuple):
            raise ValueError(f"{self.name} is {value!r}; expected a tuple.")
        for part in value if self.is_list else (value,):
            if not self._accepts(part):
                raise ValueError(f"{self.name} is {value!r}; expected {self._expected()}.")

    def _parse_one(self, text: str) -> Any:
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self._accepts(value):
            raise ValueError(f"{self.name} is {text!r}; expected {self._expected()}.")
        return value

    def _accepts(self, value: Any) -> bool:
        """Whether this is a value, or one in a list."""
        allowed = (int, float) if self.kind is float else (self.kind,)
        # True is an int for Python, but no number of images.
        if type(value) not in allowed or (self.choices and value not in self.choices):
            return False
        return self.kind not in (int, float) or (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _expected(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "a word"}
        bounds = {"of at least": self.at_least, "above": self.above, "below": self.below}
        parts = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        return f"{words[self.kind]} {' and '.join(parts)}".rstrip()


def _settings_of(group: type[_Group]) -> tuple[Setting, ...]:
    """Read the fields of a group of settings."""
    hints = typing.get_type_hints(group)
    settings = []
    for field in dataclasses.fields(group):
        kind: Any = hints[field.name]
        allows_none = type(None) in typing.get_args(kind)  # X | None
        if allows_none:
            kind = typing.get_args(kind)[0]
        is_list = typing.get_origin(kind) is tuple  # tuple[X, ...]
        if is_list:
            kind = typing.get_args(kind)[0]
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        metadata = dict(field.metadata)
        option = metadata.pop("option") or field.name.replace("_", "-")
        settings.append(
            Setting(
                name=field.name,
                option=option,
                default=field.default,
                kind=str if choices else kind,
                choices=choices,
                is_list=is_list,
                allows_none=allows_none,
                **metadata,
            )
        )
    return tuple(settings)


# Name of a group -> name of a setting -> its type and range.
SETTINGS: dict[str, dict[str, Setting]] = {
    name: {setting.name: setting for setting in _settings_of(type(group))}
    for name, group in Settings()._groups()
}


# --------------------------------------------------------------------------------------------
# Recipes
# --------------------------------------------------------------------------------------------

RECIPES: dict[str, Settings] = {
    # Exactly the assignment's model and schedule.
    "handout": Settings(),
    # docs/experiments.md has what benchmarks/ablation.py says of each ingredient.
    "strong": Settings(
        model=ModelSettings(
            box_stem_channels=(128, 128, 128, 128),
            head_norm="group_box",
            box_loss="giou",
            drop_path_rate=0.1,
            classes_per_location=3,
        ),
        data=DataSettings(augment=("flip", "zoom", "photometric", "mosaic"), mosaic_off_iters=1500),
        optimization=OptimizationSettings(
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.05,
            schedule="cosine",
            warmup_iters=100,
            amp="auto",
        ),
    ),
    # For the generated set, where a small model learns from random weights in minutes. No square of
    # 128 px can hold an object of p5 (over 8 * 16 px from a location to a side); one of 160 px can.
    "shapes": Settings(
        model=ModelSettings(weights="none", fpn_channels=64, stem_channels=(64, 64)),
        data=DataSettings(image_size=128, image_sizes=(96, 128, 160)),
        optimization=OptimizationSettings(
            max_iters=900,
            optimizer="adamw",
            learning_rate=2e-3,
            schedule="cosine",
            warmup_iters=100,
            max_grad_norm=5.0,
            amp="auto",
        ),
    ),
}


def from_recipe(name: str, **changed: Any) -> Settings:
    """Return a recipe with other values for some settings.

    Another ``image_size`` changes the recipe's ``image_sizes`` with it, in steps of 32 px, the
    coarsest stride: a detector is not good at sizes it was not trained on.

    Raises:
        ValueError: a value out of range.
    """
    recipe = RECIPES[name]
    settings = recipe.replace(**changed)
    side, usual = settings.data.image_size, recipe.data.image_size
    if "image_sizes" in changed or side == usual:
        return settings
    steps = (round((size - usual) * (side / usual) / 32) for size in recipe.data.image_sizes)
    return settings.replace(image_sizes=tuple(dict.fromkeys(side + 32 * step for step in steps)))
