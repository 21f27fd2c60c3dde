"""Time of a prediction with ONNX Runtime, compared with torchvision's FCOS in PyTorch.

Both compute in float32, with NMS, on the same images. The detectors are those of
``benchmarks.detector``: equal backbones and pyramids, and thresholds under which nearly all
candidates reach the NMS.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detector import (
    BATCH_SIZE,
    NMS_THRESH,
    NUM_CLASSES,
    SCORE_THRESH,
    SIDE,
    batch,
    make_detector,
    make_peer,
    peer_prediction,
)
from benchmarks.timing import Row, latency_of, side_by_side
from eecs598.deploy import OnnxDescription, OnnxDetector, export_onnx
from one_stage_detector import FCOSCandidates

PEER = "torchvision FCOS, float32"
GOALS = {1: 0.40, BATCH_SIZE: 0.50}
CALLS = {1: 20, BATCH_SIZE: 3}  # in a row
LATENCY_IMAGES, LATENCY_TURN = 1000, 100


def rows(device: str) -> Iterator[Row]:
    """Time batches, and the distribution of the times of single images."""
    images, _ = batch("cpu")
    ours, theirs = _exported(device), make_peer(device).eval()
    for count, goal in GOALS.items():
        some = images[:count]
        times = side_by_side(
            partial(ours.predict, some, SCORE_THRESH, NMS_THRESH),
            peer_prediction(theirs, some.to(device)),
            calls=CALLS[count],
        )
        question = f"prediction, {count} image{'s' * (count > 1)} of {SIDE} px"
        yield Row(f"{question}, float32, ONNX Runtime", PEER, *times, goal)

    ours_seconds: list[float] = []
    their_seconds: list[float] = []
    singles = [images[number, None] for number in range(BATCH_SIZE)]
    our_calls = [partial(ours.predict, one, SCORE_THRESH, NMS_THRESH) for one in singles]
    their_calls = [peer_prediction(theirs, one.to(device)) for one in singles]
    for _ in range(LATENCY_IMAGES // LATENCY_TURN):
        ours_seconds += _one_by_one(our_calls)
        their_seconds += _one_by_one(their_calls)
    for percent in (50, 95, 99):
        question = f"latency of one image, p{percent} of {LATENCY_IMAGES:,}, ONNX Runtime"
        one, other = (float(np.percentile(all_, percent)) for all_ in (ours_seconds, their_seconds))
        yield Row(question, PEER, one, other, None)


def _one_by_one(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Return the times of LATENCY_TURN calls in a row."""
    calls[0]()  # until the threads of the other library rest
    return [latency_of(calls[number % len(calls)]) for number in range(LATENCY_TURN)]


def _exported(device: str) -> OnnxDetector:
    """Return the detector of the benchmarks, run by ONNX Runtime."""
    detector = make_detector("cpu").eval()
    names = [f"class {number}" for number in range(NUM_CLASSES)]
    strides = detector.backbone.fpn_strides
    description = OnnxDescription(names, SIDE, SCORE_THRESH, NMS_THRESH, strides, normalized=True)
    select = detector.post_processor.select
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_onnx(FCOSCandidates(detector), path, description, select)
        return OnnxDetector(path, select, device)
