"""Checks of ``a4_helper``: data set, training loop, export for the evaluation.

The detectors here are stand-ins that do no more than record what they are given, so the checks
say nothing about FCOS and take no time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eecs598.grading.answers import Answering, plain
from eecs598.grading.result import CheckResult, expect, expect_close, once, show
from eecs598.grading.submission import Submission

__all__ = [
    "EVALUATED",
    "check_dataset",
    "check_evaluation_export",
    "check_train_detector",
    "export_detections",
]

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


# --------------------------------------------------------------------------------------------
# Data set
# --------------------------------------------------------------------------------------------


class _Picture(NamedTuple):
    """A black image with a white rectangle where its first object is."""

    name: str
    size: tuple[int, int]  # width, height
    objects: Sequence[tuple[str, tuple[float, float, float, float]]]


WIDE = _Picture("000001", (200, 100), [("dog", (60, 20, 120, 70)), ("person", (0, 10, 30, 90))])
TALL = _Picture("000002", (80, 120), [("cat", (10, 30, 50, 100))])
EMPTY = _Picture("000003", (90, 100), [])


def check_dataset(submission: Submission) -> CheckResult:
    """``VOC2007DetectionTiny`` on a small data set with the course's index."""
    result = CheckResult("dataset")
    size = 64

    @contextmanager
    def dataset(split: str, *pictures: _Picture) -> Iterator:
        with tempfile.TemporaryDirectory() as folder:
            _write_dataset(Path(folder), split, pictures)
            data = submission.a4_helper.VOC2007DetectionTiny(folder, split, image_size=size)
            yield Answering(data)

    with result.probe("class names and ids"), dataset("train", WIDE, TALL) as data:
        expect(len(data) == 2, f"an index of 2 images: expected length 2, got {len(data)}")
        names, ids = plain(data.idx_to_class), plain(data.class_to_idx)
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
            f"at most 2 objects an image: expected boxes (2 or more, 5), got {tuple(boxes.shape)}",
        )

    with result.probe("normalised with ImageNet's statistics"), dataset("train", WIDE) as data:
        # Black, well away from the white rectangle.
        got = data[0][1][:, 60, 2]
        expect_close("a black pixel", got, (-MEAN / STD).flatten(), 0.05)

    with (
        result.probe("training: resized, cropped at the centre"),
        dataset("train", WIDE, TALL) as data,
    ):
        # 200 x 100 becomes 128 x 64 and loses 32 columns a side; 80 x 120 loses 16 rows.
        for n, box in ((0, [6.4, 12.8, 44.8, 44.8, 11]), (1, [8.0, 8.0, 40.0, 64.0, 7])):
            _, image, boxes = data[n]
            expect_close(f"image {n}: its first box", boxes[0], box, 0.02)
            _expect_drawn(image, boxes[0])

    with result.probe("boxes that the crop removes become -1"), dataset("train", WIDE) as data:
        boxes = data[0][2]
        expect_close("an object left of the crop", boxes[1], [-1.0] * 5)

    with result.probe("validation: resized, not cropped"), dataset("val", WIDE, TALL) as data:
        for n, shape, box in (
            (0, (3, 64, 128), [38.4, 12.8, 76.8, 44.8, 11]),
            (1, (3, 96, 64), [8.0, 24.0, 40.0, 80.0, 7]),
        ):
            _, image, boxes = data[n]
            got = tuple(image.shape)
            expect(got == shape, f"validation image {n}: expected {shape}, got {got}")
            expect_close(f"validation image {n}: its first box", boxes[0], box, 0.02)
            _expect_drawn(image, boxes[0])

    with (
        result.probe("padded with -1 to one number of boxes"),
        dataset("train", WIDE, TALL) as data,
    ):
        shapes = {tuple(data[n][2].shape) for n in range(2)}
        expect(len(shapes) == 1, f"expected boxes of one shape, got {sorted(shapes)}")
        padding = data[1][2][1:]
        expect_close("rows after the only object", padding, torch.full(padding.shape, -1.0))
        _, images, boxes = next(iter(DataLoader(data, batch_size=2)))
        got = tuple(images.shape), tuple(boxes.shape)
        expected = (2, 3, size, size), (2, *shapes.pop())
        expect(got == expected, f"a batch of two: expected shapes {expected}, got {got}")

    with result.probe("an image without objects"), dataset("train", EMPTY, TALL) as data:
        boxes = data[0][2]
        expect_close("boxes of an image without objects", boxes, torch.full((len(boxes), 5), -1.0))

    with result.probe("an image with 45 objects"):
        crowd = [("bird", (10.0 + n, 30, 40 + n, 60)) for n in range(45)]
        with dataset("train", TALL._replace(objects=crowd)) as data:
            got = int((data[0][2][:, 4] >= 0).sum())
            expect(got == 45, f"an image with 45 objects: expected 45 boxes, got {got}")
    return result


