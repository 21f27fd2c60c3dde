"""All checks together: correct solutions pass, empty ones fail, and the caller is not affected."""

from __future__ import annotations

import ast
import random
from collections import OrderedDict, UserDict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from eecs598 import grading
from eecs598.grading import CHECKS, Submission, run_checks
from tests.grading.checks import (
    test_a4_helper,
    test_detector,
    test_locations,
    test_losses,
    test_network,
    test_nms,
    test_targets,
)
from tests.grading.checks.mutants import HELPER_CHECKS, MODULES, OURS, failures, load


@pytest.mark.parametrize("name", CHECKS)
def test_this_repository_passes(name):
    (result,) = run_checks(OURS, [name])
    assert result.name == name
    assert len(result.passed) >= 3
    assert result.failed == []


def test_the_tiny_backbone_passes():
    # Otherwise, failures of a mutant could have another reason than the mutation.
    assert failures(run_checks(load())) == {}


def test_every_check_has_a_mutant():
    files = (test_network, test_locations, test_targets, test_losses, test_nms, test_detector)
    mutants = [mutant for file in (*files, test_a4_helper) for mutant in file.MUTANTS]
    assert {check for mutant in mutants for check in mutant.fails} == set(CHECKS)


# --------------------------------------------------------------------------------------------
# Other correct implementations
# --------------------------------------------------------------------------------------------


def test_networks_without_the_keyword_weights_are_built():
    submission = load()

    class PlainFCOS(submission.one_stage_detector.FCOS):
        def __init__(self, num_classes, fpn_channels, stem_channels):
            super().__init__(num_classes, fpn_channels, stem_channels)

    class PlainBackbone(submission.common.DetectorBackboneWithFPN):
        def __init__(self, out_channels):
            super().__init__(out_channels)

    submission.one_stage_detector.FCOS = PlainFCOS
    submission.common.DetectorBackboneWithFPN = PlainBackbone
    assert failures(run_checks(submission, ["backbone", "inference"])) == {}


class Predictions(NamedTuple):
    cls: dict
    box: dict
    ctr: dict


class ByAttribute(dict):
    __getattr__ = dict.__getitem__


def uses_parts_by_name(modules: Submission) -> None:
    class Backbone(modules.common.DetectorBackboneWithFPN):
        def forward(self, images):
            return ByAttribute(super().forward(images))

    class Head(modules.one_stage_detector.FCOSPredictionNetwork):
        def __init__(self, num_classes, *args, **kwargs):
            super().__init__(num_classes, *args, **kwargs)
            self.num_classes = num_classes

        def forward(self, feats):
            return Predictions(*super().forward(feats))

    class Detector(modules.one_stage_detector.FCOS):
        def forward(self, images, gt_boxes=None, **thresholds):
            assert self.pred_net.num_classes == self.num_classes
            images = images.to(next(self.backbone.parameters()).device)
            feats = self.backbone(images=images)
            assert feats.p3.shape[-1] >= self.pred_net(feats=feats).ctr["p3"].shape[-1]
            return super().forward(images, gt_boxes, **thresholds)

    modules.one_stage_detector.DetectorBackboneWithFPN = Backbone
    modules.common.DetectorBackboneWithFPN = Backbone
    modules.one_stage_detector.FCOSPredictionNetwork = Head
    modules.one_stage_detector.FCOS = Detector


def returns_nothing_from_train(modules: Submission) -> None:
    for module, name in (
        (modules.common, "DetectorBackboneWithFPN"),
        (modules.one_stage_detector, "FCOSPredictionNetwork"),
        (modules.one_stage_detector, "FCOS"),
    ):
        cls = getattr(module, name)

        def train(self, mode=True, cls=cls):
            super(cls, self).train(mode)

        setattr(module, name, type(name, (cls,), {"train": train}))


