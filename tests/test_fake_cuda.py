"""Training and prediction on a GPU that does not exist: no mixed devices, no waiting.

A step must not wait for the GPU: meanwhile nothing would be prepared for it. The code that is run
here is that of ``train_detector`` and ``FCOS``, and wrong variants of it, which have to be noticed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import a4_helper
import common
import one_stage_detector
from one_stage_detector import BOX_LOSSES, FCOS, QUALITY_TARGETS, FCOSLoss, NetworkOutputs
from tests.detectors import STRIDES, pad
from tests.fake_cuda import FakeCuda, Waited, backward, fake_cuda

# The average of the weights is a copy of the model, and that of a tensor without values warns.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

HALF = {torch.bfloat16, torch.float16}


def make_detector(module: types.ModuleType = one_stage_detector, **options: Any) -> FCOS:
    return module.FCOS(3, 8, [8], weights=None, **{"backbone": "resnet18", **options})


class Batches:
    """A loader of three batches on the CPU. From the first on, nothing may wait for the GPU."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu = gpu

    def __iter__(self) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        self.gpu.may_wait = False
        for _ in range(3):
            yield ["a.jpg", "b.jpg"], *self.first()

    def first(self) -> tuple[Tensor, Tensor]:
        boxes = torch.stack([pad([5, 5, 50, 50, 1], [20, 8, 30, 60, 2]), pad()])
        return torch.rand(2, 3, 64, 64), boxes


def train(
    gpu: FakeCuda, detector: FCOS, helper: types.ModuleType = a4_helper, **options: Any
) -> list[dict[str, Tensor]]:
    """Train for three steps, and return the losses of each, still on the GPU."""
    recorded: list[dict[str, Tensor]] = []

    class Recorder(helper.TrainingLogger):
        """Keeps what it gets, and leaves out the log line, which has to wait for the losses."""

        def step(self, iteration, learning_rate, losses, paths):
            super().step(iteration, learning_rate, losses, paths)
            recorded.append(self.pending[-1].losses)

        def flush(self):
            return self.history

        def log(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helper, "TrainingLogger", Recorder)
        patch.setattr(type(detector.criterion), "__call__", watched(gpu, type(detector.criterion)))
        helper.train_detector(detector, Batches(gpu), max_iters=3, device="cuda", **options)
    return recorded


def watched(gpu: FakeCuda, criterion: type) -> Callable[..., dict[str, Tensor]]:
    """The call of a criterion, after which ``gpu.results`` are those of the criterion alone."""
    original = criterion.__call__

    def call(*args: Any) -> dict[str, Tensor]:
        gpu.results.clear()
        losses = original(*args)
        half = set().union(*(gpu.results[dtype] for dtype in HALF))
        # The outputs of the network are joined as they are.
        assert half <= {"cat"}, f"losses are computed in half precision: {half - {'cat'}}"
        return losses

    return call


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------

# What goes on top of the assignment's own detector and recipe.
MORE = {
    "backbone": "timm:resnet10t",
    "box_loss": "giou",
    "quality": "iou",
    "center_radius": 1.5,
    "box_stem_channels": [8, 8, 8],
    "head_norm": "group",
    "head_dropout": 0.1,
    "drop_path_rate": 0.1,
    "level_scales": True,
}
STRONG = {"optimizer": "adamw", "schedule": "cosine", "warmup_iters": 1}
EXTRAS = {"max_grad_norm": 1.0, "ema_decay": 0.9}


