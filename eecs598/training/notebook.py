"""The settings of the course's notebook: data, device, schedule and output folders.

The notebook runs in Colab and on any other machine, with or without a GPU and a copy of PASCAL
VOC 2007. ``notebook_settings`` looks at what is there and decides.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eecs598.data import SHAPES_CLASSES, VOC2007_CLASSES, class_names, shapes_folder
from eecs598.training.settings import RECIPES, Settings

__all__ = ["NotebookSettings", "notebook_settings"]


@dataclass(frozen=True, kw_only=True)
class NotebookSettings:
    """What the notebook runs on and for how long: the decisions of ``notebook_settings``.

    Attributes:
        data: ``"voc2007"``, ``"shapes"`` or the path of a folder.
        data_dir: folder of the data set.
        download: whether VOC 2007 has to be downloaded into ``data_dir``.
        generated: whether the images are generated ones, not photographs.
        classes: the C class names in the order of their ids.
        device: to train and evaluate on.
        num_workers: processes that load images.
        schedule: ``"full"`` (the assignment's) or ``"quick"``.
        recipe: the settings of the detector and of its training, apart from the number of steps.
        max_iters: optimizer steps of the training run.
        overfit_iters: optimizer steps of the run that overfits a few images.
        overfit_batches: number of batches in these few images.
        output_dir: folder for weights, metrics and figures.
        export_dir: folder for the text files of the detections, two for each validation image.
    """

    data: str
    data_dir: Path
    download: bool
    generated: bool
    classes: tuple[str, ...]
    device: torch.device
    num_workers: int
    schedule: str
    recipe: Settings
    max_iters: int
    overfit_iters: int
    overfit_batches: int
    output_dir: Path
    export_dir: Path

    @property
    def image_size(self) -> int:
        """Shorter side of the images in pixels."""
        return self.recipe.data.image_size

    @property
    def fpn_channels(self) -> int:
        """Width of the feature pyramid of the detector to be trained."""
        return self.recipe.model.fpn_channels

    @property
    def stem_channels(self) -> tuple[int, ...]:
        """Channels of the convolutions in the head of the detector to be trained."""
        return self.recipe.model.stem_channels

    @property
    def batch_size(self) -> int:
        """Images per training step."""
        return self.recipe.data.batch_size

    @property
    def weights(self) -> str | None:
        """What the backbone starts from: ``"DEFAULT"`` (ImageNet weights) or None (random)."""
        return self.recipe.model.kwargs()["weights"]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the training run, before the schedule lowers it."""
        return self.recipe.optimization.learning_rate

    @property
    def overfit_learning_rate(self) -> float:
        """Learning rate of the run that overfits a few images; the assignment's is lower there."""
        return min(self.learning_rate, 5e-3)

    def solver_kwargs(self, max_iters: int) -> dict[str, Any]:
        """Return what ``train_detector`` takes beyond learning rate, iterations and device.

        Args:
            max_iters: optimizer steps of the run. The warm-up is the same share of it as in the
                recipe, whose runs are longer.
        """
        solver = self.recipe.optimization
        warmup_iters = round(solver.warmup_iters / solver.max_iters * max_iters)
        kwargs = dataclasses.replace(solver, warmup_iters=warmup_iters).kwargs()
        return {name: kwargs[name] for name in kwargs.keys() - {"learning_rate", "max_iters"}}

    def __str__(self) -> str:
        """Return a table, one line per decision."""
        solver = self.solver_kwargs(self.max_iters)
        rows = {
            "data": f"{self.data_dir}{' (to be downloaded)' if self.download else ''}",
            "classes": len(self.classes),
            "device": self.device,
            "schedule": self.schedule,
            "image size": self.image_size,
            "batch size": f"{self.batch_size}, {self.num_workers} loading processes",
            "overfitting": f"{self.overfit_iters} iterations, "
            f"learning rate {self.overfit_learning_rate:g}",
            "training": f"{self.max_iters} iterations, learning rate {self.learning_rate:g}",
            "solver": f"{solver['optimizer']}, {solver['schedule']} schedule, "
            f"{solver['warmup_iters']} iterations of warm-up",
            "FPN channels": self.fpn_channels,
            "stem channels": self.stem_channels,
            "backbone start": "random weights" if self.weights is None else "ImageNet weights",
            "results": self.output_dir,
        }
        return "\n".join(f"{name:<16}{value}" for name, value in rows.items())


def notebook_settings(
    data: str = "auto",
    schedule: str = "auto",
    *,
    project_dir: Path,
    in_colab: bool = False,
) -> NotebookSettings:
    """Decide what the notebook runs on and for how long.

    The environment variables ``FCOS_DATA``, ``FCOS_SCHEDULE`` and ``FCOS_TRAIN_ITERS`` take
    precedence, for runs in which nobody edits the notebook.

    Args:
        data: ``"voc2007"``, ``"shapes"``, or the path of a folder in VOC layout. ``"auto"`` takes
            VOC 2007 in Colab or where it lies in ``project_dir``, otherwise the generated set.
        schedule: ``"full"`` or ``"quick"``. ``"auto"`` takes the full one for photographs on a
            CUDA GPU.
        project_dir: folder of the notebook and its modules.
        in_colab: whether this is Google Colab, where ``project_dir`` is in Google Drive.

    Raises:
        ValueError: an unknown schedule, a number of iterations that is none, or a folder without
            data.
    """
    data = os.environ.get("FCOS_DATA", data)
    schedule = os.environ.get("FCOS_SCHEDULE", schedule)
    if schedule not in ("auto", "quick", "full"):
        raise ValueError(f"SCHEDULE is {schedule!r}; expected 'auto', 'quick' or 'full'.")

    devkit, index = project_dir / "VOCdevkit", project_dir / "voc07_train.json"
    has_voc2007 = devkit.is_dir() or index.is_file()
    if data == "auto":
        data = "voc2007" if in_colab or has_voc2007 else "shapes"
    download = data == "voc2007" and not has_voc2007
    classes: tuple[str, ...]
    if data == "voc2007":
        # In Colab a download goes to the machine's own disk: Drive is slow with many small files.
        data_dir = Path("/content/voc2007") if in_colab and download else project_dir
        classes = VOC2007_CLASSES
    elif data == "shapes":
        data_dir = shapes_folder()
        classes = SHAPES_CLASSES
    else:
        data_dir = Path(data)
        classes = tuple(class_names(data_dir))
    generated = data == "shapes" or (data_dir / "shapes.json").is_file()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if schedule == "auto":
        schedule = "full" if device.type == "cuda" and not generated else "quick"

    # Generated images can be learned from random weights, which need no download. From such a
    # start AdamW gets further than SGD in a few hundred iterations, given a warm-up, and clipped
    # gradients against the first, wild steps.
    recipe = RECIPES["shapes" if generated and schedule == "quick" else "handout"]
    if schedule == "full":
        max_iters = recipe.optimization.max_iters
        overfit_iters, overfit_batches = 500, 10
    else:
        recipe = recipe.replace(image_size=128, fpn_channels=64, stem_channels=(64, 64))
        max_iters = 600
        overfit_iters, overfit_batches = 60, 1

    output_dir = project_dir if in_colab else Path("runs") / "notebook"
    return NotebookSettings(
        data=data,
        data_dir=data_dir,
        download=download,
        generated=generated,
        classes=classes,
        device=device,
        num_workers=min(4, os.cpu_count() or 1),
        schedule=schedule,
        recipe=recipe,
        max_iters=_train_iters(max_iters),
        overfit_iters=overfit_iters,
        overfit_batches=overfit_batches,
        output_dir=output_dir,
        # In Colab not into Drive, either.
        export_dir=(Path.cwd() if in_colab else output_dir) / "mAP" / "input",
    )


def _train_iters(default: int) -> int:
    """Return ``FCOS_TRAIN_ITERS`` as a positive number, or the default where it is not set."""
    text = os.environ.get("FCOS_TRAIN_ITERS", str(default))
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(
            f"FCOS_TRAIN_ITERS is {text!r}; expected a positive number of iterations, such as 600."
        )
    return int(text)
