"""The folder of one training: what it takes to go on after a stop, and to know what was done.

run.json            settings, command, versions, state of the repository, data
checkpoint.pt       the last checkpoint: everything that the training goes on from
checkpoint-N.pt     those kept on request
best.pt             the model with the best validation mAP so far
history.jsonl       one line an iteration, and one an evaluation
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from eecs598.runtime import any_process, atomic_write, is_main_process, remove_unfinished
from eecs598.training.checkpoint import (
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)

__all__ = ["TrainingRun", "TrainingStopped", "ignore_signals"]

History = dict[str, list[float]]


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimizers, schedulers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]:
        """The state, of tensors, numbers, strings, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take on a state."""


class TrainingStopped(Exception):
    """A signal ended the training; its state was saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class TrainingRun:
    """Saves a training while it runs, and brings it back.

    With several processes, every one of them makes the same calls; the main process writes.

    Args:
        folder: of the run.
        settings: of the training, kept in every checkpoint.
        classes: class names in the order of their ids.
        checkpoint_every: iterations between two checkpoints; 0 for the end alone.
        keep_every: a checkpoint at a multiple of it stays as ``checkpoint-N.pt``; 0 for none.
        evaluate: gives the metrics of a model on the validation set, with their ``"mAP"``.
        eval_every: iterations between two evaluations; 0 for the end alone.
        plot: draws the history and the evaluations whenever a checkpoint is written.
        tensorboard: write the losses and the mAP for TensorBoard, too.
        resume: go on from ``folder/checkpoint.pt``.

    Raises:
        ValueError: a checkpoint that can't be read, or that holds a model alone; TensorBoard is
            not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        classes: Sequence[str],
        *,
        checkpoint_every: int = 0,
        keep_every: int = 0,
        evaluate: Callable[[nn.Module], dict[str, Any]] | None = None,
        eval_every: int = 0,
        plot: Callable[[History, Sequence[Mapping[str, float]]], Any] | None = None,
        tensorboard: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.settings, self.classes = dict(settings), list(classes)
        self.checkpoint_every, self.keep_every = checkpoint_every, keep_every
        self.evaluate, self.eval_every = evaluate, eval_every
        self.plot = plot
        self.evaluations: list[dict[str, float]] = []
        self.signal_number: int | None = None
        self._stopping = self._evaluating = False
        self._resumed_from = load_training(self.checkpoint_path) if resume else None
        self._written = 0  # iterations in history.jsonl
        self._tensorboard = None
        if tensorboard and is_main_process():
            self._tensorboard = _tensorboard_writer(self.folder, self.iteration)

    @property
    def iteration(self) -> int:
        """How many iterations the checkpoint that the run goes on from has done."""
        return 0 if self._resumed_from is None else self._resumed_from["iteration"]

    @property
    def checkpoint_path(self) -> Path:
        """The file that the training goes on from."""
        return self.folder / "checkpoint.pt"

    def restore(self, state: Mapping[str, Stateful]) -> History:
        """Load the checkpoint into what the training consists of, if the run is resumed.

        Returns:
            The history up to the checkpoint; empty at the start of a training.
        """
        saved, self._resumed_from = self._resumed_from, None
        history: History = {}
        if saved is not None:
            for name, part in state.items():
                # A gradient scaler that is not in use has none.
                if saved["state"][name]:
                    part.load_state_dict(saved["state"][name])
            restore_random_states(saved["random"])
            self.evaluations, history = saved["evaluations"], saved["history"]
        if is_main_process():
            # What a killed process began to write goes; what came after the checkpoint happens
            # again.
            remove_unfinished(self.folder)
            entries = [*_steps(history, 0), *self.evaluations]
            entries.sort(key=lambda entry: entry["iteration"])  # stable: evaluations come second
            with atomic_write(self.folder / "history.jsonl") as unfinished:
                unfinished.write_text(_json_lines(entries), encoding="utf-8")
        self._written = len(history.get("iteration", ()))
        return history

    def is_due(self, iteration: int, last: bool) -> bool:
        """Whether ``save`` has something to do; with several processes, all get one answer."""
        # Every iteration, since torchrun and schedulers leave a process half a minute to stop.
        self._stopping = any_process(self.signal_number is not None)
        periods = (self.checkpoint_every, self.keep_every, self.eval_every)
        at_period = any(_is_multiple(iteration, period) for period in periods)
        return last or self._stopping or at_period

    def save(
        self,
        iteration: int,
        model: nn.Module,
        state: Mapping[str, Stateful],
        history: History,
        last: bool,
    ) -> None:
        """Write a checkpoint and the history up to here, and evaluate when it is due.

        The checkpoint comes first: an evaluation takes minutes, and may fail or be interrupted.

        Args:
            iteration: that was done last.
            model: that detects best: the moving average where there is one.
            state: all that a training consists of.
            history: with one entry an iteration.
            last: whether the training ends here; then the model is evaluated in any case.

        Raises:
            FloatingPointError: the model has parameters that are not finite; what was saved
                before stays.
            TrainingStopped: there was a signal; everything but the evaluation is saved.
        """
        weights = model.state_dict()
        bad = [name for name, value in weights.items() if not _is_finite(value)]
        if bad:
            raise FloatingPointError(
                f"after iteration {iteration} the model's {bad[0]} is not finite any more. "
                f"{self.last_good()} Lower the learning rate, or clip the gradients."
            )
        self.write_history(history)
        self._write_checkpoints(iteration, weights, state, history)
        if self._stopping:
            raise self._stopped(iteration)
        if self.evaluation_is_due(iteration, last):
            self._evaluate(iteration, model)
            self._write_checkpoints(iteration, weights, state, history)

    def evaluation_is_due(self, iteration: int, last: bool) -> bool:
        """Whether the model of this iteration is to be evaluated, and was not yet."""
        if self.evaluate is None or not (last or _is_multiple(iteration, self.eval_every)):
            return False
        return not self.evaluations or self.evaluations[-1]["iteration"] < iteration

    def _stopped(self, iteration: int) -> TrainingStopped:
        number = self.signal_number or signal.SIGTERM
        return TrainingStopped(
            f"stopped by {signal.Signals(number).name} after iteration {iteration}; "
            f"`fcos train --resume --out {self.folder}` goes on from there.",
            number,
        )

    def _evaluate(self, iteration: int, model: nn.Module) -> None:
        self._evaluating = True
        try:
            if self.signal_number is not None:  # it came a moment ago
                raise KeyboardInterrupt
            mean = self.evaluate(model)["mAP"]
        except KeyboardInterrupt:
            raise self._stopped(iteration) from None
        finally:
            self._evaluating = False
        entry = {"iteration": iteration, "mAP": mean}
        best = entry["mAP"] > max((other["mAP"] for other in self.evaluations), default=-1.0)
        self.evaluations.append(entry)
        if is_main_process():
            self._append([entry])
            if best:
                weights = model.state_dict()
                save_checkpoint(
                    self.folder / "best.pt", weights, self.settings, self.classes, **entry
                )

    def _write_checkpoints(
        self,
        iteration: int,
        weights: dict[str, torch.Tensor],
        state: Mapping[str, Stateful],
        history: History,
    ) -> None:
        if not is_main_process():
            return
        paths = [self.checkpoint_path]
        if _is_multiple(iteration, self.keep_every):
            paths.append(self.folder / f"checkpoint-{iteration}.pt")
        for path in paths:
            save_checkpoint(
                path,
                weights,
                self.settings,
                self.classes,
                iteration=iteration,
                state={name: part.state_dict() for name, part in state.items()},
                random=random_states(),
                history=history,
                evaluations=self.evaluations,
            )
        if self.plot is not None:
            self.plot(history, self.evaluations)

    def last_good(self) -> str:
        """A sentence on what to go back to after something went wrong."""
        if self.checkpoint_path.is_file():
            return f"The last good checkpoint is {self.checkpoint_path}."
        return "There is no checkpoint yet."

    # ----------------------------------------------------------------------------------------
    # History
    # ----------------------------------------------------------------------------------------

    def write_history(self, history: History) -> None:
        """Append what is new in the history to its file."""
        if is_main_process():
            self._append(_steps(history, self._written))
            self._written = len(history.get("iteration", ()))

    def _append(self, entries: Iterable[Mapping[str, float]]) -> None:
        entries = list(entries)
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(_json_lines(entries))
        if self._tensorboard is not None:
            for entry in entries:
                for name in entry.keys() - {"iteration"}:
                    self._tensorboard.add_scalar(name, entry[name], entry["iteration"])
            self._tensorboard.flush()

    # ----------------------------------------------------------------------------------------
    # Signals
    # ----------------------------------------------------------------------------------------

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Within the block, Ctrl-C and SIGTERM are noted, and the training ends in good order.

        An evaluation is interrupted; it is made up for when the training goes on. A second Ctrl-C
        ends everything at once, as ever.
        """

        def note(number: int, _frame: object) -> None:
            self.signal_number = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._evaluating:
                raise KeyboardInterrupt

        # Python lets only the main thread do this.
        main = threading.current_thread() is threading.main_thread()
        previous = {number: signal.signal(number, note) for number in _SIGNALS if main}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ignore_signals(_worker: int) -> None:
    """For the processes that load data: signals often go to all, but the trainer ends them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def load_training(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint that a training can go on from.

    Raises:
        ValueError: there is none, or it holds a model alone.
    """
    checkpoint = load_checkpoint(path)
    if "state" not in checkpoint:
        raise ValueError(f"{path} holds a model alone; a training can't go on from it.")
    return checkpoint


def _steps(history: History, first: int) -> Iterator[dict[str, float]]:
    """The history iteration by iteration."""
    for position in range(first, len(history.get("iteration", ()))):
        yield {name: values[position] for name, values in history.items()}


def _is_multiple(iteration: int, period: int) -> bool:
    """Whether a period ends with this iteration; one of 0 never does."""
    return period > 0 and iteration % period == 0


def _json_lines(entries: Iterable[Mapping[str, float]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _tensorboard_writer(folder: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            'TensorBoard is not installed; `pip install -e ".[tensorboard]"` does it.'
        ) from error
    return SummaryWriter(folder, purge_step=iteration + 1)
