"""Checks of ``a4_helper``: data set, training loop, export for the evaluation.

The detectors in these checks are stubs that only record what they are given, so the results do not
depend on FCOS, and the checks are fast.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eecs598.grading.answers import PlainDataProxy, to_plain_data
from eecs598.grading.result import CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import Submission

__all__ = [
    "EVALUATION_IMAGES",
    "check_dataset",
    "check_evaluation_export",
    "check_train_detector",
    "export_detections",
]

Rows = Sequence[Sequence[float]]

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


# --------------------------------------------------------------------------------------------
# Data set
# --------------------------------------------------------------------------------------------


class _Picture(NamedTuple):
    """A black image with a white rectangle at its first object.

    Attributes:
        name: of the file, without its suffix.
        size: width and height.
        objects: class name and box (x1, y1, x2, y2) of each.
    """

    name: str
    size: tuple[int, int]
    objects: Sequence[tuple[str, tuple[float, float, float, float]]]


WIDE = _Picture("000001", (200, 100), [("dog", (60, 20, 120, 70)), ("person", (0, 10, 30, 90))])
TALL = _Picture("000002", (80, 120), [("cat", (10, 30, 50, 100))])
EMPTY = _Picture("000003", (90, 100), [])


def check_dataset(submission: Submission) -> CheckResult:
    """Check ``VOC2007DetectionTiny`` on a small data set with the course's index."""
    result = CheckResult("dataset")
    size = 64

    @contextmanager
    def dataset(split: str, *pictures: _Picture) -> Iterator[PlainDataProxy]:
        with tempfile.TemporaryDirectory() as folder:
            _write_dataset(Path(folder), split, pictures)
            data = submission.a4_helper.VOC2007DetectionTiny(folder, split, image_size=size)
            yield PlainDataProxy(data)

    with result.probe("class names and ids"), dataset("train", WIDE, TALL) as data:
        expect(len(data) == 2, f"an index of 2 images: expected length 2, got {len(data)}")
        names, ids = to_plain_data(data.idx_to_class), to_plain_data(data.class_to_idx)
        got = [ids.get(name) for name in ("aeroplane", "dog", "tvmonitor")]
        expect(
            got == [0, 11, 19],
            f"class_to_idx of aeroplane, dog, tvmonitor: expected [0, 11, 19], got {got}",
        )
        expect(
            names == {i: name for name, i in ids.items()},
            "expected idx_to_class to be the inverse of class_to_idx, got something else",
        )

    with result.probe("path, image, boxes"), dataset("train", WIDE, TALL) as data:
        path, image, boxes = data[0]
        expect(
            Path(path).name == "000001.jpg",
            f"expected the path of 000001.jpg, got {show(str(path))}",
        )
        expect(
            tuple(image.shape) == (3, size, size),
            f"image_size={size}: expected a training image (3, {size}, {size}), got "
            f"{tuple(image.shape)}",
        )
        expect(
            boxes.dim() == 2 and boxes.shape[1] == 5 and len(boxes) >= 2,
            f"at most 2 objects per image: expected boxes (2 or more, 5), got {tuple(boxes.shape)}",
        )

    with result.probe("normalized with ImageNet's statistics"), dataset("train", WIDE) as data:
        # A black pixel, far from the white rectangle.
        got = data[0][1][:, 60, 2]
        expect_close("a black pixel", got, (-MEAN / STD).flatten(), 0.05)

    with (
        result.probe("training: resized, cropped at the center"),
        dataset("train", WIDE, TALL) as data,
    ):
        # 200 x 100 becomes 128 x 64 and loses 32 columns per side; 80 x 120 loses 16 rows.
        for n, box in ((0, [6.4, 12.8, 44.8, 44.8, 11]), (1, [8.0, 8.0, 40.0, 64.0, 7])):
            _, image, boxes = data[n]
            expect_close(f"image {n}: its first box", boxes[0], box, 0.02)
            _expect_box_around_object(image, boxes[0])

    with result.probe("boxes that the crop removes become -1"), dataset("train", WIDE) as data:
        boxes = data[0][2]
        expect_close("an object left of the crop", boxes[1], [-1.0] * 5)

    with result.probe("validation: resized, not cropped"), dataset("val", WIDE, TALL) as data:
        for n, shape, box in (
            (0, (3, 64, 128), [38.4, 12.8, 76.8, 44.8, 11]),
            (1, (3, 96, 64), [8.0, 24.0, 40.0, 80.0, 7]),
        ):
            _, image, boxes = data[n]
            got_shape = tuple(image.shape)
            expect(got_shape == shape, f"validation image {n}: expected {shape}, got {got_shape}")
            expect_close(f"validation image {n}: its first box", boxes[0], box, 0.02)
            _expect_box_around_object(image, boxes[0])

    with (
        result.probe("padded with -1 to one number of boxes"),
        dataset("train", WIDE, TALL) as data,
    ):
        shapes = {tuple(data[n][2].shape) for n in range(2)}
        expect(len(shapes) == 1, f"expected boxes of one shape, got {sorted(shapes)}")
        padding = data[1][2][1:]
        expect_close("rows after the only object", padding, torch.full(padding.shape, -1.0))
        _, images, boxes = next(iter(_loader(data, batch_size=2)))
        got_shapes = tuple(images.shape), tuple(boxes.shape)
        expected = (2, 3, size, size), (2, *shapes.pop())
        expect(
            got_shapes == expected, f"a batch of two: expected shapes {expected}, got {got_shapes}"
        )

    with result.probe("an image without objects"), dataset("train", EMPTY, TALL) as data:
        boxes = data[0][2]
        expect_close("boxes of an image without objects", boxes, torch.full((len(boxes), 5), -1.0))

    with result.probe("an image with 45 objects"):
        crowd = [("bird", (10.0 + n, 30, 40 + n, 60)) for n in range(45)]
        with dataset("train", TALL._replace(objects=crowd)) as data:
            number = int((data[0][2][:, 4] >= 0).sum())
            expect(number == 45, f"an image with 45 objects: expected 45 boxes, got {number}")
    return result


