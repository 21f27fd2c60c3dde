"""ONNX: write a detector as one graph, and run such a file with ONNX Runtime.

A detector here is any module that maps images to candidates: a box, a class and a score for each of
N places per image. The graph adds what is not a network: the score threshold and non-maximum
suppression. The file says what its users have to know in its metadata (``OnnxDescription``).

Symbols: B images, N candidates per image, C classes, K detections.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from eecs598.data import IMAGENET_MEAN, IMAGENET_STD, normalize
from eecs598.runtime import atomic_write

if TYPE_CHECKING:
    import onnx

__all__ = [
    "OPSET",
    "ExportCheck",
    "OnnxDescription",
    "OnnxDetector",
    "check_onnx_device",
    "export_onnx",
    "missing_onnx_packages",
]

# The version of ONNX's operators: ONNX Runtime has it since 1.18, of May 2024.
OPSET = 20

# The metadata entry by which a file is known to be one of these, and the version of its contents.
FORMAT_KEY, FORMAT = "eecs598_detector", "1"

Detections = dict[str, Tensor]
Rows = tuple[Tensor, Tensor, Tensor]


class Select(Protocol):
    """From candidates to detections: score threshold and NMS, in PyTorch."""

    def __call__(
        self, candidates: Any, score_thresh: float, nms_thresh: float, /
    ) -> list[Detections]:
        """Select among boxes ``(B, N, 4)``, labels ``(B, N)`` and scores ``(B, N)``."""


@dataclass(frozen=True)
class OnnxDescription:
    """What a file says of itself.

    Attributes:
        class_names: in the order of their ids.
        image_size: shorter side in pixels to which images are resized.
        score_thresh: the usual score threshold; the graph takes any.
        nms_thresh: likewise.
        strides: of each pyramid level.
        normalized: images are float32 and normalized with ``mean`` and ``std``; otherwise they are
            RGB in uint8, which the graph normalizes itself.
        nms: the graph applies score threshold and NMS; otherwise it ends with the candidates.
        half: the network computes in float16.
        pixel_edges: the detector has learned boxes from edge to edge of their pixels, see
            ``eecs598.data.Instance.with_edges``.
    """

    class_names: list[str]
    image_size: int
    score_thresh: float
    nms_thresh: float
    strides: dict[str, int]
    normalized: bool = False
    nms: bool = True
    half: bool = False
    pixel_edges: bool = False

    def to_metadata(self) -> dict[str, str]:
        """Return texts by name, as an ONNX file holds them; all but the first are JSON."""
        entries = {**asdict(self), "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "opset": OPSET}
        return {FORMAT_KEY: FORMAT, **{key: json.dumps(value) for key, value in entries.items()}}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> OnnxDescription:
        """Read what ``to_metadata`` gave.

        Raises:
            ValueError: entries of something else, or of another version.
        """
        version = metadata.get(FORMAT_KEY)
        if version is None:
            raise ValueError("it is an ONNX file, but not one of `fcos export`")
        if version != FORMAT:
            raise ValueError(f"its contents have version {version}, and not {FORMAT}; export again")
        return cls(**{name: json.loads(metadata[name]) for name in cls.__dataclass_fields__})


def missing_onnx_packages(*, to_export: bool = True) -> list[str]:
    """Return those packages of the extra ``onnx`` that are needed and not installed.

    Args:
        to_export: they are needed to write a file; otherwise to run one.
    """
    names = ("onnx", "onnxruntime", "onnxscript") if to_export else ("onnxruntime",)
    return [name for name in names if importlib.util.find_spec(name) is None]


def _check_packages(*, to_export: bool) -> None:
    if missing := missing_onnx_packages(to_export=to_export):
        raise ValueError(
            f"ONNX needs {' and '.join(missing)}, not installed here. Install with: "
            'pip install "eecs598-fcos[onnx]"'
        )


def check_onnx_device(device: str) -> None:
    """Check that ONNX Runtime is installed and can compute on a device.

    Raises:
        ValueError: it is not, or can't.
    """
    _check_packages(to_export=False)
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if device.startswith("cuda") and "CUDAExecutionProvider" not in providers:
        raise ValueError(
            "this ONNX Runtime can't use a GPU: install onnxruntime-gpu in place of onnxruntime, "
            "or choose --device cpu."
        )


# --------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------

# Score threshold and NMS. A place detects one class, so the scores of all others are 0, which is
# not above any threshold. NonMaxSuppression drops a box when its IoU with a better one of its class
# is above the threshold, and of equal scores it takes the first, as ``common.nms`` does. Its result
# comes class by class; the scores are written back to their places and sorted image by image.
# TopK, too, puts the first of equal scores first.
_SELECT = """
<ir_version: 10, opset_import: ["" : {opset}]>
select (float[B, N, 4] all_boxes, int64[B, N] all_labels, float[B, N] all_scores,
        float score_threshold, float nms_threshold)
    => (float[K, 4] boxes, int64[K] labels, float[K] scores, int64[K] image_ids)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis = Constant <value_ints = [1]> ()
    num_classes = Constant <value_int = {num_classes}> ()
    nothing = Constant <value_float = 0.0> ()
    no_limit = Constant <value_ints = [2147483647]> ()
    image_and_place = Constant <value_ints = [0, 2]> ()

    classes = Range (zero, num_classes, one)
    classes_column = Unsqueeze (classes, axis)
    labels_row = Unsqueeze (all_labels, axis)
    is_class = Equal (labels_row, classes_column)
    scores_row = Unsqueeze (all_scores, axis)
    class_scores = Where (is_class, scores_row, nothing)
    found = NonMaxSuppression (all_boxes, class_scores, no_limit, nms_threshold, score_threshold)
    kept = Gather <axis = 1> (found, image_and_place)

    shape = Shape (all_scores)
    empty = Expand (nothing, shape)
    kept_scores = GatherND (all_scores, kept)
    scattered = ScatterND (empty, kept, kept_scores)
    num_kept = Shape <start = 0, end = 1> (found)
    num_places = Shape <start = 1, end = 2> (all_scores)
    longest = Min (num_kept, num_places)
    ranked_scores, ranked_places = TopK (scattered, longest)
    is_kept = Greater (ranked_scores, nothing)
    image_and_rank = NonZero (is_kept)
    image_ids = Gather (image_and_rank, zero)
    indices = Transpose (image_and_rank)
    scores = GatherND (ranked_scores, indices)
    places = GatherND (ranked_places, indices)
    image_column = Unsqueeze (image_ids, axis)
    place_column = Unsqueeze (places, axis)
    in_order = Concat <axis = 1> (image_column, place_column)
    boxes = GatherND (all_boxes, in_order)
    labels = GatherND (all_labels, in_order)
}}
"""

_ROWS = ("all_boxes", "all_labels", "all_scores")


class ExportCheck(NamedTuple):
    """By how much the file's candidates differ from PyTorch's, at most.

    Attributes:
        boxes: pixels.
        scores: in [0, 1].
        images: number of images compared.
    """

    boxes: float
    scores: float
    images: int


def export_onnx(
    network: nn.Module,
    path: str | os.PathLike[str],
    description: OnnxDescription,
    select: Select,
    images: Sequence[Tensor] = (),
) -> ExportCheck:
    """Write a detector as an ONNX file, once it is known to give what PyTorch gives.

    The graph takes any number of images of any one size. It is checked with ``onnx.checker``, and
    compared with PyTorch on random images of several sizes and on those given.

    Args:
        network: on the CPU, in evaluation mode and in float32; maps normalized images
            ``(B, 3, H, W)`` to boxes ``(B, N, 4)``, labels ``(B, N)`` and scores ``(B, N)``.
        path: of the file; it is written atomically.
        description: of the file. Half precision is checked on a GPU.
        select: what the graph's NMS is compared with.
        images: uint8 ``(3, H, W)``, real ones, to compare on.

    Raises:
        ValueError: packages are missing, half precision without a GPU to check it, or the graph
            and PyTorch do not agree.
    """
    _check_packages(to_export=True)
    import onnx

    device = "cpu"
    if description.half:
        device = _gpu_for_half()
    model = _network_graph(network, description)
    if description.nms:
        model = _with_nms(model, len(description.class_names))
    onnx.helper.set_model_props(model, description.to_metadata())
    model.producer_name = "eecs598-fcos"
    onnx.checker.check_model(model, full_check=True)
    result = _compare(model, network, description, select, _check_images(images), device)
    with atomic_write(path) as unfinished:
        onnx.save(model, unfinished)
    return result


def _gpu_for_half() -> str:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in providers:
        raise ValueError(
            "half precision can be checked on a CUDA GPU only, with the package onnxruntime-gpu; "
            "export in float32 here, or with --half there."
        )
    return "cuda"


class _Candidates(nn.Module):
    """The network with the graph's input in front of it."""

    def __init__(self, network: nn.Module, description: OnnxDescription) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half() if description.half else network
        self.normalized = description.normalized
        self.half_precision = description.half

    def forward(self, images: Tensor) -> Rows:
        if not self.normalized:
            images = normalize(images)
        boxes, labels, scores = self.network(images.half() if self.half_precision else images)
        return boxes, labels, scores


