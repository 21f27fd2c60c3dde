"""Seeds of random generators, and drawings of images with boxes."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eecs598.runtime import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "contact_sheet",
    "detection_visualizer",
    "in_notebook_or_window",
    "reset_seed",
    "tensor_to_image",
]

GROUND_TRUTH_COLOR = "#e6352b"
PREDICTION_COLOR = "#1a9850"
POINT_COLOR = "#ffe14d"


def reset_seed(n: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch (CPU and all GPUs)."""
    random.seed(n)
    np.random.seed(n % 2**32)
    torch.manual_seed(n)


def tensor_to_image(tensor: Tensor) -> np.ndarray:
    """Turn a ``(3, H, W)`` image in [0, 1] into an ``(H, W, 3)`` uint8 array.

    Values outside [0, 1] are clipped.

    Raises:
        ValueError: the tensor has another shape.
    """
    if tensor.dim() != 3 or tensor.shape[0] != 3:
        raise ValueError(f"the image has shape {tuple(tensor.shape)}; expected (3, H, W).")
    scaled = tensor.detach().float().clamp(0, 1).mul(255).round()
    return scaled.to("cpu", torch.uint8).permute(1, 2, 0).numpy()


def detection_visualizer(
    img: Tensor | np.ndarray,
    idx_to_class: Mapping[int, str],
    bbox: Tensor | Sequence | None = None,
    pred: Tensor | Sequence | None = None,
    points: Tensor | Sequence | None = None,
    *,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Axes:
    """Draw an image with ground-truth boxes, predictions and points.

    Args:
        img: ``(3, H, W)`` tensor in [0, 1], or ``(H, W, 3)`` uint8 array.
        idx_to_class: class id -> name.
        bbox: ``(M, 4 or 5)`` ground truth, drawn in red: XYXY in pixels, class id.
        pred: ``(K, 4 to 6)`` predictions, drawn in green: XYXY in pixels, class id, score.
        points: ``(N, 2)`` x, y in pixels, drawn as yellow dots.
        ax: draw here; a new figure unless given.
        path: save the picture here, too.

    Returns:
        The axes. In a notebook or where matplotlib opens windows, the figure is shown as well,
        unless ``ax`` or ``path`` is given.

    Raises:
        ValueError: boxes or points with another number of columns.
    """
    from matplotlib.figure import Figure

    image = tensor_to_image(img) if isinstance(img, Tensor) else np.asarray(img)
    show = ax is None and path is None and in_notebook_or_window()
    if ax is None:
        size = (6.0, 6.0 * image.shape[0] / image.shape[1])
        if show:
            import matplotlib.pyplot as plt

            ax = plt.figure(figsize=size).add_subplot()
        else:
            ax = Figure(figsize=size).add_subplot()
    ax.imshow(image)
    ax.set_axis_off()
    for row in _rows(bbox, "bbox", (4, 5)):
        _draw_box(ax, row, idx_to_class, GROUND_TRUTH_COLOR)
    for row in _rows(pred, "pred", (4, 5, 6)):
        _draw_box(ax, row, idx_to_class, PREDICTION_COLOR)
    centers = np.array(_rows(points, "points", (2,))).reshape(-1, 2)
    ax.plot(centers[:, 0], centers[:, 1], ".", color=POINT_COLOR, markeredgecolor="black", ms=7)
    # Boxes and points that reach over the edge must not enlarge the picture.
    ax.set_xlim(-0.5, image.shape[1] - 0.5)
    ax.set_ylim(image.shape[0] - 0.5, -0.5)
    if path is not None:
        figure = ax.figure.figure  # the whole one, where the axes are in a subfigure
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, bbox_inches="tight")
    if show:
        plt.show()
    return ax


def contact_sheet(
    pictures: Sequence[tuple[Tensor, Tensor, Tensor]],
    idx_to_class: Mapping[int, str],
    path: str | os.PathLike[str],
    columns: int = 4,
) -> None:
    """Save one picture that shows many images with their ground truth and detections.

    Args:
        pictures: for each image the pixels ``(3, H, W)`` in [0, 1], ground truth ``(M, 5)`` and
            predictions ``(K, 6)`` as in ``detection_visualizer``.
        idx_to_class: class id -> name.
        path: of the PNG.
        columns: images per row.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, (image, ground_truth, predictions) in zip(axes, pictures, strict=False):
        detection_visualizer(image, idx_to_class, ground_truth, predictions, ax=ax)
    figure.suptitle("ground truth red, detections green", fontsize=11)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, bbox_inches="tight")


def in_notebook_or_window() -> bool:
    """Return whether matplotlib shows figures: in a notebook or in a window."""
    import matplotlib

    return matplotlib.get_backend().lower() not in ("agg", "pdf", "ps", "svg", "cairo", "template")


def _rows(values: Tensor | Sequence | None, name: str, widths: tuple[int, ...]) -> list:
    """Convert a tensor, a list or a single row to a list of rows."""
    if values is None:
        return []
    array = torch.as_tensor(values).detach().cpu().double()
    if array.numel() == 0:
        return []
    if array.dim() == 1:
        array = array[None]
    if array.dim() != 2 or array.shape[1] not in widths:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}; expected rows of "
            f"{' or '.join(map(str, widths))} numbers."
        )
    return array.tolist()


def _draw_box(ax: Axes, row: list, idx_to_class: Mapping[int, str], color: str) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2, *class_and_score = row
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8))
    if not class_and_score:
        return
    label = idx_to_class.get(int(class_and_score[0]), str(int(class_and_score[0])))
    if len(class_and_score) == 2:
        label += f" {class_and_score[1]:.2f}"
    ax.text(
        x1,
        y1,
        label,
        fontsize=7,
        color="white",
        verticalalignment="bottom",
        clip_on=True,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
    )
