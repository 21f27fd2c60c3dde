"""Data, training and evaluation for the detectors of assignment 4.

A detector here is any module that, in training mode, maps ``(images, gt_boxes)`` to a dict of
losses, and in evaluation mode maps one image to ``(boxes, class ids, scores)``. FCOS is one; a
two-stage detector can be another.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from common import check_training_batch
from eecs598.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VOC2007_CLASSES,
    Augmentation,
    ImageCache,
    Sample,
    download_voc2007,
    load_index,
    normalized,
    read_image,
    resize_shorter_side,
    resized_size,
    stored_size,
    to_pixels,
)
from eecs598.metrics import Evaluation, write_text_format
from eecs598.runtime import (
    broadcast_buffers,
    gather,
    is_main_process,
    mean_over_processes,
    num_processes,
    rank,
    replacing,
)
from eecs598.training import (
    TrainingRun,
    ignore_signals,
    learning_rate_factor,
    make_optimizer,
    mixed_precision,
    weight_average,
)
from eecs598.utils import detection_visualizer, in_notebook_or_window

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentedTrainingSet",
    "VOC2007DetectionTiny",
    "evaluate_detector",
    "hello_helper",
    "inference_with_detector",
    "iterate_detections",
    "plot_losses",
    "prediction_rows",
    "target_rows",
    "train_detector",
    "unnormalize",
]


def hello_helper() -> None:
    """Tell the notebook that this module was imported."""
    print("Hello from a4_helper.py!")


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------

MAX_CACHE_BYTES = 4 * 2**30


class VOC2007DetectionTiny(Dataset):
    """PASCAL VOC 2007, or other data in its layout or in COCO's, resized for a small detector.

    The index comes from ``dataset_dir/voc07_{split}.json`` (the course's file) or, where that is
    missing, from the XML of the devkit, with the objects flagged as difficult left out: the same
    index. Training images are resized to a shorter side of ``image_size`` and cropped to the
    square in the centre; images of other splits are only resized, so their sizes vary.

    Args:
        dataset_dir: folder with ``VOCdevkit/VOC2007``, or itself in VOC layout, or with the JSON
            of COCO (``eecs598.data.coco.candidates`` says where).
        split: ``"train"``, ``"val"`` or any other list in ``ImageSets/Main``.
        download: fetch the devkit into ``dataset_dir`` unless it is there.
        image_size: shorter side in pixels.
        classes: class names in the order of their ids; the 20 of VOC unless given.
        crop: cut out the square in the centre; that of ``"train"`` alone unless given.
        cache: keep the resized images in memory, shared by the workers of a loader, so that each
            file is decoded once. Prints how much memory they take.
        max_cache_bytes: of the cache; images beyond it are read from their files each time.

    Raises:
        ValueError: data that is missing or broken, or an object whose class is not in
            ``classes``.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike,
        split: str = "train",
        download: bool = False,
        image_size: int = 224,
        *,
        classes: Sequence[str] = VOC2007_CLASSES,
        crop: bool | None = None,
        cache: bool = False,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size={image_size}; expected a positive number of pixels.")
        if download:
            download_voc2007(dataset_dir)
        self.split = split
        self.image_size = image_size
        self.crop = split == "train" if crop is None else crop
        self.class_to_idx = {name: i for i, name in enumerate(classes)}
        self.idx_to_class = {i: name for name, i in self.class_to_idx.items()}

        self.instances: list[tuple[Path, Tensor]] = []
        for path, objects in load_index(dataset_dir, split):
            rows = [[*item["xyxy"], self._class_id(item["name"], path)] for item in objects]
            self.instances.append((path, torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)))
        self.max_boxes = max(len(boxes) for _, boxes in self.instances)
        self.cache = None
        if cache:
            self._stored_sizes = [stored_size(path) for path, _ in self.instances]
            sizes = [resized_size(*size, image_size) for size in self._stored_sizes]
            self.cache = _announced(ImageCache(sizes, max_cache_bytes))

    def _class_id(self, name: str, path: Path) -> int:
        if name not in self.class_to_idx:
            raise ValueError(
                f"{path.name} has an object of class {name!r}, which is not in the list of "
                f"classes {list(self.class_to_idx)}. Pass classes= with the names of the data."
            )
        return self.class_to_idx[name]

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> tuple[str, Tensor, Tensor]:
        """Load one image.

        Returns:
            Its path; the image ``(3, H, W)``, normalised with ImageNet's mean and deviation; its
            boxes ``(M, 5)`` as x1, y1, x2, y2 in pixels of that image and class id. M is that of
            the fullest image of the set; rows of -1 are padding, or boxes that the crop removed.
        """
        side = self.image_size
        path, boxes = self.instances[index]
        if self.cache is None:
            original, _ = self.load(index)
            size, pixels = original.shape[1:], resize_shorter_side(original, side)
        else:
            size = self._stored_sizes[index]
            pixels = self.cache.get(index, lambda: resize_shorter_side(self.load(index)[0], side))
        height, width = pixels.shape[1:]
        scale_y, scale_x = height / size[0], width / size[1]
        boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y, 1.0])
        if self.crop:
            left, top = (width - side) // 2, (height - side) // 2
            pixels = pixels[:, top : top + side, left : left + side]
            boxes = _crop_boxes(boxes, left, top, side)
        return _make_item(path, pixels, boxes, self.max_boxes)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """The image as it is in its file, and its boxes in those pixels.

        Returns:
            ``(3, H, W)`` in uint8, RGB; ``(M, 5)``.
        """
        path, boxes = self.instances[index]
        # The boxes are those of the pixels as they are stored.
        return to_pixels(read_image(path, upright=False)), boxes.clone()


