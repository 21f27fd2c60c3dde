"""Average precision: against a slow loop that follows the definition, and against hand counts."""

from __future__ import annotations

import json
import random
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from eecs598.metrics.average_precision import (
    average_precision,
    format_table,
    plot_average_precision,
    precision_recall_curves,
    score_folder,
)
from eecs598.metrics.matching import match_detections
from eecs598.metrics.text_format import read_text_format, write_text_format
from tests.metrics.examples import (
    FAR,
    NAMES,
    one_class,
    random_folder,
    random_images,
    row_of_boxes,
    slow_score,
    status,
    valid_call,
    write_folder,
)


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
        average_precision(*valid_call(), method="12")


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
            words = np.array(status(matches))[matches.label == label].tolist()
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
# Curves
# ---------------------------------------------------------------------------------------------


def test_precision_recall_curve_by_hand():
    # True, then a true and a false one of equal score, false, true; 4 boxes.
    boxes = row_of_boxes(9)[[0, 7, 1, 8, 2]]
    predictions, targets, names = one_class(boxes, 4, [0.75, 0.5, 0.5, 0.25, 0.125])
    curve = precision_recall_curves(match_detections(predictions, targets, names))["cat"]
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
        curve = precision_recall_curves(match_detections(fewer, targets, names))["cat"]
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
    matches = match_detections([prediction], [target], ["cat", "dog", "cow", "ghost"])
    curves = precision_recall_curves(matches)
    assert list(curves) == ["cat", "dog", "cow"]
    assert len(curves["cat"].recall) == len(curves["cat"].scores) == 0
    assert (curves["cat"].best_f1, curves["cat"].best_f1_threshold) == (0.0, None)
    assert (curves["dog"].recall.tolist(), curves["dog"].precision.tolist()) == ([1], [1])
    assert curves["dog"].best_f1_threshold == pytest.approx(0.7)
    assert curves["cow"].precision.tolist() == [0]
    assert (curves["cow"].best_f1, curves["cow"].best_f1_threshold) == (0, pytest.approx(0.6))


def test_the_threshold_of_the_best_f1_gives_it():
    predictions, targets = random_images(5)
    curves = precision_recall_curves(match_detections(predictions, targets, NAMES))
    for label, curve in enumerate(curves.values()):
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


# ---------------------------------------------------------------------------------------------
# Folders and tensors
# ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_wrong_thresholds_are_named(tmp_path, threshold):
    with pytest.raises(ValueError, match="iou_threshold must be in 0..1"):
        average_precision(*valid_call(), threshold)
    folder = write_folder(tmp_path, {"1": "cat 0 0 9 9"}, {"1": ""})
    with pytest.raises(ValueError, match="iou_threshold must be in 0..1"):
        score_folder(folder, threshold)


# ---------------------------------------------------------------------------------------------
# Tables and plots
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
