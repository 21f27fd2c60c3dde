"""Folders of text files: files that are missing, and images that were left out."""

from __future__ import annotations

import warnings

import pytest

from eecs598.metrics.folder_diagnostics import find_folder_diagnostics
from eecs598.metrics.text_format import write_text_format
from tests.metrics.detections import CLASSES, made_up


def write_folder(folder, predictions, targets) -> None:
    for number, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        write_text_format(folder, f"{number:03d}", prediction, target, CLASSES)


def confident(predictions, threshold: float = 0.5) -> list[dict]:
    return [{k: v[p["scores"] > threshold] for k, v in p.items()} for p in predictions]


def test_images_that_were_skipped(tmp_path):
    predictions, targets, _ = made_up(0, num_images=300, recall=0.5)
    predictions = confident(predictions)
    write_folder(tmp_path / "whole", predictions, targets)
    assert find_folder_diagnostics(tmp_path / "whole") == []
    kept = [i for i, prediction in enumerate(predictions) if len(prediction["scores"])]
    assert len(kept) < 290
    write_folder(tmp_path / "skipped", [predictions[i] for i in kept], [targets[i] for i in kept])
    (found,) = find_folder_diagnostics(tmp_path / "skipped")
    assert found.name == "images_without_detections_missing"
    every = [f"{number:03d}" for number in range(300)]
    (found,) = find_folder_diagnostics(tmp_path / "skipped", every)
    assert found.name == "ground_truth_missing"
    assert f"{300 - len(kept)} images" in found.message
    assert find_folder_diagnostics(tmp_path / "whole", every) == []


@pytest.mark.parametrize(
    "quality, threshold",
    [
        ({"recall": 1.0, "false_positives": 0}, 0),  # finds everything, and nothing else
        ({"recall": 0.9, "false_positives": 6}, 0),  # any image has false ones
        ({"recall": 0.95}, 0.5),
    ],
)
def test_folders_in_which_every_image_should_have_detections(tmp_path, quality, threshold):
    predictions, targets, _ = made_up(0, **quality)
    write_folder(tmp_path, confident(predictions, threshold), targets)
    assert find_folder_diagnostics(tmp_path) == []


def test_missing_detection_files(tmp_path):
    predictions, targets, _ = made_up(0, num_images=20)
    write_folder(tmp_path, predictions, targets)
    for number in (3, 7, 8, 9):
        (tmp_path / f"detection-results/{number:03d}.txt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = find_folder_diagnostics(tmp_path)
    assert found.name == "detection_files_missing"
    assert "4 images (003, 007, 008 and 1 more)" in found.message
