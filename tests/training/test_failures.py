"""Runs that fail end at once, with a sentence, with all that was reached, and with no process left.

The processes of ``test_every_error`` are left out by default (it takes minutes): ``-m soak``.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from a4_helper import train_detector
from eecs598.data import TrainingSampler, TrainingSet, load_instances
from eecs598.runtime import RunError, explain, explained, loading, make_loader
from eecs598.training.checkpoint import load_checkpoint, save_checkpoint
from eecs598.training.run import TrainingRun
from eecs598.training.settings import from_recipe
from fcos import cli
from one_stage_detector import FCOS

ROOT = Path(__file__).resolve().parents[2]


# --------------------------------------------------------------------------------------------
# In this process
# --------------------------------------------------------------------------------------------


class Toy(nn.Module):
    num_classes = 2

    def __init__(self, fails) -> None:
        super().__init__()
        self.layer, self.calls, self.fails = nn.Conv2d(3, 5, 8), 0, fails

    def forward(self, images, gt_boxes):
        self.calls += 1
        if self.calls == 8:
            self.fails()
        return {"loss_a": self.layer(images).mean(dim=(2, 3)).sub(gt_boxes[:, 0]).abs().mean()}


def planted(*_args):
    raise RuntimeError("planted")


def kill_a_loader():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(5)  # the end of the process interrupts it


class FailingSet(TrainingSet):
    def __getitem__(self, sample):
        return planted() if sample.index == 5 else super().__getitem__(sample)


FAILURES = {
    "step": (planted, TrainingSet, None, RuntimeError, "planted"),
    "loader": (lambda: None, FailingSet, None, RuntimeError, "planted"),
    "evaluation": (lambda: None, TrainingSet, planted, RuntimeError, "planted"),
    "killed": (kill_a_loader, TrainingSet, None, RunError, r"pid \d+\) was killed .*--workers"),
    "memory": (
        lambda: torch.empty(2**60),
        TrainingSet,
        None,
        RunError,
        "out of memory with 2 images of 32 x 32 pixels .*Lower the batch size or the image size",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_ends_the_loaders_and_loses_nothing(tmp_path, small_voc, name, capsys):
    fails, kind, evaluate, error, words = FAILURES[name]
    run = TrainingRun(tmp_path, {}, ["cube", "dice"], checkpoint_every=5, evaluate=evaluate)
    dataset = kind(load_instances(small_voc, "train", ("cube", "dice")), 32)
    sampler = TrainingSampler(len(dataset), 2, 20, seed=1)
    first = 1 + next(i for i, batch in enumerate(sampler) if any(s.index == 5 for s in batch))
    loader = make_loader(dataset, 2, batch_sampler=sampler)
    with pytest.raises(error, match=words) as caught:
        train_detector(Toy(fails), loader, 0.01, max_iters=20, log_period=4, run=run)
    assert multiprocessing.active_children() == []
    done = {"loader": first - 1, "evaluation": 20}.get(name, 7)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    assert [line["iteration"] for line in lines] == list(range(1, done + 1))
    message = str(caught.value) + capsys.readouterr().err
    if done >= 5:
        assert f"The last good checkpoint is {tmp_path / 'checkpoint.pt'}" in message
        assert load_checkpoint(tmp_path / "checkpoint.pt")["iteration"] == done // 5 * 5
    else:
        assert "There is no checkpoint yet" in message


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error():
    """PyTorch prints such errors, and the process that trains would wait for ever."""

    class Unsendable:
        def __reduce__(self):
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1_2_3>: "
                "No space left on device (28)"
            )

    loader = make_loader([Unsendable()], 1, collate_fn=list)
    with (
        pytest.raises(RuntimeError, match="No space left on device") as caught,
        loading.batches_of(loader) as batches,
    ):
        next(batches)
    assert "/dev/shm" in explain(caught.value)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EAGAIN, "no further process.*--workers"), (errno.ENOMEM, "out of memory")],
)
def test_a_process_that_cannot_be_started_is_explained(monkeypatch, number, words):
    def refuse():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(RunError, match=words), explained():
        next(iter(make_loader(range(8), 1)))


def test_processes_that_are_to_stay_do():
    loader = make_loader(range(8), 1, persistent_workers=True)
    for _ in range(2):
        with loading.batches_of(loader) as batches:
            assert len(list(batches)) == 8
    with pytest.raises(KeyError), loading.batches_of(loader):
        raise KeyError
    assert len(list(loader)) == 8


@pytest.mark.parametrize(
    "free_megabytes, processes, wished, expected",
    [
        (1000, 1, 4, 4),
        (64, 1, 4, 2),  # a container, and the assignment's batch
        (64, 2, 4, 0),
        (45, 1, 4, 1),
        (45, 1, 0, 0),
        (32, 1, 4, 0),
        (None, 1, 4, 4),
    ],
)
def test_as_many_loaders_as_the_shared_memory_has_room_for(
    monkeypatch, capsys, free_megabytes, processes, wished, expected
):
    def disk_usage(path):
        assert path == "/dev/shm"
        if free_megabytes is None:
            raise FileNotFoundError
        return type("Usage", (), {"free": free_megabytes * 2**20})

    monkeypatch.setattr(loading.shutil, "disk_usage", disk_usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loading.fit_workers(wished, (16, 224, 224), (1, 224, 448)) == expected
    assert (f"it will be {expected}" in capsys.readouterr().err) == (expected < wished)


def test_a_full_disk_is_named_and_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    """A limit for the size of files stands for the full disk: writes fail in the same places."""
    resource = pytest.importorskip("resource")
    run = TrainingRun(tmp_path, {}, [])
    history = {"iteration": [1.0], "loss": [0.5]}
    run.write_history(history)
    checkpoint = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint, {"w": torch.ones(2)}, {}, [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            save_checkpoint(checkpoint, {"w": torch.ones(100_000)}, {}, [])
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(checkpoint)
        for name in ("iteration", "loss"):
            history[name] += [2.0] * 100
        with pytest.raises(OSError) as caught:
            run.write_history(history)
        assert caught.value.filename == str(tmp_path / "history.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_checkpoint(checkpoint)["model"]["w"], torch.ones(2))
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").open()] == [
        {"iteration": 1.0, "loss": 0.5}
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "history.jsonl"]


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------

SMALL = ["--weights", "none", "--batch-size", "4", "--image-size", "64", "--fpn-channels", "8"]
SMALL += ["--stem", "8", "--max-grad-norm", "1", "--iters", "20", "--checkpoint-every", "5"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    assert cli.main(["data", "shapes", str(folder), "--train", "8", "--val", "2"]) == 0
    return folder


def end_of(
    error: str,
    *arguments: str,
    torchrun: bool = False,
    mount: tuple[str, Path] | None = None,
    then: str = "",
) -> tuple[int, str]:
    """Run ``fcos`` with a planted error; the exit status and all that it printed.

    Args:
        mount: size and place of a file system that the run alone sees, such as a full disk.
        then: commands of the shell, for what is to be seen there afterwards.
    """
    command = [sys.executable, *(TORCHRUN if torchrun else [])]
    command += [str(Path(__file__).with_name("failing.py")), error, *arguments, "--device", "cpu"]
    if mount is not None:
        size, place = mount
        script = f'mount -t tmpfs -o size={size} none "$0" && "$@"{then}'
        command = ["unshare", "-m", "sh", "-c", script, str(place), *command]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"  # every process of the run has it
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUN_MARK": mark}
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    left = processes_with(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} processes were left by: {done.stdout}"
    return done.returncode, done.stdout


def processes_with(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"RUN_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # another user's, or it has just ended
            continue
    return found


def check_what_is_left(out: Path, text: str, iteration: int) -> None:
    assert f"The last good checkpoint is {out / 'checkpoint.pt'}" in text
    assert load_checkpoint(out / "checkpoint.pt")["iteration"] == iteration
    lines = [json.loads(line) for line in (out / "history.jsonl").open()]
    steps = [line["iteration"] for line in lines]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= iteration


def test_an_unknown_error_has_its_traceback_and_ends(shapes, tmp_path):
    train = ["train", "--data", str(shapes), "--out", str(tmp_path / "run"), *SMALL]
    status, text = end_of("step", *train, "--workers", "2")
    assert status == 1 and text.rstrip().endswith("RuntimeError: planted")
    check_what_is_left(tmp_path / "run", text, 5)


def test_an_error_in_one_of_two_processes_ends_both(shapes, tmp_path):
    train = ["train", "--data", str(shapes), "--out", str(tmp_path / "run"), *SMALL]
    status, text = end_of("step", *train, "--workers", "2", torchrun=True)
    assert status == 1 and "RuntimeError: planted" in text
    assert "another process of this run has ended" in text, text[-6000:]
    check_what_is_left(tmp_path / "run", text, 5)


@pytest.fixture(scope="module")
def can_mount() -> None:
    try:
        command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")


def full_disk(shapes: Path, tmp_path: Path, *options: str, torchrun: bool = False) -> None:
    """A checkpoint has 41 MB; the disk has room for one and a half, and is looked at inside."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    train = ["train", "--data", str(shapes), "--out", str(disk / "run"), *SMALL, *options]
    keep = f"; status=$?; cp -r {disk}/run {copy}; exit $status"
    status, text = end_of("none", *train, torchrun=torchrun, mount=("60m", disk), then=keep)
    assert status == (1 if torchrun else 2)
    assert re.search(r"checkpoint\.pt could not be written: No space left on device", text), text
    assert f"The last good checkpoint is {disk / 'run/checkpoint.pt'}" in text
    assert load_checkpoint(copy / "checkpoint.pt")["iteration"] == 5
    lines = [json.loads(line) for line in (copy / "history.jsonl").open()]
    assert [line["iteration"] for line in lines] == list(range(1, 11))