def _write_dataset(root: Path, split: str, pictures: Sequence[_Picture]) -> None:
    """Write images and index in the layout of the course's data set."""
    folder = root / "VOCdevkit" / "VOC2007" / "JPEGImages"
    folder.mkdir(parents=True)
    index = []
    for name, size, objects in pictures:
        image = Image.new("RGB", size)
        if objects:
            x1, y1, x2, y2 = objects[0][1]
            ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="white")
        image.save(folder / f"{name}.jpg", quality=95)
        entries = [{"name": label, "xyxy": list(box)} for label, box in objects]
        index.append([f"./here/VOCdevkit/VOC2007/JPEGImages/{name}.jpg", entries])
    (root / f"voc07_{split}.json").write_text(json.dumps(index), encoding="utf-8")


def _expect_box_around_object(image: Tensor, box: Tensor) -> None:
    """Expect the box to surround the white rectangle of the normalized image."""
    white = (image * STD + MEAN).mean(dim=0) > 0.5
    rows, columns = white.any(dim=1).nonzero().flatten(), white.any(dim=0).nonzero().flatten()
    expect(len(rows) > 0, "expected a white rectangle in the image, got none")
    drawn = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    expect(
        bool((drawn - box[:4]).abs().max() <= 1.5),
        f"the object is drawn at {show(drawn)} of the image: expected its box there, got "
        f"{show(box[:4])}",
    )


# --------------------------------------------------------------------------------------------
# Training loop
# --------------------------------------------------------------------------------------------