def _network_graph(network: nn.Module, description: OnnxDescription) -> onnx.ModelProto:
    """Return the graph from images to candidates."""
    # An example with three different sizes, each more than 1, so that none is taken for a constant.
    example = torch.zeros(2, 3, 96, 160, dtype=torch.uint8)
    any_size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Candidates(network, description).eval(),
                (normalize(example) if description.normalized else example,),
                dynamo=True,
                dynamic_shapes=(any_size,),
                input_names=["images"],
                output_names=list(_ROWS),
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"PyTorch can't export this detector to ONNX: {reason}") from error
    assert program is not None
    model = program.model_proto
    del model.metadata_props[:]
    _name_sizes(model.graph.input[0], {0: "B", 2: "H", 3: "W"})
    for output in model.graph.output:
        _name_sizes(output, {0: "B", 1: "N"})
    return model


def _name_sizes(value: onnx.ValueInfoProto, names: Mapping[int, str]) -> None:
    """Give the dimensions of an input or output that may have any size readable names."""
    for number, name in names.items():
        value.type.tensor_type.shape.dim[number].dim_param = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, warnings and log away from those who only want the file."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


def _with_nms(model: onnx.ModelProto, num_classes: int) -> onnx.ModelProto:
    """Append score threshold and NMS to a graph that ends with candidates."""
    import onnx

    select = onnx.parser.parse_model(_SELECT.format(opset=OPSET, num_classes=num_classes))
    select = onnx.compose.add_prefix(select, "nms/", rename_inputs=False, rename_outputs=False)
    model.ir_version = select.ir_version = max(model.ir_version, select.ir_version)
    merged = onnx.compose.merge_models(model, select, io_map=[(name, name) for name in _ROWS])
    versions = {entry.domain: entry.version for entry in merged.opset_import}  # now each twice
    del merged.opset_import[:]
    merged.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in versions.items())
    return merged


