"""Trained detectors as safetensors files, by name and by path."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eecs598.deploy import pretrained, pretrained_names, read_checkpoint, write_weights
from eecs598.training import ModelSettings, Settings
from one_stage_detector import FCOS
from tests.detectors import make_fcos

CLASSES = ["cube", "dice", "ball"]
SETTINGS = Settings(model=ModelSettings(weights="none", fpn_channels=8, stem_channels=(8,)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the detectors that come along, with one called tiny."""
    weights = tmp_path / "weights"
    monkeypatch.setattr(pretrained, "WEIGHTS_FOLDER", weights)
    write(weights / "tiny.safetensors")
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    return weights


def write(path, **facts) -> FCOS:
    detector = make_fcos(3)
    model, settings = detector.state_dict(), SETTINGS.to_dict()
    write_weights(path, model, settings=settings, classes=CLASSES, **facts)
    return detector.eval()


def test_float16_on_disk_float32_in_memory(tmp_path):
    detector = write(tmp_path / "a.safetensors", mAP=0.5, image_size=224)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.get_tensor("pred_net.pred_cls.weight").dtype == torch.float16
        assert json.loads(file.metadata()["classes"]) == CLASSES
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert (found["classes"], found["settings"]) == (CLASSES, SETTINGS.to_dict())
    assert (found["mAP"], found["image_size"]) == (0.5, 224)
    for name, value in detector.state_dict().items():
        assert found["model"][name].dtype == value.dtype
        if value.dim() < 2:  # batch norm and biases to the digit
            assert torch.equal(found["model"][name], value), name
        torch.testing.assert_close(found["model"][name], value, rtol=1e-3, atol=1e-6)


def test_from_pretrained_by_name(folder):
    detector = FCOS.from_pretrained("tiny")
    assert detector.class_names == CLASSES and not detector.training
    images = torch.rand(1, 3, 64, 96, generator=torch.manual_seed(1))
    expected = write(folder / "other.safetensors").predict(images, score_thresh=0.01)[0]
    found = detector.predict(images, score_thresh=0.01)[0]
    assert len(found["scores"]) > 10
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-5)


def test_the_name_comes_before_a_file_of_that_name(folder):
    torch.save({"w": torch.ones(1)}, "tiny")
    assert read_checkpoint("tiny")["classes"] == CLASSES
    assert read_checkpoint("./tiny")["classes"] is None


def test_unknown_names_are_answered_with_what_is_there(folder):
    assert pretrained_names() == ["tiny"]
    with pytest.raises(ValueError, match="tinny is not a file.*name: tiny. Did you mean tiny?"):
        read_checkpoint("tinny")
    (folder / "best.pt").touch()
    with pytest.raises(ValueError, match=r"bets.pt is not a file.*Did you mean \S*best.pt\?"):
        read_checkpoint(folder / "bets.pt")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "metadata"])
def test_files_of_something_else(folder, damage):
    path = folder / "tiny.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "metadata":
        save_file({"a": torch.ones(1)}, path, {"classes": "cube", "settings": "{}"})
    else:
        path.write_bytes(b"hello, world" if damage == "text" else b"")
    with pytest.raises(ValueError, match="tiny.safetensors"):
        read_checkpoint(path)


def test_safetensors_of_other_programs_are_plain_state_dicts(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert found["classes"] is found["settings"] is None
    with pytest.raises(ValueError, match="has no settings"):
        FCOS.from_pretrained(tmp_path / "a.safetensors")


def test_what_float16_cannot_hold(tmp_path):
    model = {"weight": torch.full((1, 1), 1e5)}
    with pytest.raises(ValueError, match="weight has values up to 100000"):
        write_weights(tmp_path / "a.safetensors", model, settings={}, classes=[])
    with pytest.raises(ValueError, match="ends in .safetensors"):
        write_weights(tmp_path / "a.pt", model, settings={}, classes=[])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------
# The detector that comes along
# --------------------------------------------------------------------------------------------


@pytest.mark.skipif("voc2007" not in pretrained_names(), reason="voc2007.safetensors is not here")
def test_voc2007_is_small_and_says_what_it_is():
    assert (pretrained.WEIGHTS_FOLDER / "voc2007.safetensors").stat().st_size <= 12_000_000
    found = read_checkpoint("voc2007")
    assert len(found["classes"]) == 20 and found["classes"][7] == "cat"
    assert 0.4 < found["metrics"]["mAP"] < 1
    low, high = found["metrics"]["interval"]
    assert low < found["metrics"]["mAP"] < high
    assert "Apache-2.0" in found["license"] and len(found["commit"]) == 40
    assert "/" not in str(found["settings"])  # no path of the machine that trained it


@pytest.mark.skipif("voc2007" not in pretrained_names(), reason="voc2007.safetensors is not here")
def test_voc2007_needs_no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FCOS.from_pretrained("voc2007").num_classes == 20
