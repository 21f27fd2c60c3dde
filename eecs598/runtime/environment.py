"""What a result was made with: command, versions, hardware, state of the repository."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe_environment", "package_versions", "processor_name"]

# Packages that can change a result.
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed."""
    versions = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def processor_name() -> str:
    """Return the model of the processor, or its architecture where the model is not known."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_environment() -> dict[str, Any]:
    """Describe what a result can depend on, as values that JSON can hold.

    Returns:
        ``command`` (arguments of the process), ``python`` (version), ``packages`` (name to
        version), ``platform``, ``processor``, ``processors`` (their number), ``gpu`` (name or
        None), ``commit`` (of this repository) and ``uncommitted_changes`` (lines of
        ``git status``); the last two are None where no repository
        has this code.
    """
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parents[2]), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None  # git is missing, or the folder is no repository

    # Installed into a folder inside another repository, the code is not part of that one.
    is_ours = git("ls-files", "--error-unmatch", str(file)) is not None
    commit = git("rev-parse", "HEAD") if is_ours else None
    changes = git("status", "--porcelain") if is_ours else None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "platform": platform.platform(),
        "processor": processor_name(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": (commit or "").strip() or None,
        "uncommitted_changes": None if changes is None else changes.splitlines(),
    }
