"""Time of the mAP of 2,510 images, compared with COCO's tools."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import Row, side_by_side
from eecs598.metrics import average_precision, score_folder, write_text_format

NUM_IMAGES, NUM_DETECTIONS, NUM_CLASSES = 2510, 24_000, 20


def rows(device: str) -> Iterator[Row]:
    """Time it from tensors and from files.

    From tensors, the records of the peers are made and indexed before the clock starts; from files,
    the peers read theirs, JSON.
    """
    predictions, targets = make_data()
    names = [f"class {label}" for label in range(NUM_CLASSES)]
    question = f"mAP of {NUM_IMAGES:,} images, {NUM_DETECTIONS:,} detections"

    def ours() -> float:
        return average_precision(predictions, targets, names)["mAP"]

    def by_definition() -> float:
        return _by_definition(predictions, targets)

    assert abs(by_definition() - ours()) < 1e-9
    document, found = coco_records(predictions, targets)
    for peer in COCO_LIBRARIES:
        evaluate = _coco_evaluation(peer, document, found)
        _check_close(evaluate(), ours())
        yield Row(question, peer, *side_by_side(ours, evaluate), 1 / 3)
    yield Row(question, "plain Python", *side_by_side(ours, by_definition, 7), None)
    with tempfile.TemporaryDirectory() as folder:
        yield from _from_files(Path(folder), predictions, targets, names, question)


def make_data() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return random detections and objects; about half of the detections lie near an object."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    counts = rng.multinomial(NUM_DETECTIONS, [1 / NUM_IMAGES] * NUM_IMAGES)
    for count in counts.tolist():
        objects = random_boxes(rng, int(rng.integers(1, 6)))
        labels = rng.integers(0, NUM_CLASSES, len(objects))
        boxes, found = random_boxes(rng, count), rng.integers(0, NUM_CLASSES, count)
        near = rng.random(count) < 0.5
        chosen = rng.integers(0, len(objects), count)
        boxes[near] = objects[chosen[near]] + rng.uniform(0, 12, (int(near.sum()), 4))
        found[near] = labels[chosen[near]]
        predictions.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(found),
                "scores": torch.tensor(rng.random(count), dtype=torch.float32),
            }
        )
        targets.append(
            {
                "boxes": torch.tensor(objects, dtype=torch.float32),
                "labels": torch.tensor(labels),
            }
        )
    return predictions, targets


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return boxes (count, 4) in images of 320 x 320 pixels."""
    corners = rng.uniform(0, 200, (count, 2))
    return np.hstack([corners, corners + rng.uniform(20, 120, (count, 2))])


def _from_files(
    folder: Path,
    predictions: list[dict[str, Tensor]],
    targets: list[dict[str, Tensor]],
    names: list[str],
    question: str,
) -> Iterator[Row]:
    for image, items in enumerate(zip(predictions, targets, strict=True)):
        write_text_format(folder / "text", f"{image:05}", *items, names)
    document, found = coco_records(predictions, targets)
    (folder / "truth.json").write_text(json.dumps(document))
    (folder / "found.json").write_text(json.dumps(found))

    def ours() -> float:
        return score_folder(folder / "text")["mAP"]

    assert abs(ours() - average_precision(predictions, targets, names)["mAP"]) < 1e-9
    for peer in COCO_LIBRARIES:

        def evaluate(peer: str = peer) -> float:
            return _coco_evaluation(peer, folder / "truth.json", folder / "found.json")()

        _check_close(evaluate(), ours())
        yield Row(f"{question}, from files", f"{peer}, JSON", *side_by_side(ours, evaluate), 1 / 3)


def _check_close(theirs: float, ours: float) -> None:
    """Allow for COCO's 101 recalls, and its boxes that are narrower by a pixel."""
    assert abs(theirs - ours) < 0.02, f"{theirs} and {ours}: not the same data"


COCO_LIBRARIES = ("faster-coco-eval", "pycocotools")


def _coco_evaluation(library: str, truth: Any, found: Any) -> Callable[[], float]:
    """Return a function that runs COCO's evaluation at one IoU threshold and returns the mAP.

    Args:
        library: one of COCO_LIBRARIES.
        truth: records of the ground truth, or a file of them.
        found: the same for the detections.
    """
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(truth, Path):
            ground_truth = COCO(str(truth))
        else:
            ground_truth = COCO()
            ground_truth.dataset = truth
            ground_truth.createIndex()
        detections = ground_truth.loadRes(str(found) if isinstance(found, Path) else found)

    def evaluate() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            run = COCOeval(ground_truth, detections, "bbox")
            run.params.iouThrs = np.array([0.5])
            run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
            run.params.maxDets = [100]
            run.evaluate()
            run.accumulate()
        precision = np.asarray(run.eval["precision"])  # -1 for a class without objects
        return float(precision[precision >= 0].mean())

    return evaluate


def coco_records(
    predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return ground truth and detections in the format of COCO."""
    truth = _records(targets)
    for record in truth:
        record["iscrowd"] = 0
    document = {
        "info": {},
        "images": [{"id": image, "width": 400, "height": 400} for image in range(len(targets))],
        "categories": [{"id": label, "name": str(label)} for label in range(NUM_CLASSES)],
        "annotations": truth,
    }
    return document, _records(predictions)


def _records(items: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for image, item in enumerate(items):
        scores = item.get("scores", torch.ones(len(item["boxes"])))
        for box, label, score in zip(
            item["boxes"].tolist(), item["labels"].tolist(), scores.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            record = {"id": len(records) + 1, "image_id": image, "category_id": label}
            width, height = x2 - x1, y2 - y1
            record |= {"bbox": [x1, y1, width, height], "area": width * height, "score": score}
            records.append(record)
    return records


def _by_definition(predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> float:
    """Return the mAP by the definition, one detection at a time."""
    areas = []
    for label in range(NUM_CLASSES):
        truth = {
            image: [
                box
                for box, own in zip(t["boxes"].tolist(), t["labels"], strict=True)
                if own == label
            ]
            for image, t in enumerate(targets)
        }
        total = sum(map(len, truth.values()))
        found = [
            (-score, image, box)
            for image, p in enumerate(predictions)
            for box, own, score in zip(
                p["boxes"].tolist(), p["labels"], p["scores"].tolist(), strict=True
            )
            if own == label
        ]
        taken, true = set(), []
        for _, image, box in sorted(found, key=lambda entry: entry[0]):
            overlaps = [_iou(box, other) for other in truth[image]]
            best = max(range(len(overlaps)), key=overlaps.__getitem__, default=None)
            hit = best is not None and overlaps[best] >= 0.5 and (image, best) not in taken
            if hit:
                taken.add((image, best))
            true.append(hit)
        if total:
            precisions, hits = [], 0
            for rank, hit in enumerate(true, start=1):
                hits += hit
                precisions.append(hits / rank)
            best_from_here = list(itertools.accumulate(reversed(precisions), max))[::-1]
            areas.append(sum(p for p, hit in zip(best_from_here, true, strict=True) if hit) / total)
    return sum(areas) / len(areas)


def _iou(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
    return width * height / (area_a + area_b - width * height)
