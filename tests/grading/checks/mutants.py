"""Copies of this repository's modules with one mistake each, which the checks must find."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import nn

import a4_helper
import common
import one_stage_detector
from eecs598.grading import CHECKS, CheckResult, Submission, run_checks

MODULES = ("common", "one_stage_detector", "a4_helper")
OURS = Submission(common, one_stage_detector, a4_helper)


class Mutant(NamedTuple):
    """A change of one module, and every check that must fail on it.

    ``fails`` gives for each of these checks (a part of) the label of one of the probes that fail.
    """

    name: str
    module: str
    old: str  # occurs in the module's source exactly once
    new: str
    fails: dict[str, str]


LOCATIONS = "torch.stack(grid, dim=-1).flatten(0, 1)"

# The checks that a change of a module can affect: common.py imports neither of the others.
HELPER_CHECKS = {"hello", "dataset", "train_detector", "evaluation_export"}
COMMON_ONLY = {"backbone", "location_coords", "nms", "class_spec_nms"}
REACHABLE = {
    "common": (set(CHECKS) - HELPER_CHECKS) | {"hello"},
    "one_stage_detector": (set(CHECKS) - HELPER_CHECKS - COMMON_ONLY) | {"hello"},
    "a4_helper": HELPER_CHECKS,
}


class TinyStages(nn.Module):
    """A tiny replacement of the classification network, so that a mutant is tested in a second."""

    def __init__(self) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, stride + 1, stride, padding=stride // 2),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            )

        self.c3, self.c4, self.c5 = stage(3, 8, 8), stage(8, 12, 2), stage(12, 20, 2)

    def forward(self, images):
        c3 = self.c3(images)
        c4 = self.c4(c3)
        return {"c3": c3, "c4": c4, "c5": self.c5(c4)}


def load(*changes: tuple[str, str, str]) -> Submission:
    """Return new copies of the three modules with a tiny backbone.

    Args:
        changes: module, text in its source, text to put there.
    """
    loaded = {}
    before = {name: sys.modules[name] for name in MODULES}
    try:
        for name in MODULES:
            file = before[name].__file__
            source = Path(file).read_text(encoding="utf-8")
            for module, old, new in changes:
                if module == name:
                    assert source.count(old) == 1, f"{source.count(old)} times in {name}.py: {old}"
                    source = source.replace(old, new)
            # Under the module's own name, so that the next one imports this copy.
            loaded[name] = sys.modules[name] = ModuleType(name)
            exec(compile(source, file, "exec"), loaded[name].__dict__)
    finally:
        sys.modules.update(before)
    loaded["common"]._build_backbone = lambda *_: TinyStages()
    ours = (lambda part: getattr(unchanged(), part)) if changes else None
    return Submission(**loaded, ours=ours)


@cache
def unchanged() -> Submission:
    """Copies of this repository's modules, which replace the broken parts of a mutant."""
    return load()


def failures(results: list[CheckResult]) -> dict[str, list[str]]:
    """Return the labels of the probes that failed, by check."""
    return {
        result.name: [probe.label for probe in result.probes if probe.problem is not None]
        for result in results
        if not result.ok
    }


def assert_intended_failures(mutant: Mutant) -> None:
    """Run the checks that a mutant can reach, and expect those that it names to fail."""
    # What takes longest is run only where it is to fail.
    names = REACHABLE[mutant.module] - ({"other_sizes"} - set(mutant.fails))
    results = run_checks(load((mutant.module, mutant.old, mutant.new)), names)
    failed = failures(results)
    sentences = [sentence for result in results for sentence in result.failed]
    assert set(failed) == set(mutant.fails), sentences
    for check, label in mutant.fails.items():
        assert any(label in found for found in failed[check]), sentences
    for sentence in sentences:
        assert "\n" not in sentence and len(sentence) < 600
        said = ("expected" in sentence and "got" in sentence) or "raised" in sentence
        assert said or "as torchvision" in sentence or "torchvision keeps" in sentence, sentence
