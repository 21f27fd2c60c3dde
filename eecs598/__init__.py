"""The course library: what any assignment on detection needs beside the detector itself."""

from eecs598.utils import reset_seed

__all__ = ["reset_seed"]
