"""Data, training loop and evaluation loop."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import functional as TF

from a4_helper import (
    VOC2007DetectionTiny,
    inference_with_detector,
    train_detector,
    unnormalize,
)
from eecs598.data.voc import build_index
from eecs598.metrics.average_precision import score_folder
from tests.detectors import make_fcos

CLASSES = ("cube", "dice")


# --------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------


def test_training_images_are_square_crops(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=32, classes=CLASSES)
    assert len(dataset) == 8
    assert dataset.class_to_idx == {"cube": 0, "dice": 1}
    assert dataset.idx_to_class == {0: "cube", 1: "dice"}
    for path, image, boxes in dataset:
        assert path.endswith(".jpg")
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        assert boxes.shape == (2, 5) and boxes.dtype == torch.float32  # the fullest image has 2


def test_validation_images_are_resized_only(small_voc):
    dataset = VOC2007DetectionTiny(small_voc, "val", image_size=48, classes=CLASSES)
    assert {tuple(image.shape) for _, image, _ in dataset} == {(3, 48, 72), (3, 72, 48)}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [(120, 60), (60, 120), (61, 100)])
def test_boxes_follow_the_pixels(voc_folder, split, size):
    """What is painted inside a box is found inside the box of the item."""
    picture = Image.new("RGB", size, (0, 0, 0))
    x, y = size[0] // 2 - 12, size[1] // 2 - 15
    picture.paste((255, 255, 255), (x, y, x + 20, y + 30))
    folder = voc_folder({split: {"a": (picture, [("cube", x, y, x + 20, y + 30)])}})
    _, image, boxes = VOC2007DetectionTiny(folder, split, image_size=90, classes=CLASSES)[0]
    bright = unnormalize(image).mean(0) > 0.5
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert boxes[0, :4].tolist() == pytest.approx([float(v) for v in painted], abs=1.1)
    assert boxes[0, 4] == 0


def test_boxes_that_the_crop_removes_or_cuts(voc_folder):
    objects = [("cube", 0, 10, 15, 30), ("dice", 10, 5, 50, 35), ("cube", 70, 0, 80, 40)]
    folder = voc_folder({"train": {"a": (Image.new("RGB", (80, 40)), objects)}})
    _, _, boxes = VOC2007DetectionTiny(folder, "train", image_size=40, classes=CLASSES)[0]
    assert boxes[0].tolist() == [-1] * 5
    assert boxes[1].tolist() == [0, 5, 30, 35, 1]
    assert boxes[2].tolist() == [-1] * 5


def test_padding_fits_the_fullest_image(voc_folder):
    many = [("cube", 1 + i % 30, 2, 9 + i % 30, 12) for i in range(45)]
    picture = Image.new("RGB", (40, 40))
    folder = voc_folder({"train": {"a": (picture, many), "b": (picture, []), "c": (picture, many)}})
    dataset = VOC2007DetectionTiny(folder, "train", image_size=40, classes=CLASSES)
    _, images, boxes = next(iter(DataLoader(dataset, batch_size=3)))
    assert images.shape == (3, 3, 40, 40)
    assert boxes.shape == (3, 45, 5)
    assert (boxes[1] == -1).all()


@pytest.mark.parametrize("prefix", ["./here/", "", "./"])
def test_the_courses_json_is_read(small_voc, prefix):
    index = build_index(small_voc, "train")[:3]
    entries = [[prefix + path.removeprefix("./here/"), objects] for path, objects in index]
    (small_voc / "voc07_train.json").write_text(json.dumps(entries))
    assert len(VOC2007DetectionTiny(small_voc, "train", classes=CLASSES)) == 3


def test_json_and_xml_give_the_same_items(voc2007_dir, tmp_path):
    from_json = VOC2007DetectionTiny(voc2007_dir, "val")
    (tmp_path / "VOCdevkit").symlink_to(voc2007_dir / "VOCdevkit")
    from_xml = VOC2007DetectionTiny(tmp_path, "val")
    assert len(from_json) == len(from_xml) == 1255
    for instance, other in zip(from_json.instances, from_xml.instances, strict=True):
        assert instance.path.name == other.path.name and instance.size == other.size
        assert torch.equal(instance.boxes, other.boxes)
        assert torch.equal(instance.difficult, other.difficult)
    assert sum(int(instance.difficult.sum()) for instance in from_json.instances) == 845


def test_normalization_is_imagenets_and_can_be_undone(small_voc):
    path, image, _ = VOC2007DetectionTiny(small_voc, "val", image_size=64, classes=CLASSES)[0]
    with Image.open(path) as picture:
        pixels = TF.to_tensor(picture)
    assert torch.allclose(unnormalize(image), pixels, atol=1e-6)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(image, (pixels - mean) / std, atol=1e-6)


def test_data_errors(small_voc, tmp_path):
    with pytest.raises(ValueError, match="cube"):
        VOC2007DetectionTiny(small_voc, "train")  # its classes are not VOC's
    with pytest.raises(ValueError, match="nowhere"):
        VOC2007DetectionTiny(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="voc07_train.json"):
        VOC2007DetectionTiny(tmp_path, "train")
    with pytest.raises(ValueError, match="image_size=0"):
        VOC2007DetectionTiny(small_voc, "train", image_size=0, classes=CLASSES)
    (small_voc / "JPEGImages/0000.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"0000\.jpg can't be read as an image"):
        VOC2007DetectionTiny(small_voc, "train", classes=CLASSES)[0]


# --------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Any module with the right interface can be trained and evaluated."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, gt_boxes=None, test_score_thresh=None, test_nms_thresh=None):
        if self.training:
            return {"loss_a": self.scale**2, "loss_b": 0.5 * self.scale**2}
        if images.shape[-1] > images.shape[-2]:  # finds nothing in wide images
            return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        box = torch.tensor([[1.0, 2.0, 30.5, 40.25]])
        return box, torch.tensor([1]), torch.tensor([0.75])


@pytest.fixture
def loader(small_voc) -> DataLoader:
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=32, classes=CLASSES)
    return DataLoader(dataset, batch_size=4)


def test_the_assignments_recipe(loader, capsys):
    """SGD with momentum 0.9, weight decay, learning rate / 10 at 60 % and 90 %."""
    toy, reference = Toy(), Toy()
    history = train_detector(toy, loader, learning_rate=0.01, max_iters=10, log_period=5)
    solver = torch.optim.SGD(reference.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for step in range(10):
        solver.param_groups[0]["lr"] = 0.01 * (1 if step < 6 else 0.1 if step < 9 else 0.01)
        solver.zero_grad()
        sum(reference.train()(None).values()).backward()
        solver.step()
    assert toy.scale.item() == pytest.approx(reference.scale.item(), rel=1e-6)
    assert history["lr"] == pytest.approx([0.01] * 6 + [0.001] * 3 + [0.0001])


def test_history_and_log(loader, capsys):
    history = train_detector(Toy(), loader, max_iters=5, log_period=2)
    assert list(history) == ["iteration", "lr", "loss", "loss_a", "loss_b"]
    assert history["iteration"] == [1, 2, 3, 4, 5]
    assert history["loss"][0] == pytest.approx(6.0)
    assert history["loss_a"][0] == pytest.approx(4.0)
    assert all(len(values) == 5 for values in history.values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "[Iter" in line]
    assert [line.strip().split("]")[0] for line in lines] == ["[Iter 2", "[Iter 4", "[Iter 5"]
    mean = sum(history["loss"][:2]) / 2
    assert f"[loss: {mean:.3f}]" in lines[0] and "[loss_a: " in lines[0]


def test_cosine_with_warmup(loader):
    history = train_detector(
        Toy(),
        loader,
        learning_rate=1.0,
        max_iters=100,
        optimizer="adamw",
        schedule="cosine",
        warmup_iters=9,
    )
    rates = history["lr"]
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.5)
    assert rates[99] < 0.001 and max(rates) < 1.0
    assert rates[:9] == sorted(rates[:9]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_clipped_gradients(loader):
    toy = Toy()
    # Ten iterations, since the last one of the schedule would be at a hundredth of the rate.
    history = train_detector(toy, loader, 1.0, 0.0, max_iters=10, max_grad_norm=0.01)
    # The gradient of 3 * scale ** 2 has norm 12, so the first step is one of norm 0.01.
    assert history["loss_a"][1] == pytest.approx((2.0 - 0.01) ** 2)


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_layout(loader, channels_last):
    class Recorder(Toy):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)

        def forward(self, images, gt_boxes):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            seen.append(
                images.is_contiguous(memory_format=layout)
                and self.conv.weight.is_contiguous(memory_format=layout)
            )
            return super().forward(images, gt_boxes)

    seen: list[bool] = []
    train_detector(Recorder(), loader, max_iters=1, channels_last=channels_last)
    assert seen == [True]


def test_amp_runs_the_network_alone_in_bfloat16(loader, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    seen = {}

    class Recorder(Toy):
        def forward(self, images, gt_boxes=None):
            product = images.flatten(1) @ images.flatten(1).T
            seen["product"], seen["weight"] = product.dtype, self.scale.dtype
            return super().forward(images, gt_boxes)

    train_detector(Recorder(), loader, max_iters=1, amp="auto")
    assert seen == {"product": torch.bfloat16, "weight": torch.float32}
    train_detector(Recorder(), loader, max_iters=1)
    assert seen["product"] == torch.float32


def test_a_detector_compiles_its_network_itself_where_it_can(loader, monkeypatch):
    class Compiled(Toy):
        def compile_network(self, compile):
            asked.append(compile)

    asked: list[bool | str] = []
    monkeypatch.setattr(Toy, "compile", lambda self: asked.append("whole"))
    train_detector(Compiled(), loader, max_iters=1, compile=True)
    train_detector(Compiled(), loader, max_iters=1)
    train_detector(Toy(), loader, max_iters=1, compile=True)
    train_detector(Toy(), loader, max_iters=1)
    assert asked == [True, False, "whole"]


def test_loss_plot(loader, tmp_path):
    train_detector(Toy(), loader, max_iters=4, plot_path=tmp_path / "plots/loss.png")
    with Image.open(tmp_path / "plots/loss.png") as picture:
        assert min(picture.size) > 200
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_a_loss_that_is_not_finite_stops_the_training(loader):
    toy = Toy()
    with pytest.raises(FloatingPointError, match=r"at iteration \d+ .*loss_a"):
        train_detector(toy, loader, learning_rate=1e30, max_iters=20, log_period=5)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_iters": 0}, "expected positive"),
        ({"log_period": 0}, "expected positive"),
        ({"learning_rate": -1.0}, "expected positive"),
        ({"optimizer": "lion"}, "sgd"),
        ({"schedule": "linear"}, "cosine"),
        ({"amp": "fp8"}, "auto"),
    ],
)
def test_wrong_settings(loader, settings, words):
    with pytest.raises(ValueError, match=words):
        train_detector(Toy(), loader, **settings)


def test_more_classes_in_the_data_than_in_the_detector(loader):
    toy = Toy()
    toy.num_classes = 1
    with pytest.raises(ValueError, match="num_classes=1"):
        train_detector(toy, loader, max_iters=5)


def test_a_loader_without_batches(loader):
    empty = DataLoader(loader.dataset, batch_size=16, drop_last=True)
    with pytest.raises(ValueError, match="no batch"):
        train_detector(Toy(), empty, max_iters=5)


# --------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------


@pytest.fixture
def val_loader(small_voc) -> DataLoader:
    dataset = VOC2007DetectionTiny(small_voc, "val", image_size=64, classes=CLASSES)
    return DataLoader(dataset, batch_size=1)


def test_every_image_gets_a_pair_of_files(val_loader, tmp_path):
    idx_to_class = val_loader.dataset.idx_to_class
    toy = Toy().train()
    predictions, targets = inference_with_detector(
        toy, val_loader, idx_to_class, 0.4, 0.5, output_dir=tmp_path / "out"
    )
    assert toy.training  # as it was
    assert [len(p["boxes"]) for p in predictions] == [1, 0, 1, 0]
    assert [len(t["boxes"]) for t in targets] == [1, 2, 1, 2]
    for kind in ("detection-results", "ground-truth"):
        files = sorted(path.name for path in (tmp_path / "out" / kind).iterdir())
        assert files == ["0008.txt", "0009.txt", "0010.txt", "0011.txt"]
    found = (tmp_path / "out/detection-results/0008.txt").read_text().split()
    assert found[0] == "dice"
    assert [float(v) for v in found[1:]] == [0.75, 1, 2, 30.5, 40.25]
    assert (tmp_path / "out/detection-results/0009.txt").read_text() == ""
    truth = (tmp_path / "out/ground-truth/0009.txt").read_text().splitlines()
    assert [line.split()[0] for line in truth] == ["cube", "dice"]
    assert score_folder(tmp_path / "out")["num_ground_truth"] == {"cube": 4, "dice": 2}


def test_files_of_one_name_are_not_written_over(val_loader, tmp_path):
    twice = DataLoader(Subset(val_loader.dataset, [0, 0]))
    with pytest.raises(ValueError, match="two images are called 0008"):
        inference_with_detector(
            Toy(), twice, val_loader.dataset.idx_to_class, 0.4, 0.5, output_dir=tmp_path / "out"
        )


def test_pictures_are_drawn_where_there_is_no_folder(val_loader, monkeypatch):
    drawn = []
    monkeypatch.setattr("a4_helper.detection_visualizer", lambda *args: drawn.append(args))
    inference_with_detector(Toy(), val_loader, val_loader.dataset.idx_to_class, 0.4, 0.5)
    assert len(drawn) == 4
    image, _, truth, predictions = drawn[1]
    assert image.min() >= 0 and image.max() <= 1.001
    assert truth.shape == (2, 5) and predictions.shape == (0, 6)


def test_evaluation_wants_one_image_a_batch(val_loader):
    pairs = DataLoader(Subset(val_loader.dataset, [0, 2]), batch_size=2)
    with pytest.raises(ValueError, match="batch_size=1"):
        inference_with_detector(Toy(), pairs, val_loader.dataset.idx_to_class, 0.4, 0.5)


def test_batches_are_cut_to_their_own_fullest_image():
    """Rows of padding cost time in the step, and change nothing in its result."""
    full = torch.full((2, 900, 5), -1.0)
    full[0, 1] = torch.tensor([4.0, 4, 30, 30, 1])
    full[1, 9] = torch.tensor([8.0, 2, 60, 50, 0])  # after rows that a crop removed
    seen, histories = [], []
    for gt_boxes in (full, full[:, :10]):
        detector = make_fcos()
        forward = detector.forward
        detector.forward = lambda images, boxes, forward=forward: (
            seen.append(boxes.shape) or forward(images, boxes)
        )
        loader = [(["a", "b"], torch.ones(2, 3, 64, 64), gt_boxes)]
        histories.append(train_detector(detector, loader, max_iters=2, log_period=2))
    assert seen == [(2, 16, 5)] * 2 + [(2, 10, 5)] * 2  # multiples of 8, or all that there is
    assert histories[0] == histories[1]
    empty = [(["a"], torch.ones(1, 3, 64, 64), torch.full((1, 40, 5), -1.0))]
    train_detector(make_fcos(), empty, max_iters=1)
