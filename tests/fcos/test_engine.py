"""What computes detections: ONNX files, the cache of exports, `fcos export`, parts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eecs598.training.checkpoint import save_checkpoint
from fcos import cli, engine, evaluate
from fcos.models import load_detector
from tests.deploy.test_onnx import unexplained
from tests.fcos.test_predict import CLASSES, SETTINGS, untrained
from tests.runtime.test_distributed import torchrun

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, its export, and eleven photographs of noise in three sizes."""
    folder = tmp_path_factory.mktemp("engine")
    settings = SETTINGS.replace(pixel_edges=True).to_dict()
    save_checkpoint(folder / "c.pt", untrained(2).state_dict(), settings, CLASSES)
    assert cli.main(["export", str(folder / "c.pt"), "--out", str(folder / "c.onnx")]) == 0
    (folder / "photos").mkdir()
    for number in range(11):
        size = ((60, 48), (48, 90), (100, 70))[number % 3]
        noise = torch.rand(3, size[1] // 8, size[0] // 8).mul(255).byte().permute(1, 2, 0)
        image = Image.fromarray(noise.numpy()).resize(size)
        image.save(folder / f"photos/{number:02}.png")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/eecs598-fcos"


def predict(folder: Path, *more: str, out: Path, model: str = "c.pt") -> tuple[int, dict]:
    command = ["predict", str(folder / model), str(folder / "photos"), "--out", str(out)]
    status = cli.main([*command, "--workers", "0", "--score-thresh", "0.3", *more])
    file = out / "predictions.json"
    return status, json.loads(file.read_text()) if file.exists() else {}


def as_tensors(image: dict) -> dict[str, torch.Tensor]:
    found = image["detections"]
    return {
        "boxes": torch.tensor([each["box"] for each in found]).reshape(-1, 4),
        "labels": torch.tensor([each["class_id"] for each in found], dtype=torch.int64),
        "scores": torch.tensor([each["score"] for each in found]),
    }


def test_onnx_file_and_checkpoint_detect_the_same(folder, tmp_path, cache, capsys):
    _, by_torch = predict(folder, "--no-pictures", out=tmp_path / "torch")
    assert "PyTorch" in capsys.readouterr().out  # eleven images are not worth an export
    status, by_onnx = predict(folder, "--no-pictures", out=tmp_path / "onnx", model="c.onnx")
    assert status == 0 and by_onnx["classes"] == CLASSES and by_onnx["image_size"] == 48
    assert "ONNX Runtime" in by_onnx["engine"] and "PyTorch" in by_torch["engine"]
    assert "ONNX Runtime" in capsys.readouterr().out
    for one, other in zip(by_onnx["images"], by_torch["images"], strict=True):
        assert one["path"] == other["path"]
        assert unexplained(as_tensors(one), as_tensors(other), 0.3, 0.6) == 0
    assert sum(len(image["detections"]) for image in by_onnx["images"]) > 50
    assert not cache.exists()


def test_evaluation_of_an_onnx_file(folder, small_voc, tmp_path, monkeypatch):
    """The same mAP as of its checkpoint, and boxes compared as they were learned."""
    metrics, pixel_edges = [], []

    original = evaluate.evaluate

    def recording(*args, **kwargs):
        pixel_edges.append(kwargs["pixel_edges"])
        return original(*args, **kwargs)

    monkeypatch.setattr("fcos.evaluate.evaluate", recording)
    for name in ("c.pt", "c.onnx"):
        command = ["eval", str(folder / name), "--data", str(small_voc), "--workers", "0"]
        assert cli.main([*command, "--out", str(tmp_path / name)]) == 0
        metrics.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    assert metrics[0]["mAP"] == pytest.approx(metrics[1]["mAP"], abs=1e-6)
    assert pixel_edges == [True, True]


def test_classes_per_location(folder, tmp_path, cache, capsys):
    """The checkpoint's own number, or another one; an exported file has it built in."""
    own = load_detector(folder / "c.pt", backbone="")
    assert own.detector.post_processor.classes_per_location == 1
    _, one = predict(folder, "--no-pictures", out=tmp_path / "one")
    two_classes = ("--classes-per-location", "2", "--no-pictures")
    _, two = predict(folder, *two_classes, out=tmp_path / "two")
    count = [sum(len(image["detections"]) for image in result["images"]) for result in (one, two)]
    assert count[1] > count[0] > 50
    other = load_detector(folder / "c.pt", backbone="", classes_per_location=2)
    assert other.settings.model.classes_per_location == 2
    assert engine._detector_hash(other) != engine._detector_hash(own)
    status, _ = predict(folder, *two_classes, out=tmp_path / "onnx", model="c.onnx")
    assert status == 2 and "leave out --classes-per-location" in capsys.readouterr().err


def test_the_detector_says_whether_its_boxes_are_edges(folder, tmp_path, monkeypatch):
    """Otherwise an evaluation would compare edges with the annotation's numbers."""
    numbers = tmp_path / "numbers.pt"
    settings = SETTINGS.replace(pixel_edges=False).to_dict()
    save_checkpoint(numbers, untrained(2).state_dict(), settings, CLASSES)
    for file, expected in ((folder / "c.pt", True), (folder / "c.onnx", True), (numbers, False)):
        engine_name = "auto" if file.suffix == ".onnx" else "torch"
        assert engine.load_predictor(file, engine=engine_name).pixel_edges is expected
    written = []
    monkeypatch.setattr(
        "eecs598.deploy.export_onnx", lambda _network, _path, facts, *_more: written.append(facts)
    )
    for file in (numbers, folder / "c.pt"):
        engine.export_detector(load_detector(file, backbone=""), tmp_path / "d.onnx")
    assert [facts.pixel_edges for facts in written] == [False, True]
    read = [type(facts).from_metadata(facts.to_metadata()) for facts in written]
    assert [facts.pixel_edges for facts in read] == [False, True]


def test_a_checkpoint_is_exported_once(folder, tmp_path, cache, monkeypatch, capsys):
    """The cache: used again, mended when broken, and not needed."""

    def exports(*more: str) -> str:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        status, result = predict(folder, "--no-pictures", *more, out=out)
        assert status == 0 and "ONNX Runtime" in result["engine"]
        return capsys.readouterr().err

    calls = []

    def exporting(model, path, **options):  # the export itself takes 10 s
        calls.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "c.onnx", path)

    monkeypatch.setattr(engine, "export_detector", exporting)
    assert "once for this checkpoint" in exports("--engine", "onnx")
    (file,) = cache.iterdir()
    assert exports("--engine", "onnx") == "" and len(calls) == 1
    assert exports() == ""  # where there is an export, auto takes it
    file.write_bytes(file.read_bytes()[:1000])
    assert "exporting again" in exports() and len(calls) == 2
    assert file.stat().st_size == (folder / "c.onnx").stat().st_size

    for number in range(engine.KEPT_EXPORTS):  # of other checkpoints, used long ago
        (cache / f"{number}.onnx").touch()
        os.utime(cache / f"{number}.onnx", (number, number))
    os.utime(file, (0, 0))
    assert exports("--engine", "onnx", "--image-size", "64") == ""  # one export for every size
    assert file.stat().st_mtime > engine.KEPT_EXPORTS  # as used last
    file.write_bytes(b"")
    exports("--engine", "onnx")
    assert file.stat().st_size > 0
    assert len(list(cache.iterdir())) == engine.KEPT_EXPORTS and not (cache / "0.onnx").exists()
    assert len(calls) == 3

    model = load_detector(folder / "c.pt", backbone="")
    before = engine._detector_hash(model)
    with torch.no_grad():
        model.detector.pred_net.pred_box.bias[0] += 1e-3
    assert engine._detector_hash(model) != before

    shutil.rmtree(cache)
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the folder should be")  # so that even root can't write there
    assert "the export is not kept" in exports("--engine", "onnx") and len(calls) == 5


