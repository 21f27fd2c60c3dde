"""Time of a training step, compared with its operations at the processor's peak rate (roofline).

The limit is the time of its floating-point operations, forward and backward, at the rate of the
fastest large matrix product measured in the same run. No training of this network can be faster,
and memory traffic may keep it slower (Williams et al., Roofline, doi 10.1145/1498765.1498785).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.detector import BATCH_SIZE, SIDE, batch, channels_last, make_detector, training_step
from benchmarks.timing import Row, seconds_of, side_by_side
from eecs598.training import network_dtype, precision_name

SIZES = (1024, 2048, 4096)


def rows(device: str) -> Iterator[Row]:
    """Time the step in mixed precision and in float32."""
    images, gt_boxes = batch(device)
    for amp in ("auto", "off"):
        dtype = network_dtype(torch.device(device), amp)
        detector = channels_last(make_detector(device)).train()
        step = training_step(detector, channels_last(images), gt_boxes, amp)
        with FlopCounterMode(display=False) as counter:
            step()
        flops = counter.get_total_flops()
        rate = max(_rate(size, dtype, device) for size in SIZES)
        seconds, _ = side_by_side(step, lambda: None)
        yield Row(
            f"training step, {BATCH_SIZE} images of {SIDE} px, {precision_name(device, amp)}",
            f"its {flops / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s, the best matrix product",
            seconds,
            flops / rate,
            None,
        )


def _rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Measure the floating-point operations per second of a square matrix product."""
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = min(seconds_of(lambda: matrix @ matrix) for _ in range(10))
    return 2 * size**3 / seconds
