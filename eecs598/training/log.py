"""The log of a training run: history of the losses, log lines, progress bar and plot."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from eecs598.runtime import (
    atomic_write,
    gather,
    is_main_process,
    mean_over_processes,
    num_processes,
)
from eecs598.training.run import History, TrainingRun
from eecs598.utils import in_notebook_or_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TrainingLogger", "plot_losses", "show_progress"]


class _Step(NamedTuple):
    """One iteration whose losses are still on the device."""

    iteration: int
    learning_rate: float
    losses: dict[str, Tensor]
    paths: Sequence[str]


class TrainingLogger:
    """Keeps the history of a training run and prints its progress.

    Losses stay on the device until a log line or a checkpoint needs them, so that a step never
    waits for the device. With several processes, every one of them makes the same calls; the
    history has the means over them, and the main process prints.

    Args:
        history: of the iterations done so far; new ones are appended.
        max_iters: iterations of the whole run.
        run: gets the history whenever a line is printed.
    """

    def __init__(self, history: History, max_iters: int, run: TrainingRun | None = None) -> None:
        self.history, self.max_iters, self.run = history, max_iters, run
        self.pending: list[_Step] = []
        self.logged = len(history.get("iteration", ()))  # iterations up to the last log line
        self.bar = tqdm(
            total=max_iters,
            initial=self.logged,
            desc="training",
            unit="it",
            disable=not show_progress(),
        )
        self.restart_clock()

    def __enter__(self) -> TrainingLogger:
        """Return the logger; the progress bar is closed at the end of the block."""
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Close the progress bar, and after an error write the history as far as it is known."""
        self.bar.close()
        if error is None or self.run is None:
            return
        with contextlib.suppress(Exception):  # the device or the disk may be what failed
            if num_processes() == 1:  # the others do not make this call
                self.flush()
        with contextlib.suppress(OSError):
            self.run.write_history(self.history)

    def restart_clock(self) -> None:
        """Measure the speed from here on."""
        self.images, self.iterations, self.since = 0, 0, time.perf_counter()

    def step(
        self,
        iteration: int,
        learning_rate: float,
        losses: Mapping[str, Tensor],
        paths: Sequence[str],
    ) -> None:
        """Record an iteration, without waiting for the device.

        Args:
            iteration: counted from 1.
            learning_rate: of this iteration.
            losses: ``"loss"`` and its parts, scalars.
            paths: of the images of the batch.
        """
        values = {name: loss.detach() for name, loss in losses.items()}
        self.pending.append(_Step(iteration, learning_rate, values, paths))
        self.images += len(paths) * num_processes()
        self.iterations += 1
        self.bar.update()

    def flush(self) -> History:
        """Move the losses that are still on the device to the history, and return it.

        Raises:
            FloatingPointError: a loss is NaN or infinite; the message names the images.
        """
        if not self.pending:
            return self.history
        names = list(self.pending[0].losses)
        values = torch.stack([torch.stack(list(s.losses.values())) for s in self.pending])
        rows = mean_over_processes(values).tolist()
        pending, self.pending = self.pending, []
        for step, row in zip(pending, rows, strict=True):
            parts = dict(zip(names, row, strict=True))
            if not all(map(math.isfinite, row)):
                if self.run is not None:
                    self.run.write_history(self.history)  # up to the iteration before
                paths = [path for paths in gather(step.paths) for path in paths]
                raise FloatingPointError(
                    f"the loss became {parts['loss']} at iteration {step.iteration} (parts: "
                    f"{parts}). The batch: {', '.join(paths)}. "
                    + (f"{self.run.last_good()} " if self.run is not None else "")
                    + "Look at these files, lower the learning rate, or clip the gradients."
                )
            entry = {"iteration": step.iteration, "lr": step.learning_rate, **parts}
            for name, value in entry.items():
                self.history.setdefault(name, []).append(value)
        return self.history

    def log(self) -> None:
        """Print a line with the means since the last one."""
        history = self.flush()
        if self.run is not None:
            self.run.write_history(history)
        iteration, learning_rate = int(history["iteration"][-1]), history["lr"][-1]
        count = iteration - self.logged
        means = {
            name: sum(values[-count:]) / count
            for name, values in history.items()
            if name not in ("iteration", "lr")
        }
        seconds = time.perf_counter() - self.since
        speed = self.images / seconds
        left = round((self.max_iters - iteration) * seconds / self.iterations)
        self.logged = iteration
        self.restart_clock()
        if is_main_process():
            parts = "".join(f"[{name}: {value:.3f}]" for name, value in means.items())
            self.bar.write(
                f"[Iter {iteration}]{parts} lr {learning_rate:.1e}, {speed:.1f} images/s, "
                f"{datetime.timedelta(seconds=left)} left"
            )
            self.bar.set_postfix(
                loss=f"{means['loss']:.3f}", lr=f"{learning_rate:.1e}", images_s=f"{speed:.1f}"
            )


def show_progress() -> bool:
    """Whether to draw progress bars: in a file, a bar that is redrawn would make a mess."""
    return is_main_process() and (in_notebook_or_window() or sys.stderr.isatty())


def plot_losses(
    history: Mapping[str, Sequence[float]],
    path: str | os.PathLike | None = None,
    evaluations: Sequence[Mapping[str, float]] = (),
) -> Axes:
    """Plot the loss of a training run and its parts, smoothed, over the iterations.

    Args:
        history: as returned by ``a4_helper.train_detector``.
        path: save the plot here; shown in a notebook or a window unless given.
        evaluations: ``{"iteration", "mAP"}`` each, drawn on an axis of their own.
    """
    from matplotlib.figure import Figure

    show = path is None and in_notebook_or_window()
    if show:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(8, 5))
    else:
        figure = Figure(figsize=(8, 5))
    ax = figure.add_subplot()
    iterations = torch.tensor(history["iteration"])
    lines = []
    for name in (key for key in history if key not in ("iteration", "lr")):
        values = torch.tensor(history[name])
        # A running mean over about 2 % of the run shows the trend through the noise.
        window = max(1, len(values) // 50)
        smooth = values.unfold(0, window, 1).mean(dim=1)
        width = 2.4 if name == "loss" else 1.4
        (line,) = ax.plot(iterations[window - 1 :], smooth, linewidth=width, label=name)
        lines.append(line)
        if name == "loss":
            ax.plot(iterations, values, linewidth=0.5, alpha=0.25, color=line.get_color())
    ax.set(title="training loss", xlabel="iteration", ylabel="loss")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    if evaluations:
        twin = ax.twinx()
        steps = [entry["iteration"] for entry in evaluations]
        percent = [100 * entry["mAP"] for entry in evaluations]
        lines += twin.plot(steps, percent, "ko-", markersize=4, label="validation mAP")
        twin.set(ylabel="mAP@0.5 in %", ylim=(0, 100))
    ax.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(lines))
    if path is not None:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, bbox_inches="tight")
    if show:
        plt.show()
    return ax
