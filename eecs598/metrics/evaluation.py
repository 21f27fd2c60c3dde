"""The result of running a detector on a data set, matched once for every metric and the report."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eecs598.metrics.matching import Matches, match_detections


@dataclass(frozen=True)
class Evaluation:
    """The detections of a data set, and its ground truth.

    Attributes:
        class_names: the C names.
        image_paths: the files of the B images.
        image_sizes: their heights and widths, as the detector saw them.
        predictions: one mapping per image, as ``eecs598.metrics.average_precision`` takes them,
            boxes in pixels of those images.
        targets: the same for the ground truth.
        score_thresh: the score threshold of the detector; all detections are above it.
        levels: name of a pyramid level of the detector -> the range of distances, in pixels, from
            a location to the farthest side of its box that the level is responsible for; empty
            where that is not known.
    """

    class_names: Sequence[str]
    image_paths: Sequence[str]
    image_sizes: Sequence[tuple[int, int]]
    predictions: Sequence[Mapping[str, Any]]
    targets: Sequence[Mapping[str, Any]]
    score_thresh: float
    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @functools.cached_property
    def matches(self) -> Matches:
        """The detections matched to the ground truth at an IoU of 0.5, once for all measures.

        Raises:
            ValueError: predictions or targets that can't be matched, such as a score that is NaN.
        """
        return match_detections(self.predictions, self.targets, self.class_names)


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