def _write_dataset(root: Path, split: str, pictures: Sequence[_Picture]) -> None:
    """Images and index as the course hands them out."""
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


def _expect_drawn(image: Tensor, box: Tensor) -> None:
    """Expect the box around the white rectangle of the normalised image."""
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


class _Slope(nn.Module):
    """A detector with two parameters on slopes: their course shows each step of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(1.0))
        self.second = nn.Parameter(torch.tensor(1.0))
        self.course: list[tuple[float, float]] = []  # both parameters, at each call
        self.training_modes: set[bool] = set()

    def forward(self, images: Tensor, gt_boxes: Tensor) -> dict[str, Tensor]:
        self.course.append(self.values())
        self.training_modes.add(plain(self.training))
        return {"loss_cls": 1.0 * self.first, "loss_box": 2.0 * self.second}

    def values(self) -> tuple[float, float]:
        return plain(self.first).item(), plain(self.second).item()


def check_train_detector(submission: Submission) -> CheckResult:
    """``train_detector``: number of steps, all losses, SGD with momentum, the learning rates."""
    result = CheckResult("train_detector")
    num_steps, learning_rate, weight_decay = 10, 0.1, 0.05
    slopes = (1.0, 2.0)  # of the losses

    @once
    def trained() -> _Slope:
        detector = _Slope().eval()
        batch = [("a.jpg", torch.zeros(3, 8, 8), torch.tensor([[1.0, 1, 5, 5, 0]]))] * 4
        with _scratch_folder(), mock.patch("matplotlib.pyplot.show"):
            submission.a4_helper.train_detector(
                detector,
                DataLoader(batch, batch_size=2),
                learning_rate=learning_rate,
                weight_decay=weight_decay,
                max_iters=num_steps,
                log_period=3,
                device="cpu",
            )
        return detector

    def expect_course(until: int, rates: str) -> None:
        course = [*trained().course, trained().values()]
        steps = len(trained().course)
        expect(steps >= until, f"max_iters {num_steps}: expected {until} steps, got {steps}")
        for which, slope in enumerate(slopes):
            values = _follow_slope(slope, num_steps, learning_rate, weight_decay)
            for step, expected in enumerate(values[: until + 1]):
                got = course[step][which]
                expect(
                    abs(got - expected) < 1e-4,
                    f"a loss of {slope:g} * w from w = 1, learning_rate {learning_rate}, "
                    f"weight_decay {weight_decay}, max_iters {num_steps}: expected w = "
                    f"{expected:.5g} after {step} steps ({rates}), got {got:.5g}",
                )

    with result.probe("max_iters steps, from a loader that is shorter"):
        got = len(trained().course)
        expect(
            got == num_steps,
            f"a loader of 2 batches, max_iters={num_steps}: expected {num_steps} steps, got {got}",
        )

    with result.probe("in training mode"):
        got = trained().training_modes
        expect(
            got == {True},
            f"expected the detector's training flag to be True, got {show(list(got))}",
        )

    with result.probe("every loss is minimised"):
        for name, got in zip(("first", "second"), trained().values(), strict=True):
            expect(
                got < 0.9,
                f"two losses: expected both to fall, got a parameter of the {name} one that went "
                f"from 1 to {got:.4g}",
            )

    with result.probe("SGD with momentum 0.9 and weight decay"):
        expect_course(6, "v = 0.9 * v + gradient + weight_decay * w, w -= learning rate * v")

    with result.probe("learning rate / 10 at 60 % and again at 90 %"):
        expect_course(num_steps, "learning rate divided by 10 after 6 and after 9 of 10 steps")
    return result


def _follow_slope(
    slope: float, num_steps: int, learning_rate: float, weight_decay: float
) -> list[float]:
    """The parameter of a linear loss before each step and after the last."""
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


class _Oracle(nn.Module):
    """A detector that knows each image by its size and what to say about it."""

    def __init__(self, answers: dict[tuple[int, int], list[list[float]]]) -> None:
        super().__init__()
        self.answers = answers  # (height, width) -> rows x1, y1, x2, y2, class id, score
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
        self.thresholds.add(plain((test_score_thresh, test_nms_thresh)))
        self.training_modes.add(plain(self.training))
        self.grad_modes.add(torch.is_grad_enabled())
        rows = torch.tensor(self.answers[tuple(images.shape[-2:])]).reshape(-1, 6)
        return rows[:, :4], rows[:, 4].long(), rows[:, 5]


NAMES = {0: "cat", 1: "dog"}
# Name, size (height, width), ground truth, detections. The second has no detections, the third
# no ground truth, the last neither.
EVALUATED = (
    (
        "000010",
        (32, 48),
        [[4.0, 5, 20, 30, 1], [1, 2, 9, 9, 0]],
        [[4.5, 5.25, 21, 29, 1, 0.875], [30, 2, 40, 12, 0, 0.5]],
    ),
    ("000011", (32, 40), [[3.0, 3, 30, 30, 0]], []),
    ("000012", (40, 32), [], [[6.0, 7, 16, 27, 1, 0.75]]),
    ("000013", (36, 32), [], []),
)


def check_evaluation_export(submission: Submission) -> CheckResult:
    """``inference_with_detector`` with ``output_dir``: text files for the mAP script."""
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
            for name, _, truth, found in EVALUATED:
                expect(
                    name in files,
                    f"image {name} with {len(truth)} objects and {len(found)} detections: expected "
                    f"{kind}/{name}.txt, got none; its objects are missing from the score",
                )

    for kind, pattern, which in (
        ("ground-truth", "class x1 y1 x2 y2", 2),
        ("detection-results", "class score x1 y1 x2 y2", 3),
    ):
        with result.probe(f"{kind}: {pattern}"):
            files = exported()[0][kind]
            for image in EVALUATED:
                if image[0] in files:
                    _expect_rows(f"{kind}/{image[0]}.txt", files[image[0]], image[which])
            expect(bool(files), "expected files, got none")

    with result.probe("thresholds reach the detector"):
        got = exported()[1].thresholds
        expect(
            got == {(0.35, 0.55)},
            f"score_thresh=0.35, nms_thresh=0.55: expected the detector to be called with these, "
            f"got {show(sorted(got))}",
        )

    with result.probe("in evaluation mode"):
        got = exported()[1].training_modes
        expect(
            got == {False},
            f"expected the detector's training flag to be False, got {show(list(got))}",
        )
    return result


def export_detections(submission: Submission) -> tuple[dict[str, dict[str, list[str]]], _Oracle]:
    """What ``inference_with_detector`` writes for ``EVALUATED``, and the detector it was given.

    Lines of each file: ``{"ground-truth": {name: lines}, "detection-results": ...}``.
    """
    detector = _Oracle({size: found for _, size, _, found in EVALUATED}).train()
    loader = DataLoader([_evaluation_item(*image[:3]) for image in EVALUATED], batch_size=1)
    with _scratch_folder() as folder:
        output_dir = folder / "export" / "input"
        submission.a4_helper.inference_with_detector(
            detector,
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


def _evaluation_item(
    name: str, size: tuple[int, int], truth: list[list[float]]
) -> tuple[str, Tensor, Tensor]:
    boxes = torch.full((3, 5), -1.0)
    boxes[: len(truth)] = torch.tensor(truth).reshape(-1, 5)
    return f"data/JPEGImages/{name}.jpg", torch.zeros(3, *size), boxes


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")


def _expect_rows(file: str, lines: list[str], rows: list[list[float]]) -> None:
    """Expect one line a row, in any order, numbers to half a pixel and a hundredth of score."""
    got = sorted(line.split() for line in lines if line.strip())
    expected = sorted([NAMES[int(row[4])], *row[5:], *row[:4]] for row in rows)
    expect(
        len(got) == len(expected),
        f"{file}: expected {len(expected)} lines, got {len(got)}: {show(got)}",
    )
    for got_words, expected_words in zip(got, expected, strict=True):
        line = " ".join(f"{w:g}" if isinstance(w, (int, float)) else w for w in expected_words)
        same = len(got_words) == len(expected_words) and got_words[0] == expected_words[0]
        for word, value in zip(got_words[1:], expected_words[1:], strict=same):
            tolerance = 0.01 if 0 < value < 1 else 0.5
            same = same and abs(float(word) - value) <= tolerance
        expect(same, f"{file}: expected the line {line!r}, got {' '.join(got_words)!r}")


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder that is the working directory, for submissions that write there."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)  # before the folder goes: one can't remove it from inside everywhere
