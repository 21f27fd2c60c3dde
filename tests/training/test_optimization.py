"""Optimizer groups, mixed precision and the moving average of the weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eecs598.training.optimization import (
    ema,
    learning_rate_factor,
    make_optimizer,
    mixed_precision,
)


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


@pytest.fixture
def bfloat16_processor(monkeypatch):
    """A CPU that computes in bfloat16, which PyTorch does anywhere, only slowly."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    return torch.device("cpu")


def types_within(function):
    """Call a function, and return the type of what the convolutions in it really computed in."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.overloadpacket is torch.ops.aten.convolution:
                seen.append((args[8], args[0].dtype))
            return operator(*args, **(kwargs or {}))

    with Watch():
        function()
    return seen


def test_depthwise_convolutions_alone_are_trained_in_float32(bfloat16_processor):
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(8, 8, 5, stride=2, groups=8, bias=False),  # depthwise
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 1, 1),
        nn.Conv2d(1, 4, 3),  # of one channel, which is no depthwise convolution
    )
    images = torch.randn(2, 3, 32, 32)
    autocast, _ = mixed_precision(bfloat16_processor, "auto")
    half, whole = torch.bfloat16, torch.float32

    outputs = []
    for _ in range(2):  # the context can be entered again
        with autocast:
            seen = types_within(lambda: outputs.append(network(images)))
        assert seen == [(1, half), (8, whole), (2, half), (1, half), (1, half)]
    assert outputs[0].dtype == half and torch.equal(*outputs)
    with autocast:
        assert network[1](network[0](images)).dtype == half  # for what follows
        with torch.autocast("cpu", enabled=False):  # as a model may do for a part of itself
            assert network[1](network[0](images)).dtype == whole
    with autocast, torch.no_grad():
        seen = types_within(lambda: network(images))
    assert {dtype for _, dtype in seen} == {half}
    assert {dtype for _, dtype in types_within(lambda: network(images))} == {whole}

    outputs[0].float().square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    with torch.autocast("cpu", half):
        network(images).float().square().sum().backward()
    for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
        assert gradient.dtype == whole
        error = (gradient - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-3)
        assert error < 0.1, name


def test_an_error_within_mixed_precision_leaves_nothing_behind(bfloat16_processor):
    autocast, _ = mixed_precision(bfloat16_processor, "auto")
    with pytest.raises(RuntimeError), autocast:
        nn.Conv2d(4, 4, 3, groups=4)(torch.zeros(1, 5, 8, 8))
    assert not torch.is_autocast_enabled("cpu")
    seen = types_within(lambda: nn.Conv2d(4, 4, 3, groups=4)(torch.zeros(1, 4, 8, 8)))
    assert seen == [(4, torch.float32)]
