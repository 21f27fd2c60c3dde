"""FCOS as a whole: outputs, options, sizes, precisions, compilation, checks of its input."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn

import a4_helper
import one_stage_detector
from common import get_fpn_location_coords
from one_stage_detector import FCOS
from tests.detectors import STRIDES, make_fcos, pad


@pytest.fixture(scope="module")
def detector() -> FCOS:
    """Tests that train or change it build their own."""
    return make_fcos().eval()


def test_network_outputs(detector):
    with torch.no_grad():
        outputs = detector.network_outputs(torch.rand(2, 3, 70, 96))
    shapes = {"p3": (1, 8, 9, 12), "p4": (1, 8, 5, 6), "p5": (1, 8, 3, 3)}
    expected = get_fpn_location_coords(shapes, STRIDES)
    for level, locations in outputs.locations.items():
        assert torch.equal(locations, expected[level])
        assert outputs.class_logits[level].shape == (2, len(locations), 3)
        assert outputs.deltas[level].shape == (2, len(locations), 4)
        assert outputs.centerness_logits[level].shape == (2, len(locations), 1)
    assert list(outputs.locations) == list(outputs.deltas) == ["p3", "p4", "p5"]


def test_training_is_outputs_and_criterion():
    detector = make_fcos(frozen_batch_norm=True)
    images, boxes = torch.rand(2, 3, 64, 64), pad([5, 5, 50, 60, 1]).repeat(2, 1, 1)
    average = detector.loss_normalizer.clone()
    losses = detector.criterion(detector.network_outputs(images), boxes, average)
    for name, loss in detector(images, boxes).items():
        assert torch.equal(loss, losses[name])
    assert torch.equal(detector.loss_normalizer, average) and average < 150


def test_backbone_parameters_are_those_below_the_pyramid(detector):
    names = {id(parameter): name for name, parameter in detector.named_parameters()}
    found = {names[id(parameter)] for parameter in detector.backbone_parameters()}
    assert found == {name for name in names.values() if name.startswith("backbone.backbone.")}


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_norm_keeps_its_statistics(frozen):
    detector = make_fcos(frozen_batch_norm=frozen)
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    detector(torch.rand(2, 3, 64, 64), pad([5, 5, 50, 60, 1]).repeat(2, 1, 1))
    same = [torch.equal(n.running_mean, old) for n, old in zip(norms, before, strict=True)]
    assert norms and all(same) == frozen and any(same) == frozen
    assert all(norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_copy_is_in_the_same_mode(training, frozen):
    detector = make_fcos(frozen_batch_norm=frozen).train(training)
    modes = {name: module.training for name, module in detector.named_modules()}
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert {name: module.training for name, module in copied.named_modules()} == modes


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

    copied = copy.deepcopy(detector)
    nn.init.constant_(copied.pred_net.pred_cls.bias, -100)
    assert all(len(found["scores"]) == 0 for found in copied.predict(images, 0.08, 0.6))

    nn.init.constant_(detector.pred_net.pred_cls.bias, -100)  # as a step of training would
    detector.train().eval()
    assert all(len(found["scores"]) == 0 for found in detector.predict(images, 0.08, 0.6))


def test_compiled_training(monkeypatch):
    """Training alone is compiled, and gives the same; the backend is PyTorch's to test."""
    calls = []
    compiler = torch.compile

    def compile_and_count(function, **options):
        compiled = compiler(function, backend="eager", **options)

        def count(images):
            calls.append(len(images))
            return compiled(images)

        return count

    monkeypatch.setattr(torch, "compile", compile_and_count)
    images, boxes = torch.rand(2, 3, 64, 64), pad([5, 5, 40, 50, 1]).expand(2, -1, -1)
    results = []
    for compile in (False, True):
        detector = make_fcos().train()
        detector.compile_network(compile)
        losses = detector(images, boxes)
        sum(losses.values()).backward()
        results.append((losses, detector.backbone.backbone.stem[0].weight.grad, detector))
    (losses, gradient, plain), (others, other_gradient, detector) = results
    assert calls == [2]
    torch.testing.assert_close(others, losses)
    torch.testing.assert_close(other_gradient, gradient)
    assert detector.state_dict().keys() == plain.state_dict().keys()
    assert len(detector.eval()(images[:1])) == 3
    assert calls == [2]


def test_batches_of_several_sizes_are_compiled_each(monkeypatch):
    """One graph for all sizes would take the compiler more than six minutes."""
    sizes_as_inputs = []
    compiler = torch.compile

    def backend(graph, inputs):
        sizes_as_inputs.append([value for value in inputs if not isinstance(value, torch.Tensor)])
        return graph

    def compile_with_backend(function, **options):
        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_with_backend)
    detector = make_fcos().train()
    detector.compile_network()
    boxes = pad([5, 5, 40, 50, 1]).expand(2, -1, -1)
    for side in (64, 96, 64):
        detector(torch.rand(2, 3, side, side), boxes)
    assert sizes_as_inputs == [[], []]


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


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """Which module checked a batch, at each check."""
    calls: list[str] = []
    for module in (a4_helper, one_stage_detector):
        original = module.check_training_batch

        def check(*args, name=module.__name__, original=original):
            calls.append(name)
            original(*args)

        monkeypatch.setattr(module, "check_training_batch", check)
    return calls


def test_training_on_the_cpu_checks_each_batch_once(checked):
    batch = (("a.jpg",), torch.rand(1, 3, 64, 64), pad([5, 5, 50, 60, 1])[None])
    a4_helper.train_detector(make_fcos(), [batch], max_iters=3, log_period=3)
    assert checked == ["one_stage_detector"] * 3


def test_training_checks_the_batches_of_a_detector_that_does_not(checked):
    detector = make_fcos()
    detector.checks_batches = False
    batch = (("a.jpg",), torch.rand(1, 3, 64, 64), pad([5, 5, 50, 60, 3])[None])
    with pytest.raises(ValueError, match="num_classes=3"):
        a4_helper.train_detector(detector, [batch], max_iters=3)
    assert checked == ["a4_helper"]


def test_a_batch_for_another_device_is_checked_before_the_transfer(checked, monkeypatch):
    """The device "meta", whose tensors have no values, stands in for a GPU."""
    monkeypatch.setattr(
        a4_helper, "make_optimizer", lambda *args: torch.optim.SGD(args[0].parameters(), 1.0)
    )
    monkeypatch.setattr(a4_helper, "mixed_precision", lambda *args: (None, None))
    batch = (("a.jpg",), torch.rand(1, 3, 64, 64), pad([5, 5, 50, 60, 3])[None])
    with pytest.raises(ValueError, match="num_classes=3"):
        a4_helper.train_detector(make_fcos(), [batch], max_iters=1, device="meta")
    assert checked == ["a4_helper"]


def test_the_detector_looks_at_no_value_on_another_device(checked):
    detector = make_fcos().train().to("meta")
    images, boxes = torch.rand(1, 3, 64, 64).to("meta"), pad([5, 5, 50, 60, 1])[None].to("meta")
    assert all(loss.shape == () for loss in detector(images, boxes).values())
    assert checked == []
