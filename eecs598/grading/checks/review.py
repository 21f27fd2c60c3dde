"""Review findings: faults of a submission that cost no points.

Most are found by running the code on small inputs and recording what it does. Each is reported
once.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import chain, islice
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eecs598.grading.checks.a4_helper import EVALUATION_IMAGES, export_detections
from eecs598.grading.checks.detector import THREE_APART, make_inference_case
from eecs598.grading.checks.locations import (
    ORDER_ADVICE,
    expect_local_gradients,
    expect_responses_in_place,
)
from eecs598.grading.checks.losses import LossCase, make_boxes
from eecs598.grading.checks.network import build_backbone
from eecs598.grading.checks.nms import cell_boxes
from eecs598.grading.checks.other_sizes import Ground, ask_locations
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.checks.stubs import locations_of, stub_detector
from eecs598.grading.result import CheckFailure, isolated, place_in, show
from eecs598.grading.source import index_modules, parse_file
from eecs598.grading.submission import Submission, evaluating, training

__all__ = ["review_findings"]

SLOW_NMS_SECONDS = 2.0


def review_findings(submission: Submission, folder: str | os.PathLike) -> list[str]:
    """List the review findings of a submission.

    Args:
        submission: its modules. Those that are replaced have no findings.
        folder: of its files.

    Returns:
        Findings of one or two sentences: the file, the function, what it does and why that
        matters. A review that fails because the submission's code raises adds nothing.
    """
    found: list[str] = []
    submission = submission.plain_proxy
    for part, review in _REVIEWS:
        if part in submission.replaced:
            continue
        with contextlib.suppress(Exception, SystemExit), isolated():
            for sentence in review(submission):
                sentence = " ".join(sentence.split())
                if sentence not in found:
                    found.append(sentence)
    with contextlib.suppress(Exception):
        found += _fixed_sizes(Path(folder))
    return found


# --------------------------------------------------------------------------------------------
# Locations, backbone, evaluation
# --------------------------------------------------------------------------------------------


def _location_order(submission: Submission) -> Iterator[str]:
    try:
        # On a map that is not square, predictions are farther from their mirror images; but the
        # locations may be right on square maps only, which is another fault.
        height, width = 64, 224
        try:
            ask_locations(submission, Ground(1, height, width))
        except Exception:
            height = width
        expect_responses_in_place(submission, height // 16, width // 16)
        expect_local_gradients(submission, evaluating(submission.detector()), height, width)
    except CheckFailure as failure:
        if ORDER_ADVICE not in str(failure):
            return  # another fault
        yield (
            "one_stage_detector.py, FCOSPredictionNetwork, and common.py, get_fpn_location_coords: "
            "predictions and locations are listed in different orders, so prediction n is trained "
            "and decoded at the mirror image of its place. The loss still falls, and mAP ends at "
            f"about half. {failure}."
        )


def _batch_norm(submission: Submission) -> Iterator[str]:
    _, disturbed = build_backbone(submission, out_channels=8)
    if disturbed:
        yield (
            "common.py, DetectorBackboneWithFPN.__init__: the dummy pass runs in training mode and "
            f"moves the statistics of {disturbed} batch norms away from the pretrained ones; call "
            "eval() before it and train() after it."
        )


def _evaluation(submission: Submission) -> Iterator[str]:
    files, detector = export_detections(submission)
    function = "a4_helper.py, inference_with_detector"
    if not any(files.values()):
        yield f"{function}: writes nothing to output_dir, so the scores are those of other files."
    else:
        for name, _, truth, detections in EVALUATION_IMAGES:
            if truth and not detections and name not in files["ground-truth"]:
                yield (
                    f"{function}: writes no ground truth for an image without detections. Its "
                    "objects are missed and not counted as missed, so mAP comes out too high; "
                    "write both files for every image."
                )
                break
    if detector.grad_modes == {True} and _builds_a_graph(submission):
        yield (
            f"{function}, and one_stage_detector.py, FCOS.inference: run without torch.no_grad(), "
            "so every image keeps its activations for a backward pass that never comes."
        )


def _builds_a_graph(submission: Submission) -> bool:
    """Whether detections carry gradients, if the caller does not disable them."""
    case = make_inference_case(submission, THREE_APART)
    for predictions in case.predictions:
        for values in predictions.values():
            values.requires_grad_()
    found = case.detector(case.images, test_score_thresh=0.05, test_nms_thresh=0.5)
    return any(values.requires_grad for values in found)


# --------------------------------------------------------------------------------------------
# Arguments that are changed in place
# --------------------------------------------------------------------------------------------


def _changed_arguments_of_common(submission: Submission) -> Iterator[str]:
    boxes = torch.tensor([[0.3, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10]])
    arguments = {"boxes": boxes, "scores": torch.tensor([0.2, 0.9, 0.5])}
    yield from _changes("common.py, nms", submission.common, "nms", arguments, 0.5)
    arguments["class_ids"] = torch.tensor([0, 1, 0])
    yield from _changes(
        "common.py, class_spec_nms", submission.common, "class_spec_nms", arguments, 0.5
    )


def _changed_arguments_of_targets(submission: Submission) -> Iterator[str]:
    osd = submission.one_stage_detector
    locations = torch.tensor([[20.0, 20.0], [4.0, 4.0]])
    boxes = torch.tensor([[10.0, 10, 40, 40, 2], [-1, -1, -1, -1, -1]])
    deltas = torch.tensor([[1.0, 2, 3, 4], [-1, -1, -1, -1]])
    for name, arguments, more in (
        ("fcos_get_deltas_from_locations", {"locations": locations, "gt_boxes": boxes}, (8,)),
        ("fcos_apply_deltas_to_locations", {"deltas": deltas, "locations": locations}, (8,)),
        ("fcos_make_centerness_targets", {"deltas": deltas}, ()),
    ):
        with contextlib.suppress(Exception):
            yield from _changes(f"one_stage_detector.py, {name}", osd, name, arguments, *more)
    points = {level: locations.clone() for level in STRIDES}
    gt_boxes = boxes.clone()
    osd.fcos_match_locations_to_gt(points, dict(STRIDES), gt_boxes)
    yield from _difference(
        "one_stage_detector.py, fcos_match_locations_to_gt", "gt_boxes", boxes, gt_boxes
    )


def _changed_predictions(submission: Submission) -> Iterator[str]:
    # Negative deltas and deltas beyond the image, because clipping is often done in place.
    beyond = THREE_APART[0]._replace(cell=(5, 9), deltas=(20.0, -1.0, 20.0, -1.0))
    case = make_inference_case(submission, [*THREE_APART, beyond])
    images_before, predictions_before = case.images.clone(), copy.deepcopy(case.predictions)
    case.detect()
    where = "one_stage_detector.py, FCOS.inference"
    yield from _difference(where, "images", images_before, case.images)
    names = ("class logits", "deltas", "centerness logits")
    for name, then, now in zip(names, predictions_before, case.predictions, strict=True):
        changes = (_difference(where, f"the {name} of {p}", then[p], now[p]) for p in STRIDES)
        yield from islice(chain.from_iterable(changes), 1)  # one level is enough


def _changes(
    where: str, module: object, name: str, arguments: dict[str, Tensor], *more: object
) -> Iterator[str]:
    """Call a function, and report which of its tensors it changed."""
    copies = {key: value.clone() for key, value in arguments.items()}
    getattr(module, name)(*copies.values(), *more)
    for key, value in arguments.items():
        yield from _difference(where, key, value, copies[key])


def _difference(where: str, name: str, before: Tensor, after: Tensor) -> Iterator[str]:
    """Report a tensor that has changed, with its first changed row."""
    wrong = (before != after).nonzero()
    if len(wrong):
        row = tuple(wrong[0].tolist()[:-1]) if before.dim() > 1 else ...
        yield (
            f"{where}: changes its argument {name} in place, {show(before[row])} became "
            f"{show(after[row])}. The caller continues with other values; work on a copy."
        )


# --------------------------------------------------------------------------------------------
# Training step and forward passes
# --------------------------------------------------------------------------------------------


class _SimulatedGpu(TorchFunctionMode):
    """A mode in which tensors report that they are on a GPU; records what would wait for the GPU.

    So the code takes the same branches as on a GPU, without needing one.

    Attributes:
        reads: place in the submission -> the first operation there that waits.
        calls: number of calls to PyTorch.
    """

    WAITING: ClassVar[dict[Any, str]] = {
        torch.Tensor.item: ".item()",
        torch.Tensor.tolist: ".tolist()",
        torch.Tensor.cpu: ".cpu()",
        torch.Tensor.numpy: ".numpy()",
        torch.Tensor.__bool__: "a condition on the value of a tensor",
        torch.Tensor.__int__: "int() of a tensor",
        torch.Tensor.__float__: "float() of a tensor",
    }

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, str] = {}
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda")
        # The stubs declare a bool, but on the class it is a descriptor.
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        kwargs = kwargs or {}
        read = self.WAITING.get(func)
        if func is torch.Tensor.to and any(
            str(value) == "cpu" for value in (*args[1:], *kwargs.values()) if _is_device(value)
        ):
            read = '.to("cpu")'
        if read and (place := _caller()):
            self.reads.setdefault(place, read)
        args = [torch.device("cpu") if _is_device(value) else value for value in args]
        kwargs = {k: torch.device("cpu") if _is_device(v) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")
    )


def _caller() -> str | None:
    """Return the place in the submission that called the running PyTorch function, if any."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if place := place_in(frame, frame.f_lineno):
            return place
        if not _is_library(frame.f_code.co_filename):
            return None
        frame = frame.f_back
    return None


