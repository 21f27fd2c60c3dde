"""What runs in the process of a submission: load it, run checks, tell the grader.

The grader hears one line of JSON at a time, and in a fixed order: what confines this process, that
the submission is loaded, then for each step its probes as soon as each is decided, and the end of
the step. Each line begins with a token that the grader chose. What is said can't be taken back, and
what does not follow the order is not believed, so a submission that ends this process, prints
results or writes to the pipe gains nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from json import JSONEncoder
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from eecs598.grading.checks.registry import CHECKS
from eecs598.grading.checks.review import find
from eecs598.grading.loading import load_submission
from eecs598.grading.result import CheckResult
from eecs598.grading.sandbox.isolation import Limits, confine, limit_cpu
from eecs598.grading.sandbox.tampering import Watch, broken_tools, suspicious_code
from eecs598.grading.submission import PARTS

__all__ = ["FINDINGS", "Job", "work"]

FINDINGS = "findings"  # the step after the checks
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")

Say = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """A task for one process.

    Attributes:
        folder: the submission.
        fallback: folder with the modules of the assignment that replace missing ones.
        steps: names of checks, and ``FINDINGS``, in order.
        work_folder: the only folder to write to.
        timeout: seconds for loading and for each step.
        limits: of the process.
        token: what the grader knows its lines by.
    """

    folder: str
    fallback: str
    steps: tuple[str, ...]
    work_folder: str
    timeout: float
    limits: Limits
    token: str


def work(job: Job, channel: Connection, output: Connection) -> None:
    """Do a job in a process of its own, which ends with it.

    Args:
        job: what to do.
        channel: where the grader listens.
        output: where it keeps what the submission prints.
    """
    _detach(job, channel, output)

    # Not by names that the submission could give to something else.
    encode, write, file, windows = JSONEncoder().encode, os.write, channel.fileno(), os.name == "nt"

    def say(**message: Any) -> None:
        line = f"{job.token} {encode(message)}\n".encode()
        if windows:
            channel.send_bytes(line)
        while line and not windows:
            line = line[write(file, line) :]

    torch.set_num_threads(1)
    say(confined=confine(job.work_folder, _readable(job), job.limits))
    tampered: list[str] = []
    clock = _Clock(job.timeout)
    _announce_probes(say, lambda: tampered.extend(watch.restore()), clock)
    watch = Watch()

    try:
        with clock.limit(), clock.interruptions():
            suspicious = suspicious_code(job.folder)
            loaded = load_submission(job.folder, job.fallback)
    except BaseException as error:
        say(failed=f"raised {type(error).__name__}: {error}")
        _exit(1)
    replaced = watch.restore()
    say(loaded=[str(note) for note in loaded.notes], suspicious=suspicious, replaced=replaced)

    for step in job.steps:
        problem, found = None, []
        tampered += broken_tools()
        try:
            with clock.limit():
                if step == FINDINGS:
                    with clock.interruptions():
                        found = [str(finding) for finding in find(loaded.submission, job.folder)]
                else:
                    CHECKS[step](loaded.submission)
        except BaseException as error:  # outside of a probe
            problem = f"raised {type(error).__name__}: {error}"
        tampered += watch.restore() + broken_tools()
        say(done=step, problem=problem, found=found, tampered=sorted(set(tampered)))
        if tampered:
            break  # nothing else that this process says could be believed
    _exit(0)


def _detach(job: Job, channel: Connection, output: Connection) -> None:
    """Cut the ties to the grader's process: terminal, open files, environment, handlers."""
    if os.name != "nt":
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for target, source in ((0, null), (1, output.fileno()), (2, output.fileno())):
            os.dup2(source, target)
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
    for part in PARTS:  # ours, if the grader's program imported them
        sys.modules.pop(part, None)
    sys.stdin = None
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.open(os.devnull, os.O_WRONLY) if os.name == "nt" else number
        stream = os.fdopen(file, "w", 1, encoding="utf-8", errors="replace", closefd=False)
        setattr(sys, name, stream)
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, HOME=job.work_folder, TMPDIR=job.work_folder, USER="submission")
    os.environ.update(MPLBACKEND="agg", MPLCONFIGDIR=job.work_folder, OMP_NUM_THREADS="1")
    os.chdir(job.work_folder)
    tempfile.tempdir = job.work_folder
    # Compiled files beside the submission are neither believed nor written.
    sys.dont_write_bytecode = True
    sys.pycache_prefix = os.path.join(job.work_folder, "__pycache__")


def _readable(job: Job) -> list[str]:
    package = os.fspath(Path(__file__).resolve().parents[2])  # eecs598
    names = ("common.py", "one_stage_detector.py", "a4_helper.py")
    return [job.folder, package, *(os.path.join(job.fallback, name) for name in names)]


def _announce_probes(say: Say, look: Callable[[], None], clock: _Clock) -> None:
    """Have the checks say the answer of each probe when it is known.

    Args:
        say: tells it.
        look: looks for what was replaced meanwhile, before the answer is told.
        clock: interrupts a probe that takes too long, and nothing between two of them.
    """
    original = CheckResult.probe

    @contextlib.contextmanager
    def probe(self: CheckResult, label: str) -> Iterator[None]:
        with original(self, label), clock.interruptions():
            yield
        if self.name in CHECKS:
            look()
            answer = self.probes[-1]
            say(check=self.name, label=answer.label, problem=answer.problem)

    CheckResult.probe = probe


class TookTooLong(Exception):
    """Raised in the code of a submission when its time is up."""


class _Clock:
    """Interrupts what takes too long, again and again, and at last ends the process.

    So an endless loop costs its probe, not the whole check. What goes on nevertheless is ended
    after twice the time, here with a print of where it was, or by the grader.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._may_interrupt = False

    @contextlib.contextmanager
    def limit(self) -> Iterator[None]:
        """Give the block its time."""
        # Half a second later, so that the last interruption is not lost in the print.
        end = 2 * self._seconds + 0.5
        limit_cpu(end)
        faulthandler.dump_traceback_later(end, exit=True, file=2)
        if os.name != "nt":
            signal.signal(signal.SIGALRM, self._interrupt)
            again = max(1.0, self._seconds / 20)
            signal.setitimer(signal.ITIMER_REAL, self._seconds, again)
        try:
            yield
        finally:
            if os.name != "nt":
                signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def interruptions(self) -> Iterator[None]:
        """Within a ``limit``, the block may be interrupted."""
        self._may_interrupt = True
        try:
            yield
        finally:
            self._may_interrupt = False

    def _interrupt(self, *_: object) -> None:
        if self._may_interrupt:
            raise TookTooLong(f"still running after {self._seconds:g} s")


def _exit(status: int) -> None:
    """End the process without anything that the submission wants done at its end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
