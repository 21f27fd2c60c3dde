"""``fcos`` with a planted error: ``python failing.py ERROR fcos-arguments``.

Under ``torchrun``, the error is in the last of the processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

import torch

from eecs598.data import ImageFiles, TrainingSet
from fcos import cli
from one_stage_detector import FCOS

STEPS = 7  # that go well


def main(error: str, arguments: list[str]) -> int:
    is_last = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    calls, forward = 0, FCOS.forward

    def fails(self, *args, **kwargs):
        nonlocal calls
        calls += self.training
        if error == "evaluation" and not self.training and is_last:
            raise RuntimeError("planted")
        if calls > STEPS and self.training and is_last:
            if error == "step":
                raise RuntimeError("planted")
            if error == "memory":
                torch.empty(2**60)
            if error == "killed":
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return forward(self, *args, **kwargs)

    def no_item(self, sample):
        raise RuntimeError("planted")

    def kills_itself(self, index):
        os.kill(os.getpid(), signal.SIGKILL)

    FCOS.forward = fails
    if error == "loader" and is_last:
        load = TrainingSet.__getitem__
        TrainingSet.__getitem__ = lambda self, sample: (
            no_item(self, sample) if sample.index == 5 else load(self, sample)
        )
    if error == "killed":
        ImageFiles.__getitem__ = kills_itself  # of fcos predict
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
