"""``fcos export``: a trained detector as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fcos.checkpoint_options import add_backbone_option
from fcos.options import EVAL_NMS_THRESH

if TYPE_CHECKING:
    from eecs598.deploy import ExportCheck
    from fcos.models import TrainedDetector

__all__ = ["add_options", "export_detector", "run"]

# What `fcos predict` takes, too: detections for people.
SCORE_THRESH = 0.4

# How many of the given images are compared: the largest take seconds each.
MAX_IMAGES = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = (
        "Write a detector as one ONNX graph, from images of any size to boxes, labels and scores. "
        "It is compared with PyTorch before it is written."
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file written by fcos train, or the name of a detector that comes along (voc2007)",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="new .onnx file")
    parser.add_argument(
        "--nms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end with thresholds and NMS (yes), or with the boxes of every location",
    )
    parser.add_argument(
        "--half", action="store_true", help="compute in float16; needs a GPU to check it"
    )
    parser.add_argument(
        "--normalized",
        action="store_true",
        help="the graph takes normalized float32 images, not RGB in uint8",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB",
        default=[],
        help=f"compare on these, too (the first {MAX_IMAGES})",
    )
    plain = parser.add_argument_group("where CHECKPOINT is a plain state dict")
    add_backbone_option(plain)
    plain.add_argument("--classes", metavar="A,B,C", help="in the order of training")


def run(args: argparse.Namespace) -> None:
    """Export the detector of a checkpoint."""
    from eecs598.data import find_images
    from eecs598.deploy import OPSET
    from fcos.models import load_detector

    out = args.out
    if out.suffix != ".onnx":
        raise ValueError(f"--out {out} given; expected a file name that ends in .onnx.")
    if out.exists():
        raise ValueError(f"{out} exists; choose another name with --out.")
    paths = find_images(args.images)[:MAX_IMAGES] if args.images else []
    model = load_detector(args.checkpoint, backbone=args.backbone, classes=args.classes)
    check = export_detector(
        model, out, nms=args.nms, half=args.half, normalized=args.normalized, paths=paths
    )
    print(
        f"{out}: {out.stat().st_size / 1e6:.1f} MB, opset {OPSET}, differs from PyTorch by at most "
        f"{check.boxes:.1g} px and {check.scores:.1g} in scores on {check.images} images"
    )


def export_detector(
    model: TrainedDetector,
    path: Path,
    *,
    nms: bool = True,
    half: bool = False,
    normalized: bool = False,
    paths: list[Path] | None = None,
) -> ExportCheck:
    """Write a detector as an ONNX file.

    Args:
        model: the detector and what is known of it.
        path: of the file.
        nms: apply the thresholds and NMS in the graph.
        half: compute in float16.
        normalized: the graph takes normalized float32 images, not RGB in uint8.
        paths: of images to compare the graph with PyTorch on, besides random ones.

    Returns:
        By how much they differ.

    Raises:
        ValueError: as ``eecs598.deploy.export_onnx``, or an image that can't be read.
    """
    from eecs598.data import read_image, resize_shorter_side, to_pixels
    from eecs598.deploy import OnnxDescription, export_onnx
    from one_stage_detector import FCOSCandidates

    detector, settings, class_names = model
    size = settings.data.image_size
    description = OnnxDescription(
        class_names=class_names,
        image_size=size,
        score_thresh=SCORE_THRESH,
        nms_thresh=EVAL_NMS_THRESH,
        strides=detector.backbone.fpn_strides,
        pixel_edges=settings.data.pixel_edges,
        normalized=normalized,
        nms=nms,
        half=half,
    )
    images = [resize_shorter_side(to_pixels(read_image(each)), size) for each in paths or ()]
    network = FCOSCandidates(detector.eval())
    return export_onnx(network, path, description, detector.post_processor.select, images)
