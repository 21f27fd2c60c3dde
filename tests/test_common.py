"""Interface of a detector, backbone and pyramid, locations, NMS, checks of batches."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchvision
from torch import nn

import common
from a4_helper import iterate_detections, train_detector
from common import (
    DetectorBackboneWithFPN,
    PretrainedWeightsWarning,
    check_training_batch,
    class_spec_nms,
    get_fpn_location_coords,
    nms,
)

# --------------------------------------------------------------------------------------------
# Interface of a detector
# --------------------------------------------------------------------------------------------


class LeastDetector(nn.Module):
    """The two calls of ``Detector`` and none of its optional abilities."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, gt_boxes=None, *, test_score_thresh=0.0, test_nms_thresh=0.0):
        if self.training:
            return {"loss": (self.scale * images.mean()) ** 2 + 0 * gt_boxes.sum()}
        return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def test_a_detector_needs_no_more_than_two_calls():
    detector = LeastDetector()
    batch = (["a.jpg"], torch.ones(1, 3, 8, 8), torch.full((1, 2, 5), -1.0))
    history = train_detector(detector, [batch], max_iters=3, log_period=3)
    assert history["loss"][0] == pytest.approx(4.0) and detector.scale < 2
    ((path, _, prediction, target),) = iterate_detections(detector, [batch], 0.4, 0.5)
    assert path == "a.jpg" and len(prediction["boxes"]) == len(target["boxes"]) == 0


# --------------------------------------------------------------------------------------------
# Backbone and pyramid
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone() -> DetectorBackboneWithFPN:
    return DetectorBackboneWithFPN(16, weights=None).eval()


def test_building_prints_the_shapes_of_the_stages(capsys):
    DetectorBackboneWithFPN(8, weights=None)
    printed = capsys.readouterr().out
    for shape in ("(2, 64, 28, 28)", "(2, 160, 14, 14)", "(2, 400, 7, 7)"):
        assert shape in printed


def test_building_leaves_mode_and_batch_norm_alone():
    model = DetectorBackboneWithFPN(8, weights=None)
    assert model.training and model.backbone.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.num_batches_tracked == 0
        assert norm.running_mean.abs().max() == 0


def test_pyramid_has_three_lateral_and_three_output_convolutions(backbone):
    kernels = [module.kernel_size for module in backbone.fpn_params.values()]
    assert sorted(kernels) == [(1, 1)] * 3 + [(3, 3)] * 3
    assert backbone.fpn_strides == {"p3": 8, "p4": 16, "p5": 32}
    assert backbone.out_channels == 16


