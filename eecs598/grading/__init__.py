"""Grading of other people's solutions of the assignment: checks, points, a sandbox."""

from eecs598.grading.checks.registry import CHECKS, labels_of, run_checks
from eecs598.grading.result import CheckResult, ProbeResult
from eecs598.grading.submission import Submission

__all__ = ["CHECKS", "CheckResult", "ProbeResult", "Submission", "labels_of", "run_checks"]
