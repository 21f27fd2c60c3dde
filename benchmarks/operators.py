"""Profile of a training step, and the time of the assignment's schedule.

    python -m benchmarks.operators [--device cuda]

Prints the operators that take most of the time, from PyTorch's profiler, and the time of 9,000
steps with the default settings, without loading data. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import statistics

from torch.profiler import ProfilerActivity, profile

from benchmarks.detector import BATCH_SIZE, SIDE, batch, channels_last, make_detector, training_step
from benchmarks.timing import seconds_of

ITERATIONS = 9_000
REPETITIONS = 9
ROWS = 15


def main() -> None:
    """Time some training steps, then profile some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    images, gt_boxes = batch(device)
    detector = channels_last(make_detector(device)).train()
    step = training_step(detector, channels_last(images), gt_boxes, "auto")
    step()
    seconds = statistics.median(seconds_of(step) for _ in range(REPETITIONS))
    print(
        f"{BATCH_SIZE} images of {SIDE} px: {1000 * seconds:.0f} ms per step, "
        f"{BATCH_SIZE / seconds:,.0f} images per second, {ITERATIONS:,} steps in "
        f"{ITERATIONS * seconds / 60:.0f} minutes\n"
    )
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device == "cuda")]
    with profile(activities=activities) as profiler:
        for _ in range(REPETITIONS):
            step()
    where = "device" if device == "cuda" else "cpu"
    print(profiler.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=ROWS))


if __name__ == "__main__":
    main()
