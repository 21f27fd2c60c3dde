"""The head of FCOS: shapes, initial weights, order of its predictions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common import get_fpn_location_coords
from one_stage_detector import FCOSPredictionNetwork
from tests.detectors import STRIDES


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


def test_the_stem_before_the_boxes_can_be_another():
    head = FCOSPredictionNetwork(3, 10, [8], box_stem_channels=[16, 12], norm="group_box")
    assert [type(m) for m in head.stem_cls] == [nn.Conv2d, nn.ReLU]
    assert [type(m) for m in head.stem_box] == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2
    outputs = head({"p3": torch.rand(2, 10, 5, 7)})
    assert [output["p3"].shape[-1] for output in outputs] == [3, 4, 1]
    assert head.pred_cls.in_channels == 8
    assert head.pred_box.in_channels == head.pred_ctr.in_channels == 12
    without = FCOSPredictionNetwork(3, 10, [8], box_stem_channels=[])
    assert len(without.stem_cls) == 2 and len(without.stem_box) == 0


def test_dropout_drops_whole_channels_before_the_class_logits_alone():
    head = FCOSPredictionNetwork(1, 4, [], dropout=0.5)
    nn.init.ones_(head.pred_cls.weight)
    feats = {"p3": torch.ones(64, 4, 3, 3)}
    logits, deltas, _ = head(feats)
    center = logits["p3"][:, 4, 0] + math.log(99)  # 9 pixels of each channel that is kept, doubled
    assert set(center.round().tolist()) == {0.0, 18.0, 36.0, 54.0, 72.0}
    assert (deltas["p3"] == deltas["p3"][:1]).all()
    head.eval()
    assert head(feats)[0]["p3"][0, 4, 0].item() == pytest.approx(36 - math.log(99), abs=1e-4)


def test_head_needs_a_class():
    with pytest.raises(ValueError, match="num_classes=0"):
        FCOSPredictionNetwork(0, 8, [8])


def test_the_choices_of_the_norm_are_said():
    with pytest.raises(
        ValueError, match=r'norm=.layer.; expected "none" or "group" or "group_box"'
    ):
        FCOSPredictionNetwork(2, 8, [8], norm="layer")


def test_centerness_is_predicted_beside_the_box():
    head = FCOSPredictionNetwork(2, 4, [8])
    _, _, centerness_logits = head({"p3": torch.rand(1, 4, 5, 7)})
    centerness_logits["p3"].sum().backward()
    assert head.stem_box[0].weight.grad.abs().max() > 0
    assert head.stem_cls[0].weight.grad is None


@pytest.mark.parametrize("channels, groups", [(128, 32), (48, 16), (6, 2)])
def test_group_norm_follows_each_convolution_of_the_stems(channels, groups):
    head = FCOSPredictionNetwork(2, 4, [channels, channels], norm="group")
    for stem in (head.stem_cls, head.stem_box):
        assert [type(m) for m in stem] == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2
        assert {m.num_groups for m in stem if isinstance(m, nn.GroupNorm)} == {groups}


def test_level_scales_multiply_the_deltas_of_their_level():
    head = FCOSPredictionNetwork(2, 4, [8], scaled_levels=["p3", "p4"])
    feats = {"p3": torch.rand(1, 4, 5, 7), "p4": torch.rand(1, 4, 3, 4)}
    before = head(feats)
    with torch.no_grad():
        head.scales["p4"].fill_(3.0)
    after = head(feats)
    for output, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(new["p3"], old["p3"])
        assert torch.allclose(new["p4"], old["p4"] * (3.0 if output == 1 else 1.0))
    after[1]["p4"].sum().backward()
    assert head.scales["p4"].grad != 0 and head.scales["p3"].grad is None


def test_an_unknown_norm():
    with pytest.raises(ValueError, match="norm='batch'"):
        FCOSPredictionNetwork(2, 4, [8], norm="batch")
