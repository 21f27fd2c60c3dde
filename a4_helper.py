"""Data, training and evaluation for the detectors of assignment 4.

A detector here is any module that fulfills ``common.Detector``: in training mode it maps
``(images, gt_boxes)`` to a dict of losses, in evaluation mode one image to
``(boxes, class ids, scores)``. FCOS is one; a two-stage detector can be another.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from common import Detector, check_training_batch
from eecs598.data import (
    MAX_CACHE_BYTES,
    VOC2007_CLASSES,
    AnnotatedImages,
    Item,
    crop_center,
    download_voc2007,
    load_instances,
    make_item,
    unnormalize,
)
from eecs598.metrics import Evaluation, write_text_format
from eecs598.runtime import (
    batches_of,
    broadcast_buffers,
    explained,
    gather,
    make_loader,
    num_processes,
    rank,
)
from eecs598.training import (
    Stateful,
    TrainingLogger,
    TrainingRun,
    ema,
    learning_rate_factor,
    make_optimizer,
    mixed_precision,
    plot_losses,
    show_progress,
)
from eecs598.utils import detection_visualizer, in_notebook_or_window

__all__ = [
    "VOC2007DetectionTiny",
    "evaluate_detector",
    "hello_helper",
    "inference_with_detector",
    "iterate_detections",
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


class VOC2007DetectionTiny(Dataset[Item]):
    """PASCAL VOC 2007, or other data in its layout or in COCO's, resized for a small detector.

    The index comes from ``dataset_dir/voc07_{split}.json`` (the course's file) or, where that is
    missing, from the XML of the devkit without the objects flagged as difficult: both give the
    same index. Training images are resized to a shorter side of ``image_size`` and cropped to the
    square in the center; images of other splits are only resized, so their sizes vary.

    Args:
        dataset_dir: folder with ``VOCdevkit/VOC2007``, or itself in VOC layout, or with the JSON
            of COCO (``eecs598.data.coco.candidates`` says where).
        split: ``"train"``, ``"val"`` or any other list in ``ImageSets/Main``.
        download: fetch the devkit into ``dataset_dir`` unless it is there.
        image_size: shorter side in pixels.
        classes: class names in the order of their ids; the 20 of VOC unless given.
        crop: cut out the square in the center; by default for ``"train"`` alone.
        cache: keep the resized images in memory, shared by the workers of a loader, so that each
            file is decoded once. Prints how much memory they take.
        max_cache_bytes: limit of the cache; images beyond it are read from their files each time.

    Raises:
        ValueError: data that is missing or broken, or an object whose class is not in
            ``classes``.
    """

    def __init__(
        self,
        dataset_dir: str | os.PathLike[str],
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
        self.instances = load_instances(dataset_dir, split, classes)
        self.images = AnnotatedImages(
            self.instances, image_size, cache=cache, max_cache_bytes=max_cache_bytes
        )

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> Item:
        """Load one image.

        Returns:
            Its path; the image ``(3, H, W)``, normalized with ImageNet's mean and standard
            deviation; its boxes ``(M, 5)`` as x1, y1, x2, y2 in pixels of that image and class id.
            M is that of the fullest image of the set; rows of -1 are padding, or boxes that the
            crop removed.
        """
        path = self.instances[index].path
        pixels, boxes = self.images.resized(index)
        if self.crop:
            pixels, boxes = crop_center(pixels, boxes)
        return make_item(path, pixels, boxes, self.images.max_boxes)


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


def train_detector(
    detector: Detector,
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
    backbone_lr_factor: float = 1.0,
    decay_all: bool = True,
    ema_decay: float | None = None,
    amp: str = "off",
    channels_last: bool = True,
    compile: bool = False,
    run: TrainingRun | None = None,
    plot_path: str | os.PathLike | None = None,
) -> dict[str, list[float]]:
    """Train a detector.

    The defaults are the assignment's recipe: SGD with momentum 0.9, the learning rate divided by
    10 after 60 % and again after 90 % of the iterations. The arguments after ``device`` are for
    better results (see ``eecs598.training.OptimizationSettings``) and for runs that have to
    survive a stop. The loader is iterated over as often as needed.

    Args:
        detector: maps ``(images, gt_boxes)`` to a dict of losses; their sum is minimized. See
            ``common.Detector`` for what else it may offer.
        train_loader: yields ``(paths, images, gt_boxes)`` batches: B paths, images
            ``(B, 3, H, W)`` and padded boxes ``(B, M, 5)``. Where ``run`` is resumed, the first
            of them is the one after the checkpoint.
        learning_rate: at the start, or after the warm-up.
        weight_decay: of the optimizer.
        max_iters: number of optimizer steps.
        log_period: iterations between two log lines; a line shows means since the last one.
        device: to train on; the detector is moved there.
        optimizer: ``"sgd"`` or ``"adamw"``.
        schedule: ``"step"`` as above, or ``"cosine"`` from the learning rate down to 0
            (arXiv 1608.03983, equation 5, without restarts).
        warmup_iters: the learning rate rises linearly over this many iterations.
        max_grad_norm: gradients of a larger norm, over all parameters, are scaled down to it.
        backbone_lr_factor: the learning rate of ``detector.backbone_parameters()`` is multiplied
            by it.
        decay_all: without it, biases and norms have no weight decay.
        ema_decay: keep an exponential moving average (EMA) of the weights, of which this part
            remains in every step (less in the first steps). The average is what is evaluated, and
            what the detector has at the end.
        amp: ``"auto"`` runs the network in bfloat16 where the processor computes in it natively,
            in float16 with scaled gradients on other GPUs; ``"off"`` in float32 everywhere. The
            losses are float32 in any case.
        channels_last: store tensors with their channels together, which is faster on CPUs and on
            GPUs with tensor cores and changes no value beyond rounding.
        compile: compile the network with ``torch.compile``: the first step of each image size takes
            one to two minutes more, the others take less time.
        run: saves checkpoints and the history, evaluates, and continues after a stop.
        plot_path: save the loss plot here. Without it, the plot is shown where there is a
            notebook or a window. With ``run``, the run draws the plot.

    Returns:
        History with one entry per iteration: ``"iteration"``, ``"lr"``, ``"loss"`` and each part
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
    if not isinstance(detector, nn.Module):
        raise ValueError(f"detector is a {type(detector).__name__}; expected an nn.Module.")
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    detector.to(memory_format=layout).to(device).train()
    solver = make_optimizer(
        detector, optimizer, learning_rate, weight_decay, backbone_lr_factor, decay_all
    )
    factor = learning_rate_factor(schedule, warmup_iters, max_iters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(solver, factor)
    autocast, scaler = mixed_precision(device, amp)
    averaged = ema(detector, ema_decay) if ema_decay is not None else None
    eval_model = averaged.module if averaged is not None else detector

    state: dict[str, Stateful] = {
        "detector": detector,
        "optimizer": solver,
        "scheduler": scheduler,
        "scaler": scaler,
    }
    if averaged is not None:
        state["ema"] = averaged
    history = run.restore(state) if run is not None else {}
    done = len(history.get("iteration", ()))
    network: Detector = _training_network(detector, device, compile)
    # Batches for a GPU are checked before the transfer: reading values there would stall the step.
    checked_here = device.type != "cpu" or not getattr(detector, "checks_batches", False)
    num_classes = getattr(detector, "num_classes", None) if checked_here else None

    with contextlib.ExitStack() as stack:
        if run is not None:
            stack.enter_context(run.catching_signals())
        batch_shape = stack.enter_context(explained() if run is None else run.explaining_errors())
        logger = stack.enter_context(TrainingLogger(history, max_iters, run))
        if run is not None and done and run.evaluation_is_due(done, last=done == max_iters):
            # The run was stopped before this evaluation.
            run.save(done, eval_model, state, history, last=done == max_iters)
        batches = stack.enter_context(contextlib.closing(_repeat(train_loader, max_iters - done)))
        for iteration, (paths, images, gt_boxes) in enumerate(batches, start=done + 1):
            batch_shape[:] = images.shape
            gt_boxes = _without_padding(gt_boxes)
            if num_classes is not None:
                check_training_batch(images, gt_boxes, num_classes)
            images = images.to(device, non_blocking=True, memory_format=layout)
            gt_boxes = gt_boxes.to(device, non_blocking=True)

            with autocast:
                losses = network(images, gt_boxes)
            loss = functools.reduce(torch.add, losses.values())
            solver.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if max_grad_norm is not None:
                scaler.unscale_(solver)
                nn.utils.clip_grad_norm_(detector.parameters(), max_grad_norm)
            logger.step(iteration, solver.param_groups[0]["lr"], {"loss": loss, **losses}, paths)
            scaler.step(solver)
            scaler.update()
            scheduler.step()
            if averaged is not None:
                averaged.update_parameters(detector)

            last = iteration == max_iters
            if last or iteration % log_period == 0:
                logger.log()
            if run is not None and run.is_due(iteration, last):
                broadcast_buffers(eval_model)
                run.save(iteration, eval_model, state, logger.flush(), last)
                logger.restart_clock()

    if averaged is not None:
        detector.load_state_dict(eval_model.state_dict())
    if run is None and (plot_path is not None or in_notebook_or_window()):
        plot_losses(history, plot_path)
    return history


def _training_network(detector: nn.Module, device: torch.device, compile: bool) -> nn.Module:
    """Return what is called in training: the detector, compiled and shared by the processes."""
    compile_network = getattr(detector, "compile_network", None)
    if compile_network is not None:
        compile_network(compile)
    elif compile:
        detector.compile()
    if num_processes() == 1:
        return detector
    return DistributedDataParallel(detector, [device] if device.type == "cuda" else None)


def _without_padding(gt_boxes: Tensor) -> Tensor:
    """Cut off the rows of ``(B, M, 5)`` that are padding in every image of the batch.

    A data set may have one image with hundreds of boxes, and every row costs time in the step. The
    number of rows that is left is a multiple of 8, so that there are few different shapes.
    """
    if gt_boxes.dim() != 3 or gt_boxes.shape[-1] != 5 or gt_boxes.device.type != "cpu":
        return gt_boxes  # what is no batch is found out later
    used = (gt_boxes[..., 4] != -1).any(dim=0).nonzero()  # numbers of rows
    num_rows = int(used[-1]) + 1 if len(used) else 1
    trimmed = gt_boxes[:, : -(-num_rows // 8) * 8].contiguous()
    return trimmed.pin_memory() if gt_boxes.is_pinned() else trimmed


def _repeat(loader: DataLoader, num_batches: int) -> Generator:
    """Yield this many batches of a loader, starting it again whenever it ends."""
    remaining = num_batches
    while remaining > 0:
        started_with = remaining
        with batches_of(loader) as batches:
            for batch in batches:
                yield batch
                remaining -= 1
                if not remaining:
                    return
        if remaining == started_with:
            raise ValueError(
                "the training loader gives no batch. With drop_last=True it needs at least "
                "batch_size images."
            )


# --------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------


def inference_with_detector(
    detector: Detector,
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
        test_loader: yields ``(paths, images, gt_boxes)`` batches of one image.
        idx_to_class: class id -> name.
        score_thresh: detections score above it.
        nms_thresh: IoU above which the lower of two detections of a class is dropped.
        output_dir: folder for ``detection-results/NAME.txt`` and ``ground-truth/NAME.txt``, one
            pair of files for every image, in the text format of ``eecs598.metrics`` (which
            Cartucho's mAP script reads, too). Without it, each image is drawn.
        dtype: to run the detector in.
        device: to run the detector on; it is moved there.

    Returns:
        Predictions (``boxes (K, 4)``, ``labels (K,)``, ``scores (K,)``) and ground truth
        (``boxes (M, 4)``, ``labels (M,)``) of every image, on the CPU: what
        ``eecs598.metrics.average_precision`` takes. Here and in the files, boxes are in pixels of
        the resized images, as in the course. The mAP depends on that a little, since widths count
        inclusive pixels; ``evaluate_detector`` gives boxes in pixels of the original files.

    Raises:
        ValueError: two images whose text files would have the same name, or a batch of more than
            one image.
    """
    classes = [idx_to_class[i] for i in range(len(idx_to_class))]
    predictions, targets = [], []
    names: set[str] = set()
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
                    f"two images are called {name}, so their text files would have the same name; "
                    f"one is {path}. `fcos eval` names images of different folders differently."
                )
            names.add(name)
            write_text_format(output_dir, name, prediction, target, classes)
        predictions.append(prediction)
        targets.append(target)
    print(f"{len(predictions)} images in {time.perf_counter() - start:.1f} s")
    return predictions, targets


def iterate_detections(
    detector: Detector,
    test_loader: DataLoader,
    score_thresh: float,
    nms_thresh: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[str, Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Detect objects image by image.

    The arguments are those of ``inference_with_detector``. The detector is in evaluation mode until
    the last image, and then in the mode that it was in.

    Yields:
        The path; the image ``(3, H, W)`` in [0, 1]; the prediction ``boxes (K, 4)``,
        ``labels (K,)``, ``scores (K,)``; the ground truth ``boxes (M, 4)``, ``labels (M,)``.
        All on the CPU.
    """
    was_training = detector.training
    detector.to(dtype=dtype, device=device).eval()
    try:
        hidden, count = not show_progress(), operator.length_hint(test_loader) or None
        with explained() as batch_shape, batches_of(test_loader) as batches:
            for paths, images, gt_boxes in tqdm(
                batches, desc="inference", total=count, unit="image", disable=hidden
            ):
                batch_shape[:] = images.shape
                if len(images) != 1:
                    raise ValueError(
                        f"the loader gives {len(images)} images per batch; evaluation needs "
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
    detector: Detector,
    dataset: VOC2007DetectionTiny,
    score_thresh: float,
    nms_thresh: float,
    *,
    levels: Mapping[str, tuple[float, float]] | None = None,
    pixel_edges: bool = False,
    num_workers: int = 0,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Detect objects in all images of a data set, and find their boxes in the original files.

    With several processes, each runs on a part of the images and all get the whole result.

    Args:
        detector: see ``inference_with_detector``.
        dataset: images that are not augmented and not cropped.
        score_thresh: detections score above it.
        nms_thresh: IoU above which the lower of two detections of a class is dropped.
        levels: see ``Evaluation``.
        pixel_edges: the detector has learned boxes from edge to edge, see ``Instance.with_edges``.
            They are turned into the annotation's numbers, in which ground truth is given.
        num_workers: processes that load images.
        device: to run on.

    Returns:
        What ``eecs598.metrics`` and ``eecs598.report`` start from. Boxes are in pixels of the
        original images.

    Raises:
        ValueError: a data set that crops its images, or an image file that can't be read or has
            another size than its annotation says.
    """
    if dataset.crop:
        raise ValueError("the data set crops its images; build it with crop=False to evaluate.")
    sizes = dataset.images.sizes  # first, so that a wrong file does not cost an inference
    loader = make_loader(
        Subset(dataset, range(rank(), len(dataset), num_processes())),
        num_workers,
        pin_memory=torch.device(device).type != "cpu",
    )
    detections = iterate_detections(detector, loader, score_thresh, nms_thresh, device=device)
    shares = gather([(tuple(image.shape[-2:]), found) for _, image, found, _ in detections])
    in_order = [shares[i % len(shares)][i // len(shares)] for i in range(len(dataset))]
    input_sizes, predictions = zip(*in_order, strict=True)
    instances = dataset.instances
    scaled = []
    for instance, size, input_size, found in zip(
        instances, sizes, input_sizes, predictions, strict=True
    ):
        scale_y, scale_x = (whole / seen for whole, seen in zip(size, input_size, strict=True))
        factors = found["boxes"].new_tensor([scale_x, scale_y, scale_x, scale_y])
        boxes = found["boxes"] * factors
        if pixel_edges:
            first = boxes[:, :2] + instance.first_pixel
            # A box of no width has no first pixel; the last one is all there is.
            boxes = torch.cat([first.minimum(boxes[:, 2:]), boxes[:, 2:]], dim=1)
        scaled.append({**found, "boxes": boxes})
    known = all(instance.difficult_known for instance in instances)
    return Evaluation(
        list(dataset.class_to_idx),
        [str(instance.path) for instance in instances],
        sizes,
        scaled,
        [_objects(instance.ordinary) for instance in instances],
        score_thresh,
        levels or {},
        difficult=[_objects(i.boxes[i.difficult]) for i in instances] if known else None,
        input_sizes=input_sizes,
    )


def _objects(rows: Tensor) -> dict[str, Tensor]:
    """Split rows ``(M, 5)`` of an index into boxes and labels."""
    return {"boxes": rows[:, :4], "labels": rows[:, 4].long()}


def target_rows(target: Mapping[str, Tensor]) -> Tensor:
    """Return rows ``(M, 5)`` of x1, y1, x2, y2, class id: what ``detection_visualizer`` draws."""
    return torch.cat([target["boxes"], target["labels"][:, None]], dim=1)


def prediction_rows(prediction: Mapping[str, Tensor]) -> Tensor:
    """Return rows ``(K, 6)`` of x1, y1, x2, y2, class id, score, as ``target_rows`` does."""
    labels, scores = prediction["labels"], prediction["scores"]
    return torch.cat([prediction["boxes"], labels[:, None], scores[:, None]], dim=1)
