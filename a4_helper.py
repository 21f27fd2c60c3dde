"""Data, training and evaluation for the detectors of assignment 4.

A detector here is any module that, in training mode, maps ``(images, gt_boxes)`` to a dict of
losses, and in evaluation mode maps one image to ``(boxes, class ids, scores)``. FCOS is one; a
two-stage detector can be another.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from tqdm.auto import tqdm

from common import check_training_batch
from eecs598.files import replacing
from eecs598.metrics import write_text_format
from eecs598.utils import detection_visualizer, in_notebook_or_window
from eecs598.voc import VOC2007_CLASSES, download_voc2007, load_index

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "VOC2007DetectionTiny",
    "hello_helper",
    "inference_with_detector",
    "iterate_detections",
    "plot_losses",
    "prediction_rows",
    "target_rows",
    "train_detector",
    "unnormalize",
]

# Statistics of the images that the pretrained backbones were trained on.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def hello_helper() -> None:
    """Tell the notebook that this module was imported."""
    print("Hello from a4_helper.py!")


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------


class VOC2007DetectionTiny(Dataset):
    """PASCAL VOC 2007, or any data in its layout, resized for a small detector.

    The index comes from ``dataset_dir/voc07_{split}.json`` (the course's file) or, where that is
    missing, from the XML of the devkit, with the objects flagged as difficult left out: the same
    index. Training images are resized to a shorter side of ``image_size`` and cropped to the
    square in the centre; images of other splits are only resized, so their sizes vary.

    Args:
        dataset_dir: folder with ``VOCdevkit/VOC2007``, or itself in VOC layout.
        split: ``"train"``, ``"val"`` or any other list in ``ImageSets/Main``.
        download: fetch the devkit into ``dataset_dir`` unless it is there.
        image_size: shorter side in pixels.
        classes: class names in the order of their ids; the 20 of VOC unless given.

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
    ) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"image_size={image_size}; expected a positive number of pixels.")
        if download:
            download_voc2007(dataset_dir)
        self.split = split
        self.image_size = image_size
        self.class_to_idx = {name: i for i, name in enumerate(classes)}
        self.idx_to_class = {i: name for name, i in self.class_to_idx.items()}

        self.instances: list[tuple[Path, Tensor]] = []
        for path, objects in load_index(dataset_dir, split):
            rows = [[*item["xyxy"], self._class_id(item["name"], path)] for item in objects]
            self.instances.append((path, torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)))
        self.max_boxes = max(len(boxes) for _, boxes in self.instances)

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
        path, boxes = self.instances[index]
        image = _read_image(path)
        original_width, original_height = image.size
        image = TF.resize(image, self.image_size)
        width, height = image.size
        boxes = boxes.clone()
        boxes[:, 0:4:2] *= width / original_width
        boxes[:, 1:4:2] *= height / original_height

        if self.split == "train":
            left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
            image = TF.crop(image, top, left, self.image_size, self.image_size)
            boxes = _crop_boxes(boxes, left, top, self.image_size)

        pixels = TF.normalize(TF.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
        padded = torch.full((self.max_boxes, 5), -1.0)
        padded[: len(boxes)] = boxes
        return str(path), pixels, padded


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} can't be read as an image: {error}") from error


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
    amp: str = "off",
    plot_path: str | os.PathLike | None = None,
) -> dict[str, list[float]]:
    """Train a detector.

    The defaults are the assignment's recipe: SGD with momentum 0.9, the learning rate divided by
    10 after 60 % and again after 90 % of the iterations. What comes after ``device`` is for
    training from random weights, where AdamW with a warm-up, clipped gradients and a cosine
    schedule gets further in a few hundred iterations. The loader is started again as often as it
    takes.

    Args:
        detector: maps ``(images, gt_boxes)`` to a dict of losses; their sum is minimised.
        train_loader: gives ``(paths, images, gt_boxes)`` batches.
        learning_rate: at the start.
        weight_decay: of the optimizer.
        max_iters: number of optimizer steps.
        log_period: iterations between two lines of the log; a line shows means since the last.
        device: to train on; the detector is moved there.
        optimizer: ``"sgd"`` or ``"adamw"``.
        schedule: ``"step"`` as above, or ``"cosine"`` from the learning rate down to 0
            (arXiv 1608.03983, equation 5, without restarts).
        warmup_iters: the learning rate rises linearly over this many iterations.
        max_grad_norm: gradients of a larger norm, over all parameters, are scaled down to it.
        amp: ``"auto"`` runs the network in bfloat16 where the processor computes in it natively,
            ``"off"`` in float32 everywhere. The losses are float32 in any case.
        plot_path: save the loss plot here. Without it, the plot is shown where there is a
            notebook or a window.

    Returns:
        History with one entry an iteration: ``"iteration"``, ``"lr"``, ``"loss"`` and each part
        of the loss under its name.

    Raises:
        ValueError: a batch that the detector can't be trained on, or a setting out of range.
        FloatingPointError: the loss became NaN or infinite.
    """
    if max_iters < 1 or log_period < 1 or learning_rate <= 0:
        raise ValueError(
            f"max_iters={max_iters}, log_period={log_period}, learning_rate={learning_rate}; "
            "expected positive numbers."
        )
    device = torch.device(device)
    # Channels last is a matter of memory layout alone, and faster on CPUs and tensor cores.
    detector = detector.to(device=device, memory_format=torch.channels_last).train()
    solver = _make_optimizer(detector, optimizer, learning_rate, weight_decay)
    factor = _learning_rate_factor(schedule, warmup_iters, max_iters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(solver, factor)
    precision = _autocast(device, amp)
    num_classes = getattr(detector, "num_classes", None)
    history: dict[str, list[float]] = {"iteration": [], "lr": []}
    pending: list[dict[str, Tensor]] = []  # on the device, until the next line of the log

    progress = tqdm(total=max_iters, desc="training", unit="it", dynamic_ncols=True, smoothing=0.1)
    for iteration, (_, images, gt_boxes) in enumerate(_endless(train_loader, max_iters), start=1):
        if num_classes is not None:
            check_training_batch(images, gt_boxes, num_classes)
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        gt_boxes = gt_boxes.to(device, non_blocking=True)

        with precision:
            losses = detector(images, gt_boxes)
        loss = sum(losses.values())
        solver.zero_grad(set_to_none=True)
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(detector.parameters(), max_grad_norm)
        history["iteration"].append(iteration)
        history["lr"].append(solver.param_groups[0]["lr"])
        solver.step()
        scheduler.step()

        pending.append({"loss": loss.detach(), **{k: v.detach() for k, v in losses.items()}})
        progress.update()
        if iteration % log_period == 0 or iteration == max_iters:
            means = _append_losses(history, pending)
            pending = []
            parts = "".join(f"[{name}: {value:.3f}]" for name, value in means.items())
            progress.write(f"[Iter {iteration}]{parts}")
            progress.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{history['lr'][-1]:.1e}")
    progress.close()

    if plot_path is not None or in_notebook_or_window():
        plot_losses(history, plot_path)
    return history


def _make_optimizer(
    detector: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    parameters = [p for p in detector.parameters() if p.requires_grad]
    # One fused kernel for all parameters; the arithmetic is that of the plain loop.
    common = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **common)
    if name == "adamw":
        return torch.optim.AdamW(parameters, **common)
    raise ValueError(f'optimizer={name!r}; expected "sgd" or "adamw".')


def _learning_rate_factor(
    schedule: str, warmup_iters: int, max_iters: int
) -> Callable[[int], float]:
    """What the learning rate is multiplied with, as a function of the steps done so far."""
    if schedule == "step":
        milestones = (int(0.6 * max_iters), int(0.9 * max_iters))

        def decay(step: int) -> float:
            return 0.1 ** sum(step >= milestone for milestone in milestones)
    elif schedule == "cosine":

        def decay(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * step / max_iters))
    else:
        raise ValueError(f'schedule={schedule!r}; expected "step" or "cosine".')
    return lambda step: decay(step) * min(1.0, (step + 1) / (warmup_iters + 1))


