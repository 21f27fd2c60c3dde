"""Parts that any detector on a feature pyramid shares: backbone, FPN, locations, NMS, checks.

``Detector`` says what a detector has to offer to be trained and evaluated by ``a4_helper``.

Symbols used throughout: B images, N locations, M boxes, C classes, K detections. Boxes are
``(x1, y1, x2, y2)`` in pixels of the image tensor they belong to.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.ops import StochasticDepth

from eecs598.data import IGNORED
from eecs598.training import find_state_dict, load_weights_file

if TYPE_CHECKING:
    from typing_extensions import Self  # part of typing from Python 3.11 on

__all__ = [
    "Detector",
    "DetectorBackboneWithFPN",
    "PretrainedWeightsWarning",
    "at_least_float32",
    "check_images",
    "check_threshold",
    "check_training_batch",
    "class_spec_nms",
    "get_fpn_location_coords",
    "hello_common",
    "nms",
]

# Feature maps that feed the pyramid, with the stride (image pixels per cell) of each.
STAGE_STRIDES = {"c3": 8, "c4": 16, "c5": 32}

# A server that accepts a connection and then stays silent must not block building a model.
DOWNLOAD_TIMEOUT_SECONDS = 30.0


def hello_common() -> None:
    """Tell the notebook that this module was imported."""
    print("Hello from common.py!")


# --------------------------------------------------------------------------------------------
# Interface of a detector
# --------------------------------------------------------------------------------------------


class Detector(Protocol):
    """What ``a4_helper`` trains and evaluates: an ``nn.Module`` that can be called in two ways.

    ``one_stage_detector.FCOS`` is one; a two-stage detector can be another. The methods below
    other than ``__call__`` are those of ``nn.Module``. More is optional, and a detector without
    any of it still trains and evaluates:

    - ``num_classes``, an int: ``train_detector`` checks every batch with ``check_training_batch``
      while it is in host memory. Without it, batches are not checked.
    - ``checks_batches = True``: the detector itself checks batches that reach it on the CPU, and
      ``train_detector`` checks only those that it moves to another device.
    - ``compile_network(compile)``: compiles the part whose shapes are the same in every training
      step. Without it, ``train_detector(compile=True)`` compiles the whole module.
    - ``backbone_parameters()``: the parameters whose learning rate ``backbone_lr_factor``
      multiplies. Only a factor other than 1 needs it.
    """

    training: bool

    @overload
    def __call__(self, images: Tensor, gt_boxes: Tensor, /) -> dict[str, Tensor]:
        """Return the losses in training mode.

        Args:
            images: ``(B, 3, H, W)``.
            gt_boxes: ``(B, M, 5)``: x1, y1, x2, y2, class id; rows of -1 are padding. Boxes with
                ``IGNORED`` (-2) for a class id should be taught neither as objects nor as
                background. There are none unless a training set is asked for them.

        Returns:
            Scalars by name; their sum is minimized.
        """

    @overload
    def __call__(
        self, images: Tensor, /, *, test_score_thresh: float, test_nms_thresh: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the detections of one image in evaluation mode.

        Args:
            images: ``(1, 3, H, W)``.
            test_score_thresh: detections score above it.
            test_nms_thresh: IoU above which the lower of two detections of a class is dropped.

        Returns:
            Boxes ``(K, 4)``, class ids ``(K,)`` and scores ``(K,)`` by decreasing score.
        """

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


# --------------------------------------------------------------------------------------------
# Backbone and feature pyramid
# --------------------------------------------------------------------------------------------


class PretrainedWeightsWarning(UserWarning):
    """Pretrained weights were requested but could not be loaded."""


