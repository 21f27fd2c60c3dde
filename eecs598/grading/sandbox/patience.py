"""How long to wait for an answer: in proportion to the time that our own solution takes here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

__all__ = ["Patience", "measure_slowness"]

# Seconds of our solution for the slowest probe of a check, on the machine where ``_workload`` takes
# ``WORKLOAD_SECONDS``. Those of the checks that are not listed are done in hundredths of a second.
OUR_SECONDS = {
    "backbone": 0.5,
    "location_order": 0.3,
    "losses": 0.4,
    "training": 1.0,
    "nms": 0.15,
    "other_sizes": 0.6,
    "train_detector": 0.3,
}
WORKLOAD_SECONDS = 0.006

TIMES_OURS = 60  # a simple solution is slower than ours
SHORTEST = 2.0
MOST_SLOWNESS = 4.0

MAX_TIME_OUTS = 2
SECONDS_AFTER_TIME_OUTS = 0.25


@dataclass
class Patience:
    """How long to wait for the answers of one submission.

    After two time-outs, the other questions of the same check get a fraction of a second: enough
    for code that fails on large inputs only, and not for more endless loops.

    Attributes:
        most: seconds for loading, and the most for anything else.
        slowness: of this machine, as ``measure_slowness`` returns it.
        time_outs: number by name of the check.
    """

    most: float
    slowness: float = 1.0
    time_outs: Counter[str] = field(default_factory=Counter)

    def seconds_for(self, check: str) -> float:
        """Return the seconds for the next probe of a check."""
        if self.time_outs[check] >= MAX_TIME_OUTS:
            return min(self.most, self.slowness * SECONDS_AFTER_TIME_OUTS)
        seconds = max(SHORTEST, TIMES_OURS * OUR_SECONDS.get(check, 0.0))
        return round(min(self.most, self.slowness * seconds), 1)

    def note_time_out(self, check: str) -> None:
        """Count a probe that ran out of time."""
        self.time_outs[check] += 1


def measure_slowness() -> float:
    """Return how many times slower than where ``OUR_SECONDS`` was measured this machine is.

    It is at least 1 and at most ``MOST_SLOWNESS``.
    """
    _workload()  # what happens once only
    seconds = min(_seconds(_workload) for _ in range(3))
    return round(min(max(seconds / WORKLOAD_SECONDS, 1.0), MOST_SLOWNESS), 2)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _workload() -> None:
    """Do in short what checks do: convolutions, and many operations on small tensors."""
    maps, kernel = torch.ones(1, 64, 28, 28), torch.ones(64, 64, 3, 3)
    for _ in range(4):
        F.conv2d(maps, kernel, padding=1)
    values = torch.ones(100)
    for _ in range(1000):
        values = (values + 1).clamp(max=5)
