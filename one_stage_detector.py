"""FCOS: Fully Convolutional One-Stage Object Detection (Tian et al., arXiv 1904.01355v5).

The detector of the assignment, in the order in which the paper builds it: the head on the feature
pyramid of ``common.py`` (figure 2), the targets of every location (sections 3.1 and 3.3, equations
1 and 3), the training loss (equation 2), the post-processing, and ``FCOS``, which joins them.

It differs from the paper where the assignment does: three levels (p3 to p5), size ranges counted
in strides, centerness beside the box regression, distances regressed directly in units of the
stride with an L1 loss, and losses normalized by a moving average of the number of foreground
locations. What the paper and its successors do instead (GIoU loss, group norm, a scale per level,
center sampling) are keyword-only arguments of ``FCOS``. ``docs/paper.md`` lists both, each with
the function and the test.

Symbols: B images, N locations (of one level, or of all levels joined), M boxes, C classes, K
detections. Locations are x-major, see ``common.get_fpn_location_coords``. Boxes are XYXY in
pixels of the input tensor. A matched box is ``(x1, y1, x2, y2, class id)``, background is -1.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image, sigmoid_focal_loss

from common import (
    DetectorBackboneWithFPN,
    at_least_float32,
    check_images,
    check_threshold,
    check_training_batch,
    class_spec_nms,
    get_fpn_location_coords,
)
from eecs598.data import IGNORED
from eecs598.runtime import mean_over_processes

__all__ = [
    "ASSIGNMENTS",
    "BOX_LOSSES",
    "HEAD_NORMS",
    "QUALITY_TARGETS",
    "Candidates",
    "FCOS",
    "FCOSCandidates",
    "FCOSLoss",
    "FCOSPostProcessor",
    "FCOSPredictionNetwork",
    "LocationTargets",
    "NetworkOutputs",
    "fcos_apply_deltas_to_locations",
    "fcos_get_deltas_from_locations",
    "fcos_level_ranges",
    "fcos_make_centerness_targets",
    "fcos_match_locations_to_gt",
    "hello_one_stage_detector",
]

# For calls in evaluation mode without thresholds: those of the assignment's own evaluation.
DEFAULT_SCORE_THRESH = 0.4
DEFAULT_NMS_THRESH = 0.6

# Losses of decoded boxes are weighted by centerness, which is about 0.4 on average.
DECODED_BOX_WEIGHT = 2.0
IOU_EPS = 1e-7  # in square pixels, so that empty boxes do not divide by 0

HEAD_NORMS = ("none", "group", "group_box")  # see ``FCOSPredictionNetwork``
GROUP_NORM_GROUPS = 32

ASSIGNMENTS = ("size", "atss")  # of boxes to locations, see ``FCOSLoss``
ADAPTIVE_CANDIDATES = 9  # locations per level that ATSS considers for a box


def hello_one_stage_detector() -> None:
    """Tell the notebook that this module was imported."""
    print("Hello from one_stage_detector.py!")


# --------------------------------------------------------------------------------------------
# Head
# --------------------------------------------------------------------------------------------


class FCOSPredictionNetwork(nn.Module):
    """The head that all pyramid levels share (paper, section 3.1 and figure 2).

    Two stems of 3x3 convolutions with ReLU: one ends in the class logits, the other in the box
    deltas and the centerness logit.

    Args:
        num_classes: C.
        in_channels: channels of the pyramid levels.
        stem_channels: output channels of each stem convolution; an empty list gives no stem.
        box_stem_channels: likewise of the stem before the boxes, where it differs.
        norm: ``"none"``, or ``"group"`` for group norm (arXiv 1803.08494) after each stem
            convolution, as in the paper, or ``"group_box"`` after those before the boxes alone.
        scaled_levels: names of the levels whose deltas are multiplied with a learned scale of
            their own (paper, section 3.2, the ``s_i`` in ``exp(s_i x)``, here without ``exp``).
        dropout: part of the channels that are dropped before the class logits in training
            (arXiv 1411.4280, section 3.2: whole channels, since neighboring pixels are alike).

    Raises:
        ValueError: no class, or an unknown norm.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stem_channels: Sequence[int],
        *,
        box_stem_channels: Sequence[int] | None = None,
        norm: str = "none",
        scaled_levels: Iterable[str] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}; expected at least 1.")
        _check_choice("norm", norm, HEAD_NORMS)
        if box_stem_channels is None:
            box_stem_channels = stem_channels

        def stem(channels: Sequence[int], group_norm: bool) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i, o in itertools.pairwise((in_channels, *channels)):
                layers.append(nn.Conv2d(i, o, kernel_size=3, padding=1))
                if group_norm:
                    layers.append(nn.GroupNorm(math.gcd(GROUP_NORM_GROUPS, o), o))
                layers.append(nn.ReLU())
            return nn.Sequential(*layers)

        self.stem_cls = stem(stem_channels, group_norm=norm == "group")
        self.stem_box = stem(box_stem_channels, group_norm=norm != "none")
        self.dropout = nn.Dropout2d(dropout)
        class_channels = (in_channels, *stem_channels)[-1]
        box_channels = (in_channels, *box_stem_channels)[-1]
        self.pred_cls = nn.Conv2d(class_channels, num_classes, kernel_size=3, padding=1)
        self.pred_box = nn.Conv2d(box_channels, 4, kernel_size=3, padding=1)
        self.pred_ctr = nn.Conv2d(box_channels, 1, kernel_size=3, padding=1)
        self.scales = nn.ParameterDict({level: torch.tensor(1.0) for level in scaled_levels})

        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        # Every class starts at probability 0.01, so that the many background locations do not
        # dominate the first iterations (focal loss, arXiv 1708.02002, section 4.1).
        assert self.pred_cls.bias is not None
        nn.init.constant_(self.pred_cls.bias, -math.log(99))

    def forward(self, feats_per_fpn_level: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Predict at every location.

        Args:
            feats_per_fpn_level: ``(B, in_channels, H, W)`` of each level.

        Returns:
            Class logits, deltas and centerness logits: three dicts with, per level, tensors of
            shape ``(B, W * H, C)``, ``(B, W * H, 4)`` and ``(B, W * H, 1)``, x-major.
        """
        class_logits: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        centerness_logits: dict[str, Tensor] = {}
        for level, feats in feats_per_fpn_level.items():
            class_feats, box_feats = self.stem_cls(feats), self.stem_box(feats)
            class_logits[level] = _flatten_x_major(self.pred_cls(self.dropout(class_feats)))
            deltas[level] = _flatten_x_major(self.pred_box(box_feats))
            if level in self.scales:
                deltas[level] = deltas[level] * self.scales[level]
            centerness_logits[level] = _flatten_x_major(self.pred_ctr(box_feats))
        return [class_logits, deltas, centerness_logits]


def _flatten_x_major(feats: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, W * H, C), in the order of ``get_fpn_location_coords``.

    Flattening over (H, W) instead would pair each location with the prediction of its mirror
    image across the diagonal. Such a detector still trains, to half of the mAP.
    """
    return feats.permute(0, 3, 2, 1).flatten(1, 2)


class NetworkOutputs(NamedTuple):
    """What backbone, pyramid and head compute for a batch; each output is a dict of levels.

    Attributes:
        locations: ``(N, 2)`` image coordinates of each level, x-major.
        class_logits: ``(B, N, C)`` of each level.
        deltas: ``(B, N, 4)`` of each level: left, top, right, bottom in strides.
        centerness_logits: ``(B, N, 1)`` of each level.
    """

    locations: Mapping[str, Tensor]
    class_logits: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]
    centerness_logits: Mapping[str, Tensor]


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
    """Assign a ground-truth box or background to every location of one image.

    A location matches a box when it lies strictly inside (paper, section 3.1) and the box suits
    its level (section 3.2): the largest of the four distances to the box's sides lies strictly
    between 4 and 8 strides, without the lower bound on the finest level and without the upper
    bound on the coarsest. Of several matching boxes the one with the smallest area wins.

    Args:
        locations_per_fpn_level: ``(N, 2)`` of each level.
        strides_per_fpn_level: stride of each level.
        gt_boxes: ``(M, 5)`` boxes of one image with class ids; rows of -1 are padding. A class id
            of ``IGNORED`` (-2) marks a region to ignore.
        center_radius: a location also has to lie within this many strides of the center of the
            box, in x and in y (center sampling, paper, table 3). No limit unless given.

    Returns:
        Per level ``(N, 5)``: the matched box and its class id, background rows are -1. Locations
        strictly inside a region to ignore that match no box are background rows, too, with
        ``IGNORED`` for a class id.

    Raises:
        ValueError: boxes that are not ``(M, 5)``.
    """
    if gt_boxes.dim() != 2 or gt_boxes.shape[1] != 5:
        raise ValueError(
            f"gt_boxes have shape {tuple(gt_boxes.shape)}; expected (M, 5) for one image."
        )
    locations, strides = _join_levels(locations_per_fpn_level, strides_per_fpn_level)
    sizes = [len(level_locations) for level_locations in locations_per_fpn_level.values()]
    matched = _match_locations(
        locations, strides, sizes, strides_per_fpn_level.values(), gt_boxes[None], center_radius
    )
    return dict(zip(locations_per_fpn_level, matched[0].split(sizes), strict=True))


