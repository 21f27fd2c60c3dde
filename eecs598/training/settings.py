"""The settings of a training, and the recipes: settings that are known to go well together.

Every field of ``Settings`` is an option of ``fcos train`` under the same name, is printed when the
training starts and is saved with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["AUGMENTATIONS", "RECIPES", "Settings", "from_recipe", "parse_setting"]

AUGMENTATIONS = ("flip", "zoom", "iou_crop", "photometric", "mosaic")


def _setting(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
) -> Any:
    limits = {"choices": choices, "at_least": at_least, "above": above}
    return dataclasses.field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a training on given data ends in, up to rounding.

    The defaults are the assignment's. Where a type allows None, None is "without".
    """

    iters: int = _setting(9000, "optimizer steps", at_least=1)
    batch_size: int = _setting(16, "images a step, over all processes", at_least=1)
    image_size: int = _setting(224, "shorter side in pixels", at_least=1)
    seed: int = _setting(0, "of everything", at_least=0)

    backbone: str = _setting("regnet_x_400mf", "torchvision classification network, or timm:NAME")
    weights: str = _setting("default", "of the backbone: default (ImageNet), none or a FILE")
    fpn_channels: int = _setting(128, "width of the feature pyramid", at_least=1)
    stem: tuple[int, ...] = _setting((128, 128), "channels of the head's convolutions", at_least=1)

    optimizer: str = _setting("sgd", "optimizer", choices=("sgd", "adamw"))
    lr: float = _setting(8e-3, "learning rate", above=0)
    pretrained_lr_factor: float = _setting(1.0, "times lr for the backbone's own layers", above=0)
    weight_decay: float = _setting(1e-4, "weight decay", at_least=0)
    schedule: str = _setting(
        "step", "/ 10 after 60 and 90 %%, or down to 0", choices=("step", "cosine")
    )
    warmup_iters: int = _setting(0, "steps in which the learning rate rises", at_least=0)
    max_grad_norm: float | None = _setting(None, "clip gradients at this norm", above=0)
    average_decay: float | None = _setting(
        None, "moving average of the weights, kept part a step", above=0
    )

    box_loss: str = _setting("l1", "loss of the boxes", choices=("l1", "giou"))
    center_radius: float | None = _setting(None, "centre sampling, in strides", above=0)
    head_norm: str = _setting("none", "normalisation in the head", choices=("none", "group"))
    level_scales: bool = _setting(False, "a learned scale of the boxes for each level")
    frozen_batch_norm: bool = _setting(False, "keep the backbone's batch-norm statistics")

    augment: tuple[str, ...] = _setting((), "of the training images", choices=AUGMENTATIONS)
    image_sizes: tuple[int, ...] = _setting(
        (), "train on batches of these sizes at random", at_least=1
    )

    amp: str = _setting(
        "off", "bfloat16 or float16 where the processor has it", choices=("auto", "off")
    )
    channels_last: bool = _setting(True, "memory layout that most processors are faster with")
    compile: bool = _setting(False, "torch.compile for backbone, pyramid and head")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_list = field.type.startswith("tuple")
            if is_list != isinstance(value, tuple) or (value is None and "None" not in field.type):
                raise ValueError(f"{field.name} is {value!r}; expected {field.type}.")
            for part in value if is_list else (value,):
                if part is not None and _check(field, part) != part:
                    raise ValueError(f"{field.name} is {value!r}; expected {field.type}.")
        if self.average_decay is not None and self.average_decay >= 1:
            raise ValueError(
                f"average_decay is {self.average_decay}; expected a number below 1, such as 0.999."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, for JSON and checkpoints."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of ``to_dict``; what is missing has its default.

        Raises:
            ValueError: a name that is no setting.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"unknown settings {', '.join(sorted(unknown))}; the file comes from another "
                "version of this project."
            )
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
        )

    def __str__(self) -> str:
        """One setting a line; a star marks those that differ from the assignment's."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            star = " " if value == field.default else "*"
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"{star} {field.name:20} {text}".rstrip())
        return "\n".join(lines)


def parse_setting(name: str, text: str) -> Any:
    """The value of a setting from what was typed: ``none`` is None, or nothing in a list.

    Raises:
        ValueError: no such value; the message says what was expected.
    """
    field = next(field for field in dataclasses.fields(Settings) if field.name == name)
    if "None" in field.type and text == "none":
        return None
    if field.type.startswith("tuple"):
        parts = [] if text in ("", "none") else text.split(",")
        return tuple(_check(field, part) for part in parts)
    return _check(field, text)


def _check(field: dataclasses.Field, value: Any) -> Any:
    """One value of a setting, or one element of a list, converted from text where needed."""
    kind = next((k for n, k in (("int", int), ("float", float)) if n in field.type), str)
    choices, at_least, above = (field.metadata[k] for k in ("choices", "at_least", "above"))
    expected = {int: "a whole number", float: "a number", str: "a word"}[kind]
    if choices:
        expected = f"one of {', '.join(choices)}"
    elif at_least is not None:
        expected += f" of at least {at_least}"
    elif above is not None:
        expected += f" above {above}"
    try:
        number = value if field.type == "bool" else kind(value)
        good = choices is None or number in choices
        good &= field.type != "bool" or isinstance(value, bool)
        good &= at_least is None or at_least <= number < math.inf
        good &= above is None or above < number < math.inf
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{field.name} is {value!r}; expected {expected}.")
    return number


RECIPES: dict[str, Settings] = {
    # Exactly the assignment's model and schedule.
    "handout": Settings(),
    # RESULTS.md has what benchmarks/ablation.py says of each ingredient.
    "strong": Settings(
        optimizer="adamw",
        lr=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_iters=100,
        box_loss="giou",
        augment=("flip", "zoom"),
        amp="auto",
    ),
    # For the generated set, where a small model learns from random weights in minutes. No square of
    # 128 px can hold an object of p5 (over 8 * 16 px from a location to a side); one of 160 px can.
    "shapes": Settings(
        iters=900,
        image_size=128,
        image_sizes=(96, 128, 160),
        weights="none",
        fpn_channels=64,
        stem=(64, 64),
        optimizer="adamw",
        lr=2e-3,
        schedule="cosine",
        warmup_iters=100,
        max_grad_norm=5.0,
        amp="auto",
    ),
}


def from_recipe(name: str, **changed: Any) -> Settings:
    """A recipe with other values for some settings.

    Another ``image_size`` takes the recipe's ``image_sizes`` along, in steps of 32 px, the coarsest
    stride: a detector is not good at sizes it was not trained on.

    Raises:
        ValueError: a value out of range.
    """
    recipe = RECIPES[name]
    settings = dataclasses.replace(recipe, **changed)
    if "image_sizes" in changed or settings.image_size == recipe.image_size:
        return settings
    side, factor = settings.image_size, settings.image_size / recipe.image_size
    steps = (round((size - recipe.image_size) * factor / 32) for size in recipe.image_sizes)
    sizes = dict.fromkeys(side + 32 * step for step in steps)
    return dataclasses.replace(settings, image_sizes=tuple(sizes))
