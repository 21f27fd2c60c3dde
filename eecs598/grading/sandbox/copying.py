"""Whether the processes that run submissions may be copies of the one that grades."""

from __future__ import annotations

import contextlib
import os
import sys

import torch

__all__ = ["can_be_copied"]


def can_be_copied() -> bool:
    """Return whether a copy of this process can do everything that a new one can.

    A copy has its libraries loaded already. On other systems than Linux, copying a process that has
    loaded them is not safe. Where this process has computed gradients with ``torch.compile``, none
    can be computed in a copy.
    """
    if sys.platform != "linux":
        return False
    copy = os.fork()
    if copy == 0:
        status = 1
        with contextlib.suppress(RuntimeError):
            torch.ones(1, requires_grad=True).sum().backward()
            status = 0
        os._exit(status)
    return os.waitpid(copy, 0)[1] == 0
