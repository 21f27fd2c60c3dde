"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., arXiv 1904.01355).

The detector of the assignment: a backbone with a feature pyramid (``common.py``), one head shared
by all pyramid levels that predicts at every location a class, the four distances to the sides of
a box and a centerness, the targets and losses to train it, and the post-processing.

It differs from the paper where the assignment does: three levels (p3 to p5), centerness beside
the box regression, distances regressed directly in units of the stride with an L1 loss, and
losses normalised by a moving average of the number of foreground locations. What the paper and
its successors do instead (GIoU loss, group norm, a scale per level, centre sampling) are
keyword-only arguments of ``FCOS``.

Symbols: B images, N locations (of one level, or of all levels joined), M boxes, C classes, K
detections. Locations are x-major, see ``common.get_fpn_location_coords``. Boxes are XYXY in
pixels of the input tensor. A matched box is ``(x1, y1, x2, y2, class id)``, background is -1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from common import (
    DetectorBackboneWithFPN,
    at_least_float32,
    check_images,
    check_threshold,
    check_training_batch,
    class_spec_nms,
    get_fpn_location_coords,
)
from eecs598.runtime import mean_over_processes

__all__ = [
    "FCOS",
    "FCOSPredictionNetwork",
    "fcos_apply_deltas_to_locations",
    "fcos_get_deltas_from_locations",
    "fcos_level_ranges",
    "fcos_make_centerness_targets",
    "fcos_match_locations_to_gt",
    "hello_one_stage_detector",
]

# Where the caller of evaluation gives no thresholds: those of the assignment's own evaluation.
DEFAULT_SCORE_THRESH = 0.4
DEFAULT_NMS_THRESH = 0.6

# Centerness is about 0.4 on average, and it weighs the GIoU loss.
GIOU_WEIGHT = 2.0

GROUP_NORM_GROUPS = 32


def hello_one_stage_detector() -> None:
    """Tell the notebook that this module was imported."""
    print("Hello from one_stage_detector.py!")


# --------------------------------------------------------------------------------------------
# Head
# --------------------------------------------------------------------------------------------


class FCOSPredictionNetwork(nn.Module):
    """The head that all pyramid levels share (paper, figure 2).

    Two stems of 3x3 convolutions with ReLU: one ends in the class logits, the other in the box
    deltas and the centerness logit.

    Args:
        num_classes: C.
        in_channels: channels of the pyramid levels.
        stem_channels: output channels of each stem convolution; an empty list gives no stem.
        norm: ``"none"``, or ``"group"`` for group norm (arXiv 1803.08494) after each stem
            convolution, as in the paper.
        scaled_levels: names of the levels whose deltas are multiplied with a learned scale of
            their own (paper, section 3.2, the ``s_i`` of the exponential).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem_channels: Sequence[int],
        *,
        norm: str = "none",
        scaled_levels: Iterable[str] = (),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}; expected at least 1.")
        if norm not in ("none", "group"):
            raise ValueError(f'norm={norm!r}; expected "none" or "group".')

        def stem() -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, o in zip((in_channels, *stem_channels), stem_channels, strict=False):
                layers.append(nn.Conv2d(i, o, kernel_size=3, padding=1))
                if norm == "group":
                    layers.append(nn.GroupNorm(math.gcd(GROUP_NORM_GROUPS, o), o))
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        channels = stem_channels[-1] if stem_channels else in_channels
        self.stem_cls = stem()
        self.stem_box = stem()
        self.pred_cls = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.pred_box = nn.Conv2d(channels, 4, kernel_size=3, padding=1)
        self.pred_ctr = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.scales = nn.ParameterDict({level: torch.tensor(1.0) for level in scaled_levels})

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        # Every class starts at probability 0.01, so that the many background locations don't
        # swamp the first iterations (focal loss, arXiv 1708.02002, section 4.1).
        nn.init.constant_(self.pred_cls.bias, -math.log(99))

    def forward(self, feats_per_fpn_level: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Predict at every location.

        Args:
            feats_per_fpn_level: ``(B, in_channels, H, W)`` of each level.

        Returns:
            Class logits, deltas and centerness logits: three dicts with, per level, tensors of
            shape ``(B, W * H, C)``, ``(B, W * H, 4)`` and ``(B, W * H, 1)``, x-major.
        """
        class_logits, deltas, centerness_logits = {}, {}, {}
        for level, feats in feats_per_fpn_level.items():
            class_feats, box_feats = self.stem_cls(feats), self.stem_box(feats)
            class_logits[level] = _flatten_x_major(self.pred_cls(class_feats))
            deltas[level] = _flatten_x_major(self.pred_box(box_feats))
            if level in self.scales:
                deltas[level] = deltas[level] * self.scales[level]
            centerness_logits[level] = _flatten_x_major(self.pred_ctr(box_feats))
        return [class_logits, deltas, centerness_logits]