def _check_images(real: Sequence[Tensor]) -> list[Tensor]:
    """Return batches of uint8 images to compare on: random ones, then the given ones."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, 64, 64), (3, 97, 160), (2, 224, 160))
    random = [torch.randint(256, (b, 3, h, w), generator=generator) for b, h, w in sizes]
    return [*(images.to(torch.uint8) for images in random), *(image[None] for image in real)]


def _compare(
    model: onnx.ModelProto,
    network: nn.Module,
    description: OnnxDescription,
    select: Select,
    batches: Sequence[Tensor],
    device: str,
) -> ExportCheck:
    """Compare candidates with PyTorch's, and detections with those that PyTorch selects of them."""
    # One session gives both, so that candidates are the same to the last digit.
    session = _session(_showing_candidates(model).SerializeToString(), device)
    box_limit, score_limit = (2.0, 0.02) if description.half else (0.01, 1e-4)
    box_error = score_error = 0.0
    for batch in batches:
        normalized = normalize(batch)
        given = {"images": (normalized if description.normalized else batch).numpy()}
        with torch.no_grad():
            boxes, labels, scores = network(normalized)
        # Half of the candidates go to the NMS, whatever the detector is.
        score_thresh = scores.median().item()
        if description.nms:
            given |= _thresholds(score_thresh, description.nms_thresh)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(names, given), strict=True))
        rows = tuple(torch.from_numpy(found[name]) for name in _ROWS)
        if rows[0].shape != boxes.shape:
            raise ValueError(
                f"the exported graph has candidates {tuple(rows[0].shape)} for images "
                f"{tuple(batch.shape)}, PyTorch {tuple(boxes.shape)}; it is not written."
            )
        # Where two classes are equally probable, rounding decides.
        same = (rows[1] == labels).float().mean().item()
        # The new difference comes first: so max() returns NaN, which the test below refuses.
        box_error = max((rows[0] - boxes).abs().max().item(), box_error)
        score_error = max((rows[2] - scores).abs().max().item(), score_error)
        if not (box_error <= box_limit and score_error <= score_limit and same > 0.99):
            raise ValueError(
                f"the exported graph and PyTorch differ by {box_error:.3g} px and "
                f"{score_error:.3g} in scores, in {1 - same:.1%} of the classes, on images "
                f"{tuple(batch.shape)}; it is not written."
            )
        if description.nms:
            expected = select(rows, score_thresh, description.nms_thresh)
            _check_selection(found, expected, batch)
    return ExportCheck(box_error, score_error, sum(len(batch) for batch in batches))


