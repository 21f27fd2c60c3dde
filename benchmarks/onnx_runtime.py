"""Time of a prediction with ONNX Runtime, compared with torchvision's FCOS in PyTorch.

Both compute in float32, with NMS, on the same images. The detectors are those of
``benchmarks.detector``: equal backbones and pyramids, and thresholds under which nearly all
candidates reach the NMS.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

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
LATENCY_IMAGES = 1000


def rows(device: str) -> Iterator[Row]:
    """Time batches, and the distribution of the times of single images."""
    images, _ = batch("cpu")
    ours, theirs = _exported(device), make_peer(device).eval()
    for count, goal in GOALS.items():
        some = images[:count]
        times = side_by_side(
            lambda some=some: ours.predict(some, SCORE_THRESH, NMS_THRESH),  # type: ignore[misc]
            peer_prediction(theirs, some.to(device)),
        )
        question = f"prediction, {count} image{'s' * (count > 1)} of {SIDE} px"
        yield Row(f"{question}, float32, ONNX Runtime", PEER, *times, goal)

    ours_seconds, their_seconds = [], []
    for number in range(LATENCY_IMAGES):
        image = images[number % BATCH_SIZE, None]
        ours_seconds.append(latency_of(lambda: ours.predict(image, SCORE_THRESH, NMS_THRESH)))  # noqa: B023
        their_seconds.append(latency_of(peer_prediction(theirs, image.to(device))))
    for percent in (50, 95, 99):
        question = f"latency of one image, p{percent} of {LATENCY_IMAGES:,}, ONNX Runtime"
        one, other = (float(np.percentile(all_, percent)) for all_ in (ours_seconds, their_seconds))
        yield Row(question, PEER, one, other, None)


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
