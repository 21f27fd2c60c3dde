"""Average precision: against a slow loop that follows the definition, and against hand counts."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from eecs598.metrics.average_precision import (
    average_precision,
    format_table,
    match_detections,
    plot_average_precision,
    precision_recall_curves,
    read_text_format,
    score_folder,
    write_text_format,
)

# ---------------------------------------------------------------------------------------------
# The definition, word by word, one detection at a time
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


def test_200_random_folders_agree_with_the_slow_loop(tmp_path):
    seen: Counter = Counter()
    for seed in range(200):
        folder = random_folder(tmp_path / str(seed), random.Random(seed))
        expected = slow_score(folder, seen=seen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # images without a file of detections
            result = score_folder(folder)
        assert list(result["AP"]) == list(expected["AP"]), seed
        for name, ap in expected["AP"].items():
            assert abs(result["AP"][name] - ap) < 1e-9, (seed, name)
        assert abs(result["mAP"] - np.mean(list(expected["AP"].values()))) < 1e-9, seed
        for column in ("true_positives", "false_positives"):
            assert result[column] == dict(expected[column]), (seed, column)
    special = ("tie", "equal overlap", "exact threshold", "difficult match", "used box")
    for case in (*special, "no file", "empty file", "class without ground truth"):
        assert seen[case] >= 100, (case, seen)
    assert seen["class without detections"] >= 20
    assert seen["only difficult"] >= 20


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.75, 1.0])
def test_other_thresholds_agree_with_the_slow_loop(tmp_path, threshold):
    for seed in range(10):
        folder = random_folder(tmp_path / str(seed), random.Random(1000 + seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = score_folder(folder, threshold)
        assert result["AP"] == pytest.approx(slow_score(folder, threshold)["AP"], abs=1e-9)


# ---------------------------------------------------------------------------------------------
# Hand counts. The 10x10 box "0 0 9 9" and its upper half "0 0 9 4" have IoU exactly 0.5.
# ---------------------------------------------------------------------------------------------

FAR = "60 60 69 69"  # overlaps nothing below
HAND_COUNTS = {
    "exactly the threshold is a match": ("cat 0 0 9 9", "cat .9 0 0 9 4", 1.0),
    # 4 of 10 rows.
    "below the threshold is not": ("cat 0 0 9 9", "cat .9 0 0 9 3", 0.0),
    # 6 rows of 3 columns against 6 x 6: 0.5 inclusive, (5 * 2) / (5 * 5) = 0.4 without.
    "inclusive pixels": ("cat 0 0 5 5", "cat .9 0 0 2 5", 1.0),
    "another class": ("cat 0 0 9 9", "dog .9 0 0 9 9", 0.0),
    # Precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3: (1 + 2/3) / 3. Eleven points give 6/11.
    "all points": (
        "cat 0 0 9 9\ncat 20 0 29 9\ncat 40 0 49 9",
        f"cat .9 0 0 9 9\ncat .8 {FAR}\ncat .7 20 0 29 9",
        5 / 9,
    ),
    # Precision 0, 1/2, 2/3 at recall 0, 1/2, 1: the envelope lifts 1/2 to 2/3.
    "envelope": (
        "cat 0 0 9 9\ncat 20 0 29 9",
        f"cat .9 {FAR}\ncat .8 0 0 9 9\ncat .7 20 0 29 9",
        2 / 3,
    ),
    # The second detection of the left box is false: precision 1, 1/2, 2/3.
    "duplicate": (
        "cat 0 0 9 9\ncat 20 0 29 9",
        "cat .9 0 0 9 9\ncat .8 0 0 9 9\ncat .7 20 0 29 9",
        (1 + 2 / 3) / 2,
    ),
    # Equal scores: in the order of lines, precision 0, 1/2.
    "tie": ("cat 0 0 9 9", f"cat .5 {FAR}\ncat .5 0 0 9 9", 0.5),
    # The second detection overlaps the first box most (1.0), and may not fall back to the second
    # box although that would match (90 / 110).
    "no second choice": (
        "cat 0 0 9 9\ncat 0 1 9 10",
        "cat .9 0 0 9 9\ncat .8 0 0 9 9",
        0.5,
    ),
    # The first detection overlaps both boxes by 90 / 110 and takes the first in the file, so the
    # second, exactly on that one, comes too late; with the lines swapped both are true.
    "equal overlaps take the first": (
        "cat 0 0 9 9\ncat 0 2 9 11",
        "cat .9 0 1 9 10\ncat .8 0 0 9 9",
        0.5,
    ),
    "equal overlaps take the first, swapped": (
        "cat 0 2 9 11\ncat 0 0 9 9",
        "cat .9 0 1 9 10\ncat .8 0 0 9 9",
        1.0,
    ),
    # Both sides of the "intersection" are -9: a product of 81, 81 / 119 = 0.68.
    "two negative sides": ("cat 0 0 9 9", "cat .9 19 19 28 28", 0.0),
    # The matches of the difficult box count neither way, however many.
    "difficult": (
        "cat 0 0 9 9 difficult\ncat 20 0 29 9",
        "cat .9 0 0 9 9\ncat .8 0 0 9 9\ncat .7 20 0 29 9",
        1.0,
    ),
    # Overlapping a difficult box by too little is a false positive as anywhere else.
    "difficult, not matched": (
        "cat 0 0 9 9 difficult\ncat 20 0 29 9",
        "cat .9 0 0 9 3\ncat .7 20 0 29 9",
        0.5,
    ),
    # A difficult box that overlaps most is taken, although the other one matches too.
    "difficult overlaps most": (
        "cat 0 0 9 9\ncat 0 1 9 10 difficult",
        "cat .9 0 1 9 10",
        0.0,
    ),
}


@pytest.mark.parametrize("case", HAND_COUNTS)
def test_hand_counts(tmp_path, case):
    truth, detections, expected = HAND_COUNTS[case]
    folder = write_folder(tmp_path, {"a": truth}, {"a": detections})
    assert score_folder(folder)["AP"] == {"cat": pytest.approx(expected, abs=1e-12)}


def row_of_boxes(count: int) -> torch.Tensor:
    """Ten pixels wide each, ten pixels apart."""
    left = 20.0 * torch.arange(count)
    return torch.stack([left, torch.zeros(count), left + 9, torch.full((count,), 9.0)], dim=1)


def one_class(boxes: torch.Tensor, num_truths: int, scores: list[float]) -> tuple:
    """A call with one image and one class; the ground truth are the first boxes of the row."""
    prediction = {"boxes": boxes, "labels": torch.zeros(len(boxes)), "scores": torch.tensor(scores)}
    target = {"boxes": row_of_boxes(num_truths), "labels": torch.zeros(num_truths)}
    return [prediction], [target], ["cat"]


@pytest.mark.parametrize("found", range(1, 11))
def test_eleven_points_reach_a_recall_that_floats_miss(found):
    # 3 / 10 < 0.1 * 3 and 7 / 10 < 0.1 * 7 in floating point.
    call = one_class(row_of_boxes(found), 10, [0.9] * found)
    result = average_precision(*call, method="11-point")
    assert result["mAP"] == pytest.approx((found + 1) / 11, abs=1e-12)
    assert result["method"] == "11-point"
    assert average_precision(*call)["mAP"] == pytest.approx(found / 10, abs=1e-12)
    assert average_precision(*call)["method"] == "all-point"


def test_eleven_points_of_a_folder(tmp_path):
    # Precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3: 1 up to 0.3, 2/3 up to 0.6. No dog is found.
    truth, detections, _ = HAND_COUNTS["all points"]
    folder = write_folder(
        tmp_path, {"a": f"{truth}\ndog 0 0 9 9\ncow 0 0 9 9"}, {"a": f"{detections}\ncow 1 {FAR}"}
    )
    result = score_folder(folder, method="11-point")
    assert result["AP"] == {"cat": pytest.approx((4 + 3 * 2 / 3) / 11), "dog": 0, "cow": 0}
    with pytest.raises(ValueError, match="method must be one of all-point, 11-point, got '12'"):
        score_folder(folder, method="12")
    with pytest.raises(ValueError, match="method must be one of"):
        average_precision(*one_image(), method="12")


def test_eleven_points_agree_with_fractions(tmp_path):
    for seed in range(20):
        folder = random_folder(tmp_path / str(seed), random.Random(2000 + seed))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, *call = read_text_format(folder)
            result = score_folder(folder, method="11-point")
        matches = match_detections(*call)
        for name, ap in result["AP"].items():
            label = call[-1].index(name)
            words = matches.status[matches.label == label].tolist()
            points, true, false = [], 0, 0
            for word in words:
                true, false = true + (word == "true"), false + (word == "false")
                if word != "ignored":
                    total = result["num_ground_truth"][name]
                    points.append((Fraction(true, total), Fraction(true, true + false)))
            best = [
                max(
                    (precision for recall, precision in points if recall >= Fraction(k, 10)),
                    default=0,
                )
                for k in range(11)
            ]
            assert ap == pytest.approx(float(sum(best) / 11), abs=1e-12), (seed, name)


# ---------------------------------------------------------------------------------------------
# Matches and curves
# ---------------------------------------------------------------------------------------------


def test_matches_of_two_images():
    boxes = row_of_boxes(4)
    part = boxes[1] - torch.tensor([0, 0, 0, 4])  # 60 % of box 1
    predictions = [
        {
            "boxes": torch.stack([boxes[0], part, boxes[2], boxes[0], boxes[3]]),
            "labels": torch.zeros(5),
            "scores": torch.tensor([0.5, 0.75, 0.25, 1.0, 0.125]),
        },
        {
            "boxes": boxes[[1, 0]],
            "labels": torch.tensor([1, 0]),  # no dog there; the cat ties with another image's
            "scores": torch.tensor([0.875, 0.5]),
        },
    ]
    targets = [
        {
            "boxes": boxes[:3],
            "labels": torch.zeros(3, dtype=torch.int64),
            "difficult": torch.tensor([False, False, True]),
        },
        {"boxes": boxes[:2], "labels": torch.tensor([0, 0])},
    ]
    matches = match_detections(predictions, targets, ["cat", "dog"])
    assert matches.score.tolist() == [1.0, 0.875, 0.75, 0.5, 0.5, 0.25, 0.125]
    assert matches.image.tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert matches.index.tolist() == [3, 0, 1, 0, 1, 2, 4]
    assert matches.label.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert matches.status.tolist() == ["true", "false", "true", "false", "true", "ignored", "false"]
    assert matches.truth.tolist() == [0, -1, 1, 0, 3, 2, -1]
    assert matches.overlap.tolist() == pytest.approx([1, -1, 0.6, 1, 1, 1, -1])
    assert matches.matched.tolist() == [True, False, True, True, True, True, False]
    assert np.array_equal(matches.false, matches.status == "false")
    for detection, (image, index) in enumerate(zip(matches.image, matches.index, strict=True)):
        assert matches.box[detection].tolist() == predictions[image]["boxes"][index].tolist()
    assert matches.truth_image.tolist() == [0, 0, 0, 1, 1]
    assert matches.truth_index.tolist() == [0, 1, 2, 0, 1]
    assert matches.truth_found.tolist() == [True, True, False, True, False]
    assert matches.num_ground_truth.tolist() == [4, 0]
    # A match by 60 % is none at 0.7, and is still what the detection overlaps most.
    stricter = match_detections(predictions, targets, ["cat", "dog"], 0.7)
    assert stricter.truth.tolist() == matches.truth.tolist()
    assert stricter.matched.tolist() == [True, False, False, True, True, True, False]


def test_nothing_to_match():
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    for images in ([], [nothing]):
        matches = match_detections(images, images, ["cat"])
        assert len(matches.score) == len(matches.truth_label) == 0
        assert matches.num_images == len(images)
        with pytest.raises(ValueError, match="no ground truth"):
            precision_recall_curves(images, images, ["cat"])
    predictions, targets, names = one_image()
    result = average_precision([nothing], targets, names)
    assert (result["mAP"], result["num_detections"]["cat"]) == (0, 0)
    assert match_detections(predictions, [nothing], names).status.tolist() == ["false"]


def test_precision_recall_curve_by_hand():
    # True, then a true and a false one of equal score, false, true; 4 boxes.
    boxes = row_of_boxes(9)[[0, 7, 1, 8, 2]]
    predictions, targets, names = one_class(boxes, 4, [0.75, 0.5, 0.5, 0.25, 0.125])
    curve = precision_recall_curves(predictions, targets, names)["cat"]
    assert curve.scores.tolist() == [0.75, 0.5, 0.25, 0.125]
    assert curve.recall.tolist() == [1 / 4, 2 / 4, 2 / 4, 3 / 4]
    assert curve.precision.tolist() == [1, 2 / 3, 2 / 4, 3 / 5]
    # F1 = 2 * true / (detections + boxes): 2/5, 4/7, 4/8, 6/9.
    assert (curve.best_f1, curve.best_f1_threshold) == (6 / 9, 0.125)
    assert json.loads(json.dumps(curve.to_dict())) == curve.to_dict()
    assert curve.to_dict()["precision"] == curve.precision.tolist()
    # Without the last, 4/7 is best, at the score of a tie; its order does not matter.
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        fewer = [{key: value[order] for key, value in predictions[0].items()}]
        curve = precision_recall_curves(fewer, targets, names)["cat"]
        assert (curve.best_f1, curve.best_f1_threshold) == (4 / 7, 0.5)
        assert curve.recall.tolist() == [1 / 4, 2 / 4, 2 / 4]


def test_precision_recall_curves_of_special_classes():
    boxes = row_of_boxes(4)
    prediction = {  # dog twice on a difficult box, cow off its box, ghost without one
        "boxes": torch.stack([boxes[0], boxes[0], boxes[1], boxes[3] + 100, boxes[3]]),
        "labels": torch.tensor([1, 1, 1, 2, 3]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]),
    }
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 1, 0, 2]),
        "difficult": torch.tensor([True, False, False, False]),
    }
    curves = precision_recall_curves([prediction], [target], ["cat", "dog", "cow", "ghost"])
    assert list(curves) == ["cat", "dog", "cow"]
    assert len(curves["cat"].recall) == len(curves["cat"].scores) == 0
    assert (curves["cat"].best_f1, curves["cat"].best_f1_threshold) == (0.0, None)
    assert (curves["dog"].recall.tolist(), curves["dog"].precision.tolist()) == ([1], [1])
    assert curves["dog"].best_f1_threshold == pytest.approx(0.7)
    assert curves["cow"].precision.tolist() == [0]
    assert (curves["cow"].best_f1, curves["cow"].best_f1_threshold) == (0, pytest.approx(0.6))


def test_the_threshold_of_the_best_f1_gives_it():
    predictions, targets = random_images(5)
    for label, curve in enumerate(precision_recall_curves(predictions, targets, NAMES).values()):
        kept = [
            {key: value[image["scores"] >= curve.best_f1_threshold] for key, value in image.items()}
            for image in predictions
        ]
        result = average_precision(kept, targets, NAMES)
        true, total = (
            list(result[column].values())[label]
            for column in ("true_positives", "num_ground_truth")
        )
        false = list(result["false_positives"].values())[label]
        assert curve.best_f1 == pytest.approx(2 * true / (true + false + total))


def test_touching_boxes_share_no_pixel_even_for_threshold_0(tmp_path):
    folder = write_folder(tmp_path, {"a": "cat 0 0 9 9"}, {"a": "cat .9 10 0 19 9"})
    assert score_folder(folder, 0.0)["mAP"] == 0.0
    (folder / "detection-results" / "a.txt").write_text("cat .9 9 0 18 9")
    assert score_folder(folder, 0.0)["mAP"] == 1.0


def test_counts_of_a_small_folder(tmp_path):
    folder = write_folder(
        tmp_path,
        {
            "1": "cat 0 0 9 9\ncat 20 0 29 9 difficult\ndog 0 0 9 9\n",
            "2": "bird 0 0 9 9 difficult\ncow 0 0 9 9\n",
            "3": "",
        },
        {
            "1": f"cat .9 0 0 9 9\ncat .8 20 0 29 9\ncat .7 {FAR}\ndog .9 0 0 9 4\n",
            "2": "bird .9 0 0 9 9\n",
            "3": "ghost .9 0 0 9 9\ndog .95 0 0 9 9\n",
        },
    )
    assert score_folder(folder) == {
        "mAP": 0.5,  # cat 1, cow 0, dog 1/2; bird is difficult only, ghost is detected only
        "AP": {"cat": 1.0, "cow": 0.0, "dog": 0.5},
        "iou_threshold": 0.5,
        "method": "all-point",
        "num_images": 3,
        "num_ground_truth": {"bird": 0, "cat": 1, "cow": 1, "dog": 1, "ghost": 0},
        "num_detections": {"bird": 1, "cat": 3, "cow": 0, "dog": 2, "ghost": 1},
        "true_positives": {"bird": 0, "cat": 1, "cow": 0, "dog": 1, "ghost": 0},
        "false_positives": {"bird": 0, "cat": 1, "cow": 0, "dog": 1, "ghost": 1},
    }


@pytest.mark.parametrize(("hit", "expected"), [("a-1", 1.0), ("a", 0.5)])
def test_equal_scores_come_in_the_order_of_sorted_file_names(tmp_path, hit, expected):
    # By file name "a-1.txt" comes before "a.txt", although the name "a" sorts before "a-1".
    truths = {"a": "", "a-1": "", hit: "cat 0 0 9 9"}
    detections = {name: f"cat .5 {'0 0 9 9' if name == hit else FAR}" for name in truths}
    assert score_folder(write_folder(tmp_path, truths, detections))["mAP"] == expected


def test_many_equal_scores_keep_their_order():
    # Sixteen or fewer would not do: short arrays are sorted stably whatever the method.
    count = 500
    wrong, right = [[60.0, 60.0, 69.0, 69.0]], [[0.0, 0.0, 9.0, 9.0]]
    prediction = {
        "boxes": torch.tensor(wrong * (count - 1) + right),
        "labels": torch.zeros(count, dtype=torch.int64),
        "scores": torch.full((count,), 0.5),
    }
    target = {"boxes": torch.tensor(right), "labels": torch.tensor([0])}
    assert average_precision([prediction], [target], ["cat"])["mAP"] == 1 / count


# ---------------------------------------------------------------------------------------------
# The text format
# ---------------------------------------------------------------------------------------------


def test_lines_are_read_from_the_right_and_blank_lines_skipped(tmp_path):
    folder = write_folder(
        tmp_path,
        {
            "1": "\ufeffdining table 0 0 9 9 difficult\r\n\r\n"
            "  dining\ttable 7\t0 0 9.5 1e1\tdifficult"
        },
        {"1": "\n\tpotted plant 2 -3.5 0 0 9 9  \n"},
    )
    (folder / "ground-truth" / "2.txt").write_text("difficult 0 0 9 9\n")
    (folder / "ground-truth" / "notes.md").write_text("not read")
    (folder / "detection-results" / "2.txt").write_text("")
    assert score_folder(folder)["num_ground_truth"] == {
        "difficult": 1,
        "dining table": 0,
        "dining\ttable 7": 0,
        "potted plant 2": 0,
    }


def test_missing_detections_warn_and_count_as_missed(tmp_path):
    truths = {str(number): "cat 0 0 9 9" for number in range(6)}
    folder = write_folder(tmp_path, truths, {"1": "cat .5 0 0 9 9"})
    with pytest.warns(UserWarning, match=r"5 files \(0.txt, 2.txt, 3.txt and 2 more\) missing"):
        result = score_folder(folder)
    assert result["mAP"] == pytest.approx(1 / 6)
    assert result["num_images"] == 6
    for read in (read_text_format, score_folder):
        with pytest.warns(UserWarning, match="missing") as caught:
            read(folder)
        assert caught[0].filename == __file__  # the line to look at is the caller's


def test_read_text_format(tmp_path):
    folder = write_folder(
        tmp_path,
        {"b": "dog 0 0 9 9 difficult\ncat 1 2 3 4", "a-1": "", "a": "cat 0 0 0.1 9"},
        {"b": "", "a-1": "ghost .25 0 0 9 9\ncat 0.1 1 2 3 4", "a": ""},
    )
    read = read_text_format(folder)
    assert read.image_names == ["a-1", "a", "b"]  # the order of the files: "-" before "."
    assert read.class_names == ["cat", "dog", "ghost"]
    found = [{key: value.tolist() for key, value in image.items()} for image in read.predictions]
    nothing = {"boxes": [], "labels": [], "scores": []}
    boxes = [[0, 0, 9, 9], [1, 2, 3, 4]]
    assert found == [{"boxes": boxes, "labels": [2, 0], "scores": [0.25, 0.1]}, nothing, nothing]
    assert [image["boxes"].tolist() for image in read.targets] == [[], [[0, 0, 0.1, 9]], boxes]
    assert [image["labels"].tolist() for image in read.targets] == [[], [0], [1, 0]]
    assert [image["difficult"].tolist() for image in read.targets] == [[], [False], [True, False]]
    assert read.predictions[1]["boxes"].shape == read.targets[0]["boxes"].shape == (0, 4)
    assert read.targets[0]["difficult"].dtype == torch.bool
    with pytest.raises(ValueError, match="2 images of .* have no ground truth box at all"):
        read_text_format(write_folder(tmp_path / "empty", {"1": "", "2": ""}, {"1": "", "2": ""}))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("ground-truth", "cat 0 0 9"),
        ("ground-truth", "0 0 9 9"),
        ("ground-truth", "cat 0 0 9 nine"),
        ("ground-truth", "cat 0 0 9 9 Difficult"),
        ("ground-truth", "difficult"),
        ("ground-truth", "cat 0 0 nan 9"),
        ("ground-truth", "cat 9 0 0 9"),
        ("ground-truth", "cat 0 9 9 0"),
        ("detection-results", "cat 0 0 9 9"),
        ("detection-results", "0.9 0 0 9 9"),
        ("detection-results", "dining table 0 0 9 9"),
        ("detection-results", "cat 0.9 0 0 9 9 difficult"),
        ("detection-results", "cat nan 0 0 9 9"),
        ("detection-results", "cat inf 0 0 9 9"),
        ("detection-results", "cat 0.9 0 0 9 inf"),
        ("detection-results", "cat 0.9 9 0 0 9"),
        ("detection-results", "cat 0.9 0 9 9 0"),
    ],
)
def test_malformed_lines_are_named(tmp_path, kind, line):
    folder = write_folder(tmp_path, {"im": "cat 0 0 9 9\n"}, {"im": "cat 0.9 0 0 9 9\n"})
    with open(folder / kind / "im.txt", "a") as stream:
        stream.write(f"\n{line}\n")
    with pytest.raises(ValueError) as error:
        score_folder(folder)
    form = "'class x1 y1 x2 y2 [difficult]'" if kind == "ground-truth" else "'class score x1"
    for part in (os.path.join(kind, "im.txt"), "line 3", repr(line), form):
        assert part in str(error.value)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="ground-truth is not a folder"):
        score_folder(tmp_path / "nowhere")
    (tmp_path / "half" / "ground-truth").mkdir(parents=True)
    with pytest.raises(ValueError, match="detection-results is not a folder"):
        score_folder(tmp_path / "half")
    with pytest.raises(ValueError, match="has no .txt file"):
        score_folder(write_folder(tmp_path / "empty", {}, {}))
    folder = write_folder(tmp_path / "more", {"1": "cat 0 0 9 9"}, {"1": "", "2": "", "3": ""})
    with pytest.raises(ValueError, match=r"2 files \(2.txt, 3.txt\).*write a ground truth file"):
        score_folder(folder)
    folder = write_folder(tmp_path / "hard", {"1": "cat 0 0 9 9 difficult"}, {"1": ""})
    with pytest.raises(ValueError, match="no ground truth box that is not difficult"):
        score_folder(folder)
    folder = write_folder(tmp_path / "binary", {"1": "cat 0 0 9 9"}, {"1": ""})
    (folder / "detection-results" / "1.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="1.txt is not a text file"):
        score_folder(folder)


# ---------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------

NAMES = ["dog", "cat", "dining table", "unicorn"]  # not sorted: results keep this order


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


def test_files_score_exactly_as_tensors(tmp_path):
    predictions, targets = random_images(0)
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        write_text_format(tmp_path, f"{index:06d}", prediction, target, NAMES)
    from_tensors = average_precision(predictions, targets, NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every image has both of its files
        from_files = score_folder(tmp_path)
    assert list(from_tensors["AP"]) == NAMES[:3]
    assert list(from_files["AP"]) == sorted(NAMES[:3])
    assert 0.2 < from_tensors["mAP"] < 0.8
    assert from_files["AP"] == from_tensors["AP"]
    assert from_files["num_images"] == from_tensors["num_images"] == len(targets)
    for column in ("num_ground_truth", "num_detections", "true_positives", "false_positives"):
        assert from_tensors[column].pop("unicorn") == 0  # no file mentions it
        assert from_files[column] == from_tensors[column]
    expected = slow_score(tmp_path)
    assert from_files["AP"] == pytest.approx(expected["AP"], abs=1e-9)
    read = read_text_format(tmp_path)
    for image, target in zip(read.targets, targets, strict=True):
        assert image["boxes"].tolist() == target["boxes"].tolist()  # to the last digit
    assert [len(image["scores"]) for image in read.predictions] == [
        len(image["scores"]) for image in predictions
    ]
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".txt"] * 2 * len(targets)


def test_written_files(tmp_path):
    prediction = {
        "boxes": torch.tensor([[1.0, 2.5, 30.0, 40.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.1]),
    }
    target = {
        "boxes": torch.tensor([[1, 2, 30, 40], [5, 6, 7, 8]]),
        "labels": torch.tensor([0, 1]),
        "difficult": torch.tensor([False, True]),
    }
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    write_text_format(tmp_path, "full", prediction, target, NAMES)
    write_text_format(tmp_path, "empty", nothing, nothing, NAMES)
    read = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.txt")
    }
    assert read == {
        "detection-results/full.txt": "dining table 0.10000000149011612 1.0 2.5 30.0 40.0\n",
        "ground-truth/full.txt": "dog 1.0 2.0 30.0 40.0\ncat 5.0 6.0 7.0 8.0 difficult\n",
        "detection-results/empty.txt": "",
        "ground-truth/empty.txt": "",
    }


def test_kinds_of_input_give_one_result():
    predictions, targets = random_images(1)
    expected = average_precision(predictions, targets, NAMES)

    def convert(images, function):
        return [{key: function(value) for key, value in image.items()} for image in images]

    arrays = convert(predictions, np.asarray), convert(targets, np.asarray)
    assert average_precision(*arrays, NAMES) == expected
    # Some images of tensors among arrays, gradients attached, small types, whole-number floats.
    mixed = [arrays[0][0], *predictions[1:]], [*arrays[1][:-1], targets[-1]]
    assert average_precision(*mixed, NAMES) == expected
    graph = [{**p, "scores": p["scores"].clone().requires_grad_()} for p in predictions]
    assert average_precision(graph, targets, NAMES) == expected
    small = [
        {**p, "scores": p["scores"].bfloat16()} for p in predictions
    ]  # exact, as they are made
    assert average_precision(small, targets, tuple(NAMES)) == expected
    floats = [{**t, "labels": t["labels"].float()} for t in targets]
    assert average_precision(predictions, floats, NAMES) == expected


def test_inputs_stay_as_they_are():
    predictions, targets = random_images(2, count=12)
    before = [{k: v.clone() for k, v in image.items()} for image in (*predictions, *targets)]
    average_precision(predictions, targets, NAMES)
    for image, copy in zip((*predictions, *targets), before, strict=True):
        assert image.keys() == copy.keys()
        assert all(torch.equal(image[key], copy[key]) for key in copy)


def one_image(**changes) -> tuple[list[dict], list[dict], list[str]]:
    """A valid call; ``prediction_boxes=...`` and the like replace one part (None removes it)."""
    box, label = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0])
    prediction = {"boxes": box, "labels": label, "scores": torch.tensor([0.5])}
    target = {"boxes": box, "labels": label}
    for name, value in changes.items():
        where, key = name.split("_")
        {"prediction": prediction, "target": target}[where][key] = value
    return [prediction], [target], ["cat", "dog"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_scores": None}, r"predictions\[0\]\['scores'\] must be a tensor"),
        ({"target_boxes": None}, r"targets\[0\]\['boxes'\] must be a tensor"),
        ({"target_difficult": [False]}, r"targets\[0\]\['difficult'\] must be a tensor"),
        ({"prediction_boxes": torch.zeros(4)}, r"'boxes'\] must have shape .*, got \(4,\)"),
        ({"target_boxes": torch.zeros(1, 5)}, r"'boxes'\] must have shape .*, got \(1, 5\)"),
        ({"prediction_labels": torch.zeros(2)}, r"'labels'\] must have shape \(1,\)"),
        ({"prediction_scores": torch.zeros(1, 1)}, r"'scores'\] must have shape \(1,\)"),
        ({"target_difficult": torch.zeros(3)}, r"'difficult'\] must have shape \(1,\)"),
        ({"prediction_labels": torch.tensor([2])}, r"label 2, expected whole numbers 0\.\.1"),
        ({"target_labels": torch.tensor([-1])}, "label -1, .* remove padding"),
        ({"target_labels": torch.tensor([0.5])}, "label 0.5"),
        ({"target_labels": torch.tensor([torch.nan])}, "label nan"),
        ({"prediction_scores": torch.tensor([torch.nan])}, "score nan"),
        ({"prediction_scores": torch.tensor([torch.inf])}, "score inf"),
        ({"prediction_boxes": torch.tensor([[9.0, 0, 0, 9]])}, r"box \[9.0, 0.0, 0.0, 9.0\]"),
        ({"target_boxes": torch.tensor([[0.0, 9, 9, 0]])}, r"targets\[0\] has the box"),
        ({"target_boxes": torch.tensor([[0, 0, 9, torch.nan]])}, "expected finite x1"),
        ({"target_difficult": torch.tensor([True])}, "no ground truth box that is not difficult"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_wrong_tensors_are_named(changes, message):
    assert average_precision(*one_image())["mAP"] == 1.0
    with pytest.raises(ValueError, match=message):
        average_precision(*one_image(**changes))


def test_the_wrong_image_is_named():
    predictions, targets = random_images(3, count=12)
    predictions[10]["scores"][1] = torch.nan
    with pytest.raises(ValueError, match=r"predictions\[10\] has a score nan"):
        average_precision(predictions, targets, NAMES)


def test_wrong_calls_are_named():
    predictions, targets, names = one_image()
    with pytest.raises(ValueError, match="predictions of 2 images and targets of 1"):
        average_precision(predictions * 2, targets, names)
    with pytest.raises(ValueError, match="the 0 images have no ground truth"):
        average_precision([], [], names)
    with pytest.raises(ValueError, match=r"targets\[0\] must be a mapping"):
        average_precision(predictions, [targets[0]["boxes"]], names)


@pytest.mark.parametrize("names", ["cat", {0: "cat"}, [], [0], ["cat", "cat"], [" cat"], ["c\nt"]])
def test_wrong_class_names_are_named(tmp_path, names):
    predictions, targets, _ = one_image()
    with pytest.raises(ValueError, match="class_names|class name"):
        average_precision(predictions, targets, names)
    with pytest.raises(ValueError, match="class_names|class name"):
        write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_wrong_thresholds_are_named(tmp_path, threshold):
    with pytest.raises(ValueError, match="iou_threshold must be in 0..1"):
        average_precision(*one_image(), threshold)
    folder = write_folder(tmp_path, {"1": "cat 0 0 9 9"}, {"1": ""})
    with pytest.raises(ValueError, match="iou_threshold must be in 0..1"):
        score_folder(folder, threshold)


@pytest.mark.parametrize("name", ["", ".", "a/b", "/a", "a\0b"])
def test_wrong_image_names_are_named(tmp_path, name):
    predictions, targets, names = one_image()
    with pytest.raises(ValueError, match="cannot name a file"):
        write_text_format(tmp_path / "out", name, predictions[0], targets[0], names)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    predictions, targets, names = one_image()
    write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    predictions[0]["scores"] += 0.1
    with pytest.raises(OSError, match="disk full"):
        write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    assert before == {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------


def test_result_survives_json():
    result = average_precision(*random_images(4), NAMES)
    assert json.loads(json.dumps(result)) == result
    assert list(json.loads(json.dumps(result))["AP"]) == NAMES[:3]


def test_table(tmp_path):
    folder = write_folder(
        tmp_path,
        {"1": "cat 0 0 9 9\ncat 20 0 29 9\ndining table 0 0 9 9"},
        {"1": f"cat .9 0 0 9 9\ncat .8 {FAR}"},
    )
    assert format_table(score_folder(folder)).splitlines() == [
        "class           AP %   boxes    true   false",
        "cat            50.00       2       1       1",
        "dining table    0.00       1       0       0",
        "mAP@0.5        25.00",
    ]


@pytest.mark.parametrize("saved", [False, True])
def test_plot(tmp_path, monkeypatch, saved):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "show", lambda: pytest.fail("the caller shows figures"))
    ap = {"low": 0.1, "high": 0.9, "middle": 0.5}
    path = tmp_path / "new" / "ap.png" if saved else None
    axes = plot_average_precision({"AP": ap, "mAP": 0.5, "iou_threshold": 0.5}, path)
    assert axes.get_title() == "mAP 50.0 %"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "middle", "low"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([90, 50, 10])
    assert axes.yaxis_inverted()  # the first bar is on top
    if saved:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [entry.name for entry in path.parent.iterdir()] == ["ap.png"]
        assert not pyplot.get_fignums()
    else:
        pyplot.close(axes.figure)
