"""Checkpoints: a round trip, and files that are no checkpoints."""

from __future__ import annotations

import pytest
import torch

from eecs598.training.checkpoint import load_checkpoint, save_checkpoint


def test_checkpoint_round_trip_and_errors(tmp_path):
    path = tmp_path / "runs/checkpoint.pt"
    save_checkpoint(path, {"w": torch.ones(2)}, {"stem": [64]}, ["cat"], iteration=5)
    loaded = load_checkpoint(path)
    assert loaded["classes"] == ["cat"] and loaded["iteration"] == 5
    assert torch.equal(loaded["model"]["w"], torch.ones(2))
    with pytest.raises(ValueError, match="is not a file"):
        load_checkpoint(tmp_path / "nowhere.pt")
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="can't be read"):
        load_checkpoint(tmp_path / "garbage.pt")
    torch.save({"w": torch.ones(2), "b": torch.ones(1)}, tmp_path / "plain.pt")
    plain = load_checkpoint(tmp_path / "plain.pt")
    assert sorted(plain["model"]) == ["b", "w"] and plain["settings"] is plain["classes"] is None
    torch.save({"weight": torch.ones(2), "epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="lacks model, settings, classes"):
        load_checkpoint(tmp_path / "other.pt")
