"""``fcos data``: make, download or check a data set; and helpers for ``fcos train``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos.options import add_json_option, positive_int

if TYPE_CHECKING:
    from eecs598.data import DataReport, Instance
    from eecs598.training import Settings

__all__ = [
    "add_options",
    "check_before_training",
    "choose_data",
    "describe_contents",
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, which has commands of its own."""
    from eecs598.training import SETTINGS

    kinds = parser.add_subparsers(title="what to do", required=True, metavar="WHAT")
    check = kinds.add_parser("check", help="find what is wrong with a data set before training")
    check.set_defaults(run=_check)
    check.add_argument("folder", metavar="DIR", help="in VOC layout, or with COCO's JSON")
    default = SETTINGS["data"]["image_size"].default
    check.add_argument(
        "--image-size",
        type=positive_int,
        default=default,
        metavar="N",
        help=f"shorter side in training, for objects that are too small ({default})",
    )
    add_json_option(check, "write the report as JSON")
    shapes = kinds.add_parser("shapes", help="draw the generated set")
    shapes.set_defaults(run=_shapes)
    shapes.add_argument("folder", metavar="DIR")
    shapes.add_argument("--train", type=positive_int, default=800, metavar="N", help="(800)")
    shapes.add_argument("--val", type=positive_int, default=200, metavar="N", help="(200)")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    voc2007 = kinds.add_parser("voc2007", help="download PASCAL VOC 2007 train and val")
    voc2007.set_defaults(run=_voc2007)
    voc2007.add_argument("folder", metavar="DIR")


def _check(args: argparse.Namespace) -> int:
    from eecs598.data import format_report
    from eecs598.runtime import write_json

    report = _report(args.folder, args.image_size)
    print(format_report(report))
    if args.json is not None:
        write_json(args.json, report.to_dict())
    return 1 if report.has_errors else 0


def _report(folder: str, image_size: int, **options: Any) -> DataReport:
    """Check a data set for a detector of this command line."""
    from common import STAGE_STRIDES
    from eecs598.data import Level, check_data
    from one_stage_detector import fcos_level_ranges

    ranges = fcos_level_ranges(STAGE_STRIDES)
    levels = [Level(stride, *ranges[stage]) for stage, stride in STAGE_STRIDES.items()]
    return check_data(folder, image_size=image_size, levels=levels, **options)


def _shapes(args: argparse.Namespace) -> None:
    from eecs598.data import write_shapes

    folder = write_shapes(args.folder, num_train=args.train, num_val=args.val, seed=args.seed)
    print(f"{args.train} training and {args.val} validation images in {folder}")


def _voc2007(args: argparse.Namespace) -> None:
    from eecs598.data import download_voc2007

    print(f"PASCAL VOC 2007 in {download_voc2007(args.folder)}")


# --------------------------------------------------------------------------------------------
# For training
# --------------------------------------------------------------------------------------------


def choose_data(args: argparse.Namespace, settings: Settings) -> tuple[str, list[str]]:
    """Return the folder of the data, the generated set without ``--data``, and its class names.

    Raises:
        ValueError: as ``check_before_training``.
    """
    from eecs598.data import class_names

    folder = os.path.abspath(args.data if args.data is not None else _generated_shapes())
    check_before_training(folder, settings, args)
    return folder, class_names(folder)


def _generated_shapes() -> Path:
    """Return the generated set in the user's cache folder, drawn on first use."""
    from eecs598.data import shapes_folder, write_shapes

    folder = shapes_folder()
    print(f"generated data set: {folder}")
    return write_shapes(folder)


def check_before_training(folder: str, settings: Settings, args: argparse.Namespace) -> None:
    """Make the part of ``fcos data check`` that needs no pixels, once for all processes.

    Warnings are printed, and errors, too, with ``--no-check``.

    Raises:
        ValueError: without ``--no-check``, the data has errors.
    """
    from eecs598.data import format_problems
    from eecs598.runtime import is_main_process

    if not is_main_process():
        return
    problems = _report(folder, settings.data.image_size, decode=False).problems
    errors = [problem for problem in problems if problem.level == "error" and args.check]
    if shown := [problem for problem in problems if problem not in errors]:
        print(format_problems(shown), file=sys.stderr)
    if errors:
        raise ValueError(
            f"{folder} is not ready for training.\n{format_problems(errors)}\n`fcos data check "
            f"{folder}` looks at the pixels, too. --no-check starts in spite of this."
        )


def describe_contents(
    data: str | Path, splits: Mapping[str, Sequence[Instance]], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Count the images and objects of each split.

    Args:
        data: folder of the data, for the error message.
        splits: the images and boxes of each split.
        names: class names in the order of their ids.

    Returns:
        For each split the number of ``images``, and of the ``objects`` of each class.

    Raises:
        ValueError: a split without any object, or class names that can't be told apart in a file.
    """
    from eecs598.metrics import check_class_names

    check_class_names(names)
    contents = {}
    for split, instances in splits.items():
        labels = [int(label) for instance in instances for label in instance.ordinary[:, 4]]
        if not labels:
            raise ValueError(
                f"{split} of {data} has no object that counts; `fcos data check {data}` "
                "shows what is there."
            )
        objects = {name: labels.count(i) for i, name in enumerate(names)}
        contents[split] = {"images": len(instances), "objects": objects}
    return contents
