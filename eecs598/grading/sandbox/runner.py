"""Grade folders in parallel, each in processes of its own.

A process loads a submission and runs its checks one after the other. If it ends, hangs, exceeds a
limit or violates the protocol, the check that was running gets no points, and a new process
continues with the rest. So the results of a submission never depend on those of another one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import torch

from eecs598.grading.checks.registry import CHECK_OF, CHECKS, verdict_on
from eecs598.grading.result import ENDED, CheckResult, ProbeResult
from eecs598.grading.sandbox.copying import can_be_copied
from eecs598.grading.sandbox.isolation import LAYERS, Limits, adopt_orphans, children, kill_orphans
from eecs598.grading.sandbox.patience import Patience, measure_slowness
from eecs598.grading.sandbox.worker import FINDINGS, Job, run_job

__all__ = ["Graded", "Options", "grade_folders"]

POLL = 0.1  # seconds between two checks of what a process uses
GRACE = 2.0  # seconds after the time-out in which a process should end by itself
MAX_LINE = 2**20
MAX_PROBES = 100  # of a check
MAX_SENTENCE = 600
MAX_SNIPPET = 4000
MAX_SENTENCES = 60
KEPT_OUTPUT = 2**15  # bytes of the output of a process to keep from its start and from its end
MAX_FILES = 5000
TRACEBACK = "Timeout ("  # how the traceback begins that faulthandler prints at a time-out


@dataclass(frozen=True)
class Options:
    """Settings of grading.

    Attributes:
        timeout: seconds for loading a submission, and the most for a probe; a probe that takes our
            solution less gets less (``patience.py``). After this time it is interrupted, and after
            twice the time its process is ended.
        total_timeout: seconds for a submission as a whole.
        jobs: number of submissions to grade at the same time; None for the number of cores.
        memory_mb: memory that a submission may allocate, in MiB.
        disk_mb: bytes that it may write, in MiB.
        checks: names of the checks to run.
        findings: whether to list review findings, which cost no points.
    """

    timeout: float = 15.0
    total_timeout: float = 45.0
    jobs: int | None = None
    memory_mb: int = 2048
    disk_mb: int = 256
    checks: tuple[str, ...] = tuple(CHECKS)
    findings: bool = True


@dataclass
class Graded:
    """The results of one folder.

    Attributes:
        folder: as it was given.
        error: why it could not be graded at all; None if it was.
        results: of each check. One that did not run to its end has a single probe, ``ENDED``.
        notes: on how the submission was loaded and run.
        findings: review findings, which cost no points.
        suspicious: lines of code that a person should look at.
        output: what the submission printed, shortened.
        protections: the layers of ``isolation.LAYERS`` that were active.
        seconds: duration of grading.
    """

    folder: str
    error: str | None = None
    results: list[CheckResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    suspicious: list[str] = field(default_factory=list)
    output: str = ""
    protections: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def failed(cls, folder: str, error: str) -> Graded:
        """Return the result of a submission that could not be graded at all."""
        return cls(_printable(folder), error=_printable(error))


def _printable(name: str) -> str:
    # A file name may be undecodable, or contain control characters.
    text = os.fsencode(name).decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def grade_folders(
    folders: Sequence[str | os.PathLike],
    fallback: str | os.PathLike,
    options: Options | None = None,
    report: Callable[[Graded], None] = lambda graded: None,
    names: Mapping[str, str] | None = None,
) -> list[Graded]:
    """Grade submissions.

    Afterwards, PyTorch uses one thread in this process, and Matplotlib opens no windows.

    Args:
        folders: one per submission. If one can't be read, only its own result is an error.
        fallback: folder of the reference solution's modules, which replace missing ones.
        options: settings; the defaults unless given.
        report: called with each submission's results when it is done.
        names: folder -> how to call it in results; its path unless given.

    Returns:
        The results, in the order of ``folders``.
    """
    options = options or Options()
    jobs = options.jobs or _num_cores()
    _prepare()
    slowness = measure_slowness()
    paths, names = [os.fspath(folder) for folder in folders], names or {}
    gradings = [
        _Grading(path, names.get(path, path), os.fspath(fallback), options, slowness)
        for path in paths
    ]
    waiting, others = deque(gradings), children()
    running: list[_Grading] = []
    with adopt_orphans():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(waiting.popleft())
                    running[-1].begin()
                channels = [pipe for grading in running for pipe in grading.pipes()]
                if channels:
                    connection.wait(channels, timeout=POLL)
                for grading in list(running):
                    grading.advance(others | {one.pid for one in running if one.pid})
                    if grading.is_done:
                        running.remove(grading)
                        report(grading.graded)
        finally:
            for grading in running:
                grading.stop()
    return [grading.graded for grading in gradings]


def _prepare() -> None:
    """Import what submissions import once, since each process starts as a copy of this one."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot  # noqa: F401
    import torchvision.models.feature_extraction
    import torchvision.transforms  # noqa: F401

    # A pool of threads would not be copied.
    torch.set_num_threads(1)