@pytest.mark.parametrize("height, width", [(64, 64), (224, 224), (225, 353), (97, 640), (33, 31)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pyramid_shapes_at_any_size(backbone, height, width, batch_size):
    with torch.no_grad():
        pyramid = backbone(torch.rand(batch_size, 3, height, width))
    assert list(pyramid) == ["p3", "p4", "p5"]
    for level, stride in backbone.fpn_strides.items():
        expected = (batch_size, 16, -(-height // stride), -(-width // stride))
        assert pyramid[level].shape == expected


def test_the_pyramid_is_the_formula(backbone):
    """Where sides are multiples of 32, upsampling repeats every cell twice in each direction."""
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        stages, pyramid = backbone.backbone(images), backbone(images)
        merged = backbone.fpn_params["lateral_c5"](stages["c5"])
        assert torch.equal(pyramid["p5"], backbone.fpn_params["output_p5"](merged))
        for number in (4, 3):
            above = merged.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            merged = backbone.fpn_params[f"lateral_c{number}"](stages[f"c{number}"]) + above
            expected = backbone.fpn_params[f"output_p{number}"](merged)
            torch.testing.assert_close(pyramid[f"p{number}"], expected)


def test_coarse_levels_reach_fine_ones(backbone):
    """p3 depends on the lateral of c5, so the top-down path is connected."""
    pyramid = backbone(torch.rand(1, 3, 64, 64))
    weight = backbone.fpn_params["lateral_c5"].weight
    (gradient,) = torch.autograd.grad(pyramid["p3"].sum(), weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet18", (128, 256, 512)),
        ("resnet50", (512, 1024, 2048)),
        ("mobilenet_v3_small", (24, 48, 576)),
        ("shufflenet_v2_x0_5", (48, 96, 1024)),
        ("convnext_tiny", (192, 384, 768)),
    ],
)
def test_other_torchvision_backbones(name, channels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.fx speaks of nodes that only training has
        model = DetectorBackboneWithFPN(8, backbone=name, weights=None).eval()
    laterals = [model.fpn_params[f"lateral_c{i}"].in_channels for i in (3, 4, 5)]
    assert tuple(laterals) == channels
    with torch.no_grad():
        shapes = [tuple(feat.shape[-2:]) for feat in model(torch.rand(1, 3, 96, 64)).values()]
    assert shapes == [(12, 8), (6, 4), (3, 2)]


def test_bottleneck_backbone_takes_the_end_of_each_stage():
    """The first convolution of a bottleneck has the stride of the stage before it."""
    model = torchvision.models.get_model("resnet50", weights=None)
    assert common._find_stages(model, "resnet50") == {
        "c3": "layer2",
        "c4": "layer3",
        "c5": "layer4",
    }


def test_timm_backbone():
    pytest.importorskip("timm")
    model = DetectorBackboneWithFPN(8, backbone="timm:tf_efficientnet_lite0", weights=None).eval()
    laterals = [model.fpn_params[f"lateral_c{i}"].in_channels for i in (3, 4, 5)]
    assert laterals == [40, 112, 320]


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_net", "not a classification network"),
        ("fasterrcnn_resnet50_fpn", "not a classification network"),
        ("alexnet", "stride 8, 16 and 32"),
        ("vit_b_16", "any size"),
    ],
)
def test_unsuitable_backbones_are_named(name, words):
    with pytest.raises(ValueError, match=words) as error:
        DetectorBackboneWithFPN(8, backbone=name, weights=None)
    assert name in str(error.value)


def test_timm_features_stay_in_place_whatever_the_size_of_the_image():
    """TensorFlow's "same" padding would move them: it depends on whether a side is even."""
    pytest.importorskip("timm")
    model = DetectorBackboneWithFPN(8, backbone="timm:tf_efficientnet_lite0", weights=None)
    images = torch.rand(1, 3, 53, 85)
    filled_up = nn.functional.pad(images, (0, 11, 0, 11))
    with torch.no_grad():
        features, expected = model.eval().backbone(images), model.backbone(filled_up)
    for stage, (height, width) in {"c3": (7, 11), "c4": (4, 6), "c5": (2, 3)}.items():
        assert features[stage].shape[-2:] == (height, width)
        assert torch.equal(features[stage], expected[stage][..., :height, :width])


@pytest.mark.parametrize("backbone", ["regnet_x_400mf", "timm:tf_efficientnet_lite0"])
def test_stochastic_depth_leaves_out_blocks_in_training_alone(backbone):
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    model = DetectorBackboneWithFPN(8, backbone=backbone, weights=None, drop_path_rate=0.9)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    rates += [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates == sorted(rates) and 0.7 < rates[-1] <= 0.9
    images = torch.rand(1, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        runs = [model(images)["p5"] for _ in range(2)]
        assert not torch.equal(*runs)
        model.eval()
        assert torch.equal(model(images)["p5"], model(images)["p5"])


def test_stochastic_depth_changes_no_weights_and_no_prediction():
    model, plain = (
        DetectorBackboneWithFPN(8, weights=None, drop_path_rate=rate).eval() for rate in (0.5, 0.0)
    )
    model.load_state_dict(plain.state_dict())
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images)["p5"], plain(images)["p5"])


def test_stochastic_depth_needs_residual_blocks_that_it_knows():
    with pytest.raises(ValueError, match=r"drop_path_rate=0\.1 is for RegNets and networks of"):
        DetectorBackboneWithFPN(8, backbone="resnet18", weights=None, drop_path_rate=0.1)


def test_unknown_timm_network():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no network"):
        DetectorBackboneWithFPN(8, backbone="timm:no_such_net", weights=None)


def test_weights_from_a_file(tmp_path):
    reference = torchvision.models.get_model("regnet_x_400mf", weights=None)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = DetectorBackboneWithFPN(8, weights=tmp_path / "weights.pth")
    loaded = model.backbone.state_dict()
    assert loaded and all(torch.equal(loaded[k], reference.state_dict()[k]) for k in loaded)


def test_timm_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm")
    reference = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    model = DetectorBackboneWithFPN(
        8, backbone="timm:tf_efficientnet_lite0", weights=tmp_path / "weights.pth"
    )
    loaded = model.backbone.model.state_dict()
    assert loaded and all(torch.equal(loaded[k], reference.state_dict()[k]) for k in loaded)


@pytest.mark.parametrize("name", ["regnet_x_400mf", "timm:tf_efficientnet_lite0"])
def test_weights_of_another_network(tmp_path, name):
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    other = torchvision.models.get_model("resnet18", weights=None)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold"):
        DetectorBackboneWithFPN(8, backbone=name, weights=tmp_path / "other.pth")


def test_weights_file_that_is_missing_or_garbage(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        DetectorBackboneWithFPN(8, weights=tmp_path / "nowhere.pth")
    (tmp_path / "garbage.pth").write_bytes(b"not a state dict")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        DetectorBackboneWithFPN(8, weights=tmp_path / "garbage.pth")


def test_without_network_the_backbone_builds_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no cached weights
    monkeypatch.setattr(
        "torch.hub.download_url_to_file",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no route to host")),
    )
    with pytest.warns(PretrainedWeightsWarning, match="RANDOM weights") as caught:
        model = DetectorBackboneWithFPN(8)
    assert "no route to host" in str(caught[0].message)
    assert model(torch.rand(1, 3, 64, 64))["p3"].shape == (1, 8, 8, 8)


def test_pretrained_weights_come_from_the_cache(monkeypatch, tmp_path):
    """The real loading code, on a file where the download would have put it."""
    reference = torchvision.models.get_model("regnet_x_400mf", weights=None)
    url = torchvision.models.get_model_weights("regnet_x_400mf").DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(reference.state_dict(), folder / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainedWeightsWarning)
        model = DetectorBackboneWithFPN(8)
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[k], reference.state_dict()[k]) for k in loaded)


# --------------------------------------------------------------------------------------------
# Locations
# --------------------------------------------------------------------------------------------


def test_locations_are_x_major():
    located = get_fpn_location_coords({"p3": (2, 8, 28, 28)}, {"p3": 8, "p4": 16})["p3"]
    assert located.shape == (28 * 28, 2)
    assert located[:3].tolist() == [[4, 4], [4, 12], [4, 20]]
    assert located[28].tolist() == [12, 4]


@pytest.mark.parametrize("height, width", [(3, 7), (7, 3), (1, 1)])
def test_x_spans_the_width_and_y_the_height(height, width):
    located = get_fpn_location_coords({"p4": (1, 8, height, width)}, {"p4": 16})["p4"]
    expected = [[16 * (j + 0.5), 16 * (i + 0.5)] for j in range(width) for i in range(height)]
    assert located.tolist() == expected


def test_location_dtype():
    located = get_fpn_location_coords({"p3": (1, 8, 2, 2)}, {"p3": 8}, dtype=torch.float64)
    assert located["p3"].dtype == torch.float64


def test_location_errors():
    with pytest.raises(ValueError, match="no stride was given for level 'p6'"):
        get_fpn_location_coords({"p6": (1, 8, 2, 2)}, {"p3": 8})
    with pytest.raises(ValueError, match="expected .B, channels, H, W"):
        get_fpn_location_coords({"p3": (2, 2)}, {"p3": 8})


# --------------------------------------------------------------------------------------------
# NMS
# --------------------------------------------------------------------------------------------


def random_boxes(count: int, rng: torch.Generator, scale: float = 100.0) -> torch.Tensor:
    """Boxes on whole pixels, so that many IoUs are equal or fall just on a threshold."""
    corners = (scale * torch.rand(count, 2, generator=rng)).round()
    sides = (0.4 * scale * torch.rand(count, 2, generator=rng)).round()  # some are 0
    return torch.cat([corners, corners + sides], dim=1)


@pytest.mark.parametrize("iou_threshold", [0.3, 0.5, 0.7])
def test_nms_on_the_cell_of_the_assignment(rng, iou_threshold):
    boxes = (100.0 * torch.rand(5000, 4, generator=rng)).round()
    boxes[:, 2:] += boxes[:, :2] + 1.0
    scores = torch.randn(5000, generator=rng)
    kept = nms(boxes, scores, iou_threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, torchvision.ops.nms(boxes, scores, iou_threshold))


def test_nms_is_torchvisions_on_many_cases(rng):
    """Tied scores, duplicates, touching and degenerate boxes, thresholds 0 and 1."""
    for case in range(1000):
        most = 60 if case % 5 else 300  # more than a block
        count = int(torch.randint(0, most, (), generator=rng))
        boxes = random_boxes(count, rng, scale=10.0 if case % 2 else 40.0)
        if case % 3 == 0:
            boxes = boxes.repeat(2, 1)
        scores = torch.randint(0, 6, (len(boxes),), generator=rng) / 5.0
        threshold = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.7, 1.0)[case % 8]
        kept = nms(boxes, scores, threshold)
        assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold)), case


