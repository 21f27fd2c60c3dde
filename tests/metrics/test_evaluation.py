"""An evaluation of a detector: by the course's rule and the devkit's, in pixels of the files."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from a4_helper import VOC2007DetectionTiny, evaluate_detector, inference_with_detector
from eecs598.metrics import Evaluation, average_precision, score_matches
from eecs598.report.analysis import analyze
from eecs598.report.html import _recall_by_level, _recall_by_size
from tests.evaluations import make_evaluation

DOG, OTHER_DOG = [10.0, 10, 50, 50], [60.0, 10, 90, 50]


def objects(*boxes: list[float]) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes).reshape(-1, 4),
        "labels": torch.zeros(len(boxes), dtype=torch.int64),
    }


def evaluation(found: list, ordinary: list, difficult: list | None) -> Evaluation:
    """One image; the detections by falling score."""
    scores = 0.9 - 0.1 * torch.arange(len(found))
    return Evaluation(
        ["dog"],
        ["a.jpg"],
        [(100, 100)],
        [{**objects(*found), "scores": scores}],
        [objects(*ordinary)],
        0.05,
        difficult=None if difficult is None else [objects(*difficult)],
    )


# --------------------------------------------------------------------------------------------
# Difficult objects
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "course", "devkit"),
    [
        ([OTHER_DOG, DOG], 0.5, 1.0),  # both found, the difficult one first
        ([OTHER_DOG, OTHER_DOG, DOG], 1 / 3, 1.0),  # twice on a difficult one: no duplicate
        ([[60.0, 10, 90, 20], DOG], 0.5, 0.5),  # beside both: IoU below 0.5
        ([OTHER_DOG], 0.0, 0.0),  # the difficult one is not to be found
        ([], 0.0, 0.0),
    ],
)
def test_a_match_to_a_difficult_object_counts_neither_way(found, course, devkit):
    metrics = analyze(evaluation(found, [DOG], [OTHER_DOG])).metrics
    assert metrics["mAP"] == pytest.approx(course)
    assert metrics["devkit"]["mAP"] == metrics["devkit"]["AP"]["dog"] == pytest.approx(devkit)
    assert metrics["devkit"]["num_difficult"] == 1
    # Everything else is by the course's rule.
    assert metrics["num_ground_truth"] == {"dog": 1}
    assert metrics["num_detections"]["dog"] == len(found)
    assert metrics["true_positives"]["dog"] + metrics["false_positives"]["dog"] == len(found)


def test_a_difficult_object_that_overlaps_more_takes_the_detection():
    """As in the devkit, only the best ground truth is looked at, flagged or not."""
    between = [14.0, 10, 54, 50]
    metrics = analyze(evaluation([between], [DOG], [[16.0, 10, 56, 50]])).metrics
    assert metrics["mAP"] == 1.0 and metrics["devkit"]["mAP"] == 0.0


def test_what_is_not_known_is_not_claimed():
    unknown = evaluation([DOG], [DOG], None)
    assert analyze(unknown).metrics["devkit"] is None and unknown.devkit_matches is None
    with pytest.raises(ValueError, match="not known which objects are difficult"):
        _ = unknown.devkit_targets
    none = evaluation([DOG], [DOG], [])
    assert none.devkit_matches is none.matches
    assert analyze(none).metrics["devkit"]["mAP"] == 1.0


# --------------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A detector that always finds the same boxes, in pixels of what it sees."""

    def __init__(self, *boxes: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.found = torch.tensor(boxes)

    def forward(self, images: Tensor, *, test_score_thresh: float, test_nms_thresh: float):
        labels = torch.zeros(len(self.found), dtype=torch.int64)
        return self.found, labels, torch.linspace(0.9, 0.8, len(self.found))


def test_matches_do_not_depend_on_the_image_size(voc_folder):
    picture = Image.new("RGB", (60, 50))
    folder = voc_folder({"val": {"a": (picture, [("dog", 0, 0, 9, 9)])}})
    for side, factor in ((50, 1), (100, 2), (25, 0.5)):
        dataset = VOC2007DetectionTiny(folder, "val", image_size=side, classes=["dog"])
        detector = Fixed([0, 0, 4.2 * factor, 9.0 * factor])
        result = evaluate_detector(detector, dataset, 0.05, 0.5)
        assert result.image_sizes == [(50, 60)] and list(result.input_sizes) == [
            (side, side * 6 // 5)
        ]
        # Inclusive pixels: 5.2 * 10 of 10 * 10.
        assert result.matches.iou[0] == pytest.approx(0.52)
        assert score_matches(result.matches)["mAP"] == 1.0
        assert result.targets[0]["boxes"].tolist() == [[0, 0, 9, 9]]
        loader = torch.utils.data.DataLoader(dataset)
        # The assignment's export stays in resized pixels: 9.4 * 19 of 19 * 19 is too little.
        resized = inference_with_detector(detector, loader, {0: "dog"}, 0.05, 0.5, folder / "text")
        assert average_precision(*resized, ["dog"])["mAP"] == (0.0 if factor == 2 else 1.0)


def test_boxes_from_edge_to_edge_are_scored_in_the_annotations_numbers(voc_folder):
    folder = voc_folder({"val": {"a": (Image.new("RGB", (60, 50)), [("dog", 1, 1, 9, 9)])}})
    dataset = VOC2007DetectionTiny(folder, "val", image_size=100, classes=["dog"])
    found = Fixed([0.0, 0, 18, 18], [30.0, 30, 31, 30])  # edges, at twice the size
    result = evaluate_detector(found, dataset, 0.05, 0.5, pixel_edges=True)
    assert result.predictions[0]["boxes"].tolist() == [[1, 1, 9, 9], [15.5, 15, 15.5, 15]]
    assert result.matches.iou[0] == 1
    as_it_is = evaluate_detector(found, dataset, 0.05, 0.5)
    assert as_it_is.predictions[0]["boxes"][0].tolist() == [0, 0, 9, 9]


def test_a_data_set_that_crops_is_refused(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "train", classes=("cube", "dice"))
    with pytest.raises(ValueError, match="crop=False"):
        evaluate_detector(Fixed([0, 0, 9, 9]), dataset, 0.05, 0.5)


def test_a_wrong_size_is_refused_before_the_detector_runs(small_voc):
    path = small_voc / "Annotations/0009.xml"
    path.write_text(path.read_text().replace("<width>96", "<width>97"))
    dataset = VOC2007DetectionTiny(small_voc, "val", classes=("cube", "dice"))
    with pytest.raises(ValueError, match=r"0009\.jpg has 96 x 64 pixels, but .* for 97 x 64"):
        evaluate_detector(nn.Identity(), dataset, 0.05, 0.5)


def test_difficult_objects_of_a_data_set(voc_folder):
    picture = Image.new("RGB", (96, 64))
    folder = voc_folder({"val": {"a": (picture, [("dog", *DOG), ("dog", *OTHER_DOG)])}})
    xml = folder / "Annotations/a.xml"
    start, end = xml.read_text().rsplit("<difficult>0", 1)
    xml.write_text(f"{start}<difficult>1{end}")
    dataset = VOC2007DetectionTiny(folder, "val", image_size=64, classes=["dog"])
    assert dataset[0][2].tolist() == [[*DOG, 0]]  # the assignment's item
    result = evaluate_detector(Fixed(OTHER_DOG, DOG), dataset, 0.05, 0.5)
    metrics = analyze(result).metrics
    assert (metrics["mAP"], metrics["devkit"]["mAP"]) == (0.5, 1.0)


@pytest.mark.parametrize("breakdown", [_recall_by_size, _recall_by_level])
def test_sizes_and_levels_are_those_of_what_the_detector_saw(tmp_path, breakdown):
    """Boxes in pixels of files that are three times as wide and twice as high."""
    seen = make_evaluation(tmp_path)
    factors = torch.tensor([3.0, 2.0, 3.0, 2.0])

    def enlarge(items: list[dict]) -> list[dict]:
        return [{**item, "boxes": item["boxes"] * factors} for item in items]

    original = dataclasses.replace(
        seen,
        image_sizes=[(200, 300)] * 4,
        predictions=enlarge(seen.predictions),
        targets=enlarge(seen.targets),
        input_sizes=seen.image_sizes,
    )
    assert breakdown(analyze(original)) == breakdown(analyze(seen)) != []
    assert breakdown(analyze(dataclasses.replace(original, input_sizes=None))) != breakdown(
        analyze(seen)
    )
    assert original.input_matches.gt_box == pytest.approx(seen.matches.gt_box)
