"""Compare tensors by their relative error, and gradients with finite differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["compute_numeric_gradient", "rel_error"]


def rel_error(x: Tensor, y: Tensor, eps: float = 1e-10) -> float:
    """Return the largest absolute difference, relative to the magnitudes of both tensors.

    Args:
        x, y: tensors of one shape.
        eps: keeps the quotient defined where both are 0.

    Returns:
        ``max|x - y| / (max|x| + max|y| + eps)``; 0 for empty tensors.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rel_error(torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]), eps=0.0)
        0.125
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.shape != y.shape:
        raise ValueError(
            f"rel_error compares tensors of one shape and got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    if x.numel() == 0:
        return 0.0
    largest_difference = (x - y).abs().max().item()
    return largest_difference / (x.abs().max().item() + y.abs().max().item() + eps)


@torch.no_grad()
def compute_numeric_gradient(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    grad_output: Tensor | None = None,
    step: float = 1e-6,
) -> Tensor:
    """Compute the gradient of a function by central differences, one entry at a time.

    Args:
        function: maps a tensor like ``x`` to a tensor.
        x: point at which to differentiate, in float64: float32 has too few digits for small
            steps.
        grad_output: gradient of a loss with respect to the function's output, of the output's
            shape; all ones unless given.
        step: distance to either side.

    Returns:
        The gradient of ``(function(x) * grad_output).sum()``, of the shape of ``x``.
    """
    x = x.detach().clone()
    gradient = torch.zeros_like(x)
    entries, gradient_entries = x.view(-1), gradient.view(-1)
    for i in range(x.numel()):
        value = entries[i].item()
        entries[i] = value + step
        above = function(x)
        entries[i] = value - step
        below = function(x)
        entries[i] = value
        difference = above - below if grad_output is None else (above - below) * grad_output
        gradient_entries[i] = difference.sum() / (2 * step)
    return gradient
