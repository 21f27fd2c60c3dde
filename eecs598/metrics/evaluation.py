"""The result of running a detector on a data set, matched once for every metric and the report."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eecs598.metrics.matching import Matches, match_detections


@dataclass(frozen=True)
class Evaluation:
    """The detections of a data set, and its ground truth.

    Attributes:
        class_names: the C names.
        image_paths: the files of the B images.
        image_sizes: their heights and widths. Boxes are in pixels of these images; those of
            ``evaluate_detector`` are the originals.
        predictions: one mapping per image, as ``eecs598.metrics.average_precision`` takes them.
        targets: the same for the ground truth, without difficult objects: what every measure but
            ``devkit_matches`` counts.
        score_thresh: the score threshold of the detector; all detections are above it.
        levels: name of a pyramid level of the detector -> the range of distances, in pixels of what
            the detector saw, from a location to the farthest side of its box that the level is
            responsible for; empty where that is not known.
        difficult: ``boxes`` (D, 4) and ``labels`` (D,) of the difficult objects of each image, as
            tensors; None where it is not known which objects are difficult.
        input_sizes: heights and widths of the images as the detector saw them; None where these
            are ``image_sizes``.
    """

    class_names: Sequence[str]
    image_paths: Sequence[str]
    image_sizes: Sequence[tuple[int, int]]
    predictions: Sequence[Mapping[str, Any]]
    targets: Sequence[Mapping[str, Any]]
    score_thresh: float
    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    difficult: Sequence[Mapping[str, Tensor]] | None = None
    input_sizes: Sequence[tuple[int, int]] | None = None

    @functools.cached_property
    def matches(self) -> Matches:
        """The detections matched to the ground truth at an IoU of 0.5, once for all measures.

        This is the course's rule: a detection of a difficult object is a false positive.

        Raises:
            ValueError: predictions or targets that can't be matched, such as a score that is NaN.
        """
        return match_detections(self.predictions, self.targets, self.class_names)

    @functools.cached_property
    def devkit_matches(self) -> Matches | None:
        """The same by the VOC devkit's rule; None where ``difficult`` is not known.

        A detection that matches a difficult object counts neither way.
        """
        if self.difficult is None:
            return None
        if not any(len(objects["boxes"]) for objects in self.difficult):
            return self.matches
        return match_detections(self.predictions, self.devkit_targets, self.class_names)

    @property
    def devkit_targets(self) -> list[dict[str, Tensor]]:
        """The ground truth of each image with its difficult objects, which come last.

        Raises:
            ValueError: it is not known which objects are difficult.
        """
        if self.difficult is None:
            raise ValueError(
                "it is not known which objects are difficult: the course's JSON index leaves them "
                "out. Add the Annotations folder of the devkit."
            )
        return [
            {
                "boxes": torch.cat([target["boxes"], difficult["boxes"]]),
                "labels": torch.cat([target["labels"], difficult["labels"]]),
                "difficult": torch.arange(len(target["boxes"]) + len(difficult["boxes"]))
                >= len(target["boxes"]),
            }
            for target, difficult in zip(self.targets, self.difficult, strict=True)
        ]

    @functools.cached_property
    def input_matches(self) -> Matches:
        """``matches`` with the boxes in pixels of the images as the detector saw them.

        For what depends on these pixels, such as the levels of the pyramid. IoU and what matches
        stay those of ``matches``.
        """
        if self.input_sizes is None:
            return self.matches
        scales = np.array(self.input_sizes) / np.array(self.image_sizes)  # (B, 2): y, x
        factors = scales[:, [1, 0, 1, 0]]
        matches = self.matches
        return dataclasses.replace(
            matches,
            box=matches.box * factors[matches.image],
            gt_box=matches.gt_box * factors[matches.gt_image],
        )


def image_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return a unique name for each image, to name its text files by.

    It is the name of the file without its suffix, where these differ for all images, and otherwise
    its path below the folder that all images have in common, with ``__`` in place of slashes.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([Path(path).parent for path in paths])
        names = [Path(path).relative_to(common).as_posix().replace("/", "__") for path in paths]
    return names
