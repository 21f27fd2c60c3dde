"""What a training run uses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from eecs598.training.usage import UsageMeter


def test_parameters_and_operations_of_a_known_network():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    usage = UsageMeter("cpu").usage(model, model, image_size=10, images=0)
    assert usage["parameters"] == 3 * 8 * 9 + 2 * 8
    assert usage["flops_per_image"] == 2 * 100 * 8 * 27  # a multiplication and an addition each
    assert usage["images_per_second"] is None and usage["peak_gpu_memory"] is None
    # Counting is no training step.
    assert model.training and model[1].num_batches_tracked == 0


def test_evaluation_does_not_count_as_time_of_training(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = UsageMeter("cpu")
    with meter.running():
        now += 2
        with meter.paused():
            now += 100
        now += 3
    model = nn.Conv2d(3, 1, 1)
    assert meter.usage(model, model, 8, images=10)["images_per_second"] == 2.0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux has /proc")
def test_peak_memory_holds_what_was_freed():
    model = nn.Conv2d(3, 1, 1)
    before = UsageMeter("cpu").usage(model, model, 8, 1)["peak_memory"]
    # More than can be free below an earlier peak of this process.
    size = max(0, before - _current_memory()) + 200_000_000
    torch.ones(size, dtype=torch.uint8)
    after = UsageMeter("cpu").usage(model, model, 8, 1)["peak_memory"]
    assert after - before > 150_000_000


def _current_memory() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