def _showing_candidates(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph that has the candidates among its outputs."""
    import onnx

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    names = {output.name for output in shown.graph.output}
    shapes: dict[str, list[str | int | None]] = {
        "all_boxes": ["B", "N", 4],
        "all_labels": ["B", "N"],
        "all_scores": ["B", "N"],
    }
    for name, shape in shapes.items():
        if name not in names:
            kind = onnx.TensorProto.INT64 if name == "all_labels" else onnx.TensorProto.FLOAT
            shown.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    return shown


def _check_selection(
    found: Mapping[str, np.ndarray], expected: Sequence[Detections], batch: Tensor
) -> None:
    """Raise ValueError unless the graph selects the candidates that PyTorch selects.

    Nearly all of them: the last digit of an IoU depends on the processor's instructions.
    """
    counts = [len(detections["scores"]) for detections in expected]
    keys = ("scores", "labels", "boxes")
    wanted = [np.repeat(np.arange(len(counts)), counts)]
    wanted += [torch.cat([detections[key] for detections in expected]).numpy() for key in keys]
    rows = [
        {row.tobytes() for row in np.column_stack([np.asarray(c, np.float64) for c in columns])}
        for columns in ([found["image_ids"], *(found[key] for key in keys)], wanted)
    ]
    if len(rows[0] ^ rows[1]) > 0.01 * len(rows[1]):
        raise ValueError(
            f"the graph's NMS gives {len(found['scores'])} detections in images "
            f"{tuple(batch.shape)}, PyTorch's {sum(counts)}, and {len(rows[0] & rows[1])} of them "
            "are the same; it is not written."
        )


# --------------------------------------------------------------------------------------------
# Run
# --------------------------------------------------------------------------------------------


class OnnxDetector(nn.Module):
    """A detector in an ONNX file, run by ONNX Runtime in place of PyTorch.

    It is called as a detector in evaluation mode, so that ``a4_helper`` evaluates it, and has
    ``predict`` for batches. It can't be trained.

    Args:
        source: an ONNX file of ``export_onnx``.
        select: score threshold and NMS of files without them.
        device: ``"cpu"``, or a CUDA device with onnxruntime-gpu.

    Raises:
        ValueError: packages are missing, no such file, or something else than a detector.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        select: Select,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        check_onnx_device(device)
        if not os.path.isfile(source):
            raise ValueError(f"{source}: no such file.")
        try:
            self._session = _session(os.fspath(source), device)
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.description = OnnxDescription.from_metadata(metadata)
        except Exception as error:  # ONNX Runtime has many kinds, and no class for them
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise ValueError(f"{source} can't be used as a detector: {reason}.") from error
        self._select = select
        self.eval()

    def train(self, mode: bool = True) -> OnnxDetector:
        """Refuse training mode.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            raise ValueError("a detector in an ONNX file can't be trained; train a checkpoint.")
        return super().train(False)

    def forward(
        self, images: Tensor, *, test_score_thresh: float, test_nms_thresh: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes ``(K, 4)``, class ids ``(K,)`` and scores ``(K,)`` of one image."""
        (found,) = self.predict(images, test_score_thresh, test_nms_thresh)
        return found["boxes"], found["labels"], found["scores"]

    def predict(
        self, images: Tensor, score_thresh: float, nms_thresh: float
    ) -> list[dict[str, Tensor]]:
        """Detect objects in a batch of images of one size.

        Args:
            images: ``(B, 3, H, W)``, normalized, as the data sets of this project give them.
            score_thresh: detections score above it.
            nms_thresh: IoU above which the lower of two detections of a class is dropped.

        Returns:
            Per image ``{"boxes": (K, 4), "labels": (K,), "scores": (K,)}`` by decreasing score,
            on the CPU.

        Raises:
            ValueError: a wrong shape, pixels that are not finite, thresholds outside [0, 1].
        """
        # With NumPy, which has one thread: those of PyTorch would wait busily for their next work
        # while ONNX Runtime's compute, which takes 6 ms more for an image on two cores.
        values = np.ascontiguousarray(images.detach().float().cpu().numpy())
        _check_call(values, score_thresh, nms_thresh)
        given = {"images": values if self.description.normalized else _to_pixels(values)}
        if not self.description.nms:
            rows = tuple(torch.from_numpy(values) for values in self._session.run(None, given))
            return self._select(rows, score_thresh, nms_thresh)
        found = self._session.run(None, given | _thresholds(score_thresh, nms_thresh))
        boxes, labels, scores, image_ids = (torch.from_numpy(values) for values in found)
        counts = torch.bincount(image_ids, minlength=len(images)).tolist()
        parts = (boxes.split(counts), labels.split(counts), scores.split(counts))
        return [
            {"boxes": own_boxes, "labels": own_labels, "scores": own_scores}
            for own_boxes, own_labels, own_scores in zip(*parts, strict=True)
        ]


def _to_pixels(images: np.ndarray) -> np.ndarray:
    """Undo the normalization of images: RGB in uint8."""
    mean, std = (
        np.asarray(each, np.float32)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return np.rint(255 * (images * std + mean)).clip(0, 255).astype(np.uint8)


def _check_call(images: np.ndarray, score_thresh: float, nms_thresh: float) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, 3, H, W).")
    if not np.isfinite(images.sum()):
        raise ValueError("the images contain NaN or infinite pixels.")
    for name, value in (("score", score_thresh), ("NMS", nms_thresh)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} threshold={value!r}; expected a number from 0 to 1.")


def _session(source: str | bytes, device: str) -> Any:
    """Open a file, or its bytes, with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Images differ in size; a plan for the memory of each size would only fill the memory.
    options.enable_mem_pattern = False
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        number = torch.device(device).index or 0
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": number}))
    return onnxruntime.InferenceSession(source, options, providers)


def _thresholds(score_thresh: float, nms_thresh: float) -> dict[str, np.ndarray]:
    """Return the thresholds as inputs of the graph.

    An IoU in float32 is above a threshold in double precision exactly when it is above the largest
    float32 that is not above that threshold.
    """
    rounded = np.float32(nms_thresh)
    if float(rounded) > nms_thresh:
        rounded = np.nextafter(rounded, np.float32(0))
    return {
        "score_threshold": np.array(score_thresh, np.float32),
        "nms_threshold": np.array(rounded, np.float32),
    }
