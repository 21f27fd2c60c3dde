"""Time of ``fcos --help``, compared with the start of Python alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

from benchmarks.timing import Row, side_by_side


def rows(device: str) -> Iterator[Row]:
    """Yield the time of ``fcos --help``, in new processes that are started one after the other."""

    def run(*arguments: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *arguments], capture_output=True, check=True)

    script = "from fcos.cli import main; main(['--help'])"  # what the installed command does
    times = side_by_side(run("-c", script), run("-c", "pass"), 25)
    yield Row("fcos --help", "python -c pass", *times, 5.0)
