"""Detectors as ONNX files: the same detections as PyTorch's, on images of any size."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from eecs598.data import normalize
from eecs598.deploy import OPSET, OnnxDescription, OnnxDetector, export_onnx
from eecs598.deploy.onnx import _with_nms
from one_stage_detector import FCOS, Candidates, FCOSCandidates, FCOSPostProcessor

select = FCOSPostProcessor.select
SIZES = ((1, 64, 64), (3, 225, 353), (1, 97, 640), (16, 64, 96), (2, 33, 31))


def detector_that_finds(num_classes: int, **kwargs) -> FCOS:
    """An untrained detector that finds many things, of all classes, with boxes of all shapes."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        detector = FCOS(num_classes, 16, [16], weights=None, **kwargs).eval()
    pixels = torch.randint(256, (2, 3, 97, 160)).to(torch.uint8)
    with torch.no_grad():
        # Features of the size that training gives them; wild ones would only amplify rounding.
        for level, feats in detector.backbone(normalize(pixels)).items():
            for parameter in detector.backbone.fpn_params[f"output_{level}"].parameters():
                parameter.div_(feats.std())
        for parameter in detector.pred_net.parameters():
            if parameter.dim() == 4:
                parameter.normal_(std=0.1)
        detector.pred_net.pred_cls.bias.zero_()
        detector.pred_net.pred_box.bias.fill_(2.0)
        for number, scale in enumerate(detector.pred_net.scales.values()):
            scale.fill_(1 + 0.5 * number)
    return detector


def export(detector: FCOS, path: Path, **more) -> OnnxDetector:
    names = [f"class {number}" for number in range(detector.num_classes)]
    strides = detector.backbone.fpn_strides
    description = OnnxDescription(names, 64, 0.4, 0.6, strides, **more)
    export_onnx(FCOSCandidates(detector), path, description, select)
    return OnnxDetector(path, select)


def unexplained(found: dict, expected: dict, score_thresh: float, nms_thresh: float) -> int:
    """Count detections of one side without a counterpart on the other, ties aside.

    A tie is a score at the threshold, an overlap at the NMS threshold, or two scores that are
    equal to 1e-4: rounding decides there.
    """
    from torchvision.ops import box_iou

    missing = 0
    for one, other in ((found, expected), (expected, found)):
        if len(one["scores"]) == 0:
            continue
        iou = box_iou(one["boxes"], other["boxes"])
        same_class = one["labels"][:, None] == other["labels"]
        score_gap = (one["scores"][:, None] - other["scores"]).abs()
        box_gap = (one["boxes"][:, None] - other["boxes"]).abs().amax(dim=-1)
        matched = (same_class & (score_gap < 1e-4) & (box_gap < 0.01)).any(dim=1)
        tie = (one["scores"] - score_thresh).abs() < 1e-4
        tie |= (same_class & ((iou - nms_thresh).abs() < 1e-3)).any(dim=1)
        tie |= (same_class & (iou > nms_thresh) & (score_gap < 1e-4)).any(dim=1)
        missing += int((~matched & ~tie).sum())
    return missing


def check_same(detector: FCOS, exported: OnnxDetector, sizes=SIZES) -> int:
    """Compare detections on images of several sizes; return how many there are."""
    count = 0
    for batch, height, width in sizes:
        generator = torch.Generator().manual_seed(height)
        pixels = torch.randint(256, (batch, 3, height, width), generator=generator)
        images = normalize(pixels.to(torch.uint8))
        expected = detector.predict(images, 0.3, 0.5)
        found = exported.predict(images, 0.3, 0.5)
        assert len(found) == len(expected) == batch
        for one, other in zip(found, expected, strict=True):
            assert unexplained(one, other, 0.3, 0.5) == 0
            assert (one["scores"].diff() <= 0).all()
            count += len(one["scores"])
    return count


@pytest.fixture(scope="module")
def torchvision_detector() -> FCOS:
    return detector_that_finds(3)


