"""What a training run uses: parameters, operations, memory and time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["UsageMeter", "describe_usage"]


class UsageMeter:
    """Measures a training run in this process.

    Args:
        device: that the run is on; the peak of a GPU's memory counts from here.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._seconds = 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time within the block as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within a block of ``running``, count the time of this block, an evaluation, as none."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds -= time.perf_counter() - start

    def usage(
        self,
        model: nn.Module,
        network: Callable[[torch.Tensor], Any],
        image_size: int,
        images: int,
    ) -> dict[str, Any]:
        """Return what was used, as values that JSON can hold.

        Args:
            model: that was trained.
            network: the part of it that maps images ``(B, 3, H, W)`` to outputs.
            image_size: side of the square image whose operations are counted, in pixels.
            images: that went through training, in all processes together.

        Returns:
            ``parameters``, ``flops_per_image`` (a multiplication and an addition count as two; one
            forward pass of ``network``), ``image_size``, ``peak_memory`` (of this process, in
            bytes; None where the system does not tell), ``peak_gpu_memory`` (None without a GPU)
            and ``images_per_second`` (loading and checkpoints included, evaluations left out; None
            where nothing was trained).
        """
        gpu = self.device.type == "cuda"
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_image": _flops(model, network, image_size),
            "image_size": image_size,
            "peak_memory": _peak_memory(),
            "peak_gpu_memory": torch.cuda.max_memory_allocated(self.device) if gpu else None,
            "images_per_second": images / self._seconds if images and self._seconds > 0 else None,
        }


def describe_usage(usage: dict[str, Any]) -> str:
    """Write what ``UsageMeter.usage`` returned as one line.

    Example:
        >>> print(describe_usage({
        ...     "parameters": 4_200_000, "flops_per_image": 2_510_000_000, "image_size": 224,
        ...     "peak_memory": 1_900_000_000, "peak_gpu_memory": None, "images_per_second": 41.26,
        ... }))
        4.20 million parameters, 2.51 GFLOPs per image of 224 px, peak memory 1.90 GB, 41.3 images/s
    """
    parts = [
        f"{usage['parameters'] / 1e6:.2f} million parameters",
        f"{usage['flops_per_image'] / 1e9:.2f} GFLOPs per image of {usage['image_size']} px",
    ]
    for key, name in (("peak_memory", "peak memory"), ("peak_gpu_memory", "on the GPU")):
        if usage[key] is not None:
            parts.append(f"{name} {usage[key] / 1e9:.2f} GB")
    if usage["images_per_second"] is not None:
        parts.append(f"{usage['images_per_second']:.1f} images/s")
    return ", ".join(parts)


def _flops(model: nn.Module, network: Callable[[torch.Tensor], Any], image_size: int) -> int:
    """Count the floating-point operations of one image, without changing the model."""
    like = next(model.parameters())
    image = like.new_zeros(1, 3, image_size, image_size)
    training = model.training
    model.eval()  # batch norm must not take the image into its statistics
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(image)
    finally:
        model.train(training)
    return counter.get_total_flops()


def _peak_memory() -> int | None:
    """Return the most memory that this process had in use, in bytes."""
    with suppress(OSError):
        # Not getrusage: on Linux, that of a new process begins with the peak of its parent.
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there
    return None
