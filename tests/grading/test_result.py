"""Probes and comparisons."""

from __future__ import annotations

import math

import pytest
import torch

from eecs598.grading import CheckResult
from eecs598.grading.result import CheckFailure, expect_close


@pytest.mark.parametrize("error", [ValueError("no\nidea"), SystemExit(1), RecursionError("deep")])
def test_what_a_probe_raises_is_its_answer(error):
    result = CheckResult("example")
    with result.probe("fails"):
        raise error
    with result.probe("goes on"):
        pass
    assert result.passed == ["goes on"]
    assert result.failed == [
        f"fails: raised {type(error).__name__}: {' '.join(str(error).split())}"
    ]
    assert not result.ok


def test_interrupts_are_not_answers():
    with pytest.raises(KeyboardInterrupt), CheckResult("example").probe("interrupted"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        (torch.tensor([1.0, 2.5]), "call: expected [1, 2], got [1, 2.5]"),
        (torch.tensor([1.0, math.nan]), "call: expected [1, 2], got [1, nan]"),
        (torch.tensor([[1.0, 2.0]]), "call: expected shape (2,), got (1, 2)"),
        ([1.0, 2.0], "call: expected a tensor, got [1, 2]"),
        (None, "call: expected a tensor, got None"),
    ],
)
def test_expect_close_names_the_difference(got, sentence):
    with pytest.raises(CheckFailure) as wrong:
        expect_close("call", got, [1.0, 2.0], tolerance=0.1)
    assert str(wrong.value) == sentence


def test_expect_close_shows_one_row_of_many():
    got = torch.zeros(6, 2)
    got[3, 1] = 1
    with pytest.raises(CheckFailure, match=r"^call, row 3: expected \[0, 0\], got \[0, 1\]$"):
        expect_close("call", got, torch.zeros(6, 2))


def test_expect_close_accepts_what_is_close():
    expect_close("call", torch.tensor([1.0, 2.0], dtype=torch.float64), [1.0, 2.0])
    expect_close("call", torch.tensor([1.0, 2.05]), [1.0, 2.0], tolerance=0.05)
    expect_close("call", torch.zeros(0, dtype=torch.int64), torch.zeros(0))
