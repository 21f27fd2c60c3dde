"""``fcos grade``: options, formats, exit status; attacks are in tests/grading/sandbox."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eecs598.grading import CheckResult, ProbeResult, labels_of, source
from eecs598.grading.reports import Report, format_table, format_text, to_dict, to_gradescope
from eecs598.grading.result import ENDED
from eecs598.grading.rubric import load_rubric
from eecs598.grading.sandbox import runner
from eecs598.grading.sandbox.runner import Graded, Options, grade_folders
from eecs598.grading.sandbox.tampering import Watch, broken_tools, suspicious_code
from fcos import cli

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("common", "one_stage_detector", "a4_helper")

SMALL_RUBRIC = """
[deltas]
title = "Deltas"
check = "deltas"
points = 4

[centerness]
title = "Centerness"
check = "centerness"
points = 2
"""


@pytest.fixture
def rubric(tmp_path) -> str:
    """A rubric whose checks take no time."""
    file = tmp_path / "rubric.toml"
    file.write_text(SMALL_RUBRIC)
    return str(file)


@pytest.fixture
def submission(tmp_path):
    """Returns a function that writes this repository's files with a change to a folder."""

    def write(name: str = "right", old: str = "", new: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for part in PARTS:
            source = (REPOSITORY / f"{part}.py").read_text(encoding="utf-8")
            (folder / f"{part}.py").write_text(source.replace(old, new) if old else source)
        return folder

    return write


# Of deltas, and of nothing else.
WRONG_SIGN = ("locations - boxes[..., :2], boxes", "boxes[..., :2] - locations, boxes")


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def test_this_repository_has_full_points(capsys, tmp_path):
    file = tmp_path / "out" / "report.json"
    assert cli.main(["grade", str(REPOSITORY), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"{REPOSITORY}: 100 of 100 points" in printed
    (report,) = json.loads(file.read_text())["submissions"]
    assert report["score"] == report["max_score"] == 100
    assert report["error"] is None
    assert all(item["failures"] == [] for item in report["items"])


def test_a_process_that_can_not_be_copied():
    """As after torch.compile: gradients of a fake tensor start the same threads."""
    code = """if True:
        from pathlib import Path
        import torch
        from eecs598.grading.sandbox import runner
        from torch._subclasses import FakeTensorMode
        if __name__ == "__main__":
            assert runner.can_be_copied()
            with FakeTensorMode():
                torch.ones(3, requires_grad=True).sum().backward()
            assert not runner.can_be_copied()
            options = runner.Options(checks=("training",), findings=False, timeout=60)
            (graded,) = runner.grade_folders([Path(".")], Path("."), options)
            assert [one.failed for one in graded.results] == [[]], graded.results
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_many_folders_are_summed_up_in_a_table(capsys, tmp_path, rubric, submission):
    right, wrong = submission(), submission("wrong", *WRONG_SIGN)
    missing, file = tmp_path / "missing", tmp_path / "file.txt"
    file.write_text("")
    folders = [str(path) for path in (missing, wrong, right, file)]
    before = sorted(path for folder in (right, wrong) for path in folder.rglob("*"))
    assert cli.main(["grade", *folders, "--rubric", rubric, "--jobs", "2"]) == 2
    printed = capsys.readouterr()
    *_, head, first, second, third, fourth, summary = printed.out.rstrip().split("\n")
    assert head.split() == ["submission", "points", "remarks", "to", "look", "at", "lost"]
    assert first.split(maxsplit=1) == [
        str(missing),
        "0 of 6       0        0           can't be graded: No such file or directory",
    ]
    assert second.split()[0] == str(wrong) and "deltas" in second and "centerness" not in second
    assert third.split(maxsplit=1) == [str(right), "6 of 6       0        0           nothing"]
    assert fourth.endswith("can't be graded: Not a directory")
    assert summary.startswith("2 submissions: lowest ")
    assert summary.endswith(", highest 6, all points 1")
    assert f"fcos: error: {missing} can't be graded" in printed.err
    assert "left, top, right, bottom in strides: stride 8: expected" in printed.out
    # Two copies that differ in a sign.
    assert f"  100%  {wrong} and {right}\n" in printed.out
    assert before == sorted(path for folder in (right, wrong) for path in folder.rglob("*"))


@pytest.mark.parametrize("change, status", [((), 0), (WRONG_SIGN, 1)])
def test_gradescope(capsys, tmp_path, rubric, submission, change, status):
    folder, file = submission("submission", *change), tmp_path / "results.json"
    command = ["grade", str(folder), "--rubric", rubric, "--format", "gradescope"]
    assert cli.main([*command, "--json", str(file)]) == status
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    deltas, centerness, *rest = result["tests"]
    assert centerness["name"] == "Centerness"
    assert (centerness["score"], centerness["max_score"], centerness["status"]) == (2, 2, "passed")
    assert deltas["status"] == ("failed" if status else "passed")
    assert (deltas["score"] < 4) == bool(deltas["output"]) == bool(status)
    assert result["score"] == sum(test["score"] for test in result["tests"])
    assert {test["visibility"] for test in result["tests"]} == {"visible"}
    assert all(test["max_score"] == 0 for test in rest)
    assert result["execution_time"] > 0


def test_results_are_saved_before_they_are_printed(
    monkeypatch, capsys, tmp_path, rubric, submission
):
    odd = os.fsdecode(b"caf\xe9")  # no UTF-8, as from an archive made elsewhere
    folder, file = submission(odd), tmp_path / "grades.json"
    assert cli.main(["grade", str(folder), "--rubric", rubric, "--json", str(file)]) == 0
    (report,) = json.loads(file.read_text())["submissions"]
    assert report["folder"].endswith("caf\N{REPLACEMENT CHARACTER}")
    assert "6 of 6 points" in capsys.readouterr().out

    def fail(*_: object) -> str:
        raise BrokenPipeError("nobody listens")

    file.unlink()
    monkeypatch.setattr("eecs598.grading.format_text", fail)
    assert cli.main(["grade", str(folder), "--rubric", rubric, "--json", str(file)]) == 2
    assert len(json.loads(file.read_text())["submissions"]) == 1


def test_the_place_of_an_endless_loop_is_told(monkeypatch, submission):
    monkeypatch.setattr(runner, "measure_slowness", lambda: 1.0)
    decoding = "    offsets = deltas.clamp(min=0) * stride\n"
    stubborn = (
        "    while True:\n        try:\n            while True:\n                pass\n"
        "        except BaseException:\n            pass\n"
    )
    everywhere = submission("everywhere", decoding, f"    while True: pass\n{decoding}")
    never_ends = submission("never ends", decoding, stubborn + decoding)
    options = Options(timeout=1, checks=("box_decoding",), findings=False)
    (loops, (end,)) = (
        one.results[0].failed
        for one in grade_folders([everywhere, never_ends], REPOSITORY, options)
    )
    place = r"one_stage_detector.py, line \d+"
    sentence = rf"{ENDED}: still running after 2 s, in fcos_apply_deltas_to_locations \({place}\)"
    assert re.fullmatch(sentence, end)
    # After two time-outs, the rest gets a fraction of a second.
    seconds = [re.search(r"TookTooLong: still running after (\S+) s", line)[1] for line in loops]
    assert seconds == ["1", "1", "0.25", "0.25", "0.25"]
    assert re.search(place, loops[0])


def test_wrong_usage(capsys, tmp_path, rubric):
    assert cli.main(["grade", "a", "b", "--format", "gradescope"]) == 2
    assert "2 folders given" in capsys.readouterr().err
    assert cli.main(["grade", "a", "--rubric", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err
    wrong = (["--timeout", "0"], ["--jobs", "x"], ["--format", "xml"])
    unwritable = (["--json", str(tmp_path)], ["--json", f"{rubric}/grades.json"])
    with pytest.raises(SystemExit):
        cli.main(["grade", ""])
    for options in (*wrong, *unwritable):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["grade", "a", *options])
        assert exit_.value.code == 2


def test_a_missing_part_costs_its_own_points_alone(rubric, submission):
    folder = submission()
    (folder / "one_stage_detector.py").unlink()
    options = Options(checks=("location_coords", "deltas"), findings=False)
    (graded,) = grade_folders([folder], REPOSITORY, options)
    assert [result.ok for result in graded.results] == [True, False]
    assert any("missing" in note for note in graded.notes)


def test_what_can_not_be_read_costs_nothing_else(monkeypatch, rubric, submission):
    folder = submission()
    for name in ("notes.py", "large.py"):
        (folder / name).write_text("import gc\n")
    os.mkfifo(folder / "pipe.py")
    read = source._read

    def refuse(path: Path) -> str:
        if path.name == "notes.py":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(source, "_read", refuse)
    options = Options(checks=("deltas",), findings=False)
    (graded,) = grade_folders([folder], REPOSITORY, options)
    assert [result.failed for result in graded.results] == [[]]
    assert "notes.py can't be read: Permission denied" in graded.suspicious
    assert "large.py, line 1: imports gc" in graded.suspicious
    assert not any("pipe.py" in line for line in graded.suspicious)


def test_where_processes_are_not_copied_grading_works_too(monkeypatch, submission):
    # As on systems other than Linux, as far as Linux can tell.
    get_context = runner.multiprocessing.get_context
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda method: get_context("spawn"))
    options = Options(checks=("deltas",), findings=False)
    (graded,) = grade_folders([submission()], REPOSITORY, options)
    assert [result.failed for result in graded.results] == [[]]


# --------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------


def make_report(**fields: object) -> Report:
    """Full points, but for a nms that ended its process."""
    grading = load_rubric()
    results = [
        CheckResult(name, [ProbeResult(label, None) for label in labels_of(name)])
        for name in grading.checks
        if name != "nms"
    ]
    results.append(CheckResult("nms", [ProbeResult(ENDED, "ended the process")]))
    graded = Graded("alice", results=results, protections=["files"], **fields)
    return Report(graded, grading.grade(results))


def test_text_says_what_was_wrong_and_how_it_was_run():
    report = make_report(
        notes=["used: ours"], findings=["a finding"], suspicious=["line 3"], output="x" * 9999
    )
    text = format_text(report)
    assert text.startswith(
        "alice: 88 of 100 points\n  Mend first (points to gain): Non-maximum suppression (12)\n\n"
        f"  --     0 of 12 Non-maximum suppression\n         -12  {ENDED}: ended the process\n"
    )
    assert "Matching" not in text
    for sentence in ("used: ours", "a finding", "line 3"):
        assert f"    - {sentence}\n" in text
    assert "confined: files. On this machine it could use the network; " in text
    assert len(text) < 5000
    assert format_table([report, report]).splitlines()[1].endswith("nms 0/12")


def test_json_has_everything():
    result = json.loads(json.dumps(to_dict(make_report())))
    assert result["score"] == 88
    assert result["checks"]["nms"] == {ENDED: "ended the process"}
    assert result["checks"]["deltas"]["background deltas are -1"] is None


def test_gradescope_hides_what_is_for_staff():
    result = to_gradescope(make_report(suspicious=["common.py, line 3: imports ctypes"]))
    assert "common.py, line 3: imports ctypes" in result["extra_data"]["for_staff"]
    assert "ctypes" not in json.dumps({**result, "extra_data": {}})
    assert result["stdout_visibility"] == "hidden"


# --------------------------------------------------------------------------------------------
# Tampering
# --------------------------------------------------------------------------------------------


def test_nothing_is_replaced_and_nothing_is_broken_to_begin_with():
    assert Watch().restore() == []
    assert broken_tools() == []


def test_what_a_person_should_look_at(tmp_path):
    (tmp_path / "common.py").write_text(
        "import ctypes\nimport torch\nmodel.eval()\nsys._getframe(1).f_locals\neval('1')\n"
        "from eecs598.grading import result\nfrom eecs598 import reset_seed\n"
    )
    assert suspicious_code(tmp_path) == [
        "common.py, line 1: imports ctypes",
        "common.py, line 4: _getframe",
        "common.py, line 4: f_locals",
        "common.py, line 5: eval()",
        "common.py, line 6: imports the grader",
    ]
    assert suspicious_code(REPOSITORY / "eecs598" / "report" / "templates") == []
    (tmp_path / "common.py").write_text(
        "%load_ext autoreload\nimport gc\nfrom ours.common import *\n"
        "class Yes:\n    def __eq__(self, other): return True\n"
    )
    assert suspicious_code(tmp_path) == [
        "common.py, line 2: imports gc",
        "common.py, line 3: imports ours",
        "common.py, line 5: defines __eq__",
    ]
    (tmp_path / "common.py").write_bytes(b"\0")
    assert suspicious_code(tmp_path) == ["common.py can't be looked at: it is no Python"]
