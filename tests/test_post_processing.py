"""Post-processing of FCOS: scores, thresholds, NMS, batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common import get_fpn_location_coords
from one_stage_detector import FCOS, NetworkOutputs
from tests.detectors import STRIDES, make_fcos


@pytest.fixture(scope="module")
def detector() -> FCOS:
    return make_fcos().eval()


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


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_classes_per_location(count):
    """Each location detects its most probable classes, with one box; NMS is within a class."""
    detector = make_fcos(classes_per_location=count).eval()
    locations, _, deltas, centerness = planted()
    logits = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(count))
    boxes, labels, scores = detector.inference(
        torch.rand(1, 3, 64, 64), locations, {"p4": logits}, deltas, centerness, 0.0, 1.0
    )
    expected = []
    for number in range(16):
        probable = sorted(zip(logits[0, number].tolist(), range(3), strict=True), reverse=True)
        center = 1 / (1 + math.exp(-centerness["p4"][0, number].item()))
        for logit, label in probable[:count]:
            expected.append((math.sqrt(center / (1 + math.exp(-logit))), label, number))
    expected.sort(reverse=True)
    assert len(scores) == 16 * min(count, 3)
    assert scores.tolist() == pytest.approx([score for score, _, _ in expected], abs=1e-5)
    assert labels.tolist() == [label for _, label, _ in expected]
    one_class = make_fcos().eval()
    class_logits = {"p4": logits[..., :1]}
    args = locations, class_logits, deltas, centerness
    by_location = one_class.post_processor.decode(NetworkOutputs(*args), (64, 64)).boxes[0]
    assert torch.equal(boxes, by_location[[number for _, _, number in expected]])


def test_no_class_per_location_is_an_error():
    with pytest.raises(ValueError, match="classes_per_location=0; expected at least 1"):
        make_fcos(classes_per_location=0)


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


def test_nothing_found(detector):
    boxes, labels, scores = detector(torch.rand(1, 3, 64, 64), test_score_thresh=1.0)
    assert boxes.shape == (0, 4) and labels.shape == (0,) and scores.shape == (0,)
