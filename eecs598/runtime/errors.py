"""Errors that come from the machine (memory, disk, killed processes), in plain words."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

import torch

__all__ = ["RunError", "explain", "explained"]

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

_NO_MEMORY = re.compile(
    r"can't allocate memory|CUDA error: out of memory|CUDA out of memory|_STATUS_ALLOC_FAILED"
    r"|Caught MemoryError"
)
_NO_SHARED_MEMORY = re.compile(r"torch_\d+_\d+_\d+>?: No space left|shared memory ?(limit|\(shm\))")
_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: [\w ]+|exited unexpect)"
)
_DEAD_PEER = re.compile(r"gloo/transport|ncclRemoteError|ncclSystemError")


class RunError(RuntimeError):
    """A run ended because of the machine; the message says why and what to do."""


@contextlib.contextmanager
def explained() -> Iterator[list[int]]:
    """Turn errors that ``explain`` knows into a ``RunError``.

    Yields:
        A list for the shape of the batch that is being worked on, ``(B, 3, H, W)``. It goes into
        the message where the memory was too small.
    """
    shape: list[int] = []
    try:
        yield shape
    except RunError:
        raise
    except Exception as error:
        text = explain(error, shape)
        if text is None:
            raise
        raise RunError(text) from error


def explain(error: Exception, batch_shape: list[int] | None = None) -> str | None:
    """Return what happened and what to do, for an error that comes from the machine.

    Args:
        error: any.
        batch_shape: ``(B, 3, H, W)`` of the batch that was being worked on, if there was one.

    Returns:
        One or two sentences; None for any other error.
    """
    text = str(error)
    number = getattr(error, "errno", None)
    if isinstance(error, OSError) and number in _FULL_DISK:
        return f"{error.filename or 'a file'} could not be written: {error.strerror}. Make room."
    if number == errno.EAGAIN:  # of fork
        return (
            "the system allows no further process, or has no memory for one. Use fewer processes "
            "(--workers), or raise the limit (ulimit -u)."
        )
    if _NO_SHARED_MEMORY.search(text):
        return (
            "/dev/shm, through which other processes hand over their images, is too small. Use "
            "fewer processes (--workers), or give the container more (--shm-size)."
        )
    no_memory = number == errno.ENOMEM or _NO_MEMORY.search(text)
    if no_memory or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        batch = ""
        if batch_shape:
            count, _, height, width = batch_shape
            batch = f" with {count} images of {width} x {height} pixels per step and process"
        return f"out of memory{batch}. " + (
            "Lower the number of processes (--workers), or leave out --cache."
            if "DataLoader worker" in text
            else "Lower the batch size or the image size."
        )
    if dead := _DEAD_WORKER.search(text):
        how = "was killed" if "killed" in dead[2] else "ended by itself"
        signal_name = f" ({dead[2].split(': ')[1].strip()})" if ": " in dead[2] else ""
        return (
            f"a process that loads images (pid {dead[1]}) {how}{signal_name}. When memory runs "
            "out, the system kills processes: lower --workers, or leave out --cache."
        )
    if _DEAD_PEER.search(text):
        return "another process of this run has ended; its own message says why."
    return None
