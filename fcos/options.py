"""Command-line options that several commands share: their types, groups and defaults."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from eecs598.training import Setting

__all__ = [
    "EVAL_NMS_THRESH",
    "EVAL_SCORE_THRESH",
    "add_check_option",
    "add_json_option",
    "add_machine_options",
    "add_settings",
    "check_value",
    "choose_device",
    "choose_workers",
    "given_settings",
    "make_empty_folder",
    "next_free_folder",
    "positive_int",
]

# Average precision is the area under the whole curve, so evaluation keeps detections with low
# scores, too. The assignment's own evaluation uses 0.4.
EVAL_SCORE_THRESH = 0.05
EVAL_NMS_THRESH = 0.6

T = TypeVar("T")


# --------------------------------------------------------------------------------------------
# Types
# --------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    return check_value(int, text, lambda value: value >= 1, "a whole number of at least 1")


def _natural(text: str) -> int:
    return check_value(int, text, lambda value: value >= 0, "a whole number of at least 0")


def _output_file(text: str) -> Path:
    return check_value(Path, text, _is_writable, "a file in a folder that may be written to")


def _is_writable(path: Path) -> bool:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()


def check_value(
    kind: Callable[[str], T], text: str, accepts: Callable[[T], bool], expected: str
) -> T:
    """Convert the text of an option.

    Args:
        kind: converts the text, or raises ValueError.
        text: what was typed.
        accepts: whether a value is in range.
        expected: the values in range, in words for the message.

    Raises:
        argparse.ArgumentTypeError: the text is not what was expected.
    """
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected {expected}")
    return value


# --------------------------------------------------------------------------------------------
# Groups of options
# --------------------------------------------------------------------------------------------


def add_json_option(parser: argparse.ArgumentParser, text: str) -> None:
    """Add ``--json FILE``; ``text`` says what is written there."""
    parser.add_argument("--json", type=_output_file, metavar="FILE", help=text)


def add_check_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-check``."""
    parser.add_argument(
        "--no-check",
        dest="check",
        action="store_false",
        help="start although the data has errors, see fcos data check",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the machine is used, and that change no result."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--workers", type=_natural, metavar="N", help="processes that load data (up to 4)"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting; only those that are given end up among the arguments."""
    from eecs598.training import SETTINGS

    metavars = {int: "N", float: "X", str: "S"}
    for name, settings in SETTINGS.items():
        group = parser.add_argument_group(f"{name} settings", "in place of those of the recipe")
        for setting in settings.values():
            flag, default = f"--{setting.option}", argparse.SUPPRESS
            if setting.kind is bool:
                group.add_argument(
                    flag,
                    dest=setting.name,
                    action=argparse.BooleanOptionalAction,
                    default=default,
                    help=setting.help,
                )
                continue
            group.add_argument(
                flag,
                dest=setting.name,
                type=_parser_of(setting),
                default=default,
                metavar=("," if setting.is_list else "|").join(setting.choices)
                or metavars[setting.kind],
                help=setting.help,
            )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return those settings that were given as options."""
    from eecs598.training import SETTINGS

    names = (name for settings in SETTINGS.values() for name in settings)
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _parser_of(setting: Setting) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return setting.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


# --------------------------------------------------------------------------------------------
# Meaning of the values
# --------------------------------------------------------------------------------------------


def choose_device(name: str) -> str:
    """Return the device, ``"cpu"`` or ``"cuda"``, for the value of ``--device``.

    Raises:
        ValueError: ``"cuda"`` where there is none.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda was given, but PyTorch sees no CUDA GPU; use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def choose_workers(given: int | None) -> int:
    """Return the number of processes that load data, for the value of ``--workers``."""
    return given if given is not None else min(4, os.cpu_count() or 1)


def make_empty_folder(folder: Path, option: str) -> Path:
    """Make a folder for results.

    Args:
        folder: to make, with its parents.
        option: that the user chose it with, for the error message.

    Raises:
        ValueError: it is not empty, or it is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another one with {option}.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def next_free_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist yet."""
    names = itertools.chain([folder], (Path(f"{folder}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())
