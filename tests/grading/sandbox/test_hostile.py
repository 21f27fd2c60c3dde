"""Submissions that attack the grader, the machine or each other do no harm and gain no points."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

from eecs598.grading.sandbox import isolation, worker
from eecs598.grading.sandbox.runner import Graded, Options, grade_folders
from tests.grading.sandbox.attacks import (
    ATTACKS,
    REPOSITORY,
    Attack,
    attacked,
    temporary_folder,
    working_folders,
    write_submission,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

# Fast checks of two modules: attacks in common.py must not cost points for the other module.
OPTIONS = Options(
    timeout=3,
    total_timeout=60,
    jobs=2,
    memory_mb=600,
    disk_mb=20,
    checks=("deltas", "nms", "class_spec_nms"),
    findings=False,
)


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> dict[str, Graded]:
    """Results of all attacks, graded beside each other and a right submission."""
    honest = {
        f"honest {attack.honest}": Attack(in_nms=f"return {attack.honest}")
        for attack in ATTACKS.values()
        if attack.honest
    }
    everything = {"right": Attack(), **ATTACKS, **honest}
    with attacked(tmp_path_factory.mktemp("outside"), everything.values()) as folders:
        results = grade_folders(folders, REPOSITORY, OPTIONS)
    return dict(zip(everything, results, strict=True))


def failures(graded: Graded) -> dict[str, list[str]]:
    return {result.name: result.failed for result in graded.results if result.failed}


def passed(graded: Graded) -> set[tuple[str, str]]:
    return {(result.name, label) for result in graded.results for label in result.passed}


def test_the_right_submission_has_no_failures(graded):
    assert failures(graded["right"]) == {}
    assert [result.name for result in graded["right"].results] == list(OPTIONS.checks)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_do_no_harm_and_gain_nothing(graded, name):
    attack, result = ATTACKS[name], graded[name]
    assert result.error is None
    assert [check.name for check in result.results] == list(OPTIONS.checks)
    failed = failures(result)
    assert "attack: " in result.output
    assert attack.says in result.output
    assert "the secret" not in result.output
    if attack.fails is None:
        assert failed == {}
    else:
        # The check of class_spec_nms may call nms; the one of the other module does not.
        assert "deltas" not in failed
        assert attack.fails in " ".join(failed["nms"])
    if attack.honest:
        assert passed(result) <= passed(graded[f"honest {attack.honest}"])


def test_everything_is_confined_here(graded):
    assert set(graded["right"].protections) >= set(isolation.LAYERS) - {"user"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_root_becomes_another_user_where_that_one_can_read_enough(monkeypatch, mode):
    # This environment may lie where others can't read, so what is needed is imported before.
    importlib.import_module("a4_helper")
    system = [path for path in isolation._system_paths() if isolation._is_open_to_all(path)]
    monkeypatch.setattr(isolation, "_system_paths", lambda: system)
    monkeypatch.setattr(worker, "_readable", lambda job: [job.folder, job.fallback])
    attack = Attack(at_import="_os.write(1, str(_os.getuid()).encode())")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        ours = write_submission(Path(folder, "ours"), Attack())
        theirs = write_submission(Path(folder, "theirs", "A4"), attack).parent
        (theirs / "A4").chmod(mode)
        (graded,) = grade_folders([theirs], ours, OPTIONS)
    assert failures(graded) == {}
    is_other = mode == 0o755
    assert ("user" in graded.protections) == is_other
    assert ("attack: 6" in graded.output) == is_other


def test_daemons_end_with_the_grading_even_where_processes_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "_filter_system_calls", lambda libc: set())
    folder = write_submission(
        tmp_path / "daemon",
        Attack(
            at_import="""
if _os.fork() == 0:
    _os.setsid()
    if _os.fork():
        _os._exit(0)
    while True:
        time.sleep(60)
_os.wait()
_os.write(1, b"daemon started ")
"""
        ),
    )
    before = isolation.children()
    with temporary_folder() as temporary:
        (graded,) = grade_folders([folder], REPOSITORY, OPTIONS)
        assert working_folders(temporary) == []
    assert "processes" not in graded.protections
    assert "daemon started" in graded.output
    assert failures(graded) == {}
    assert isolation.children() == before
