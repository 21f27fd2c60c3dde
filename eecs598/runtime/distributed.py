"""Distributed training: several processes, one per GPU.

``torchrun --nproc-per-node N -m fcos train ...`` starts the processes and gives each its rank in
the environment. Without ``torchrun`` there is one process, and every function here does what one
process needs, so that callers need not distinguish the two cases.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "any_process",
    "broadcast_buffers",
    "gather",
    "is_main_process",
    "mean_over_processes",
    "num_processes",
    "process_group",
    "rank",
]


@contextlib.contextmanager
def process_group(device: str, *, timeout: timedelta | None = None) -> Iterator[str]:
    """Join the processes that ``torchrun`` started, if any, and leave the group at the end.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for one GPU per process. Tensors on a GPU are exchanged
            with NCCL, others with Gloo.
        timeout: how long a process waits for the others; PyTorch's own limit unless given.

    Yields:
        The device of this process: ``"cpu"``, ``"cuda"``, or ``"cuda:N"`` in a group.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # set by torchrun alone
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo"
    dist.init_process_group(backend, timeout=timeout)
    yield device
    # Not after an error: the others may be waiting for this process and notice only that it ends.
    dist.destroy_process_group()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def num_processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _in_group() else 1


def is_main_process() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; every process has to call it."""
    if num_processes() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)  # a sum, because Gloo has no mean
    return value / num_processes()


def any_process(flag: bool) -> bool:
    """Return whether the flag is set in at least one process; every process has to call it."""
    if num_processes() == 1:
        return flag
    flags = torch.tensor(float(flag))  # on the CPU, so as not to wait for a GPU
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the main process's buffers to every process; every process has to call it.

    Parameters stay equal by themselves, but each process has seen other images, so the statistics
    of batch norm differ between processes, and with them the detections.
    """
    if num_processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: Any) -> list[Any]:
    """Return the value of each process, in the order of their ranks; every process has to call it.

    Args:
        value: anything that can be pickled.
    """
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values
