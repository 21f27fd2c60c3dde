"""What a check returns, and how it finds and words a fault."""

from __future__ import annotations

import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from eecs598.grading.answers import plain

__all__ = [
    "CheckResult",
    "ProbeResult",
    "Wrong",
    "expect",
    "expect_close",
    "isolated",
    "once",
    "place_in",
    "place_of",
    "show",
]


T = TypeVar("T")


class Wrong(Exception):
    """The submission did not do what a probe expects; the message says what, in one line."""


@dataclass(frozen=True)
class ProbeResult:
    """One question of a check and its answer.

    Attributes:
        label: what was looked at; stable, so that a rubric can refer to it.
        problem: what was wrong, in one line; None where nothing was.
    """

    label: str
    problem: str | None


@dataclass
class CheckResult:
    """The answers to all questions of a check."""

    name: str
    probes: list[ProbeResult] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything passed."""
        return not self.failed

    @property
    def passed(self) -> list[str]:
        """Labels of what passed."""
        return [probe.label for probe in self.probes if probe.problem is None]

    @property
    def failed(self) -> list[str]:
        """A sentence for each thing that did not pass."""
        return [f"{p.label}: {p.problem}" for p in self.probes if p.problem is not None]

    @contextmanager
    def probe(self, label: str) -> Iterator[None]:
        """Run a block of a check: whatever it raises is the answer, and the check goes on."""
        problem = None
        try:
            with isolated():
                yield
        except Wrong as wrong:
            problem = str(wrong)
        except (Exception, SystemExit) as error:
            place = place_of(error)
            problem = _one_line(f"raised {type(error).__name__}: {error}")
            problem += f" ({place})" if place else ""
        self.probes.append(ProbeResult(label, problem))


@contextmanager
def isolated() -> Iterator[None]:
    """Seeded random generators, no output and no warnings inside; outside, all as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only the CPU's generator: nothing here runs elsewhere, and torch.manual_seed would change
    # the generators of GPUs, too.
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
    """Call a function at most once and give its result, or what it raised, to everybody."""
    outcome: list[tuple[T | None, Exception | None]] = []

    def first_outcome() -> T:
        if not outcome:
            try:
                outcome.append((function(), None))
            except Exception as error:
                outcome.append((None, error))
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    return first_outcome


def place_of(error: BaseException) -> str | None:
    """File and line of a submission in which an exception was raised, if it came through one."""
    places = [place_in(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((place for place in reversed(places) if place), None)


def place_in(frame: FrameType, line: int) -> str | None:
    """File and line of a frame in a submission; None where it is elsewhere."""
    name = frame.f_globals.get("__name__") or ""
    # Imported as they are, or by eecs598.grading.loading.
    if name in ("common", "one_stage_detector", "a4_helper") or name.startswith("submission."):
        return f"{name.removeprefix('submission.').replace('.', '/')}.py, line {line}"
    return None


def expect(condition: bool, sentence: str) -> None:
    """Raise ``Wrong`` with the sentence unless the condition holds."""
    if not condition:
        raise Wrong(_one_line(sentence))


def expect_close(
    what: str, got: object, expected: Tensor | Sequence | float, tolerance: float = 0.0
) -> None:
    """Raise ``Wrong`` unless ``got`` is a tensor with the expected shape and values.

    Args:
        what: the input, for the sentence.
        got: what the submission returned.
        expected: what it should have returned; the data type is not compared.
        tolerance: allowed difference, both absolute and relative.
    """
    got, expected = plain(got), torch.as_tensor(expected)
    if not isinstance(got, Tensor):
        raise Wrong(f"{what}: expected a tensor, got {show(got)}")
    if got.shape != expected.shape:
        raise Wrong(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    got, expected = got.detach().cpu().double(), expected.detach().double()
    close = torch.isclose(got, expected, rtol=tolerance, atol=tolerance)
    if close.all():
        return
    where = ""
    if expected.dim() > 0 and expected.numel() > 8:  # too long for a line: the first wrong row
        first = (~close).nonzero()[0].tolist()
        row = tuple(first[:-1] if expected.shape[-1] <= 8 else first)
        got, expected, where = got[row], expected[row], f", row {show(row).strip('[]')}"
    digits = 6 if show(got) != show(expected) else 12
    sentence = f"{what}{where}: expected {show(expected, digits)}, got {show(got, digits)}"
    raise Wrong(_one_line(sentence))


def show(value: object, digits: int = 6) -> str:
    """A short form of a value for a sentence."""
    value = plain(value)
    if isinstance(value, Tensor):
        if value.numel() > 20:
            return f"a tensor of shape {tuple(value.shape)}"
        return show(value.tolist(), digits)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(show(item, digits) for item in value)}]"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:.2f}"
    return _one_line(repr(value), 80)


def _one_line(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."