class _LinearLosses(nn.Module):
    """A detector whose losses are linear in one parameter each, which shows each optimizer step.

    Attributes:
        values_per_step: both parameters at each call.
        training_modes: values of the training flag at the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(1.0))
        self.second = nn.Parameter(torch.tensor(1.0))
        self.values_per_step: list[tuple[float, float]] = []
        self.training_modes: set[bool] = set()

    def forward(self, images: Tensor, gt_boxes: Tensor) -> dict[str, Tensor]:
        """Return two losses; the batch has no influence on them."""
        self.values_per_step.append(self.values())
        self.training_modes.add(to_plain_data(self.training))
        return {"loss_cls": 1.0 * self.first, "loss_box": 2.0 * self.second}

    def values(self) -> tuple[float, float]:
        """Return both parameters."""
        return to_plain_data(self.first).item(), to_plain_data(self.second).item()


def check_train_detector(submission: Submission) -> CheckResult:
    """Check ``train_detector``: number of steps, all losses, SGD with momentum, learning rates."""
    result = CheckResult("train_detector")
    num_steps, learning_rate, weight_decay = 10, 0.1, 0.05
    slopes = (1.0, 2.0)  # of the losses

    @once
    def trained() -> _LinearLosses:
        detector = _LinearLosses().eval()
        batch = [("a.jpg", torch.zeros(3, 8, 8), torch.tensor([[1.0, 1, 5, 5, 0]]))] * 4
        with _scratch_folder(), mock.patch("matplotlib.pyplot.show"):
            submission.a4_helper.train_detector(
                detector,
                _loader(batch, batch_size=2),
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                max_iters=num_steps,
                log_period=3,
                device="cpu",
            )
        return detector

    def expect_values(until: int, rates: str) -> None:
        got_values = [*trained().values_per_step, trained().values()]
        steps = len(trained().values_per_step)
        expect(steps >= until, f"max_iters {num_steps}: expected {until} steps, got {steps}")
        for which, slope in enumerate(slopes):
            values = _follow_slope(slope, num_steps, learning_rate, weight_decay)
            for step, expected in enumerate(values[: until + 1]):
                got = got_values[step][which]
                expect(
                    abs(got - expected) < 1e-4,
                    f"a loss of {slope:g} * w from w = 1, learning_rate {learning_rate}, "
                    f"weight_decay {weight_decay}, max_iters {num_steps}: expected w = "
                    f"{expected:.5g} after {step} steps ({rates}), got {got:.5g}",
                )

    with result.probe("max_iters steps, from a loader that is shorter"):
        steps = len(trained().values_per_step)
        expect(
            steps == num_steps,
            f"a loader of 2 batches, max_iters={num_steps}: expected {num_steps} steps, "
            f"got {steps}",
        )

    with result.probe("in training mode"):
        modes = trained().training_modes
        expect(
            modes == {True},
            f"expected the detector's training flag to be True, got {show(list(modes))}",
        )

    with result.probe("every loss is minimized"):
        for name, got in zip(("first", "second"), trained().values(), strict=True):
            expect(
                got < 0.9,
                f"two losses: expected both to fall, got a parameter of the {name} one that went "
                f"from 1 to {got:.4g}",
            )

    with result.probe("SGD with momentum 0.9 and weight decay"):
        expect_values(6, "v = 0.9 * v + gradient + weight_decay * w, w -= learning rate * v")

    with result.probe("learning rate / 10 at 60 % and again at 90 %"):
        expect_values(num_steps, "learning rate divided by 10 after 6 and after 9 of 10 steps")
    return result


def _follow_slope(
    slope: float, num_steps: int, learning_rate: float, weight_decay: float
) -> list[float]:
    """Return the parameter of a linear loss before each step of SGD and after the last."""
    value, velocity, values = 1.0, 0.0, [1.0]
    for step in range(num_steps):
        drops = (step >= 0.6 * num_steps) + (step >= 0.9 * num_steps)
        velocity = 0.9 * velocity + slope + weight_decay * value
        value -= learning_rate * 0.1**drops * velocity
        values.append(value)
    return values


# --------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------


class _FixedDetections(nn.Module):
    """A detector that returns given detections, and records how it is called.

    Args:
        detections: for each image size (height, width), rows of x1, y1, x2, y2, class id, score.
    """

    def __init__(self, detections: dict[tuple[int, ...], Rows]) -> None:
        super().__init__()
        self.detections = detections
        self.thresholds: set[tuple[float | None, float | None]] = set()
        self.training_modes: set[bool] = set()
        self.grad_modes: set[bool] = set()

    def forward(
        self,
        images: Tensor,
        gt_boxes: Tensor | None = None,
        test_score_thresh: float | None = None,
        test_nms_thresh: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (K, 4), classes (K,) and scores (K,) for an image of a known size."""
        self.thresholds.add(to_plain_data((test_score_thresh, test_nms_thresh)))
        self.training_modes.add(to_plain_data(self.training))
        self.grad_modes.add(torch.is_grad_enabled())
        rows = torch.tensor(self.detections[tuple(images.shape[-2:])]).reshape(-1, 6)
        return rows[:, :4], rows[:, 4].long(), rows[:, 5]


NAMES = {0: "cat", 1: "dog"}


class EvaluationImage(NamedTuple):
    """An image to evaluate.

    Attributes:
        name: of the file, without its suffix.
        size: height and width.
        truth: rows of x1, y1, x2, y2, class id.
        detections: rows of x1, y1, x2, y2, class id, score.
    """

    name: str
    size: tuple[int, int]
    truth: Rows
    detections: Rows


# The second has no detections, the third no ground truth, the last neither.
EVALUATION_IMAGES = (
    EvaluationImage(
        "000010",
        (32, 48),
        [[4.0, 5, 20, 30, 1], [1, 2, 9, 9, 0]],
        [[4.5, 5.25, 21, 29, 1, 0.875], [30, 2, 40, 12, 0, 0.5]],
    ),
    EvaluationImage("000011", (32, 40), [[3.0, 3, 30, 30, 0]], []),
    EvaluationImage("000012", (40, 32), [], [[6.0, 7, 16, 27, 1, 0.75]]),
    EvaluationImage("000013", (36, 32), [], []),
)


