"""Slow average precision, one detection at a time, and random input for the metrics' tests."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from eecs598.metrics.matching import Matches

FAR = "60 60 69 69"  # overlaps nothing near the origin
NAMES = ["dog", "cat", "dining table", "unicorn"]  # not sorted: results keep this order


# ---------------------------------------------------------------------------------------------
# The definition, word by word
# ---------------------------------------------------------------------------------------------


def slow_overlap(a: list[float], b: list[float]) -> float | None:
    """IoU in inclusive pixels; None where the boxes share no pixel."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return None
    area_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    area_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return width * height / (area_a + area_b - width * height)


def slow_score(folder: Path, threshold: float = 0.5, seen: Counter | None = None) -> dict:
    """Per-class AP and counts of a folder; ``seen`` counts the special cases that came up."""
    seen = Counter() if seen is None else seen
    boxes, detections = [], []
    for path in sorted((folder / "ground-truth").iterdir(), key=lambda path: path.name):
        for line in path.read_text().splitlines():
            words = line.split(" ")
            difficult = words[-1] == "difficult"
            if difficult:
                words.pop()
            corners = [float(word) for word in words[-4:]]
            box = {"image": path.name, "class": " ".join(words[:-4]), "corners": corners}
            boxes.append({**box, "difficult": difficult, "used": False})
        found = folder / "detection-results" / path.name
        if not found.exists():
            seen["no file"] += 1
            continue
        for line in found.read_text().splitlines():
            words = line.split(" ")
            corners = [float(word) for word in words[-4:]]
            detection = {"image": path.name, "class": " ".join(words[:-5]), "corners": corners}
            detections.append({**detection, "score": float(words[-5])})
        seen["empty file"] += found.stat().st_size == 0 or path.stat().st_size == 0

    # Insertion after everything that scores as much keeps the order of files and lines.
    ordered: list[dict] = []
    for detection in detections:
        place = len(ordered)
        while place > 0 and ordered[place - 1]["score"] < detection["score"]:
            place -= 1
        seen["tie"] += place > 0 and ordered[place - 1]["score"] == detection["score"]
        ordered.insert(place, detection)

    ap, true_positives, false_positives = {}, Counter(), Counter()
    for name in sorted({box["class"] for box in boxes} | {d["class"] for d in detections}):
        points, true, false = [], 0, 0
        total = sum(box["class"] == name and not box["difficult"] for box in boxes)
        of_class = [detection for detection in ordered if detection["class"] == name]
        for detection in of_class:
            best, match = None, None
            for box in boxes:
                if box["image"] != detection["image"] or box["class"] != name:
                    continue
                overlap = slow_overlap(detection["corners"], box["corners"])
                if overlap is not None and (best is None or overlap > best):
                    best, match = overlap, box
                elif overlap is not None and overlap == best:
                    seen["equal overlap"] += 1
            if best is not None and best >= threshold:
                seen["exact threshold"] += best == threshold
                if match["difficult"]:
                    seen["difficult match"] += 1
                    continue
                seen["used box"] += match["used"]
                true, false = (true, false + 1) if match["used"] else (true + 1, false)
                match["used"] = True
            else:
                false += 1
            if total:
                points.append((true / total, true / (true + false)))
        true_positives[name], false_positives[name] = true, false
        seen["class without detections"] += bool(total) and not of_class
        seen["class without ground truth"] += not any(box["class"] == name for box in boxes)
        seen["only difficult"] += not total and any(box["class"] == name for box in boxes)
        if total:
            area, reached = 0.0, 0.0
            for recall, _ in points:
                if recall > reached:
                    envelope = max(other for at, other in points if at >= recall)
                    area += (recall - reached) * envelope
                    reached = recall
            ap[name] = area
    return {"AP": ap, "true_positives": true_positives, "false_positives": false_positives}


# ---------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------


def write_folder(folder: Path, truths: dict[str, str], detections: dict[str, str]) -> Path:
    for kind, files in (("ground-truth", truths), ("detection-results", detections)):
        (folder / kind).mkdir(parents=True)
        for name, text in files.items():
            (folder / kind / f"{name}.txt").write_text(text)
    return folder


