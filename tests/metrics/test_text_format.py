"""The folder of text files: what is read, what is written, and what is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from eecs598.metrics.average_precision import score_folder
from eecs598.metrics.text_format import read_text_format, write_text_format
from tests.metrics.examples import NAMES, valid_call, write_folder


def test_lines_are_read_from_the_right_and_blank_lines_skipped(tmp_path):
    folder = write_folder(
        tmp_path,
        {
            "1": "\ufeffdining table 0 0 9 9 difficult\r\n\r\n"
            "  dining\ttable 7\t0 0 9.5 1e1\tdifficult"
        },
        {"1": "\n\tpotted plant 2 -3.5 0 0 9 9  \n"},
    )
    (folder / "ground-truth" / "2.txt").write_text("difficult 0 0 9 9\n")
    (folder / "ground-truth" / "notes.md").write_text("not read")
    (folder / "detection-results" / "2.txt").write_text("")
    assert score_folder(folder)["num_ground_truth"] == {
        "difficult": 1,
        "dining table": 0,
        "dining\ttable 7": 0,
        "potted plant 2": 0,
    }


def test_missing_detections_warn_and_count_as_missed(tmp_path):
    truths = {str(number): "cat 0 0 9 9" for number in range(6)}
    folder = write_folder(tmp_path, truths, {"1": "cat .5 0 0 9 9"})
    with pytest.warns(UserWarning, match=r"5 files \(0.txt, 2.txt, 3.txt and 2 more\) missing"):
        result = score_folder(folder)
    assert result["mAP"] == pytest.approx(1 / 6)
    assert result["num_images"] == 6
    for read in (read_text_format, score_folder):
        with pytest.warns(UserWarning, match="missing") as caught:
            read(folder)
        assert caught[0].filename == __file__  # the line to look at is the caller's


def test_read_text_format(tmp_path):
    folder = write_folder(
        tmp_path,
        {"b": "dog 0 0 9 9 difficult\ncat 1 2 3 4", "a-1": "", "a": "cat 0 0 0.1 9"},
        {"b": "", "a-1": "ghost .25 0 0 9 9\ncat 0.1 1 2 3 4", "a": ""},
    )
    read = read_text_format(folder)
    assert read.image_names == ["a-1", "a", "b"]  # the order of the files: "-" before "."
    assert read.class_names == ["cat", "dog", "ghost"]
    found = [{key: value.tolist() for key, value in image.items()} for image in read.predictions]
    nothing = {"boxes": [], "labels": [], "scores": []}
    boxes = [[0, 0, 9, 9], [1, 2, 3, 4]]
    assert found == [{"boxes": boxes, "labels": [2, 0], "scores": [0.25, 0.1]}, nothing, nothing]
    assert [image["boxes"].tolist() for image in read.targets] == [[], [[0, 0, 0.1, 9]], boxes]
    assert [image["labels"].tolist() for image in read.targets] == [[], [0], [1, 0]]
    assert [image["difficult"].tolist() for image in read.targets] == [[], [False], [True, False]]
    assert read.predictions[1]["boxes"].shape == read.targets[0]["boxes"].shape == (0, 4)
    assert read.targets[0]["difficult"].dtype == torch.bool
    with pytest.raises(ValueError, match="2 images of .* have no ground truth box at all"):
        read_text_format(write_folder(tmp_path / "empty", {"1": "", "2": ""}, {"1": "", "2": ""}))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("ground-truth", "cat 0 0 9"),
        ("ground-truth", "0 0 9 9"),
        ("ground-truth", "cat 0 0 9 nine"),
        ("ground-truth", "cat 0 0 9 9 Difficult"),
        ("ground-truth", "difficult"),
        ("ground-truth", "cat 0 0 nan 9"),
        ("ground-truth", "cat 0 0 1_0 9"),
        ("ground-truth", "cat 0 0 1e200 9"),
        ("ground-truth", "cat 9 0 0 9"),
        ("ground-truth", "cat 0 9 9 0"),
        ("detection-results", "cat 0 0 9 9"),
        ("detection-results", "0.9 0 0 9 9"),
        ("detection-results", "dining table 0 0 9 9"),
        ("detection-results", "cat 0.9 0 0 9 9 difficult"),
        ("detection-results", "cat nan 0 0 9 9"),
        ("detection-results", "cat inf 0 0 9 9"),
        ("detection-results", "cat 0.9 0 0 9 inf"),
        ("detection-results", "cat 0.9 9 0 0 9"),
        ("detection-results", "cat 0.9 0 9 9 0"),
    ],
)
def test_malformed_lines_are_named(tmp_path, kind, line):
    folder = write_folder(tmp_path, {"im": "cat 0 0 9 9\n"}, {"im": "cat 0.9 0 0 9 9\n"})
    with open(folder / kind / "im.txt", "a") as stream:
        stream.write(f"\n{line}\n")
    with pytest.raises(ValueError) as error:
        score_folder(folder)
    form = "'class x1 y1 x2 y2 [difficult]'" if kind == "ground-truth" else "'class score x1"
    for part in (os.path.join(kind, "im.txt"), "line 3", repr(line), form):
        assert part in str(error.value)


def test_folder_errors(tmp_path):
    with pytest.raises(ValueError, match="ground-truth is not a folder"):
        score_folder(tmp_path / "nowhere")
    (tmp_path / "half" / "ground-truth").mkdir(parents=True)
    with pytest.raises(ValueError, match="detection-results is not a folder"):
        score_folder(tmp_path / "half")
    with pytest.raises(ValueError, match="has no .txt file"):
        score_folder(write_folder(tmp_path / "empty", {}, {}))
    folder = write_folder(tmp_path / "more", {"1": "cat 0 0 9 9"}, {"1": "", "2": "", "3": ""})
    with pytest.raises(ValueError, match=r"2 files \(2.txt, 3.txt\).*write a ground truth file"):
        score_folder(folder)
    folder = write_folder(tmp_path / "hard", {"1": "cat 0 0 9 9 difficult"}, {"1": ""})
    with pytest.raises(ValueError, match="no ground truth box that is not difficult"):
        score_folder(folder)
    folder = write_folder(tmp_path / "binary", {"1": "cat 0 0 9 9"}, {"1": ""})
    (folder / "detection-results" / "1.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="1.txt is not a text file"):
        score_folder(folder)


def test_written_files(tmp_path):
    prediction = {
        "boxes": torch.tensor([[1.0, 2.5, 30.0, 40.0]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.1]),
    }
    target = {
        "boxes": torch.tensor([[1, 2, 30, 40], [5, 6, 7, 8]]),
        "labels": torch.tensor([0, 1]),
        "difficult": torch.tensor([False, True]),
    }
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    write_text_format(tmp_path, "full", prediction, target, NAMES)
    write_text_format(tmp_path, "empty", nothing, nothing, NAMES)
    read = {
        path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.txt")
    }
    assert read == {
        "detection-results/full.txt": "dining table 0.10000000149011612 1.0 2.5 30.0 40.0\n",
        "ground-truth/full.txt": "dog 1.0 2.0 30.0 40.0\ncat 5.0 6.0 7.0 8.0 difficult\n",
        "detection-results/empty.txt": "",
        "ground-truth/empty.txt": "",
    }


@pytest.mark.parametrize("name", ["", ".", "a/b", "/a", "a\0b"])
def test_wrong_image_names_are_named(tmp_path, name):
    predictions, targets, names = valid_call()
    with pytest.raises(ValueError, match="cannot name a file"):
        write_text_format(tmp_path / "out", name, predictions[0], targets[0], names)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    predictions, targets, names = valid_call()
    write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    predictions[0]["scores"] += 0.1
    with pytest.raises(OSError, match="disk full"):
        write_text_format(tmp_path, "1", predictions[0], targets[0], names)
    assert before == {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
