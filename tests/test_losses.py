"""The training loss of FCOS: formulas, moving average, gradients, learning."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import distance_box_iou_loss, generalized_box_iou_loss

from common import get_fpn_location_coords
from eecs598.data import IGNORED
from eecs598.grad import compute_numeric_gradient, rel_error
from one_stage_detector import (
    BOX_LOSSES,
    FCOS,
    QUALITY_TARGETS,
    FCOSLoss,
    NetworkOutputs,
    _diou,
    _giou,
    fcos_get_deltas_from_locations,
    fcos_match_locations_to_gt,
    iou_quality,
)
from tests.detectors import STRIDES, make_fcos, match_one_by_one, pad


def giou(box: list[torch.Tensor], other: list[float]) -> torch.Tensor:
    """The paper's algorithm 1."""
    x1, y1, x2, y2 = box
    width = torch.clamp(x2.clamp(max=other[2]) - x1.clamp(min=other[0]), min=0)
    height = torch.clamp(y2.clamp(max=other[3]) - y1.clamp(min=other[1]), min=0)
    intersection = width * height
    union = (x2 - x1) * (y2 - y1) + (other[2] - other[0]) * (other[3] - other[1]) - intersection
    hull_width = x2.clamp(min=other[2]) - x1.clamp(max=other[0])
    hull = hull_width * (y2.clamp(min=other[3]) - y1.clamp(max=other[1]))
    return intersection / union - (hull - union) / hull


def losses_image_by_image(
    detector: FCOS, images: torch.Tensor, gt_boxes: torch.Tensor, box_loss: str
) -> dict:
    """The same losses from the formulas, one image, level and location at a time."""
    feats = detector.backbone(images)
    logits, deltas, centerness = detector.pred_net(feats)
    locations = get_fpn_location_coords({p: f.shape for p, f in feats.items()}, STRIDES)
    total = {"loss_cls": 0.0, "loss_box": 0.0, "loss_ctr": 0.0}
    foreground = 0
    for i in range(len(images)):
        matched = match_one_by_one(locations, gt_boxes[i])
        for level, stride in STRIDES.items():
            for n, (x, y) in enumerate(locations[level].tolist()):
                x1, y1, x2, y2, label = matched[level][n].tolist()
                for c, logit in enumerate(logits[level][i, n]):
                    p = logit.sigmoid()
                    if c == label:
                        total["loss_cls"] = total["loss_cls"] - 0.25 * (1 - p) ** 2 * p.log()
                    else:
                        total["loss_cls"] = total["loss_cls"] - 0.75 * p**2 * (1 - p).log()
                if label < 0:
                    continue
                foreground += 1
                target = torch.tensor([x - x1, y - y1, x2 - x, y2 - y]) / stride
                predicted = deltas[level][i, n]
                left, top, right, bottom = target.tolist()
                t = math.sqrt(
                    min(left, right) * min(top, bottom) / (max(left, right) * max(top, bottom))
                )
                if box_loss == "l1":
                    loss = 0.25 * (predicted - target).abs().sum()
                else:
                    dx1, dy1, dx2, dy2 = stride * predicted.clamp(min=0)
                    box = [x - dx1, y - dy1, x + dx2, y + dy2]
                    loss = 2 * t * (1 - giou(box, [x1, y1, x2, y2]))
                total["loss_box"] = total["loss_box"] + loss
                q = centerness[level][i, n, 0].sigmoid()
                ctr_loss = -t * q.log() - (1 - t) * (1 - q).log()
                total["loss_ctr"] = total["loss_ctr"] + ctr_loss
    divisor = (0.9 * 150 + 0.1 * foreground / len(images)) * len(images)
    return {name: value / divisor for name, value in total.items()}


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_losses_are_the_formulas(rng, box_loss):
    detector = make_fcos(box_loss=box_loss).train()
    for module in detector.modules():  # the comparison runs the network twice
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    nn.init.normal_(detector.pred_net.pred_box.bias, 1.0)
    images = torch.randn(3, 3, 96, 64, generator=rng)
    gt_boxes = torch.stack(
        [
            pad([5, 8, 60, 90, 2], [10, 10, 40, 30, 0]),
            pad(),
            pad([0, 0, 64, 96, 1], [30, 40, 50, 70, 1], [33, 44, 45, 60, 0]),
        ]
    )
    losses = detector(images, gt_boxes)
    expected = losses_image_by_image(detector, images, gt_boxes, box_loss)
    assert list(losses) == ["loss_cls", "loss_box", "loss_ctr"]
    for name in expected:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


