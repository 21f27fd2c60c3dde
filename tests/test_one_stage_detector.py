"""Head, targets, losses and post-processing of FCOS."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common import get_fpn_location_coords
from eecs598.grad import compute_numeric_gradient, rel_error
from one_stage_detector import (
    FCOS,
    FCOSPredictionNetwork,
    fcos_apply_deltas_to_locations,
    fcos_get_deltas_from_locations,
    fcos_make_centerness_targets,
    fcos_match_locations_to_gt,
)

STRIDES = {"p3": 8, "p4": 16, "p5": 32}


def make_fcos(num_classes: int = 3) -> FCOS:
    torch.manual_seed(0)
    return FCOS(num_classes, 8, [8], weights=None)


@pytest.fixture(scope="module")
def detector() -> FCOS:
    """Tests that train or change it build their own."""
    return make_fcos().eval()


def pad(*rows: list[float], to: int = 4) -> torch.Tensor:
    """Boxes of one image with class ids, padded with -1."""
    boxes = torch.full((to, 5), -1.0)
    for i, row in enumerate(rows):
        boxes[i] = torch.tensor(row)
    return boxes


# --------------------------------------------------------------------------------------------
# Head
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes, stem", [(20, [16, 12]), (1, []), (80, [8])])
def test_head_shapes(num_classes, stem):
    head = FCOSPredictionNetwork(num_classes, 10, stem)
    feats = {"p3": torch.rand(2, 10, 5, 7), "p4": torch.rand(2, 10, 3, 4)}
    outputs = head(feats)
    assert [list(output) for output in outputs] == [["p3", "p4"]] * 3
    for output, channels in zip(outputs, (num_classes, 4, 1), strict=True):
        assert output["p3"].shape == (2, 35, channels)
        assert output["p4"].shape == (2, 12, channels)


def test_head_starts_as_the_assignment_says():
    head = FCOSPredictionNetwork(20, 64, [64, 64])
    convolutions = {n: m for n, m in head.named_modules() if isinstance(m, nn.Conv2d)}
    assert len(convolutions) == 7
    for name, module in convolutions.items():
        assert module.kernel_size == (3, 3) and module.padding == (1, 1)
        assert abs(module.weight.std().item() - 0.01) < 0.001, name
        assert abs(module.weight.mean().item()) < 0.001, name
        expected = -math.log(99) if name == "pred_cls" else 0.0
        assert torch.allclose(module.bias, torch.tensor(expected)), name
    assert [type(m) for m in head.stem_cls] == [nn.Conv2d, nn.ReLU] * 2


def test_head_and_locations_share_one_order():
    """A feature in one cell alone changes just the predictions at locations around that cell."""
    head = FCOSPredictionNetwork(2, 4, [])
    height, width = 6, 9
    located = get_fpn_location_coords({"p3": (1, 4, height, width)}, STRIDES)["p3"]
    for row, column in [(1, 7), (4, 1), (0, 0), (5, 8), (2, 5)]:
        feats = torch.zeros(1, 4, height, width)
        quiet = head({"p3": feats})
        feats[0, :, row, column] = 1.0
        for before, after in zip(quiet, head({"p3": feats}), strict=True):
            change = (after["p3"] - before["p3"]).abs().sum(-1)[0]
            cells = located[change > 1e-7] / 8 - 0.5
            offsets = cells - torch.tensor([column, row])
            assert len(cells) > 0 and offsets.abs().max() <= 1  # a 3x3 convolution reaches so far


def test_head_needs_a_class():
    with pytest.raises(ValueError, match="num_classes=0"):
        FCOSPredictionNetwork(0, 8, [8])


# --------------------------------------------------------------------------------------------
# Matching
# --------------------------------------------------------------------------------------------


def match_one_by_one(locations: dict, gt_boxes: torch.Tensor) -> dict:
    """The rule, written as loops."""
    matched = {}
    for level, points in locations.items():
        stride = STRIDES[level]
        low = 0 if level == "p3" else 4 * stride
        high = math.inf if level == "p5" else 8 * stride
        rows = []
        for x, y in points.tolist():
            row, smallest = [-1.0] * 5, math.inf
            for x1, y1, x2, y2, label in gt_boxes.tolist():
                sides = (x - x1, y - y1, x2 - x, y2 - y)
                if label < 0 or min(sides) <= 0 or not low < max(sides) < high:
                    continue
                if (x2 - x1) * (y2 - y1) < smallest:
                    smallest, row = (x2 - x1) * (y2 - y1), [x1, y1, x2, y2, label]
            rows.append(row)
        matched[level] = torch.tensor(rows)
    return matched


@pytest.mark.parametrize("height, width", [(160, 224), (224, 96)])
def test_matching_is_the_rule(height, width, rng):
    shapes = {p: (1, 8, -(-height // s), -(-width // s)) for p, s in STRIDES.items()}
    locations = get_fpn_location_coords(shapes, STRIDES)
    for _ in range(10):
        corners = torch.rand(6, 2, 2, generator=rng) * torch.tensor([width, height])
        boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1).round()
        classes = torch.tensor([0.0, 1, 2, 3, 4, -1])[:, None]
        boxes = torch.cat([boxes, classes], dim=1)
        boxes[5] = -1.0
        expected = match_one_by_one(locations, boxes)
        matched = fcos_match_locations_to_gt(locations, STRIDES, boxes)
        for level in STRIDES:
            assert torch.equal(matched[level], expected[level])


def test_limits_of_the_levels_are_open():
    """A location exactly 4 or 8 strides from the farthest side belongs to neither level."""
    locations = {"p4": torch.tensor([[100.0, 100.0]])}
    for farthest, matches in ((64, False), (65, True), (127, True), (128, False)):
        boxes = torch.tensor([[90.0, 90, 100 + farthest, 110, 7]])
        matched = fcos_match_locations_to_gt(locations, STRIDES, boxes)["p4"]
        assert (matched[0, 4] == 7) == matches


def test_inside_is_strict():
    locations = {"p3": torch.tensor([[4.0, 4], [12, 4], [12, 12]])}
    matched = fcos_match_locations_to_gt(locations, STRIDES, torch.tensor([[4.0, 0, 20, 12, 1]]))
    assert matched["p3"][:, 4].tolist() == [-1, 1, -1]


def test_finest_level_takes_the_smallest_and_coarsest_the_largest():
    tiny = torch.tensor([[10.0, 10, 14, 14, 0]])
    huge = torch.tensor([[0.0, 0, 2000, 2000, 1]])
    matched = fcos_match_locations_to_gt({"p3": torch.tensor([[12.0, 12]])}, STRIDES, tiny)
    assert matched["p3"][0, 4] == 0
    matched = fcos_match_locations_to_gt({"p5": torch.tensor([[1008.0, 1008]])}, STRIDES, huge)
    assert matched["p5"][0, 4] == 1


@pytest.mark.parametrize("gt_boxes", [torch.zeros(0, 5), torch.full((3, 5), -1.0)])
def test_matching_without_boxes_is_background(gt_boxes):
    matched = fcos_match_locations_to_gt({"p3": torch.rand(10, 2)}, STRIDES, gt_boxes)
    assert torch.equal(matched["p3"], torch.full((10, 5), -1.0))


def test_matching_wants_boxes_of_one_image():
    with pytest.raises(ValueError, match=r"expected \(M, 5\)"):
        fcos_match_locations_to_gt({"p3": torch.rand(10, 2)}, STRIDES, torch.zeros(2, 3, 5))


# --------------------------------------------------------------------------------------------
# Deltas and centerness
# --------------------------------------------------------------------------------------------

ASSIGNMENT_BOXES = torch.tensor(
    [[10.0, 15, 100, 115, 1], [30, 20, 40, 30, 1], [120, 100, 200, 200, 1]]
)
ASSIGNMENT_LOCATIONS = torch.tensor([[30.0, 40], [32, 29], [125, 150]])


def test_deltas_and_back_are_exact():
    deltas = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, ASSIGNMENT_BOXES, stride=8)
    assert deltas[0].tolist() == [20 / 8, 25 / 8, 70 / 8, 75 / 8]
    boxes = fcos_apply_deltas_to_locations(deltas, ASSIGNMENT_LOCATIONS, stride=8)
    assert rel_error(boxes, ASSIGNMENT_BOXES[:, :4]) == 0.0


@pytest.mark.parametrize("columns", [4, 5])
def test_background_deltas(columns):
    background = torch.full((1, columns), -1.0)
    location = torch.tensor([[100.0, 200]])
    deltas = fcos_get_deltas_from_locations(location, background, stride=8)
    assert deltas.tolist() == [[-1, -1, -1, -1]]
    boxes = fcos_apply_deltas_to_locations(deltas, location, stride=8)
    assert boxes.tolist() == [[100, 200, 100, 200]]


def test_a_box_of_class_0_is_no_background():
    deltas = fcos_get_deltas_from_locations(
        torch.tensor([[10.0, 10]]), torch.tensor([[0.0, 0, 20, 20, 0]]), stride=10
    )
    assert deltas.tolist() == [[1, 1, 1, 1]]


def test_negative_deltas_count_as_zero():
    boxes = fcos_apply_deltas_to_locations(
        torch.tensor([[-2.0, 1, 3, -0.5]]), torch.tensor([[50.0, 60]]), stride=16
    )
    assert boxes.tolist() == [[50, 44, 98, 60]]


def test_deltas_of_joined_levels():
    strides = torch.tensor([[8.0], [16.0], [32.0]])
    joined = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, ASSIGNMENT_BOXES, strides)
    for i, stride in enumerate((8, 16, 32)):
        single = fcos_get_deltas_from_locations(
            ASSIGNMENT_LOCATIONS[i : i + 1], ASSIGNMENT_BOXES[i : i + 1], stride
        )
        assert torch.equal(joined[i : i + 1], single)


def test_centerness_of_the_assignment():
    boxes = ASSIGNMENT_BOXES.clone()
    boxes[2] = -1
    deltas = fcos_get_deltas_from_locations(ASSIGNMENT_LOCATIONS, boxes, stride=8)
    expected = torch.tensor([0.30860671401, 0.1666666716, -1.0])
    assert rel_error(fcos_make_centerness_targets(deltas), expected) < 1e-7


def test_centerness_is_one_in_the_centre_and_zero_on_the_side():
    deltas = torch.tensor([[2.0, 3, 2, 3], [0, 3, 4, 3]])
    assert fcos_make_centerness_targets(deltas).tolist() == [1, 0]


def test_shape_errors_of_targets():
    with pytest.raises(ValueError, match="expected"):
        fcos_get_deltas_from_locations(torch.zeros(2, 2), torch.zeros(2, 3), 8)
    with pytest.raises(ValueError, match="expected"):
        fcos_apply_deltas_to_locations(torch.zeros(2, 3), torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="expected"):
        fcos_make_centerness_targets(torch.zeros(2, 5))


# --------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------


def losses_image_by_image(detector: FCOS, images: torch.Tensor, gt_boxes: torch.Tensor) -> dict:
    """The same losses from the assignment's formulas, one image, level and location at a time."""
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
                box_loss = 0.25 * (deltas[level][i, n] - target).abs().sum()
                total["loss_box"] = total["loss_box"] + box_loss
                left, top, right, bottom = target.tolist()
                t = math.sqrt(
                    min(left, right) * min(top, bottom) / (max(left, right) * max(top, bottom))
                )
                q = centerness[level][i, n, 0].sigmoid()
                ctr_loss = -t * q.log() - (1 - t) * (1 - q).log()
                total["loss_ctr"] = total["loss_ctr"] + ctr_loss
    divisor = (0.9 * 150 + 0.1 * foreground / len(images)) * len(images)
    return {name: value / divisor for name, value in total.items()}