def test_auto_exports_for_many_images(folder, cache, monkeypatch):
    def exporting(model, path, **options):
        raise RuntimeError("exported")

    monkeypatch.setattr(engine, "export_detector", exporting)
    for count in (engine.WORTH_AN_EXPORT, lambda: engine.WORTH_AN_EXPORT, None):
        with pytest.raises(RuntimeError, match="exported"):
            engine.load_predictor(folder / "c.pt", num_images=count)
    few = engine.load_predictor(folder / "c.pt", num_images=engine.WORTH_AN_EXPORT - 1)
    assert few.engine.startswith("PyTorch")
    assert len(few(torch.zeros(2, 3, 48, 64), 0.3, 0.6)) == 2
    monkeypatch.setattr(engine, "missing_onnx_packages", lambda: ["onnx"])
    assert engine.load_predictor(folder / "c.pt").engine.startswith("PyTorch")


def test_nothing_is_exported_for_a_device_that_can_not_be_used(folder, cache, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ValueError, match="this ONNX Runtime can't use a GPU"):
        engine.load_predictor(folder / "c.pt", engine="onnx", device="cuda")
    assert not cache.exists()


def test_a_detector_that_can_not_be_exported(folder, cache, monkeypatch, capsys):
    def failing(*_args: object, **_options: object) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", failing)
    predictor = engine.load_predictor(folder / "c.pt", num_images=10_000)
    assert predictor.engine.startswith("PyTorch")
    assert "can't export this detector to ONNX: no such operator\n" in capsys.readouterr().err
    with pytest.raises(ValueError, match="can't export this detector to ONNX: no such operator$"):
        engine.load_predictor(folder / "c.pt", engine="onnx")


