"""How long the grader waits."""

from __future__ import annotations

import pytest

from eecs598.grading.sandbox import patience
from eecs598.grading.sandbox.patience import Patience, measure_slowness


def test_time_is_in_proportion_to_ours_and_to_the_machine():
    assert Patience(18).seconds_for("deltas") == 2
    assert Patience(18).seconds_for("nms") == 9
    assert Patience(18, slowness=1.5).seconds_for("nms") == 13.5
    assert Patience(18, slowness=4).seconds_for("nms") == Patience(18).seconds_for("training") == 18


def test_after_two_time_outs_the_rest_gets_a_fraction_of_a_second():
    patient = Patience(18)
    patient.note_time_out("nms")
    assert patient.seconds_for("nms") == 9
    patient.note_time_out("nms")
    assert patient.seconds_for("nms") == 0.25
    assert patient.seconds_for("training") == 18


@pytest.mark.parametrize(("seconds", "slowness"), [(0.001, 1), (0.012, 2), (9, 4)])
def test_slowness_is_measured(monkeypatch, seconds, slowness):
    monkeypatch.setattr(patience, "_seconds", lambda _: seconds)
    assert measure_slowness() == slowness
