"""The folder of a training run: description, checkpoints, history; stopping and resuming.

run.json            recipe, settings, data, command, versions, state of the repository
checkpoint.pt       the last checkpoint: everything that the run continues from
checkpoint-N.pt     those kept on request
best.pt             the model with the best validation mAP so far
history.jsonl       one line per iteration, and one per evaluation
loss.png            losses and validation mAP over the iterations
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from eecs598.runtime import (
    RunError,
    any_process,
    atomic_write,
    explained,
    is_main_process,
    remove_unfinished,
    write_json,
)
from eecs598.training.checkpoint import (
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from eecs598.training.settings import Settings

__all__ = [
    "History",
    "RunDescription",
    "Stateful",
    "TrainingRun",
    "TrainingStopped",
]

# Name -> one number per iteration: "iteration", "lr", "loss", and each part of the loss.
History = dict[str, list[float]]

Plot = Callable[[History, Path, Sequence[Mapping[str, float]]], Any]


class Stateful(Protocol):
    """What a checkpoint can hold: modules, optimizers, schedulers, gradient scalers."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of tensors, numbers, strings, lists and dicts."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Continue from a state."""
        ...


class TrainingStopped(Exception):
    """A signal ended the training run; its state was saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


# --------------------------------------------------------------------------------------------
# Description
# --------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class RunDescription:
    """What a run was started with: the content of ``run.json``.

    Attributes:
        out: folder of the run.
        recipe: name of the recipe that the settings started from.
        settings: of the run.
        data: absolute path of the data set.
        class_names: in the order of their ids.
        environment: what ``describe_environment`` returned, once per start of the run.
        contents: number of images and objects of each split; empty until the data is read.
    """

    out: Path
    recipe: str
    settings: Settings
    data: str
    class_names: list[str]
    environment: list[dict[str, Any]]
    contents: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> RunDescription:
        """Read the description of a run.

        Raises:
            ValueError: the folder has none, or one that can't be read.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return cls(
                out=folder,  # it may have moved
                recipe=values["recipe"],
                settings=Settings.from_dict(values["settings"]),
                data=values["data"],
                class_names=values["classes"],
                environment=values["environment"],
                contents=values["contents"],
            )
        except KeyError as error:
            raise ValueError(f"{folder / 'run.json'} has no entry {error}.") from error
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder} is no folder that a training run could continue in: {error}."
            ) from error

    @classmethod
    def latest_unfinished(cls, runs: str | os.PathLike) -> RunDescription:
        """Read the description of the run in a folder of runs that was started last.

        Raises:
            ValueError: every run in it has its metrics.
        """
        folders = [path.parent for path in Path(runs).glob("*/run.json")]
        unfinished = [folder for folder in folders if not (folder / "metrics.json").exists()]
        if not unfinished:
            raise ValueError(f"no unfinished training run in {runs}/; name its folder with --out.")
        return cls.read(max(unfinished, key=lambda each: (each / "run.json").stat().st_mtime))

    def check_contents(self, contents: dict[str, Any]) -> None:
        """Compare the data with what it was when the run began.

        Raises:
            ValueError: it has other images or objects now.
        """
        if self.contents and self.contents != contents:
            raise ValueError(
                f"{self.data} has changed since the training run in {self.out} began: it had "
                f"{self.contents} and has {contents}. Bring back the old data, or start another "
                "run."
            )
        self.contents = contents

    def write(self) -> None:
        """Write ``run.json``."""
        write_json(
            self.out / "run.json",
            {
                "out": str(self.out),
                "recipe": self.recipe,
                "settings": self.settings.to_dict(),
                "data": self.data,
                "classes": self.class_names,
                "environment": self.environment,
                "contents": self.contents,
            },
        )

    def change(self, recipe: str | None, changed: Mapping[str, Any]) -> None:
        """Take on settings that the user gave when the run is continued.

        Args:
            recipe: name of a recipe, or None.
            changed: value by the name of the setting.

        Raises:
            ValueError: another recipe, or another value of a setting that decides the result.
        """
        kept = {"recipe": self.recipe, **self.settings.values()}
        given = {"recipe": recipe or self.recipe, **changed}
        for name, value in given.items():
            if value != kept[name] and not hasattr(self.settings.run, name):
                raise ValueError(
                    f"{self.out} was started with {name} {kept[name]}, and now {value} was given. "
                    "A training run continues with the settings that it began with; leave the "
                    "option out, or start another run."
                )
        self.settings = self.settings.replace(**changed)


# --------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------


class TrainingRun:
    """Saves a training run while it is under way, and restores it after a stop.

    With several processes, every one of them makes the same calls; the main process writes.

    Args:
        folder: of the run.
        settings: of the run, kept in every checkpoint.
        class_names: in the order of their ids.
        checkpoint_every: iterations between two checkpoints; 0 for the end alone.
        keep_every: a checkpoint at a multiple of it stays as ``checkpoint-N.pt``; 0 for none.
        evaluate: returns the mAP of a model on the validation set.
        eval_every: iterations between two evaluations; 0 for the end alone.
        plot: draws the history and the evaluations into a file whenever a checkpoint is written:
            ``eecs598.training.plot_losses``.
        tensorboard: write the losses and the mAP for TensorBoard, too.
        resume: continue from ``folder/checkpoint.pt``.

    Raises:
        ValueError: a checkpoint that can't be read, or that holds a model alone; TensorBoard is
            not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        *,
        checkpoint_every: int = 0,
        keep_every: int = 0,
        evaluate: Callable[[Any], float] | None = None,
        eval_every: int = 0,
        plot: Plot | None = None,
        tensorboard: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.settings, self.class_names = dict(settings), list(class_names)
        self.checkpoint_every, self.keep_every = checkpoint_every, keep_every
        self.evaluate, self.eval_every = evaluate, eval_every
        self.plot = plot
        self.evaluations: list[dict[str, float]] = []
        self.signal_number: int | None = None
        self._stopping = self._evaluating = False
        self._resumed_from = _load_training(self.checkpoint_path) if resume else None
        self._written = 0  # iterations in history.jsonl
        self._tensorboard = None
        if tensorboard and is_main_process():
            self._tensorboard = _tensorboard_writer(self.folder, self.iteration)

    @property
    def iteration(self) -> int:
        """Number of iterations done in the checkpoint that the run continues from."""
        return 0 if self._resumed_from is None else self._resumed_from["iteration"]

    @property
    def checkpoint_path(self) -> Path:
        """The file that the run continues from."""
        return self.folder / "checkpoint.pt"

    def restore(self, state: Mapping[str, Stateful]) -> History:
        """Load the checkpoint into the parts of the training, if the run is resumed.

        Args:
            state: detector, optimizer and whatever else was given to ``save``, by name.

        Returns:
            The history up to the checkpoint; empty at the start of a run.
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
            # Remove what a killed process began to write, and the iterations after the
            # checkpoint, which are done again.
            remove_unfinished(self.folder)
            entries = [*_steps(history, 0), *self.evaluations]
            entries.sort(key=lambda entry: entry["iteration"])  # stable: evaluations come second
            with atomic_write(self.folder / "history.jsonl") as unfinished:
                unfinished.write_text(_json_lines(entries), encoding="utf-8")
        self._written = len(history.get("iteration", ()))
        return history

    # ----------------------------------------------------------------------------------------
    # Checkpoints and evaluations
    # ----------------------------------------------------------------------------------------

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
            model: to evaluate: the moving average where there is one.
            state: all parts of the training that a checkpoint has to hold, by name.
            history: with one entry per iteration.
            last: whether the run ends here; then the model is evaluated in any case.

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
        assert self.evaluate is not None
        self._evaluating = True
        try:
            if self.signal_number is not None:  # it came while the checkpoint was written
                raise KeyboardInterrupt
            entry = {"iteration": iteration, "mAP": self.evaluate(model)}
        except KeyboardInterrupt:
            raise self._stopped(iteration) from None
        finally:
            self._evaluating = False
        is_best = entry["mAP"] > max((other["mAP"] for other in self.evaluations), default=-1.0)
        self.evaluations.append(entry)
        if is_main_process():
            self._append([entry])
            if is_best:
                path, weights = self.folder / "best.pt", model.state_dict()
                save_checkpoint(path, weights, self.settings, self.class_names, **entry)

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
                self.class_names,
                iteration=iteration,
                state={name: part.state_dict() for name, part in state.items()},
                random=random_states(),
                history=history,
                evaluations=self.evaluations,
            )
        if self.plot is not None:
            self.plot(history, self.folder / "loss.png", self.evaluations)

    def last_good(self) -> str:
        """Return a sentence on what to go back to after something went wrong."""
        if self.checkpoint_path.is_file():
            return f"The last good checkpoint is {self.checkpoint_path}."
        return "There is no checkpoint yet."

    @contextmanager
    def explaining_errors(self) -> Iterator[list[int]]:
        """Within the block, let errors say what to go back to; see ``explained``, too."""
        try:
            with explained() as batch_shape:
                yield batch_shape
        except RunError as error:
            raise RunError(f"{error} {self.last_good()}") from error.__cause__
        except (TrainingStopped, FloatingPointError):  # their messages have it
            raise
        except Exception:
            print(f"fcos: the training run failed. {self.last_good()}", file=sys.stderr)
            raise

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
        path, lines = self.folder / "history.jsonl", _json_lines(entries).encode()
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(lines)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
            if written < len(lines):
                file.truncate(size)  # no half lines
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
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
        """Within the block, record Ctrl-C and SIGTERM, so that the run stops after its iteration.

        An evaluation is interrupted; it is repeated when the run is resumed. A second Ctrl-C ends
        everything at once, as usual.
        """

        def note(number: int, _frame: FrameType | None) -> None:
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


def _load_training(path: Path) -> dict[str, Any]:
    """Read a checkpoint that holds more than a model."""
    checkpoint = load_checkpoint(path)
    if "state" not in checkpoint:
        raise ValueError(f"{path} holds a model alone; a training run can't continue from it.")
    return checkpoint


def _steps(history: History, first: int) -> Iterator[dict[str, float]]:
    """Yield the history iteration by iteration."""
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
