"""Checkpoints: a round trip, and files that are no checkpoints."""

from __future__ import annotations

import zipfile

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


STATE = {"pred_net.scale": torch.ones(2), "module.bias": torch.zeros(1)}  # a name like a wrapper's


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        {"state_dict": STATE, "epoch": 3},
        {"model": prefixed("module."), "optimizer": {"lr": 0.1}},
    ],
    ids=lambda content: ",".join(content),
)
def test_state_dicts_as_others_save_them(tmp_path, content):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    loaded = load_checkpoint(path)
    assert loaded["settings"] is loaded["classes"] is None
    assert loaded["model"].keys() == STATE.keys()
    assert all(torch.equal(loaded["model"][key], STATE[key]) for key in STATE)


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "file.pt"

    def message() -> str:
        with pytest.raises(ValueError, match="can't be read as a checkpoint") as error:
            load_checkpoint(path)
        return str(error.value)

    path.write_bytes(b"")
    assert "it is empty" in message()
    path.write_text("epoch 1\nloss 0.5\n")
    assert "it is text that begins with 'epoch 1'" in message()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/cat.jpg", b"")
    assert "a zip file of something else (photos/cat.jpg)" in message()
    torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "it is cut off" in message()
    directory = whole.rindex(b"PK\1\2")  # the list of the members, of which this is the last
    path.write_bytes(whole[:directory] + b"\0" * 4 + whole[directory + 4 :])
    assert "it is damaged" in message()
    path.write_bytes(bytes(range(255, 127, -1)))  # as of a picture
    assert "UnpicklingError" in message()
    torch.save({0: torch.ones(2)}, path)
    with pytest.raises(ValueError, match="nor a state dict"):
        load_checkpoint(path)
