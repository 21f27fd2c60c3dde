"""``fcos grade``: grade solutions of the assignment."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fcos.options import add_json_option, check_value, positive_int

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description = (
        "Check folders with common.py, one_stage_detector.py and a4_helper.py, each "
        "in confined processes of its own, and say what is wrong. The exit status is 0 when all "
        "have all points, 1 when not, and 2 when a folder or an option could not be used."
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "folders", type=_folder_name, metavar="FOLDER", nargs="+", help="a submission"
    )
    parser.add_argument("--format", choices=("text", "json", "gradescope"), default="text")
    add_json_option(parser, "write JSON to a file, too; Gradescope's with that format")
    parser.add_argument(
        "--rubric", metavar="FILE", help="points in TOML, in place of eecs598/grading/rubric.toml"
    )
    parser.add_argument(
        "--timeout",
        type=positive_int,
        default=60,
        metavar="S",
        help="seconds for loading a submission, and for each check (60)",
    )
    parser.add_argument(
        "--jobs", type=positive_int, metavar="N", help="submissions at a time (one per core)"
    )
    parser.add_argument(
        "--memory",
        type=positive_int,
        default=2048,
        metavar="MB",
        help="what a submission may allocate (2048)",
    )


def _folder_name(text: str) -> str:
    return check_value(str, text, bool, "the name of a folder")


def run(args: argparse.Namespace) -> int:
    """Grade the submissions; return 0 when all have all points, 1 when not, 2 after an error."""
    from eecs598.grading import (
        Graded,
        Options,
        Report,
        format_table,
        format_text,
        grade_folders,
        load_rubric,
        to_dict,
        to_gradescope,
    )
    from eecs598.runtime import write_json

    if args.format == "gradescope" and len(args.folders) > 1:
        raise ValueError(
            f"{len(args.folders)} folders given; --format gradescope is for one. Use --format json."
        )
    rubric = load_rubric(args.rubric)
    options = Options(
        timeout=args.timeout,
        total_timeout=15 * args.timeout,
        jobs=args.jobs,
        memory_mb=args.memory,
        checks=tuple(rubric.checks),
    )
    count = 0

    def show_progress(graded: Graded) -> None:
        nonlocal count
        count += 1
        if len(args.folders) > 1:
            print(f"{count}/{len(args.folders)} {graded.folder}", file=sys.stderr)

    graded = grade_folders(args.folders, Path(__file__).parents[1], options, show_progress)
    reports = [Report(one, rubric.grade(one.results)) for one in graded]
    if args.format == "gradescope":
        result: Any = to_gradescope(reports[0])
    else:
        result = {"submissions": [to_dict(report) for report in reports]}
    if args.json is not None:
        write_json(args.json, result)
    if args.format == "text":
        for report in reports:
            to_look_at = report.graded.findings or report.graded.suspicious
            if len(reports) == 1 or to_look_at or not report.is_full:
                print(f"{format_text(report)}\n")
        if len(reports) > 1:
            print(format_table(reports))
    else:
        print(json.dumps(result, indent=1))
    failed = [one for one in graded if one.error is not None]
    for one in failed:
        print(f"fcos: error: {one.folder} {one.error}", file=sys.stderr)
    if failed:
        return 2
    return 0 if all(report.is_full for report in reports) else 1
