"""Plot time and peak memory against the size of the input.

    python -m benchmarks.growth FIGURE.png [--device cuda]

It shows medians of a few repetitions, and the peak memory of one call beyond what was in use
before it. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.ops import nms as torchvision_nms

from benchmarks import average_precision as average_precision_benchmark
from benchmarks.detector import BATCH_SIZE, SIDE, channels_last, make_detector, training_step
from benchmarks.nms import random_boxes
from benchmarks.timing import seconds_of
from common import nms
from eecs598.metrics import average_precision
from eecs598.training import precision_name

REPETITIONS = 5


class Point(NamedTuple):
    """One measurement; ``megabytes`` is None where peak memory cannot be measured."""

    size: int
    seconds: float
    megabytes: float | None


Line = tuple[str, list[Point]]  # label and points


def main() -> None:
    """Measure everything and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("figure", type=Path, metavar="FIGURE")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    panels = []
    for name, measure in (
        ("boxes, NMS at 0.5", _nms),
        (f"image side in px, training step of {BATCH_SIZE // 4} images", _sides),
        (f"images of {SIDE} px, training step", _batches),
        ("images, mAP", _images),
    ):
        lines = list(measure(args.device))
        for label, points in lines:
            for size, seconds, megabytes in points:
                memory = "" if megabytes is None else f", {megabytes:,.0f} MB"
                print(f"{size:,} {name}: {label} {1000 * seconds:,.1f} ms{memory}", flush=True)
        panels.append((name, lines))
    _draw(panels, args.figure)


def _nms(device: str) -> Iterator[Line]:
    for label, function in (("ours", nms), ("torchvision", torchvision_nms)):
        points = []
        for count in (1_000, 5_000, 20_000, 100_000):
            boxes, scores, _ = random_boxes(count, device)
            call = functools.partial(function, boxes, scores, 0.5)
            points.append(_measure(count, call, device))
        yield label, points


def _sides(device: str) -> Iterator[Line]:
    yield from _training([(BATCH_SIZE // 4, side) for side in (96, 160, 224, 320, 448)], 1, device)


def _batches(device: str) -> Iterator[Line]:
    yield from _training([(count, SIDE) for count in (1, 2, 4, 8, 16, 32)], 0, device)


def _training(
    shapes: list[tuple[int, int]], which: int, device: str
) -> Iterator[tuple[str, list[Point]]]:
    """Measure training steps.

    Args:
        shapes: number and side of the images of each batch.
        which: index of the entry of a shape that is the size in the figure.
        device: to train on.
    """
    detector = channels_last(make_detector(device)).train()
    for amp in ("off", "auto"):
        label = precision_name(device, amp)
        points = []
        for shape in shapes:
            count, side = shape
            images = torch.randn(count, 3, side, side, device=device)
            gt_boxes = torch.tensor([[[0.2, 0.2, 0.7, 0.6, 0.0]]], device=device) * side
            step = training_step(detector, channels_last(images), gt_boxes.repeat(count, 1, 1), amp)
            points.append(_measure(shape[which], step, device))
        yield label, points


def _images(device: str) -> Iterator[Line]:
    predictions, targets = average_precision_benchmark.make_data()
    names = [f"class {label}" for label in range(20)]
    points = []
    for count in (100, 500, 1_000, len(targets)):
        call = functools.partial(average_precision, predictions[:count], targets[:count], names)
        points.append(_measure(count, call, "cpu"))
    yield "ours", points


def _measure(size: int, call: Callable[[], object], device: str) -> Point:
    call()  # so that one-time work is not measured
    seconds = statistics.median(seconds_of(call) for _ in range(REPETITIONS))
    return Point(size, seconds, _peak_megabytes(call, device))


def _peak_megabytes(call: Callable[[], object], device: str) -> float | None:
    """Measure the peak memory of a call on the device; None where that is impossible."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/statm").exists():
        return None
    # Memory that was freed before but not returned would be reused without being measured.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    highest, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            highest.append(_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(highest) - highest[0]


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def _draw(panels: list[tuple[str, list[Line]]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(3.4 * len(panels), 5.6), layout="constrained")
    axes = figure.subplots(2, len(panels), sharex="col")
    for (name, lines), (above, below) in zip(panels, axes.T, strict=True):
        for label, points in lines:
            sizes = [point.size for point in points]
            above.plot(sizes, [point.seconds for point in points], marker="o", label=label)
            # 1 MB and less is within the noise.
            memory = [max(1.0, point.megabytes or 0.0) for point in points]
            below.plot(sizes, memory, marker="o", label=label)
        for axis in (above, below):
            axis.set(xscale="log", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
        below.set_xlabel(name)
        if len(lines) > 1:
            above.legend()
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory in MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
