"""The description of the environment of a result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import eecs598
from eecs598.runtime.environment import describe_environment, package_versions, processor_name


def test_versions_of_what_is_installed():
    versions = package_versions(["torch", "no-such-package"])
    assert list(versions) == ["torch"]
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_description():
    description = describe_environment()
    assert json.loads(json.dumps(description)) == description
    assert description["command"] == sys.argv
    assert {"torch", "torchvision", "numpy"} <= set(description["packages"])
    assert description["processor"] == processor_name() != ""
    assert description["processors"] >= 1


def test_without_git(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise OSError("no git")

    monkeypatch.setattr(subprocess, "run", missing)
    description = describe_environment()
    assert description["commit"] is None and description["uncommitted_changes"] is None


def test_the_commit_is_of_the_repository_that_has_the_code(tmp_path):
    """Installed inside another repository, as into its .venv, the code is not part of that."""
    place = tmp_path / ".venv/lib/eecs598"
    shutil.copytree(Path(eecs598.__file__).parent / "runtime", place / "runtime")
    (place / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "other.py").touch()
    for command in (["init", "-q"], ["add", "other.py"], ["commit", "-q", "-m", "other"]):
        subprocess.run([*git, *command], check=True)

    def commit() -> str:
        code = "import eecs598.runtime as r; print(r.describe_environment()['commit'])"
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": str(place.parent)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert commit() == "None"
    subprocess.run([*git, "add", "-f", str(place)], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "own"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit() == head.stdout.strip()
