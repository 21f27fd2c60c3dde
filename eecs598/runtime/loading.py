"""Processes that load data: how many of them there is room for, and how they end."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from eecs598.runtime.distributed import is_main_process

__all__ = ["batches_of", "fit_workers", "make_loader"]

T = TypeVar("T")

# Where tensors are on their way from a process that loads them; containers often limit it to 64 MB.
_SHARED_MEMORY = "/dev/shm"

_BATCHES_AHEAD = 2  # per process: PyTorch's default

_running: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # all that load data for this process


def make_loader(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Make a loader whose processes outlive signals and whose random numbers are its own.

    Signals such as Ctrl-C are often sent to all processes; those that load data go on until this
    one has saved its state and ends them. Iterate over it with ``batches_of``.

    Args:
        dataset: to load.
        num_workers: number of processes that load.
        options: of ``torch.utils.data.DataLoader``.
    """
    return DataLoader(
        dataset,
        num_workers=num_workers,
        worker_init_fn=_prepare_worker,
        generator=torch.Generator(),  # the global one must not depend on the loader
        **options,
    )


@contextlib.contextmanager
def batches_of(loader: Iterable[T]) -> Iterator[Iterator[T]]:
    """Iterate over a loader within the block, and end its processes with the block.

    Without it, they stay as long as something refers to the iterator, such as the traceback of an
    error.

    Args:
        loader: a ``DataLoader``, or any other iterable.

    Yields:
        An iterator over the batches.
    """
    before = set(multiprocessing.active_children())
    try:
        iterator = iter(loader)
    finally:  # where not all of them could be started, too
        workers = set(multiprocessing.active_children()) - before
        _running.update(workers)
    try:
        yield iterator
    finally:
        # Persistent ones wait for the next loop.
        if not getattr(loader, "persistent_workers", False):
            # PyTorch does this when the last reference is gone.
            getattr(iterator, "_shutdown_workers", lambda: None)()
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join()


@atexit.register
def _end_workers() -> None:
    """End the processes of a loop that was never finished.

    Python would send them SIGTERM, which they ignore, and wait for ever.
    """
    if not _running:
        return
    # PyTorch's handler takes the end of a process for an error.
    with contextlib.suppress(ValueError, AttributeError):  # another thread, or Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in list(_running):
        with contextlib.suppress(ValueError, AssertionError):  # closed, or of another process
            worker.kill()


def _prepare_worker(_worker: int) -> None:
    """Set up a process that loads data."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _send_error(queue: Any, error: BaseException, item: Any) -> None:
    """Send the error in place of a batch that could not be sent.

    Python only prints it, and the process that waits for the batch would wait for ever.
    """
    number, _ = item
    queue.put((number, ExceptionWrapper((type(error), error, error.__traceback__))))


def fit_workers(num_workers: int, *batches: tuple[int, int, int]) -> int:
    """Lower a number of loader processes to what the shared memory has room for, and say so.

    Args:
        num_workers: wished for.
        batches: number, height and width of the images of a batch, for each of the loaders that
            are in use at the same time. Images are in RGB and float32.

    Returns:
        At most ``num_workers``; 0 where not even one process has room.
    """
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # not Linux
        return num_workers
    # On a machine, torchrun's processes share the memory.
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch_bytes = sum(12 * count * height * width for count, height, width in batches)
    # Besides what is loaded ahead: the batch in use, and the next one in the moment of its arrival.
    room = (free // batch_bytes - 2) // _BATCHES_AHEAD
    fitting = max(0, min(num_workers, room))
    if fitting < num_workers and is_main_process():
        print(
            f"fcos: {_SHARED_MEMORY} has {free / 2**20:.0f} MB free for batches of "
            f"{batch_bytes / 2**20:.1f} MB, too little for {num_workers} processes that load "
            f"images; it will be {fitting}. A container gets more with --shm-size.",
            file=sys.stderr,
        )
    return fitting
