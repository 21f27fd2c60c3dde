"""Results of checks, and the assertion functions that checks use."""

from __future__ import annotations

import os
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from types import FrameType
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from eecs598.grading.answers import to_plain_data

__all__ = [
    "CheckResult",
    "Probe",
    "ProbeResult",
    "CheckFailure",
    "TookTooLong",
    "call_snippet",
    "expect",
    "expect_close",
    "is_trial",
    "isolated",
    "once",
    "place_in",
    "place_of",
    "show",
    "trial",
]

T = TypeVar("T")

# Not empty while the result of a check is not the submission's own, but a trial.
_trials: list[object] = []

ENDED = "runs to its end"  # label of the probe that fails if the process of a check ends


class CheckFailure(Exception):
    """A submission did not do what a probe expects.

    Args:
        sentence: says what, in one line.
        snippet: lines of Python that call the submission with the same input, if that is too long
            for the sentence.
    """

    def __init__(self, sentence: str, snippet: str = "") -> None:
        super().__init__(sentence)
        self.snippet = snippet


class TookTooLong(Exception):
    """Raised in the code of a submission when its time is up."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of one probe, the smallest part of a check that passes or fails.

    Attributes:
        label: what was tested; it stays the same, so that a rubric can refer to it.
        problem: what was wrong, in one line; None if the probe passed.
        snippet: lines of Python with the input that shows the problem, "" if the line has it.
    """

    label: str
    problem: str | None
    snippet: str = ""

    @property
    def ran_out_of_time(self) -> bool:
        """Whether the probe was interrupted, or ended its process."""
        return self.problem is not None and (
            self.problem.startswith(f"raised {TookTooLong.__name__}") or self.label == ENDED
        )


Probe = AbstractContextManager[None]


@contextmanager
def trial() -> Iterator[None]:
    """Run checks in the block as a trial, whose results do not count."""
    _trials.append(None)
    try:
        yield
    finally:
        _trials.pop()


def is_trial() -> bool:
    """Whether checks run as a trial."""
    return bool(_trials)


@dataclass
class CheckResult:
    """The results of all probes of a check.

    Attributes:
        name: of the check.
        probes: in the order in which they ran.
        with_ours: parts of the detector, in words, that were the reference solution's in this
            check, because the submission's own are missing or fail their own check.
        wrap_probe: a function that is given each result and probe before the probe runs, and
            returns the context manager to use in its place. The sandbox sets it to limit the time
            of probes and to send their results.
    """

    name: str
    probes: list[ProbeResult] = field(default_factory=list)
    with_ours: list[str] = field(default_factory=list)
    wrap_probe: ClassVar[Callable[[CheckResult, Probe], Probe] | None] = None

    @property
    def ok(self) -> bool:
        """Whether all probes passed."""
        return not self.failed

    @property
    def passed(self) -> list[str]:
        """Labels of the probes that passed."""
        return [probe.label for probe in self.probes if probe.problem is None]

    @property
    def failed(self) -> list[str]:
        """Label and problem of each probe that failed."""
        return [f"{p.label}: {p.problem}" for p in self.probes if p.problem is not None]

    def probe(self, label: str) -> Probe:
        """Return a context manager that runs its block as a probe.

        What the block raises is recorded as the problem of the probe, and the check continues.
        """
        probe, wrap = self._run_probe(label), type(self).wrap_probe
        return probe if wrap is None else wrap(self, probe)

    @contextmanager
    def _run_probe(self, label: str) -> Iterator[None]:
        problem, snippet = None, ""
        try:
            with isolated():
                yield
        except CheckFailure as failure:
            problem, snippet = str(failure), failure.snippet
        except (Exception, SystemExit) as error:
            place = place_of(error)
            problem = _one_line(f"raised {type(error).__name__}: {error}")
            problem += f" ({place})" if place else ""
        self.probes.append(ProbeResult(label, problem, snippet))


