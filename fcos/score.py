"""``fcos score``: mAP of detections that are written as text files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

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
    from eecs598.metrics import (
        find_folder_diagnostics,
        format_table,
        plot_average_precision,
        score_folder,
    )
    from eecs598.runtime import write_json

    metrics = score_folder(args.folder)
    print(format_table(metrics))
    if args.json is not None:
        write_json(args.json, metrics)
    figure = args.figure if args.figure is not None else Path(args.folder) / "ap.png"
    plot_average_precision(metrics, figure)
    for diagnostic in find_folder_diagnostics(args.folder):
        print(f"warning: {diagnostic.message}", file=sys.stderr)