def test_nms_with_boxes_that_are_none(rng):
    """Negative, infinite and NaN sides overlap nothing, and hide no overlap of other boxes."""
    boxes = random_boxes(600, rng, scale=20.0)
    changed = torch.rand(600, 4, generator=rng) < 0.1
    shift = torch.tensor([-5.0, -40.0, -math.inf, math.inf, math.nan])
    boxes += torch.where(changed, shift[torch.randint(0, 5, (600, 4), generator=rng)], 0.0)
    scores = torch.rand(600, generator=rng)
    for threshold in (0.0, 0.3, 0.7):
        kept = nms(boxes, scores, threshold)
        assert torch.equal(kept, torchvision.ops.nms(boxes, scores, threshold))


def test_nms_compares_with_the_threshold_as_given():
    """float32 has 0.7 below, and 0.3 above, the double that torchvision compares with."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7], [0, 0, 10, 3]])
    scores = torch.tensor([3.0, 2.0, 1.0])
    for threshold in (0.7, 0.3, 3 / 7):
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert torch.equal(nms(boxes, scores, threshold), expected)


def test_nms_longer_chains_than_a_block():
    """Each box suppresses the next one only if it was not itself suppressed."""
    start = torch.arange(1000.0)[:, None]
    boxes = torch.cat([start, torch.zeros(1000, 1), start + 3, torch.ones(1000, 1)], dim=1)
    scores = torch.linspace(1, 0, 1000)
    assert nms(boxes, scores, 0.4).tolist() == list(range(0, 1000, 2))


def test_nms_leaves_its_inputs_alone(rng):
    boxes, scores = random_boxes(50, rng), torch.rand(50, generator=rng)
    copies = boxes.clone(), scores.clone()
    nms(boxes, scores)
    assert torch.equal(boxes, copies[0]) and torch.equal(scores, copies[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_precisions(rng, dtype):
    boxes = random_boxes(200, rng).to(dtype)
    scores = torch.rand(200, generator=rng).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torchvision.ops.nms(boxes.to(wide), scores.to(wide), 0.5)
    assert torch.equal(nms(boxes, scores, 0.5), expected)


def test_nms_of_nothing():
    empty = torch.zeros(0, 4), torch.zeros(0)
    assert nms(*empty).shape == (0,) and nms(*empty).dtype == torch.int64
    assert class_spec_nms(*empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_class_specific_nms_is_nms_of_each_class(rng, offset, share):
    """Also far from the origin, where shifting classes apart would round the boxes.

    And with a large share of the boxes in one class of many, from none to a few boxes each.
    """
    boxes = random_boxes(2000, rng) + offset
    scores = torch.rand(2000, generator=rng)
    classes = torch.randint(0, 400 if share else 20, (2000,), generator=rng)
    classes[torch.rand(2000, generator=rng) < share] = 7
    expected = []
    for label in range(400):
        members = (classes == label).nonzero().flatten()
        expected.append(members[torchvision.ops.nms(boxes[members], scores[members], 0.5)])
    kept = class_spec_nms(boxes, scores, classes, 0.5)
    assert sorted(kept.tolist()) == sorted(torch.cat(expected).tolist())
    assert (scores[kept].diff() <= 0).all()


@pytest.mark.parametrize(
    "boxes, scores, threshold, words",
    [
        (torch.zeros(3, 5), torch.zeros(3), 0.5, r"expected \(K, 4\)"),
        (torch.zeros(3, 4), torch.zeros(2), 0.5, r"expected \(3,\)"),
        (torch.zeros(3, 4), torch.zeros(3), -0.1, "from 0 to 1"),
        (torch.zeros(3, 4), torch.zeros(3), 1.1, "from 0 to 1"),
        (torch.zeros(3, 4), torch.zeros(3), float("nan"), "from 0 to 1"),
    ],
)
def test_nms_errors(boxes, scores, threshold, words):
    with pytest.raises(ValueError, match=words):
        nms(boxes, scores, threshold)
    with pytest.raises(ValueError, match=words):
        class_spec_nms(boxes, scores, torch.zeros(len(scores)), threshold)


def test_class_specific_nms_wants_a_class_for_each_box():
    with pytest.raises(ValueError, match="class_ids"):
        class_spec_nms(torch.zeros(3, 4), torch.zeros(3), torch.zeros(2))


# --------------------------------------------------------------------------------------------
# Checks of batches
# --------------------------------------------------------------------------------------------


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, 3, 32, 32), torch.tensor([[[1.0, 2, 20, 30, 3], [-1, -1, -1, -1, -1]]])


def test_a_good_batch_passes():
    check_training_batch(*batch(), num_classes=4)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda images, boxes: (images[0], boxes), r"expected \(B, 3, H, W\)"),
        (lambda images, boxes: (images[:, :1], boxes), r"expected \(B, 3, H, W\)"),
        (lambda images, boxes: ((images * 255).byte(), boxes), "floating-point"),
        (lambda images, boxes: (images / 0 - images / 0, boxes), "NaN or infinite"),
        (lambda images, boxes: (images, boxes[..., :4]), r"expected \(1, M, 5\)"),
        (lambda images, boxes: (images, boxes[0]), r"expected \(1, M, 5\)"),
        (lambda images, boxes: (images, boxes.repeat(2, 1, 1)), r"expected \(1, M, 5\)"),
        (lambda images, boxes: (images, boxes + 1), "num_classes=4"),
        (lambda images, boxes: (images, boxes[..., [2, 1, 0, 3, 4]]), "x2 < x1"),
    ],
)
def test_bad_batches(spoil, words):
    with pytest.raises(ValueError, match=words):
        check_training_batch(*spoil(*batch()), num_classes=4)
