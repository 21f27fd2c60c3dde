"""`fcos train --weights`: a training run that starts from all weights of a detector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eecs598.deploy import pretrained, write_weights
from eecs598.training import save_checkpoint
from eecs598.training.settings import ModelSettings, Settings
from fcos import cli
from fcos.fine_tuning import with_architecture
from fcos.models import build_detector
from tests.detectors import make_fcos

CLASSES = ["dice", "ball"]  # the data of ``small_voc`` has cube and dice
SETTINGS = Settings(model=ModelSettings(weights="none", fpn_channels=8, stem_channels=(8,)))


@pytest.fixture
def weights(tmp_path, monkeypatch) -> dict:
    """The weights of a detector that comes along under the name tiny."""
    monkeypatch.setattr(pretrained, "WEIGHTS_FOLDER", tmp_path / "weights")
    model = make_fcos(2).state_dict()
    model["pred_net.pred_cls.bias"] = torch.tensor([3.0, 5.0])
    model["pred_net.pred_box.bias"] = torch.ones(4)
    path = tmp_path / "weights/tiny.safetensors"
    write_weights(path, model, settings=SETTINGS.to_dict(), classes=CLASSES)
    return model


def test_classes_of_the_same_name_keep_their_weights(weights, tmp_path, small_voc, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", str(small_voc), "--weights", "tiny", "--out", str(out)]
    small = ["--iters", "1", "--batch-size", "2", "--image-size", "64", "--workers", "0"]
    # A step this small leaves the weights as they were.
    assert cli.main([*command, *small, "--lr", "1e-12", "--weight-decay", "0"]) == 0
    printed = capsys.readouterr().out
    assert "tiny: 1 of 2 classes keep their weights; these start anew: cube" in printed
    trained = torch.load(out / "checkpoint.pt", weights_only=True)
    assert trained["classes"] == ["cube", "dice"]
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert settings["model"]["fpn_channels"] == 8 and settings["model"]["weights"] == "tiny"
    bias = trained["model"]["pred_net.pred_cls.bias"]
    torch.testing.assert_close(bias, torch.tensor([-4.595, 3.0]), atol=1e-3, rtol=0)
    for name in ("pred_net.pred_box.bias", "pred_net.stem_cls.0.weight"):
        torch.testing.assert_close(trained["model"][name], weights[name], rtol=1e-3, atol=1e-6)


def test_any_checkpoint_is_a_start(weights, tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    save_checkpoint(path, weights, SETTINGS.to_dict(), CLASSES)
    given = with_architecture({"weights": path, "box_loss": "giou"})
    assert given["fpn_channels"] == 8 and given["box_loss"] == "giou"
    settings = SETTINGS.replace(weights=path).model
    detector = build_detector(settings, 2, CLASSES)
    for name, value in detector.state_dict().items():
        assert torch.equal(value, weights[name]), name
    other = build_detector(settings, 2, CLASSES, load_weights=False)
    assert not torch.equal(other.pred_net.pred_cls.bias, weights["pred_net.pred_cls.bias"])


def test_weights_of_a_backbone_imply_nothing(tmp_path):
    path = tmp_path / "backbone.pt"
    torch.save({"conv.weight": torch.ones(2)}, path)
    for value in ("default", "none", str(path)):
        assert with_architecture({"weights": value}) == {"weights": value}


def test_what_does_not_fit_is_said(weights, tmp_path, small_voc, capsys):
    plain = tmp_path / "plain.pt"
    torch.save(weights, plain)
    for arguments, words in (
        (["--weights", "tony"], "one of default, none, tiny"),
        (["--weights", "tiny", "--fpn-channels", "16"], "fpn_channels 8, and 16 was given"),
        (["--weights", str(plain)], "plain state dict of a detector"),
    ):
        out = Path(tmp_path / f"out-{len(words)}")
        command = ["train", "--data", str(small_voc), "--out", str(out), "--workers", "0"]
        assert cli.main([*command, "--iters", "1", *arguments]) == 2
        assert words in capsys.readouterr().err
