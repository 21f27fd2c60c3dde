"""Grading from an installed wheel: full points for its own solution, no harm from attacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eecs598.grading import grade_folders, load_rubric
from eecs598.grading.sandbox.runner import Options
from tests.grading.sandbox.attacks import (
    ATTACKS,
    PARTS,
    REPOSITORY,
    Attack,
    attacked,
    temporary_folder,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

PACKAGES = ("eecs598", "fcos")

# They attack files, the network, processes, the grader's pipe and the grader's modules.
SELECTED = (
    "reads outside its folder",
    "writes outside its folder",
    "opens a socket",
    "starts programs",
    "kills the grader",
    "writes results to all that is open",
    "replaces parts of the grader",
    "replaces code of the grader",
    "replaces torchvision's nms",
)
PRINTS_FILES = Attack(
    at_import="""
import sys
for name in ("eecs598", "eecs598.grading", "eecs598.grading.checks.nms"):
    _os.write(1, f"<{sys.modules[name].__file__}>".encode())
"""
)
RUBRIC = """
[deltas]
title = "Deltas"
check = "deltas"
points = 6

[nms]
title = "NMS"
check = "nms"
points = 12
"""


class Installed(NamedTuple):
    """A wheel and the folder that it is installed in."""

    wheel: Path
    site: Path

    def run(self, *command: str, folder: Path) -> str:
        """Run Python with the installed wheel in a folder, and return what it prints."""
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode in (0, 1), done.stderr
        return done.stdout

    def grade(self, *arguments: str, folder: Path) -> list[dict[str, Any]]:
        """Run ``fcos grade``, and return the results of each submission."""
        command = ("-m", "fcos", "grade", *arguments, "--format", "json", "--jobs", "2")
        return json.loads(self.run(*command, folder=folder))["submissions"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """This repository as a wheel, built from a copy and installed without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"{part}.py" for part in PARTS)):
        shutil.copy(REPOSITORY / name, source)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, source / package, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # Setuptools comes with the test dependencies, so no network is needed.
    options = ["--no-deps", "--no-index"]
    build = ["wheel", *options, "--no-build-isolation", "-w", str(folder), str(source)]
    for command in (build, ["install", *options, "--target", str(site)]):
        wheels = [] if command is build else [str(path) for path in folder.glob("*.whl")]
        done = subprocess.run([*pip, *command, *wheels], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return Installed(wheel, site)


def test_every_file_of_the_packages_is_in_the_wheel(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    files = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"eecs598/grading/rubric.toml", "eecs598/report/templates/report.html"} <= files
    assert files <= names
    assert {f"{part}.py" for part in PARTS} <= names


def test_modules_come_from_the_wheel(installed, tmp_path):
    names = (*PACKAGES, *PARTS)
    program = f"import importlib.util as u; print(*(u.find_spec(n).origin for n in {names}))"
    files = installed.run("-c", program, folder=tmp_path).split()
    expected = [*(f"{package}/__init__.py" for package in PACKAGES), *(f"{p}.py" for p in PARTS)]
    assert files == [str(installed.site / name) for name in expected]


def test_the_wheels_own_solution_has_all_points(installed, tmp_path):
    with temporary_folder() as temporary:
        (result,) = installed.grade(str(installed.site), folder=tmp_path)
        assert list(temporary.iterdir()) == []
    assert result["error"] is None
    assert result["score"] == result["max_score"] == 100, result["items"]
    assert result["suspicious"] == []


def test_attacks_do_no_harm_and_gain_nothing(installed, tmp_path):
    rubric_file = tmp_path / "rubric.toml"
    rubric_file.write_text(RUBRIC)
    rubric = load_rubric(rubric_file)
    attacks = {"right": Attack(), "files": PRINTS_FILES, **{n: ATTACKS[n] for n in SELECTED}}
    elsewhere, outside = tmp_path / "elsewhere", tmp_path / "outside"
    elsewhere.mkdir()
    outside.mkdir()
    options = Options(timeout=10, checks=tuple(rubric.checks), findings=False)
    with attacked(outside, attacks.values()) as folders:
        arguments = (*map(str, folders), "--rubric", str(rubric_file), "--timeout", "10")
        results = installed.grade(*arguments, folder=elsewhere)
        source_results = grade_folders(folders, REPOSITORY, options)
    assert list(elsewhere.iterdir()) == []
    by_name = dict(zip(attacks, results, strict=True))
    for name, result, source in zip(attacks, results, source_results, strict=True):
        assert result["error"] is None
        assert result["protections"] == source.protections
        assert result["score"] == rubric.grade(source.results).total, name
        assert passed(result) == {
            (check.name, label) for check in source.results for label in check.passed
        }
        assert "attack: " in result["output"] and attacks[name].says in result["output"]
        assert "the secret" not in result["output"]
    assert by_name["right"]["score"] == by_name["files"]["score"] == 18
    assert by_name["replaces code of the grader"]["score"] == 6
    files = [
        f"<{installed.site}/eecs598/{name}>"
        for name in ("__init__.py", "grading/__init__.py", "grading/checks/nms.py")
    ]
    assert "".join(files) in by_name["files"]["output"]


def passed(result: dict[str, Any]) -> set[tuple[str, str]]:
    """Check and label of each probe that passed."""
    return {
        (check, label)
        for check, probes in result["checks"].items()
        for label, problem in probes.items()
        if problem is None
    }
