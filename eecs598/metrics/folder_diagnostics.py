"""Diagnostics of a folder of text files: images or files that are missing.

Symbols: K detections and M objects of an image.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.ops import box_iou

from eecs598.metrics.diagnostics import Diagnostic
from eecs598.metrics.text_format import DETECTIONS_FOLDER, GROUND_TRUTH_FOLDER, read_text_format


def find_folder_diagnostics(
    folder: str | os.PathLike[str], image_names: Sequence[str] | None = None
) -> list[Diagnostic]:
    """Look for what is missing in a folder in the text format of ``read_text_format``.

    Args:
        folder: with ``detection-results/`` and ``ground-truth/``.
        image_names: of all images of the data set, without suffix, where they are known.

    Raises:
        ValueError: the folder can't be read, see ``read_text_format``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing files, which are reported below
        data = read_text_format(folder)
    found = []
    detection_files = set(os.listdir(Path(folder) / DETECTIONS_FOLDER))
    missing = [name for name in data.image_names if f"{name}.txt" not in detection_files]
    if missing:
        found.append(
            Diagnostic(
                "detection_files_missing",
                f"{_listed(missing)} in {GROUND_TRUTH_FOLDER}/ have no file in "
                f"{DETECTIONS_FOLDER}/. They are scored as images without detections; other "
                "programs stop or leave them out. Usual causes: no file is written for an image "
                "without detections, or the export was interrupted. Write an empty file for them.",
                "error",
            )
        )
    left_out = sorted(set(image_names or ()) - set(data.image_names))
    if left_out:
        found.append(
            Diagnostic(
                "ground_truth_missing",
                f"{_listed(left_out)} of the data set have no file in {GROUND_TRUTH_FOLDER}/, so "
                "their objects are not counted as missed. Usual cause: an image without "
                "detections is skipped together with its ground truth. Write both files for every "
                "image.",
                "error",
            )
        )
    elif not missing and image_names is None:
        found += _skipped_images(data.predictions, data.targets)
    return found


def _skipped_images(
    predictions: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
) -> list[Diagnostic]:
    """Report that every image has a detection, where a number of them should have none.

    How many should: an image without detections has neither right nor wrong ones. Of a images with
    wrong ones alone, b with right ones alone and c with both, a b / c is expected to have neither
    when the two are independent (Lincoln and Petersen's estimate of a population). Where they are
    not, it is because crowded images have more of both, and the estimate is too low.
    """
    right_and_wrong = np.zeros((2, 2), dtype=int)
    for prediction, target in zip(predictions, targets, strict=True):
        iou = box_iou(prediction["boxes"].double(), target["boxes"].double())  # (K, M)
        iou = iou * (prediction["labels"][:, None] == target["labels"])
        num_right = int((iou >= 0.5).any(dim=1).sum()) if iou.shape[1] else 0
        right_and_wrong[int(num_right > 0), int(len(iou) > num_right)] += 1
    (neither, wrong_alone), (right_alone, both) = right_and_wrong.tolist()
    expected = wrong_alone * right_alone / (both + 1)
    # 10 expected and none seen happens once in 20,000 times.
    if neither or both < 10 or expected < 10:
        return []
    return [
        Diagnostic(
            "images_without_detections_missing",
            f"All {len(targets)} images have detections, although about {expected:.0f} more images "
            f"without any are to be expected: {right_alone} have only right ones, {wrong_alone} "
            f"only wrong ones, {both} have both. Usual cause: an image without detections is "
            "skipped together with its ground truth, and its objects are not counted as missed. "
            f"Compare the number of files in {GROUND_TRUTH_FOLDER}/ with that of the images.",
            "warning",
        )
    ]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} images ({shown}{more})"
