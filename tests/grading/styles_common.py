"""The pieces of ``styles.py`` that belong into common.py."""

from __future__ import annotations

IMPORTS = """
import math
from typing import Dict, List, Optional, Tuple
import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models import feature_extraction
from torchvision.ops import sigmoid_focal_loss
"""

HELLO_COMMON = 'def hello_common():\n    print("Hello from common.py!")\n'
BACKBONE_HEAD = """
class DetectorBackboneWithFPN(nn.Module):
    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        _cnn = torchvision.models.regnet_x_400mf(pretrained=True)
        self.backbone = feature_extraction.create_feature_extractor(
            _cnn,
            return_nodes={
                "trunk_output.block2": "c3",
                "trunk_output.block3": "c4",
                "trunk_output.block4": "c5",
            },
        )
        dummy_out = self.backbone(torch.randn(2, 3, 224, 224))
        sizes = {name: feat.shape[1] for name, feat in dummy_out.items()}
        self.fpn_params = nn.ModuleDict()
"""
STRIDES = """
    @property
    def fpn_strides(self):
        return {"p3": 8, "p4": 16, "p5": 32}
"""
BACKBONES = [
    BACKBONE_HEAD
    + """
        self.fpn_params["lat3"] = nn.Conv2d(sizes["c3"], out_channels, 1)
        self.fpn_params["lat4"] = nn.Conv2d(sizes["c4"], out_channels, 1)
        self.fpn_params["lat5"] = nn.Conv2d(sizes["c5"], out_channels, 1)
        self.fpn_params["out3"] = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.fpn_params["out4"] = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.fpn_params["out5"] = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
"""
    + STRIDES
    + """
    def forward(self, images):
        c = self.backbone(images)
        p = self.fpn_params
        s5 = p["lat5"](c["c5"])
        s4 = p["lat4"](c["c4"])
        s4 = s4 + F.interpolate(s5, s4.shape[2:], mode="nearest")
        s3 = p["lat3"](c["c3"])
        s3 = s3 + F.interpolate(s4, s3.shape[2:], mode="nearest")
        return {"p3": p["out3"](s3), "p4": p["out4"](s4), "p5": p["out5"](s5)}
""",
    BACKBONE_HEAD
    + """
        for level in range(3, 6):
            self.fpn_params.update({
                "inner%d" % level: nn.Conv2d(sizes["c%d" % level], out_channels, kernel_size=1),
                "layer%d" % level: nn.Conv2d(
                    out_channels, out_channels, kernel_size=3, padding="same"
                ),
            })
"""
    + STRIDES
    + """
    def forward(self, images):
        feats, above, pyramid = self.backbone(images), None, {}
        for level in (5, 4, 3):
            x = self.fpn_params["inner%d" % level](feats["c%d" % level])
            if above is not None:
                x = x.add(nn.functional.interpolate(above, size=tuple(x.size()[-2:])))
            pyramid["p%d" % level] = self.fpn_params["layer%d" % level](x)
            above = x
        return dict(sorted(pyramid.items()))
""",
    BACKBONE_HEAD
    + """
        self.fpn_params["lateral"] = nn.ModuleList(
            [nn.Conv2d(c, out_channels, 1) for c in sizes.values()]
        )
        self.fpn_params["output"] = nn.ModuleList(
            [nn.Conv2d(out_channels, out_channels, (3, 3), padding=(1, 1)) for _ in sizes]
        )
"""
    + STRIDES
    + """
    def forward(self, images):
        stages = list(self.backbone(images).values())
        maps = [conv(x) for conv, x in zip(self.fpn_params["lateral"], stages)]
        for i in (1, 0):
            h, w = maps[i].shape[-2:]
            up = maps[i + 1].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            maps[i] = maps[i] + up[:, :, :h, :w]
        outs = [conv(x) for conv, x in zip(self.fpn_params["output"], maps)]
        return {name: x for name, x in zip(("p3", "p4", "p5"), outs)}
""",
]