class AugmentedTrainingSet(Dataset):
    """The training images that a ``TrainingSampler`` asks for, varied at random.

    Args:
        dataset: where the images come from.
        augment: names of augmentations, see ``eecs598.data.augment.Augmentation``; without one, the
            items are those of the data set.
        cache: keep the decoded images in memory, shared by the workers of a loader. What comes as
            the data set's own items is a matter of the data set's cache.
        max_cache_bytes: of the cache; images beyond it are read from their files each time.
    """

    def __init__(
        self,
        dataset: VOC2007DetectionTiny,
        augment: Sequence[str] = (),
        *,
        cache: bool = False,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.augmentation = Augmentation(augment)
        self.cache = None
        if cache:
            sizes = [stored_size(path) for path, _ in dataset.instances]
            self.cache = _announced(ImageCache(sizes, max_cache_bytes))
        # A mosaic shows four images.
        self.max_boxes = dataset.max_boxes * (4 if "mosaic" in augment else 1)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Sample) -> tuple[str, Tensor, Tensor]:
        """As ``VOC2007DetectionTiny``; the image is square, of the sample's side."""
        side = sample.side or self.dataset.image_size
        if not self.augmentation.names and side == self.dataset.image_size:
            return self.dataset[sample.index]
        pixels, boxes = self.augmentation(
            self._load, len(self.dataset), sample.index, sample.seed, side
        )
        return _make_item(self.dataset.instances[sample.index][0], pixels, boxes, self.max_boxes)

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return self.dataset.load(index)
        pixels = self.cache.get(index, lambda: self.dataset.load(index)[0])
        return pixels, self.dataset.instances[index][1].clone()


def _announced(cache: ImageCache) -> ImageCache:
    print(f"images in memory: {cache}")
    return cache


def _make_item(
    path: Path, pixels: Tensor, boxes: Tensor, max_boxes: int
) -> tuple[str, Tensor, Tensor]:
    """Normalise an image (3, H, W) in uint8 and pad its boxes."""
    padded = torch.full((max_boxes, 5), -1.0)
    padded[: len(boxes)] = boxes
    return str(path), normalized(pixels), padded


def _crop_boxes(boxes: Tensor, left: int, top: int, side: int) -> Tensor:
    """Boxes (M, 5) in the pixels of a square crop; those with nothing left become rows of -1."""
    corner = boxes.new_tensor([left, top, left, top])
    cropped = torch.cat([(boxes[:, :4] - corner).clamp(0, side), boxes[:, 4:]], dim=1)
    gone = (cropped[:, 2:4] <= cropped[:, :2]).any(dim=1, keepdim=True)
    return cropped.masked_fill(gone, -1.0)


def unnormalize(images: Tensor) -> Tensor:
    """Undo the normalisation of ``(..., 3, H, W)`` images, back to RGB in [0, 1]."""
    mean = images.new_tensor(IMAGENET_MEAN)[:, None, None]
    std = images.new_tensor(IMAGENET_STD)[:, None, None]
    return images * std + mean


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


