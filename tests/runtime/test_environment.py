"""The description of the environment of a result."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

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