def random_folder(folder: Path, rng: random.Random) -> Path:
    """Small whole-number boxes in few places and few scores, so that the special cases come up."""
    classes = ["cat", "dog", "dining table", "tv"]
    truths, detections = {}, {}
    for index in range(rng.randint(2, 7)):
        name = rng.choice(["", "a", "a-", "b."]) + str(index)
        boxes = []
        for _ in range(rng.choice([0, 1, 2, 4, 6])):
            x, y = rng.choice([0, 5, 20]), rng.choice([0, 5, 20])
            width, height = rng.choice([5, 10, 20]), rng.choice([5, 10, 20])
            box = [x, y, x + width - 1, y + height - 1]
            boxes.append((rng.choice(classes[: rng.randint(1, 4)]), box, rng.random() < 0.25))
            if rng.random() < 0.2:
                boxes.append(boxes[-1])
        lines = []
        for _ in range(rng.choice([0, 3, 8, 12])):
            box = [rng.randint(0, 20), rng.randint(0, 20), rng.randint(20, 40), rng.randint(20, 40)]
            label = rng.choice([*classes, "ghost"])
            if boxes and rng.random() < 0.85:
                label, (x1, y1, x2, y2), _ = rng.choice(boxes)
                half = (x1, y1, x2, y1 + (y2 - y1 + 1) // 2 - 1)
                moved = (x1 + rng.randint(-2, 2), y1, x2 + rng.randint(0, 3), y2)
                box = rng.choice([(x1, y1, x2, y2), half, moved, moved])
            score = rng.choice([0.25, 0.5, 0.5, 0.75, round(rng.random(), 3)])
            lines.append(f"{label} {score} {' '.join(map(str, box))}\n")
            if rng.random() < 0.1:
                lines.append(lines[-1])
        truths[name] = "".join(
            f"{label} {' '.join(map(str, box))}{' difficult' if difficult else ''}\n"
            for label, box, difficult in boxes
        )
        if lines or rng.random() < 0.7:
            detections[name] = "".join(lines)
    truths["last"] = f"{rng.choice(classes)} 1 1 10 10\n"
    return write_folder(folder, truths, detections)


# ---------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------


def row_of_boxes(count: int) -> torch.Tensor:
    """Ten pixels wide each, ten pixels apart."""
    left = 20.0 * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 9, torch.full((count,), 9.0)], dim=1)


def one_class(boxes: torch.Tensor, num_truths: int, scores: list[float]) -> tuple:
    """A call with one image and one class; the ground truth are the first boxes of the row."""
    prediction = {"boxes": boxes, "labels": torch.zeros(len(boxes)), "scores": torch.tensor(scores)}
    target = {"boxes": row_of_boxes(num_truths), "labels": torch.zeros(num_truths)}
    return [prediction], [target], ["cat"]


def random_images(seed: int, count: int = 40) -> tuple[list[dict], list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    predictions, targets = [], []
    for index in range(count):
        num_boxes = index % 4
        corner = torch.rand(num_boxes, 2, generator=generator) * 100
        size = torch.rand(num_boxes, 2, generator=generator) * 80 + 20
        target = {
            "boxes": torch.cat([corner, corner + size], dim=1),
            "labels": torch.randint(0, 3, (num_boxes,), generator=generator),
        }
        num_detections = index % 7 if num_boxes else 0
        chosen = torch.randint(0, max(num_boxes, 1), (num_detections,), generator=generator)
        moved = target["boxes"][chosen] + torch.rand(num_detections, 1, generator=generator) * 12
        prediction = {
            "boxes": moved,
            "labels": target["labels"][chosen],
            "scores": torch.rand(num_detections, generator=generator).bfloat16().float(),
        }
        if index % 3:  # some data sets know difficult boxes, some images have none
            target["difficult"] = torch.rand(num_boxes, generator=generator) < 0.2
        predictions.append(prediction)
        targets.append(target)
    return predictions, targets


def valid_call(**changes) -> tuple[list[dict], list[dict], list[str]]:
    """A valid call; ``prediction_boxes=...`` and the like replace one part (None removes it)."""
    box, label = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0])
    prediction = {"boxes": box, "labels": label, "scores": torch.tensor([0.5])}
    target = {"boxes": box, "labels": label}
    for name, value in changes.items():
        where, key = name.split("_")
        {"prediction": prediction, "target": target}[where][key] = value
    return [prediction], [target], ["cat", "dog"]


def status(matches: Matches) -> list[str]:
    """A word for each detection: "true", "false" or "ignored"."""
    return np.select([matches.is_tp, matches.is_ignored], ["true", "ignored"], "false").tolist()
