"""Settings, optimization, checkpoints and logs of a training run.

The settings are read without PyTorch, so that ``fcos train --help`` answers at once; all else
is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from eecs598.training.settings import (
    AUGMENTATIONS,
    RECIPES,
    Settings,
    from_recipe,
    parse_setting,
)

if TYPE_CHECKING:
    from eecs598.training.checkpoint import load_checkpoint
    from eecs598.training.notebook import NotebookSettings, notebook_settings
    from eecs598.training.optimization import (
        learning_rate_factor,
        make_optimizer,
        mixed_precision,
        network_dtype,
        precision_name,
        weight_average,
    )
    from eecs598.training.run import TrainingRun, TrainingStopped, ignore_signals

__all__ = [
    "AUGMENTATIONS",
    "NotebookSettings",
    "RECIPES",
    "Settings",
    "TrainingRun",
    "TrainingStopped",
    "from_recipe",
    "ignore_signals",
    "learning_rate_factor",
    "load_checkpoint",
    "make_optimizer",
    "mixed_precision",
    "network_dtype",
    "notebook_settings",
    "parse_setting",
    "precision_name",
    "weight_average",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in ("checkpoint", "optimization", "run", "notebook"):
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
