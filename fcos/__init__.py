"""The command line of the one-stage detector: ``fcos`` or ``python -m fcos``."""
