"""`fcos predict`: detections in any image file, in the pixels of the original."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from a4_helper import VOC2007DetectionTiny, iterate_detections
from eecs598.training.checkpoint import save_checkpoint
from eecs598.training.settings import DataSettings, ModelSettings, Settings
from fcos import cli
from fcos.models import build_detector, load_detector

CLASSES = ["cube", "dice"]
SETTINGS = Settings(
    model=ModelSettings(weights="none", fpn_channels=8, stem_channels=(8,)),
    data=DataSettings(image_size=48),
)


def untrained(num_classes: int):
    """A detector without training that finds many things, with boxes of all shapes."""
    torch.manual_seed(0)
    detector = build_detector(SETTINGS.model, num_classes)
    with torch.no_grad():
        for parameter in detector.pred_net.parameters():
            if parameter.dim() == 4:
                parameter.normal_(std=0.5)
        detector.pred_net.pred_cls.bias.zero_()
        detector.pred_net.pred_box.bias.fill_(2.0)
    return detector


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    save_checkpoint(path, untrained(2).state_dict(), SETTINGS.to_dict(), CLASSES)
    return path


def predict(checkpoint: Path, *arguments: str | Path, out: Path) -> tuple[int, dict]:
    command = ["predict", str(checkpoint), *map(str, arguments), "--out", str(out)]
    status = cli.main([*command, "--workers", "0"])
    return status, json.loads((out / "predictions.json").read_text())


def test_same_detections_as_evaluation(checkpoint, small_voc, tmp_path):
    dataset = VOC2007DetectionTiny(small_voc, "val", image_size=48, classes=CLASSES)
    paths = [instance.path for instance in dataset.instances]
    arguments = [*paths, "--score-thresh", "0.3", "--batch-size", "3"]
    status, result = predict(checkpoint, *arguments, out=tmp_path / "out")
    assert status == 0 and result["skipped"] == []
    assert result["score_thresh"] == 0.3 and result["image_size"] == SETTINGS.data.image_size
    assert result["classes"] == CLASSES
    compared = 0
    evaluated = iterate_detections(
        load_detector(checkpoint, backbone="not needed").detector,
        torch.utils.data.DataLoader(dataset),
        0.3,
        0.6,
    )
    for (path, pixels, expected, _), found in zip(evaluated, result["images"], strict=True):
        size = Image.open(path).size
        assert found["path"] == path and (found["width"], found["height"]) == size
        scale = torch.tensor(size) / torch.tensor([pixels.shape[2], pixels.shape[1]])
        boxes = torch.tensor([detection["box"] for detection in found["detections"]])
        torch.testing.assert_close(boxes, expected["boxes"] * scale.repeat(2), atol=0.02, rtol=0)
        scores = torch.tensor([detection["score"] for detection in found["detections"]])
        torch.testing.assert_close(scores, expected["scores"], atol=1e-5, rtol=0)
        labels = [CLASSES[label] for label in expected["labels"]]
        assert [detection["label"] for detection in found["detections"]] == labels
        assert [CLASSES[d["class_id"]] for d in found["detections"]] == labels
        compared += len(labels)
    assert compared > 20


def test_lower_precision_is_offered_and_not_the_default(
    checkpoint, small_voc, tmp_path, monkeypatch
):
    def bfloat16_everywhere(device, amp):
        return torch.autocast(device.type, torch.bfloat16, enabled=amp == "auto"), None

    monkeypatch.setattr("eecs598.training.optimization.mixed_precision", bfloat16_everywhere)
    images = str(next((small_voc / "JPEGImages").iterdir()))
    scores = {}
    for amp in ([], ["--amp", "off"], ["--amp", "auto"]):
        _, result = predict(checkpoint, images, *amp, out=tmp_path / f"out{len(scores)}")
        found = result["images"][0]["detections"]
        scores[amp[-1] if amp else "default"] = sorted(d["score"] for d in found)
    assert scores["default"] == scores["off"] and len(scores["off"]) > 0
    assert scores["auto"] != scores["off"]
    assert scores["auto"][-1] == pytest.approx(scores["off"][-1], rel=0.05)


def test_boxes_are_those_of_the_upright_image(checkpoint, small_voc, tmp_path):
    original = Image.open(small_voc / "JPEGImages/0000.jpg")
    original.save(tmp_path / "plain.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    original.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    status, result = predict(checkpoint, tmp_path, "--score-thresh", "0.3", out=tmp_path / "out")
    plain, turned = result["images"]
    assert status == 0 and plain["detections"] == turned["detections"] != []
    assert (turned["width"], turned["height"]) == original.size
    for box in (detection["box"] for detection in plain["detections"]):
        assert 0 <= box[0] <= box[2] <= original.width
        assert 0 <= box[1] <= box[3] <= original.height


def test_unreadable_files_are_named_and_skipped(checkpoint, tmp_path, capsys):
    good = Image.new("RGB", (60, 40), "orange")
    good.save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no image")
    (tmp_path / "c.jpg").write_bytes(b"")
    good.save(tmp_path / "d.png")
    status, result = predict(checkpoint, tmp_path, out=tmp_path / "out")
    assert status == 1
    assert [Path(image["path"]).name for image in result["images"]] == ["a.png", "d.png"]
    assert [Path(skipped["path"]).name for skipped in result["skipped"]] == ["b.jpg", "c.jpg"]
    assert "empty" in result["skipped"][1]["error"]
    errors = capsys.readouterr().err
    assert "skipped" in errors and "b.jpg" in errors and "c.jpg" in errors
    assert errors.strip().endswith("2 of 4 images skipped")


def test_pictures_of_images_of_one_name(checkpoint, tmp_path):
    for folder, color in (("x", "orange"), ("y", "navy")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (1200, 800), color).save(tmp_path / folder / "same.png")
    odd = "né %20 [*]\n'.jpg"
    Image.new("RGB", (1200, 800), "teal").save(tmp_path / "x" / odd)
    # The results may lie among the images: no run takes those of another for input.
    for run in ("one", "two"):
        out = tmp_path / "x" / run
        folders = (tmp_path / "x", tmp_path / "y")
        status, result = predict(checkpoint, *folders, "--score-thresh", "0.999", out=out)
        assert status == 0 and len(result["images"]) == 3
        for image in result["images"]:
            assert Image.open(out / image["picture"]).size == (1200, 800)
        by_path = {image["path"]: image["picture"] for image in result["images"]}
        assert set(by_path) == {
            str(tmp_path / "x" / odd),
            str(tmp_path / "x/same.png"),
            str(tmp_path / "y/same.png"),
        }
        for name, expected in (("x/same.png", (255, 165, 0)), ("y/same.png", (0, 0, 128))):
            color = np.asarray(Image.open(out / by_path[str(tmp_path / name)]))[5, 5]
            assert np.abs(color.astype(int) - expected).max() < 12


def test_no_pictures_and_json_elsewhere(checkpoint, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    command = ["predict", str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    elsewhere = tmp_path / "elsewhere.json"
    more = ["--no-pictures", "--json", str(elsewhere), "--workers", "0", "--image-size", "64"]
    assert cli.main([*command, *more]) == 0
    assert list((tmp_path / "out").iterdir()) == []
    result = json.loads(elsewhere.read_text())
    assert "picture" not in result["images"][0] and result["image_size"] == 64


def test_reading_by_several_processes_keeps_the_order(checkpoint, tmp_path):
    for number in range(9):
        Image.new("RGB", (30 + number, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "4.png").write_bytes(b"")
    command = ["predict", str(checkpoint), str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--workers", "2", "--batch-size", "2", "--no-pictures"]) == 1
    images = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert [image["width"] for image in images] == [30, 31, 32, 33, 35, 36, 37, 38]


def test_what_ends_with_status_2(checkpoint, tmp_path, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    image, out = str(tmp_path / "a.png"), str(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").touch()
    for arguments, words in (
        ([str(checkpoint), str(tmp_path / "none.png"), "--out", out], "none.png"),
        ([str(checkpoint), str(tmp_path / "full"), "--out", out], "no image"),
        ([str(checkpoint), image, "--out", str(tmp_path / "full")], "not empty"),
        ([str(checkpoint), image, "--out", out, "--classes", "a,b"], "has class names"),
        ([image, image, "--out", out], "can't be read as a checkpoint"),
    ):
        assert cli.main(["predict", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_class_names_of_a_plain_state_dict(tmp_path, small_voc, capsys):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    for count in (2, 20):
        torch.save(untrained(count).state_dict(), tmp_path / f"{count}.pt")

    def classes(count: int, *more: str) -> list[str] | str:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        command = ["predict", str(tmp_path / f"{count}.pt"), str(tmp_path / "a.png"), *more]
        if cli.main([*command, "--out", str(out), "--workers", "0", "--image-size", "48"]):
            return capsys.readouterr().err
        return json.loads((out / "predictions.json").read_text())["classes"]

    assert classes(20)[:2] == ["aeroplane", "bicycle"]
    assert "VOC assumed" in capsys.readouterr().err
    assert classes(2, "--classes", "b,a") == ["b", "a"]
    assert classes(2, "--data", str(small_voc)) == ["cube", "dice"]
    assert "--classes A,B,C" in classes(2)
    assert "has 2 classes" in classes(2, "--classes", "a,b,c")
