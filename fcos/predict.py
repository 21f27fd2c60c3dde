"""``fcos predict``: detections in image files, as pictures and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos.options import (
    EVAL_NMS_THRESH,
    add_backbone_option,
    add_detection_options,
    add_json_option,
    add_machine_options,
    choose_device,
    choose_workers,
    make_empty_folder,
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
        "not be read; it is named and skipped."
    )
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file written by fcos train")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB",
        help="files; folders, without their subfolders; or patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder for the results")
    add_json_option(parser, "the boxes (DIR/predictions.json)")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the detections (yes)",
    )
    add_detection_options(parser, PICTURE_SCORE_THRESH)
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="images per step; those of one size go through the network together (8)",
    )
    plain = parser.add_argument_group(
        "where CHECKPOINT is a plain state dict", "which tells neither backbone nor class names"
    )
    add_backbone_option(plain)
    names = plain.add_mutually_exclusive_group()
    names.add_argument(
        "--classes", metavar="A,B,C", help="in the order of training (for 20: those of VOC)"
    )
    names.add_argument("--data", metavar="DIR", help="the data set that has the classes")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Detect objects in images; return 1 when some could not be read, otherwise 0."""
    from concurrent.futures import Future, ThreadPoolExecutor
    from functools import partial

    import torch
    from tqdm.auto import tqdm

    from eecs598.data import ImageFiles, find_images, read_image
    from eecs598.deploy import detect, picture_names, to_json, write_picture
    from eecs598.runtime import batches_of, fit_workers, make_loader, write_json
    from eecs598.training import mixed_precision
    from fcos.models import load_detector

    paths = find_images(args.images)
    detector, settings, class_names = load_detector(
        args.checkpoint,
        backbone=args.backbone,
        data=args.data,
        classes=args.classes,
        image_size=args.image_size,
    )
    device = choose_device(args.device)
    detector.to(device).eval()
    out = make_empty_folder(Path(args.out), "--out")
    size = settings.data.image_size
    workers = fit_workers(choose_workers(args.workers), (args.batch_size, size, 2 * size))
    loader = make_loader(
        ImageFiles(paths, size), workers, batch_size=args.batch_size, collate_fn=list
    )
    predict = partial(detector.predict, score_thresh=args.score_thresh, nms_thresh=args.nms_thresh)
    autocast, _ = mixed_precision(torch.device(device), args.amp)

    def draw(path: Path, detections: dict[str, Any], name: str) -> None:
        # Read again: originals of any size would fill the memory on their way here.
        write_picture(read_image(path), detections, class_names, out / name)

    images: list[dict[str, Any]] = []
    skipped: list[dict[str, str | None]] = []
    pictures: list[Future[None]] = []
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(max(1, workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.enter_context(autocast)
        bar = stack.enter_context(tqdm(total=len(paths), desc="detection", disable=None))
        found = detect(predict, stack.enter_context(batches_of(loader)), device)
        for name, (image, detections) in zip(picture_names(paths), found, strict=True):
            bar.update()
            if detections is None:
                bar.write(f"fcos: skipped {image.error}", file=sys.stderr)
                skipped.append({"path": str(image.path), "error": image.error})
                continue
            images.append(to_json(image, detections, class_names))
            if args.pictures:
                images[-1]["picture"] = name
                pictures.append(pool.submit(draw, image.path, detections, name))
        write_json(
            args.json if args.json is not None else out / "predictions.json",
            {
                "checkpoint": str(args.checkpoint),
                "classes": class_names,
                "image_size": settings.data.image_size,
                "score_thresh": args.score_thresh,
                "nms_thresh": args.nms_thresh,
                "images": images,
                "skipped": skipped,
            },
        )
        for picture in pictures:
            picture.result()
    count = sum(len(image["detections"]) for image in images)
    seconds = time.perf_counter() - start
    print(f"{count} detections in {len(images)} images, {seconds:.1f} s: {out}")
    if skipped:
        print(f"fcos: {len(skipped)} of {len(paths)} images skipped", file=sys.stderr)
    return 1 if skipped else 0


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
