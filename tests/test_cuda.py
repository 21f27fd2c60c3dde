"""On a real GPU: what it computes is what the CPU computes, and a step never waits for it.

    pytest -m cuda tests/test_cuda.py

Elsewhere these tests are skipped; ``tests/test_fake_cuda.py`` checks there what needs no values. To
try them without a GPU: ``FCOS_CUDA_TESTS_ON=cpu pytest -m cuda tests/test_cuda.py``.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import a4_helper
from a4_helper import (
    VOC2007DetectionTiny,
    evaluate_detector,
    inference_with_detector,
    train_detector,
)
from common import class_spec_nms, nms
from eecs598.data import SHAPES_CLASSES, write_shapes
from eecs598.metrics import score_matches
from eecs598.runtime import mean_over_processes, process_group
from eecs598.training import TrainingLogger, TrainingRun, load_checkpoint
from eecs598.training.checkpoint import random_states, restore_random_states
from fcos import cli
from one_stage_detector import FCOS

DEVICE = os.environ.get("FCOS_CUDA_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="asks about a GPU alone")


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """Without TF32, in which convolutions on a GPU have 10 bits by default."""
    modules = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [module.allow_tf32 for module in modules]
    for module in modules:
        module.allow_tf32 = False
    yield
    for module, allowed in zip(modules, before, strict=True):
        module.allow_tf32 = allowed


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("cuda") / "shapes", num_train=32, num_val=8)


def make_detector(num_classes: int = len(SHAPES_CLASSES), **options) -> FCOS:
    torch.manual_seed(0)
    detector = FCOS(num_classes, 16, [16], weights=None, **{"backbone": "resnet18", **options})
    nn.init.normal_(detector.pred_net.pred_cls.weight, std=0.1)  # so that scores differ
    return detector


def make_batch(size: int = 4, height: int = 128, width: int = 160) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, height, width, generator=generator)
    corners = 0.6 * height * torch.rand(size, 3, 2, generator=generator)
    sides = 10 + 0.4 * height * torch.rand(size, 3, 2, generator=generator)
    labels = torch.randint(len(SHAPES_CLASSES), (size, 3, 1), generator=generator)
    boxes = torch.cat([corners, corners + sides, labels], dim=2)
    return images, torch.cat([boxes, torch.full((size, 2, 5), -1.0)], dim=1)


def relative_error(values: Tensor, expected: Tensor) -> float:
    difference = (values.detach().cpu().double() - expected.detach().double()).norm()
    return (difference / expected.detach().double().norm().clamp(min=1e-12)).item()


# --------------------------------------------------------------------------------------------
# The same numbers
# --------------------------------------------------------------------------------------------

MORE = {
    "box_loss": "giou",
    "quality": "iou",
    "center_radius": 1.5,
    "box_stem_channels": [8, 8, 8],
    "head_norm": "group",
    "level_scales": True,
}


@pytest.mark.parametrize("options", [{"backbone": "regnet_x_400mf"}, MORE], ids=["handout", "more"])
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"),
    [(torch.float64, 1e-9, 1e-7), (torch.float32, 1e-3, 2e-2)],
)
def test_losses_and_gradients_are_those_of_the_cpu(options, dtype, loss_error, gradient_error):
    here = make_detector(**options).to(dtype)
    there = copy.deepcopy(here).to(DEVICE)
    images, boxes = (value.to(dtype) for value in make_batch())
    expected, losses = here(images, boxes), there(images.to(DEVICE), boxes.to(DEVICE))
    for name, loss in losses.items():
        assert loss.device.type == DEVICE and loss.dtype == dtype
        assert relative_error(loss, expected[name]) < loss_error, name
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    compared = 0
    for (name, parameter), other in zip(here.named_parameters(), there.parameters(), strict=True):
        if parameter.grad is not None and parameter.grad.norm() > 1e-6:
            assert relative_error(other.grad, parameter.grad) < gradient_error, name
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_detections_are_those_of_the_cpu(memory_format):
    """In double precision, in which rounding swaps no two scores."""
    here = make_detector().double().eval()
    for module in here.pred_net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # so that no two scores are nearly equal
    there = copy.deepcopy(here).to(DEVICE).to(memory_format=memory_format)
    images = make_batch()[0].double()
    expected = here.predict(images, 0.05, 0.6)
    found = there.predict(images.to(DEVICE, memory_format=memory_format), 0.05, 0.6)
    assert sum(len(each["boxes"]) for each in expected) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert {value.device.type for value in ours.values()} == {DEVICE}
        torch.testing.assert_close(ours["boxes"].cpu(), theirs["boxes"], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours["scores"].cpu(), theirs["scores"], rtol=0, atol=1e-9)
        assert torch.equal(ours["labels"].cpu(), theirs["labels"])


# --------------------------------------------------------------------------------------------
# NMS
# --------------------------------------------------------------------------------------------


def random_boxes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes; with an even seed, sides are whole numbers and IoUs tie."""
    generator = torch.Generator().manual_seed(seed)
    boxes = 100 * torch.rand(count, 4, generator=generator)
    boxes = boxes.round() if seed % 2 == 0 else boxes
    boxes[:, 2:] += boxes[:, :2] + 1
    scores = torch.rand(count, generator=generator)
    class_ids = torch.randint(20, (count,), generator=generator)
    return boxes.to(DEVICE), scores.to(DEVICE), class_ids.to(DEVICE)


