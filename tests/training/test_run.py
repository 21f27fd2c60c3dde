"""Training runs that are stopped, killed or fail, and are resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from a4_helper import VOC2007DetectionTiny, train_detector
from eecs598.data import TrainingSampler, TrainingSet
from eecs598.training.checkpoint import (
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from eecs598.training.run import RunDescription, TrainingRun, TrainingStopped
from eecs598.training.settings import Settings
from fcos import cli

ROOT = Path(__file__).resolve().parents[2]

SMALL = ["--weights", "none", "--batch-size", "2", "--image-size", "32", "--workers", "0"]
SMALL += ["--fpn-channels", "8", "--stem", "8", "--device", "cpu", "--max-grad-norm", "1"]


def fcos_process(*arguments: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "fcos", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def logged_iterations(lines) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.match(r"\[Iter (\d+)\]", line))]


# --------------------------------------------------------------------------------------------
# In this process
# --------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A network that is quick, and random in training."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Conv2d(4, 5, 3)
        )

    def forward(self, images, gt_boxes=None, **thresholds):
        means = self.layers(images).mean(dim=(2, 3))
        return {"loss_a": (means - gt_boxes[:, 0] / 32).abs().mean()}


def check_history_file(folder: Path, history: dict) -> None:
    """Every iteration stands in it once, in order."""
    lines = [json.loads(line) for line in (folder / "history.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    assert [step["iteration"] for step in steps] == history["iteration"]
    assert [step["loss"] for step in steps] == history["loss"]


class Killed(Exception):
    """Stands for a process that ends without a word."""


RECIPES = {
    "plain": ({}, {}),
    "all": (
        {
            "optimizer": "adamw",
            "schedule": "cosine",
            "warmup_iters": 5,
            "max_grad_norm": 1.0,
            "ema_decay": 0.9,
        },
        {"image_sizes": (32, 48)},
    ),
    "float16": ({"amp": "auto", "max_grad_norm": 1.0}, {}),  # as GPUs without bfloat16 train
}


@pytest.fixture(autouse=True)
def a_processor_of_float16(monkeypatch):
    dtypes = {"auto": torch.float16, "off": torch.float32}
    monkeypatch.setattr(
        "eecs598.training.optimization.network_dtype", lambda _device, amp: dtypes[amp]
    )


def train_toy(folder, small_voc, recipe="plain", *, resume=False, max_iters=20, **run_settings):
    """Train for 20 iterations; the detector, the history and the run."""
    arguments, sampling = RECIPES[recipe]
    torch.manual_seed(0)
    toy = Toy()
    folder.mkdir(exist_ok=True)
    run_settings = {"checkpoint_every": 5, **run_settings}
    run = TrainingRun(folder, {"a": 1}, ["cube", "dice"], resume=resume, **run_settings)
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=32, classes=("cube", "dice"))
    augmented = TrainingSet(dataset.instances, 32, ("flip", "zoom") if sampling else ())
    sampler = TrainingSampler(len(dataset), 3, max_iters, start=run.iteration, seed=4, **sampling)
    loader = DataLoader(augmented, batch_sampler=sampler, generator=torch.Generator())
    history = train_detector(
        toy, loader, 0.01, max_iters=max_iters, log_period=4, run=run, **arguments
    )
    return toy, history, run


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("killed_at", [4, 10, 13])
def test_resumed_training_is_bit_identical(tmp_path, small_voc, recipe, killed_at, monkeypatch):
    straight, history, _ = train_toy(tmp_path / "straight", small_voc, recipe)

    calls = 0
    original = Toy.forward

    def dies(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > killed_at:
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Toy, "forward", dies)
    with pytest.raises(Killed):
        train_toy(tmp_path / "killed", small_voc, recipe)
    monkeypatch.setattr(Toy, "forward", original)
    can_resume = (tmp_path / "killed/checkpoint.pt").is_file()
    assert can_resume == (killed_at >= 5)
    torch.rand(5)  # the resumed training must not depend on where the generator is
    resumed, resumed_history, run = train_toy(
        tmp_path / "killed", small_voc, recipe, resume=can_resume
    )
    for (name, ours), theirs in zip(
        resumed.state_dict().items(), straight.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed_history == history
    check_history_file(tmp_path / "killed", history)


def test_evaluations_and_the_files_that_are_kept(tmp_path, small_voc):
    scores = iter([0.2, 0.5, 0.3, 0.4])
    states = []

    def evaluate(model):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    _, _, run = train_toy(
        tmp_path / "run", small_voc, evaluate=evaluate, eval_every=5, keep_every=8
    )
    assert [(e["iteration"], e["mAP"]) for e in run.evaluations] == [
        (5, 0.2),
        (10, 0.5),
        (15, 0.3),
        (20, 0.4),
    ]
    best = load_checkpoint(tmp_path / "run/best.pt")
    assert best["iteration"] == 10 and best["mAP"] == 0.5
    assert all(torch.equal(best["model"][name], value) for name, value in states[1].items())
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "best.pt",
        "checkpoint.pt",
        "checkpoint-8.pt",
        "checkpoint-16.pt",
        "history.jsonl",
    }
    assert load_checkpoint(tmp_path / "run/checkpoint-8.pt")["iteration"] == 8
    entries = [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]
    assert sum("mAP" in entry for entry in entries) == 4 and len(entries) == 24


@pytest.mark.parametrize("stopped_at", [10, 20])
@pytest.mark.parametrize("within", [True, False])
def test_an_evaluation_that_a_signal_cuts_off_is_made_up_for(
    tmp_path, small_voc, monkeypatch, stopped_at, within
):
    """A signal comes within an evaluation, or in the iteration just before."""
    evaluated = []
    calls = 0
    original = Toy.forward

    def sends(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == stopped_at and not within:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    def evaluate(model):
        evaluated.append(calls)
        if calls == stopped_at and within:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return 0.01 * calls

    monkeypatch.setattr(Toy, "forward", sends)
    options = {"evaluate": evaluate, "eval_every": 10, "checkpoint_every": 0}
    with pytest.raises(TrainingStopped, match=f"after iteration {stopped_at}.*--resume --out"):
        train_toy(tmp_path / "run", small_voc, **options)
    assert evaluated == [10, 20][: stopped_at // 10 - (0 if within else 1)]
    assert load_checkpoint(tmp_path / "run/checkpoint.pt")["iteration"] == stopped_at
    stopped_at = 0
    _, history, run = train_toy(tmp_path / "run", small_voc, resume=True, **options)
    assert run.evaluations == [{"iteration": i, "mAP": 0.01 * i} for i in (10, 20)]
    assert load_checkpoint(tmp_path / "run/best.pt")["iteration"] == 20
    check_history_file(tmp_path / "run", history)
    entries = [json.loads(line) for line in (tmp_path / "run/history.jsonl").open()]
    assert [entry for entry in entries if "mAP" in entry] == run.evaluations
    before = len(evaluated)
    train_toy(tmp_path / "run", small_voc, resume=True, **options)
    assert len(evaluated) == before  # what was made is not made again


def test_the_moving_average_is_what_is_evaluated_and_returned(tmp_path, small_voc):
    evaluated = []

    def evaluate(model):
        evaluated.append(model.layers[0].weight.clone())
        return 0.0

    toy, _, _ = train_toy(tmp_path / "run", small_voc, "all", evaluate=evaluate, eval_every=20)
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    averaged = checkpoint["model"]["layers.0.weight"]
    assert torch.equal(averaged, evaluated[0]) and torch.equal(averaged, toy.layers[0].weight)
    assert not torch.equal(averaged, checkpoint["state"]["detector"]["layers.0.weight"])


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(
    tmp_path, small_voc, monkeypatch
):
    calls = 0
    original = Toy.forward

    def overflows(self, images, gt_boxes=None, **thresholds):
        nonlocal calls
        calls += 1
        losses = original(self, images, gt_boxes)
        return {
            "loss_a": losses["loss_a"],
            "loss_b": torch.tensor(1.0 if calls < 12 else torch.nan),
        }

    monkeypatch.setattr(Toy, "forward", overflows)
    with pytest.raises(FloatingPointError) as stopped:
        train_toy(tmp_path / "run", small_voc)
    message = str(stopped.value)
    assert "at iteration 12" in message and "'loss_b': nan" in message
    assert message.count(".jpg") == 3 and "checkpoint.pt" in message
    checkpoint = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert checkpoint["iteration"] == 10
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    lines = (tmp_path / "run/history.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 12))  # the way there


def test_weights_that_are_not_finite_are_not_saved(tmp_path, small_voc, monkeypatch):
    """The loss is from before the step that ruins the weights."""
    original = torch.optim.SGD.step
    calls = 0

    def step(self, *args):
        nonlocal calls
        calls += 1
        original(self, *args)
        if calls == 10:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(FloatingPointError, match="after iteration 10 .*not finite.*checkpoint.pt"):
        train_toy(tmp_path / "run", small_voc)
    assert load_checkpoint(tmp_path / "run/checkpoint.pt")["iteration"] == 5


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_in_good_order(tmp_path, small_voc, monkeypatch, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    calls = 0
    original = Toy.forward

    def sends(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Toy, "forward", sends)
    with pytest.raises(TrainingStopped, match="after iteration 7.*--resume --out") as stopped:
        train_toy(tmp_path / "run", small_voc)
    assert stopped.value.signal_number == number
    assert load_checkpoint(tmp_path / "run/checkpoint.pt")["iteration"] == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    _, history, _ = train_toy(tmp_path / "run", small_voc, resume=True)
    assert history["iteration"] == list(range(1, 21))


def test_the_scale_of_gradients_goes_on_and_steps_that_overflow_are_left_out(tmp_path, small_voc):
    toy, _, _ = train_toy(tmp_path / "run", small_voc, "float16", max_iters=1)
    saved = load_checkpoint(tmp_path / "run/checkpoint.pt")["state"]["scaler"]
    assert saved["scale"] == 2.0**16 and saved["_growth_tracker"] == 1
    before = {name: value.clone() for name, value in toy.named_parameters()}

    class Steep(Toy):
        def forward(self, images, gt_boxes=None, **thresholds):
            losses = super().forward(images, gt_boxes)
            return {name: 1e35 * loss for name, loss in losses.items()}

    steep = Steep()
    steep.load_state_dict(toy.state_dict())
    dataset = VOC2007DetectionTiny(small_voc, "train", image_size=32, classes=("cube", "dice"))
    loader = DataLoader(dataset, batch_size=2)
    train_detector(steep, loader, 0.01, max_iters=3, log_period=1, amp="auto", max_grad_norm=1.0)
    for name, value in steep.named_parameters():
        assert torch.equal(value, before[name]), name


def test_tensorboard(tmp_path, small_voc):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"evaluate": lambda _model: 0.5, "eval_every": 10, "tensorboard": True}
    train_toy(tmp_path / "run", small_voc, max_iters=10, **options)
    _, history, _ = train_toy(tmp_path / "run", small_voc, resume=True, **options)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"loss", "loss_a", "lr", "mAP"} <= set(events.Tags()["scalars"])
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [
        (iteration, pytest.approx(loss))
        for iteration, loss in zip(history["iteration"], history["loss"], strict=True)
    ]
    assert [event.step for event in events.Scalars("mAP")] == [10, 20]


def test_random_states_come_back(tmp_path):
    def draw():
        import numpy as np

        return random.random(), np.random.rand(), torch.rand(()).item()

    save_checkpoint(tmp_path / "c.pt", {}, {}, [], random=random_states())
    first = draw()
    assert draw() != first
    restore_random_states(load_checkpoint(tmp_path / "c.pt")["random"])
    assert draw() == first


def test_a_model_alone_is_no_training(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", {"w": torch.ones(1)}, {}, [])
    with pytest.raises(ValueError, match="a model alone"):
        TrainingRun(tmp_path, {}, [], resume=True)
    torch.save({"w": torch.ones(1)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="a model alone"):
        TrainingRun(tmp_path, {}, [], resume=True)


# --------------------------------------------------------------------------------------------
# Description
# --------------------------------------------------------------------------------------------


def describe(folder: Path) -> RunDescription:
    folder.mkdir(parents=True)
    description = RunDescription(
        out=folder,
        recipe="handout",
        settings=Settings().replace(max_iters=7, stem_channels=(8, 8)),
        data="/data",
        class_names=["cube", "dice"],
        environment=[{"python": "3"}],
        contents={"train": {"images": 3}},
    )
    description.write()
    return description


def test_a_description_comes_back_from_a_folder_that_moved(tmp_path):
    description = describe(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert RunDescription.read(tmp_path / "new") == dataclasses.replace(
        description, out=tmp_path / "new"
    )


def test_a_run_keeps_to_its_settings_but_for_those_of_the_run(tmp_path):
    description = describe(tmp_path / "run")
    description.change(None, {"stem_channels": (8, 8), "eval_every": 3})
    assert description.settings == Settings().replace(
        max_iters=7, stem_channels=(8, 8), eval_every=3
    )
    with pytest.raises(ValueError, match="max_iters 7, and now 8 was given"):
        description.change(None, {"max_iters": 8})
    with pytest.raises(ValueError, match="recipe handout, and now strong was given"):
        description.change("strong", {})
    with pytest.raises(ValueError, match="has changed"):
        description.check_contents({"train": {"images": 4}})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda values: values.pop("data"), "run.json has no entry 'data'"),
        (lambda values: values["settings"].pop("model"), "missing groups of settings: model"),
        (lambda values: values["settings"]["run"].update(x=1), "unknown settings in 'run': x"),
        (lambda values: values.update(settings=None), "groups of settings are None"),
    ],
)
def test_a_description_that_can_not_be_read(tmp_path, change, words):
    describe(tmp_path / "run")
    file = tmp_path / "run/run.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        RunDescription.read(tmp_path / "run")
    with pytest.raises(ValueError, match="no folder that a training run could continue in"):
        RunDescription.read(tmp_path)


def test_the_latest_unfinished_run(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        describe(tmp_path / name)
        os.utime(tmp_path / name / "run.json", (1000 - age, 1000 - age))
    for expected in ("newest", "middle", "oldest"):
        assert RunDescription.latest_unfinished(tmp_path).out == tmp_path / expected
        (tmp_path / expected / "metrics.json").touch()
    with pytest.raises(ValueError, match="no unfinished training run"):
        RunDescription.latest_unfinished(tmp_path)


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    assert cli.main(["data", "shapes", str(folder), "--train", "8", "--val", "2"]) == 0
    return folder


def test_killed_at_random_moments(shapes, tmp_path):
    """kill -9 loses no more than a checkpoint period, and changes nothing in the result."""
    period, kills = 5, 10
    settings = [*SMALL, "--iters", "80", "--recipe", "strong", "--amp", "off"]
    settings += ["--checkpoint-every", str(period), "--ema-decay", "0.9", "--eval-every", "0"]
    straight = ["train", "--data", str(shapes), "--out", str(tmp_path / "straight"), *settings]
    assert cli.main(straight) == 0

    out = tmp_path / "killed"
    command = ["train", "--data", str(shapes), "--out", str(out), *settings]
    moments = random.Random(0)
    checkpoint = out / "checkpoint.pt"
    for _ in range(kills):
        before = load_checkpoint(checkpoint)["iteration"] if checkpoint.is_file() else 0
        with fcos_process(*command) as process:
            seen = []
            for line in process.stdout:  # the first line of the log: the training runs
                seen.append(line)
                if line.startswith("[Iter"):
                    break
            assert process.poll() is None or process.returncode == 0, "".join(seen)
            time.sleep(moments.uniform(0, 0.6))
            with contextlib.suppress(ProcessLookupError):  # it was done already
                os.killpg(process.pid, signal.SIGKILL)
            seen += process.stdout.readlines()
        command = ["train", "--resume", "--out", str(out), "--workers", "0", "--device", "cpu"]
        command += ["--checkpoint-every", str(period), "--eval-every", "0"]
        after = load_checkpoint(checkpoint)["iteration"] if checkpoint.is_file() else 0
        assert after >= before
        # The line of an iteration comes before its checkpoint, so it may be a whole period.
        assert after >= max(logged_iterations(seen), default=0) - period
    assert cli.main(command) == 0
    ours, theirs = (
        load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("killed", "straight")
    )
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert ours["history"] == theirs["history"]
    check_history_file(out, ours["history"])
    assert len(json.loads((out / "run.json").read_text())["environment"]) == kills + 1
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_command(shapes, tmp_path, number, status):
    out = tmp_path / "run"
    train = ["train", "--data", str(shapes), "--out", str(out), *SMALL, "--iters", "5000"]
    train += ["--checkpoint-every", "10"]
    with fcos_process(*train, "--workers", "1") as process:
        while not (out / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as a terminal and a scheduler do: the loader gets it, too
        text = process.stdout.read()
    assert process.returncode == status, text
    stopped_at = int(re.search(r"after iteration (\d+)", text)[1])
    assert f"fcos train --resume --out {out}" in text
    assert load_checkpoint(out / "checkpoint.pt")["iteration"] == stopped_at
