"""What a detector found in a data set: the input of every metric."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Evaluation", "image_names"]


@dataclass(frozen=True)
class Evaluation:
    """What a detector found in a data set, and what there was to find.

    Attributes:
        class_names: the C names.
        image_paths: of the B images.
        image_sizes: their heights and widths, as the detector saw them.
        predictions: one mapping an image, as ``eecs598.metrics.average_precision`` takes them,
            boxes in pixels of those images.
        targets: the same of the ground truth.
        score_thresh: what the detections score above.
        levels: name of a level of the detector -> the distances to the farthest side of a box, in
            pixels, that it is responsible for; empty where that is not known.
    """

    class_names: Sequence[str]
    image_paths: Sequence[str]
    image_sizes: Sequence[tuple[int, int]]
    predictions: Sequence[Mapping[str, Any]]
    targets: Sequence[Mapping[str, Any]]
    score_thresh: float
    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def image_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A name for each image, no two alike, to name its text files by.

    The name of the file without its suffix, where that tells all images apart; otherwise, its path
    below the folder that they have in common, with ``__`` in place of slashes.
    """
    names = [Path(path).stem for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([Path(path).parent for path in paths])
        names = [Path(path).relative_to(common).as_posix().replace("/", "__") for path in paths]
    return names