LOCATIONS = [
    """
def get_fpn_location_coords(
    shape_per_fpn_level, strides_per_fpn_level, dtype=torch.float32, device="cpu"
):
    coords = {}
    for name, shape in shape_per_fpn_level.items():
        s = strides_per_fpn_level[name]
        rows = []
        for j in range(shape[3]):
            for i in range(shape[2]):
                rows.append([s * (j + 0.5), s * (i + 0.5)])
        coords[name] = torch.tensor(rows, dtype=dtype, device=device)
    return coords
""",
    """
def get_fpn_location_coords(
    shape_per_fpn_level, strides_per_fpn_level, dtype=torch.float32, device="cpu"
):
    def grid(shape, stride):
        half = stride // 2
        x = torch.arange(half, shape[-1] * stride, stride, dtype=dtype, device=device)
        y = torch.arange(half, shape[-2] * stride, stride, dtype=dtype, device=device)
        return torch.cartesian_prod(x, y)

    return {k: grid(v, strides_per_fpn_level[k]) for k, v in shape_per_fpn_level.items()}
""",
    """
def get_fpn_location_coords(
    shape_per_fpn_level, strides_per_fpn_level, dtype=torch.float32, device="cpu"
):
    location_coords = {level_name: None for level_name in shape_per_fpn_level.keys()}
    for level_name, feat_shape in shape_per_fpn_level.items():
        _, _, h, w = feat_shape
        index = torch.arange(h * w, device=device)
        xy = torch.stack((torch.div(index, h, rounding_mode="floor"), index % h), dim=-1)
        location_coords[level_name] = (xy.to(dtype) + 0.5) * strides_per_fpn_level[level_name]
    return location_coords
""",
]

NMS = [
    """
def nms(boxes, scores, iou_threshold=0.5):
    if boxes.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes.device)
    left = scores.sort(descending=True)[1]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keep = []
    while left.numel():
        best = left[0].item()
        keep.append(best)
        left = left[1:]
        tl = torch.maximum(boxes[best, :2], boxes[left, :2])
        br = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        side = (br - tl).clamp(min=0)
        inter = side[:, 0] * side[:, 1]
        union = areas[best] + areas[left] - inter
        left = left[~(inter > iou_threshold * union)]
    return torch.tensor(keep, dtype=torch.int64, device=boxes.device)
""",
    """
def iou_with(box, others):
    w = np.clip(np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0]), 0, None)
    h = np.clip(np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1]), 0, None)
    both = w * h
    area = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    union = (box[2] - box[0]) * (box[3] - box[1]) + area - both
    return both / np.maximum(union, 1e-12)


def nms(boxes, scores, iou_threshold=0.5):
    b = boxes.detach().cpu().numpy()
    order = np.argsort(-scores.detach().cpu().numpy(), kind="stable")
    alive = np.ones(len(b), dtype=bool)
    keep = []
    for i in order:
        if not alive[i]:
            continue
        keep.append(int(i))
        alive &= iou_with(b[i], b) <= iou_threshold
        alive[i] = False
    return torch.as_tensor(keep, dtype=torch.long).to(boxes.device)
""",
    """
def nms(boxes, scores, iou_threshold=0.5):
    n = len(boxes)
    order = torch.argsort(scores, descending=True, stable=True)
    iou = torchvision.ops.box_iou(boxes[order], boxes[order])
    suppressed = torch.zeros(n, dtype=torch.bool, device=boxes.device)
    for i in range(n):
        if not suppressed[i]:
            suppressed[i + 1 :] |= iou[i, i + 1 :] > iou_threshold
    return order[~suppressed]
""",
]

CLASS_SPEC_NMS = [
    """
def class_spec_nms(boxes, scores, class_ids, iou_threshold=0.5):
    if boxes.numel() == 0:
        return torch.empty((0,), dtype=torch.int64, device=boxes.device)
    offsets = class_ids.to(boxes) * (boxes.max() + torch.tensor(1).to(boxes))
    return nms(boxes + offsets[:, None], scores, iou_threshold)
""",
    """
def class_spec_nms(boxes, scores, class_ids, iou_threshold=0.5):
    kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for c in class_ids.unique().tolist():
        mine = torch.where(class_ids == c)[0]
        kept[mine[nms(boxes[mine], scores[mine], iou_threshold)]] = True
    kept = kept.nonzero().flatten()
    return kept[scores[kept].argsort(descending=True)]
""",
    """
def class_spec_nms(boxes, scores, class_ids, iou_threshold=0.5):
    picked = [torch.zeros(0, dtype=torch.int64)]
    for c in set(class_ids.tolist()):
        index = (class_ids == c).nonzero(as_tuple=True)[0]
        picked.append(index[nms(boxes[index], scores[index], iou_threshold)])
    return torch.cat(picked)
""",
]
