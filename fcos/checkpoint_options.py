"""Command-line options of the commands that take a trained detector."""

from __future__ import annotations

import argparse
from typing import Any

from fcos.options import EVAL_NMS_THRESH, check_value, positive_int

__all__ = [
    "add_backbone_option",
    "add_checkpoint",
    "add_detection_options",
    "add_engine_option",
    "add_plain_options",
]


def add_checkpoint(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add the argument CHECKPOINT; ``options`` are further ones of ``add_argument``."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file of fcos train or fcos export (.onnx), or the name of a detector that comes "
        "along (voc2007)",
        **options,
    )


def add_detection_options(parser: argparse.ArgumentParser, score_thresh: float) -> None:
    """Add the options that decide what a trained detector finds."""
    from eecs598.training import SETTINGS

    amp = SETTINGS["optimization"]["amp"]
    parser.add_argument(
        "--image-size", type=positive_int, metavar="N", help="another one than in training"
    )
    parser.add_argument(
        "--score-thresh",
        type=_fraction,
        default=score_thresh,
        metavar="X",
        help=f"detections score above it ({score_thresh})",
    )
    parser.add_argument(
        "--nms-thresh",
        type=_fraction,
        default=EVAL_NMS_THRESH,
        metavar="X",
        help=f"IoU above which the lower of two is dropped ({EVAL_NMS_THRESH})",
    )
    parser.add_argument(
        "--classes-per-location",
        type=positive_int,
        metavar="N",
        help="a location detects at most N classes (as in the settings of its training, usually 1)",
    )
    parser.add_argument(
        "--amp",
        choices=amp.choices,
        default=amp.default,
        help="auto: compute in bfloat16 or float16 where that is faster; the last digits of "
        "boxes and scores change (off)",
    )


def add_engine_option(parser: argparse.ArgumentParser) -> None:
    """Add the option of other commands that says what computes detections."""
    parser.add_argument(
        "--engine",
        choices=("auto", "torch", "onnx"),
        default="auto",
        help="onnx: ONNX Runtime, the faster one on a CPU; auto: that, where it is worth it (auto)",
    )


def add_backbone_option(parser: argparse._ActionsContainer, text: str = "") -> None:
    """Add ``--backbone NAME``; ``text`` says when it is needed."""
    from eecs598.training import SETTINGS

    default = SETTINGS["model"]["backbone"].default
    parser.add_argument(
        "--backbone", default=default, metavar="NAME", help=f"{text} ({default})".lstrip()
    )


def add_plain_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say of a plain state dict what it does not tell itself."""
    plain = parser.add_argument_group(
        "where CHECKPOINT is a plain state dict", "which tells neither backbone nor class names"
    )
    add_backbone_option(plain)
    names = plain.add_mutually_exclusive_group()
    names.add_argument(
        "--classes", metavar="A,B,C", help="in the order of training (for 20: those of VOC)"
    )
    names.add_argument("--data", metavar="DIR", help="the data set that has the classes")


def _fraction(text: str) -> float:
    return check_value(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")
