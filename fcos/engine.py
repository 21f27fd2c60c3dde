"""What computes detections: PyTorch, or ONNX Runtime, which is faster on processors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eecs598.deploy import OPSET, OnnxDetector, check_onnx_device, missing_onnx_packages
from eecs598.runtime import gather, is_main_process, package_versions
from fcos.export import export_detector
from fcos.models import TrainedDetector, load_detector
from one_stage_detector import FCOS, FCOSPostProcessor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Predictor", "cache_folder", "load_predictor", "load_predictor_once"]

# Packages whose versions may change what an export holds or how it runs.
_PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")

# The export takes some 10 s, and then an image some 15 ms less.
WORTH_AN_EXPORT = 500

# In the cache; each takes some 20 MB.
KEPT_EXPORTS = 10


@dataclass(frozen=True)
class Predictor:
    """A detector that is ready to be used; calling it detects objects.

    Attributes:
        detector: in evaluation mode on its device; ``predict(images, score_thresh, nms_thresh)``
            takes a batch.
        class_names: in the order of their ids.
        image_size: shorter side in pixels to which images are resized.
        strides: of each pyramid level.
        engine: what computes, in words.
        device: of the detector.
        detector_hash: tells detectors apart.
        pixel_edges: see ``a4_helper.evaluate_detector``.
    """

    detector: FCOS | OnnxDetector
    class_names: list[str]
    image_size: int
    strides: Mapping[str, int]
    engine: str
    device: str
    detector_hash: str
    pixel_edges: bool

    def __call__(
        self, images: Tensor, score_thresh: float, nms_thresh: float
    ) -> list[dict[str, Tensor]]:
        """Detect objects in normalized images ``(B, 3, H, W)``, as ``FCOS.predict`` does."""
        return self.detector.predict(images, score_thresh, nms_thresh)


def load_predictor(
    checkpoint: str | os.PathLike[str],
    *,
    backbone: str = "",
    data: str | None = None,
    classes: str | None = None,
    image_size: int | None = None,
    classes_per_location: int | None = None,
    device: str = "cpu",
    engine: str = "auto",
    amp: str = "off",
    num_images: int | Callable[[], int] | None = None,
) -> Predictor:
    """Load a detector and choose what runs it.

    Args:
        checkpoint: as ``load_detector`` takes it, or an ONNX file of ``fcos export``.
        backbone: see ``load_detector``.
        data: see ``load_detector``.
        classes: see ``load_detector``.
        image_size: in place of the one in training.
        classes_per_location: likewise.
        device: ``"cpu"`` or a CUDA device.
        engine: ``"torch"``; ``"onnx"``, for which a checkpoint is exported once, into the user's
            cache folder; or ``"auto"``: ONNX Runtime on a CPU where it is installed, unless the
            export would take longer than it saves. Otherwise PyTorch.
        amp: ``"auto"`` for lower precision, which PyTorch alone offers.
        num_images: how many images there will be, or a function that counts them, called where
            that matters; many unless given.

    Raises:
        ValueError: as ``load_detector`` and ``OnnxDetector``, or options that exclude each other.
    """
    if engine == "onnx":
        if amp != "off":
            raise ValueError("--engine onnx computes in float32; use --amp off, or --engine torch.")
        check_onnx_device(device)  # before an export, which takes some time
    if Path(checkpoint).suffix == ".onnx":
        if engine == "torch" or amp != "off":
            raise ValueError(
                f"{checkpoint} is run by ONNX Runtime; leave out --engine and --amp, or give the "
                "checkpoint that it was exported from."
            )
        if classes is not None:
            raise ValueError(f"{checkpoint} has class names; leave out --classes.")
        if classes_per_location is not None:
            raise ValueError(
                f"{checkpoint} has been exported with its number of classes per location; leave "
                "out --classes-per-location, or give the checkpoint."
            )
        detector = OnnxDetector(checkpoint, FCOSPostProcessor.select, device)
        facts = detector.description
        digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:32]
        return _with_onnx(detector, image_size or facts.image_size, device, digest)
    model = load_detector(
        checkpoint,
        backbone=backbone,
        data=data,
        classes=classes,
        image_size=image_size,
        classes_per_location=classes_per_location,
    )
    size = model.settings.data.image_size
    digest = _detector_hash(model)
    path = cache_folder() / f"{_export_hash(model, digest)}.onnx"
    usable = device == "cpu" and amp == "off" and not missing_onnx_packages()
    if engine == "onnx" or (engine == "auto" and usable and _worth_it(path, num_images)):
        try:
            return _with_onnx(_cached_export(model, path, device), size, device, digest)
        except ValueError as error:
            if engine == "onnx":
                raise
            print(f"fcos: PyTorch is used, since {error}", file=sys.stderr)
    model.detector.to(device).eval()
    return Predictor(
        model.detector,
        model.class_names,
        size,
        model.detector.backbone.fpn_strides,
        f"PyTorch {torch.__version__}",
        device,
        digest,
        model.settings.data.pixel_edges,
    )


def load_predictor_once(checkpoint: str | os.PathLike[str], **options: Any) -> Predictor:
    """Load as ``load_predictor`` does, the main process first, so that only one exports."""
    first = load_predictor(checkpoint, **options) if is_main_process() else None
    gather(None)
    return first if first is not None else load_predictor(checkpoint, **options)


def _with_onnx(detector: OnnxDetector, image_size: int, device: str, digest: str) -> Predictor:
    import onnxruntime

    facts = detector.description
    return Predictor(
        detector,
        facts.class_names,
        image_size,
        facts.strides,
        f"ONNX Runtime {onnxruntime.__version__}",
        device,
        digest,
        facts.pixel_edges,
    )


def _worth_it(path: Path, num_images: int | Callable[[], int] | None) -> bool:
    """Return whether there is an export already, or enough images to make one for."""
    if path.is_file() or num_images is None:
        return True
    count = num_images if isinstance(num_images, int) else num_images()
    return count >= WORTH_AN_EXPORT


def _cached_export(model: TrainedDetector, path: Path, device: str) -> OnnxDetector:
    """Return the exported detector from the cache, where it is put if it is not there yet."""
    select = model.detector.post_processor.select
    if path.is_file():
        try:
            detector = OnnxDetector(path, select, device)
            with contextlib.suppress(OSError):
                path.touch()
            return detector
        except ValueError as error:
            print(f"fcos: exporting again: {error}", file=sys.stderr)
    start = time.perf_counter()
    print("fcos: exporting to ONNX, once for this checkpoint ...", file=sys.stderr)
    try:
        export_detector(model, path, normalized=True)
        print(f"fcos: {path}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        _remove_unused(path.parent)
        return OnnxDetector(path, select, device)
    except OSError as error:  # a home that can't be written to
        print(f"fcos: {error}; the export is not kept", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        export_detector(model, path, normalized=True)
        return OnnxDetector(path, select, device)


def _remove_unused(folder: Path) -> None:
    """Remove all exports but those that were used last."""
    with contextlib.suppress(OSError):  # in use, or another process was faster
        exports = sorted(folder.glob("*.onnx"), key=lambda path: path.stat().st_mtime)
        for path in exports[:-KEPT_EXPORTS]:
            path.unlink()


def cache_folder() -> Path:
    """Return the folder of the user for files that can be made again."""
    if os.name == "nt" and "LOCALAPPDATA" in os.environ:
        base = Path(os.environ["LOCALAPPDATA"])
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return base / "eecs598-fcos"


def _detector_hash(model: TrainedDetector) -> str:
    result = hashlib.sha256(str(model.settings.model.classes_per_location).encode())
    for name, value in model.detector.state_dict().items():
        result.update(name.encode())
        result.update(value.contiguous().numpy().tobytes())
    return result.hexdigest()[:32]


def _export_hash(model: TrainedDetector, detector_hash: str) -> str:
    """Return a hash of all that decides what an export holds."""
    settings = [model.settings.to_dict()["model"], model.settings.data.pixel_edges]
    facts: list[Any] = [detector_hash, settings, model.class_names, OPSET]
    facts += [package_versions(_PACKAGES), package_versions(["eecs598-fcos"])]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