def test_losses_are_the_formulas(rng):
    detector = make_fcos().train()
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
    expected = losses_image_by_image(detector, images, gt_boxes)
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


# --------------------------------------------------------------------------------------------
# Sizes, precisions, empty images
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(64, 64), (225, 353), (97, 640)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_training_and_prediction_at_any_size(height, width, batch_size):
    detector = make_fcos().train()
    images = torch.rand(batch_size, 3, height, width)
    boxes = pad([5, 5, 50, 60, 1]).repeat(batch_size, 1, 1)
    losses = detector(images, boxes)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    found = detector.eval().predict(images, 0.0, 0.5)
    assert len(found) == batch_size
    for image in found:
        assert (image["boxes"] >= 0).all()
        assert (image["boxes"][:, 0::2] <= width).all()
        assert (image["boxes"][:, 1::2] <= height).all()


@pytest.mark.parametrize("num_classes", [1, 80])
def test_few_and_many_classes(num_classes):
    detector = make_fcos(num_classes).train()
    losses = detector(torch.rand(1, 3, 64, 64), pad([5, 5, 50, 60, num_classes - 1])[None])
    assert all(loss.isfinite() for loss in losses.values())
    labels = detector.eval().predict(torch.rand(1, 3, 64, 64), 0.0, 0.5)[0]["labels"]
    assert labels.min() >= 0 and labels.max() < num_classes


