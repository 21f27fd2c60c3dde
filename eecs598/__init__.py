"""The course library: what any assignment on detection needs beside the detector itself."""

__all__ = ["reset_seed"]


def __getattr__(name: str):
    # On demand, so that `fcos --help` can read the settings without waiting for PyTorch.
    if name == "reset_seed":
        from eecs598.utils import reset_seed

        return reset_seed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