def check_greedy(
    kept: Tensor, boxes: Tensor, scores: Tensor, class_ids: Tensor, threshold: float
) -> None:
    """Whether NMS kept these boxes, if an IoU within 1e-6 of the threshold may count as either."""
    assert (scores[kept].diff() <= 0).all()
    overlaps = torchvision.ops.box_iou(boxes.double(), boxes[kept].double())  # (K, kept)
    overlaps = overlaps.where(class_ids[:, None] == class_ids[kept], 0.0)
    better = scores[kept] >= scores[:, None]
    better[kept, torch.arange(len(kept), device=kept.device)] = False
    most = overlaps.where(better, 0.0).amax(dim=1)  # with a better box that was kept
    is_kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    is_kept[kept] = True
    assert (most[is_kept] <= threshold + 1e-6).all()
    assert (most[~is_kept] > threshold - 1e-6).all()


def test_nms_is_torchvisions_kernel(record_property, capsys):
    """In 300 random cases; where an IoU is at the threshold, the two may round differently."""
    generator = torch.Generator().manual_seed(0)
    differences = {"nms, whole numbers": 0, "nms": 0, "by class, whole numbers": 0, "by class": 0}
    for case in range(300):
        count = int(torch.randint(1, 600, (), generator=generator))
        threshold = (0.3, 0.5, 0.7)[case % 3]
        boxes, scores, class_ids = random_boxes(count, case)
        suffix = ", whole numbers" if case % 2 == 0 else ""

        kept = nms(boxes, scores, threshold)
        check_greedy(kept, boxes, scores, torch.zeros_like(class_ids), threshold)
        expected = torchvision.ops.nms(boxes, scores, threshold)
        differences[f"nms{suffix}"] += not torch.equal(kept, expected)

        kept = class_spec_nms(boxes, scores, class_ids, threshold)
        check_greedy(kept, boxes, scores, class_ids, threshold)
        # One class at a time, because torchvision's own way of shifting classes apart rounds.
        own = [(class_ids == label).nonzero()[:, 0] for label in class_ids.unique()]
        expected = torch.cat([i[torchvision.ops.nms(boxes[i], scores[i], threshold)] for i in own])
        expected = expected[scores[expected].argsort(descending=True)]
        differences[f"by class{suffix}"] += not torch.equal(kept, expected)
    record_property("differences", differences)
    with capsys.disabled():
        print(f"\ncases of 150 in which torchvision keeps other boxes: {differences}")
    if not ON_GPU:
        assert not any(differences.values())
    assert differences["nms"] <= 2 and differences["by class"] <= 2


def test_nms_of_nothing_and_of_very_many():
    boxes, scores, class_ids = random_boxes(0, 1)
    assert nms(boxes, scores).shape == class_spec_nms(boxes, scores, class_ids).shape == (0,)
    assert nms(boxes, scores).device.type == DEVICE

    boxes, scores, class_ids = random_boxes(100_000, 1)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    kept = nms(boxes, scores, 0.5)
    expected = torchvision.ops.nms(boxes, scores, 0.5)
    different = set(kept.tolist()) ^ set(expected.tolist())
    assert len(different) <= (0.01 * len(expected) if ON_GPU else 0)
    by_class = class_spec_nms(boxes, scores, class_ids, 0.5)
    assert len(kept) < len(by_class) < len(boxes)
    if ON_GPU:
        assert torch.cuda.max_memory_allocated() < 2 * 2**30


def test_nothing_found():
    detector = make_detector().to(DEVICE).eval()
    for found in detector.predict(make_batch()[0].to(DEVICE), 1.0, 0.6):
        assert {key: tuple(value.shape) for key, value in found.items()} == {
            "boxes": (0, 4),
            "labels": (0,),
            "scores": (0,),
        }


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


