"""Matches of detections and ground truth: by hand, of every kind of input, and of wrong input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eecs598.metrics.average_precision import average_precision, precision_recall_curves
from eecs598.metrics.matching import match_detections
from eecs598.metrics.text_format import write_text_format
from tests.metrics.examples import NAMES, random_images, row_of_boxes, status, valid_call


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
    assert status(matches) == ["true", "false", "true", "false", "true", "ignored", "false"]
    assert matches.gt.tolist() == [0, -1, 1, 0, 3, 2, -1]
    assert matches.iou.tolist() == pytest.approx([1, -1, 0.6, 1, 1, 1, -1])
    assert matches.is_match.tolist() == [True, False, True, True, True, True, False]
    assert matches.is_fp.tolist() == [word == "false" for word in status(matches)]
    for detection, (image, index) in enumerate(zip(matches.image, matches.index, strict=True)):
        assert matches.box[detection].tolist() == predictions[image]["boxes"][index].tolist()
    assert matches.gt_image.tolist() == [0, 0, 0, 1, 1]
    assert matches.gt_index.tolist() == [0, 1, 2, 0, 1]
    assert matches.gt_found.tolist() == [True, True, False, True, False]
    assert matches.num_ground_truth.tolist() == [4, 0]
    # A match by 60 % is none at 0.7, and is still what the detection overlaps most.
    stricter = match_detections(predictions, targets, ["cat", "dog"], 0.7)
    assert stricter.gt.tolist() == matches.gt.tolist()
    assert stricter.is_match.tolist() == [True, False, False, True, True, True, False]


def test_pairs_of_an_image_whatever_the_class():
    box, half, apart = [0.0, 0, 9, 9], [0.0, 0, 9, 4], [40.0, 0, 49, 9]
    predictions = [
        {"boxes": np.array([half, box]), "labels": [0, 1], "scores": [0.5, 0.9]},
        {"boxes": np.array([box]), "labels": [0], "scores": [0.7]},
    ]
    targets = [
        {"boxes": np.array([box, apart, half]), "labels": [0, 0, 1]},
        {"boxes": np.array([apart]), "labels": [0]},
    ]
    for image in (*predictions, *targets):
        image.update({key: np.array(image[key]) for key in image})
    matches = match_detections(predictions, targets, ["cat", "dog"])
    pairs = matches.pairs
    assert matches.pairs is pairs  # made once
    # By score: the dog on the whole box, the other image's cat, the cat on the upper half.
    assert pairs.detection.tolist() == [0, 0, 2, 2]
    assert pairs.gt.tolist() == [0, 2, 0, 2]
    assert pairs.iou.tolist() == [1, 0.5, 0.5, 1]
    assert [column.tolist() for column in matches.pairs_of_class] == [[0, 2], [2, 0], [0.5, 0.5]]


def test_other_boxes_of_the_same_detections():
    predictions, targets = random_images(6)
    matches = match_detections(predictions, targets, NAMES)
    moved = [{**image, "boxes": image["boxes"].double() + 7} for image in predictions]
    expected = match_detections(moved, targets, NAMES)
    result = matches.with_boxes(matches.box + 7)
    assert not np.array_equal(result.is_tp, matches.is_tp)
    for name, values in vars(expected).items():
        assert np.array_equal(getattr(result, name), values), name


def test_nothing_to_match():
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    for images in ([], [nothing]):
        matches = match_detections(images, images, ["cat"])
        assert len(matches.score) == len(matches.gt_label) == 0
        assert matches.num_images == len(images)
        with pytest.raises(ValueError, match="no ground truth"):
            precision_recall_curves(matches)
    predictions, targets, names = valid_call()
    result = average_precision([nothing], targets, names)
    assert (result["mAP"], result["num_detections"]["cat"]) == (0, 0)
    assert status(match_detections(predictions, [nothing], names)) == ["false"]


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
    assert average_precision(*valid_call())["mAP"] == 1.0
    with pytest.raises(ValueError, match=message):
        average_precision(*valid_call(**changes))


def test_the_wrong_image_is_named():
    predictions, targets = random_images(3, count=12)
    predictions[10]["scores"][1] = torch.nan
    with pytest.raises(ValueError, match=r"predictions\[10\] has a score nan"):
        average_precision(predictions, targets, NAMES)


def test_wrong_calls_are_named():
    predictions, targets, names = valid_call()
    with pytest.raises(ValueError, match="predictions of 2 images and targets of 1"):
        average_precision(predictions * 2, targets, names)
    with pytest.raises(ValueError, match="the 0 images have no ground truth"):
        average_precision([], [], names)
    with pytest.raises(ValueError, match=r"targets\[0\] must be a mapping"):
        average_precision(predictions, [targets[0]["boxes"]], names)


@pytest.mark.parametrize("names", ["cat", {0: "cat"}, [], [0], ["cat", "cat"], [" cat"], ["c\nt"]])
def test_wrong_class_names_are_named(tmp_path, names):
    predictions, targets, _ = valid_call()
    with pytest.raises(ValueError, match="class_names|class name"):
        average_precision(predictions, targets, names)
    with pytest.raises(ValueError, match="class_names|class name"):
        write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    assert not list(tmp_path.iterdir())
