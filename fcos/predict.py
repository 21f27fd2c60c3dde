"""``fcos predict``: detections in image files, as pictures and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fcos.checkpoint_options import (
    add_checkpoint,
    add_detection_options,
    add_engine_option,
    add_plain_options,
)
from fcos.options import (
    EVAL_NMS_THRESH,
    add_json_option,
    add_machine_options,
    choose_device,
    positive_int,
)

if TYPE_CHECKING:
    from a4_helper import VOC2007DetectionTiny
    from one_stage_detector import FCOS

__all__ = ["add_options", "draw_examples", "run"]

# Pictures are for people: only what the detector is confident of.
PICTURE_SCORE_THRESH = 0.4

EXAMPLES = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = (
        "Detect objects in image files: a picture of each with its boxes, and all "
        "boxes in pixels of the original files as JSON. The exit status is 1 when a file could "
        "not be read; it is named and skipped. torchrun shares the images out among processes: "
        "torchrun --nproc-per-node N -m fcos predict ..."
    )
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB",
        help="files; folders, without their subfolders; or patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder for the results")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the prediction in --out that was stopped"
    )
    add_json_option(parser, "the boxes (DIR/predictions.json)")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the detections (yes)",
    )
    add_detection_options(parser, PICTURE_SCORE_THRESH)
    add_engine_option(parser)
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="images per step; those of one size go through the network together (8)",
    )
    add_plain_options(parser)
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Detect objects in this process, or in this one and those that torchrun started beside it."""
    from datetime import timedelta

    from eecs598.deploy import Journal
    from eecs598.runtime import (
        folder_lock,
        gather,
        is_main_process,
        num_processes,
        process_group,
        rank,
    )
    from fcos.prediction import Prediction, result_file

    with contextlib.ExitStack() as stack:
        # A process may wait long for the others, whose images may be larger.
        device = stack.enter_context(
            process_group(choose_device(args.device), timeout=timedelta(days=7))
        )
        if not is_main_process():
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w")))
            )
        # With --json, a file of that name may be of another prediction.
        is_stopped = Journal(Path(args.out), 0).exists
        if args.resume and not is_stopped and result_file(args).is_file():
            print(f"{result_file(args)} is complete already")
            return 0
        prediction = Prediction(args, device)
        out = prediction.journal.folder
        if is_main_process():
            if args.resume and prediction.journal.exists:
                stack.enter_context(folder_lock(out))
                prediction.go_on()
            else:
                prediction.begin()
                stack.enter_context(folder_lock(out))
        gather(None)  # the others wait until the folder is there
        todo = prediction.journal.read()
        gather(None)  # all have read before one writes
        start = time.perf_counter()
        try:
            prediction.detect([int(i) for i in todo[rank() :: num_processes()]], rank())
        except KeyboardInterrupt:
            print("fcos: the same command with --resume goes on from here", file=sys.stderr)
            raise
        gather(None)
        if not is_main_process():
            return 0
        totals = prediction.finish()
        seconds = time.perf_counter() - start
        print(
            f"{totals.detections} detections in {totals.images} images, {seconds:.1f} s, "
            f"{prediction.predictor.engine}: {out}"
        )
    if totals.skipped:
        count = totals.images + totals.skipped
        print(f"fcos: {totals.skipped} of {count} images skipped", file=sys.stderr)
    return 1 if totals.skipped else 0


def draw_examples(detector: FCOS, dataset: VOC2007DetectionTiny, path: Path, device: str) -> None:
    """Draw detections on a few images, spread evenly over a data set, into one picture."""
    from torch.utils.data import DataLoader, Subset

    from a4_helper import iterate_detections, prediction_rows, target_rows
    from eecs598.utils import contact_sheet

    count = min(EXAMPLES, len(dataset))
    chosen = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    pictures = [
        (image, target_rows(target), prediction_rows(prediction))
        for _, image, prediction, target in iterate_detections(
            detector, DataLoader(chosen), PICTURE_SCORE_THRESH, EVAL_NMS_THRESH, device=device
        )
    ]
    contact_sheet(pictures, dataset.idx_to_class, path)