def test_float64():
    detector = make_fcos().double().train()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    losses = detector(images, pad([5, 5, 50, 60, 1])[None])
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    assert detector.eval()(images, test_score_thresh=0.0)[0].dtype == torch.float64


def test_bfloat16_autocast_gives_float32_losses_close_to_float32():
    detector = make_fcos().train()
    images, boxes = torch.rand(2, 3, 64, 64), pad([5, 5, 50, 60, 1]).repeat(2, 1, 1)
    exact = detector(images, boxes)
    detector.loss_normalizer.fill_(150)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, boxes)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = detector.eval().predict(images, 0.0, 0.5)
    assert found[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize("padding", [0, 3])
def test_a_batch_without_any_box(padding):
    detector = make_fcos().train()
    losses = detector(torch.rand(2, 3, 64, 64), torch.full((2, padding, 5), -1.0))
    assert losses["loss_box"] == 0 and losses["loss_ctr"] == 0 and losses["loss_cls"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_data_without_boxes_does_not_divide_by_nothing():
    detector = make_fcos().train()
    detector.loss_normalizer.fill_(1e-30)
    losses = detector(torch.rand(2, 3, 64, 64), torch.full((2, 1, 5), -1.0))
    assert losses["loss_cls"] < 1e3


# --------------------------------------------------------------------------------------------
# Post-processing
# --------------------------------------------------------------------------------------------


def planted() -> tuple[dict, dict, dict, dict]:
    """Locations of a 64x64 image on p4, and predictions with three confident ones."""
    locations = get_fpn_location_coords({"p4": (1, 8, 4, 4)}, STRIDES)
    logits = torch.full((1, 16, 3), -20.0)
    deltas = torch.full((1, 16, 4), 0.25)
    centerness = torch.full((1, 16, 1), 20.0)
    logits[0, 5, 1] = 20.0  # location (24, 24): class 1, score 1
    logits[0, 6, 1] = 0.0  # location (24, 40): class 1, score sqrt(0.5)
    deltas[0, 6] = torch.tensor([0.25, 1.25, 0.25, -0.75])  # clips to a box over location 5's
    logits[0, 15, 2] = 20.0  # location (56, 56): class 2, centerness 0.25: score 0.5
    centerness[0, 15] = -math.log(3)
    deltas[0, 15] = 9.0  # reaches over the image
    return locations, {"p4": logits}, {"p4": deltas}, {"p4": centerness}


def test_scores_classes_and_boxes(detector):
    images = torch.rand(1, 3, 64, 64)
    boxes, labels, scores = detector.inference(images, *planted(), 0.4, 0.6)
    assert labels.tolist() == [1, 1, 2]
    assert scores.tolist() == pytest.approx([1.0, math.sqrt(0.5), 0.5], abs=1e-4)
    assert boxes[0].tolist() == [20, 20, 28, 28]
    assert boxes[2].tolist() == [0, 0, 64, 64]


def test_thresholds(detector):
    images = torch.rand(1, 3, 64, 64)
    assert detector.inference(images, *planted(), 0.8, 0.6)[1].tolist() == [1]
    assert detector.inference(images, *planted(), 0.6, 0.6)[1].tolist() == [1, 1]
    # The box of the second, (20, 20, 28, 40), has IoU 0.4 with the first.
    assert detector.inference(images, *planted(), 0.6, 0.39)[1].tolist() == [1]


def test_inference_leaves_its_inputs_alone(detector):
    images = torch.rand(1, 3, 64, 64)
    inputs = planted()
    copies = [{level: t.clone() for level, t in group.items()} for group in inputs]
    detector.inference(images, *inputs, 0.4, 0.6)
    for group, copy in zip(inputs, copies, strict=True):
        assert all(torch.equal(group[level], copy[level]) for level in group)


def test_a_batch_gives_what_its_images_give():
    detector = make_fcos().double().eval()  # so that rounding can't swap two scores
    nn.init.normal_(detector.pred_net.pred_cls.weight)
    images = torch.rand(3, 3, 64, 96, dtype=torch.float64)
    for image, found in zip(images, detector.predict(images, 0.05, 0.6), strict=True):
        boxes, labels, scores = detector(image[None], None, 0.05, 0.6)
        assert len(boxes) > 0
        assert torch.allclose(found["boxes"], boxes)
        assert torch.equal(found["labels"], labels)
        assert torch.allclose(found["scores"], scores)


def test_one_class_may_come_in_several_images_at_one_place():
    """A batch goes through one NMS; the same image twice must not suppress itself."""
    detector = make_fcos().eval()
    nn.init.normal_(detector.pred_net.pred_cls.weight)
    image = torch.rand(1, 3, 64, 96)
    first, second = detector.predict(image.repeat(2, 1, 1, 1), 0.05, 0.6)
    assert len(first["scores"]) == len(second["scores"]) > 0
    torch.testing.assert_close(first["boxes"], second["boxes"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_prediction():
    detector = make_fcos()
    with pytest.raises(ValueError, match="call eval"):
        detector.train().compile_prediction()
    detector.eval()
    for module in detector.modules():  # statistics that folding them in must not lose
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for convolution in (*detector.pred_net.stem_cls, detector.pred_net.pred_cls):
        if isinstance(convolution, nn.Conv2d):
            nn.init.normal_(convolution.weight, std=0.5)
    images = torch.rand(2, 3, 64, 96)
    plain = detector.predict(images, 0.08, 0.6)
    detector.compile_prediction()
    for found, expected in zip(detector.predict(images, 0.08, 0.6), plain, strict=True):
        torch.testing.assert_close(found["scores"][0], expected["scores"][0], atol=1e-4, rtol=0)
        torch.testing.assert_close(found["boxes"][0], expected["boxes"][0], atol=1e-2, rtol=0)

    nn.init.constant_(detector.pred_net.pred_cls.bias, -100)  # as a step of training would
    detector.train().eval()
    assert all(len(found["scores"]) == 0 for found in detector.predict(images, 0.08, 0.6))


def test_compiled_training(monkeypatch):
    """It is compiled for training alone, and is the same training; PyTorch checks its backends."""
    calls = []

    def compiled(function):
        calls.append("compiled")
        return compiler(function, backend="eager")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", compiled)
    images, boxes = torch.rand(2, 3, 64, 64), pad([5, 5, 40, 50, 1]).expand(2, -1, -1)
    results = []
    for compile in (False, True):
        detector = make_fcos().train()
        detector.compile_network(compile)
        losses = detector(images, boxes)
        sum(losses.values()).backward()
        results.append((losses, detector.backbone.backbone.stem[0].weight.grad, detector))
    (losses, gradient, plain), (others, other_gradient, detector) = results
    assert calls == ["compiled"]
    torch.testing.assert_close(others, losses)
    torch.testing.assert_close(other_gradient, gradient)
    assert detector.state_dict().keys() == plain.state_dict().keys()
    detector.eval()._compiled_network = pytest.fail  # evaluation does without
    assert len(detector(images[:1])) == 3


def test_nothing_found(detector):
    boxes, labels, scores = detector(torch.rand(1, 3, 64, 64), test_score_thresh=1.0)
    assert boxes.shape == (0, 4) and labels.shape == (0,) and scores.shape == (0,)


def test_state_dict_round_trip(detector, tmp_path):
    torch.save(detector.state_dict(), tmp_path / "fcos_detector.pt")
    other = FCOS(3, 8, [8], weights=None).eval()
    other.load_state_dict(torch.load(tmp_path / "fcos_detector.pt", weights_only=True))
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(detector(images), other(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: d.train()(torch.rand(1, 3, 64, 64)), "no gt_boxes"),
        (lambda d: d.train()(torch.rand(1, 3, 64, 64), pad([1, 1, 9, 9, 3])[None]), "num_classes"),
        (lambda d: d.train()(torch.rand(1, 3, 64, 64), pad([9, 1, 1, 9, 0])[None]), "x2 < x1"),
        (lambda d: d.train()(torch.rand(1, 3, 64, 64), pad([1, 1, 9, 9, 0])), "expected"),
        (lambda d: d.train()(torch.full((1, 3, 64, 64), torch.nan), pad()[None]), "NaN"),
        (lambda d: d.train().predict(torch.rand(1, 3, 64, 64)), "training mode"),
        (lambda d: d(torch.full((1, 3, 64, 64), torch.nan)), "NaN"),
        (lambda d: d(torch.rand(3, 64, 64)), r"expected \(B, 3, H, W\)"),
        (lambda d: d(torch.rand(2, 3, 64, 64)), "one image at a time"),
        (lambda d: d(torch.rand(1, 3, 64, 64), test_score_thresh=-0.1), "from 0 to 1"),
        (lambda d: d(torch.rand(1, 3, 64, 64), test_score_thresh=1.5), "from 0 to 1"),
        (lambda d: d(torch.rand(1, 3, 64, 64), test_nms_thresh=-1), "from 0 to 1"),
        (lambda d: d.predict(torch.rand(1, 3, 64, 64), nms_thresh=2), "from 0 to 1"),
    ],
)
def test_wrong_use_is_explained(detector, call, words):
    with pytest.raises(ValueError, match=words):
        call(detector.eval())
    detector.eval()


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
