"""Points of this repository (all of them), of another solution and of parts of it; the rubric."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import a4_helper
import common
import one_stage_detector
from eecs598.grading import CHECKS, CheckResult, ProbeResult, Submission, labels_of, run_checks
from eecs598.grading.checks.review import review_findings
from eecs598.grading.loading import load_submission, unload
from eecs598.grading.rubric import DEFAULT_PATH, load_rubric

OURS = Path(common.__file__).parent

# --------------------------------------------------------------------------------------------
# Another solution, as it was written some years ago
# --------------------------------------------------------------------------------------------

STUDENT_COMMON = '''
"""EECS 598 A4"""
from typing import Dict, Tuple
import absent_cv
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.models import feature_extraction


def hello_common():
    print("Hello from common.py!")


class DetectorBackboneWithFPN(nn.Module):
    def __init__(self, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        net = torchvision.models.regnet_x_400mf(pretrained=True)
        self.backbone = feature_extraction.create_feature_extractor(
            net,
            return_nodes={
                "trunk_output.block2": "c3",
                "trunk_output.block3": "c4",
                "trunk_output.block4": "c5",
            },
        )
        dummy = self.backbone(torch.randn(2, 3, 224, 224))
        for name, shape in [(k, v.shape) for k, v in dummy.items()]:
            print("Shape of", name, shape)
        self.fpn_params = nn.ModuleDict()
        # BEGIN BLANK
        for i in (3, 4, 5):
            self.fpn_params[f"l{i}"] = nn.Conv2d(dummy[f"c{i}"].shape[1], out_channels, 1)
            self.fpn_params[f"p{i}"] = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        # END BLANK

    @property
    def fpn_strides(self):
        return {"p3": 8, "p4": 16, "p5": 32}

    def forward(self, images):
        c = self.backbone(images)
        out = {"p3": None, "p4": None, "p5": None}
        # BEGIN BLANK
        m5 = self.fpn_params["l5"](c["c5"])
        m4 = self.fpn_params["l4"](c["c4"])
        m4 = m4 + F.interpolate(m5, size=m4.shape[2:])
        m3 = self.fpn_params["l3"](c["c3"])
        m3 = m3 + F.interpolate(m4, size=m3.shape[2:])
        out = {"p3": self.fpn_params["p3"](m3), "p4": self.fpn_params["p4"](m4),
               "p5": self.fpn_params["p5"](m5)}
        # END BLANK
        return out


def get_fpn_location_coords(
    shape_per_fpn_level, strides_per_fpn_level, dtype=torch.float32, device="cpu"
):
    location_coords = {level_name: None for level_name in shape_per_fpn_level}
    # BEGIN BLANK
    for level_name, shape in shape_per_fpn_level.items():
        stride = strides_per_fpn_level[level_name]
        xs = (torch.arange(shape[3], dtype=dtype, device=device) + 0.5) * stride
        ys = (torch.arange(shape[2], dtype=dtype, device=device) + 0.5) * stride
        gx, gy = torch.meshgrid(xs, ys)
        location_coords[level_name] = torch.stack([gx.reshape(-1), gy.reshape(-1)], dim=1)
    # END BLANK
    return location_coords


def nms(boxes, scores, iou_threshold=0.5):
    keep = None
    # BEGIN BLANK
    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.long, device=boxes.device)
    x1, y1, x2, y2 = boxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    order = scores.argsort(descending=True)
    keep = []
    while len(order) > 0:
        i, rest = order[0], order[1:]
        keep.append(i)
        w = (torch.min(x2[i], x2[rest]) - torch.max(x1[i], x1[rest])).clamp(min=0)
        h = (torch.min(y2[i], y2[rest]) - torch.max(y1[i], y1[rest])).clamp(min=0)
        iou = w * h / (area[i] + area[rest] - w * h)
        order = rest[iou <= iou_threshold]
    keep = torch.stack(keep)
    # END BLANK
    return keep


def class_spec_nms(boxes, scores, class_ids, iou_threshold=0.5):
    if boxes.numel() == 0:
        return torch.empty((0,), dtype=torch.int64, device=boxes.device)
    offsets = class_ids.to(boxes) * (boxes.max() + 1)
    return nms(boxes + offsets[:, None], scores, iou_threshold)
'''

STUDENT_DETECTOR = """
import math
from a4_helper import *
from common import DetectorBackboneWithFPN, class_spec_nms, get_fpn_location_coords
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