@pytest.fixture(scope="module")
def exported(torchvision_detector, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "detector.onnx"
    export(torchvision_detector, path)
    return path


def test_same_detections_on_images_of_any_size(torchvision_detector, exported):
    assert check_same(torchvision_detector, OnnxDetector(exported, select)) > 500


def test_no_detection_and_all_thresholds(torchvision_detector, exported):
    runner = OnnxDetector(exported, select)
    images = normalize(torch.randint(256, (3, 3, 64, 96)).to(torch.uint8))
    for found in runner.predict(images, 1.0, 0.5):
        assert {key: tuple(value.shape) for key, value in found.items()} == {
            "boxes": (0, 4),
            "labels": (0,),
            "scores": (0,),
        }
    everything = runner.predict(images, 0.0, 1.0)
    assert [len(found["scores"]) for found in everything] == [96 + 24 + 6] * 3
    boxes, labels, scores = runner(images[:1], test_score_thresh=0.3, test_nms_thresh=0.5)
    expected = torchvision_detector(images[:1], test_score_thresh=0.3, test_nms_thresh=0.5)
    assert torch.equal(labels, expected[1]) and len(scores) > 5
    torch.testing.assert_close(boxes, expected[0], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("num_classes", "kwargs", "more"),
    [
        (1, {"backbone": "timm:tf_efficientnet_lite0"}, {"normalized": True}),
        (3, {"classes_per_location": 2}, {}),
        (80, {"head_norm": "group", "level_scales": True}, {"nms": False, "normalized": True}),
    ],
)
def test_other_detectors(num_classes, kwargs, more, tmp_path):
    detector = detector_that_finds(num_classes, **kwargs)
    runner = export(detector, tmp_path / "detector.onnx", **more)
    assert check_same(detector, runner) > 500


def test_the_file_says_what_its_users_need(exported):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    assert inputs["images"].elem_type == onnx.TensorProto.UINT8
    sizes = [size.dim_param or size.dim_value for size in inputs["images"].shape.dim]
    assert sizes == ["B", 3, "H", "W"]
    assert [value.name for value in model.graph.output] == [
        "boxes",
        "labels",
        "scores",
        "image_ids",
    ]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["class_names"]) == ["class 0", "class 1", "class 2"]
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["score_thresh"]) == 0.4 and json.loads(metadata["image_size"]) == 64