def fcos_level_ranges(
    strides_per_fpn_level: Mapping[str, int],
) -> dict[str, tuple[float, float]]:
    """Return the size range of each level, as ``fcos_match_locations_to_gt`` applies it.

    These are ``m_{i-1}`` and ``m_i`` of the paper's section 3.2, here multiples of the stride.

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
    level_sizes: Sequence[int],
    all_strides: Iterable[int],
    gt_boxes: Tensor,
    center_radius: float | None,
    assignment: str = "size",
) -> Tensor:
    """Match as ``fcos_match_locations_to_gt``, for a batch and all levels at once.

    Args:
        locations: ``(N, 2)`` of all levels joined.
        strides: ``(N, 1)``.
        level_sizes: number of locations of each level.
        all_strides: the strides of the whole pyramid, to know its finest and coarsest level.
        gt_boxes: ``(B, M, 5)``.
        center_radius: in strides, or None.
        assignment: see ``FCOSLoss``.

    Returns:
        ``(B, N, 5)``.
    """
    batch_size, num_boxes, _ = gt_boxes.shape
    if num_boxes == 0:
        return gt_boxes.new_full((batch_size, len(locations), 5), -1.0)
    distances = _distances(locations[:, None], gt_boxes[:, None])  # (B, N, M, 4)
    inside = distances.amin(dim=-1) > 0  # (B, N, M)
    classes = gt_boxes[:, None, :, 4]  # (B, 1, M)
    matches = inside & (classes >= 0)  # padding matches nothing
    # left - right is twice the distance to the center in x, top - bottom in y.
    from_center = 0.5 * (distances[..., :2] - distances[..., 2:]).abs()  # (B, N, M, 2)
    if center_radius is not None:
        matches &= from_center.amax(dim=-1) < center_radius * strides  # (B, N, M) < (N, 1)
    if assignment == "size":
        finest, coarsest = min(all_strides), max(all_strides)
        lower = (4 * strides).masked_fill(strides == finest, 0)  # (N, 1)
        upper = (8 * strides).masked_fill(strides == coarsest, math.inf)
        largest = distances.amax(dim=-1)  # (B, N, M)
        matches &= (largest > lower) & (largest < upper)
        sides = gt_boxes[..., 2:4] - gt_boxes[..., :2]
        cost = sides.prod(dim=-1)[:, None]  # (B, 1, M): the smallest box wins
    else:
        overlaps = _overlaps_with_anchors(distances, strides)  # (B, N, M)
        matches &= _adaptive_candidates(overlaps, from_center, level_sizes)
        cost = -overlaps  # the box that fits best wins

    cost = torch.where(matches, cost, math.inf)  # (B, N, M)
    lowest, index = cost.min(dim=-1)  # (B, N)
    matched = gt_boxes.gather(1, index[..., None].expand(-1, -1, 5))  # (B, N, 5)
    background = lowest == math.inf
    matched = matched.masked_fill(background[..., None], -1.0)
    # On every level, since a detection of any level may be of the ignored object.
    ignored = background & (inside & (classes == IGNORED)).any(dim=-1)  # (B, N)
    matched[..., 4].masked_fill_(ignored, IGNORED)
    return matched


def _overlaps_with_anchors(distances: Tensor, strides: Tensor) -> Tensor:
    """Compute the IoU of boxes with a square of eight strides around each location.

    Args:
        distances: ``(B, N, M, 4)`` from the locations to the sides of the boxes.
        strides: ``(N, 1)``.

    Returns:
        ``(B, N, M)``.
    """
    half = 4 * strides[..., None]  # (N, 1, 1)
    shared = torch.minimum(distances, half)
    shared = (shared[..., :2] + shared[..., 2:]).clamp(min=0).prod(dim=-1)
    areas = (distances[..., :2] + distances[..., 2:]).prod(dim=-1)
    return shared / (areas + (2 * half[..., 0]) ** 2 - shared)


def _adaptive_candidates(
    overlaps: Tensor, from_center: Tensor, level_sizes: Sequence[int]
) -> Tensor:
    """Select locations for each box by the statistics of its surroundings.

    ATSS (arXiv 1912.02424, algorithm 1): of each level the nine locations nearest to the center
    of the box are candidates. Those whose anchor overlaps the box by at least the mean plus the
    standard deviation of all its candidates remain.

    Args:
        overlaps: ``(B, N, M)``, IoU of the box with the location's anchor.
        from_center: ``(B, N, M, 2)``, distance of the location to the center of the box.
        level_sizes: number of locations of each level.

    Returns:
        ``(B, N, M)``.
    """
    squared = from_center.square().sum(dim=-1)
    candidates = torch.zeros_like(overlaps, dtype=torch.bool)
    first = 0
    for size in level_sizes:
        nearest = squared[:, first : first + size].topk(
            min(ADAPTIVE_CANDIDATES, size), dim=1, largest=False
        )
        candidates.scatter_(1, first + nearest.indices, True)
        first += size
    count = sum(min(ADAPTIVE_CANDIDATES, size) for size in level_sizes)
    mean = (overlaps * candidates).sum(dim=1, keepdim=True) / count  # (B, 1, M)
    variance = ((overlaps - mean).square() * candidates).sum(dim=1, keepdim=True) / (count - 1)
    return candidates & (overlaps >= mean + variance.sqrt())


def fcos_get_deltas_from_locations(
    locations: Tensor, gt_boxes: Tensor, stride: float | Tensor
) -> Tensor:
    """Compute distances from locations to the sides of their boxes (paper, equation 1).

    They are counted in strides ("normalization" in the paper's table 3).

    Args:
        locations: ``(N, 2)``.
        gt_boxes: ``(N, 4)`` boxes, or ``(N, 5)`` boxes with class ids; background rows are -1.
            Leading batch dimensions are allowed.
        stride: of the level, or ``(N, 1)`` where locations of several levels are joined.

    Returns:
        ``(N, 4)``: left, top, right, bottom; background rows are -1.

    Raises:
        ValueError: other shapes.
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
    """Compute boxes from locations and distances, the inverse of equation 1.

    Negative deltas count as 0, so that the location stays inside its box; the box of a background
    row is the location itself.

    Args:
        deltas: ``(N, 4)`` left, top, right, bottom in strides. Leading batch dimensions are
            allowed.
        locations: ``(N, 2)``.
        stride: of the level, or ``(N, 1)`` where locations of several levels are joined.

    Returns:
        ``(N, 4)`` boxes in pixels.

    Raises:
        ValueError: other shapes.
    """
    if deltas.shape[-1] != 4 or locations.shape[-1] != 2:
        raise ValueError(
            f"deltas have shape {tuple(deltas.shape)} and locations {tuple(locations.shape)}; "
            "expected (N, 4) and (N, 2)."
        )
    offsets = deltas.clamp(min=0) * stride
    return torch.cat([locations - offsets[..., :2], locations + offsets[..., 2:]], dim=-1)


def fcos_make_centerness_targets(deltas: Tensor) -> Tensor:
    """Compute the centerness of locations inside their boxes (paper, section 3.3, equation 3).

    It is ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``.

    Args:
        deltas: ``(N, 4)`` left, top, right, bottom, in any unit; background rows are -1. Leading
            batch dimensions are allowed.

    Returns:
        ``(N,)``: 1 at the center of the box, 0 on its sides, -1 for background.

    Raises:
        ValueError: another shape.
    """
    if deltas.shape[-1] != 4:
        raise ValueError(f"deltas have shape {tuple(deltas.shape)}; expected (N, 4).")
    left, top, right, bottom = deltas.unbind(dim=-1)
    nearer = torch.minimum(left, right) * torch.minimum(top, bottom)
    farther = torch.maximum(left, right) * torch.maximum(top, bottom)
    background = (deltas < 0).any(dim=-1)
    return (nearer / farther).masked_fill(background, 1.0).sqrt().masked_fill(background, -1.0)


def _distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """Compute l*, t*, r*, b* of equation 1 in pixels: (..., 2), (..., 4 or 5) -> (..., 4)."""
    return torch.cat([locations - boxes[..., :2], boxes[..., 2:4] - locations], dim=-1)


def _join_levels(
    locations_per_fpn_level: Mapping[str, Tensor], strides_per_fpn_level: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """Join the locations of all levels, (N, 2), and return the stride of each, (N, 1)."""
    strides = [
        # Not len(locations): an export would take that for a constant.
        locations.new_full((locations.shape[0], 1), strides_per_fpn_level[level])
        for level, locations in locations_per_fpn_level.items()
    ]
    return torch.cat(list(locations_per_fpn_level.values())), torch.cat(strides)


class LocationTargets(NamedTuple):
    """What every location of a batch should predict, all levels joined; background is -1.

    Attributes:
        locations: ``(N, 2)``.
        strides: ``(N, 1)``, of the location's level.
        boxes: ``(B, N, 5)``: the matched box and its class id, ``B_i`` and ``c*`` of the paper. A
            class id of ``IGNORED`` marks background that gets no loss.
        deltas: ``(B, N, 4)``: ``t*``, equation 1, in strides.
        centerness: ``(B, N)``: equation 3.
    """

    locations: Tensor
    strides: Tensor
    boxes: Tensor
    deltas: Tensor
    centerness: Tensor


# --------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------


def l1_box_loss(deltas: Tensor, targets: LocationTargets) -> Tensor:
    """Return the L1 distance of the deltas ``(B, N, 4)``, the assignment's loss, per side."""
    return 0.25 * F.l1_loss(deltas, targets.deltas, reduction="none")  # mean over the four sides


def giou_box_loss(deltas: Tensor, targets: LocationTargets) -> Tensor:
    """Return 1 - GIoU of the decoded boxes, ``(B, N, 1)`` (arXiv 1902.09630, algorithm 2)."""
    return _decoded_box_loss(_giou, deltas, targets)


def diou_box_loss(deltas: Tensor, targets: LocationTargets) -> Tensor:
    """Return 1 - DIoU of the decoded boxes, ``(B, N, 1)`` (arXiv 1911.08287, equation 7)."""
    return _decoded_box_loss(_diou, deltas, targets)


def _decoded_box_loss(
    overlap: Callable[[Tensor, Tensor], Tensor], deltas: Tensor, targets: LocationTargets
) -> Tensor:
    """Compute the loss 1 - overlap of two boxes, weighted by the centerness targets.

    So locations near the center of an object, whose boxes rank first in the end, count most.
    """
    boxes = fcos_apply_deltas_to_locations(deltas, targets.locations, targets.strides)
    overlaps = overlap(boxes, targets.boxes[..., :4])  # (B, N)
    return (DECODED_BOX_WEIGHT * targets.centerness * (1 - overlaps))[..., None]


# GIoU and DIoU have the values and gradients of those in ``torchvision.ops``. There, the pairs
# that overlap are picked by a mask, and a training step waits for the GPU to know their number.


def _giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the GIoU of pairs of boxes: two of (..., 4) -> (...)."""
    intersection, union = _intersection_and_union(boxes, others)
    width, height = _enclosing_sides(boxes, others)
    enclosing = width * height
    return intersection / (union + IOU_EPS) - (enclosing - union) / (enclosing + IOU_EPS)


def _diou(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the DIoU of pairs of boxes: two of (..., 4) -> (...)."""
    intersection, union = _intersection_and_union(boxes, others)
    width, height = _enclosing_sides(boxes, others)
    diagonal = width**2 + height**2 + IOU_EPS
    between = (boxes[..., :2] + boxes[..., 2:] - others[..., :2] - others[..., 2:]) / 2
    return intersection / (union + IOU_EPS) - between.square().sum(dim=-1) / diagonal


def _intersection_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    other_x1, other_y1, other_x2, other_y2 = others.unbind(dim=-1)
    width = torch.minimum(x2, other_x2) - torch.maximum(x1, other_x1)
    height = torch.minimum(y2, other_y2) - torch.maximum(y1, other_y1)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    areas = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1)
    return intersection, areas - intersection


def _enclosing_sides(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return width and height of the smallest box around each pair."""
    upper_left = torch.minimum(boxes[..., :2], others[..., :2])
    width, height = (torch.maximum(boxes[..., 2:], others[..., 2:]) - upper_left).unbind(dim=-1)
    return width, height


# Every choice for ``FCOS(box_loss=...)``. A function takes the predicted deltas (B, N, 4) and the
# targets, and returns the loss of every location, (B, N, 4) or (B, N, 1). The loss of background
# locations is masked afterwards; only its gradient has to be finite there. ``fcos train`` offers a
# loss once its name is in ``ModelSettings.box_loss`` of eecs598/training/settings.py.
BOX_LOSSES: dict[str, Callable[[Tensor, LocationTargets], Tensor]] = {
    "l1": l1_box_loss,
    "giou": giou_box_loss,
    "diou": diou_box_loss,
}


def centerness_quality(_deltas: Tensor, targets: LocationTargets) -> Tensor:
    """Return the centerness of the locations, ``(B, N)``: the assignment's target."""
    return targets.centerness


def iou_quality(deltas: Tensor, targets: LocationTargets) -> Tensor:
    """Return the IoU of each predicted box with its matched box, ``(B, N)``.

    Centerness says how well a location is placed, this how well its box fits (arXiv 1912.05992,
    section 3.2). It passes no gradient to the boxes.
    """
    boxes = fcos_apply_deltas_to_locations(deltas.detach(), targets.locations, targets.strides)
    intersection, union = _intersection_and_union(boxes, targets.boxes[..., :4])
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


# Every choice for ``FCOS(quality=...)``: what the logit beside the boxes learns, and what the
# class probability is multiplied with in a score. A function takes the predicted deltas
# (B, N, 4) and the targets, and returns a value in [0, 1] for each location that is not background.
QUALITY_TARGETS: dict[str, Callable[[Tensor, LocationTargets], Tensor]] = {
    "centerness": centerness_quality,
    "iou": iou_quality,
}


@dataclass(frozen=True)
class FCOSLoss:
    """The training loss (paper, equation 2): from network outputs and boxes to three losses.

    Classes have the focal loss at every location (arXiv 1708.02002, equation 5, with alpha 0.25
    and gamma 2), boxes a loss of ``BOX_LOSSES`` and centerness binary cross entropy (section 3.3)
    at foreground locations. Background locations in a region to ignore have no loss at all. Where
    equation 2 divides by the number of foreground locations in the batch, the assignment divides by
    a moving average of it. All losses have weight 1.

    Args:
        strides: stride of each level.
        box_loss: a name in ``BOX_LOSSES``.
        center_radius: see ``fcos_match_locations_to_gt``.
        quality: a name in ``QUALITY_TARGETS``, of what is learned in place of centerness.
        assignment: ``"size"``, as ``fcos_match_locations_to_gt``, or ``"atss"``: instead of by the
            size of a box, its level and locations are chosen by their overlap with it (adaptive
            training sample selection, arXiv 1912.02424, algorithm 1).

    Raises:
        ValueError: an unknown loss, quality or assignment, or a radius that is not positive.
    """

    strides: Mapping[str, int]
    box_loss: str = "l1"
    center_radius: float | None = None
    quality: str = "centerness"
    assignment: str = "size"

    def __post_init__(self) -> None:
        _check_choice("box_loss", self.box_loss, BOX_LOSSES)
        _check_choice("quality", self.quality, QUALITY_TARGETS)
        _check_choice("assignment", self.assignment, ASSIGNMENTS)
        if self.center_radius is not None and not self.center_radius > 0:
            raise ValueError(
                f"center_radius={self.center_radius}; expected a positive number or None."
            )

    def __call__(
        self, outputs: NetworkOutputs, gt_boxes: Tensor, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            outputs: of ``FCOS.network_outputs``.
            gt_boxes: ``(B, M, 5)``, rows of -1 are padding, class ids of ``IGNORED`` mark regions
                to ignore.
            normalizer: scalar, the moving average of foreground locations per image. It is updated
                in place, as ``F.batch_norm`` does with its running statistics.

        Returns:
            ``{"loss_cls", "loss_box", "loss_ctr"}``, scalars in float32 or better.
        """
        class_logits = _join_predictions(outputs.class_logits)  # (B, N, C)
        deltas = _join_predictions(outputs.deltas)  # (B, N, 4)
        centerness_logits = _join_predictions(outputs.centerness_logits).squeeze(-1)  # (B, N)
        targets = self.make_targets(outputs.locations, gt_boxes)
        classes = torch.arange(class_logits.shape[-1], device=class_logits.device)
        target_classes = (targets.boxes[..., 4:] == classes).to(class_logits)  # (B, N, C), one-hot
        background = targets.boxes[..., 4] < 0  # (B, N)
        ignored = targets.boxes[..., 4:] == IGNORED  # (B, N, 1)

        loss_cls = sigmoid_focal_loss(class_logits, target_classes, alpha=0.25, gamma=2.0)
        loss_cls = loss_cls.masked_fill(ignored, 0.0)
        loss_box = BOX_LOSSES[self.box_loss](deltas, targets)  # (B, N, 4) or (B, N, 1)
        quality = QUALITY_TARGETS[self.quality](deltas, targets)  # (B, N)
        loss_ctr = F.binary_cross_entropy_with_logits(centerness_logits, quality, reduction="none")
        loss_box = loss_box.masked_fill(background[..., None], 0.0)
        loss_ctr = loss_ctr.masked_fill(background, 0.0)

        batch_size = len(gt_boxes)
        with torch.no_grad():
            foreground_per_image = mean_over_processes((~background).sum() / batch_size)
            normalizer.mul_(0.9).add_(0.1 * foreground_per_image)
        # Data with hardly any object would let the average, and with it the divisor, fade to 0.
        divisor = normalizer.clamp(min=1.0) * batch_size
        return {
            "loss_cls": loss_cls.sum() / divisor,
            "loss_box": loss_box.sum() / divisor,
            "loss_ctr": loss_ctr.sum() / divisor,
        }

    def make_targets(
        self, locations_per_fpn_level: Mapping[str, Tensor], gt_boxes: Tensor
    ) -> LocationTargets:
        """Match the locations of all levels to the boxes ``(B, M, 5)`` of a batch."""
        locations, strides = _join_levels(locations_per_fpn_level, self.strides)
        gt_boxes = gt_boxes.to(locations)
        matched = _match_locations(
            locations,
            strides,
            [len(level_locations) for level_locations in locations_per_fpn_level.values()],
            self.strides.values(),
            gt_boxes,
            self.center_radius,
            self.assignment,
        )  # (B, N, 5)
        deltas = fcos_get_deltas_from_locations(locations, matched, strides)  # (B, N, 4)
        centerness = fcos_make_centerness_targets(deltas)  # (B, N)
        return LocationTargets(locations, strides, matched, deltas, centerness)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        expected = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}={value!r}; expected {expected}.")


# --------------------------------------------------------------------------------------------
# Post-processing
# --------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """What every location of a batch detects, before thresholds and NMS; all levels joined.

    N is the number of locations times that of classes per location.

    Attributes:
        boxes: ``(B, N, 4)`` in pixels.
        labels: ``(B, N)``, class ids.
        scores: ``(B, N)``.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class FCOSPostProcessor:
    """From network outputs to detections: scores, boxes, non-maximum suppression.

    A location detects its most probable classes, each with the score sqrt(class probability *
    centerness). The assignment takes one class per location. The paper multiplies without the
    root and takes every class above a threshold (section 3.3 and its code).

    Args:
        strides: stride of each level.
        classes_per_location: number of classes; at most all of them are taken.

    Raises:
        ValueError: not even one class per location.
    """

    strides: Mapping[str, int]
    classes_per_location: int = 1

    def __post_init__(self) -> None:
        """Check the number of classes."""
        if self.classes_per_location < 1:
            raise ValueError(
                f"classes_per_location={self.classes_per_location}; expected at least 1."
            )

    def __call__(
        self,
        outputs: NetworkOutputs,
        image_size: Sequence[int],
        score_thresh: float,
        nms_thresh: float,
    ) -> list[dict[str, Tensor]]:
        """Compute the detections of a batch. The outputs stay as they are.

        Args:
            outputs: of ``FCOS.network_outputs``.
            image_size: ``(H, W)`` in pixels, to which boxes are clipped.
            score_thresh: detections score above it.
            nms_thresh: IoU above which the lower of two detections of a class is dropped.

        Returns:
            Per image ``{"boxes": (K, 4), "labels": (K,), "scores": (K,)}`` by decreasing score.

        Raises:
            ValueError: a threshold outside [0, 1].
        """
        return self.select(self.decode(outputs, image_size), score_thresh, nms_thresh)

    def decode(self, outputs: NetworkOutputs, image_size: Sequence[int]) -> Candidates:
        """Compute what each location detects, before thresholds and NMS.

        Args:
            outputs: of ``FCOS.network_outputs``.
            image_size: ``(H, W)`` in pixels, to which boxes are clipped.
        """
        locations, strides = _join_levels(outputs.locations, self.strides)
        all_class_probs = _join_predictions(outputs.class_logits).sigmoid()  # (B, N, C)
        count = min(self.classes_per_location, all_class_probs.shape[-1])
        if count == 1:
            class_probs, labels = all_class_probs.max(dim=-1, keepdim=True)  # (B, N, 1)
        else:
            class_probs, labels = all_class_probs.topk(count, dim=-1)  # (B, N, count)
        centerness = _join_predictions(outputs.centerness_logits).sigmoid()  # (B, N, 1)
        scores = (class_probs * centerness).sqrt()  # (B, N, count)
        deltas = _join_predictions(outputs.deltas)
        boxes = fcos_apply_deltas_to_locations(deltas, locations, strides)  # (B, N, 4)
        boxes = clip_boxes_to_image(boxes, image_size)
        if count > 1:
            boxes = boxes.repeat_interleave(count, dim=1)
        return Candidates(boxes, labels.flatten(1), scores.flatten(1))

    @staticmethod
    def select(
        candidates: Candidates, score_thresh: float, nms_thresh: float
    ) -> list[dict[str, Tensor]]:
        """Apply the score threshold and NMS; arguments and result as in a call."""
        check_threshold("score threshold", score_thresh)
        check_threshold("NMS threshold", nms_thresh)
        boxes, labels, scores = candidates
        batch_size = len(boxes)
        # On a GPU every look at values waits for it, so the confident locations are found once.
        image_ids, index = (scores > score_thresh).nonzero(as_tuple=True)  # (K,)
        boxes, labels, scores = (each[image_ids, index] for each in (boxes, labels, scores))
        # One NMS for all images, in which each class of each image is a class of its own.
        kept = class_spec_nms(boxes, scores, labels * batch_size + image_ids, nms_thresh)
        kept = kept[image_ids[kept].argsort(stable=True)]  # image by image, each by its scores
        counts = image_ids[kept].bincount(minlength=batch_size).tolist()
        detections = []
        for own in kept.split(counts):
            detections.append({"boxes": boxes[own], "labels": labels[own], "scores": scores[own]})
        return detections


def _join_predictions(predictions_per_level: Mapping[str, Tensor]) -> Tensor:
    """Join (B, N, ...) of all levels, in float32 or better whatever the network ran in."""
    return at_least_float32(torch.cat(list(predictions_per_level.values()), dim=1))


# --------------------------------------------------------------------------------------------
# Detector
# --------------------------------------------------------------------------------------------


class FCOS(nn.Module):
    """The one-stage detector: network, then loss or post-processing.

    In training mode a call returns the losses, in evaluation mode the detections of one image;
    ``predict`` takes a batch. It fulfills ``common.Detector``.

    Args:
        num_classes: C, without background.
        fpn_channels: channels of the pyramid levels.
        stem_channels: output channels of the head's stem convolutions.
        box_stem_channels: see ``FCOSPredictionNetwork``.
        backbone: see ``DetectorBackboneWithFPN``.
        weights: see ``DetectorBackboneWithFPN``.
        box_loss: ``"l1"`` on the deltas, or ``"giou"`` on the decoded boxes; ``BOX_LOSSES`` has
            all choices.
        quality: ``"centerness"``, or ``"iou"`` of the predicted box; ``QUALITY_TARGETS`` has all
            choices.
        assignment: see ``FCOSLoss``.
        center_radius: see ``fcos_match_locations_to_gt``.
        head_norm: likewise.
        head_dropout: likewise.
        level_scales: learn a scale of the deltas for each level.
        frozen_batch_norm: keep the running statistics of the backbone's batch norms in training,
            which batches of few images would only disturb.
        drop_path_rate: see ``DetectorBackboneWithFPN``.
        classes_per_location: of which ``predict`` makes detections, see ``FCOSPostProcessor``.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> detector = FCOS(
        ...     3, fpn_channels=16, stem_channels=[16], weights=None
        ... )  # doctest: +ELLIPSIS
        For dummy input images with shape: ...
        >>> images = torch.rand(2, 3, 64, 96)
        >>> gt_boxes = torch.full((2, 4, 5), -1.0)  # padded to 4 boxes per image
        >>> gt_boxes[0, 0] = torch.tensor([10.0, 20.0, 50.0, 60.0, 2.0])
        >>> sorted(detector(images, gt_boxes))
        ['loss_box', 'loss_cls', 'loss_ctr']
        >>> boxes, classes, scores = detector.eval()(images[:1], test_score_thresh=0.05)
        >>> [sorted(found) for found in detector.predict(images)]
        [['boxes', 'labels', 'scores'], ['boxes', 'labels', 'scores']]
    """

    # ``a4_helper.train_detector`` leaves the batches on the CPU to ``forward``.
    checks_batches = True

    loss_normalizer: Tensor

    def __init__(
        self,
        num_classes: int,
        fpn_channels: int,
        stem_channels: Sequence[int],
        *,
        box_stem_channels: Sequence[int] | None = None,
        backbone: str = "regnet_x_400mf",
        weights: str | os.PathLike | None = "DEFAULT",
        box_loss: str = "l1",
        quality: str = "centerness",
        assignment: str = "size",
        center_radius: float | None = None,
        head_norm: str = "none",
        head_dropout: float = 0.0,
        level_scales: bool = False,
        frozen_batch_norm: bool = False,
        drop_path_rate: float = 0.0,
        classes_per_location: int = 1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.frozen_batch_norm = frozen_batch_norm
        self.backbone = DetectorBackboneWithFPN(
            fpn_channels, backbone=backbone, weights=weights, drop_path_rate=drop_path_rate
        )
        strides = self.backbone.fpn_strides
        self.pred_net = FCOSPredictionNetwork(
            num_classes,
            fpn_channels,
            stem_channels,
            box_stem_channels=box_stem_channels,
            norm=head_norm,
            scaled_levels=strides if level_scales else (),
            dropout=head_dropout,
        )
        self.criterion = FCOSLoss(strides, box_loss, center_radius, quality, assignment)
        self.post_processor = FCOSPostProcessor(strides, classes_per_location)
        # Moving average of the foreground locations per image. A buffer, because like the
        # statistics of batch norm it belongs to the state of a training run.
        self.register_buffer("loss_normalizer", torch.tensor(150.0))
        self.class_names: list[str] | None = None  # those of ``from_pretrained``
        self._compiled_network: Callable[[Tensor], NetworkOutputs] | None = None
        self._compiled_prediction: Callable[[Tensor], NetworkOutputs] | None = None
        self.train()  # with frozen batch norms, frozen from the start

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike[str] = "voc2007") -> FCOS:
        """Load a trained detector, on the CPU and in evaluation mode; nothing is downloaded.

        Its images are normalized as ``eecs598.data.normalize`` does it.

        Args:
            checkpoint: name of a detector that comes along, a .safetensors file of such a
                detector, or a checkpoint of ``fcos train``.

        Returns:
            The detector, whose ``class_names`` are set.

        Raises:
            ValueError: no such name or file, or a file that holds no detector of this kind.
        """
        from eecs598.deploy import read_checkpoint  # whose drawing few users of FCOS need
        from eecs598.training import Settings

        content = read_checkpoint(checkpoint)
        if content["settings"] is None:
            raise ValueError(
                f"{checkpoint} has no settings, as a plain state dict; build FCOS with those of "
                "its training and call load_state_dict."
            )
        settings = Settings.from_dict(content["settings"]).model
        detector = cls(len(content["classes"]), **{**settings.kwargs(), "weights": None})
        detector.load_state_dict(content["model"])
        detector.class_names = list(content["classes"])
        return detector.to(memory_format=torch.channels_last).eval()

    def train(self, mode: bool = True) -> FCOS:
        """Switch between training and evaluation mode."""
        super().train(mode)
        if mode:
            self._compiled_prediction = None  # its weights are constants and about to change
        if self.frozen_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def __setstate__(self, state: dict[str, object]) -> None:
        """Make a copy the same as the original, for ``copy.deepcopy`` and ``pickle``."""
        super().__setstate__(state)
        # What was compiled is the original's network, with its weights.
        self._compiled_network = self._compiled_prediction = None
        self.train(self.training)  # torchvision's copies are in training mode

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the classification network, which may be pretrained."""
        return list(self.backbone.backbone.parameters())

    def compile_network(self, compile: bool = True) -> None:
        """Compile ``network_outputs`` for training; targets and losses stay as they are.

        Evaluation stays as it is, too: its images vary in size, and each size would be compiled.
        In training, each shape of a batch is compiled, which takes one to two minutes, up to
        PyTorch's limit of eight; batches of more shapes run as they do without.

        Args:
            compile: False undoes it.
        """
        # With dynamic shapes, compiling EfficientNet-Lite0 for a second size took more than six
        # minutes.
        self._compiled_network = (
            torch.compile(self.network_outputs, dynamic=False) if compile else None
        )

    def compile_prediction(self) -> None:
        """Compile ``network_outputs`` for ``predict`` on images of one size, as of a camera.

        The first prediction of each shape ``(B, 3, H, W)`` takes some 20 s more. The weights
        become constants: call it again after changing them. Going back to training undoes it.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("FCOS is in training mode; call eval() before compile_prediction().")
        self._compiled_prediction = torch.compile(
            self.network_outputs, dynamic=False, options={"freezing": True}
        )

    def network_outputs(self, images: Tensor) -> NetworkOutputs:
        """Run backbone, pyramid and head on images ``(B, 3, H, W)`` (paper, figure 2)."""
        feats = self.backbone(images)
        class_logits, deltas, centerness_logits = self.pred_net(feats)
        # In bfloat16, neighboring coordinates above 256 would become equal.
        dtype = torch.promote_types(images.dtype, torch.float32)
        locations = get_fpn_location_coords(
            {level: feat.shape for level, feat in feats.items()},
            self.backbone.fpn_strides,
            dtype=dtype,
            device=images.device,
        )
        return NetworkOutputs(locations, class_logits, deltas, centerness_logits)

    def forward(
        self,
        images: Tensor,
        gt_boxes: Tensor | None = None,
        test_score_thresh: float | None = None,
        test_nms_thresh: float | None = None,
    ) -> dict[str, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """Return the losses in training mode, the detections of one image in evaluation mode.

        Args:
            images: ``(B, 3, H, W)``; in evaluation B is 1.
            gt_boxes: ``(B, M, 5)`` for training, rows of -1 are padding; class ids of ``IGNORED``
                (-2) mark regions that are not taught as background.
            test_score_thresh: detections score above it; 0.4 unless given.
            test_nms_thresh: IoU above which the lower of two detections of a class is dropped;
                0.6 unless given.

        Returns:
            Training: ``{"loss_cls", "loss_box", "loss_ctr"}``, scalars whose sum is to be
            minimized. Evaluation: boxes ``(K, 4)``, class ids ``(K,)`` and scores ``(K,)`` by
            decreasing score.

        Raises:
            ValueError: wrong shapes, pixels that are not finite, impossible boxes or classes,
                thresholds outside [0, 1]. A training batch on a GPU is not checked, since
                looking at values there would stall every step; ``a4_helper.train_detector``
                checks it before the transfer.
        """
        if self.training:
            if gt_boxes is None:
                raise ValueError(
                    "FCOS is in training mode and got no gt_boxes. Pass gt_boxes (B, M, 5) to "
                    "train, or call eval() on the detector first."
                )
            if images.device.type == "cpu":
                check_training_batch(images, gt_boxes, self.num_classes)
            network = self._compiled_network or self.network_outputs
            return self.criterion(network(images), gt_boxes, self.loss_normalizer)

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

        Raises:
            ValueError: training mode, a wrong shape, pixels that are not finite, thresholds
                outside [0, 1].
        """
        if self.training:
            raise ValueError("FCOS is in training mode; call eval() on it before predict().")
        check_images(images)
        network = self._compiled_prediction or self.network_outputs
        return self.post_processor(network(images), images.shape[-2:], score_thresh, nms_thresh)

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
        """Turn the network's outputs for one image into detections, as the assignment names it.

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
        outputs = NetworkOutputs(
            locations_per_fpn_level, pred_cls_logits, pred_boxreg_deltas, pred_ctr_logits
        )
        image_size = images.shape[-2:]
        found = self.post_processor(outputs, image_size, test_score_thresh, test_nms_thresh)[0]
        return found["boxes"], found["labels"], found["scores"]


class FCOSCandidates(nn.Module):
    """The part of FCOS that an export keeps as a network: from images to candidates.

    Args:
        detector: in evaluation mode.
    """

    def __init__(self, detector: FCOS) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Candidates:
        """Return what every location of images ``(B, 3, H, W)`` detects."""
        outputs = self.detector.network_outputs(images)
        return self.detector.post_processor.decode(outputs, images.shape[-2:])