TensorDict = dict


def hello_one_stage_detector():
    print("Hello from one_stage_detector.py!")


class FCOSPredictionNetwork(nn.Module):
    def __init__(self, num_classes, in_channels, stem_channels):
        super().__init__()
        stem_cls, stem_box = [], []
        # BEGIN BLANK
        c = in_channels
        for o in stem_channels:
            stem_cls += [nn.Conv2d(c, o, 3, padding=1), nn.ReLU()]
            stem_box += [nn.Conv2d(c, o, 3, padding=1), nn.ReLU()]
            c = o
        # END BLANK
        self.stem_cls = nn.Sequential(*stem_cls)
        self.stem_box = nn.Sequential(*stem_box)
        self.pred_cls = self.pred_box = self.pred_ctr = None
        # BEGIN BLANK
        self.pred_cls = nn.Conv2d(c, num_classes, 3, padding=1)
        self.pred_box = nn.Conv2d(c, 4, 3, padding=1)
        self.pred_ctr = nn.Conv2d(c, 1, 3, padding=1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                torch.nn.init.normal_(m.weight, mean=0, std=0.01)
                torch.nn.init.constant_(m.bias, 0)
        # END BLANK
        if self.pred_cls is not None:
            torch.nn.init.constant_(self.pred_cls.bias, -math.log(99))

    def forward(self, feats_per_fpn_level):
        class_logits, boxreg_deltas, centerness_logits = {}, {}, {}
        # BEGIN BLANK
        for k, f in feats_per_fpn_level.items():
            c, b = self.stem_cls(f), self.stem_box(f)
            class_logits[k] = self.pred_cls(c).flatten(2).permute(0, 2, 1)
            boxreg_deltas[k] = self.pred_box(b).flatten(2).permute(0, 2, 1)
            centerness_logits[k] = self.pred_ctr(b).flatten(2).permute(0, 2, 1)
        # END BLANK
        return [class_logits, boxreg_deltas, centerness_logits]


@torch.no_grad()
def fcos_match_locations_to_gt(locations_per_fpn_level, strides_per_fpn_level, gt_boxes):
    matched = {name: None for name in locations_per_fpn_level}
    for name, centers in locations_per_fpn_level.items():
        stride = strides_per_fpn_level[name]
        x, y = centers.unsqueeze(2).unbind(dim=1)
        x0, y0, x1, y1 = gt_boxes[:, :4].unsqueeze(0).unbind(dim=2)
        dist = torch.stack([x - x0, y - y0, x1 - x, y1 - y], dim=2)
        match = dist.min(dim=2).values > 0
        dist = dist.max(dim=2).values
        lower = stride * 4 if name != "p3" else 0
        upper = stride * 8 if name != "p5" else float("inf")
        match = (match & (dist > lower) & (dist < upper)).to(torch.float32)
        areas = (gt_boxes[:, 2] - gt_boxes[:, 0]) * (gt_boxes[:, 3] - gt_boxes[:, 1])
        match *= 1e8 - areas[None, :]
        quality, index = match.max(dim=1)
        rows = gt_boxes[index]
        rows[quality < 1e-5] = -1
        matched[name] = rows
    return matched


def fcos_get_deltas_from_locations(locations, gt_boxes, stride):
    deltas = None
    # BEGIN BLANK
    deltas = torch.empty_like(gt_boxes[:, :4])
    deltas[:, :2] = (locations - gt_boxes[:, :2]) / stride
    deltas[:, 2:] = (gt_boxes[:, 2:4] - locations) / stride
    deltas[(gt_boxes[:, :4] == -1).all(dim=1)] = -1
    # END BLANK
    return deltas


def fcos_apply_deltas_to_locations(deltas, locations, stride):
    output_boxes = None
    # BEGIN BLANK
    deltas = deltas.clamp(min=0) * stride
    output_boxes = torch.cat([locations - deltas[:, :2], locations + deltas[:, 2:]], dim=1)
    # END BLANK
    return output_boxes


def fcos_make_centerness_targets(deltas):
    centerness = None
    # BEGIN BLANK
    l, t, r, b = deltas.unbind(1)
    centerness = torch.sqrt(
        torch.min(l, r) * torch.min(t, b) / (torch.max(l, r) * torch.max(t, b))
    )
    centerness[deltas[:, 0] == -1] = -1
    # END BLANK
    return centerness


class FCOS(nn.Module):
    def __init__(self, num_classes, fpn_channels, stem_channels):
        super().__init__()
        self.num_classes = num_classes
        # BEGIN BLANK
        self.backbone = DetectorBackboneWithFPN(fpn_channels)
        self.pred_net = FCOSPredictionNetwork(num_classes, fpn_channels, stem_channels)
        # END BLANK
        self._normalizer = 150

    def forward(self, images, gt_boxes=None, test_score_thresh=None, test_nms_thresh=None):
        losses = {}
        # BEGIN BLANK
        feats = self.backbone(images)
        cls_logits, deltas, ctr_logits = self.pred_net(feats)
        shapes = {k: v.shape for k, v in feats.items()}
        locations = get_fpn_location_coords(
            shapes, self.backbone.fpn_strides, device=images.device
        )
        if not self.training:
            return self.inference(
                images, locations, cls_logits, deltas, ctr_logits,
                test_score_thresh=test_score_thresh, test_nms_thresh=test_nms_thresh,
            )
        boxes, targets = [], []
        for i in range(images.shape[0]):
            m = fcos_match_locations_to_gt(locations, self.backbone.fpn_strides, gt_boxes[i])
            boxes.append(torch.cat(list(m.values())))
            targets.append(torch.cat([
                fcos_get_deltas_from_locations(locations[k], m[k], self.backbone.fpn_strides[k])
                for k in m
            ]))
        boxes, targets = torch.stack(boxes), torch.stack(targets)
        num_pos = (boxes[:, :, 4] != -1).sum().item()
        pos_per_image = num_pos / images.shape[0]
        self._normalizer = 0.9 * self._normalizer + 0.1 * pos_per_image
        cls_logits, deltas, ctr_logits = (
            torch.cat(list(x.values()), dim=1) for x in (cls_logits, deltas, ctr_logits)
        )
        onehot = F.one_hot(boxes[:, :, 4].long() + 1, self.num_classes + 1)[:, :, 1:]
        loss_cls = sigmoid_focal_loss(cls_logits, onehot.to(cls_logits))
        loss_box = 0.25 * F.l1_loss(deltas, targets.to(deltas), reduction="none")
        loss_box[targets < 0] *= 0.0
        ctr = fcos_make_centerness_targets(targets.view(-1, 4))
        loss_ctr = F.binary_cross_entropy_with_logits(
            ctr_logits.reshape(-1), ctr.to(ctr_logits), reduction="none"
        )
        loss_ctr[ctr < 0] *= 0.0
        n = self._normalizer * images.shape[0]
        losses = {"loss_cls": loss_cls.sum() / n, "loss_box": loss_box.sum() / n,
                  "loss_ctr": loss_ctr.sum() / n}
        # END BLANK
        return losses

    @torch.no_grad()
    def inference(self, images, locations_per_fpn_level, pred_cls_logits, pred_boxreg_deltas,
                  pred_ctr_logits, test_score_thresh=0.3, test_nms_thresh=0.5):
        all_boxes, all_classes, all_scores = [], [], []
        # BEGIN BLANK
        for k in locations_per_fpn_level:
            scores = pred_cls_logits[k][0].sigmoid() * pred_ctr_logits[k][0].sigmoid()
            scores, classes = scores.sqrt().max(dim=1)
            ok = scores > test_score_thresh
            b = fcos_apply_deltas_to_locations(
                pred_boxreg_deltas[k][0][ok], locations_per_fpn_level[k][ok],
                self.backbone.fpn_strides[k],
            )
            b[:, 0::2] = b[:, 0::2].clamp(0, images.shape[3])
            b[:, 1::2] = b[:, 1::2].clamp(0, images.shape[2])
            all_boxes.append(b)
            all_classes.append(classes[ok])
            all_scores.append(scores[ok])
        boxes, classes, scores = map(torch.cat, (all_boxes, all_classes, all_scores))
        keep = class_spec_nms(boxes, scores, classes, test_nms_thresh)
        return boxes[keep], classes[keep], scores[keep]
        # END BLANK
        return all_boxes, all_classes, all_scores
"""


def blank(source: str) -> str:
    """Return the solution without the parts that students write."""
    return re.sub(r"( *)# BEGIN BLANK.*?# END BLANK", r"\1pass", source, flags=re.DOTALL)


@pytest.fixture
def submit(tmp_path):
    """Return a function that loads the two files of a student."""

    def write_and_load(common_source: str, detector_source: str):
        (tmp_path / "common.py").write_text(common_source)
        (tmp_path / "one_stage_detector.py").write_text(detector_source)
        return load_submission(tmp_path, OURS)

    yield write_and_load
    unload()


def points(grade) -> dict[str, float]:
    """Return the lost points of each item that lost some."""
    return {
        item.name: round(item.max_score - item.score, 2)
        for item in grade.items
        if item.score != item.max_score
    }


@pytest.fixture(scope="module")
def our_results():
    return run_checks(Submission(common, one_stage_detector, a4_helper))


def test_this_repository_gets_all_points(our_results):
    grade = load_rubric().grade(our_results)
    assert points(grade) == {} and grade.total == grade.max_total == 100
    assert [failure for item in grade.items for failure in item.failures] == []


def test_another_solution_loses_what_it_rounds(submit, tmp_path):
    loaded = submit(STUDENT_COMMON, STUDENT_DETECTOR)
    rubric = load_rubric()
    grade = rubric.grade(run_checks(loaded.submission, rubric.checks))
    # NaN for boxes without area. That IoUs are compared in float32 is a remark.
    assert points(grade) == {"nms": 0.5}, [item.failures for item in grade.items]
    remarks = [
        f for item in grade.items for f in item.faults if f.labels[0].endswith("torchvision")
    ]
    assert [fault.points for fault in remarks] == [0]
    assert any("absent_cv is not installed" in note for note in loaded.notes)
    found = review_findings(loaded.submission, tmp_path)
    for words in ("different orders", "statistics of", ".item() in the training step"):
        assert sum(words in sentence for sentence in found) == 1, found
    assert len(found) == 3, found


def test_what_the_handout_brings_along_gets_nothing(submit):
    loaded = submit(blank(STUDENT_COMMON), blank(STUDENT_DETECTOR))
    rubric = load_rubric()
    grade = rubric.grade(run_checks(loaded.submission, rubric.checks))
    assert grade.total == 0, [(item.name, item.score) for item in grade.items]
    assert all(item.failures for item in grade.items if item.max_score > 0)
    # One reason is one line, for however many probes.
    assert all(len(item.failures) <= 8 for item in grade.items)


def test_a_function_that_is_not_written_costs_its_own_points(submit):
    written = "    centerness = torch.sqrt("
    assert written in STUDENT_DETECTOR
    detector = STUDENT_DETECTOR.replace(written, f"    return None\n{written}")
    loaded = submit(STUDENT_COMMON, detector)
    checks = ["centerness", "losses", "inference", "other_sizes"]
    grade = load_rubric().grade(run_checks(loaded.submission, checks))
    scores = {item.name: item.score for item in grade.items}
    assert scores["losses"] == 17 and scores["inference"] == 11
    assert scores["centerness"] == 0 and scores["other_sizes"] == 8


def test_a_detector_is_judged_before_what_it_calls_is_written(submit):
    loaded = submit(blank(STUDENT_COMMON), STUDENT_DETECTOR)
    rubric = load_rubric()
    results = run_checks(loaded.submission, ["losses", "training", "inference", "nms"])
    grade = {item.name: item.score for item in rubric.grade(results).items}
    assert grade["losses"] == 17 and grade["training"] == 8 and grade["inference"] == 11
    assert grade["nms"] == 0
    # And afterwards, theirs are theirs.
    assert loaded.submission.common.nms(None, None) is None


# --------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------


def test_the_points_make_a_hundred_and_handed_out_work_makes_none():
    rubric = load_rubric()
    assert sum(item.points for item in rubric.items) == 100
    for item in rubric.items:
        assert item.points == 0 or sum(item.probes.values()) > 0
    # Not in the table: code that students do not write, and a review finding.
    unlisted = {"hello", "location_order", "dataset", "train_detector", "evaluation_export"}
    assert set(rubric.checks) == set(CHECKS) - unlisted


def result(check: str, *problems: str | None) -> CheckResult:
    labels = labels_of(check)[: len(problems)]
    return CheckResult(check, [ProbeResult(*pair) for pair in zip(labels, problems, strict=True)])


TABLE = """
[targets]
title = "Targets"
check = "deltas"
points = 10
probes = {"left, top, right, bottom in strides" = 3, "boxes without class id" = 1, \
"background deltas are -1" = 0}
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "points.toml"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    ("problems", "score", "failures"),
    [
        ((None, None, None, None, None), 10, []),
        ((None, "wrong", None), 7.5, ["boxes without class id: wrong"]),
        (("wrong", None, "no -1"), 2.5, 2),
        (
            ("same", "same", "same", "same"),
            0,
            ["left, top, right, bottom in strides (and 2 more): same"],
        ),
        ((None, None, None, "not in the table"), 10, []),
        ((None,), 7.5, 1),
        ((), 0, 1),
    ],
)
def test_points_are_shared_out_by_weight(table, problems, score, failures):
    (item,) = load_rubric(table).grade([result("deltas", *problems)]).items
    assert (item.score, item.max_score) == (score, 10)
    assert (len(item.failures) if isinstance(failures, int) else item.failures) == failures


