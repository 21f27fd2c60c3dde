"""All metrics of an evaluation together, and the comparison of two."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch

from eecs598.metrics import (
    Matches,
    analyze_errors,
    average_precision,
    bootstrap_map,
    coco_metrics,
    confusion_matrix,
    find_diagnostics,
    image_names,
    match_detections,
    matching,
    precision_recall,
    precision_recall_curves,
    read_text_format,
    score_folder,
    score_matches,
)
from eecs598.report.analysis import analyze, compare
from fcos.results import export_text
from tests.evaluations import export, make_evaluation


def test_the_metrics_of_an_evaluation_by_hand(tmp_path):
    metrics = analyze(make_evaluation(tmp_path)).metrics
    # cat: 2 objects, one found by the first of 4 detections; the other class finds nothing.
    assert metrics["AP"] == {"cat": 0.5, "a < b": 0.0}
    assert metrics["mAP"] == 0.25
    assert metrics["mAP_11_point"] == pytest.approx(6 / 11 / 2)  # recalls 0 to 0.5, precision 1
    # At 0.9 there is one true detection and no false one, of 4 objects: F1 = 2 / (1 + 4).
    assert metrics["best_threshold"] == pytest.approx(0.9)
    assert metrics["best_f1"] == pytest.approx(0.4)
    assert metrics["confusion_matrix"] == [[1, 0, 1], [0, 0, 2], [0, 0, 0]]
    counts = metrics["errors"]["counts"]
    assert [counts[kind] for kind in ("duplicate", "class", "localization", "both")] == [1] * 4
    assert counts["background"] == 1 and counts["missed"] == 1
    low, high = metrics["interval"]
    assert low <= metrics["mAP"] <= high
    json.dumps(metrics, allow_nan=False)


def test_an_evaluation_is_matched_once(tmp_path, monkeypatch):
    """By ``analyze`` and what comes before and after it: the mAP of training, a comparison."""
    calls = Counter()

    def count(name: str) -> None:
        original = getattr(matching, name)

        def counted(*args):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(matching, name, counted)

    count("_match")
    count("overlapping_pairs")
    evaluation = make_evaluation(tmp_path)
    map_of_training = score_matches(evaluation.matches)["mAP"]
    analysis = analyze(evaluation)
    assert analysis.matches is evaluation.matches and analysis.metrics["mAP"] == map_of_training
    # Pairs of one class to match them, and those of any classes for the kinds of errors.
    assert calls == {"_match": 1, "overlapping_pairs": 2}
    folder = export(evaluation, tmp_path / "run")
    compare(evaluation, read_text_format(folder), "the other")
    assert calls["_match"] == 2  # the other one's


def test_every_measure_is_what_it_is_on_its_own(tmp_path):
    evaluation = make_evaluation(tmp_path)
    metrics = analyze(evaluation).metrics
    given = evaluation.predictions, evaluation.targets, evaluation.class_names

    def matches() -> Matches:
        return match_detections(*given)

    interval = bootstrap_map(matches())
    overall = precision_recall(matches())
    threshold = overall.best_f1_threshold
    curves = precision_recall_curves(matches())
    assert metrics == {
        **average_precision(*given),
        "score_thresh": 0.05,
        "mAP_11_point": average_precision(*given, method="11-point")["mAP"],
        "interval": [interval.low, interval.high],
        "best_f1": overall.best_f1,
        "best_threshold": threshold,
        "classes": {
            name: {"best_f1": curve.best_f1, "best_threshold": curve.best_f1_threshold}
            for name, curve in curves.items()
        },
        "confusion_matrix": confusion_matrix(matches(), threshold).tolist(),
        "errors": analyze_errors(matches()).to_dict(),
        "diagnostics": [d.message for d in find_diagnostics(matches(), evaluation.image_sizes)],
        "coco": coco_metrics(matches()),
        "devkit": None,  # it is not known which objects are difficult
    }


def test_an_evaluation_without_detections(tmp_path):
    metrics = analyze(make_evaluation(tmp_path, drop=("first", "second", "fourth"))).metrics
    assert metrics["mAP"] == 0 and metrics["best_threshold"] is None
    assert metrics["diagnostics"]  # nothing detected at all


def test_a_comparison_with_itself_shows_no_difference(tmp_path):
    evaluation = make_evaluation(tmp_path)
    folder = export(evaluation, tmp_path / "run")
    comparison = compare(evaluation, read_text_format(folder), "the other")
    assert comparison.name == "the other"
    result = comparison.difference
    assert (result.difference, result.low, result.high, result.exceeds) == (0, 0, 0, False)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_comparison_may_be_with_another_image_size(tmp_path, scale):
    folder = export(make_evaluation(tmp_path, scale, drop=("first",)), tmp_path / "run")
    comparison = compare(make_evaluation(tmp_path), read_text_format(folder), "run")
    assert comparison.other["AP"]["cat"] == score_folder(folder)["AP"]["cat"] == 0
    assert comparison.difference.difference == pytest.approx(0.25)


def test_a_comparison_scores_the_other_in_the_pixels_of_this_one(tmp_path):
    """The other is a twentieth as large, where inclusive pixels change what matches."""
    evaluation = make_evaluation(tmp_path)
    # An IoU of 30 / 61 here, and of 2.45 / 4 there.
    evaluation.predictions[1]["boxes"][0] = torch.tensor([20.0, 20, 80, 49])
    folder = export(evaluation, tmp_path / "run")
    shrunk = dataclasses.replace(
        evaluation,
        predictions=[{**p, "boxes": p["boxes"] / 20} for p in evaluation.predictions],
        targets=[{**t, "boxes": t["boxes"] / 20} for t in evaluation.targets],
    )
    small = export(shrunk, tmp_path / "small")
    assert score_folder(small)["mAP"] > score_folder(folder)["mAP"] == 0.25
    comparison = compare(evaluation, read_text_format(small), "small")
    assert comparison.other["mAP"] == 0.25 and comparison.difference.difference == 0


def test_a_comparison_leaves_out_difficult_objects_of_the_other(tmp_path):
    evaluation = make_evaluation(tmp_path)
    difficult = [{"boxes": t["boxes"] + 3, "labels": t["labels"]} for t in evaluation.targets]
    evaluation = dataclasses.replace(evaluation, difficult=difficult)
    export_text(evaluation, tmp_path / "run", keep_difficult=True)
    other = read_text_format(tmp_path / "run")
    assert sum(int(target["difficult"].sum()) for target in other.targets) == 4
    comparison = compare(evaluation, other, "run")
    assert comparison.other["num_ground_truth"] == {"cat": 2, "a < b": 2}
    assert comparison.difference.difference == 0


def test_comparisons_that_make_no_sense_are_refused(tmp_path):
    evaluation = make_evaluation(tmp_path)
    folder = export(evaluation, tmp_path / "run")
    (folder / "ground-truth" / "first.txt").write_text("cat 1 2 3 4\n")
    with pytest.raises(ValueError, match="first .* other objects"):
        compare(evaluation, read_text_format(folder), "run")
    (folder / "ground-truth" / "first.txt").write_text("cat 60 10 90 50\na < b 60 60 90 90\n")
    with pytest.raises(ValueError, match="first .* other objects"):  # one is elsewhere
        compare(evaluation, read_text_format(folder), "run")
    (folder / "ground-truth" / "first.txt").write_text("dog 1 2 3 4\n")
    with pytest.raises(ValueError, match="dog"):
        compare(evaluation, read_text_format(folder), "run")
    less = dataclasses.replace(
        evaluation,
        **{
            name: getattr(evaluation, name)[1:]
            for name in ("image_paths", "image_sizes", "predictions", "targets")
        },
    )
    with pytest.raises(ValueError, match="4 images and this evaluation 3; 1 .* first in all"):
        compare(less, read_text_format(export(evaluation, tmp_path / "all")), "all")


def test_images_of_one_name_in_several_folders_are_told_apart(tmp_path):
    names = image_names(["/data/a/1.png", "/data/b/1.png", "/data/b/2.png"])
    assert names == ["a__1.png", "b__1.png", "b__2.png"]
    assert image_names(["/data/a/1.png", "/data/b/2.png"]) == ["1", "2"]
    evaluation = make_evaluation(tmp_path)
    paths = [f"{tmp_path}/{number}/same.png" for number in range(4)]
    evaluation = dataclasses.replace(evaluation, image_paths=paths)
    folder = export(evaluation, tmp_path / "run")
    assert score_folder(folder)["mAP"] == 0.25
    assert compare(evaluation, read_text_format(folder), "run").difference.difference == 0


def test_numbers_that_are_none_are_explained(tmp_path):
    evaluation = make_evaluation(tmp_path)
    evaluation.predictions[0]["scores"][1] = math.nan
    with pytest.raises(ValueError, match="(?s)must be finite.*NaN"):
        analyze(evaluation)


def test_labels_out_of_range_are_explained(tmp_path):
    evaluation = make_evaluation(tmp_path)
    evaluation.predictions[0]["labels"][1] = 90
    with pytest.raises(ValueError, match=r"(?s)the label 90.*1 of \d+ labels are none of 0\."):
        analyze(evaluation)
