"""What a reviewer would say about a submission, beyond right and wrong.

Most of it is found by behaviour: the code runs on small inputs and somebody watches. None of it
costs points, and none of it is found twice.
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

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eecs598.grading.checks.a4_helper import EVALUATED, export_detections
from eecs598.grading.checks.detector import APART, make_scene
from eecs598.grading.checks.locations import (
    ADVICE,
    expect_local_gradients,
    expect_responses_in_place,
)
from eecs598.grading.checks.losses import SEVERAL, LossScene
from eecs598.grading.checks.network import build_backbone
from eecs598.grading.checks.nms import cell_boxes
from eecs598.grading.checks.reference import STRIDES
from eecs598.grading.checks.stubs import locations_of, plant
from eecs598.grading.result import Wrong, isolated, place_in, show
from eecs598.grading.source import index_of, parse_file
from eecs598.grading.submission import Submission, evaluating, training

__all__ = ["find"]

SLOW_NMS_SECONDS = 2.0


def find(submission: Submission, folder: str | os.PathLike) -> list[str]:
    """Look at a submission as a reviewer would.

    Args:
        submission: its modules. Nothing is said of those that are replaced.
        folder: where its files lie.

    Returns:
        Advice, a sentence or two each: the file, the function, what it does and why that matters.
        What can't be found out, because the code fails, is left out.
    """
    found: list[str] = []
    submission = submission.answering
    for part, look in _LOOKS:
        if part in submission.replaced:
            continue
        with contextlib.suppress(Exception, SystemExit), isolated():
            for sentence in look(submission):
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
        expect_responses_in_place(submission, 3, 5)
        expect_local_gradients(submission, evaluating(submission.detector()), 64, 224)
    except Wrong as wrong:
        if ADVICE not in str(wrong):
            return  # something else is wrong
        yield (
            "one_stage_detector.py, FCOSPredictionNetwork, and common.py, get_fpn_location_coords: "
            "predictions and locations are listed in different orders, so prediction n is trained "
            "and decoded at the mirror image of its place. The loss still falls, and mAP ends at "
            f"about half. {wrong}."
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
        for name, _, truth, detections in EVALUATED:
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
    scene = make_scene(submission, APART)
    for level_values in scene.detector.pred_net.predictions:
        for values in level_values.values():
            values.requires_grad_()
    found = scene.detector(scene.images, test_score_thresh=0.05, test_nms_thresh=0.5)
    return any(values.requires_grad for values in found)


# --------------------------------------------------------------------------------------------
# Arguments that come back changed
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
    # Negative deltas and such that reach over the edge: clipping is what is done in place.
    beyond = APART[0]._replace(cell=(5, 9), deltas=(20.0, -1.0, 20.0, -1.0))
    scene = make_scene(submission, [*APART, beyond])
    before = copy.deepcopy([scene.images, *scene.predictions])
    scene.detect()
    where = "one_stage_detector.py, FCOS.inference"
    yield from _difference(where, "images", before[0], scene.images)
    names = ("class logits", "deltas", "centerness logits")
    for name, then, now in zip(names, before[1:], scene.predictions, strict=True):
        changes = (_difference(where, f"the {name} of {p}", then[p], now[p]) for p in STRIDES)
        yield from islice(chain.from_iterable(changes), 1)  # the levels are alike


def _changes(
    where: str, module: object, name: str, arguments: dict[str, Tensor], *more: object
) -> Iterator[str]:
    """Call a function and say which of its tensors it changed."""
    copies = {key: value.clone() for key, value in arguments.items()}
    getattr(module, name)(*copies.values(), *more)
    for key, value in arguments.items():
        yield from _difference(where, key, value, copies[key])


def _difference(where: str, name: str, before: Tensor, after: Tensor) -> Iterator[str]:
    wrong = (before != after).nonzero()
    if len(wrong):
        row = tuple(wrong[0].tolist()[:-1]) if before.dim() > 1 else ...
        yield (
            f"{where}: changes its argument {name} in place, {show(before[row])} became "
            f"{show(after[row])}. Whoever called it goes on with other values; work on a copy."
        )


# --------------------------------------------------------------------------------------------
# Training step and forward passes
# --------------------------------------------------------------------------------------------


class _PretendedGpu(TorchFunctionMode):
    """Tensors say they are on a GPU; notes what would make the program wait for it.

    So the code takes the way that it takes on a GPU, and there is no need of one.
    """

    READS = {
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
        self.reads: dict[str, str] = {}  # place -> what is done there
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda")
        if func == torch.Tensor.is_cuda.__get__:
            return True
        kwargs = kwargs or {}
        read = self.READS.get(func)
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
    """Place in the submission from which the running function was called, if from there."""
    frame = sys._getframe(2)
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
    small = LossScene("", torch.zeros(2, 3, 64, 64), SEVERAL.gt_boxes)
    calls, reads = [], {}
    for scene in (small, SEVERAL):
        predictions = scene.predictions(locations_of(submission, scene.images))
        detector = training(plant(submission, predictions))
        images, gt_boxes = torch.randn_like(scene.images), scene.gt_boxes.clone()
        before = images.clone()
        with _PretendedGpu() as watched:
            detector(images, gt_boxes)
        calls.append(watched.calls)
        reads.update(watched.reads)
    where = "one_stage_detector.py, FCOS.forward"
    yield from _difference(where, "images", before, images)
    yield from _difference(where, "gt_boxes", SEVERAL.gt_boxes, gt_boxes)
    for place, read in sorted(reads.items())[:3]:
        yield (
            f"{place}: {read} in the training step. On a GPU the program waits there until all "
            "work is done, in every iteration; keep the value as a tensor."
        )
    more_locations = 2 * (192 - 64) * 64 * (1 / 8**2 + 1 / 16**2 + 1 / 32**2)
    if calls[1] - calls[0] > more_locations / 4:
        yield (
            f"{where}: a training step makes {calls[0]} calls to PyTorch for 2 images of 64 x 64 "
            f"and {calls[1]} for 64 x 192: there is a Python loop over locations. Compute all of "
            "them in one tensor."
        )


class _Listener(io.StringIO):
    """Notes from where in the submission something is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}  # place -> what was printed first

    def write(self, text: str) -> int:
        frame = sys._getframe(1)
        place = place_in(frame, frame.f_lineno)
        if place and text.strip():
            self.places.setdefault(place, text.strip())
        return len(text)