@pytest.mark.parametrize(
    ("model", "solver", "dtype"),
    [
        ({"backbone": "regnet_x_400mf"}, {}, torch.float32),
        (MORE, STRONG | EXTRAS, torch.float32),
        (MORE | {"frozen_batch_norm": True}, STRONG | EXTRAS, torch.bfloat16),
        ({}, EXTRAS | {"backbone_lr_factor": 0.1}, torch.float16),
        (MORE, STRONG, torch.float16),
    ],
)
def test_a_step_never_waits_for_the_gpu(model, solver, dtype):
    detector = make_detector(**model)
    seen = []
    detector.pred_net.pred_cls.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    amp = "off" if dtype == torch.float32 else "auto"
    with fake_cuda(bfloat16=dtype == torch.bfloat16) as gpu:
        steps = train(gpu, detector, amp=amp, **solver)
        gradients = [p.grad for p in detector.parameters() if p.requires_grad]

    assert seen == 9 * [dtype]  # three levels, three steps
    for losses in steps:
        assert set(losses) == {"loss", "loss_cls", "loss_box", "loss_ctr"}
        for loss in losses.values():
            assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    for gradient in gradients:
        assert (gradient.device.type, gradient.dtype) == ("cuda", torch.float32)
    assert all(value.device.type == "cuda" for value in detector.state_dict().values())
    assert gpu.ran["_fused_adamw_" if "optimizer" in solver else "_fused_sgd_"] >= 3
    assert gpu.ran["_amp_update_scale_"] == (3 if dtype == torch.float16 else 0)
    assert (gpu.ran["_foreach_lerp_"] > 0) == ("ema_decay" in solver)


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
@pytest.mark.parametrize("quality", QUALITY_TARGETS)
def test_no_loss_waits_for_the_gpu(box_loss, quality):
    criterion = FCOSLoss(STRIDES, box_loss, 1.5, quality)
    with fake_cuda() as gpu:
        locations = common.get_fpn_location_coords(
            {level: (2, 8, 64 // stride, 64 // stride) for level, stride in STRIDES.items()},
            STRIDES,
            device="cuda",
        )
        outputs = NetworkOutputs(
            locations,
            *(
                {
                    level: torch.rand(2, len(points), width, device="cuda").requires_grad_()
                    for level, points in locations.items()
                }
                for width in (3, 4, 1)
            ),
        )
        gt_boxes, normalizer = pad([5, 5, 50, 50, 1]).expand(2, 4, 5).to("cuda"), torch.ones(())
        normalizer = normalizer.to("cuda")
        gpu.may_wait = False
        losses = criterion(outputs, gt_boxes, normalizer)
        sum(losses.values()).backward()
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    for prediction in outputs[1:]:
        assert all(values.grad.device.type == "cuda" for values in prediction.values())


def mutant(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """The module after changes of its text."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
    changed = types.ModuleType(module.__name__)
    exec(compile(source, module.__file__, "exec"), vars(changed))
    return changed


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("scaler.update()", "scaler.update(); loss.item()", "_local_scalar_dense waits"),
        ("scaler.update()", "scaler.update(); loss.detach().cpu()", "_to_copy waits"),
        ("if max_grad_norm is not None:", "if loss > 100:", "_local_scalar_dense waits"),
        ("gt_boxes.to(device, non_blocking=True)", "gt_boxes.to(device)", "_to_copy waits"),
        ("gt_boxes = gt_boxes.to(device, non_blocking=True)", "pass", "_to_copy waits"),
        (
            "clip_grad_norm_(detector.parameters(), max_grad_norm)",
            "clip_grad_norm_(detector.parameters(), max_grad_norm, error_if_nonfinite=True)",
            "_local_scalar_dense waits",
        ),
    ],
)
def test_a_wrong_loop_is_noticed(old, new, words):
    helper = mutant(a4_helper, (old, new))
    with fake_cuda() as gpu, pytest.raises((Waited, RuntimeError), match=words):
        train(gpu, make_detector(), helper, amp="auto", **EXTRAS)


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        (
            "torch.arange(class_logits.shape[-1], device=class_logits.device)",
            "torch.arange(class_logits.shape[-1])",
            RuntimeError,
            "devices",
        ),
        (
            "loss_box = loss_box.masked_fill(background[..., None], 0.0)",
            "loss_box = loss_box[~background]",
            DynamicOutputShapeException,
            "nonzero",
        ),
        (
            "loss_ctr = loss_ctr.masked_fill(background, 0.0)",
            "loss_ctr[background] = 0 * loss_ctr[0, :1].expand(3)",
            Waited,
            "index_put_ with a mask",
        ),
        (
            "normalizer.clamp(min=1.0) * batch_size",
            "normalizer.clamp(min=1.0) * torch.tensor(batch_size, device=normalizer.device)",
            Waited,
            "_to_copy",
        ),
        (
            "normalizer.clamp(min=1.0) * batch_size",
            "max(float(normalizer), 1.0) * batch_size",
            Waited,
            "_local_scalar_dense",
        ),
        (
            'if images.device.type == "cpu":\n                check_training_batch',
            "if True:\n                check_training_batch",
            Waited,
            "_local_scalar_dense",
        ),
        (
            "return at_least_float32(torch.cat(list(predictions_per_level.values()), dim=1))",
            "return torch.cat(list(predictions_per_level.values()), dim=1)",
            AssertionError,
            "half precision: .*sigmoid",
        ),
    ],
)
def test_a_wrong_detector_is_noticed(old, new, error, words):
    module = mutant(one_stage_detector, (old, new))
    with fake_cuda() as gpu, pytest.raises(error, match=words):
        train(gpu, make_detector(module), amp="auto")


def test_what_pytorch_offers_for_the_average_and_the_optimizer_would_wait(monkeypatch):
    """Why the average is our own, and why optimizers are fused, which need no look at overflows."""

    def usual_average(model, decay):
        return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def usual_optimizer(model, *_settings):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    monkeypatch.setattr(a4_helper, "ema", usual_average)
    with fake_cuda() as gpu, pytest.raises(Waited, match="_to_copy"):
        train(gpu, make_detector(), ema_decay=0.9)
    monkeypatch.undo()
    monkeypatch.setattr(a4_helper, "make_optimizer", usual_optimizer)
    with fake_cuda(bfloat16=False) as gpu, pytest.raises(Waited, match="_local_scalar_dense"):
        train(gpu, make_detector(), amp="auto")


def test_gradients_on_the_fake_gpu_are_those_of_pytorch():
    """The walk through the graph, tried where there are values."""
    torch.manual_seed(0)
    detector = make_detector(**MORE | {"drop_path_rate": 0.0}).train()
    losses = detector(*Batches(FakeCuda()).first())
    loss = sum(losses.values())
    parameters = [p for p in detector.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    backward(loss)
    assert sum(gradient is not None for gradient in expected) > 60
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient)


# --------------------------------------------------------------------------------------------
# Targets
# --------------------------------------------------------------------------------------------


def test_the_target_functions_never_wait():
    shapes = {level: (1, 8, 96 // stride, 64 // stride) for level, stride in STRIDES.items()}
    with fake_cuda() as gpu:
        gt_boxes = pad([5, 5, 50, 50, 1]).to("cuda")
        gpu.may_wait = False
        locations = common.get_fpn_location_coords(shapes, STRIDES, device="cuda")
        matched = one_stage_detector.fcos_match_locations_to_gt(locations, STRIDES, gt_boxes)
        nothing = one_stage_detector.fcos_match_locations_to_gt(locations, STRIDES, gt_boxes[:0])
        for level, stride in STRIDES.items():
            deltas = one_stage_detector.fcos_get_deltas_from_locations(
                locations[level], matched[level], stride
            )
            boxes = one_stage_detector.fcos_apply_deltas_to_locations(
                deltas, locations[level], stride
            )
            centerness = one_stage_detector.fcos_make_centerness_targets(deltas)
            without_class = one_stage_detector.fcos_get_deltas_from_locations(
                locations[level], matched[level][:, :4], stride
            )
            count = len(locations[level])
            for result, width in (
                (matched[level], 5),
                (nothing[level], 5),
                (deltas, 4),
                (without_class, 4),
                (boxes, 4),
            ):
                assert (result.device.type, result.shape) == ("cuda", (count, width))
            assert (centerness.device.type, centerness.shape) == ("cuda", (count,))


# --------------------------------------------------------------------------------------------
# Prediction
# --------------------------------------------------------------------------------------------


class ReachedNMS(Exception):
    """With the arguments of ``class_spec_nms``."""


def predict(module: types.ModuleType, dtype: torch.dtype) -> tuple[FakeCuda, tuple[Any, ...]]:
    """Predict for two images up to NMS; return the GPU and the arguments of NMS."""

    def nms(*arguments):
        raise ReachedNMS(*arguments)

    vars(module)["class_spec_nms"] = nms
    detector = make_detector(module).eval()
    with fake_cuda() as gpu:
        detector.to("cuda")
        images = torch.rand(2, 3, 64, 96).to("cuda")
        gpu.waits.clear()
        with (
            torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
            pytest.raises(ReachedNMS) as reached,
        ):
            detector.predict(images)
    return gpu, reached.value.args


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prediction_waits_twice_before_nms(dtype):
    """For the check of the images, and for the number of confident locations."""
    gpu, (boxes, scores, class_ids, threshold) = predict(mutant(one_stage_detector), dtype)
    assert gpu.waits == {"_local_scalar_dense": 1, "nonzero": 1}
    count = 2 * sum(64 // stride * (96 // stride) for stride in STRIDES.values())
    assert boxes.shape == (count, 4) and scores.shape == class_ids.shape == (count,)
    assert {each.device.type for each in (boxes, scores, class_ids)} == {"cuda"}
    assert (boxes.dtype, scores.dtype, class_ids.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert threshold == 0.6


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("boxes = clip_boxes_to_image(boxes, image_size)", "boxes = boxes.cpu()", RuntimeError),
        ("device=images.device,", "", RuntimeError),
        (
            "boxes, labels, scores = (each[image_ids, index] for each in (boxes, labels, scores))",
            "boxes = boxes[scores > score_thresh]",
            DynamicOutputShapeException,
        ),
    ],
)
def test_a_wrong_prediction_is_noticed(old, new, error):
    with pytest.raises(error):
        predict(mutant(one_stage_detector, (old, new)), torch.float32)


def test_the_checks_of_what_users_pass_in():
    """One look at the images; the checks before NMS look at shapes alone."""
    with fake_cuda() as gpu:
        images, boxes, scores = (torch.rand(*s).to("cuda") for s in ((2, 3, 8, 8), (4, 4), (4,)))
        gpu.waits.clear()
        common.check_images(images)
        assert gpu.waits == {"_local_scalar_dense": 1}
        common._check_nms_inputs(boxes, scores, 0.5)
        assert gpu.waits.total() == 1
        with pytest.raises(ValueError, match="expected a floating-point type"):
            common.check_images(images.to(torch.uint8))
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
            common.check_images(images[0])