def test_the_divisor_is_a_moving_average():
    detector = make_fcos().train()
    images, boxes = torch.rand(2, 3, 64, 64), torch.stack([pad([4, 4, 60, 60, 1]), pad()])
    assert detector.loss_normalizer == 150
    detector(images, boxes)
    locations = get_fpn_location_coords(
        {"p3": (1, 1, 8, 8), "p4": (1, 1, 4, 4), "p5": (1, 1, 2, 2)}, STRIDES
    )
    matched = fcos_match_locations_to_gt(locations, STRIDES, boxes[0])
    foreground = sum(int((m[:, 4] >= 0).sum()) for m in matched.values())
    assert foreground > 0
    expected = 0.9 * 150 + 0.1 * foreground / 2
    assert detector.loss_normalizer.item() == pytest.approx(expected)
    detector(images, boxes)
    expected = 0.9 * expected + 0.1 * foreground / 2
    assert detector.loss_normalizer.item() == pytest.approx(expected)


def test_gradients_reach_every_parameter():
    detector = make_fcos().train()
    images = torch.rand(2, 3, 128, 128)
    boxes = torch.stack([pad([10, 10, 120, 125, 1], [20, 30, 45, 70, 0]), pad([3, 5, 90, 80, 2])])
    sum(detector(images, boxes).values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_loss_gradient_against_finite_differences():
    """The whole chain, in float64, with respect to the head's own predictions."""
    detector = make_fcos(2).double().eval()
    for module in detector.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    boxes = pad([2, 3, 29, 30, 1], to=1)[None].double()
    bias = detector.pred_net.pred_cls.bias

    def loss_at(value: torch.Tensor) -> torch.Tensor:
        detector.loss_normalizer.fill_(150)
        with torch.no_grad():
            bias.copy_(value)
        return sum(detector(images, boxes).values())

    numeric = compute_numeric_gradient(loss_at, bias.detach().clone())
    (analytic,) = torch.autograd.grad(loss_at(bias.detach().clone()), bias)
    assert rel_error(numeric, analytic) < 1e-6


def test_overfitting_one_batch():
    detector = make_fcos().train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.stack([pad([4, 4, 40, 44, 1]), pad([20, 10, 60, 50, 2])])
    solver = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    course = []
    for _ in range(25):
        loss = sum(detector(images, boxes).values())
        # The divisor falls from its start of 150, so compare the sums that it divides.
        course.append(loss.item() * detector.loss_normalizer.item())
        solver.zero_grad()
        loss.backward()
        solver.step()
    assert course[-1] < 0.5 * course[0]


def test_losses_have_the_value_of_builtin_functions():
    """A foreground and a background location: the masks of the assignment's demonstration cell."""
    targets = fcos_get_deltas_from_locations(
        torch.tensor([[32.0, 32], [64, 32]]),
        torch.tensor([[1.0, 2, 40, 50, 2], [-1, -1, -1, -1, -1]]),
        stride=32,
    )
    loss = 0.25 * F.l1_loss(torch.zeros(2, 4), targets, reduction="none")
    loss[targets < 0] = 0.0
    assert loss[0].tolist() == pytest.approx([31 / 128, 30 / 128, 8 / 128, 18 / 128])
    assert loss[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_every_box_loss_is_least_at_its_target(name):
    """For each foreground location on its own: whatever side moves, its loss rises."""
    criterion = FCOSLoss(STRIDES, name)
    locations = get_fpn_location_coords({"p3": (1, 1, 8, 8), "p4": (1, 1, 4, 4)}, STRIDES)
    targets = criterion.make_targets(locations, pad([5, 8, 60, 50, 2], [10, 10, 40, 30, 0])[None])
    foreground = targets.boxes[..., 4] >= 0
    best = BOX_LOSSES[name](targets.deltas, targets)
    assert best.shape[:2] == foreground.shape and best[foreground].abs().max() < 1e-5
    for side in range(4):
        for shift in (-0.2, 0.2):
            deltas = targets.deltas + shift * torch.eye(4)[side]
            loss = BOX_LOSSES[name](deltas.requires_grad_(), targets).sum(dim=-1)[foreground]
            assert (loss > 1e-4).all()
            (gradient,) = torch.autograd.grad(loss.sum(), deltas)
            assert (gradient[foreground][:, side] * shift > 0).all()


@pytest.mark.parametrize(
    ("overlap", "loss"),
    [(_giou, generalized_box_iou_loss), (_diou, distance_box_iou_loss)],
)
def test_overlaps_are_those_of_torchvision(overlap, loss, rng):
    """Also of boxes that do not overlap, and of the boxes of background locations."""
    corners, others = 100 * torch.rand(2, 500, 2, generator=rng)
    boxes = torch.cat([corners, corners + 60 * torch.rand(500, 2, generator=rng)], dim=1)
    others = torch.cat([others, others + 60 * torch.rand(500, 2, generator=rng)], dim=1)
    others[::7] = -1
    boxes.requires_grad_()
    ours, theirs = 1 - overlap(boxes, others), loss(boxes, others)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(each.sum(), boxes)[0] for each in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_the_quality_is_the_iou_of_the_predicted_box():
    locations = {"p3": torch.tensor([[12.0, 20.0], [12.0, 20.0], [28.0, 4.0]])}
    gt_boxes = pad([4, 12, 20, 28, 1])[None]
    targets = FCOSLoss({"p3": 8}, quality="iou").make_targets(locations, gt_boxes)
    # In strides: the box itself; its left half; one beside it, of a background location.
    deltas = torch.tensor([[[1.0, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 0]]], requires_grad=True)
    quality = iou_quality(deltas, targets)
    assert quality[0, :2].tolist() == [1.0, 0.5]
    assert quality.isfinite().all() and not quality.requires_grad


def test_the_quality_is_learned_in_place_of_centerness():
    """Where the box is right but the center far, the logit rises; with centerness it falls."""
    locations = {"p3": torch.tensor([[8.0, 8.0]])}
    outputs = NetworkOutputs(
        locations,
        {"p3": torch.zeros(1, 1, 3)},
        {"p3": torch.tensor([[[0.5, 0.5, 2.5, 2.5]]])},
        {"p3": torch.zeros(1, 1, 1, requires_grad=True)},
    )
    logits = outputs.centerness_logits["p3"]
    gradients = {}
    for quality in QUALITY_TARGETS:
        criterion = FCOSLoss({"p3": 8}, quality=quality)
        losses = criterion(outputs, pad([4, 4, 28, 28, 1])[None], torch.tensor(1.0))
        (gradient,) = torch.autograd.grad(losses["loss_ctr"], logits)
        gradients[quality] = gradient.item()
    # sigmoid(0) - target, where the centerness is 1/5.
    assert gradients == {"centerness": pytest.approx(0.3), "iou": pytest.approx(-0.5)}


def test_a_box_loss_is_one_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(BOX_LOSSES, "l2", lambda deltas, targets: (deltas - targets.deltas) ** 2)
    detector = make_fcos(box_loss="l2").train()
    losses = detector(torch.rand(1, 3, 64, 64), pad([5, 5, 50, 60, 1])[None])
    assert losses["loss_box"] > 0


def test_settings_out_of_range():
    with pytest.raises(ValueError, match='box_loss=\'l2\'; expected "l1" or "giou" or "diou"'):
        make_fcos(box_loss="l2")
    with pytest.raises(ValueError, match='quality=\'area\'; expected "centerness" or "iou"'):
        make_fcos(quality="area")
    with pytest.raises(ValueError, match='assignment=\'iou\'; expected "size" or "atss"'):
        make_fcos(assignment="iou")
    with pytest.raises(ValueError, match="center_radius=0"):
        make_fcos(center_radius=0)


# --------------------------------------------------------------------------------------------
# Regions to ignore
# --------------------------------------------------------------------------------------------


def class_gradients(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Locations (N, 2), gradients (N, C) of the class logits and (N, 4) of the deltas, losses."""
    locations = get_fpn_location_coords(
        {"p3": (1, 8, 12, 16), "p4": (1, 8, 6, 8), "p5": (1, 8, 3, 4)}, STRIDES
    )
    generator = torch.Generator().manual_seed(0)

    def predictions(channels: int) -> dict[str, torch.Tensor]:
        return {
            level: torch.randn(1, len(points), channels, generator=generator).requires_grad_()
            for level, points in locations.items()
        }

    outputs = NetworkOutputs(locations, predictions(3), predictions(4), predictions(1))
    losses = FCOSLoss(STRIDES)(outputs, pad(*rows)[None], torch.tensor(150.0))
    sum(losses.values()).backward()
    points = torch.cat(list(locations.values()))
    gradients = [
        torch.cat([values.grad[0] for values in predicted.values()])
        for predicted in (outputs.class_logits, outputs.deltas)
    ]
    return points, *gradients, losses


def test_locations_in_a_region_to_ignore_have_no_loss_unless_they_match_an_object():
    region, dog = [20.0, 12, 100, 84], [44.0, 36, 124, 90]
    points, plain, plain_boxes, _ = class_gradients([*dog, 2])
    _, ignoring, boxes, _ = class_gradients([*dog, 2], [*region, IGNORED])
    in_region = ((points > torch.tensor(region[:2])) & (points < torch.tensor(region[2:]))).all(1)
    matched = plain_boxes.abs().sum(1) > 0
    assert (in_region & matched).any() and (in_region & ~matched).any()
    assert (ignoring[in_region & ~matched] == 0).all()  # on every level
    assert (plain != 0).all()
    trained = ~in_region | matched
    assert torch.equal(ignoring[trained], plain[trained])
    assert torch.equal(boxes, plain_boxes)


def test_without_a_region_to_ignore_nothing_changes():
    """A region that no location lies in leaves every bit."""
    dog = [44.0, 36, 124, 90, 2]
    _, plain, _, losses = class_gradients(dog)
    _, other, _, other_losses = class_gradients(dog, [5.0, 5, 7, 7, IGNORED])
    assert torch.equal(plain, other) and losses == other_losses


def test_matching_marks_regions_to_ignore():
    locations = {"p3": torch.tensor([[4.0, 4.0], [12.0, 4.0], [20.0, 4.0], [28.0, 4.0]])}
    boxes = torch.tensor([[0.0, 0, 16, 8, 1], [8.0, 0, 28, 8, IGNORED]])
    matched = fcos_match_locations_to_gt(locations, {"p3": 8}, boxes)["p3"]
    # The second is in both, the last on the region's side.
    assert matched[:2].tolist() == [[0, 0, 16, 8, 1]] * 2
    assert matched[2:].tolist() == [[-1, -1, -1, -1, IGNORED], [-1.0] * 5]


def test_regions_to_ignore_are_checked_as_boxes_are():
    detector = make_fcos().train()
    images = torch.rand(1, 3, 64, 64)
    assert detector(images, pad([8.0, 8, 40, 40, IGNORED])[None])["loss_box"] == 0
    with pytest.raises(ValueError, match="x2 < x1"):
        detector(images, pad([40.0, 8, 8, 40, IGNORED])[None])
    with pytest.raises(ValueError, match="class ids from -3"):
        detector(images, pad([8.0, 8, 40, 40, -3])[None])
