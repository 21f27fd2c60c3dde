"""Settings, optimization, checkpoints and logs of a training run.

The settings are read without PyTorch, so that ``fcos train --help`` answers at once; everything
else is imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from eecs598.training.settings import (
    RECIPES,
    SETTINGS,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    RunSettings,
    Setting,
    Settings,
    from_recipe,
)

if TYPE_CHECKING:
    from eecs598.training.checkpoint import (
        find_state_dict,
        load_checkpoint,
        load_weights_file,
        save_checkpoint,
    )
    from eecs598.training.log import TrainingLogger, plot_losses, show_progress
    from eecs598.training.notebook import NotebookSettings, notebook_settings
    from eecs598.training.optimization import (
        ema,
        learning_rate_factor,
        make_optimizer,
        mixed_precision,
        network_dtype,
        precision_name,
    )
    from eecs598.training.run import (
        RunDescription,
        Stateful,
        TrainingRun,
        TrainingStopped,
    )
    from eecs598.training.usage import UsageMeter, describe_usage

__all__ = [
    "RECIPES",
    "SETTINGS",
    "DataSettings",
    "ModelSettings",
    "NotebookSettings",
    "OptimizationSettings",
    "RunDescription",
    "RunSettings",
    "Setting",
    "Settings",
    "Stateful",
    "TrainingLogger",
    "TrainingRun",
    "TrainingStopped",
    "UsageMeter",
    "describe_usage",
    "ema",
    "find_state_dict",
    "from_recipe",
    "learning_rate_factor",
    "load_checkpoint",
    "load_weights_file",
    "make_optimizer",
    "mixed_precision",
    "network_dtype",
    "notebook_settings",
    "plot_losses",
    "precision_name",
    "save_checkpoint",
    "show_progress",
]


# Where the names are that need PyTorch.
_MODULES = {
    "find_state_dict": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_weights_file": "checkpoint",
    "save_checkpoint": "checkpoint",
    "TrainingLogger": "log",
    "plot_losses": "log",
    "show_progress": "log",
    "NotebookSettings": "notebook",
    "notebook_settings": "notebook",
    "ema": "optimization",
    "learning_rate_factor": "optimization",
    "make_optimizer": "optimization",
    "mixed_precision": "optimization",
    "network_dtype": "optimization",
    "precision_name": "optimization",
    "RunDescription": "run",
    "Stateful": "run",
    "TrainingRun": "run",
    "TrainingStopped": "run",
    "UsageMeter": "usage",
    "describe_usage": "usage",
}


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch when it is asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