def _autocast(device: torch.device, amp: str) -> torch.autocast:
    if amp not in ("auto", "off"):
        raise ValueError(f'amp={amp!r}; expected "auto" or "off".')
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of PyTorch can't tell; there, float32 is never wrong.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native and amp == "auto")


def _endless(loader: DataLoader, max_iters: int) -> Iterator:
    """Batches of the loader, started again when it ends, ``max_iters`` in all."""
    remaining = max_iters
    while remaining:
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


def _append_losses(
    history: dict[str, list[float]], pending: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Move the losses of the last iterations from the device to the history; their means."""
    means = {}
    for name in pending[0]:
        values = torch.stack([losses[name] for losses in pending]).tolist()
        history.setdefault(name, []).extend(values)
        means[name] = sum(values) / len(values)
    first_bad = next(
        (i for i, loss in enumerate(history["loss"]) if not abs(loss) < float("inf")), None
    )
    if first_bad is not None:
        parts = {name: history[name][first_bad] for name in pending[0]}
        raise FloatingPointError(
            f"the loss became {parts['loss']} at iteration {first_bad + 1} (parts: {parts}). "
            "Lower the learning rate, or look at the data of that iteration."
        )
    return means


def plot_losses(history: Mapping[str, Sequence[float]], path: str | os.PathLike | None = None):
    """Plot the loss of a training and its parts, smoothed, over the iterations.

    Args:
        history: as returned by ``train_detector``.
        path: save the plot here; shown in a notebook or a window unless given.

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
    ax.legend()
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
    predictions, targets = [], []
    start = time.perf_counter()
    for path, image, prediction, target in iterate_detections(
        detector, test_loader, score_thresh, nms_thresh, dtype=dtype, device=device
    ):
        if output_dir is None:
            detection_visualizer(
                image, idx_to_class, target_rows(target), prediction_rows(prediction)
            )
        else:
            write_text_format(output_dir, Path(path).stem, prediction, target, classes)
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
        for paths, images, gt_boxes in tqdm(test_loader, desc="inference", unit="image"):
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


def target_rows(target: Mapping[str, Tensor]) -> Tensor:
    """Rows ``(M, 5)`` of x1, y1, x2, y2, class id: what ``detection_visualizer`` draws."""
    return torch.cat([target["boxes"], target["labels"][:, None]], dim=1)


def prediction_rows(prediction: Mapping[str, Tensor]) -> Tensor:
    """Rows ``(K, 6)`` of x1, y1, x2, y2, class id, score: what ``detection_visualizer`` draws."""
    labels, scores = prediction["labels"], prediction["scores"]
    return torch.cat([prediction["boxes"], labels[:, None], scores[:, None]], dim=1)
