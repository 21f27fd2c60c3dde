"""``fcos demo``: a page on this machine that detects objects in the photos dropped on it."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from fcos.checkpoint_options import (
    add_checkpoint,
    add_detection_options,
    add_engine_option,
    add_plain_options,
)
from fcos.options import (
    check_value,
    choose_device,
)
from fcos.predict import PICTURE_SCORE_THRESH

__all__ = ["add_options", "run"]

# Photographs that may be shown, where the project was cloned and not only installed.
EXAMPLES = ("cat.jpg", "astronaut.jpg")


def _port(text: str) -> int:
    return check_value(int, text, lambda value: 0 < value < 65536, "a port from 1 to 65535")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = (
        "Open a page to drop, paste or take photos, with sliders for both thresholds. It needs no "
        "network and can be reached from this machine alone. Ctrl-C ends it."
    )
    parser.set_defaults(run=run)
    add_checkpoint(parser, nargs="?", default="voc2007")
    parser.add_argument(
        "--examples", nargs="+", metavar="IMAGE|FOLDER|GLOB", help="images to try it on"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 lets everyone in who reaches this machine (127.0.0.1)",
    )
    parser.add_argument(
        "--port", type=_port, metavar="N", help="to listen on (the first free one from 7860)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add_detection_options(parser, PICTURE_SCORE_THRESH)
    add_engine_option(parser)
    add_plain_options(parser)


def run(args: argparse.Namespace) -> None:
    """Show the page until a signal ends it."""
    import torch

    from common import class_spec_nms
    from eecs598.data import find_images
    from eecs598.deploy import launch_demo
    from eecs598.training import mixed_precision
    from fcos.engine import load_predictor

    examples = _own_examples() if args.examples is None else find_images(args.examples)
    device = choose_device(args.device)
    predictor = load_predictor(
        args.checkpoint,
        backbone=args.backbone,
        data=args.data,
        classes=args.classes,
        image_size=args.image_size,
        classes_per_location=args.classes_per_location,
        device=device,
        engine=args.engine,
        amp=args.amp,
        num_images=0,  # too few to export for; an earlier export is used
    )

    def predict(
        images: torch.Tensor, score_thresh: float, nms_thresh: float
    ) -> list[dict[str, torch.Tensor]]:
        autocast, _ = mixed_precision(torch.device(device), args.amp)
        with autocast:  # which holds for one thread, and every photo may have another one
            return predictor(images, score_thresh, nms_thresh)

    page = launch_demo(
        predict,
        class_spec_nms,
        predictor.class_names,
        image_size=predictor.image_size,
        score_thresh=args.score_thresh,
        nms_thresh=args.nms_thresh,
        device=device,
        title=Path(args.checkpoint).stem,
        examples=examples,
        host=args.host,
        port=args.port,
        inline=False,
        open_browser=args.open,
    )
    try:
        print(f"{predictor.engine}, {device}: {page.local_url} (Ctrl-C ends it)", flush=True)
        wait_for_signal()
    finally:
        page.close()


def wait_for_signal() -> None:
    """Wait until Ctrl-C or SIGTERM raises KeyboardInterrupt."""
    threading.Event().wait()


def _own_examples() -> list[Path]:
    folder = Path(__file__).resolve().parents[1] / "docs"
    return [folder / name for name in EXAMPLES if (folder / name).is_file()]
