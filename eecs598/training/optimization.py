"""What turns gradients into better weights: optimizer, schedule, precision, moving average."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = [
    "learning_rate_factor",
    "make_optimizer",
    "mixed_precision",
    "network_dtype",
    "precision_name",
    "weight_average",
]


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    pretrained_lr_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """An optimizer for the parameters of a model that want a gradient.

    Args:
        model: with ``backbone_parameters()`` if the factor is not 1.
        name: ``"sgd"``, with momentum 0.9, or ``"adamw"``.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        pretrained_lr_factor: the learning rate of the pretrained parameters is multiplied by it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters}]
    if pretrained_lr_factor != 1:
        pretrained = {id(p) for p in model.backbone_parameters()}
        slow = [p for p in parameters if id(p) in pretrained]
        groups = [
            {"params": [p for p in parameters if id(p) not in pretrained]},
            {"params": slow, "lr": learning_rate * pretrained_lr_factor},
        ]
    # One fused kernel for all parameters; the arithmetic is that of the plain loop.
    common = {"lr": learning_rate, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **common)
    if name == "adamw":
        return torch.optim.AdamW(groups, **common)
    raise ValueError(f'optimizer={name!r}; expected "sgd" or "adamw".')


def learning_rate_factor(
    schedule: str, warmup_iters: int, max_iters: int
) -> Callable[[int], float]:
    """What the learning rate is multiplied with, as a function of the steps done so far.

    Args:
        schedule: ``"step"``, / 10 after 60 % and again after 90 % of the iterations, or
            ``"cosine"`` down to 0 (arXiv 1608.03983, equation 5, without restarts).
        warmup_iters: over which the factor also rises linearly.
        max_iters: of the whole training.
    """
    if schedule == "step":
        milestones = (int(0.6 * max_iters), int(0.9 * max_iters))

        def decay(step: int) -> float:
            return 0.1 ** sum(step >= milestone for milestone in milestones)
    elif schedule == "cosine":

        def decay(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * step / max_iters))
    else:
        raise ValueError(f'schedule={schedule!r}; expected "step" or "cosine".')
    return lambda step: decay(step) * min(1.0, (step + 1) / (warmup_iters + 1))


def network_dtype(device: torch.device, amp: str) -> torch.dtype:
    """What a network computes in.

    Args:
        device: that the network runs on.
        amp: ``"auto"``: bfloat16 where the processor computes in it natively, float16 on other
            GPUs. ``"off"``, and elsewhere: float32.
    """
    if amp not in ("auto", "off"):
        raise ValueError(f'amp={amp!r}; expected "auto" or "off".')
    if amp == "off":
        return torch.float32
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    # Older versions of PyTorch can't tell; there, float32 is never wrong.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if bfloat16 else torch.float32


def precision_name(device: torch.device | str, amp: str) -> str:
    """``network_dtype`` as a word, such as "bfloat16"."""
    return str(network_dtype(torch.device(device), amp)).removeprefix("torch.")


def mixed_precision(device: torch.device, amp: str) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """What makes a network compute in its dtype, and keeps small gradients alive in float16.

    Args:
        device, amp: as for ``network_dtype``.
    """
    dtype = network_dtype(device, amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of parameters and buffers.

    Args:
        model: to follow.
        decay: the part of the average that remains in every update. Early on it is less,
            (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    """

    def update(averages: list, values: list, _num_averaged: torch.Tensor) -> None:
        updates = average.n_averaged.item()  # this one is on the CPU
        warm = min(decay, (1 + updates) / (10 + updates))
        get_ema_multi_avg_fn(warm)(averages, values, _num_averaged)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    return average