class Batches:
    """A loader that gives one batch again and again, pinned where there is a GPU."""

    def __init__(self, count: int, stop_before: int | None = None, *size: int) -> None:
        images, boxes = make_batch(*size)
        self.images = images.pin_memory() if ON_GPU else images
        self.boxes = boxes.pin_memory() if ON_GPU else boxes
        self.count, self.stop_before = count, stop_before

    def __iter__(self) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        for number in range(self.count):
            if number == self.stop_before:
                raise Killed
            yield [f"{i}.jpg" for i in range(len(self.images))], self.images, self.boxes


class Killed(Exception):
    """Stands for a process that ends without a word."""


@pytest.fixture
def precision(monkeypatch):
    """Return a function that chooses what ``amp="auto"`` stands for, whatever the processor."""

    def choose(dtype: torch.dtype) -> None:
        monkeypatch.setattr(
            "eecs598.training.optimization.network_dtype",
            lambda _device, amp: dtype if amp == "auto" else torch.float32,
        )

    return choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_is_learned_in_every_precision(dtype, precision):
    precision(dtype)
    detector = make_detector()
    detector.loss_normalizer.fill_(20.0)  # near the truth, so that it changes the loss little
    history = train_detector(
        detector,
        Batches(20, None, 2, 64, 64),
        1e-3,
        max_iters=20,
        optimizer="adamw",
        schedule="cosine",
        max_grad_norm=5.0,
        amp="auto",
        device=DEVICE,
    )
    assert sum(history["loss"][-3:]) < 0.8 * sum(history["loss"][:3])
    assert all(value.isfinite().all() for value in detector.state_dict().values())


def test_a_step_that_overflows_in_float16_is_skipped_and_the_scale_is_resumed(
    tmp_path, precision, monkeypatch
):
    precision(torch.float16)

    def far_too_large(device, amp):
        autocast, _ = original(device, amp)
        return autocast, torch.amp.GradScaler(device.type, init_scale=2.0**30)

    original = a4_helper.mixed_precision
    monkeypatch.setattr(a4_helper, "mixed_precision", far_too_large)

    def train(loader: Batches, resume: bool = False) -> FCOS:
        run = TrainingRun(
            tmp_path, {}, SHAPES_CLASSES, keep_every=1, checkpoint_every=1, resume=resume
        )
        detector = make_detector()
        train_detector(detector, loader, 1e-3, max_iters=24, amp="auto", device=DEVICE, run=run)
        return detector

    small = (2, 64, 64)
    start = {name: value.clone() for name, value in make_detector().named_parameters()}
    with pytest.raises(Killed):
        train(Batches(24, 2, *small))
    for iteration in (1, 2):  # each step was skipped, and halved the scale
        saved = load_checkpoint(tmp_path / f"checkpoint-{iteration}.pt")
        assert saved["state"]["scaler"]["scale"] == 2.0 ** (30 - iteration)
        assert all(torch.equal(saved["model"][name], value) for name, value in start.items())

    detector = train(Batches(22, None, *small), resume=True)
    third = load_checkpoint(tmp_path / "checkpoint-3.pt")
    assert third["state"]["scaler"]["scale"] == 2.0**27  # not from 2 ** 30 again
    last = load_checkpoint(tmp_path / "checkpoint.pt")
    assert 1 <= last["state"]["scaler"]["scale"] < 2.0**27
    moved = detector.pred_net.pred_box.weight.detach().cpu() - start["pred_net.pred_box.weight"]
    assert 0 < moved.abs().max() < 1


def test_a_run_goes_on_from_the_gpu_to_the_cpu_and_back(tmp_path):
    """Nine iterations in one go, and three each on the GPU, on the CPU and on the GPU again."""

    def train(folder: str, device: str, loader: Batches, resume: bool = False) -> dict:
        run = TrainingRun(tmp_path / folder, {}, SHAPES_CLASSES, checkpoint_every=1, resume=resume)
        (tmp_path / folder).mkdir(exist_ok=True)
        return train_detector(
            make_detector(frozen_batch_norm=True),
            loader,
            1e-4,
            max_iters=9,
            optimizer="adamw",
            ema_decay=0.9,
            max_grad_norm=1.0,
            device=device,
            run=run,
        )

    whole = train("whole", DEVICE, Batches(9))
    with pytest.raises(Killed):
        train("parts", DEVICE, Batches(9, stop_before=3))
    saved = load_checkpoint(tmp_path / "parts" / "checkpoint.pt")
    assert saved["iteration"] == 3
    assert {value.device.type for value in saved["model"].values()} == {"cpu"}
    with pytest.raises(Killed):
        train("parts", "cpu", Batches(6, stop_before=3), resume=True)
    parts = train("parts", DEVICE, Batches(3), resume=True)
    assert parts["iteration"] == whole["iteration"] == list(range(1, 10))
    assert parts["lr"] == whole["lr"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-2)
    ends = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts")]
    for name, value in ends[0]["model"].items():
        assert relative_error(ends[1]["model"][name], value) < 1e-2, name
    assert ends[1]["state"]["ema"]["n_averaged"] == 9


