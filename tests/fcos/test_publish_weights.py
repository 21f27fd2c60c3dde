"""From a training run to weights that come along, and the figures of their page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eecs598.deploy import pretrained, read_checkpoint
from fcos import cli, model_card, publish_weights
from tests.fcos.test_predict import untrained

CAT = Path(__file__).resolve().parents[2] / "docs/cat.jpg"


@pytest.fixture
def run(small_voc, tmp_path, monkeypatch) -> Path:
    """A run of one step, with the weights of a detector that finds much in place of its own."""
    for module in (pretrained, publish_weights):
        monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path / "weights")
    out = tmp_path / "run"
    train = ["train", "--data", str(small_voc), "--out", str(out), "--iters", "1", "--workers", "0"]
    small = ["--fpn-channels", "8", "--stem", "8", "--image-size", "64", "--weights", "none"]
    assert cli.main([*train, *small, "--batch-size", "2"]) == 0
    best = torch.load(out / "best.pt", weights_only=True)
    best["model"] = untrained(2).state_dict()
    torch.save(best, out / "best.pt")
    return out


def test_weights_are_evaluated_as_they_are_shipped(run, small_voc, tmp_path):
    path = publish_weights.publish(run, "tiny", license="free")
    assert path == tmp_path / "weights/tiny.safetensors"
    found = read_checkpoint("tiny")
    assert found["classes"] == ["cube", "dice"] and found["license"] == "free"
    assert found["training_data"] == {"name": "data", "split": "train", "images": 8, "objects": 12}
    assert found["image_size"] == 64 and found["iteration"] == 1
    # The command gives the same figures for the file.
    metrics = tmp_path / "metrics.json"
    evaluate = ["eval", "tiny", "--data", str(small_voc), "--out", str(tmp_path / "eval")]
    assert cli.main([*evaluate, "--json", str(metrics), "--workers", "0"]) == 0
    expected = json.loads(metrics.read_text())
    assert found["metrics"]["mAP"] == expected["mAP"] > 0
    low, high = found["metrics"]["devkit"].pop("interval")
    assert low <= found["metrics"]["devkit"]["mAP"] <= high
    for key in ("devkit", "interval", "mAP_11_point", "AP", "num_images"):
        assert found["metrics"][key] == expected[key]


def test_the_card_and_the_picture(run, tmp_path):
    path = publish_weights.publish(run, "tiny")
    content = read_checkpoint("tiny")
    card = tmp_path / "card.md"
    card.write_text("# Card\n\n<!-- figures -->\nearlier figures\n<!-- end of figures -->\n\nEnd\n")
    model_card.write_card(card, content, path.stat().st_size)
    model_card.write_card(card, content, path.stat().st_size)  # over the earlier figures
    text = card.read_text()
    assert text.startswith("# Card\n") and text.endswith("\n\nEnd\n") and "earlier" not in text
    assert f"| {100 * content['metrics']['mAP']:.1f} % (95 % interval" in text
    assert text.count("| cube |") == text.count("| dice |") == 1
    publish_weights.draw_cat("tiny", CAT, tmp_path / "cat-detections.jpg")
    assert (tmp_path / "cat-detections.jpg").stat().st_size > 10_000


def test_the_page_has_a_place_for_the_figures(tmp_path):
    text = (CAT.parent / "model-card.md").read_text(encoding="utf-8")
    assert text.index(model_card.BEGIN) < text.index(model_card.END)
    (tmp_path / "card.md").write_text("no place")
    with pytest.raises(ValueError, match="has not <!-- figures -->"):
        model_card.write_card(tmp_path / "card.md", {}, 1)


def test_paths_are_no_part_of_the_metadata():
    settings = {"model": {"weights": "/home/somebody/lite0.pth"}, "data": {}}
    assert publish_weights._without_paths(settings)["model"]["weights"] == "lite0.pth"


def test_weights_that_are_too_large(run, monkeypatch, tmp_path):
    monkeypatch.setattr(publish_weights, "LIMIT", 1000)
    with pytest.raises(ValueError, match="at most 1,000 are shipped"):
        publish_weights.publish(run, "tiny")
    assert not (tmp_path / "weights").exists()
