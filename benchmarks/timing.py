"""Time two ways of doing the same thing side by side."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

REPETITIONS = 9


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        question: what was timed.
        peer: what it was compared with.
        ours, theirs: medians in seconds.
        goal: the ratio of the times to reach, as a number of at most 1; None where there is none.
    """

    question: str
    peer: str
    ours: float
    theirs: float
    goal: float | None

    @property
    def ratio(self) -> float:
        """Our time over that of the peer."""
        return self.ours / self.theirs


def side_by_side(
    ours: Callable[[], Any], theirs: Callable[[], Any], repetitions: int = REPETITIONS
) -> tuple[float, float]:
    """Medians of both in seconds, over repetitions by turns, after one of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 1):
        for call, its_times in zip((ours, theirs), times, strict=True):
            seconds = seconds_of(call)
            if repetition:
                its_times.append(seconds)
    return statistics.median(times[0]), statistics.median(times[1])


def seconds_of(call: Callable[[], Any]) -> float:
    """The time of one call."""
    gc.collect()
    gc.disable()  # a collection in the middle would be counted
    try:
        _wait_for_gpu()
        start = time.perf_counter()
        call()
        _wait_for_gpu()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = [
        "| question | peer | ours | peer's | ratio | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.2f}"
        goal += "" if row.goal is None or row.ratio <= row.goal else " missed"
        lines.append(
            f"| {row.question} | {row.peer} | {_seconds(row.ours)} | {_seconds(row.theirs)} "
            f"| {row.ratio:.2f} | {goal} |"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
