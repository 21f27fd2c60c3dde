"""Optimizer groups and the moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eecs598.training.optimization import make_optimizer, weight_average


def test_pretrained_layers_learn_more_slowly():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.backbone_parameters = lambda: list(model[0].parameters())
    model[1].bias.requires_grad_(False)
    optimizer = make_optimizer(model, "sgd", 0.5, 0.0, pretrained_lr_factor=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(model[0].weight): pytest.approx(0.05),
        id(model[0].bias): pytest.approx(0.05),
        id(model[1].weight): 0.5,
    }
    assert optimizer.param_groups[0]["lr"] == 0.5  # the one that is logged


def test_the_moving_average_forgets_its_start():
    model = nn.BatchNorm1d(1)
    average = weight_average(model, 0.9)
    expected = None
    for step in range(40):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(-step)
        average.update_parameters(model)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = step if expected is None else decay * expected + (1 - decay) * step
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
        assert average.module.running_mean.item() == pytest.approx(-expected, rel=1e-5)
