"""Time of a training step and of a prediction, compared with torchvision's own FCOS.

The peer is ``torchvision.models.detection.FCOS`` with the same backbone, pyramid levels and width,
and with the same number of convolutions in the head; both get the same images and boxes. The
backbones have the same weights, which is checked; each head is the library's own. Weights are
random, and all scores are just above the threshold: our detector keeps every location, 1,029 boxes
per image, torchvision's the 1,000 best pairs of location and class per level. Trained detectors
keep fewer.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from benchmarks.timing import Row, side_by_side
from eecs598.training import mixed_precision, precision_name
from one_stage_detector import FCOS

BATCH_SIZE, SIDE, NUM_CLASSES, WIDTH, STEM = 16, 224, 20, 128, (128, 128)
BOXES_PER_IMAGE = 3  # about VOC's average
SCORE_THRESH, NMS_THRESH = 0.05, 0.6


def rows(device: str) -> Iterator[Row]:
    """Time training steps and predictions."""
    images, gt_boxes = batch(device)
    ours, theirs = make_detector(device), make_peer(device)
    _check_same_pyramid(ours.eval(), theirs.eval(), images[:1])
    fast_dtype = precision_name(device, "auto")
    peer = "torchvision FCOS, float32"
    plain = training_step(channels_last(ours).train(), channels_last(images), gt_boxes, "off")
    fast = training_step(ours.train(), channels_last(images), gt_boxes, "auto")
    peers = _peer_training_step(theirs.train(), images, gt_boxes)
    question = f"training step, {BATCH_SIZE} images of {SIDE} px"
    yield Row(f"{question}, {fast_dtype}, channels last", peer, *side_by_side(fast, peers), 1 / 2.6)
    yield Row(f"{question}, float32", peer, *side_by_side(plain, peers), 1 / 1.4)
    if device == "cpu" and fast_dtype == "bfloat16":
        yield _depthwise_row(channels_last(images), gt_boxes)
    ours, theirs = channels_last(ours).eval(), theirs.eval()
    compiled = channels_last(make_detector(device)).eval()
    compiled.compile_prediction()
    for count in (1, BATCH_SIZE):
        some = images[:count]
        question = f"prediction, {count} image{'s' * (count > 1)} of {SIDE} px"
        for model, amp, how in (
            (ours, "off", "float32"),
            (ours, "auto", fast_dtype),
            (compiled, "auto", f"{fast_dtype}, compiled"),
        ):
            times = side_by_side(prediction(model, some, amp), peer_prediction(theirs, some))
            yield Row(f"{question}, {how}", peer, *times, 0.6)


def _depthwise_row(images: Tensor, gt_boxes: Tensor) -> Row:
    """Compare a step with depthwise convolutions in float32 with one that is all in bfloat16."""
    backbone = "timm:tf_efficientnet_lite0"
    ours, other = (channels_last(make_detector("cpu", backbone)).train() for _ in range(2))
    step = training_step(ours, images, gt_boxes, "auto")
    autocast = torch.autocast("cpu", torch.bfloat16)
    peer = training_step(other, images, gt_boxes, "auto", autocast)
    question = f"training step of EfficientNet-Lite0, {BATCH_SIZE} images of {SIDE} px, bfloat16"
    return Row(question, "the same in torch.autocast alone", *side_by_side(step, peer), None)


def batch(device: str, boxes_per_image: int = BOXES_PER_IMAGE) -> tuple[Tensor, Tensor]:
    """Return images ``(B, 3, SIDE, SIDE)`` and padded boxes ``(B, 40, 5)``; always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH_SIZE, 3, SIDE, SIDE, generator=generator)
    corners = torch.rand(BATCH_SIZE, boxes_per_image, 2, generator=generator) * 0.5 * SIDE
    sides = (0.05 + 0.4 * torch.rand(corners.shape, generator=generator)) * SIDE
    labels = torch.randint(NUM_CLASSES, (*corners.shape[:2], 1), generator=generator)
    gt_boxes = torch.cat([corners, corners + sides, labels], dim=2)
    padding = torch.full((BATCH_SIZE, 40 - boxes_per_image, 5), -1.0)
    return images.to(device), torch.cat([gt_boxes, padding], dim=1).to(device)


def make_detector(device: str, backbone: str = "regnet_x_400mf") -> FCOS:
    """Return a detector with random weights, always the same."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # the shapes that the assignment prints
        return FCOS(NUM_CLASSES, WIDTH, STEM, backbone=backbone, weights=None).to(device)


def channels_last(value: Any) -> Any:
    """Convert a module or a tensor to the layout in which convolutions are fastest."""
    return value.to(memory_format=torch.channels_last)


class _SameBackbone(nn.Module):
    """Our backbone and pyramid with the interface that torchvision's detectors expect."""

    def __init__(self, detector: FCOS) -> None:
        super().__init__()
        self.body = detector.backbone
        self.out_channels = WIDTH

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.body(images)


def make_peer(device: str) -> TorchvisionFCOS:
    """Return torchvision's detector with the same backbone and pyramid."""
    head = FCOSHead(WIDTH, 1, NUM_CLASSES, num_convs=len(STEM))
    strides = (8, 16, 32)
    anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
    return TorchvisionFCOS(
        _SameBackbone(make_detector(device)),
        NUM_CLASSES,
        min_size=SIDE,
        max_size=SIDE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=anchors,
        head=head,
        score_thresh=SCORE_THRESH,
        nms_thresh=NMS_THRESH,
    ).to(device)


def _check_same_pyramid(ours: FCOS, theirs: TorchvisionFCOS, images: Tensor) -> None:
    with torch.no_grad():
        levels, others = ours.backbone(images), theirs.backbone(images)
    assert levels.keys() == others.keys()
    for level, values in levels.items():
        torch.testing.assert_close(values, others[level])


def training_step(
    model: FCOS,
    images: Tensor,
    gt_boxes: Tensor,
    amp: str,
    autocast: AbstractContextManager[Any] | None = None,
) -> Callable[[], Any]:
    """Return a function that makes one training step: losses, gradients, SGD.

    Args:
        model: in training mode.
        images: ``(B, 3, H, W)``.
        gt_boxes: ``(B, M, 5)``.
        amp: see ``mixed_precision``.
        autocast: in place of the one of ``mixed_precision``.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    usual, scaler = mixed_precision(images.device, amp)
    if autocast is None:
        autocast = usual

    def step() -> None:
        with autocast:
            losses: dict[str, Tensor] = model(images, gt_boxes)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def prediction(model: FCOS, images: Tensor, amp: str) -> Callable[[], Any]:
    """Return a function that detects objects in the images."""
    autocast, _ = mixed_precision(images.device, amp)

    def predict() -> Any:
        with autocast:
            return model.predict(channels_last(images), SCORE_THRESH, NMS_THRESH)

    return predict


def peer_prediction(model: TorchvisionFCOS, images: Tensor) -> Callable[[], Any]:
    """Return a function that detects objects in the images with torchvision's detector."""

    def predict() -> Any:
        with torch.no_grad():
            return model(list(images))

    return predict


def _peer_training_step(
    model: TorchvisionFCOS, images: Tensor, gt_boxes: Tensor
) -> Callable[[], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    targets = [
        {"boxes": boxes[boxes[:, 4] >= 0, :4], "labels": boxes[boxes[:, 4] >= 0, 4].long()}
        for boxes in gt_boxes
    ]

    def step() -> None:
        losses: dict[str, Tensor] = model(list(images), targets)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