def names_the_levels(modules: Submission) -> None:
    coords = modules.common.get_fpn_location_coords

    def coords_of_three(shapes, strides, **options):
        levels = ("p3", "p4", "p5")
        return coords({p: shapes[p] for p in levels}, {p: strides[p] for p in levels}, **options)

    class Head(modules.one_stage_detector.FCOSPredictionNetwork):
        def forward(self, feats):
            return super().forward({level: feats[level] for level in ("p3", "p4", "p5")})

    modules.common.get_fpn_location_coords = coords_of_three
    modules.one_stage_detector.FCOSPredictionNetwork = Head


def cannot_be_copied(modules: Submission) -> None:
    class Detector(modules.one_stage_detector.FCOS):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.dummy_out = self.backbone(torch.zeros(1, 3, 64, 64))

    modules.one_stage_detector.FCOS = Detector


def returns_other_containers(modules: Submission) -> None:
    class Detector(modules.one_stage_detector.FCOS):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            return UserDict(found) if isinstance(found, dict) else iter(found)

    match = modules.one_stage_detector.fcos_match_locations_to_gt
    modules.one_stage_detector.FCOS = Detector
    modules.one_stage_detector.fcos_match_locations_to_gt = lambda *args: OrderedDict(match(*args))


@pytest.mark.parametrize(
    "change",
    [
        uses_parts_by_name,
        returns_nothing_from_train,
        names_the_levels,
        cannot_be_copied,
        returns_other_containers,
    ],
    ids=lambda change: change.__name__,
)
def test_other_styles_pass(change):
    submission = load()
    change(submission)
    results = run_checks(submission, set(CHECKS) - HELPER_CHECKS)
    assert [sentence for result in results for sentence in result.failed] == []


# --------------------------------------------------------------------------------------------
# Submissions that fail or have side effects
# --------------------------------------------------------------------------------------------


def test_empty_modules_fail_everything():
    results = run_checks(Submission(*(ModuleType(name) for name in MODULES)))
    assert [result.name for result in results] == list(CHECKS)
    assert all(result.failed and not result.passed for result in results)


@pytest.mark.parametrize("answer", [None, 0, torch.zeros(3)], ids=["None", "0", "a tensor"])
def test_functions_that_are_not_written_yet_fail(answer):
    submission = load()
    for module in (submission.common, submission.one_stage_detector, submission.a4_helper):
        for name in module.__all__:
            if callable(getattr(module, name)) and not name.startswith("hello"):
                setattr(module, name, lambda *args, **kwargs: answer)
    results = {result.name: result for result in run_checks(submission)}
    assert [name for name, result in results.items() if result.ok] == ["hello"]


def test_the_caller_is_not_affected(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    submission = load(
        (
            "common",
            "_check_nms_inputs(boxes, scores, iou_threshold)\n    return",
            "import random, sys, warnings\n    import numpy as np\n"
            "    print('noise'); print('noise', file=sys.stderr); warnings.warn('noise')\n"
            "    random.random(); np.random.rand(); torch.rand(1)\n    return",
        )
    )
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    run_checks(submission)
    assert before == (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
    assert capsys.readouterr() == ("", "")
    assert list(recwarn) == []
    assert Path.cwd() == tmp_path and list(tmp_path.iterdir()) == []


def test_results_do_not_depend_on_what_ran_before():
    # A mutant, because its sentences contain numbers.
    change = ("one_stage_detector", "0.25 * F.l1_loss", "F.l1_loss")
    alone = run_checks(load(change), ["losses"])
    torch.manual_seed(7)
    submission = load(change)
    run_checks(submission, ["location_order", "inference"])
    assert run_checks(submission, ["losses"]) == alone


def test_grading_imports_nothing_from_the_top_level():
    imported = set()
    for file in Path(grading.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
    assert "eecs598" in imported
    assert not imported & {*MODULES, "fcos"}


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match="'speed'.*'hello'"):
        run_checks(OURS, ["nms", "speed"])


def test_checks_run_in_the_order_of_the_assignment():
    names = [result.name for result in run_checks(load(), ["deltas", "hello", "centerness"])]
    assert names == ["hello", "deltas", "centerness"]