def _flatten_x_major(feats: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, W * H, C), in the order of ``get_fpn_location_coords``.

    Flattening over (H, W) instead would pair each location with the prediction of its mirror
    image across the diagonal. Such a detector still trains, at half of the accuracy.
    """
    return feats.permute(0, 3, 2, 1).flatten(1, 2)


# --------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------


def fcos_match_locations_to_gt(
    locations_per_fpn_level: Mapping[str, Tensor],
    strides_per_fpn_level: Mapping[str, int],
    gt_boxes: Tensor,
    *,
    center_radius: float | None = None,
) -> dict[str, Tensor]:
    """Assign to every location of one image a ground-truth box or background (paper, section 3.2).

    A location matches a box when it lies strictly inside and the box suits its level: the largest
    of the four distances to the box's sides lies strictly between 4 and 8 strides, without the
    lower bound on the finest level and without the upper bound on the coarsest. Of several
    matching boxes the one with the smallest area wins.

    Args:
        locations_per_fpn_level: ``(N, 2)`` of each level.
        strides_per_fpn_level: stride of each level.
        gt_boxes: ``(M, 5)`` boxes of one image with class ids; rows of -1 are padding.
        center_radius: a location also has to lie within so many strides of the centre of the box,
            in x and in y (centre sampling, arXiv 1904.01355v5, section 3.2). No limit unless
            given.

    Returns:
        Per level ``(N, 5)``: the matched box and its class id, background rows are -1.
    """
    if gt_boxes.dim() != 2 or gt_boxes.shape[1] != 5:
        raise ValueError(
            f"gt_boxes have shape {tuple(gt_boxes.shape)}; expected (M, 5) for one image."
        )
    locations, strides = _join_levels(locations_per_fpn_level, strides_per_fpn_level)
    matched = _match_locations(
        locations, strides, strides_per_fpn_level.values(), gt_boxes[None], center_radius
    )
    sizes = [len(level_locations) for level_locations in locations_per_fpn_level.values()]
    return dict(zip(locations_per_fpn_level, matched[0].split(sizes), strict=True))


def fcos_level_ranges(
    strides_per_fpn_level: Mapping[str, int],
) -> dict[str, tuple[float, float]]:
    """Which boxes each level is responsible for, as ``fcos_match_locations_to_gt`` has it.

    Args:
        strides_per_fpn_level: stride of each level.

    Returns:
        Per level the bounds of the largest distance from a location to a side, in pixels.
    """
    finest, coarsest = min(strides_per_fpn_level.values()), max(strides_per_fpn_level.values())
    return {
        level: (
            0 if stride == finest else 4 * stride,
            math.inf if stride == coarsest else 8 * stride,
        )
        for level, stride in strides_per_fpn_level.items()
    }


def _match_locations(
    locations: Tensor,
    strides: Tensor,
    all_strides: Iterable[int],
    gt_boxes: Tensor,
    center_radius: float | None,
) -> Tensor:
    """The matching of ``fcos_match_locations_to_gt`` for a batch and all levels at once.

    Args:
        locations: ``(N, 2)`` of all levels joined.
        strides: ``(N, 1)``.
        all_strides: the strides of the whole pyramid, to know its finest and coarsest level.
        gt_boxes: ``(B, M, 5)``.
        center_radius: in strides, or None.

    Returns:
        ``(B, N, 5)``.
    """
    batch_size, num_boxes, _ = gt_boxes.shape
    if num_boxes == 0:
        return gt_boxes.new_full((batch_size, len(locations), 5), -1.0)
    finest, coarsest = min(all_strides), max(all_strides)
    lower = (4 * strides).masked_fill(strides == finest, 0)  # (N, 1)
    upper = (8 * strides).masked_fill(strides == coarsest, math.inf)

    distances = _distances(locations[:, None], gt_boxes[:, None])  # (B, N, M, 4)
    largest = distances.amax(dim=-1)  # (B, N, M)
    matches = (distances.amin(dim=-1) > 0) & (largest > lower) & (largest < upper)
    matches &= gt_boxes[:, None, :, 4] >= 0  # padding matches nothing
    if center_radius is not None:
        # left - right is twice the distance to the centre in x, top - bottom in y.
        from_center = 0.5 * (distances[..., :2] - distances[..., 2:]).abs().amax(dim=-1)
        matches &= from_center < center_radius * strides  # (B, N, M) < (N, 1)

    areas = (gt_boxes[..., 2] - gt_boxes[..., 0]) * (gt_boxes[..., 3] - gt_boxes[..., 1])
    areas = areas[:, None].masked_fill(~matches, math.inf)  # (B, N, M)
    smallest, index = areas.min(dim=-1)  # (B, N)
    matched = gt_boxes.gather(1, index[..., None].expand(-1, -1, 5))  # (B, N, 5)
    return matched.masked_fill((smallest == math.inf)[..., None], -1.0)


def fcos_get_deltas_from_locations(
    locations: Tensor, gt_boxes: Tensor, stride: float | Tensor
) -> Tensor:
    """Distances from locations to the sides of their boxes, in strides (paper, equation 1).

    Args:
        locations: ``(N, 2)``.
        gt_boxes: ``(N, 4)`` boxes, or ``(N, 5)`` boxes with class ids; background rows are -1.
            Leading batch dimensions are allowed.
        stride: of the level, or ``(N, 1)`` where locations of several levels are joined.

    Returns:
        ``(N, 4)``: left, top, right, bottom; background rows are -1.
    """
    if gt_boxes.shape[-1] not in (4, 5) or locations.shape[-1] != 2:
        raise ValueError(
            f"locations have shape {tuple(locations.shape)} and gt_boxes {tuple(gt_boxes.shape)}; "
            "expected (N, 2), and (N, 4) or (N, 5)."
        )
    if gt_boxes.shape[-1] == 5:
        background = gt_boxes[..., 4:] < 0
    else:
        background = (gt_boxes == -1).all(dim=-1, keepdim=True)
    return (_distances(locations, gt_boxes) / stride).masked_fill(background, -1.0)


def fcos_apply_deltas_to_locations(
    deltas: Tensor, locations: Tensor, stride: float | Tensor
) -> Tensor:
    """Boxes from locations and distances: the inverse of ``fcos_get_deltas_from_locations``.

    Negative deltas count as 0, so that the location stays inside its box; the box of a background
    row is the location itself.

    Args:
        deltas: ``(N, 4)`` left, top, right, bottom in strides. Leading batch dimensions are
            allowed.
        locations: ``(N, 2)``.
        stride: of the level, or ``(N, 1)`` where locations of several levels are joined.

    Returns:
        ``(N, 4)`` boxes in pixels.
    """
    if deltas.shape[-1] != 4 or locations.shape[-1] != 2:
        raise ValueError(
            f"deltas have shape {tuple(deltas.shape)} and locations {tuple(locations.shape)}; "
            "expected (N, 4) and (N, 2)."
        )
    offsets = deltas.clamp(min=0) * stride
    return torch.cat([locations - offsets[..., :2], locations + offsets[..., 2:]], dim=-1)


def fcos_make_centerness_targets(deltas: Tensor) -> Tensor:
    """Centerness of locations inside their boxes (paper, equation 3).

    Args:
        deltas: ``(N, 4)`` left, top, right, bottom, in any unit; background rows are -1. Leading
            batch dimensions are allowed.

    Returns:
        ``(N,)``: 1 at the centre of the box, 0 on its sides, -1 for background.
    """
    if deltas.shape[-1] != 4:
        raise ValueError(f"deltas have shape {tuple(deltas.shape)}; expected (N, 4).")
    left, top, right, bottom = deltas.unbind(dim=-1)
    nearer = torch.minimum(left, right) * torch.minimum(top, bottom)
    farther = torch.maximum(left, right) * torch.maximum(top, bottom)
    background = (deltas < 0).any(dim=-1)
    return (nearer / farther).masked_fill(background, 1.0).sqrt().masked_fill(background, -1.0)


def _distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """Pixels from locations (..., 2) to the left, top, right, bottom of boxes (..., 4 or 5)."""
    return torch.cat([locations - boxes[..., :2], boxes[..., 2:4] - locations], dim=-1)


def _join_levels(
    locations_per_fpn_level: Mapping[str, Tensor], strides_per_fpn_level: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Locations (N, 2) of all levels in one tensor, and the stride (N, 1) of each."""
    strides = [
        locations.new_full((len(locations), 1), strides_per_fpn_level[level])
        for level, locations in locations_per_fpn_level.items()
    ]
    return torch.cat(list(locations_per_fpn_level.values())), torch.cat(strides)