def test_what_ends_with_status_2(folder, tmp_path, cache, monkeypatch, capsys):
    (tmp_path / "cut.onnx").write_bytes((folder / "c.onnx").read_bytes()[:9000])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    photos, out = str(folder / "photos"), str(tmp_path / "out")
    onnx, checkpoint = str(folder / "c.onnx"), str(folder / "c.pt")
    for arguments, words in (
        (["predict", str(tmp_path / "cut.onnx"), photos, "--out", out], "can't be used"),
        (["predict", str(tmp_path / "no.onnx"), photos, "--out", out], "no such file"),
        (["predict", onnx, photos, "--out", out, "--engine", "torch"], "leave out --engine"),
        (["predict", onnx, photos, "--out", out, "--classes", "a,b"], "leave out --classes"),
        (
            ["predict", checkpoint, photos, "--out", out, "--engine", "onnx", "--amp", "auto"],
            "--amp off",
        ),
        (["export", checkpoint, "--out", f"{out}.onnx", "--half"], "CUDA GPU only"),
        (["export", checkpoint, "--out", out], "ends in .onnx"),
        (["export", checkpoint, "--out", onnx], "exists"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.onnx").exists()


def test_the_example_of_the_page_works(folder, tmp_path, capsys):
    """docs/deployment.md, with plain ONNX Runtime and without PyTorch."""
    text = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "onnxruntime" in b)
    code = code.replace("model.onnx", str(folder / "c.onnx"))
    code = code.replace("photo.jpg", str(folder / "photos/00.png")).replace("0.4", "0.3", 1)
    script = tmp_path / "example.py"
    script.write_text(code + "\nimport sys\nassert 'torch' not in sys.modules\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, expected = predict(folder, "--no-pictures", out=tmp_path / "out")
    found = expected["images"][0]["detections"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(found) > 3
    assert lines[0].startswith(found[0]["label"])


def test_a_stopped_prediction_goes_on(folder, tmp_path, monkeypatch, capsys):
    _, whole = predict(folder, out=tmp_path / "whole")
    out = tmp_path / "parts"
    original, seen = engine.Predictor.__call__, []

    def stopping(self, images, **thresholds):
        seen.append(len(images))
        if sum(seen) > 6:
            raise KeyboardInterrupt
        return original(self, images, **thresholds)

    monkeypatch.setattr(engine.Predictor, "__call__", stopping)
    assert predict(folder, "--batch-size", "2", out=out)[0] == 130
    assert "--resume goes on" in capsys.readouterr().err
    done = [json.loads(line) for line in (out / "journal-0.jsonl").read_text().splitlines()]
    assert 0 < len(done) < 11 and not (out / "predictions.json").exists()
    pictures = {each["picture"]: (out / each["picture"]).stat().st_mtime_ns for each in done}

    seen.clear()
    monkeypatch.setattr(
        engine.Predictor,
        "__call__",
        lambda self, images, **t: seen.append(len(images)) or original(self, images, **t),
    )
    assert predict(folder, "--batch-size", "2", out=out)[0] == 2  # without --resume
    assert predict(folder, "--resume", "--nms-thresh", "0.5", out=out)[0] == 2
    assert "nms_thresh differ" in capsys.readouterr().err
    (out / "predictions.json").write_text("{}")  # of another prediction
    status, result = predict(folder, "--resume", out=out)
    assert status == 0 and sum(seen) == 11 - len(done)
    assert [image["path"] for image in result["images"]] == [i["path"] for i in whole["images"]]
    for one, other in zip(result["images"], whole["images"], strict=True):
        assert one["picture"] == other["picture"]
        assert unexplained(as_tensors(one), as_tensors(other), 0.3, 0.6) == 0
    assert all((out / name).stat().st_mtime_ns == time for name, time in pictures.items())
    names = {path.name for path in out.iterdir()}
    assert names == {"predictions.json", *(image["picture"] for image in whole["images"])}
    assert predict(folder, "--resume", out=out)[0] == 0
    assert "complete already" in capsys.readouterr().out


def test_several_processes_share_the_images(folder, tmp_path):
    _, whole = predict(folder, "--no-pictures", out=tmp_path / "whole")
    arguments = [str(folder / "c.pt"), str(folder / "photos"), "--out", str(tmp_path / "out")]
    arguments += ["--no-pictures", "--workers", "0", "--score-thresh", "0.3", "--batch-size", "1"]
    done = torchrun("-m", "fcos", "predict", *arguments, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(re.findall("detections in 11 images", done.stdout)) == 1
    result = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(result["images"]) == 11
    for one, other in zip(result["images"], whole["images"], strict=True):
        assert one["path"] == other["path"]
        assert unexplained(as_tensors(one), as_tensors(other), 0.3, 0.6) == 0
    assert os.listdir(tmp_path / "out") == ["predictions.json"]


def test_same_detections_on_photographs(voc2007_dir, folder, tmp_path):
    """On 200 images of VOC's val; the detector is untrained, but sees real images."""
    from a4_helper import VOC2007DetectionTiny
    from eecs598.deploy import OnnxDetector
    from one_stage_detector import FCOSPostProcessor

    detector = load_detector(folder / "c.pt", backbone="").detector.eval()
    exported = OnnxDetector(folder / "c.onnx", FCOSPostProcessor.select)
    dataset = VOC2007DetectionTiny(voc2007_dir, "val", image_size=96)
    count = 0
    for index in np.linspace(0, len(dataset) - 1, 200).astype(int).tolist():
        image = dataset[index][1][None]
        (expected,), (found,) = (each.predict(image, 0.3, 0.6) for each in (detector, exported))
        assert unexplained(found, expected, 0.3, 0.6) == 0
        count += len(expected["scores"])
    assert count > 2000
