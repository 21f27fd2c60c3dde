"""Training with several processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eecs598.training.checkpoint import load_checkpoint
from fcos import cli

ROOT = Path(__file__).resolve().parents[2]

SMALL = ["--weights", "none", "--batch-size", "4", "--image-size", "64", "--workers", "0"]
SMALL += ["--fpn-channels", "8", "--stem", "8", "--device", "cpu", "--max-grad-norm", "1"]


def torchrun(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_two_processes_make_the_step_of_one(tmp_path):
    worker = str(ROOT / "tests/runtime/ddp_worker.py")
    command = [sys.executable, worker, str(tmp_path / "1.pt")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    done = torchrun(worker, str(tmp_path / "2.pt"))
    assert done.returncode == 0, done.stderr
    one, two = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "2.pt")
    assert one["ranks"] == [0] and two["ranks"] == [0, 1]
    assert torch.allclose(one["normalizer"], two["normalizer"], rtol=1e-5)
    for name, loss in one["losses"].items():
        assert two["losses"][name].item() == pytest.approx(loss.item(), rel=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        difference = (two["gradients"][name] - gradient).abs().max()
        assert difference <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    assert cli.main(["data", "shapes", str(folder), "--train", "12", "--val", "3"]) == 0
    return folder


def test_a_process_that_fails_ends_the_job_and_the_run_goes_on(shapes, tmp_path):
    """An unreadable image stops one of two processes; the run is resumed once it is repaired."""
    out = tmp_path / "run"
    train_ids = (shapes / "ImageSets/Main/train.txt").read_text().split()
    image = shapes / "JPEGImages" / f"{train_ids[0]}.jpg"
    content = image.read_bytes()
    train = ["-m", "fcos", "train", "--data", str(shapes), "--out", str(out), *SMALL]
    train += ["--iters", "12", "--checkpoint-every", "1"]
    image.write_bytes(content[: len(content) // 2])  # what the check before a run can't see
    failed = torchrun(*train)
    image.write_bytes(content)
    assert failed.returncode != 0
    assert "can't be read as an image" in failed.stderr

    resume = ["-m", "fcos", "train", "--resume", "--out", str(out), "--workers", "0"]
    done = torchrun(*resume, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[Iter 12]") == 1  # one process prints
    assert load_checkpoint(out / "checkpoint.pt")["iteration"] == 12
    lines = [json.loads(line) for line in (out / "history.jsonl").open()]
    assert [line["iteration"] for line in lines if "loss" in line] == list(range(1, 13))

    # The evaluation that the processes shared is the one that a single process makes.
    shared = json.loads((out / "metrics.json").read_text())
    evaluate = ["eval", str(out / "checkpoint.pt"), "--data", str(shapes), "--workers", "0"]
    assert cli.main([*evaluate, "--json", str(tmp_path / "alone.json")]) == 0
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert alone["AP"] == shared["AP"] and alone["num_detections"] == shared["num_detections"]


def test_a_batch_that_cannot_be_shared(shapes, tmp_path):
    train = ["-m", "fcos", "train", "--data", str(shapes), "--out", str(tmp_path / "run"), *SMALL]
    done = torchrun(*train, "--batch-size", "3")
    assert done.returncode != 0 and "choose a multiple" in done.stderr


def test_a_signal_stops_all_processes_in_good_order(shapes, tmp_path):
    """torchrun passes SIGTERM on and kills whoever is left half a minute later."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fcos", "train", "--data", str(shapes)]
    command += ["--out", str(out), *SMALL, "--iters", "5000", "--checkpoint-every", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        while not (out / "checkpoint.pt").exists() and job.poll() is None:
            time.sleep(0.05)
        job.terminate()
        text = job.stdout.read()
    stopped_at = int(re.search(r"after iteration (\d+)", text)[1])
    assert load_checkpoint(out / "checkpoint.pt")["iteration"] == stopped_at