def selection(candidates: Candidates, num_classes: int):
    """Run the NMS of the graph alone."""
    import onnxruntime

    identity = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {OPSET}]>
        g (float[B, N, 4] b, int64[B, N] l, float[B, N] s)
            => (float[B, N, 4] all_boxes, int64[B, N] all_labels, float[B, N] all_scores)
        {{ all_boxes = Identity (b)  all_labels = Identity (l)  all_scores = Identity (s) }}
    """)
    session = onnxruntime.InferenceSession(_with_nms(identity, num_classes).SerializeToString())
    values = dict(zip("bls", (value.numpy() for value in candidates), strict=True))
    return lambda thresholds: session.run(None, values | thresholds)


@pytest.mark.parametrize("nms_thresh", [0.3, 0.5, 0.7])
def test_nms_of_the_graph_is_ours_to_the_last_box(rng, nms_thresh):
    """Equal scores, empty boxes, equal boxes, and an IoU that is exactly the threshold."""
    from eecs598.deploy.onnx import _thresholds

    corners = torch.randint(40, (3, 300, 2), generator=rng).float()
    sides = torch.randint(1, 30, (3, 300, 2), generator=rng).float()
    sides[0, :10] = 0
    sides[:, 10:20, 0] = 10
    boxes = torch.cat([corners, corners + sides], dim=-1)
    boxes[1, 20:40] = boxes[1, 40:60]
    # Ten columns and five, seven or three of them: IoU 0.5, 0.7 and 0.3 exactly.
    for place, width in enumerate((10, 5, 7, 3)):
        boxes[2, place] = torch.tensor([100.0, 100, 100 + width, 110])
    labels = torch.randint(4, (3, 300), generator=rng)
    labels[2, :4] = 0
    scores = torch.randint(20, (3, 300), generator=rng) / 20
    scores[2, :4] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    candidates = Candidates(boxes, labels, scores)
    run = selection(candidates, 4)
    for score_thresh in (0.0, 0.25, 0.95):
        found = run(_thresholds(score_thresh, nms_thresh))
        expected = select(candidates, score_thresh, nms_thresh)
        for key, values in zip(("boxes", "labels", "scores"), found, strict=False):
            wanted = torch.cat([detections[key] for detections in expected])
            assert torch.equal(torch.from_numpy(values), wanted)
        counts = torch.tensor([len(detections["scores"]) for detections in expected])
        assert found[3].tolist() == torch.arange(3).repeat_interleave(counts).tolist()


def test_a_graph_that_differs_is_not_written(torchvision_detector, tmp_path, monkeypatch):
    """The comparison sees boxes, scores and NMS that are wrong."""
    description = OnnxDescription(["a", "b", "c"], 64, 0.4, 0.6, {"p3": 8})

    class Constant(nn.Module):
        """Differs between the export and the comparison."""

        shift = 0.0

        def forward(self, images):
            flat = images.flatten(2).mean(dim=1)[:, :50]
            boxes = torch.stack([flat, flat, flat + 20, flat + 20], dim=-1) + self.shift
            return boxes, (flat > 0).long(), flat.sigmoid() - self.shift

    class Shifting(Constant):
        def eval(self):
            return self

    for shift, words in ((0.0, None), (0.02, "px")):
        network = Shifting()
        original = torch.onnx.export

        def exporting(*args, shift=shift, network=network, original=original, **kwargs):
            result = original(*args, **kwargs)
            network.shift = shift
            return result

        monkeypatch.setattr(torch.onnx, "export", exporting)
        path = tmp_path / f"{shift}.onnx"
        if words is None:
            export_onnx(network, path, description, select)
        else:
            with pytest.raises(ValueError, match=words):
                export_onnx(network, path, description, select)
        assert path.exists() == (words is None)
        monkeypatch.undo()
    with pytest.raises(ValueError, match="NMS gives"):
        export_onnx(
            Shifting(),
            tmp_path / "other.onnx",
            description,
            lambda rows, score, nms: select(Candidates(*rows), score, 1.0),
        )
    assert not (tmp_path / "other.onnx").exists()


def test_files_that_are_no_detector(exported, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "empty.onnx").touch()
    other = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {OPSET}]> '
        "g (float[N] x) => (float[N] y) { y = Identity (x) }"
    )
    onnx.save(other, tmp_path / "other.onnx")
    for name, words in (
        ("cut.onnx", "can't be used as a detector"),
        ("text.onnx", "can't be used as a detector"),
        ("empty.onnx", "can't be used as a detector"),
        ("other.onnx", "not one of `fcos export`"),
        ("none.onnx", "no such file"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            OnnxDetector(tmp_path / name, select)
        assert "\n" not in str(error.value)


def test_half_precision_is_refused_without_a_gpu(torchvision_detector, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="half precision can be checked on a CUDA GPU only"):
        export(torchvision_detector, tmp_path / "half.onnx", half=True)
    assert not (tmp_path / "half.onnx").exists()


def test_missing_packages(torchvision_detector, exported, tmp_path, monkeypatch):
    from importlib import util

    original = util.find_spec
    missing = {"onnxscript"}
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in missing else original(name))
    with pytest.raises(ValueError, match=r"needs onnxscript.*eecs598-fcos\[onnx\]"):
        export(torchvision_detector, tmp_path / "a.onnx")
    OnnxDetector(exported, select)  # which needs less
    missing.add("onnxruntime")
    with pytest.raises(ValueError, match="needs onnxruntime"):
        OnnxDetector(exported, select)


def test_calls_that_are_refused(exported):
    runner = OnnxDetector(exported, select)
    for images, score, words in (
        (torch.zeros(3, 64, 64), 0.5, "shape"),
        (torch.full((1, 3, 64, 64), float("nan")), 0.5, "NaN"),
        (torch.zeros(1, 3, 64, 64), 1.5, "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=words):
            runner.predict(images, score, 0.5)
    with pytest.raises(ValueError, match="can't be trained"):
        runner.train()
    with pytest.raises(ValueError, match="GPU"):
        OnnxDetector(exported, select, "cuda")
