"""Which boxes hold a location of a detector that predicts at the points of regular grids.

Such a detector learns an object only at locations inside of its box, and a small box may lie
between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Level", "hold_location"]


class Level(NamedTuple):
    """A grid of locations, at (i + 0.5) strides in x and y.

    Attributes:
        stride: distance of two locations in pixels.
        above: the largest distance from a location to a side of its box is above this, in pixels.
        below: and below this.
    """

    stride: float
    above: float
    below: float


def hold_location(boxes: np.ndarray, levels: Sequence[Level]) -> np.ndarray:
    """Return which boxes have, strictly inside, a location of a level that takes their size.

    Args:
        boxes: (M, 4) XYXY in pixels, each with a width and a height above 0.
        levels: the grids.

    Returns:
        (M,) bool.

    Example:
        >>> boxes = np.array([[0.0, 0, 4, 9], [0, 0, 4.5, 9]])  # the first location is at (4, 4)
        >>> hold_location(boxes, [Level(8, 0, 64)])
        array([False,  True])
    """
    found = np.zeros(len(boxes), dtype=bool)
    for level in levels:
        x_found, x_far = _along(boxes[:, 0], boxes[:, 2], level)
        y_found, y_far = _along(boxes[:, 1], boxes[:, 3], level)
        found |= x_found & y_found & (np.maximum(x_far, y_far) > level.above)
    return found


def _along(low: np.ndarray, high: np.ndarray, level: Level) -> tuple[np.ndarray, np.ndarray]:
    """Look for locations along one axis, between ``low`` and ``high`` (M,).

    Returns:
        (M,) bool, whether there is one from which both ends are nearer than ``level.below``; and of
        these (M,) the largest distance to an end.
    """
    center, half = (low + high) / 2, (high - low) / 2
    # Locations in this open interval around the center are inside, and near enough.
    reach = np.minimum(half, level.below - half)
    first = np.floor((center - reach) / level.stride - 0.5) + 1
    last = np.ceil((center + reach) / level.stride - 0.5) - 1
    ends = (np.stack([first, last]) + 0.5) * level.stride  # (2, M)
    return first <= last, np.abs(ends - center).max(axis=0) + half