@contextmanager
def isolated() -> Iterator[None]:
    """Run the block with seeded random generators and without output or warnings.

    Afterwards, the generators, streams and warning filters are as before.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only the CPU's generator: checks run on the CPU, and torch.manual_seed would change the
    # generators of GPUs, too.
    with (
        torch.random.fork_rng(devices=[]),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def once(function: Callable[[], T]) -> Callable[[], T]:
    """Wrap a function so that it runs once; later calls return, or raise, the same again."""
    results: list[T] = []
    errors: list[Exception] = []

    def first_outcome() -> T:
        if not results and not errors:
            try:
                results.append(function())
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results[0]

    return first_outcome


def place_of(error: BaseException) -> str | None:
    """Return the innermost file and line of a submission in a traceback; None if there is none."""
    places = [place_in(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((place for place in reversed(places) if place), None)


def place_in(frame: FrameType, line: int) -> str | None:
    """Return file and line of a frame in a submission; None for a frame of other code."""
    name = frame.f_globals.get("__name__") or ""
    # Imported under their own names, or by eecs598.grading.loading.
    if name in ("common", "one_stage_detector", "a4_helper") or name.startswith("submission."):
        file = name.removeprefix("submission.").replace(".", "/")
        if file.endswith("_ipynb"):  # its lines are those of the code cells, one after the other
            return f"{file.removesuffix('_ipynb')}.ipynb, line {line} of its code"
        return f"{file}.py, line {line}"
    return None


def expect(condition: bool, sentence: str, snippet: str = "") -> None:
    """Raise ``CheckFailure`` with sentence and snippet unless the condition is true."""
    if not condition:
        raise CheckFailure(_one_line(sentence), snippet)


def expect_close(
    what: str,
    got: object,
    expected: Tensor | Sequence[object] | float,
    tolerance: float = 0.0,
    snippet: str = "",
) -> None:
    """Raise ``CheckFailure`` unless ``got`` is a tensor with the expected shape and values.

    Args:
        what: the input, for the message.
        got: the value that the submission returned.
        expected: the value that it should have returned; data types are not compared.
        tolerance: allowed difference, both absolute and relative.
        snippet: of the failure.
    """
    got, expected = to_plain_data(got), torch.as_tensor(expected)
    if not isinstance(got, Tensor):
        raise CheckFailure(f"{what}: expected a tensor, got {show(got)}", snippet)
    if got.shape != expected.shape:
        raise CheckFailure(
            f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}", snippet
        )
    got, expected = got.detach().cpu().double(), expected.detach().double()
    close = torch.isclose(got, expected, rtol=tolerance, atol=tolerance)
    if close.all():
        return
    where = ""
    if expected.dim() > 0 and expected.numel() > 8:  # too long for a line: show the first wrong row
        first = (~close).nonzero()[0].tolist()
        row = tuple(first[:-1] if expected.shape[-1] <= 8 else first)
        got, expected, where = got[row], expected[row], f", row {show(row).strip('[]')}"
    digits = next((d for d in (6, 8, 10) if show(got, d) != show(expected, d)), 12)
    sentence = f"{what}{where}: expected {show(expected, digits)}, got {show(got, digits)}"
    raise CheckFailure(_one_line(sentence), snippet)


def show(value: object, digits: int = 6) -> str:
    """Format a value for a sentence, shortened."""
    value = to_plain_data(value)
    if isinstance(value, Tensor):
        if value.numel() > 20:
            return f"a tensor of shape {tuple(value.shape)}"
        return show(value.tolist(), digits)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(item, digits) for item in value)}]"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e12:
            return f"{int(value)}"
        return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:.2f}"
    return _one_line(repr(value), 80)


def call_snippet(function: str, *arguments: object, **options: object) -> str:
    """Return Python code that calls a function of the assignment, given as "module.name".

    Tensors are written out, however many values they have.
    """
    module, _, name = function.partition(".")
    texts = [_code(value) for value in arguments]
    texts += [f"{key}={_code(value)}" for key, value in options.items()]
    call = f"{name}({', '.join(texts)})"
    imports = "import torch; " if "torch." in call else ""
    return f"{imports}from {module} import {name}\nprint({call})"


def _code(value: object) -> str:
    """Return Python code for a value; numbers in the fewest digits that give them exactly."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return f"torch.zeros({', '.join(map(str, value.shape))})"
        if value.is_floating_point():
            return f"torch.tensor({_floats(value.detach().numpy())})"
        return f"torch.tensor({value.tolist()})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_code(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _floats(values: np.ndarray) -> str:
    text = _nested(values)
    # One point makes all of them floats; without the others, boxes are easier to read.
    if "." not in text and "e" not in text:
        text = re.sub(r"\d+", r"\g<0>.", text, count=1)
    return text


def _nested(values: np.ndarray) -> str:
    if values.ndim > 0:
        return f"[{', '.join(_nested(row) for row in values)}]"
    return str(int(values)) if float(values).is_integer() else str(values)


def _one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
