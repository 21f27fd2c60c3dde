"""``fcos eval``: evaluate a trained detector; and helpers for ``fcos train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fcos.checkpoint_options import (
    add_backbone_option,
    add_checkpoint,
    add_detection_options,
    add_engine_option,
)
from fcos.options import (
    EVAL_NMS_THRESH,
    EVAL_SCORE_THRESH,
    add_json_option,
    add_machine_options,
    choose_device,
    choose_workers,
    make_empty_folder,
    next_free_folder,
)
from fcos.results import export_text, print_results, write_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from a4_helper import VOC2007DetectionTiny
    from eecs598.deploy import OnnxDetector
    from eecs598.metrics import Evaluation
    from one_stage_detector import FCOS

__all__ = [
    "add_options",
    "evaluate",
    "run",
]


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = (
        "Evaluate a trained detector. The folder of the evaluation gets report.html, "
        "metrics.json and, as text files, the detections and the ground truth."
    )
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument(
        "--data", metavar="DIR", required=True, help="folder in VOC layout, or with COCO's JSON"
    )
    add_backbone_option(parser, "where CHECKPOINT is a plain state dict, which does not name it")
    parser.add_argument("--split", default="val", help="list in ImageSets/Main (val)")
    add_detection_options(parser, EVAL_SCORE_THRESH)
    add_engine_option(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="new folder for results (eval-SPLIT beside CHECKPOINT)"
    )
    parser.add_argument(
        "--compare",
        metavar="DIR",
        help="another evaluation of the same images: the folder with its text files",
    )
    parser.add_argument(
        "--export", metavar="DIR", help="write the text files here instead of into --out"
    )
    parser.add_argument(
        "--difficult",
        choices=("drop", "keep"),
        default="drop",
        help="objects marked difficult in the text files: left out as in the course, or marked, so "
        "that fcos score gives the devkit's mAP (drop)",
    )
    add_json_option(parser, "write the metrics here, too")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate the detector of a checkpoint on a split, and compare it with another evaluation."""
    from a4_helper import VOC2007DetectionTiny
    from eecs598.data import load_index
    from eecs598.metrics import image_names, read_text_format
    from eecs598.report import check_comparable, compare
    from eecs598.runtime import fit_workers, write_json
    from fcos.engine import load_predictor

    device = choose_device(args.device)
    model = load_predictor(
        args.checkpoint,
        backbone=args.backbone,
        data=args.data,
        image_size=args.image_size,
        classes_per_location=args.classes_per_location,
        device=device,
        engine=args.engine,
        amp=args.amp,
        num_images=lambda: len(load_index(args.data, args.split)),
    )
    print(f"{model.engine}, {device}")
    image_size = model.image_size
    dataset = VOC2007DetectionTiny(
        args.data, args.split, image_size=image_size, classes=model.class_names, crop=False
    )
    if args.difficult == "keep" and not all(i.difficult_known for i in dataset.instances):
        raise ValueError(
            f"--difficult keep: the course's index in {args.data} leaves difficult objects out; "
            "add the devkit's Annotations folder, which has them."
        )
    other = None
    if args.compare is not None:
        other = read_text_format(args.compare)
        names = image_names([str(instance.path) for instance in dataset.instances])
        check_comparable(model.class_names, names, other, args.compare)
    beside = Path(args.checkpoint).parent / f"eval-{args.split}"
    out = make_empty_folder(Path(args.out) if args.out else next_free_folder(beside), "--out")
    texts = out if args.export is None else make_empty_folder(Path(args.export), "--export")

    evaluation = evaluate(
        model.detector,
        dataset,
        fit_workers(choose_workers(args.workers), (1, image_size, 2 * image_size)),
        device,
        strides=model.strides,
        score_thresh=args.score_thresh,
        nms_thresh=args.nms_thresh,
        amp=args.amp,
        pixel_edges=model.pixel_edges,
    )
    export_text(evaluation, texts, keep_difficult=args.difficult == "keep")
    comparison = None if other is None else compare(evaluation, other, args.compare)
    facts = {
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
        "split": args.split,
        "image_size": image_size,
        "nms_thresh": args.nms_thresh,
    }
    metrics = write_report(evaluation, out, facts, comparison)
    if args.json is not None:
        write_json(args.json, metrics)
    print_results(metrics, comparison)
    print(f"\n{out / 'report.html'}")


# --------------------------------------------------------------------------------------------
# What other commands use, too
# --------------------------------------------------------------------------------------------


def evaluate(
    detector: FCOS | OnnxDetector,
    dataset: VOC2007DetectionTiny,
    workers: int,
    device: str,
    *,
    strides: Mapping[str, int] | None = None,
    score_thresh: float = EVAL_SCORE_THRESH,
    nms_thresh: float = EVAL_NMS_THRESH,
    amp: str = "off",
    pixel_edges: bool = False,
) -> Evaluation:
    """Run a detector over a data set, without changing it.

    Args:
        detector: in training or in evaluation mode.
        dataset: images that are not augmented.
        workers: number of processes that load images.
        device: to run on.
        strides: of each pyramid level, where the detector does not have them itself.
        score_thresh: detections score above it.
        nms_thresh: IoU above which the lower of two detections of a class is dropped.
        amp: see ``eecs598.training.mixed_precision``.
        pixel_edges: see ``a4_helper.evaluate_detector``.
    """
    import torch

    from a4_helper import evaluate_detector
    from eecs598.training import mixed_precision
    from one_stage_detector import FCOS, fcos_level_ranges

    if strides is None:
        assert isinstance(detector, FCOS)
        strides = detector.backbone.fpn_strides
    autocast, _ = mixed_precision(torch.device(device), amp)
    with autocast:
        return evaluate_detector(
            detector,
            dataset,
            score_thresh,
            nms_thresh,
            levels=fcos_level_ranges(strides),
            pixel_edges=pixel_edges,
            num_workers=workers,
            device=device,
        )
