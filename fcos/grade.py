"""``fcos grade``: grade solutions of the assignment."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos.options import add_json_option, check_value, positive_int

if TYPE_CHECKING:
    from eecs598.grading import Rubric

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
        "folders",
        type=_folder_name,
        metavar="FOLDER",
        nargs="+",
        help="a submission, as a folder or zip file, or a course's export of many",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="write a table, too: a row per submission, a column per section",
    )
    parser.add_argument(
        "--html", metavar="DIR", help="write a page per submission, too, and an index"
    )
    parser.add_argument(
        "--explain", action="store_true", help="shorten nothing: whole sentences and inputs"
    )
    parser.add_argument("--format", choices=("text", "json", "gradescope"), default="text")
    add_json_option(parser, "write JSON to a file, too; Gradescope's with that format")
    parser.add_argument(
        "--rubric", metavar="FILE", help="points in TOML, in place of eecs598/grading/rubric.toml"
    )
    parser.add_argument(
        "--timeout",
        type=positive_int,
        default=15,
        metavar="S",
        help="most seconds for loading a submission and for each question; three times that in all "
        "(15)",
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
    from eecs598.grading import load_rubric

    rubric = load_rubric(args.rubric)
    # Others than us can read it where the sandbox runs as another user.
    with tempfile.TemporaryDirectory(prefix="fcos-submissions-") as folder:
        os.chmod(folder, 0o755)
        return _grade(args, rubric, Path(folder))


def _grade(args: argparse.Namespace, rubric: Rubric, work_folder: Path) -> int:
    from eecs598.grading import (
        Graded,
        Options,
        Report,
        find_submissions,
        format_pairs,
        format_table,
        format_text,
        grade_folders,
        similar_pairs,
        to_dict,
        to_gradescope,
        write_csv,
        write_pages,
    )
    from eecs598.runtime import write_json

    found = find_submissions(args.folders, work_folder)
    if args.format == "gradescope" and len(found) > 1:
        raise ValueError(
            f"{len(found)} folders given; --format gradescope is for one. Use --format json."
        )
    options = Options(
        timeout=args.timeout,
        total_timeout=3 * args.timeout,
        jobs=args.jobs,
        memory_mb=args.memory,
        checks=tuple(rubric.checks),
    )
    readable = [one for one in found if one.folder is not None]
    count = 0

    def show_progress(graded: Graded) -> None:
        nonlocal count
        count += 1
        if len(readable) > 1:
            print(f"{count}/{len(readable)} {graded.folder}", file=sys.stderr)

    folders = {str(one.folder): one.name for one in readable}
    ours = Path(__file__).parents[1]
    done = grade_folders(list(folders), ours, options, show_progress, folders)
    results = dict(zip(folders, done, strict=True))
    graded = [
        Graded.failed(one.name, one.error or "") if one.folder is None else results[str(one.folder)]
        for one in found
    ]
    reports = [Report(one, rubric.grade(one.results)) for one in graded]
    pairs = []
    if len(readable) > 1:
        pairs = similar_pairs({results[f].folder: f for f in results})
    if args.format == "gradescope":
        result: Any = to_gradescope(reports[0])
    else:
        result = {
            "submissions": [to_dict(report) for report in reports],
            "similar": [dataclasses.asdict(pair) for pair in pairs],
        }
    if args.json is not None:
        write_json(args.json, result)
    if args.csv is not None:
        write_csv(args.csv, reports)
    if args.html is not None:
        write_pages(args.html, reports, pairs)
    if args.format == "text":
        for report in reports:
            to_look_at = report.graded.findings or report.graded.suspicious
            if len(reports) == 1 or to_look_at or not report.is_full:
                print(f"{format_text(report, args.explain)}\n")
        if pairs:
            print(f"{format_pairs(pairs)}\n")
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