# --------------------------------------------------------------------------------------------
# Detector
# --------------------------------------------------------------------------------------------


class FCOS(nn.Module):
    """The one-stage detector: backbone and pyramid, head, losses, post-processing.

    In training mode a call returns the losses, in evaluation mode the detections of one image;
    ``predict`` takes a batch.

    Args:
        num_classes: C, without background.
        fpn_channels: channels of the pyramid levels.
        stem_channels: output channels of the head's stem convolutions.
        backbone: see ``DetectorBackboneWithFPN``.
        weights: see ``DetectorBackboneWithFPN``.
        box_loss: ``"l1"`` on the deltas, or ``"giou"`` on the decoded boxes (arXiv 1902.09630),
            weighted by the centerness targets.
        center_radius: see ``fcos_match_locations_to_gt``.
        head_norm: see ``FCOSPredictionNetwork``.
        level_scales: a learned scale of the deltas for each level.
        frozen_batch_norm: the backbone's batch norms keep their running statistics in training,
            which a batch of few images would only disturb.

    Example:
        >>> detector = FCOS(3, fpn_channels=16, stem_channels=[16], weights=None)
        For dummy input ...
        >>> images = torch.rand(2, 3, 64, 96)
        >>> gt_boxes = torch.full((2, 4, 5), -1.0)  # padded to 4 boxes an image
        >>> gt_boxes[0, 0] = torch.tensor([10.0, 20.0, 50.0, 60.0, 2.0])
        >>> sorted(detector(images, gt_boxes))
        ['loss_box', 'loss_cls', 'loss_ctr']
        >>> boxes, classes, scores = detector.eval()(images[:1], test_score_thresh=0.05)
        >>> [sorted(found) for found in detector.predict(images)]
        [['boxes', 'labels', 'scores'], ['boxes', 'labels', 'scores']]
    """

    def __init__(
        self,
        num_classes: int,
        fpn_channels: int,
        stem_channels: Sequence[int],
        *,
        backbone: str = "regnet_x_400mf",
        weights: str | os.PathLike | None = "DEFAULT",
        box_loss: str = "l1",
        center_radius: float | None = None,
        head_norm: str = "none",
        level_scales: bool = False,
        frozen_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if box_loss not in ("l1", "giou"):
            raise ValueError(f'box_loss={box_loss!r}; expected "l1" or "giou".')
        if center_radius is not None and not center_radius > 0:
            raise ValueError(f"center_radius={center_radius}; expected a positive number or None.")
        self.num_classes = num_classes
        self.box_loss = box_loss
        self.center_radius = center_radius
        self.frozen_batch_norm = frozen_batch_norm
        self.backbone = DetectorBackboneWithFPN(fpn_channels, backbone=backbone, weights=weights)
        self.pred_net = FCOSPredictionNetwork(
            num_classes,
            fpn_channels,
            stem_channels,
            norm=head_norm,
            scaled_levels=self.backbone.fpn_strides if level_scales else (),
        )
        # Moving average of the foreground locations per image. A buffer, because like the
        # statistics of batch norm it belongs to the state of a training.
        self.register_buffer("loss_normalizer", torch.tensor(150.0))
        self._compiled_network: Callable | None = None
        self._compiled_prediction: Callable | None = None

    def train(self, mode: bool = True) -> FCOS:
        """Switch between training and evaluation mode."""
        super().train(mode)
        if mode:
            self._compiled_prediction = None  # of weights that are about to change
        if self.frozen_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The parameters that came with the backbone's weights."""
        return list(self.backbone.backbone.parameters())

    def compile_network(self, compile: bool = True) -> None:
        """Compile backbone, pyramid and head for training; targets and losses stay as they are.

        Evaluation stays as it is, too: its images vary in size, and each size would be compiled.
        """
        self._compiled_network = torch.compile(self._run_network) if compile else None

    def compile_prediction(self) -> None:
        """Compile backbone, pyramid and head for ``predict`` on images of one size, as of a camera.

        The first prediction of each shape ``(B, 3, H, W)`` takes some 20 s more. The weights
        become constants: call it again after changing them. Going back to training undoes it.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("FCOS is in training mode; call eval() before compile_prediction().")
        self._compiled_prediction = torch.compile(
            self._run_network, dynamic=False, options={"freezing": True}
        )

    def forward(
        self,
        images: Tensor,
        gt_boxes: Tensor | None = None,
        test_score_thresh: float | None = None,
        test_nms_thresh: float | None = None,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Losses in training mode, detections of one image in evaluation mode.

        Args:
            images: ``(B, 3, H, W)``; in evaluation B is 1.
            gt_boxes: ``(B, M, 5)`` for training, rows of -1 are padding.
            test_score_thresh: detections score above it; 0.4 unless given.
            test_nms_thresh: IoU above which the lower of two detections of a class is dropped;
                0.6 unless given.

        Returns:
            Training: ``{"loss_cls", "loss_box", "loss_ctr"}``, scalars whose sum is to be
            minimised. Evaluation: boxes ``(K, 4)``, class ids ``(K,)`` and scores ``(K,)`` by
            decreasing score.

        Raises:
            ValueError: wrong shapes, pixels that are not finite, boxes or classes that can't be,
                thresholds outside [0, 1]. Training on a GPU checks shapes only, since looking at
                values there would stall every step; ``a4_helper.train_detector`` looks before
                the transfer.
        """
        if self.training:
            if gt_boxes is None:
                raise ValueError(
                    "FCOS is in training mode and got no gt_boxes. Pass gt_boxes (B, M, 5) to "
                    "train, or call eval() on the detector first."
                )
            if images.device.type == "cpu":
                check_training_batch(images, gt_boxes, self.num_classes)
            return self._losses(images, gt_boxes)

        if images.dim() == 4 and len(images) != 1:
            raise ValueError(
                f"FCOS evaluates one image at a time and got {len(images)}. Use "
                "FCOS.predict(images) for a batch."
            )
        found = self.predict(
            images,
            DEFAULT_SCORE_THRESH if test_score_thresh is None else test_score_thresh,
            DEFAULT_NMS_THRESH if test_nms_thresh is None else test_nms_thresh,
        )[0]
        return found["boxes"], found["labels"], found["scores"]

    def _run_network(self, images: Tensor) -> tuple[dict[str, Tensor], ...]:
        """Locations, class logits, deltas and centerness logits, each per level."""
        feats = self.backbone(images)
        class_logits, deltas, centerness_logits = self.pred_net(feats)
        # In bfloat16 neighbouring coordinates above 256 would fall together.
        dtype = torch.promote_types(images.dtype, torch.float32)
        locations = get_fpn_location_coords(
            {level: feat.shape for level, feat in feats.items()},
            self.backbone.fpn_strides,
            dtype=dtype,
            device=images.device,
        )
        return locations, class_logits, deltas, centerness_logits

    def _losses(self, images: Tensor, gt_boxes: Tensor) -> dict[str, Tensor]:
        network = self._compiled_network or self._run_network
        locations_per_level, *predictions = network(images)
        class_logits, deltas, centerness_logits = (_join_predictions(p) for p in predictions)
        locations, strides = _join_levels(locations_per_level, self.backbone.fpn_strides)

        gt_boxes = gt_boxes.to(locations)
        matched = _match_locations(
            locations, strides, self.backbone.fpn_strides.values(), gt_boxes, self.center_radius
        )  # (B, N, 5)
        target_deltas = fcos_get_deltas_from_locations(locations, matched, strides)  # (B, N, 4)
        target_centerness = fcos_make_centerness_targets(target_deltas)  # (B, N)
        classes = torch.arange(self.num_classes, device=images.device)
        target_classes = (matched[..., 4:] == classes).to(class_logits)  # (B, N, C)
        background = matched[..., 4] < 0  # (B, N)

        loss_cls = sigmoid_focal_loss(class_logits, target_classes, alpha=0.25, gamma=2.0)
        if self.box_loss == "giou":
            boxes = fcos_apply_deltas_to_locations(deltas, locations, strides)  # (B, N, 4)
            loss_box = generalized_box_iou_loss(boxes, matched[..., :4], reduction="none")
            loss_box = (GIOU_WEIGHT * target_centerness * loss_box)[..., None]  # (B, N, 1)
        else:
            # A quarter: the mean over the four sides.
            loss_box = 0.25 * F.l1_loss(deltas, target_deltas, reduction="none")
        loss_ctr = F.binary_cross_entropy_with_logits(
            centerness_logits.squeeze(-1), target_centerness, reduction="none"
        )
        loss_box = loss_box.masked_fill(background[..., None], 0.0)
        loss_ctr = loss_ctr.masked_fill(background, 0.0)

        with torch.no_grad():
            foreground_per_image = mean_over_processes((~background).sum() / len(images))
            self.loss_normalizer.mul_(0.9).add_(0.1 * foreground_per_image)
        # Data with hardly any object would let the average, and with it the divisor, fade to 0.
        divisor = self.loss_normalizer.clamp(min=1.0) * len(images)
        return {
            "loss_cls": loss_cls.sum() / divisor,
            "loss_box": loss_box.sum() / divisor,
            "loss_ctr": loss_ctr.sum() / divisor,
        }

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        score_thresh: float = DEFAULT_SCORE_THRESH,
        nms_thresh: float = DEFAULT_NMS_THRESH,
    ) -> list[dict[str, Tensor]]:
        """Detect objects in a batch of images of one size.

        Args:
            images: ``(B, 3, H, W)``.
            score_thresh: detections score above it.
            nms_thresh: IoU above which the lower of two detections of a class is dropped.

        Returns:
            Per image ``{"boxes": (K, 4), "labels": (K,), "scores": (K,)}`` by decreasing score.
        """
        if self.training:
            raise ValueError("FCOS is in training mode; call eval() on it before predict().")
        check_images(images)
        network = self._compiled_prediction or self._run_network
        return self._detect(images, *network(images), score_thresh, nms_thresh)

    @torch.no_grad()
    def inference(
        self,
        images: Tensor,
        locations_per_fpn_level: Mapping[str, Tensor],
        pred_cls_logits: Mapping[str, Tensor],
        pred_boxreg_deltas: Mapping[str, Tensor],
        pred_ctr_logits: Mapping[str, Tensor],
        test_score_thresh: float = DEFAULT_SCORE_THRESH,
        test_nms_thresh: float = DEFAULT_NMS_THRESH,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turn the network's outputs for one image into detections. Inputs stay as they are.

        Args:
            images: ``(1, 3, H, W)``; its size clips the boxes.
            locations_per_fpn_level: ``(N, 2)`` of each level.
            pred_cls_logits: ``(1, N, C)`` of each level.
            pred_boxreg_deltas: ``(1, N, 4)`` of each level.
            pred_ctr_logits: ``(1, N, 1)`` of each level.
            test_score_thresh: detections score above it.
            test_nms_thresh: IoU above which the lower of two detections of a class is dropped.

        Returns:
            Boxes ``(K, 4)``, class ids ``(K,)`` and scores ``(K,)`` by decreasing score.
        """
        found = self._detect(
            images,
            locations_per_fpn_level,
            pred_cls_logits,
            pred_boxreg_deltas,
            pred_ctr_logits,
            test_score_thresh,
            test_nms_thresh,
        )[0]
        return found["boxes"], found["labels"], found["scores"]

    def _detect(
        self,
        images: Tensor,
        locations_per_level: Mapping[str, Tensor],
        class_logits_per_level: Mapping[str, Tensor],
        deltas_per_level: Mapping[str, Tensor],
        centerness_logits_per_level: Mapping[str, Tensor],
        score_thresh: float,
        nms_thresh: float,
    ) -> list[dict[str, Tensor]]:
        check_threshold("score threshold", score_thresh)
        check_threshold("NMS threshold", nms_thresh)
        locations, strides = _join_levels(locations_per_level, self.backbone.fpn_strides)
        class_probs, labels = _join_predictions(class_logits_per_level).sigmoid().max(dim=-1)
        centerness = _join_predictions(centerness_logits_per_level).sigmoid().squeeze(-1)
        scores = (class_probs * centerness).sqrt()  # (B, N)
        deltas = _join_predictions(deltas_per_level)
        boxes = fcos_apply_deltas_to_locations(deltas, locations, strides)  # (B, N, 4)
        boxes = clip_boxes_to_image(boxes, images.shape[-2:])

        confident = scores > score_thresh
        boxes, labels, scores = boxes[confident], labels[confident], scores[confident]  # (K, ...)
        # One NMS for all images, in which each class of each image is a class of its own.
        image_ids = confident.nonzero()[:, 0]
        class_ids = image_ids * self.num_classes + labels
        kept = class_spec_nms(boxes, scores, class_ids, nms_thresh)
        detections = []
        for image_id in range(len(images)):
            own = kept[image_ids[kept] == image_id]
            detections.append({"boxes": boxes[own], "labels": labels[own], "scores": scores[own]})
        return detections


def _join_predictions(predictions_per_level: Mapping[str, Tensor]) -> Tensor:
    """(B, N, ...) of all levels joined, in float32 or better whatever the network ran in."""
    return at_least_float32(torch.cat(list(predictions_per_level.values()), dim=1))
