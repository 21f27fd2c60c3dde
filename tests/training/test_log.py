"""History, log lines and plots of a training run; the loop itself is tested in test_a4_helper."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from eecs598.training.log import TrainingLogger, plot_losses


def steps(logger: TrainingLogger, *losses: float) -> None:
    for iteration, loss in enumerate(losses, start=logger.logged + 1):
        values = {"loss": torch.tensor(loss), "loss_a": torch.tensor(loss / 2)}
        logger.step(iteration, 0.1, values, [f"{iteration}.jpg"])


def test_losses_reach_the_history_when_it_is_asked_for():
    history: dict[str, list[float]] = {}
    with TrainingLogger(history, 4) as logger:
        steps(logger, 2.0, 4.0)
        assert history == {}
        logger.flush()
        logger.flush()
    assert history == {"iteration": [1, 2], "lr": [0.1, 0.1], "loss": [2, 4], "loss_a": [1, 2]}


def test_a_line_has_the_means_since_the_last_one(capsys):
    history = {"iteration": [1], "lr": [0.1], "loss": [100.0], "loss_a": [100.0]}
    with TrainingLogger(history, 4) as logger:
        steps(logger, 2.0, 4.0)
        logger.log()
        steps(logger, 7.0)
        logger.log()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[Iter 3][loss: 3.000][loss_a: 1.500] lr 1.0e-01, ")
    assert second.startswith("[Iter 4][loss: 7.000][loss_a: 3.500]") and second.endswith(
        "0:00:00 left"
    )


def test_a_loss_that_is_not_finite_names_its_images():
    with TrainingLogger({}, 4) as logger:
        steps(logger, 2.0, math.inf)
        with pytest.raises(FloatingPointError, match=r"became inf at iteration 2 .* batch: 2\.jpg"):
            logger.flush()
    assert logger.history["loss"] == [2.0]


def test_the_plot_has_every_loss_and_the_evaluations(tmp_path):
    losses = {"loss": [3.0, 2.0, 1.0], "loss_a": [2.0, 1.0, 0.0]}
    history = {"iteration": [1, 2, 3], "lr": [0.1, 0.1, 0.1], **losses}
    evaluations = [{"iteration": 2, "mAP": 0.25}]
    ax = plot_losses(history, tmp_path / "loss.png", evaluations)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["loss", "loss_a", "validation mAP"]
    (twin,) = (other for other in ax.figure.axes if other is not ax)
    assert twin.get_lines()[0].get_xydata().tolist() == [[2, 25]]
    with Image.open(tmp_path / "loss.png") as picture:
        assert min(picture.size) > 200
