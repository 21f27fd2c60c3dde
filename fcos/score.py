"""``fcos score``: mAP of detections that are written as text files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fcos.evaluate import print_metrics
from fcos.options import add_json_option

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "folder", metavar="DIR", help="folder with detection-results/ and ground-truth/"
    )
    add_json_option(parser, "write the metrics as JSON")
    parser.add_argument(
        "--figure", metavar="FILE", help="where to draw the AP of every class (DIR/ap.png)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the metrics of a folder, draw them, and warn of what looks wrong."""
    from eecs598.metrics import find_folder_smells, score_folder

    figure = args.figure if args.figure is not None else Path(args.folder) / "ap.png"
    print_metrics(score_folder(args.folder), json_path=args.json, figure_path=figure)
    for smell in find_folder_smells(args.folder):
        print(f"warning: {smell.message}", file=sys.stderr)