class DetectorBackboneWithFPN(nn.Module):
    """A classification network and a feature pyramid on top of its last three stages.

    The pyramid follows Lin et al., "Feature Pyramid Networks for Object Detection"
    (arXiv 1612.03144), section 3 and figure 3: a 1x1 lateral convolution per stage,
    nearest-neighbor top-down upsampling and addition, a 3x3 output convolution per level.
    Building one prints the shapes of the three stages for an example input.

    Args:
        out_channels: channels of every pyramid level.
        backbone: name of a torchvision classification network that has stages of stride 8, 16
            and 32 (``"regnet_x_400mf"``, ``"resnet50"``, ``"regnet_x_3_2gf"``, ...), or
            ``"timm:NAME"`` for a network of the package timm.
        weights: ``"DEFAULT"`` for ImageNet weights, ``None`` for random weights, or the path of a
            state dict of the classification network. ImageNet weights come from the local cache
            or are downloaded; where neither is possible, the network starts from random weights
            with a ``PretrainedWeightsWarning``.
        drop_path_rate: stochastic depth (arXiv 1603.09382, equation 5): the probability that the
            last residual block is left out in a training step; those before it have less. For
            RegNets and networks of timm.

    Raises:
        ValueError: an unknown network, one without the three strides or, with
            ``drop_path_rate``, of another kind, or a weights file that is missing, unreadable or
            belongs to another network.

    Example:
        >>> model = DetectorBackboneWithFPN(64, weights=None)  # doctest: +ELLIPSIS
        For dummy input images with shape: ...
        >>> {name: tuple(feat.shape) for name, feat in model(torch.rand(1, 3, 64, 96)).items()}
        {'p3': (1, 64, 8, 12), 'p4': (1, 64, 4, 6), 'p5': (1, 64, 2, 3)}
    """

    def __init__(
        self,
        out_channels: int,
        *,
        backbone: str = "regnet_x_400mf",
        weights: str | os.PathLike | None = "DEFAULT",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.backbone = _build_backbone(backbone, weights, drop_path_rate)

        stage_shapes = _stage_shapes(self.backbone, torch.Size((2, 3, 224, 224)))
        print("For dummy input images with shape: (2, 3, 224, 224)")
        for stage, shape in stage_shapes.items():
            print(f"Shape of {stage} features: {tuple(shape)}")

        laterals = {
            f"lateral_{stage}": nn.Conv2d(shape[1], out_channels, kernel_size=1)
            for stage, shape in stage_shapes.items()
        }
        outputs = {
            f"output_p{stage[1:]}": nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
            for stage in stage_shapes
        }
        self.fpn_params = nn.ModuleDict({**laterals, **outputs})

    @property
    def fpn_strides(self) -> dict[str, int]:
        """Image pixels between neighboring locations, per pyramid level."""
        return {f"p{stage[1:]}": stride for stage, stride in STAGE_STRIDES.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the pyramid of a batch.

        Args:
            images: ``(B, 3, H, W)``; H and W are arbitrary.

        Returns:
            ``{"p3": (B, out_channels, ceil(H / 8), ceil(W / 8)), "p4": ..., "p5": ...}``.
        """
        features = self.backbone(images)
        pyramid: dict[str, Tensor] = {}
        top_down: Tensor | None = None
        for stage in reversed(STAGE_STRIDES):
            merged = self.fpn_params[f"lateral_{stage}"](features[stage])
            if top_down is not None:
                # To the size of the lateral, not by a factor of two: the sides of the image need
                # not be multiples of 32.
                merged = merged + F.interpolate(top_down, size=merged.shape[-2:], mode="nearest")
            top_down = merged
            level = f"p{stage[1:]}"
            pyramid[level] = self.fpn_params[f"output_{level}"](merged)
        return {level: pyramid[level] for level in self.fpn_strides}


def _build_backbone(
    name: str, weights: str | os.PathLike | None, drop_path_rate: float
) -> nn.Module:
    """Return a network that maps images to ``{"c3": ..., "c4": ..., "c5": ...}``."""
    build = _build_timm if name.startswith("timm:") else _build_torchvision
    if weights is None:
        return build(name, None, drop_path_rate)
    if weights != "DEFAULT":
        if not os.path.isfile(weights):
            raise ValueError(
                f"weights={str(weights)!r} is not a file. Pass the path of a state dict, "
                '"DEFAULT" for ImageNet weights, or None for random weights.'
            )
        return build(name, weights, drop_path_rate)

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        return build(name, "DEFAULT", drop_path_rate)
    # URLError, HTTPError and time-outs are OSErrors; an incomplete download fails the hash check
    # of torch.hub with a RuntimeError.
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"\n{'!' * 88}\n"
            f"NO PRETRAINED WEIGHTS for the backbone {name!r}: {error}\n"
            "The backbone starts from RANDOM weights. Everything runs, but after training on a few"
            "\nthousand photographs, expect less than half of the mAP of a pretrained backbone."
            "\nConnect to the network once, or pass weights=FILE; pass weights=None if you want"
            "\nrandom weights.\n"
            f"{'!' * 88}",
            PretrainedWeightsWarning,
            stacklevel=3,
        )
        return build(name, None, drop_path_rate)
    finally:
        socket.setdefaulttimeout(timeout)


def _build_torchvision(
    name: str, weights: str | os.PathLike | None, drop_path_rate: float
) -> nn.Module:
    """Cut the stages c3, c4, c5 out of a torchvision network. Weights as in ``_build_backbone``."""
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"backbone={name!r} is not a classification network of torchvision. Expected a name "
            'such as "regnet_x_400mf" or "resnet50" (torchvision.models.list_models() lists all), '
            'or "timm:NAME" for a network of timm.'
        )
    model = torchvision.models.get_model(name, weights="DEFAULT" if weights == "DEFAULT" else None)
    if weights not in (None, "DEFAULT"):
        _load_backbone_weights(model, weights, name)
    if drop_path_rate:
        _add_drop_path(model, drop_path_rate, name)
    stages = _find_stages(model, name)
    return create_feature_extractor(model, {module: stage for stage, module in stages.items()})


def _add_drop_path(model: nn.Module, rate: float, name: str) -> None:
    """Let the residual blocks of a RegNet be left out at random in training."""
    blocks = [module for module in model.modules() if isinstance(module, ResBottleneckBlock)]
    if not blocks:
        raise ValueError(
            f"drop_path_rate={rate} is for RegNets and networks of timm, and {name!r} is neither. "
            'Set it to 0, or choose a backbone such as "regnet_x_400mf" or "timm:NAME".'
        )
    for number, block in enumerate(blocks, start=1):
        # At the end of the residual branch. It has no weights, so state dicts stay the same.
        drop_path = StochasticDepth(rate * number / len(blocks), mode="row")
        block.f.add_module("drop_path", drop_path)


def _build_timm(name: str, weights: str | os.PathLike | None, drop_path_rate: float) -> nn.Module:
    """Cut the stages c3, c4, c5 out of a timm network. Weights as in ``_build_backbone``."""
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"backbone={name!r} needs the package timm, which is not installed. "
            "Install it with: pip install timm"
        ) from None
    name = name.removeprefix("timm:")
    if not timm.is_model(name):
        raise ValueError(
            f"timm has no network called {name!r}; timm.list_models() lists all of them."
        )
    # timm's own loader reads the file, because it drops the classifier and renames old keys.
    overlay = {"file": os.fspath(weights)} if weights not in (None, "DEFAULT") else None
    # Networks without residual blocks do not take the argument.
    options: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    try:
        model = timm.create_model(
            name,
            pretrained=weights is not None,
            features_only=True,
            pretrained_cfg_overlay=overlay,
            **options,
        )
    except (RuntimeError, AttributeError) as error:
        if overlay:
            raise ValueError(
                f"{str(weights)!r} does not hold weights of timm's {name!r}: {error}"
            ) from error
        raise
    feature_info: Any = model.feature_info
    reductions = feature_info.reduction()
    if not set(STAGE_STRIDES.values()) <= set(reductions):
        raise ValueError(_missing_strides(f"timm:{name}", reductions))
    return _NamedStages(model, [reductions.index(stride) for stride in STAGE_STRIDES.values()])


class _NamedStages(nn.Module):
    """Name three of the feature maps that a timm network returns as a list.

    Images are padded with zeros, at the right and at the bottom, to multiples of the coarsest
    stride, and the maps are cropped to ``ceil(side / stride)``. Otherwise networks with the "same"
    padding of TensorFlow, which depends on the parity of each side, would shift the maps, and with
    them all boxes, by up to half a stride per level on sizes other than those of training.

    Args:
        model: returns a list of feature maps.
        indices: of the stages c3, c4, c5 in this list.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.indices = indices
        _fix_same_padding(model)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        height, width = images.shape[-2:]
        coarsest = max(STAGE_STRIDES.values())
        bottom = _ceil_div(height, coarsest) * coarsest - height
        right = _ceil_div(width, coarsest) * coarsest - width
        features = self.model(F.pad(images, (0, right, 0, bottom)))
        return {
            stage: features[i][..., : _ceil_div(height, stride), : _ceil_div(width, stride)]
            for (stage, stride), i in zip(STAGE_STRIDES.items(), self.indices, strict=True)
        }


def _ceil_div(number: int, divisor: int) -> int:
    """Divide and round up, without negative numbers, whose rest ONNX defines otherwise."""
    return (number + divisor - 1) // divisor


class _FixedSameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, for sides that its stride divides.

    There the padding is a constant. timm computes it from the sides of every image, which neither
    ``torch.compile`` nor the export to ONNX can follow for images of any size.
    """

    same_padding: list[int]

    def forward(self, images: Tensor) -> Tensor:
        return self._conv_forward(F.pad(images, self.same_padding), self.weight, self.bias)


def _fix_same_padding(model: nn.Module) -> None:
    """Give the convolutions of a timm network whose padding depends on the image a constant one."""
    from timm.layers import Conv2dSame

    for module in model.modules():
        if isinstance(module, Conv2dSame):
            totals = [
                max(dilation * (kernel - 1) + 1 - stride, 0)
                for kernel, stride, dilation in zip(
                    module.kernel_size, module.stride, module.dilation, strict=True
                )
            ]
            height, width = totals
            # The class alone changes: names and values of the weights stay.
            module.__class__ = _FixedSameConv2d  # type: ignore[assignment]
            module.same_padding = [  # type: ignore[assignment]
                width // 2,
                width - width // 2,
                height // 2,
                height - height // 2,
            ]


def _load_backbone_weights(model: nn.Module, path: str | os.PathLike, name: str) -> None:
    """Load a state dict into the network ``name``; ValueError if it does not fit."""
    try:
        state = find_state_dict(load_weights_file(path))
        if state is None:
            raise ValueError("it holds something else than a state dict.")
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold a state dict of the network {name!r}: {error}"
        ) from error


def _find_stages(model: nn.Module, name: str) -> dict[str, str]:
    """Find the modules of a classification network that end the stages c3, c4 and c5.

    A stage ends at the last module whose output has the stage's stride. Modules nested deeper
    than others of the same stride are no candidates: the first convolution of a bottleneck still
    has the stride of the previous stage and would be chosen otherwise.

    Returns:
        ``{"c3": qualified module name, "c4": ..., "c5": ...}``.
    """
    side = 288  # a multiple of 32 at which the output of a 7x7 adaptive pooling is not stride 32
    best: dict[int, tuple[int, str]] = {}

    def record(module_name: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                return
            depth = module_name.count(".")
            for stride in STAGE_STRIDES.values():
                if output.shape[-2:] != (side // stride, side // stride):
                    continue
                if stride not in best or depth <= best[stride][0]:
                    best[stride] = (depth, module_name)

        return hook

    handles = [
        module.register_forward_hook(record(module_name))
        for module_name, module in model.named_modules()
        if module_name
    ]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError) as error:  # networks for a single input size
        raise ValueError(f"backbone={name!r} can't take images of any size: {error}") from error
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if len(best) < len(STAGE_STRIDES):
        raise ValueError(_missing_strides(name, sorted(best)))
    return {stage: best[stride][1] for stage, stride in STAGE_STRIDES.items()}


def _missing_strides(name: str, found: Sequence[int]) -> str:
    """Explain that a network lacks a stage."""
    return (
        f"backbone={name!r} has no feature maps of stride 8, 16 and 32 in (B, C, H, W) layout "
        f"(found strides {list(found)}). Choose a convolutional network that has them."
    )


@torch.no_grad()
def _stage_shapes(backbone: nn.Module, shape: torch.Size) -> dict[str, torch.Size]:
    """Return the shapes of c3, c4, c5 for an input shape; mode and batch norms stay as they are."""
    was_training = backbone.training
    reference = next(backbone.parameters())
    images = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
    features = backbone.eval()(images)
    backbone.train(was_training)
    return {stage: features[stage].shape for stage in STAGE_STRIDES}


# --------------------------------------------------------------------------------------------
# Locations
# --------------------------------------------------------------------------------------------


def get_fpn_location_coords(
    shape_per_fpn_level: Mapping[str, Sequence[int]],
    strides_per_fpn_level: Mapping[str, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Compute the image coordinates of the center of every feature-map cell.

    This is the mapping of FCOS, section 3.1. The order is x-major: all locations of the first
    column, then of the second, and so on, because the assignment's check of this function begins
    (4, 4), (4, 12), (4, 20). Every per-location tensor in this code has this order, so that
    location n and prediction n mean the same place
    (``one_stage_detector.FCOSPredictionNetwork`` flattens its maps alike).

    Args:
        shape_per_fpn_level: ``(B, channels, H, W)`` of each level's feature map.
        strides_per_fpn_level: image pixels per cell of each level.
        dtype: of the result.
        device: of the result.

    Returns:
        Per level ``(W * H, 2)`` coordinates ``(xc, yc)``: the center of the cell in row i and
        column j is ``(stride * (j + 0.5), stride * (i + 0.5))``.

    Raises:
        ValueError: a level without a stride, or a shape that is not of four dimensions.

    Example:
        >>> get_fpn_location_coords({"p3": (1, 64, 2, 3)}, {"p3": 8})["p3"].tolist()
        [[4.0, 4.0], [4.0, 12.0], [12.0, 4.0], [12.0, 12.0], [20.0, 4.0], [20.0, 12.0]]
    """
    locations: dict[str, Tensor] = {}
    for level, shape in shape_per_fpn_level.items():
        if level not in strides_per_fpn_level:
            raise ValueError(
                f"no stride was given for level {level!r}; strides are known for "
                f"{sorted(strides_per_fpn_level)}."
            )
        if len(shape) != 4:
            raise ValueError(
                f"the shape of level {level!r} is {tuple(shape)}; expected (B, channels, H, W)."
            )
        height, width = shape[-2:]
        stride = strides_per_fpn_level[level]
        x = stride * (torch.arange(width, dtype=dtype, device=device) + 0.5)
        y = stride * (torch.arange(height, dtype=dtype, device=device) + 0.5)
        grid = torch.meshgrid(x, y, indexing="ij")  # two of (W, H)
        locations[level] = torch.stack(grid, dim=-1).flatten(0, 1)  # (W * H, 2)
    return locations


# --------------------------------------------------------------------------------------------
# Non-maximum suppression
# --------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """Run greedy non-maximum suppression.

    Boxes are visited by decreasing score (equal scores in input order). Each box that is not
    suppressed yet is kept and suppresses every later box whose IoU with it is above the threshold.

    Args:
        boxes: ``(K, 4)`` XYXY with ``x1 <= x2`` and ``y1 <= y2``.
        scores: ``(K,)``.
        iou_threshold: in [0, 1].

    Returns:
        Indices of the kept boxes by decreasing score, int64, on the device of ``boxes``; the same
        as ``torchvision.ops.nms`` gives.

    Raises:
        ValueError: shapes that do not belong together, or a threshold outside [0, 1].

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1])).tolist()
        [1, 2]
    """
    _check_nms_inputs(boxes, scores, iou_threshold)
    return _greedy_nms(boxes, scores, None, iou_threshold)


def class_spec_nms(
    boxes: Tensor, scores: Tensor, class_ids: Tensor, iou_threshold: float = 0.5
) -> Tensor:
    """Run non-maximum suppression in which only boxes of the same class suppress each other.

    Class ids are compared directly. The usual trick, shifting each class to a region of its own
    and running plain NMS, rounds coordinates and so changes results where coordinates are large
    or of low precision.

    Args:
        boxes: ``(K, 4)`` XYXY.
        scores: ``(K,)``.
        class_ids: ``(K,)`` integers.
        iou_threshold: in [0, 1].

    Returns:
        Indices of the kept boxes of all classes by decreasing score, int64.

    Raises:
        ValueError: shapes that do not belong together, or a threshold outside [0, 1].

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 10, 10]])
        >>> class_spec_nms(boxes, torch.tensor([0.5, 0.9, 0.1]), torch.tensor([0, 0, 1])).tolist()
        [1, 2]
    """
    _check_nms_inputs(boxes, scores, iou_threshold)
    if class_ids.shape != scores.shape:
        raise ValueError(
            f"class_ids has shape {tuple(class_ids.shape)}; expected {tuple(scores.shape)}, one "
            "class for each score."
        )
    return _greedy_nms(boxes, scores, class_ids, iou_threshold)


# How many pairs of boxes are compared at a time: few enough to stay in the processor's cache.
_NMS_PAIRS = 2**17
_NMS_BLOCK = 192


def _greedy_nms(
    boxes: Tensor, scores: Tensor, class_ids: Tensor | None, iou_threshold: float
) -> Tensor:
    """Run greedy NMS, within each class if class ids are given.

    The boxes of each class are a row, sorted by score, and all rows are processed in parallel.
    """
    boxes = _zero_degenerate_boxes(at_least_float32(boxes))
    threshold = _round_down(iou_threshold, boxes.dtype)
    sides = F.pad(boxes, (0, 0, 0, 1)).T.contiguous()  # (4, K + 1): box K is empty
    by_score = scores.argsort(descending=True, stable=True)
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for rows in _rows_by_class(by_score, class_ids):
        keep[_nms_of_rows(rows, sides, threshold)] = True
    return by_score[keep[by_score]]


def _nms_of_rows(rows: Tensor, sides: Tensor, threshold: float) -> Tensor:
    """Run NMS within each row and return the indices of the kept boxes, in no particular order.

    Block by block: decide which of the best boxes are kept, then drop what they suppress.

    Args:
        rows: (C, n) indices of boxes by decreasing score, one row per class, padded with K, the
            index of an empty box, which overlaps nothing.
        sides: (4, K + 1).
        threshold: of the IoU.
    """
    padding = sides.shape[1] - 1
    block_size = min(_NMS_BLOCK, math.ceil(math.sqrt(_NMS_PAIRS / len(rows))))
    kept_indices = []
    while rows.numel() > 0:
        block, rest = rows[:, :block_size], rows[:, block_size:]
        kept = _nms_of_block(_gather_sides(sides, block), threshold) & (block != padding)
        kept_indices.append(block[kept])
        if rest.numel() == 0:
            break
        suppressors = _gather_sides(sides, _compact_rows(block, kept, padding))
        largest_iou = [
            _pairwise_iou(suppressors, _gather_sides(sides, part)).amax(dim=1)
            for part in rest.split(max(1, _NMS_PAIRS // suppressors[0].numel()), dim=1)
        ]
        suppressed = torch.cat(largest_iou, dim=1) > threshold
        rows = _compact_rows(rest, (rest != padding) & ~suppressed, padding)
    return torch.cat(kept_indices)


def _zero_degenerate_boxes(boxes: Tensor) -> Tensor:
    """Set boxes (K, 4) without a positive, finite area, which overlap nothing, to zero.

    Their IoU with a proper box could be NaN, which would hide that box's other overlaps in a
    maximum. The IoU of two zero boxes is still NaN, but NaN is not above any threshold.
    """
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    area = (x2 - x1) * (y2 - y1)
    proper = (x1 < x2) & (y1 < y2) & (area > 0) & (area < math.inf)
    return boxes.masked_fill(~proper[:, None], 0)


def _rows_by_class(by_score: Tensor, class_ids: Tensor | None) -> list[Tensor]:
    """Group the indices (K,) by class, in their order: a row per class, padded with K.

    Padding all classes to the length of the largest would waste work. So rows (C, n) are grouped
    such that their lengths differ by less than a factor of four.
    """
    if class_ids is None:
        return [by_score[None]] if len(by_score) else []
    sorted_ids, order = class_ids[by_score].sort(stable=True)
    counts = sorted_ids.unique_consecutive(return_counts=True)[1]
    rows = sorted(by_score[order].split(counts.tolist()), key=len)
    return [
        pad_sequence(list(group), batch_first=True, padding_value=len(by_score))
        for _, group in itertools.groupby(rows, key=lambda row: len(row).bit_length() // 2)
    ]


def _compact_rows(rows: Tensor, keep: Tensor, padding: int) -> Tensor:
    """Move the kept entries of rows (C, n) to the front, in order; drop rows that become empty.

    Args:
        rows: (C, n) indices.
        keep: (C, n) mask.
        padding: fills the rows up to the length of the longest.
    """
    position = keep.cumsum(dim=1)
    counts = position[:, -1]
    longest = int(counts.max())
    compact = rows.new_full((len(rows), longest + 1), padding)
    # What is not kept goes to one more column, which is cut off.
    compact.scatter_(1, (position - 1).where(keep, longest), rows)
    return compact[counts > 0, :longest]


def _gather_sides(sides: Tensor, rows: Tensor) -> Tensor:
    """Look up the sides of boxes: (4, K + 1), indices (C, n) -> (4, C, n)."""
    return sides.index_select(1, rows.flatten()).unflatten(1, rows.shape)


def _nms_of_block(sides: Tensor, threshold: float) -> Tensor:
    """Run NMS within each row of boxes by decreasing score: (4, C, n) -> mask (C, n)."""
    # suppresses[c, i, j]: 1 where box i, if kept, suppresses the later box j.
    suppresses = _pairwise_iou(sides, sides).gt_(threshold).triu_(diagonal=1)
    # Whether a box is kept depends on earlier ones only. So every repetition of the rule settles
    # at least one more box, and the fixed point is the greedy result, in practice after a few.
    keep = torch.ones_like(sides[0])
    while True:
        updated = (keep[:, None].bmm(suppresses)[:, 0] == 0).to(sides.dtype)
        if torch.equal(updated, keep):
            return keep.bool()
        keep = updated


def _pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the IoU of all pairs of boxes in each row: (4, C, n), (4, C, m) -> (C, n, m).

    Two empty boxes give NaN; disjoint boxes 0 or less. The order of operations is torchvision's,
    so that both round alike.
    """
    x1, y1, x2, y2 = first[..., None]
    other_x1, other_y1, other_x2, other_y2 = second[:, :, None]
    width = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
    height = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1))
    intersection = width.mul_(height)
    areas = (x2 - x1) * (y2 - y1) + (other_x2 - other_x1) * (other_y2 - other_y1)
    return intersection.div_(areas.sub_(intersection))


