"""Grade solutions of the assignment: checks, points, and a sandbox to run submissions in."""

from eecs598.grading.archives import Found, find_submissions
from eecs598.grading.checks.registry import CHECKS, labels_of, run_checks
from eecs598.grading.class_report import write_csv, write_pages
from eecs598.grading.reports import (
    Report,
    format_pairs,
    format_table,
    format_text,
    to_dict,
    to_gradescope,
)
from eecs598.grading.result import CheckResult, ProbeResult
from eecs598.grading.rubric import Rubric, load_rubric
from eecs598.grading.sandbox.runner import Graded, Options, grade_folders
from eecs598.grading.similarity import SimilarPair, similar_pairs
from eecs598.grading.submission import Submission

__all__ = [
    "CHECKS",
    "CheckResult",
    "Found",
    "Graded",
    "Options",
    "ProbeResult",
    "Report",
    "Rubric",
    "SimilarPair",
    "Submission",
    "find_submissions",
    "format_pairs",
    "format_table",
    "format_text",
    "grade_folders",
    "labels_of",
    "load_rubric",
    "run_checks",
    "similar_pairs",
    "to_dict",
    "to_gradescope",
    "write_csv",
    "write_pages",
]
