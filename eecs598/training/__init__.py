"""Settings, optimization, checkpoints and logs of a training run."""
