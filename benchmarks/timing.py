"""Time two functions side by side, and print the results as a table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

REPETITIONS = 9


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        question: what was timed.
        peer: what it is compared with.
        ours: median time in seconds.
        theirs: that of the peer.
        goal: ratio of the times to reach, at most 1; None where there is none.
    """

    question: str
    peer: str
    ours: float
    theirs: float
    goal: float | None

    @property
    def ratio(self) -> float:
        """Our time divided by that of the peer."""
        return self.ours / self.theirs


def side_by_side(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    repetitions: int = REPETITIONS,
    *,
    calls: int = 1,
) -> tuple[float, float]:
    """Run both in turns, after one of each to warm up, and return the median times in seconds.

    Args:
        ours: what is timed.
        theirs: what it is compared with.
        repetitions: number of turns of each.
        calls: number of calls in a turn, whose mean counts. With two libraries that have threads
            of their own, those of the last call still wait busily when the other one begins.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 1):
        for call, its_times in zip((ours, theirs), times, strict=True):
            seconds = seconds_of(call, calls)
            if repetition:
                its_times.append(seconds)
    return statistics.median(times[0]), statistics.median(times[1])


def seconds_of(call: Callable[[], Any], calls: int = 1) -> float:
    """Measure the time of one call, including its work on the GPU: the mean of some in a row."""
    gc.collect()
    gc.disable()  # a collection during the call would be measured, too
    try:
        return sum(latency_of(call) for _ in range(calls)) / calls
    finally:
        gc.enable()


def latency_of(call: Callable[[], Any]) -> float:
    """Measure the time of one call among many, garbage collection included."""
    _wait_for_gpu()
    start = time.perf_counter()
    call()
    _wait_for_gpu()
    return time.perf_counter() - start


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Format rows as a Markdown table."""
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