def test_a_check_that_was_not_held_gets_nothing(table):
    rubric = load_rubric(table)
    (item,) = rubric.grade([]).items
    assert item.score == 0
    assert item.failures == [
        "left, top, right, bottom in strides (and 2 more): the check did not get so far"
    ]
    died = CheckResult("deltas", [ProbeResult("the process", "was killed")])
    (item,) = rubric.grade([died]).items
    assert item.score == 0 and item.failures == ["the process: was killed"]


def test_of_two_answers_the_worse_counts(table):
    first, *others = result("deltas", *[None] * 5).probes
    for twice in (
        (first, ProbeResult(first.label, "bad")),
        (ProbeResult(first.label, "bad"), first),
    ):
        (item,) = load_rubric(table).grade([CheckResult("deltas", [*twice, *others])]).items
        assert item.score == 2.5


def test_totals_are_sums():
    rubric = load_rubric()
    grade = rubric.grade([result("head", *[None] * 8), result("deltas", None)])
    assert grade.total == 12 and grade.max_total == 100


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Targets"', "", r"\[targets\]: expected title = text, got None"),
        ('check = "deltas"', "", "expected check = the name of a check"),
        ('check = "deltas"', 'check = "delta"', "no check 'delta'; the checks are"),
        ("points = 10", "", "points: expected a number from 0, got None"),
        ("points = 10", "points = -1", "expected a number from 0, got -1"),
        ("points = 10", "points = true", "expected a number from 0, got True"),
        ("points = 10", "points = nan", "expected a number from 0, got nan"),
        ("points = 10", "points = 10\nweight = 3", "unknown key 'weight'"),
        ("boxes without", "boxes with", "has no probe 'boxes with class id'"),
        ('class id" = 1', "class id\" = 'one'", "expected a number from 0, got 'one'"),
        ("points = 10", "points == 10", "is not TOML"),
        ("[targets]", "name = 3\n[targets]", r"\[name\]: expected a section, got 3"),
        (TABLE, "", "is empty"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(table, old, new, message):
    assert old in TABLE
    table.write_text(TABLE.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_rubric(table)


def test_all_weights_zero_is_refused(table):
    table.write_text(TABLE.replace("= 3,", "= 0,").replace("= 1,", "= 0,"))
    with pytest.raises(ValueError, match="no probe that weighs anything"):
        load_rubric(table)


def test_a_table_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="can't be read: No such file"):
        load_rubric(tmp_path / "none.toml")


def test_without_probes_all_weigh_the_same(table):
    table.write_text(TABLE[: TABLE.index("probes")])
    (item,) = load_rubric(table).items
    assert item.probes == dict.fromkeys(labels_of("deltas"), 1.0)


def test_the_table_is_shipped():
    pyproject = (OURS / "pyproject.toml").read_text()
    assert DEFAULT_PATH.is_file() and '"eecs598.grading" = ["rubric.toml", ' in pyproject


def test_labels_are_those_that_checks_answer(our_results):
    for outcome in our_results:
        assert tuple(probe.label for probe in outcome.probes) == labels_of(outcome.name)