def _round_down(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of ``dtype`` that is not above ``value``.

    torchvision compares a float32 IoU with a double-precision threshold. Rounding the threshold to
    the nearest float32 would move 0.7 down and 0.3 up, and so keep or drop boxes with an IoU in
    between. For a float32 x, ``x > value`` holds exactly when x is above this number.
    """
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf, dtype=dtype))
    return rounded.item()


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay as they are."""
    return values if values.dtype == torch.float64 else values.float()


# --------------------------------------------------------------------------------------------
# Checks of what users pass in
# --------------------------------------------------------------------------------------------


def check_threshold(name: str, value: float) -> None:
    """Raise ValueError unless a score or IoU threshold lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r}; expected a number from 0 to 1.")


def check_images(images: Tensor) -> None:
    """Raise ValueError unless ``images`` is a finite floating-point ``(B, 3, H, W)`` batch."""
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W).")
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}; expected a floating-point type. Scale pixels to [0, 1] "
            "and normalize them first."
        )
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"images {bad} of the batch contain NaN or infinite pixels; check how they were "
            "decoded and normalized."
        )


def check_training_batch(images: Tensor, gt_boxes: Tensor, num_classes: int) -> None:
    """Raise ValueError unless a training batch is what a detector expects.

    Call it on tensors in host memory: it reads values, and each read would wait for a GPU.
    ``Detector`` says who calls it, so that each batch is checked once.

    Args:
        images: ``(B, 3, H, W)``, finite.
        gt_boxes: ``(B, M, 5)``: x1, y1, x2, y2, class id, which may be ``IGNORED``; rows of -1 are
            padding.
        num_classes: class ids have to be below it.

    Raises:
        ValueError: wrong shapes, pixels that are not finite, or impossible classes or boxes.
    """
    check_images(images)
    if gt_boxes.dim() != 3 or gt_boxes.shape[-1] != 5 or len(gt_boxes) != len(images):
        raise ValueError(
            f"gt_boxes have shape {tuple(gt_boxes.shape)}; expected ({len(images)}, M, 5): "
            "x1, y1, x2, y2, class id, padded with rows of -1."
        )
    classes = gt_boxes[..., 4]
    if (classes >= num_classes).any() or (classes < IGNORED).any() or (classes % 1 != 0).any():
        raise ValueError(
            f"gt_boxes contain class ids from {classes.min():g} to {classes.max():g}; a detector "
            f"of num_classes={num_classes} expects whole numbers 0..{num_classes - 1}, -1 for "
            "padding and -2 for boxes to ignore. Build it with as many classes as the data has."
        )
    boxes = gt_boxes[classes != -1][:, :4]
    reversed_sides = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    if not torch.isfinite(boxes).all() or reversed_sides.any():
        raise ValueError(
            "gt_boxes contain a box that is not finite or has x2 < x1 or y2 < y1; expected XYXY in "
            f"pixels. The first one: {boxes[reversed_sides | ~boxes.isfinite().all(1)][0].tolist()}"
        )


def _check_nms_inputs(boxes: Tensor, scores: Tensor, iou_threshold: float) -> None:
    """Raise ValueError unless these are arguments for ``nms``."""
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}; expected (K, 4).")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}; expected ({len(boxes)},), one per box."
        )
    check_threshold("iou_threshold", iou_threshold)