@pytest.mark.usefixtures("can_mount")
def test_a_full_disk(shapes, tmp_path):
    full_disk(shapes, tmp_path, "--workers", "0")


@pytest.mark.usefixtures("can_mount")
def test_prediction_with_little_shared_memory(shapes, tmp_path):
    """Long images take more than is known before they are read: that is an error, and no hang."""
    checkpoint = tmp_path / "detector.pt"
    torch.manual_seed(0)
    save_checkpoint(
        checkpoint,
        FCOS(2, 8, [8], weights=None).state_dict(),
        from_recipe("shapes", fpn_channels=8, stem_channels=(8,)).to_dict(),
        ["a", "b"],
    )
    Image.new("RGB", (4000, 400)).save(tmp_path / "long.png")
    predict = ["predict", str(checkpoint), *[str(tmp_path / "long.png")] * 4, "--workers", "1"]
    predict += ["--out", str(tmp_path / "out"), "--image-size", "400", "--batch-size", "1"]
    status, text = end_of("none", *predict, mount=("17m", Path("/dev/shm")))
    assert status == 2 and "/dev/shm" in text and "is too small" in text, text


# --------------------------------------------------------------------------------------------
# Every error, with each number of processes
# --------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.usefixtures("can_mount")
@pytest.mark.parametrize("torchrun", [False, True], ids=["alone", "two"])
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize(
    "error", ["step", "loader", "evaluation", "memory", "killed", "disk", "shm"]
)
def test_every_error(shapes, tmp_path, error, workers, torchrun):
    if error == "killed" and not workers:
        pytest.skip("no process to kill")
    options = ["--workers", str(workers)]
    if error == "disk":
        full_disk(shapes, tmp_path, *options, torchrun=torchrun)
        return
    out, mount, more = tmp_path / "run", None, []
    if error == "shm":
        more, mount = ["--image-size", "800", "--iters", "2"], ("32m", Path("/dev/shm"))
    train = ["train", "--data", str(shapes), "--out", str(out), *SMALL, *options, *more]
    start = time.monotonic()
    status, text = end_of(error, *train, torchrun=torchrun, mount=mount)
    print(f"{error}, {workers} workers, {1 + torchrun} processes: {time.monotonic() - start:.1f} s")
    if error == "shm":  # fewer processes, and no error
        assert status == 0 and ("it will be 0" in text) == (workers > 0)
        return
    assert status in (1, 2)
    words = {"memory": "out of memory with", "killed": "was killed"}
    assert words.get(error, "RuntimeError: planted") in text, text
    if error == "loader":
        assert re.search(r"The last good checkpoint is|There is no checkpoint yet", text)
    else:
        check_what_is_left(out, text, 20 if error == "evaluation" else 5)
