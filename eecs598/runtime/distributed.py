"""Training with several processes, one for each GPU or machine.

    torchrun --nproc-per-node N -m fcos train ...

``torchrun`` starts the processes and tells each its rank in the environment. Without it there is
one process, every function here does what one process needs, and nothing else has to know.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
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
def process_group(device: str) -> Iterator[str]:
    """Join the group of processes that ``torchrun`` started, if it did; leave it at the end.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for one GPU a process. Tensors on a GPU travel over nccl,
            others over gloo.

    Yields:
        The device of this process: ``"cpu"``, ``"cuda"``, or ``"cuda:N"`` in a group.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # set by torchrun alone
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo")
    yield device
    # Not after an error: others may wait for this process, and only its end tells them.
    dist.destroy_process_group()


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def num_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _in_group() else 1


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; every process has to call it."""
    if num_processes() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)  # the mean itself is not to be had from gloo
    return value / num_processes()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in at least one process; every process has to call it."""
    if num_processes() == 1:
        return flag
    flags = torch.tensor(float(flag))  # on the CPU: no GPU has to be waited for
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers; every process has to call it.

    Parameters stay equal by themselves, but each process has seen other images, so the statistics
    of batch norm differ, and with them what the model detects.
    """
    if num_processes() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: Any) -> list[Any]:
    """What each process holds, in the order of their ranks; every process has to call it."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values
