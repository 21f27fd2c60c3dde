"""The course library: data, training, metrics, reports and grading for any detector."""

from __future__ import annotations

from typing import Any

__all__ = ["reset_seed"]


def __getattr__(name: str) -> Any:
    # Imported on demand, so that ``fcos --help`` reads the settings without importing PyTorch.
    if name == "reset_seed":
        from eecs598.utils import reset_seed

        return reset_seed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
