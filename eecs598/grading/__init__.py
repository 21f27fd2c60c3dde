"""The assignment's checks as plain functions.

Each check takes a submission, the three imported modules of the assignment, and returns what
passed and, for what did not, one sentence with an input, what was expected and what came out:

    import a4_helper, common, one_stage_detector
    from eecs598.grading import Submission, run_checks

    for result in run_checks(Submission(common, one_stage_detector, a4_helper)):
        print(result.name, len(result.passed), "passed")
        for sentence in result.failed:
            print("   ", sentence)

The checks run on the CPU, are deterministic, and leave random generators, the working directory
and the streams of the caller as they were. They import no module of the assignment themselves and
call nothing but its public names, so they judge any implementation alike. They run the code of
the submission in this process: isolating it, and limiting its time, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from eecs598.grading.boxes import check_class_spec_nms, check_nms
from eecs598.grading.detector import (
    check_inference,
    check_losses,
    check_sizes_and_dtypes,
    check_training,
)
from eecs598.grading.helper import check_dataset, check_evaluation_export, check_train_detector
from eecs598.grading.locations import check_location_coords, check_location_order
from eecs598.grading.network import check_backbone, check_head, check_hello
from eecs598.grading.result import CheckResult, ProbeResult
from eecs598.grading.submission import Submission
from eecs598.grading.targets import (
    check_box_decoding,
    check_centerness,
    check_deltas,
    check_matching,
)

__all__ = ["CHECKS", "CheckResult", "ProbeResult", "Submission", "run_checks"]

# In the order of the assignment.
CHECKS: dict[str, Callable[[Submission], CheckResult]] = {
    "hello": check_hello,
    "backbone": check_backbone,
    "head": check_head,
    "location_coords": check_location_coords,
    "location_order": check_location_order,
    "matching": check_matching,
    "deltas": check_deltas,
    "box_decoding": check_box_decoding,
    "centerness": check_centerness,
    "losses": check_losses,
    "training": check_training,
    "nms": check_nms,
    "class_spec_nms": check_class_spec_nms,
    "inference": check_inference,
    "sizes_and_dtypes": check_sizes_and_dtypes,
    "dataset": check_dataset,
    "train_detector": check_train_detector,
    "evaluation_export": check_evaluation_export,
}


def run_checks(submission: Submission, names: Iterable[str] | None = None) -> list[CheckResult]:
    """Run checks on a submission.

    Args:
        submission: its modules.
        names: keys of ``CHECKS``; all of them unless given.

    Returns:
        One result a check, in the order of ``CHECKS``.

    Raises:
        ValueError: a name that is not a check. What goes wrong inside a submission is a result.
    """
    wanted = set(CHECKS if names is None else names)
    if unknown := wanted - set(CHECKS):
        raise ValueError(f"there is no check {sorted(unknown)}; the checks are {list(CHECKS)}.")
    return [check(submission) for name, check in CHECKS.items() if name in wanted]