def train_detector(
    detector: nn.Module,
    train_loader: DataLoader,
    learning_rate: float = 5e-3,
    weight_decay: float = 1e-4,
    max_iters: int = 5000,
    log_period: int = 20,
    device: str | torch.device = "cpu",
    *,
    optimizer: str = "sgd",
    schedule: str = "step",
    warmup_iters: int = 0,
    max_grad_norm: float | None = None,
    pretrained_lr_factor: float = 1.0,
    average_decay: float | None = None,
    amp: str = "off",
    channels_last: bool = True,
    compile: bool = False,
    run: TrainingRun | None = None,
    plot_path: str | os.PathLike | None = None,
) -> dict[str, list[float]]:
    """Train a detector.

    The defaults are the assignment's recipe: SGD with momentum 0.9, the learning rate divided by
    10 after 60 % and again after 90 % of the iterations. What comes after ``device`` is for
    trainings that should get further, or that have to survive a stop. The loader is started again
    as often as it takes.

    Args:
        detector: maps ``(images, gt_boxes)`` to a dict of losses; their sum is minimised.
        train_loader: gives ``(paths, images, gt_boxes)`` batches. Where ``run`` is resumed, the
            first of them is the one after the checkpoint.
        learning_rate: at the start, or after the warm-up.
        weight_decay: of the optimizer.
        max_iters: number of optimizer steps.
        log_period: iterations between two lines of the log; a line shows means since the last.
        device: to train on; the detector is moved there.
        optimizer: ``"sgd"`` or ``"adamw"``.
        schedule: ``"step"`` as above, or ``"cosine"`` from the learning rate down to 0
            (arXiv 1608.03983, equation 5, without restarts).
        warmup_iters: the learning rate rises linearly over this many iterations.
        max_grad_norm: gradients of a larger norm, over all parameters, are scaled down to it.
        pretrained_lr_factor: the learning rate of ``detector.backbone_parameters()`` is
            multiplied by it.
        average_decay: keep a moving average of the weights, of which this part remains in every
            step (less in the first steps). It is what is evaluated, and the detector ends with
            it.
        amp: ``"auto"`` runs the network in bfloat16 where the processor computes in it natively,
            in float16 with scaled gradients on other GPUs; ``"off"`` in float32 everywhere. The
            losses are float32 in any case.
        channels_last: lay tensors out in memory with their channels together, which is faster on
            CPUs and on GPUs with tensor cores and changes no value beyond rounding.
        compile: compile the network with ``torch.compile``: its first steps take a minute, the
            others less time.
        run: saves checkpoints and the history, evaluates, and goes on after a stop.
        plot_path: save the loss plot here. Without it, the plot is shown where there is a
            notebook or a window. With ``run``, plotting is the run's business.

    Returns:
        History with one entry an iteration: ``"iteration"``, ``"lr"``, ``"loss"`` and each part
        of the loss under its name.

    Raises:
        ValueError: a batch that the detector can't be trained on, or a setting out of range.
        FloatingPointError: the loss became NaN or infinite.
        TrainingStopped: Ctrl-C or SIGTERM, with ``run``, after saving.
    """
    if max_iters < 1 or log_period < 1 or learning_rate <= 0:
        raise ValueError(
            f"max_iters={max_iters}, log_period={log_period}, learning_rate={learning_rate}; "
            "expected positive numbers."
        )
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    detector = detector.to(device=device, memory_format=layout).train()
    solver = make_optimizer(detector, optimizer, learning_rate, weight_decay, pretrained_lr_factor)
    factor = learning_rate_factor(schedule, warmup_iters, max_iters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(solver, factor)
    autocast, scaler = mixed_precision(device, amp)
    state = {"detector": detector, "optimizer": solver, "scheduler": scheduler, "scaler": scaler}
    average = None
    if average_decay is not None:
        state["average"] = average = weight_average(detector, average_decay)
    best_model = detector if average is None else average.module
    history = run.restore(state) if run is not None else {}
    done = len(history.get("iteration", ()))
    network = _training_network(detector, device, compile)
    # A GPU's batches are checked before the transfer, where looking at values costs no waiting.
    checked_here = device.type != "cpu" or not getattr(detector, "checks_batches", False)
    num_classes = getattr(detector, "num_classes", None) if checked_here else None

    with contextlib.ExitStack() as stack:
        record = stack.enter_context(_Record(history, max_iters, run))
        if run is not None:
            stack.enter_context(run.catching_signals())
            if done and run.evaluation_is_due(done, last=done == max_iters):
                # The stop that the training goes on from came before it.
                run.save(done, best_model, state, history, last=done == max_iters)
        batches = _endless(train_loader, max_iters - done)
        for iteration, (paths, images, gt_boxes) in enumerate(batches, start=done + 1):
            if num_classes is not None:
                check_training_batch(images, gt_boxes, num_classes)
            images = images.to(device, non_blocking=True, memory_format=layout)
            gt_boxes = gt_boxes.to(device, non_blocking=True)

            with autocast:
                losses = network(images, gt_boxes)
            loss = sum(losses.values())
            solver.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if max_grad_norm is not None:
                scaler.unscale_(solver)
                nn.utils.clip_grad_norm_(detector.parameters(), max_grad_norm)
            record.step(iteration, solver.param_groups[0]["lr"], {"loss": loss, **losses}, paths)
            scaler.step(solver)
            scaler.update()
            scheduler.step()
            if average is not None:
                average.update_parameters(detector)

            last = iteration == max_iters
            if last or iteration % log_period == 0:
                record.log()
            if run is not None and run.is_due(iteration, last):
                broadcast_buffers(best_model)
                run.save(iteration, best_model, state, record.flush(), last)
                record.restart_clock()

    if average is not None:
        detector.load_state_dict(best_model.state_dict())
    if run is None and (plot_path is not None or in_notebook_or_window()):
        plot_losses(history, plot_path)
    return history


def _training_network(detector: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    """What is called in training: the detector, compiled and spread over processes if wanted."""
    if hasattr(detector, "compile_network"):
        detector.compile_network(compile)
    elif compile:
        detector.compile()
    if num_processes() == 1:
        return detector
    return DistributedDataParallel(detector, [device] if device.type == "cuda" else None)


def _endless(loader: DataLoader, max_iters: int) -> Iterator:
    """Batches of the loader, started again when it ends, ``max_iters`` in all."""
    remaining = max_iters
    while remaining > 0:
        started_with = remaining
        for batch in loader:
            yield batch
            remaining -= 1
            if not remaining:
                return
        if remaining == started_with:
            raise ValueError(
                "the training loader gives no batch. With drop_last=True it needs at least "
                "batch_size images."
            )


class _Step(NamedTuple):
    """What the history has to know of an iteration."""

    iteration: int
    lr: float
    losses: dict[str, Tensor]
    paths: Sequence[str]


class _Record:
    """What a training tells: the history, the lines of the log, the progress bar."""

    def __init__(
        self, history: dict[str, list[float]], max_iters: int, run: TrainingRun | None
    ) -> None:
        self.history, self.max_iters, self.run = history, max_iters, run
        self.pending: list[_Step] = []  # losses still on the device
        self.logged = len(history.get("iteration", ()))
        self.bar = tqdm(
            total=max_iters,
            initial=self.logged,
            desc="training",
            unit="it",
            disable=not _somebody_watches(),
        )
        self.restart_clock()

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.close()

    def restart_clock(self) -> None:
        """Speed is measured from here on."""
        self.images, self.iterations, self.since = 0, 0, time.perf_counter()

    def step(
        self, iteration: int, lr: float, losses: Mapping[str, Tensor], paths: Sequence[str]
    ) -> None:
        """Note an iteration, without waiting for the device."""
        values = {name: loss.detach() for name, loss in losses.items()}
        self.pending.append(_Step(iteration, lr, values, paths))
        self.images += len(paths) * num_processes()
        self.iterations += 1
        self.bar.update()

    def flush(self) -> dict[str, list[float]]:
        """Move what is pending from the device to the history; all losses must be finite."""
        if not self.pending:
            return self.history
        names = list(self.pending[0].losses)
        values = torch.stack([torch.stack(list(s.losses.values())) for s in self.pending])
        rows = mean_over_processes(values).tolist()
        for step, row in zip(self.pending, rows, strict=True):
            parts = dict(zip(names, row, strict=True))
            if not all(map(math.isfinite, row)):
                if self.run is not None:
                    self.run.write_history(self.history)  # the way there
                paths = [path for paths in gather(step.paths) for path in paths]
                raise FloatingPointError(
                    f"the loss became {parts['loss']} at iteration {step.iteration} (parts: "
                    f"{parts}). The batch: {', '.join(paths)}. "
                    + (f"{self.run.last_good()} " if self.run is not None else "")
                    + "Look at these files, lower the learning rate, or clip the gradients."
                )
            for name, value in {"iteration": step.iteration, "lr": step.lr, **parts}.items():
                self.history.setdefault(name, []).append(value)
        self.pending.clear()
        return self.history

    def log(self) -> None:
        """A line with the means since the last one."""
        history = self.flush()
        if self.run is not None:
            self.run.write_history(history)
        iteration, lr = history["iteration"][-1], history["lr"][-1]
        count = iteration - self.logged
        means = {
            name: sum(values[-count:]) / count
            for name, values in history.items()
            if name not in ("iteration", "lr")
        }
        seconds = time.perf_counter() - self.since
        speed = self.images / seconds
        left = round((self.max_iters - iteration) * seconds / self.iterations)
        self.logged = iteration
        self.restart_clock()
        if is_main_process():
            parts = "".join(f"[{name}: {value:.3f}]" for name, value in means.items())
            self.bar.write(
                f"[Iter {iteration}]{parts} lr {lr:.1e}, {speed:.1f} images/s, "
                f"{datetime.timedelta(seconds=left)} left"
            )
            self.bar.set_postfix(
                loss=f"{means['loss']:.3f}", lr=f"{lr:.1e}", images_s=f"{speed:.1f}"
            )


def _somebody_watches() -> bool:
    """In a file, a bar that is redrawn would make a mess."""
    return is_main_process() and (in_notebook_or_window() or sys.stderr.isatty())


def plot_losses(
    history: Mapping[str, Sequence[float]],
    path: str | os.PathLike | None = None,
    evaluations: Sequence[Mapping[str, float]] = (),
):
    """Plot the loss of a training and its parts, smoothed, over the iterations.

    Args:
        history: as returned by ``train_detector``.
        path: save the plot here; shown in a notebook or a window unless given.
        evaluations: ``{"iteration", "mAP"}`` each, drawn on an axis of their own.

    Returns:
        The matplotlib axes.
    """
    from matplotlib.figure import Figure

    show = path is None and in_notebook_or_window()
    if show:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(8, 5))
    else:
        figure = Figure(figsize=(8, 5))
    ax = figure.add_subplot()
    iterations = torch.tensor(history["iteration"])
    for name in (key for key in history if key not in ("iteration", "lr")):
        values = torch.tensor(history[name])
        # A running mean over about 2 % of the training shows the course through the noise.
        window = max(1, len(values) // 50)
        smooth = values.unfold(0, window, 1).mean(dim=1)
        width = 2.4 if name == "loss" else 1.4
        (line,) = ax.plot(iterations[window - 1 :], smooth, linewidth=width, label=name)
        if name == "loss":
            ax.plot(iterations, values, linewidth=0.5, alpha=0.25, color=line.get_color())
    ax.set(title="training loss", xlabel="iteration", ylabel="loss")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    if evaluations:
        twin = ax.twinx()
        steps = [entry["iteration"] for entry in evaluations]
        percent = [100 * entry["mAP"] for entry in evaluations]
        lines += twin.plot(steps, percent, "ko-", markersize=4, label="validation mAP")
        twin.set(ylabel="mAP@0.5 in %", ylim=(0, 100))
    ax.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(lines))
    if path is not None:
        with replacing(path) as unfinished:
            figure.savefig(unfinished, bbox_inches="tight")
    if show:
        plt.show()
    return ax


# --------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------


def inference_with_detector(
    detector: nn.Module,
    test_loader: DataLoader,
    idx_to_class: Mapping[int, str],
    score_thresh: float,
    nms_thresh: float,
    output_dir: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Run a detector over a data set: draw the detections, or export them for scoring.

    Args:
        detector: maps one image to ``(boxes, class ids, scores)``.
        test_loader: gives ``(paths, images, gt_boxes)`` with one image a batch.
        idx_to_class: class id -> name.
        score_thresh: detections score above it.
        nms_thresh: IoU above which the lower of two detections of a class is dropped.
        output_dir: write ``detection-results/NAME.txt`` and ``ground-truth/NAME.txt`` here, one
            pair of files for every image, in the text format of ``eecs598.metrics`` (which
            Cartucho's mAP script reads, too). Without it, each image is drawn.
        dtype: to run the detector in.
        device: to run the detector on; it is moved there.

    Returns:
        Predictions (``boxes (K, 4)``, ``labels (K,)``, ``scores (K,)``) and ground truth
        (``boxes (M, 4)``, ``labels (M,)``) of every image, on the CPU: what
        ``eecs598.metrics.average_precision`` takes.
    """
    classes = [idx_to_class[i] for i in range(len(idx_to_class))]
    predictions, targets, names = [], [], set()
    start = time.perf_counter()
    for path, image, prediction, target in iterate_detections(
        detector, test_loader, score_thresh, nms_thresh, dtype=dtype, device=device
    ):
        if output_dir is None:
            detection_visualizer(
                image, idx_to_class, target_rows(target), prediction_rows(prediction)
            )
        else:
            name = Path(path).stem
            if name in names:
                raise ValueError(
                    f"two images are called {name}, and their text files would be, too; one is "
                    f"{path}. `fcos eval` tells images of different folders apart."
                )
            names.add(name)
            write_text_format(output_dir, name, prediction, target, classes)
        predictions.append(prediction)
        targets.append(target)
    print(f"{len(predictions)} images in {time.perf_counter() - start:.1f} s")
    return predictions, targets


def iterate_detections(
    detector: nn.Module,
    test_loader: DataLoader,
    score_thresh: float,
    nms_thresh: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Detect image by image; the arguments are those of ``inference_with_detector``.

    Yields:
        The path; the image ``(3, H, W)`` in [0, 1]; the prediction ``boxes (K, 4)``,
        ``labels (K,)``, ``scores (K,)``; the ground truth ``boxes (M, 4)``, ``labels (M,)``.
        All on the CPU.
    """
    was_training = detector.training
    detector.to(dtype=dtype, device=device).eval()
    try:
        hidden = not _somebody_watches()
        for paths, images, gt_boxes in tqdm(
            test_loader, desc="inference", unit="image", disable=hidden
        ):
            if len(images) != 1:
                raise ValueError(
                    f"the loader gives {len(images)} images a batch; evaluation needs "
                    "batch_size=1, because the images differ in size."
                )
            with torch.no_grad():
                boxes, labels, scores = detector(
                    images.to(device, dtype),
                    test_score_thresh=score_thresh,
                    test_nms_thresh=nms_thresh,
                )
            objects = gt_boxes[0][gt_boxes[0, :, 4] >= 0]
            prediction = {"boxes": boxes.cpu(), "labels": labels.cpu(), "scores": scores.cpu()}
            target = {"boxes": objects[:, :4], "labels": objects[:, 4].long()}
            yield paths[0], unnormalize(images[0]), prediction, target
    finally:
        detector.train(was_training)


def evaluate_detector(
    detector: nn.Module,
    dataset: VOC2007DetectionTiny,
    score_thresh: float,
    nms_thresh: float,
    *,
    levels: Mapping[str, tuple[float, float]] | None = None,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Detect in all images of a data set: what ``eecs598.report`` starts from.

    Where there are several processes, each detects in its share and all get the whole.

    Args:
        detector: see ``inference_with_detector``.
        dataset: a split that is not augmented.
        score_thresh: detections score above it.
        nms_thresh: IoU above which the lower of two detections of a class is dropped.
        levels: see ``Evaluation``.
        num_workers: processes that load images.
        device: to run on.
    """
    loader = DataLoader(
        Subset(dataset, range(rank(), len(dataset), num_processes())),
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.device(device).type != "cpu",
        generator=torch.Generator(),  # an evaluation in a training does not touch its randomness
    )
    detections = iterate_detections(detector, loader, score_thresh, nms_thresh, device=device)
    shares = gather(
        [
            (path, tuple(image.shape[-2:]), prediction, target)
            for path, image, prediction, target in detections
        ]
    )
    in_order = [shares[i % len(shares)][i // len(shares)] for i in range(len(dataset))]
    paths, sizes, predictions, targets = zip(*in_order, strict=True)
    names = list(dataset.class_to_idx)
    return Evaluation(names, paths, sizes, predictions, targets, score_thresh, levels or {})


def target_rows(target: Mapping[str, Tensor]) -> Tensor:
    """Rows ``(M, 5)`` of x1, y1, x2, y2, class id: what ``detection_visualizer`` draws."""
    return torch.cat([target["boxes"], target["labels"][:, None]], dim=1)


def prediction_rows(prediction: Mapping[str, Tensor]) -> Tensor:
    """Rows ``(K, 6)`` of x1, y1, x2, y2, class id, score: what ``detection_visualizer`` draws."""
    labels, scores = prediction["labels"], prediction["scores"]
    return torch.cat([prediction["boxes"], labels[:, None], scores[:, None]], dim=1)
