"""The tools of the benchmarks; the measurements themselves are no tests."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ablation, timing
from benchmarks.average_precision import _by_definition, make_data
from eecs598.metrics.average_precision import average_precision, score_folder
from tests.evaluations import export, make_evaluation


def test_both_sides_take_turns_and_the_median_counts(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0.0, 3.0, 0.0, 1.0, 0.0, 2.0, 0.0, 9.0]))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    ours, theirs = timing.side_by_side(
        lambda: calls.append("ours"), lambda: calls.append("theirs"), repetitions=3
    )
    assert calls == ["ours", "theirs"] * 4  # the first two are not counted
    assert (ours, theirs) == (2.0, 9.0)  # of 2, 3, 2 and of 9, 1, 9


def test_the_table_says_which_goals_are_missed():
    rows = [
        timing.Row("fast", "peer", 0.001, 0.004, 0.4),
        timing.Row("slow", "peer", 2.0, 4.0, 0.4),
        timing.Row("for information", "peer", 1.0, 1.0, None),
    ]
    fast, slow, information = timing.table(rows).splitlines()[2:]
    assert fast == "| fast | peer | 1 ms | 4 ms | 0.25 | 0.40 |"
    assert "| 0.50 | 0.40 missed |" in slow
    assert information.endswith("| 1.00 |  |")


def test_the_plain_loop_agrees_on_the_data_of_the_benchmark():
    predictions, targets = (items[:60] for items in make_data())
    names = [f"class {label}" for label in range(20)]
    expected = average_precision(predictions, targets, names)["mAP"]
    assert _by_definition(predictions, targets) == pytest.approx(expected, abs=1e-9)


def test_the_table_of_the_ablation_has_what_is_there(tmp_path):
    for name, seed, score in (("base", "0", 0.3), ("GIoU", "0", 0.325), ("GIoU", "1", 0.345)):
        folder = ablation._folder(tmp_path, name, seed)
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"mAP": score}))
    assert ablation.table(tmp_path).splitlines()[2:] == [
        "| base | 30.0 % |  |  |",
        "| GIoU | 32.5, 34.5 % | +3.5 |  |",
    ]


def test_a_stopped_row_of_the_ablation_is_resumed_with_the_same_options(tmp_path, monkeypatch):
    commands = []

    class Stopped:
        """A training run that leaves its folder, as after a signal."""

        def __init__(self, command):
            commands.append(command)
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").touch()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            return 143

    monkeypatch.setattr(subprocess, "Popen", Stopped)
    arguments = ["--data", "VOC", "--out", str(tmp_path), "--cache", "--rows", "GIoU"]
    monkeypatch.setattr(sys, "argv", ["ablation", *arguments])
    ablation.main()
    ablation.main()
    assert "--cache" in commands[0]
    assert commands[1] == [*commands[0], "--resume"]


def test_a_row_of_one_seed_says_how_far_the_choice_of_images_decides(tmp_path):
    names = ("base", "flip", "GIoU")
    for name, drop in zip(names, ((), ("first",), ()), strict=True):
        folder = export(make_evaluation(tmp_path, drop=drop), ablation._folder(tmp_path, name))
        (folder / "metrics.json").write_text(json.dumps({"mAP": score_folder(folder)["mAP"]}))
    rows = [line.split(" | ") for line in ablation.table(tmp_path).splitlines()[3:]]
    (_, _, difference, interval), same = rows
    low, high = (float(end) for end in interval.removesuffix(" |").split(" to "))
    assert low < float(difference) < high <= 0
    assert same == ["| GIoU", "25.0 %", "+0.0", "+0.0 to +0.0 |"]