def test_random_numbers_go_on_where_they_were():
    torch.rand(1, device=DEVICE)  # a GPU has a state from its first use on
    states = random_states()
    expected = torch.rand(5, device=DEVICE)
    restore_random_states(states)
    assert torch.equal(torch.rand(5, device=DEVICE), expected)
    assert (states["cuda"] is not None) == ON_GPU


def test_one_process_with_nccl(monkeypatch):
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    values |= {"MASTER_PORT": "29513", "TORCHELASTIC_RUN_ID": "test"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    alone = make_detector().to(DEVICE)
    images, boxes = (value.to(DEVICE) for value in make_batch())
    sum(alone(images, boxes).values()).backward()
    with process_group(DEVICE) as device:
        assert device == ("cuda:0" if ON_GPU else "cpu")
        detector = make_detector().to(device)
        network = DistributedDataParallel(detector, [device] if ON_GPU else None)
        sum(network(images, boxes).values()).backward()
        total = torch.ones(3, device=device)
        torch.distributed.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
        with monkeypatch.context() as patch:
            patch.setattr("eecs598.runtime.distributed.num_processes", lambda: 2)
            assert mean_over_processes(total).tolist() == [0.5, 0.5, 0.5]  # half of one
        for parameter, other in zip(detector.parameters(), alone.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None)
            if other.grad is not None and other.grad.norm() > 1e-6:
                assert relative_error(parameter.grad, other.grad.cpu()) < 1e-2
        history = train_detector(make_detector(), Batches(2), max_iters=2, device=device)
    assert len(history["loss"]) == 2


@gpu_only
def test_batches_are_copied_from_pinned_memory_while_the_gpu_works(shapes):
    dataset = VOC2007DetectionTiny(shapes, "train", image_size=64, classes=SHAPES_CLASSES)
    loader = DataLoader(dataset, batch_size=8, num_workers=2, pin_memory=True)
    for _, images, boxes in loader:
        assert images.is_pinned() and boxes.is_pinned()
        there = images.to(DEVICE, non_blocking=True, memory_format=torch.channels_last)
        assert torch.equal(there.cpu(), images)
    # A copy that waits would wait for this product, too.
    matrix = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        matrix @ matrix
    images.to(DEVICE, non_blocking=True)
    returned = time.perf_counter() - start
    torch.cuda.synchronize()
    assert returned < 0.5 * (time.perf_counter() - start)


@gpu_only
@pytest.mark.parametrize(
    ("options", "settings", "dtype"),
    [
        ({"backbone": "regnet_x_400mf"}, {}, torch.float32),
        (
            MORE,
            {"max_grad_norm": 1.0, "ema_decay": 0.99, "optimizer": "adamw", "amp": "auto"},
            torch.bfloat16,
        ),
        ({}, {"max_grad_norm": 1.0, "ema_decay": 0.99, "amp": "auto"}, torch.float16),
    ],
)
def test_a_step_never_waits_for_the_gpu(options, settings, dtype, precision, monkeypatch):
    precision(dtype)

    class Reading(TrainingLogger):
        """Waits for the losses at the end, as every log line has to."""

        def flush(self):
            torch.cuda.set_sync_debug_mode("default")
            return super().flush()

    class Watched(Batches):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__()):
                if number == 3:  # the first steps make what the others use
                    torch.cuda.set_sync_debug_mode("error")
                yield batch

    monkeypatch.setattr(a4_helper, "TrainingLogger", Reading)
    try:
        train_detector(
            make_detector(**options),
            Watched(8),
            max_iters=8,
            log_period=100,
            device=DEVICE,
            **settings,
        )
        value = torch.ones(3, device=DEVICE)
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            value.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --------------------------------------------------------------------------------------------
# From files to results
# --------------------------------------------------------------------------------------------


