"""The command line: find the command, run it, turn errors and signals into an exit status.

    fcos train                          generate the embedded data set, train, evaluate
    fcos train --data DIR               the same on a folder in VOC layout, or with COCO's JSON
    fcos train --resume                 go on with a training run that was stopped
    torchrun --nproc-per-node N -m fcos train ...    with several GPUs
    fcos eval CHECKPOINT --data DIR     metrics and a report of a trained detector
    fcos predict CHECKPOINT IMAGES... --out DIR      detections in image files
    fcos demo [CHECKPOINT]              a page to drop photos on
    fcos export CHECKPOINT --out FILE   the detector as an ONNX file
    fcos score DIR                      mAP of a folder of text files
    fcos data shapes|voc2007|check DIR  make, download or check a data set
    fcos grade FOLDER...                grade solutions of the assignment

``fcos COMMAND --help`` lists the options. Each command is a module with ``add_options(parser)``,
which sets ``run`` to the function that runs it. They import PyTorch and the like inside of their
functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator

__all__ = ["main"]

# Name of a command -> the module of this package that has it, and what it does.
COMMANDS = {
    "train": ("train", "train a detector and evaluate it"),
    "eval": ("evaluate", "evaluate a trained detector"),
    "predict": ("predict", "detections in image files"),
    "demo": ("demo", "a page to drop photos on"),
    "export": ("export", "write a detector as an ONNX file"),
    "score": ("score", "mAP of a folder of text files"),
    "data": ("data", "make, download or check a data set"),
    "grade": ("grade", "grade solutions of the assignment"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the name of the program; those of this process unless given.

    Returns:
        The exit status: 0, 1 for data with errors or missing points, 2 for wrong input, and 128
        plus the number of a signal that ended the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    try:
        with _sigterm_as_interrupt():
            return args.run(args) or 0
    except Exception as error:
        from eecs598.runtime import RunError, explain

        text = explain(error)
        if text is None:
            if not isinstance(error, (ValueError, OSError, FloatingPointError, RunError)):
                raise  # a fault of the program
            # An error in a process that loads data brings its traceback along as text.
            text = str(error)
            text = text.strip().splitlines()[-1] if "Original Traceback" in text else text
        print(f"fcos: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        # torchrun sends SIGTERM while a process is still giving up because another one failed.
        failure = interrupt.__context__
        if type(failure).__name__ == "RunError":
            print(f"fcos: error: {failure}", file=sys.stderr)
        print("fcos: interrupted", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Build the parser; only the commands that ``argv`` names get their options."""
    parser = argparse.ArgumentParser(
        prog="fcos", description="FCOS, a one-stage object detector: train, evaluate, use, grade."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if name in argv:  # the options of the others would only cost time
            importlib.import_module(f"fcos.{module}").add_options(command)
    return parser


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the block, let SIGTERM end the command in good order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may do this
        yield
        return

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
