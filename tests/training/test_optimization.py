"""Optimizer groups and the moving average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from eecs598.training.optimization import ema, learning_rate_factor, make_optimizer


def test_the_backbone_learns_more_slowly():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model.backbone_parameters = lambda: list(model[0].parameters())
    model[1].bias.requires_grad_(False)
    optimizer = make_optimizer(model, "sgd", 0.5, 0.0, backbone_lr_factor=0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(model[0].weight): pytest.approx(0.05),
        id(model[0].bias): pytest.approx(0.05),
        id(model[1].weight): 0.5,
    }
    assert optimizer.param_groups[0]["lr"] == 0.5  # the one that is logged


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_biases_and_norms_without_weight_decay(factor):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 3))
    model.backbone_parameters = lambda: [*model[0].parameters(), *model[1].parameters()]
    optimizer = make_optimizer(model, "adamw", 0.5, 0.3, factor, decay_all=False)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert {name: decays[id(p)] for name, p in names.items()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.3,
        "2.bias": 0.0,
    }
    assert rates[id(model[1].bias)] == pytest.approx(0.5 * factor)
    assert rates[id(model[2].bias)] == 0.5


def test_a_model_that_does_not_tell_its_backbone():
    with pytest.raises(ValueError, match=r"backbone_lr_factor=0\.1 .*Linear has none"):
        make_optimizer(nn.Linear(1, 1), "sgd", 0.5, 0.0, backbone_lr_factor=0.1)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("step", [0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
        ("cosine", [0.25, 0.4878, 0.6784, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245]),
    ],
)
def test_schedules_with_warm_up(schedule, expected):
    factor = learning_rate_factor(schedule, 3, 10)
    assert [factor(step) for step in range(10)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_overflows_leaves_nothing_behind(name, monkeypatch):
    """With SGD, PyTorch then takes unused memory, here NaN, for the momentum."""
    monkeypatch.setattr(torch, "empty_like", lambda each, **_: torch.full_like(each, math.nan))
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, gradients in zip(models, [(math.inf, 3.0, 1.0), (3.0, 1.0)], strict=True):
        optimizer = make_optimizer(model, name, 0.1, 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, backoff_factor=0.999999)
        for gradient in gradients:
            optimizer.zero_grad()
            scaler.scale(gradient * model.weight.sum()).backward()
            scaler.step(optimizer)
            scaler.update(1.0)
    torch.testing.assert_close(models[0].weight, models[1].weight)


def test_the_moving_average_forgets_its_start():
    model = nn.BatchNorm1d(1)
    average = ema(model, 0.9)
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