def test_training_and_evaluation_on_the_generated_set(shapes, tmp_path):
    train_set, val_set = (
        VOC2007DetectionTiny(shapes, split, image_size=96, classes=SHAPES_CLASSES)
        for split in ("train", "val")
    )
    loader = DataLoader(
        train_set, batch_size=8, shuffle=True, num_workers=2, pin_memory=ON_GPU, drop_last=True
    )
    detector = make_detector()
    history = train_detector(
        detector, loader, 1e-3, max_iters=20, optimizer="adamw", max_grad_norm=5.0, device=DEVICE
    )
    losses = history["loss"]
    assert sum(losses[-5:]) < sum(losses[:5])

    thresholds = {"score_thresh": 0.05, "nms_thresh": 0.6}
    val_loader = DataLoader(val_set, pin_memory=ON_GPU)
    predictions, targets = inference_with_detector(
        detector, val_loader, val_set.idx_to_class, **thresholds, output_dir=tmp_path, device=DEVICE
    )
    assert len(predictions) == len(targets) == len(val_set)
    assert {value.device.type for found in predictions for value in found.values()} == {"cpu"}
    assert len(list((tmp_path / "detection-results").glob("*.txt"))) == len(val_set)

    there = evaluate_detector(detector, val_set, **thresholds, device=DEVICE, num_workers=2)
    here = evaluate_detector(detector, val_set, **thresholds, device="cpu")
    counts = [sum(len(found["boxes"]) for found in each.predictions) for each in (there, here)]
    assert counts[1] > 0 and abs(counts[0] - counts[1]) <= 0.01 * counts[1] + 1
    scores = [score_matches(each.matches)["mAP"] for each in (there, here)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_the_command_line(shapes, tmp_path, capsys):
    out, common_options = tmp_path / "run", ["--device", DEVICE, "--workers", "0"]
    train = ["train", "--data", str(shapes), "--out", str(out), "--weights", "none"]
    train += ["--batch-size", "4", "--image-size", "64", "--fpn-channels", "8", "--stem", "8"]
    assert cli.main([*train, "--iters", "4", "--ema-decay", "0.9", *common_options]) == 0
    description = json.loads((out / "run.json").read_text())["environment"][-1]
    assert description["device"] == DEVICE
    checkpoint = str(out / "checkpoint.pt")
    evaluate = ["eval", checkpoint, "--data", str(shapes), *common_options]
    assert cli.main([*evaluate, "--json", str(tmp_path / "metrics.json")]) == 0
    metrics = [
        json.loads(p.read_text())["mAP"] for p in (out, tmp_path) for p in [p / "metrics.json"]
    ]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.01)
    image = str(next((shapes / "JPEGImages").glob("*.jpg")))
    predict = ["predict", checkpoint, image, "--device", DEVICE, "--out", str(tmp_path / "out")]
    assert cli.main(predict) == 0


# What the network stands for in the sandbox of a GPU machine: no download, at once.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


@pytest.mark.parametrize("schedule", ["full", "quick"])
def test_the_notebook_as_a_script(shapes, tmp_path, schedule):
    """All cells, without Jupyter; both training runs are cut to 50 iterations."""
    iterations = 50 if ON_GPU else 2
    notebook = json.loads((ROOT / "one_stage_detector.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    source = re.sub(r"(?m)^%.*$", "", "\n".join(sources))
    source = source.replace("settings.overfit_iters", str(iterations))
    # What it learns in a few iterations is not asked here.
    source, count = re.subn(r"(?m)^assert late < 0\.8 \* early$", "", source)
    assert count == 1
    if not ON_GPU:
        source = source.replace("torch.cuda.is_available()", "False")
    script = tmp_path / "notebook.py"
    script.write_text(f'if __name__ == "__main__":\n    exec({source!r})\n', encoding="utf-8")
    environment = os.environ | NO_NETWORK
    environment |= {"FCOS_DATA": str(shapes), "FCOS_SCHEDULE": schedule, "MPLBACKEND": "agg"}
    python_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"FCOS_TRAIN_ITERS": str(iterations), "PYTHONPATH": os.pathsep.join(python_path)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert ("Good to go: " in done.stdout) == ON_GPU
    assert f"[Iter {iterations}]" in done.stdout and "mAP@0.5:" in done.stdout
    assert (tmp_path / "runs/notebook/report.html").stat().st_size > 0


def test_onnx_runtime_gives_the_same_outputs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    provider = "CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}")

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.detector = make_detector().eval()

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            outputs = self.detector.network_outputs(images)
            return tuple(value for part in outputs[1:] for value in part.values())

    network, images = Network(), make_batch()[0]
    torch.onnx.export(network, (images,), tmp_path / "network.onnx", dynamo=True)
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=[provider])
    assert session.get_providers()[0] == provider
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = network.to(DEVICE)(images.to(DEVICE))
    for ours, theirs in zip(expected, found, strict=True):
        assert relative_error(ours, torch.from_numpy(theirs)) < 1e-3