def _is_library(path: str) -> bool:
    return f"{os.sep}torch{os.sep}" in path or f"{os.sep}torchvision{os.sep}" in path


def _training_step(submission: Submission) -> Iterator[str]:
    small, large = (
        LossCase("", torch.zeros(2, 3, side, side), make_boxes(2, side, side)) for side in (64, 128)
    )
    calls, reads = [], {}
    for case in (small, large):
        predictions = case.predictions(locations_of(submission, case.images))
        detector = training(stub_detector(submission, predictions))
        images, gt_boxes = torch.randn_like(case.images), case.gt_boxes.clone()
        before = images.clone()
        with _SimulatedGpu() as watched:
            detector(images, gt_boxes)
        calls.append(watched.calls)
        reads.update(watched.reads)
    where = "one_stage_detector.py, FCOS.forward"
    yield from _difference(where, "images", before, images)
    yield from _difference(where, "gt_boxes", large.gt_boxes, gt_boxes)
    for place, read in sorted(reads.items())[:3]:
        yield (
            f"{place}: {read} in the training step. On a GPU the program waits there until all "
            "work is done, in every iteration; keep the value as a tensor."
        )
    more_locations = 2 * (128**2 - 64**2) * (1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    if calls[1] - calls[0] > more_locations / 4:
        yield (
            f"{where}: a training step makes {calls[0]} calls to PyTorch for 2 images of 64 x 64 "
            f"and {calls[1]} for 128 x 128: there is a Python loop over locations. Compute all of "
            "them in one tensor."
        )


class _PrintRecorder(io.StringIO):
    """A stream that records where in the submission something is printed.

    Attributes:
        places: place -> the first text printed there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}

    def write(self, text: str) -> int:
        """Record the place, and drop the text."""
        frame = sys._getframe(1)
        place = place_in(frame, frame.f_lineno)
        if place and text.strip():
            self.places.setdefault(place, text.strip())
        return len(text)


def _prints(submission: Submission) -> Iterator[str]:
    detector = submission.detector()
    images = torch.randn(2, 3, 64, 64)
    recorder = _PrintRecorder()
    with redirect_stdout(recorder), contextlib.suppress(Exception):
        training(detector)(images, make_boxes(2, 64, 64))
        with torch.no_grad():
            evaluating(detector)(images[:1], test_score_thresh=0.05, test_nms_thresh=0.5)
    for place, text in sorted(recorder.places.items())[:3]:
        yield (
            f"{place}: prints {text[:40]!r} in every forward pass, thousands of times in a "
            "training run. Remove it, or log now and then in the training loop."
        )


# --------------------------------------------------------------------------------------------
# Non-maximum suppression
# --------------------------------------------------------------------------------------------


class _OperatorRecorder(TorchDispatchMode):
    """A mode that records the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _nms(submission: Submission) -> Iterator[str]:
    boxes, scores = cell_boxes()
    with _OperatorRecorder() as operators:
        submission.common.nms(boxes[:20], scores[:20], 0.5)
    if any(name.startswith("torchvision.nms") for name in operators.names):
        yield (
            "common.py, nms: calls torchvision's nms. The assignment asks for an implementation of "
            "one's own, which it then compares with torchvision's."
        )
        return
    start = time.perf_counter()
    submission.common.nms(boxes, scores, 0.5)
    seconds = time.perf_counter() - start
    if seconds > SLOW_NMS_SECONDS:
        yield (
            f"common.py, nms: takes {seconds:.1f} s for 5,000 boxes. Compare the best remaining "
            "box with all others in one tensor operation, and loop over kept boxes only."
        )


# --------------------------------------------------------------------------------------------
# Source
# --------------------------------------------------------------------------------------------

# Sizes of the assignment's data that should not be constants in the code.
SIZES = {224: "image size", 20: "number of classes of VOC"}


def _fixed_sizes(folder: Path) -> Iterator[str]:
    files = index_modules(folder)
    for part in ("common", "one_stage_detector"):
        if part in files:
            tree, _ = parse_file(files[part], f"{part}.py")
            for function, line, number in _numbers(tree):
                yield (
                    f"{part}.py, line {line}, {function}: {number} is written into the "
                    f"code, the {SIZES[number]} of the assignment. Take it from the shapes of "
                    "the tensors or from an argument; other data has other sizes."
                )


def _numbers(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Find constants of ``SIZES`` in functions: name of the function, line and number."""
    for owner, function in _functions(tree):
        # The handout itself has a dummy pass of images (2, 3, 224, 224).
        dummies = {
            id(inner)
            for node in ast.walk(function)
            if isinstance(node, (ast.Call, ast.Tuple, ast.List))
            and [
                getattr(x, "value", None) for x in getattr(node, "elts", getattr(node, "args", ()))
            ][:2]
            == [2, 3]
            for inner in ast.walk(node)
        }
        for statement in function.body:
            for node in ast.walk(statement):
                if (
                    isinstance(node, ast.Constant)
                    and type(node.value) is int
                    and node.value in SIZES
                    and id(node) not in dummies
                ):
                    yield f"{owner}{function.name}", node.lineno, node.value


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Find functions and methods, with the name of the class and a dot before a method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.", inner


# The module that a review is about, and the review.
_REVIEWS: tuple[tuple[str, Callable[[Submission], Iterator[str]]], ...] = (
    ("one_stage_detector", _location_order),
    ("common", _batch_norm),
    ("one_stage_detector", _changed_arguments_of_targets),
    ("one_stage_detector", _training_step),
    ("one_stage_detector", _prints),
    ("common", _nms),
    ("common", _changed_arguments_of_common),
    ("one_stage_detector", _changed_predictions),
    ("a4_helper", _evaluation),
)
