"""Checks of detections: mutants fail them."""

from __future__ import annotations

import pytest

from eecs598.grading import run_checks
from tests.grading.checks.mutants import Mutant, assert_intended_failures, failures, load

MUTANTS = [
    Mutant(
        "class sigmoid missing",
        "one_stage_detector",
        "_join_predictions(outputs.class_logits).sigmoid()",
        "_join_predictions(outputs.class_logits)",
        {"inference": "score"},
    ),
    Mutant(
        "sigmoid twice",
        "one_stage_detector",
        "_join_predictions(outputs.class_logits).sigmoid()",
        "_join_predictions(outputs.class_logits).sigmoid().sigmoid()",
        {"inference": "score is sqrt"},
    ),
    Mutant(
        "score without the root",
        "one_stage_detector",
        "(class_probs * centerness).sqrt()",
        "(class_probs * centerness)",
        {"inference": "score"},
    ),
    Mutant(
        "score without centerness",
        "one_stage_detector",
        "(class_probs * centerness).sqrt()",
        "class_probs",
        {"inference": "score"},
    ),
    Mutant(
        "least probable class",
        "one_stage_detector",
        "all_class_probs.max(dim=-1, keepdim=True)",
        "all_class_probs.min(dim=-1, keepdim=True)",
        {"inference": "most probable class"},
    ),
    Mutant(
        "score threshold ignored",
        "one_stage_detector",
        "scores > score_thresh",
        "scores > min(score_thresh, 0.25)",
        {"inference": "score threshold"},
    ),
    Mutant(
        "boxes not clipped",
        "one_stage_detector",
        "boxes = clip_boxes_to_image(boxes, image_size)",
        "pass",
        {"inference": "clipped"},
    ),
    Mutant(
        "clipped to width and height swapped",
        "one_stage_detector",
        "clip_boxes_to_image(boxes, image_size)",
        "clip_boxes_to_image(boxes, image_size[::-1])",
        {"other_sizes": "not square"},
    ),
    Mutant(
        "clipped to 224 pixels",
        "one_stage_detector",
        "clip_boxes_to_image(boxes, image_size)",
        "boxes.clamp(0, 224)",
        {"other_sizes": "another size"},
    ),
    Mutant(
        "NMS threshold ignored",
        "one_stage_detector",
        "class_spec_nms(boxes, scores, labels * batch_size + image_ids, nms_thresh)",
        "class_spec_nms(boxes, scores, labels * batch_size + image_ids, 0.6)",
        {"inference": "NMS threshold"},
    ),
    Mutant(
        "no NMS",
        "one_stage_detector",
        "class_spec_nms(boxes, scores, labels * batch_size + image_ids, nms_thresh)",
        "scores.argsort(descending=True)",
        {"inference": "NMS within a class"},
    ),
    Mutant(
        "three results in another order",
        "one_stage_detector",
        '        )[0]\n        return found["boxes"], found["labels"], found["scores"]\n\n'
        "    @torch.no_grad()\n    def predict",
        '        )[0]\n        return found["boxes"], found["scores"], found["labels"]\n\n'
        "    @torch.no_grad()\n    def predict",
        {"inference": "score"},
    ),
    Mutant(
        "predictions clipped in place",
        "one_stage_detector",
        "deltas = _join_predictions(outputs.deltas)\n        boxes",
        "deltas = _join_predictions({k: v.clamp_(min=0) for k, v in outputs.deltas.items()})\n"
        "        boxes",
        {"inference": "input unchanged"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutants_fail_the_intended_checks(mutant):
    assert_intended_failures(mutant)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("kept = kept[image_ids[kept].argsort(stable=True)]", "{}.flip(0)"),
        ('"labels": labels[own],', '"labels": labels[own].float(),'),
        (
            'self.register_buffer("loss_normalizer", torch.tensor(150.0))',
            "self.loss_normalizer = torch.tensor(150.0)",
        ),
    ],
    ids=["detections unsorted", "class ids as floats", "average not a buffer"],
)
def test_details_that_the_assignment_leaves_open_pass(old, new):
    submission = load(("one_stage_detector", old, new.format(old.strip())))
    assert failures(run_checks(submission, ["losses", "training", "inference"])) == {}
