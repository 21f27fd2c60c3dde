"""Optimizers, learning-rate schedules, mixed precision and the moving average of the weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "ema",
    "learning_rate_factor",
    "make_optimizer",
    "mixed_precision",
    "network_dtype",
    "precision_name",
]


# --------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------


@runtime_checkable
class _HasBackbone(Protocol):
    """A model that lists the parameters of its backbone."""

    def backbone_parameters(self) -> Iterable[nn.Parameter]:
        """Return them."""
        ...


def _sgd(groups: Iterable[dict[str, Any]], **common: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, momentum=0.9, **common)
    # The fused kernel fills the buffers in the first step. Where that is skipped, because scaled
    # gradients overflowed, PyTorch would go on with whatever was in that memory.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    decay_all: bool = True,
) -> torch.optim.Optimizer:
    """Return an optimizer for those parameters of a model that require gradients.

    Args:
        model: with ``backbone_parameters()`` if the factor is not 1.
        name: ``"sgd"``, with momentum 0.9, or ``"adamw"``.
        learning_rate: of the optimizer.
        weight_decay: of the optimizer.
        backbone_lr_factor: the learning rate of the backbone's parameters is multiplied by it.
        decay_all: without it, biases and the parameters of norms, which are those with less than
            two dimensions, have no weight decay (arXiv 1812.01187, section 3.1).

    Raises:
        ValueError: another name, or a factor for a model without ``backbone_parameters()``.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer={name!r}; expected {_one_of(OPTIMIZERS)}.")
    backbone: set[int] = set()
    if backbone_lr_factor != 1:
        if not isinstance(model, _HasBackbone):
            raise ValueError(
                f"backbone_lr_factor={backbone_lr_factor} needs a model with a method "
                f"backbone_parameters(); {type(model).__name__} has none."
            )
        backbone = {id(p) for p in model.backbone_parameters()}
    # (in the backbone, without weight decay) -> parameters. The first group's rate is logged.
    grouped: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, False): []}
    for p in model.parameters():
        if p.requires_grad:
            key = (id(p) in backbone, not decay_all and p.dim() < 2)
            grouped.setdefault(key, []).append(p)
    groups = [
        {
            "params": parameters,
            "lr": learning_rate * (backbone_lr_factor if in_backbone else 1),
            "weight_decay": 0.0 if undecayed else weight_decay,
        }
        for (in_backbone, undecayed), parameters in grouped.items()
    ]
    # One fused kernel for all parameters; the arithmetic is that of the plain loop.
    return OPTIMIZERS[name](groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


# --------------------------------------------------------------------------------------------
# Schedules
# --------------------------------------------------------------------------------------------


def _step_decay(step: int, max_iters: int) -> float:
    """Divide by 10 after 60 % and again after 90 % of the iterations."""
    milestones = (int(0.6 * max_iters), int(0.9 * max_iters))
    return 0.1 ** sum(step >= milestone for milestone in milestones)


def _cosine_decay(step: int, max_iters: int) -> float:
    """Decrease to 0 along a cosine (arXiv 1608.03983, equation 5, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * step / max_iters))


# Each maps the number of steps done, and that of the whole run, to a factor from 1 down.
SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "step": _step_decay,
    "cosine": _cosine_decay,
}


def learning_rate_factor(
    schedule: str, warmup_iters: int, max_iters: int
) -> Callable[[int], float]:
    """Return what the learning rate is multiplied by, as a function of the steps done so far.

    Args:
        schedule: ``"step"``, / 10 after 60 % and again after 90 % of the iterations, or
            ``"cosine"`` down to 0 (arXiv 1608.03983, equation 5, without restarts).
        warmup_iters: over which the factor also rises linearly.
        max_iters: of the whole run.

    Raises:
        ValueError: another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; expected {_one_of(SCHEDULES)}.")
    decay = SCHEDULES[schedule]
    return lambda step: decay(step, max_iters) * min(1.0, (step + 1) / (warmup_iters + 1))


def _one_of(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


# --------------------------------------------------------------------------------------------
# Mixed precision
# --------------------------------------------------------------------------------------------


def network_dtype(device: torch.device, amp: str) -> torch.dtype:
    """Return the type of numbers that a network computes in.

    Args:
        device: that the network runs on.
        amp: ``"auto"``: bfloat16 where the processor computes in it natively, float16 on other
            GPUs. ``"off"``, and elsewhere: float32.

    Raises:
        ValueError: another value of ``amp``.
    """
    if amp not in ("auto", "off"):
        raise ValueError(f'amp={amp!r}; expected "auto" or "off".')
    if amp == "off":
        return torch.float32
    if device.type == "cuda":
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float16
    # Older versions of PyTorch can't tell; there, float32 is never wrong.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if bfloat16 else torch.float32


def precision_name(device: torch.device | str, amp: str) -> str:
    """Return ``network_dtype`` as a word, such as "bfloat16"."""
    return str(network_dtype(torch.device(device), amp)).removeprefix("torch.")


def mixed_precision(
    device: torch.device, amp: str
) -> tuple[AbstractContextManager[Any], torch.amp.GradScaler]:
    """Return the context that a network runs in, and the scaler of its gradients.

    In float16, small gradients would become 0 without being scaled; in other types the scaler does
    nothing. On a CPU, depthwise convolutions are trained in float32, see ``_DepthwiseInFloat32``.

    Args:
        device: see ``network_dtype``.
        amp: see ``network_dtype``.
    """
    dtype = network_dtype(device, amp)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if device.type == "cpu" and dtype != torch.float32:
        return _DepthwiseInFloat32(autocast), scaler
    return autocast, scaler


class _DepthwiseInFloat32(TorchFunctionMode):
    """Autocast on a CPU in which depthwise convolutions are trained in float32.

    In bfloat16, PyTorch takes two to nine times as long for their gradients, where the kernel is
    5x5 or the stride 2: a third of a training step of EfficientNet-Lite0.
    """

    def __init__(self, autocast: torch.autocast) -> None:
        super().__init__()
        self._autocast = autocast

    def __enter__(self) -> _DepthwiseInFloat32:
        self._autocast.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._autocast.__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call a function of PyTorch; for a convolution, choose the type of numbers first."""
        # A model may switch autocast off for a part of itself, which then is left alone.
        chosen = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        call = _conv2d if function is F.conv2d and chosen else function
        return call(*args, **(kwargs or {}))


def _conv2d(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Do ``F.conv2d`` within autocast, but in float32 where each channel is on its own."""
    if weight.shape[1] > 1 or input.shape[-3] == 1:
        return F.conv2d(input, weight, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        result = F.conv2d(input.float(), weight, *args, **kwargs)
    return result.to(torch.get_autocast_dtype("cpu"))


# --------------------------------------------------------------------------------------------
# Moving average of the weights
# --------------------------------------------------------------------------------------------


class _ExponentialAverage(AveragedModel):
    """``AveragedModel`` without the wait for the GPU in each of its updates.

    It copies the number of updates to the GPU; here the number is read where it is, on the CPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the parameters and buffers of the model; copy whole numbers."""
        updates = self.n_averaged.item()
        decay = min(self.decay, (1 + updates) / (10 + updates)) if updates else 0.0
        averages, values = _parameters_and_buffers(self.module), _parameters_and_buffers(model)
        real = [average.is_floating_point() for average in averages]
        get_ema_multi_avg_fn(decay)(
            list(itertools.compress(averages, real)), list(itertools.compress(values, real)), 0
        )
        for average, value, is_real in zip(averages, values, real, strict=True):
            if not is_real:
                average.copy_(value)
        self.n_averaged += 1


def _parameters_and_buffers(model: nn.Module) -> list[Tensor]:
    return [value.detach() for value in itertools.chain(model.parameters(), model.buffers())]


def ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the parameters and buffers of a model.

    Args:
        model: to follow, with ``update_parameters(model)`` after each step.
        decay: the part of the average that remains in every update. In early updates it is less,
            (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten.
    """
    return _ExponentialAverage(model, decay)
