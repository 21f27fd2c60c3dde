"""Processes that load data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SECOND_PROCESS_FAILS = """
import os, sys
from eecs598.runtime import batches_of, make_loader

forks, fork = [], os.fork

def failing_fork():
    forks.append(None)
    if len(forks) == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = failing_fork
try:
    with batches_of(make_loader([1, 2, 3], 2)):
        pass
except BlockingIOError as error:
    kept = error
    print(error)
sys.exit(3)
"""


def test_a_process_that_cannot_be_started_leaves_no_other_behind():
    """Containers limit the number of processes; the exit would wait for those that run."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SECOND_PROCESS_FAILS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, "unavailable" in result.stdout) == (3, True), result.stderr