def _num_cores() -> int:
    """Return the number of cores that this process may use; a container may limit it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _ProtocolError(Exception):
    """A process sent what the protocol does not allow; the message completes "the process ..."."""


class _Grading:
    """The state of grading one submission, in one process after the other."""

    def __init__(
        self, folder: str, name: str, fallback: str, options: Options, slowness: float
    ) -> None:
        self.graded = Graded(_printable(name))
        self.is_done = False
        self._folder = os.path.abspath(folder)
        self._fallback = os.path.abspath(fallback)
        self._options = options
        self._patience = Patience(options.timeout, slowness)
        self._pending = deque(name for name in CHECKS if name in options.checks)
        if options.findings:
            self._pending.append(FINDINGS)
        self._probes: list[ProbeResult] = []  # of the check that is running
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Id of the running process; None if there is none."""
        return self._process.pid if self._process else None

    def pipes(self) -> list[connection.Connection]:
        """Return the pipes to wait for."""
        return self._process.open_pipes if self._process else []

    def begin(self) -> None:
        """Start the first process, or fail if the folder can't be read."""
        self._start_time = time.monotonic()
        try:
            os.listdir(self._folder)
        except OSError as error:
            self.graded.error = f"can't be graded: {error.strerror}"
            self._fail_all(self.graded.error)
            self.is_done = True
            return
        self._start_process()

    def stop(self) -> None:
        """End the running process."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def advance(self, known: set[int]) -> None:
        """Receive the messages of the process, and end it if it is done or breaks a rule.

        Args:
            known: processes to keep when this one ends.
        """
        process = self._process
        if process is None:
            return
        try:
            for message in process.messages():
                self._receive(message)
            problem = process.problem()
            if problem is None and time.monotonic() > self._deadline:
                problem = process.time_out()
        except _ProtocolError as error:
            problem = f"the process of the submission {error}; its results do not count"
        if problem is None and not process.has_ended:
            return
        status = process.end()
        if "processes" not in self.graded.protections:
            kill_orphans(known - {process.pid})
        self._process = None
        printed = process.output.text().partition(TRACEBACK)[0]
        self.graded.output = _shortened(self.graded.output + printed)
        if self._pending:
            reason = problem or process.describe_end(status, self._folder)
            if self._expected == "steps":
                self._fail_step(reason)
            else:
                self._fail_all(f"while the submission was loaded: {reason}")
        self._continue()

    def _start_process(self) -> None:
        options = self._options
        work_folder = tempfile.mkdtemp(prefix="fcos-grade-")
        job = Job(
            folder=self._folder,
            fallback=self._fallback,
            steps=tuple(self._pending),
            work_folder=os.path.realpath(work_folder),
            patience=self._patience,
            limits=Limits(
                memory_mb=options.memory_mb,
                file_mb=options.disk_mb,
                cpu_seconds=int(options.total_timeout) + 1,
            ),
            token=secrets.token_hex(16),
            verdicts=tuple(
                (name, verdict_on(result))
                for result in self.graded.results
                for name, check in CHECK_OF.items()
                if check == result.name
            ),
        )
        self._expected = "confined"
        self._probes = []
        self._process = _Process(job, options)
        self._set_deadline()

    def _set_deadline(self) -> None:
        step = time.monotonic() + 2 * self._options.timeout + GRACE
        self._deadline = min(step, self._start_time + self._options.total_timeout)

    def _continue(self) -> None:
        used_up = time.monotonic() - self._start_time >= self._options.total_timeout
        if self._pending and used_up:
            total = f"{self._options.total_timeout:g} s"
            self._fail_all(f"not run: the submission had used up its {total} in all")
        if self._pending:
            self._start_process()
            return
        by_name = {result.name: result for result in self.graded.results}
        self.graded.results = [by_name[name] for name in CHECKS if name in by_name]
        self.graded.seconds = round(time.monotonic() - self._start_time, 1)
        self.is_done = True

    def _receive(self, message: dict[str, Any]) -> None:
        """Handle a message: first confined, then loaded, then each step's probes and its end."""
        if self._expected == "confined":
            self._require(set(message) == {"confined"})
            self.graded.protections = [
                layer for layer in _sentences(message["confined"]) if layer in LAYERS
            ]
            self._expected = "loaded"
        elif self._expected == "loaded":
            self._receive_loaded(message)
        elif "label" in message:
            self._require(bool(self._pending) and message.get("check") == self._pending[0])
            self._require(len(self._probes) < MAX_PROBES)
            problem = message.get("problem")
            probe = ProbeResult(
                _sentence(message["label"]),
                None if problem is None else _sentence(problem),
                _snippet(message.get("snippet")),
            )
            self._probes.append(probe)
            self._set_deadline()
        else:
            self._require(bool(self._pending) and message.get("done") == self._pending[0])
            self._receive_done(message)

    def _receive_loaded(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            reason = _sentence(message["failed"])
            self._fail_all(f"the submission can't be loaded: {reason}")
            return
        self._require({"loaded", "suspicious", "replaced"} == set(message))
        notes = _sentences(message["loaded"])
        if replaced := _sentences(message["replaced"]):
            notes.append(f"replaced {', '.join(replaced)} when it was imported; put back")
        self.graded.notes += [note for note in notes if note not in self.graded.notes]
        self.graded.suspicious = _sentences(message["suspicious"])
        self._expected = "steps"
        self._set_deadline()

    def _receive_done(self, message: dict[str, Any]) -> None:
        self._require(set(message) == {"done", "problem", "found", "ours", "tampered"})
        if tampered := _sentences(message["tampered"]):
            raise _ProtocolError(f"replaced what judges it: {', '.join(tampered)}")
        if message["problem"] is not None:
            self._fail_step(_sentence(message["problem"]))
        elif message["done"] == FINDINGS:
            self.graded.findings = _sentences(message["found"])
            self._pending.popleft()
        else:
            self._require(bool(self._probes))
            ours = _sentences(message["ours"])
            self.graded.results.append(CheckResult(self._pending.popleft(), self._probes, ours))
        self._probes = []
        self._set_deadline()

    @staticmethod
    def _require(condition: bool) -> None:
        if not condition:
            raise _ProtocolError("sent what the grader did not expect")

    def _fail_all(self, reason: str) -> None:
        while self._pending:
            self._fail_step(reason)

    def _fail_step(self, reason: str) -> None:
        step = self._pending.popleft()
        if step == FINDINGS and self.graded.error is None:
            self.graded.notes.append(f"no findings: {reason}")
        elif step != FINDINGS:
            self.graded.results.append(CheckResult(step, [ProbeResult(ENDED, reason)]))
        self._probes = []


class _Process:
    """A process that runs a job, and what it sends."""

    def __init__(self, job: Job, options: Options) -> None:
        context = (
            multiprocessing.get_context("fork")
            if can_be_copied()
            else multiprocessing.get_context("spawn")
        )
        self._job = job
        self._options = options
        self._channel, channel = context.Pipe(duplex=False)
        self._printed, printed = context.Pipe(duplex=False)
        self.open_pipes = [self._channel, self._printed]
        self.output = _Output()
        self._unread = b""
        self._exited = False
        self._process = context.Process(target=run_job, args=(job, channel, printed), daemon=True)
        self._process.start()
        self.pid = self._process.pid
        for pipe in (channel, printed):
            pipe.close()

    @property
    def has_ended(self) -> bool:
        """Whether no more messages will come: the process has exited or closed its pipe.

        It may have closed the pipe and still run, or have exited while another holds the pipe.
        """
        return self._exited or self._channel not in self.open_pipes

    def messages(self) -> Iterator[dict[str, Any]]:
        """Read the messages sent since the last call."""
        self._exited = self._process.exitcode is not None  # before reading what is left
        self.output.add(self._read(self._printed))
        self._unread += self._read(self._channel)
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            token, _, text = line.partition(b" ")
            if not secrets.compare_digest(token, self._job.token.encode()):
                raise _ProtocolError("wrote to the grader's pipe")
            try:
                message = json.loads(text)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                raise _ProtocolError("sent what the grader did not expect")
            yield message
        if len(self._unread) > MAX_LINE:
            raise _ProtocolError("wrote to the grader's pipe")

    def _read(self, pipe: connection.Connection) -> bytes:
        if pipe not in self.open_pipes or not pipe.poll():
            return b""
        try:
            # Not by the length at the start of a message, which a submission could forge.
            data = pipe.recv_bytes() if os.name == "nt" else os.read(pipe.fileno(), 2**20)
        except (EOFError, OSError):
            data = b""
        if not data:
            self.open_pipes.remove(pipe)
        return data

    def problem(self) -> str | None:
        """Return why the process must be ended, if it uses too much disk space."""
        if _uses_more(self._job.work_folder, self._options.disk_mb * 2**20):
            return f"wrote more than {self._options.disk_mb} MB or {MAX_FILES} files"
        return None

    def time_out(self) -> str:
        """Return the problem of a process that did not end in time."""
        return "did not come to an end in time"

    def end(self) -> int | None:
        """End it and all that it started, remove its folder, and return its exit status."""
        if self.has_ended:
            self._process.join(GRACE)
        status = self._process.exitcode
        if os.name == "nt":
            self._process.kill()
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self.pid is not None:
                    os.killpg(self.pid, signal.SIGKILL)
            if status is None:
                self._process.kill()
        self._process.join()
        while data := self._read(self._printed):
            self.output.add(data)
            if not self._printed.poll():
                break
        for pipe in (self._channel, self._printed):
            pipe.close()
        _remove(self._job.work_folder)
        return status

    def describe_end(self, status: int | None, folder: str) -> str:
        """Return why the process ended by itself."""
        text = self.output.text()
        if TRACEBACK in text:
            where = _innermost_place(text, folder)
            end = re.search(re.escape(TRACEBACK) + r"0:(\d+):(\d+)", text)
            seconds = f" after {60 * int(end[1]) + int(end[2])} s" if end else ""
            return f"still running{seconds}{where}"
        if status is None:
            return "closed the grader's pipe"
        if status >= 0:
            return f"ended its process with exit status {status}"
        if status == -getattr(signal, "SIGXCPU", 0):
            return "used up its processor time"
        if status == -signal.SIGSEGV:
            return "crashed its process (SIGSEGV)"
        return f"its process was ended by {signal.Signals(-status).name}"


class _Output:
    """The output of a process, without its middle if it is long."""

    def __init__(self) -> None:
        self._start, self._end, self._size = b"", b"", 0

    def add(self, data: bytes) -> None:
        """Append bytes."""
        self._size += len(data)
        room = KEPT_OUTPUT - len(self._start)
        self._start += data[:room]
        self._end = (self._end + data[room:])[-KEPT_OUTPUT:]

    def text(self) -> str:
        """Return the text, with the number of bytes left out in place of them."""
        dropped = self._size - len(self._start) - len(self._end)
        gap = f"\n... {dropped} bytes ...\n".encode() if dropped else b""
        return (self._start + gap + self._end).decode(errors="replace")


def _shortened(text: str) -> str:
    """Remove control characters, and cut the text to the length that is kept."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    return text if len(text) <= 2 * KEPT_OUTPUT else f"{text[: 2 * KEPT_OUTPUT]} ..."


def _sentence(value: Any) -> str:
    """Return a string from a message, on one line and not too long."""
    if not isinstance(value, str):
        raise _ProtocolError("sent what the grader did not expect")
    text = "".join(c if c.isprintable() else " " for c in value)
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 4]} ..."


def _snippet(value: Any) -> str:
    """Return the lines of code of a message, not too many; "" if it is too long."""
    if not isinstance(value, str):
        raise _ProtocolError("sent what the grader did not expect")
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in value)
    return text if len(text) <= MAX_SNIPPET else ""


def _sentences(value: Any) -> list[str]:
    """Return a list of strings from a message, each on one line and not too many."""
    if not isinstance(value, list):
        raise _ProtocolError("sent what the grader did not expect")
    return [_sentence(item) for item in value[:MAX_SENTENCES]]


def _uses_more(folder: str, size: int) -> bool:
    """Whether a folder holds more bytes, or files, than allowed."""
    files, folders = 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    files += 1
                    size -= entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    if size < 0 or files > MAX_FILES:
                        return True
        except FileNotFoundError:
            pass  # it was removed meanwhile
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return True
    return False


def _remove(folder: str) -> None:
    """Remove a folder, even if it is very deep or its parts are not writable."""
    if os.name == "nt":
        shutil.rmtree(folder, ignore_errors=True)
        return
    remove = ["rm", "-rf", "--", folder]
    if subprocess.run(remove, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["chmod", "-R", "u+rwx", folder], stderr=subprocess.DEVNULL)
        subprocess.run(remove)


def _innermost_place(text: str, folder: str) -> str:
    """Return the place in a submission where the first thread of a traceback was."""
    frames = re.findall(r'File "(.+)", line (\d+) in (\S+)', text.rpartition("Thread ")[2])
    for file, line, function in frames:
        if file.startswith(folder + os.sep):
            return f", in {function} ({os.path.relpath(file, folder)}, line {line})"
    return ""
