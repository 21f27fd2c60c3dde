"""The process that runs a submission: load it, run checks, and send the results to the grader.

Messages are lines of JSON in a fixed order: which protections are active, that the submission is
loaded, then for each step the result of each probe as soon as it is known, and the end of the
step. Each line begins with a token that the grader chose. Results that were sent can't be changed,
and the grader rejects lines that do not follow the order, so a submission that ends this process,
prints results or writes to the pipe gains nothing.
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
from typing import Any

import torch

import eecs598
from eecs598.grading.checks.registry import CHECKS
from eecs598.grading.checks.review import review_findings
from eecs598.grading.loading import load_submission
from eecs598.grading.result import CheckResult, Probe, TookTooLong, is_trial
from eecs598.grading.sandbox.isolation import Limits, confine, limit_cpu
from eecs598.grading.sandbox.patience import Patience
from eecs598.grading.sandbox.tampering import Watch, broken_tools, suspicious_code
from eecs598.grading.submission import PARTS, Verdict

__all__ = ["FINDINGS", "Job", "run_job"]

FINDINGS = "findings"  # the step after the checks
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")

Send = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """The input of one process.

    Attributes:
        folder: of the submission.
        fallback: folder of the reference modules that replace missing ones.
        steps: names of checks, and ``FINDINGS``, in order.
        work_folder: the only folder that the process may write to.
        patience: how long to wait for loading, for each probe and for the review.
        limits: of the process.
        token: begins each line that the process sends.
        verdicts: name as "module.name" -> what an earlier process found out about it.
    """

    folder: str
    fallback: str
    steps: tuple[str, ...]
    work_folder: str
    patience: Patience
    limits: Limits
    token: str
    verdicts: tuple[tuple[str, Verdict], ...] = ()


def run_job(job: Job, channel: Connection, output: Connection) -> None:
    """Run a job in this process, and end the process.

    Args:
        job: the job.
        channel: pipe for messages to the grader.
        output: pipe for everything that the submission prints.
    """
    _detach(job, channel, output)

    # Local names, because a submission could replace the attributes of modules.
    encode, write, file, windows = JSONEncoder().encode, os.write, channel.fileno(), os.name == "nt"

    def send(**message: Any) -> None:
        line = f"{job.token} {encode(message)}\n".encode()
        if windows:
            channel.send_bytes(line)
        while line and not windows:
            line = line[write(file, line) :]

    torch.set_num_threads(1)
    send(confined=confine(job.work_folder, _readable(job), job.limits))
    tampered: list[str] = []
    time_limit = _TimeLimit()
    patience = job.patience
    _report_probes(send, lambda: tampered.extend(watch.restore()), time_limit, patience)
    watch = Watch()

    try:
        with time_limit.interrupt_after(patience.most):
            suspicious = suspicious_code(job.folder)
            loaded = load_submission(job.folder, job.fallback)
            loaded.submission.verdicts.update(job.verdicts)
    except BaseException as error:
        send(failed=f"raised {type(error).__name__}: {error}")
        _exit(1)
    replaced = watch.restore()
    send(loaded=[str(note) for note in loaded.notes], suspicious=suspicious, replaced=replaced)

    for step in job.steps:
        problem, found, ours = None, [], []
        tampered += broken_tools()
        try:
            if step == FINDINGS:
                with time_limit.interrupt_after(patience.most):
                    findings = review_findings(loaded.submission, job.folder)
                    found = [str(finding) for finding in findings]
            else:
                done = CHECKS[step](loaded.submission)
                ours = [str(part) for part in done.with_ours]
        except BaseException as error:  # outside of a probe
            problem = f"raised {type(error).__name__}: {error}"
        tampered += watch.restore() + broken_tools()
        send(done=step, problem=problem, found=found, ours=ours, tampered=sorted(set(tampered)))
        if tampered:
            break  # no further result of this process could be trusted
    _exit(0)


def _detach(job: Job, channel: Connection, output: Connection) -> None:
    """Close what this process shares with the grader: terminal, files, environment, handlers."""
    if os.name != "nt":
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for target, source in ((0, null), (1, output.fileno()), (2, output.fileno())):
            os.dup2(source, target)
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, signal.SIG_DFL)
    for part in PARTS:  # the reference modules, if the grader's program imported them
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
    # Compiled files beside the submission are neither read nor written.
    sys.dont_write_bytecode = True
    sys.pycache_prefix = os.path.join(job.work_folder, "__pycache__")


def _readable(job: Job) -> list[str]:
    """Return the files and folders that checks read: submission, course library, reference."""
    library = os.path.dirname(os.path.realpath(eecs598.__file__))
    return [job.folder, library, *(os.path.join(job.fallback, f"{part}.py") for part in PARTS)]


def _report_probes(
    send: Send,
    check_tampering: Callable[[], None],
    time_limit: _TimeLimit,
    patience: Patience,
) -> None:
    """Make the checks send the result of each probe as soon as it is known.

    Args:
        send: sends a message to the grader.
        check_tampering: called before a result is sent.
        time_limit: interrupts a probe, but not the code between two probes.
        patience: says when.
    """

    @contextlib.contextmanager
    def wrap_probe(result: CheckResult, probe: Probe) -> Iterator[None]:
        with probe, time_limit.interrupt_after(patience.seconds_for(result.name)):
            yield
        last = result.probes[-1]
        if last.ran_out_of_time:
            patience.note_time_out(result.name)
        if result.name in CHECKS and not is_trial():
            check_tampering()
            send(check=result.name, label=last.label, problem=last.problem, snippet=last.snippet)

    CheckResult.wrap_probe = wrap_probe


class _TimeLimit:
    """A time limit that interrupts code repeatedly, and finally ends the process.

    So an endless loop fails its probe, not the whole check. Code that continues nevertheless is
    ended after twice the time: here, with a traceback of where it was, or by the grader.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None  # None: may not interrupt

    @contextlib.contextmanager
    def interrupt_after(self, seconds: float) -> Iterator[None]:
        """Limit the time of the block, which is in no other such block."""
        # Half a second more, so that the last interruption comes before the traceback.
        end = 2 * seconds + 0.5
        limit_cpu(end)
        faulthandler.dump_traceback_later(end, exit=True, file=2)
        self._seconds = seconds
        if os.name != "nt":
            signal.signal(signal.SIGALRM, self._interrupt)
            signal.setitimer(signal.ITIMER_REAL, seconds, max(0.4, seconds / 20))
        try:
            yield
        finally:
            self._seconds = None
            if os.name != "nt":
                signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    def _interrupt(self, *_: object) -> None:
        if self._seconds is not None:
            raise TookTooLong(f"still running after {self._seconds:g} s")


def _exit(status: int) -> None:
    """End the process without running what the submission registered for its end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