def check_evaluation_export(submission: Submission) -> CheckResult:
    """Check ``inference_with_detector`` with ``output_dir``: text files for the mAP script."""
    result = CheckResult("evaluation_export")
    exported = once(lambda: export_detections(submission))

    with result.probe("both folders in output_dir"):
        for kind, files in exported()[0].items():
            expect(
                bool(files),
                f"output_dir='export/input': expected files export/input/{kind}/*.txt, got none",
            )

    with result.probe("a pair of files for every image"):
        for kind, files in exported()[0].items():
            for name, _, truth, found in EVALUATION_IMAGES:
                expect(
                    name in files,
                    f"image {name} with {len(truth)} objects and {len(found)} detections: expected "
                    f"{kind}/{name}.txt, got none; its objects are missing from the score",
                )

    for kind, pattern, rows_of in (
        ("ground-truth", "class x1 y1 x2 y2", attrgetter("truth")),
        ("detection-results", "class score x1 y1 x2 y2", attrgetter("detections")),
    ):
        with result.probe(f"{kind}: {pattern}"):
            files = exported()[0][kind]
            for image in EVALUATION_IMAGES:
                if image.name in files:
                    _expect_rows(f"{kind}/{image.name}.txt", files[image.name], rows_of(image))
            expect(bool(files), "expected files, got none")

    with result.probe("thresholds reach the detector"):
        got = exported()[1].thresholds
        expect(
            got == {(0.35, 0.55)},
            f"score_thresh=0.35, nms_thresh=0.55: expected the detector to be called with these, "
            f"got {show(sorted(got))}",
        )

    with result.probe("in evaluation mode"):
        modes = exported()[1].training_modes
        expect(
            modes == {False},
            f"expected the detector's training flag to be False, got {show(list(modes))}",
        )
    return result


def export_detections(
    submission: Submission,
) -> tuple[dict[str, dict[str, list[str]]], _FixedDetections]:
    """Run ``inference_with_detector`` on ``EVALUATION_IMAGES``.

    Returns:
        The lines of each file that it writes, as ``{"ground-truth": {name: lines},
        "detection-results": ...}``, and the stub detector that it was given.
    """
    detector = _FixedDetections({image.size: image.detections for image in EVALUATION_IMAGES})
    loader = _loader([_evaluation_item(image) for image in EVALUATION_IMAGES], batch_size=1)
    with _scratch_folder() as folder:
        output_dir = folder / "export" / "input"
        submission.a4_helper.inference_with_detector(
            detector.train(),
            loader,
            NAMES,
            score_thresh=0.35,
            nms_thresh=0.55,
            output_dir=str(output_dir),
            dtype=torch.float32,
            device="cpu",
        )
        files = {
            kind: {p.stem: _lines(p) for p in sorted((output_dir / kind).glob("*.txt"))}
            for kind in ("ground-truth", "detection-results")
        }
    return files, detector


def _evaluation_item(image: EvaluationImage) -> tuple[str, Tensor, Tensor]:
    """Return path, pixels (3, H, W) and boxes (3, 5), as a data set does."""
    boxes = torch.full((3, 5), -1.0)
    boxes[: len(image.truth)] = torch.tensor(image.truth).reshape(-1, 5)
    return f"data/JPEGImages/{image.name}.jpg", torch.zeros(3, *image.size), boxes


def _loader(items: Any, batch_size: int) -> DataLoader[Any]:
    """Load items in order; a loader needs only their length and an index."""
    return DataLoader(items, batch_size=batch_size)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")


def _expect_rows(file: str, lines: list[str], rows: Rows) -> None:
    """Expect one line per row in any order; pixels may differ by 0.5, scores by 0.01."""
    got = sorted(line.split() for line in lines if line.strip())
    expected = sorted((NAMES[int(row[4])], [*row[5:], *row[:4]]) for row in rows)
    expect(
        len(got) == len(expected),
        f"{file}: expected {len(expected)} lines, got {len(got)}: {show(got)}",
    )
    for got_words, (name, values) in zip(got, expected, strict=True):
        line = " ".join([name, *(f"{value:g}" for value in values)])
        same = len(got_words) == 1 + len(values) and got_words[0] == name
        for word, value in zip(got_words[1:], values, strict=same):
            tolerance = 0.01 if 0 < value < 1 else 0.5
            same = same and abs(float(word) - value) <= tolerance
        expect(same, f"{file}: expected the line {line!r}, got {' '.join(got_words)!r}")


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Make a temporary folder the working directory, because some submissions write there."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)  # first: some systems can't remove the working directory
