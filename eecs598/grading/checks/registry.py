"""List and run the checks of the assignment.

Each check is a function that takes a submission, the three imported modules of the assignment, and
returns the result of its probes. A failed probe says in one sentence what the input was, what was
expected and what came out:

    import a4_helper, common, one_stage_detector
    from eecs598.grading import Submission, run_checks

    for result in run_checks(Submission(common, one_stage_detector, a4_helper)):
        print(result.name, len(result.passed), "passed")
        for sentence in result.failed:
            print("   ", sentence)

The checks run on the CPU, are deterministic, and leave random generators, the working directory
and the output streams of the caller unchanged. They import no module of the assignment and call
only its public names, so they judge all implementations alike. They run the code of the submission
in this process; ``eecs598.grading.sandbox`` isolates it and limits its time.

To add a check:

1. Write ``check_x(submission)`` in the file of its part; it begins with ``CheckResult("x")`` and
   has at least three probes. Every probe is made whatever fails, since ``labels_of`` learns the
   labels from an empty submission.
2. Add it to ``_CHECKS_AND_NAMES`` below, with the names that it tests, in the order of the
   assignment; and to ``_CALLED_BY`` if what it tests calls other parts.
3. Give it points in ``rubric.toml``; all of them add up to 100, so another section gets fewer. A
   check that is not in that file is named in ``tests/grading/test_rubric.py`` (``unlisted``) and in
   ``docs/grading-yourself.md``.
4. Add a mutant, a wrong solution that it catches, to the tests of its file in
   ``tests/grading/checks``, and the check to ``HELPER_CHECKS`` or ``COMMON_ONLY`` in ``mutants.py``
   if it belongs to ``a4_helper`` or to ``common`` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from types import ModuleType

from eecs598.grading.checks.a4_helper import (
    check_dataset,
    check_evaluation_export,
    check_train_detector,
)
from eecs598.grading.checks.detector import check_inference
from eecs598.grading.checks.locations import check_location_coords, check_location_order
from eecs598.grading.checks.losses import check_losses, check_training
from eecs598.grading.checks.network import check_backbone, check_head, check_hello
from eecs598.grading.checks.nms import check_class_spec_nms, check_nms
from eecs598.grading.checks.other_sizes import check_other_sizes
from eecs598.grading.checks.targets import (
    check_box_decoding,
    check_centerness,
    check_deltas,
    check_matching,
)
from eecs598.grading.result import CheckFailure, CheckResult, trial
from eecs598.grading.submission import (
    PARTS,
    WORDS,
    Submission,
    Verdict,
    is_unwritten,
    with_ours,
)

__all__ = ["CHECKS", "CHECK_OF", "labels_of", "run_checks", "verdict_on"]

Check = Callable[[Submission], CheckResult]


def _with_required_names(check: Check, *names: str) -> Check:
    """Make a check that fails with one sentence if a name that it tests does not exist.

    Args:
        check: the check.
        names: the names that it tests, as "module.name".
    """

    @wraps(check)
    def run(submission: Submission) -> CheckResult:
        result = CheckResult(_name(check))
        for module, _, attribute in (name.partition(".") for name in names):
            replaced = submission.replaced
            reason = replaced.get(module) or replaced.get(f"{module}.{attribute}")
            if reason is None and not hasattr(getattr(submission, module), attribute):
                reason = f"{module}.py does not define it"
            if reason is not None:
                with result.probe(f"{module}.py"):
                    raise CheckFailure(f"expected {attribute}, got nothing: {reason}")
        if not result.probes:
            names_of_ours = _choose_ours(check, submission)
            with with_ours(submission, names_of_ours) as complete:
                result = check(complete.plain_proxy)
            result.with_ours = [WORDS[name] for name in names_of_ours]
        if len(names) == 1:
            submission.verdicts[names[0]] = verdict_on(result)
        return result

    return run


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def verdict_on(result: CheckResult) -> Verdict:
    """Say whether later checks may rely on the function that a check tests."""
    if result.ok:
        return "right"
    return "unusable" if any(probe.ran_out_of_time for probe in result.probes) else "wrong"


# --------------------------------------------------------------------------------------------
# Parts of the reference solution in place of broken ones
# --------------------------------------------------------------------------------------------

_TARGETS = (
    "common.get_fpn_location_coords",
    "one_stage_detector.fcos_match_locations_to_gt",
    "one_stage_detector.fcos_get_deltas_from_locations",
    "one_stage_detector.fcos_make_centerness_targets",
)
_NETWORK = ("common.DetectorBackboneWithFPN", "one_stage_detector.FCOSPredictionNetwork")

# What the subject of a check calls, and is judged without if it is broken.
_CALLED_BY: dict[Check, tuple[str, ...]] = {
    check_losses: _TARGETS,
    check_training: (*_NETWORK, *_TARGETS),
    check_class_spec_nms: ("common.nms",),
    check_inference: (
        "common.get_fpn_location_coords",
        "one_stage_detector.fcos_apply_deltas_to_locations",
        "common.nms",
        "common.class_spec_nms",
    ),
    check_other_sizes: tuple(WORDS),
}


def _choose_ours(check: Check, submission: Submission) -> list[str]:
    """Return the parts, as "module.name", that a check is to use the reference solution's of.

    A part that can't be used is always replaced. One that is wrong on some input is replaced if
    more probes pass then: a submission may well make up for it elsewhere.
    """
    if submission.ours is None:
        return []
    verdicts = {name: _verdict(submission, name) for name in _CALLED_BY.get(check, ())}
    if check is check_class_spec_nms and verdicts["common.nms"] == "missing":
        return []  # it was handed out; only together with an nms it is a solution
    broken = [name for name, verdict in verdicts.items() if verdict != "right"]
    unusable = [name for name in broken if verdicts[name] != "wrong"]
    if len(unusable) == len(broken):
        return unusable
    with trial():
        passed = []
        for names in (unusable, broken):
            with with_ours(submission, names) as complete:
                result = check(complete.plain_proxy)
            passed.append(len(result.passed))
            if result.ok:
                break
    return broken if len(passed) == 2 and passed[1] > passed[0] else unusable


def _verdict(submission: Submission, name: str) -> Verdict:
    """Return what the check of a part says, which is run if it was not."""
    verdicts = submission.verdicts
    if name not in verdicts:
        with trial():
            CHECKS[CHECK_OF[name]](submission)
    if verdicts[name] == "wrong" and name not in submission.written:
        answer = []
        with trial(), CheckResult("smallest call").probe(name):
            answer.append(is_unwritten(submission, name))
        if name in submission.replaced or answer != [False]:
            verdicts[name] = "missing"
        else:
            submission.written.add(name)
    return verdicts[name]


# --------------------------------------------------------------------------------------------
# Table
# --------------------------------------------------------------------------------------------

# Each check and the names that it tests, in the order of the assignment.
_CHECKS_AND_NAMES: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (check_hello, ()),
    (check_backbone, ("common.DetectorBackboneWithFPN",)),
    (check_head, ("one_stage_detector.FCOSPredictionNetwork",)),
    (check_location_coords, ("common.get_fpn_location_coords",)),
    (
        check_location_order,
        ("one_stage_detector.FCOSPredictionNetwork", "common.get_fpn_location_coords"),
    ),
    (check_matching, ("one_stage_detector.fcos_match_locations_to_gt",)),
    (check_deltas, ("one_stage_detector.fcos_get_deltas_from_locations",)),
    (check_box_decoding, ("one_stage_detector.fcos_apply_deltas_to_locations",)),
    (check_centerness, ("one_stage_detector.fcos_make_centerness_targets",)),
    (check_losses, ("one_stage_detector.FCOS",)),
    (check_training, ("one_stage_detector.FCOS",)),
    (check_nms, ("common.nms",)),
    (check_class_spec_nms, ("common.class_spec_nms",)),
    (check_inference, ("one_stage_detector.FCOS",)),
    (check_other_sizes, ("one_stage_detector.FCOS",)),
    (check_dataset, ("a4_helper.VOC2007DetectionTiny",)),
    (check_train_detector, ("a4_helper.train_detector",)),
    (check_evaluation_export, ("a4_helper.inference_with_detector",)),
)
CHECKS: dict[str, Check] = {
    _name(check): _with_required_names(check, *names) for check, names in _CHECKS_AND_NAMES
}
# The check of each part that others call.
CHECK_OF = {
    names[0]: _name(check)
    for check, names in _CHECKS_AND_NAMES
    if len(names) == 1 and names[0] in WORDS
}


@cache
def labels_of(name: str) -> tuple[str, ...]:
    """Return the labels of a check's probes, which are the same for every submission."""
    common, one_stage_detector, a4_helper = (ModuleType(part) for part in PARTS)
    nothing = Submission(common, one_stage_detector, a4_helper).plain_proxy
    return tuple(probe.label for probe in inspect.unwrap(CHECKS[name])(nothing).probes)


def run_checks(submission: Submission, names: Iterable[str] | None = None) -> list[CheckResult]:
    """Run checks on a submission.

    Args:
        submission: its modules.
        names: keys of ``CHECKS``; all of them unless given.

    Returns:
        One result per check, in the order of ``CHECKS``. Errors that a submission raises are part
        of the results.

    Raises:
        ValueError: a name is not a check.
    """
    wanted = set(CHECKS if names is None else names)
    if unknown := wanted - set(CHECKS):
        raise ValueError(f"there is no check {sorted(unknown)}; the checks are {list(CHECKS)}.")
    return [check(submission) for name, check in CHECKS.items() if name in wanted]