def _prints(submission: Submission) -> Iterator[str]:
    detector = submission.detector()
    images = torch.randn(2, 3, 64, 192)
    listener = _Listener()
    with redirect_stdout(listener), contextlib.suppress(Exception):
        training(detector)(images, SEVERAL.gt_boxes.clone())
        with torch.no_grad():
            evaluating(detector)(images[:1], test_score_thresh=0.05, test_nms_thresh=0.5)
    for place, text in sorted(listener.places.items())[:3]:
        yield (
            f"{place}: prints {text[:40]!r} in every forward pass, thousands of times in a "
            "training. Remove it, or log now and then in the training loop."
        )


# --------------------------------------------------------------------------------------------
# Non-maximum suppression
# --------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _nms(submission: Submission) -> Iterator[str]:
    boxes, scores = cell_boxes()
    with _Operators() as operators:
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

# Numbers of the assignment that must not be written into the code: image size, classes, batch.
FIXED = {224: "image size", 20: "number of classes of VOC"}


def _fixed_sizes(folder: Path) -> Iterator[str]:
    files = index_of(folder)
    for part in ("common", "one_stage_detector"):
        if part in files:
            tree, _ = parse_file(files[part], f"{part}.py")
            for function, node in _numbers(tree):
                yield (
                    f"{part}.py, line {node.lineno}, {function}: {node.value} is written into the "
                    f"code, the {FIXED[node.value]} of the assignment. Take it from the shapes of "
                    "the tensors or from an argument; other data has other sizes."
                )


def _numbers(tree: ast.Module) -> Iterator[tuple[str, ast.Constant]]:
    """Fixed sizes in the bodies of functions, with the function's name."""
    for owner, function in _functions(tree):
        # The dummy pass of the handout, for the notebook to show some shapes.
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
                    and node.value in FIXED
                    and id(node) not in dummies
                ):
                    yield f"{owner}{function.name}", node


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield "", node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.", inner


# Whose file it is about, and who looks.
_LOOKS: tuple[tuple[str, Callable[[Submission], Iterator[str]]], ...] = (
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
