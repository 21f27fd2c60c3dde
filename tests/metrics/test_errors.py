"""Confusion matrix and the error kinds of TIDE: one constructed case for each, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.errors import ERROR_KINDS, analyze_errors, confusion_matrix
from eecs598.metrics.matching import Matches, match_detections
from tests.evaluations import one_image

NAMES = ["cat", "dog"]
CAT, DOG = 0, 1
A, B, FAR = (0, 0, 9, 9), (20, 0, 29, 9), (60, 60, 69, 69)
HALF_A = (0, 0, 9, 4)  # overlaps A by exactly 0.5
THIRD_A = (0, 0, 9, 2)  # by 0.3
TENTH_A = (0, 0, 9, 0)  # by exactly 0.1
NEAR_A = (9, 9, 18, 18)  # by one pixel of 199


def call(*images: tuple[dict, dict]) -> tuple[list[dict], list[dict], list[str]]:
    return [entry[0] for entry in images], [entry[1] for entry in images], NAMES


def matched(*images: tuple[dict, dict], iou_threshold: float = 0.5) -> Matches:
    return match_detections(*call(*images), iou_threshold)


def by_image(values: np.ndarray, matches: Matches) -> list[list]:
    """Bring (K,) or (M,) values into the order of the predictions or targets, image by image."""
    image, index = matches.image, matches.index
    if len(values) != len(image) or values.dtype == bool:  # of the ground truth
        image, index = matches.gt_image, matches.gt_index
    order = np.lexsort((index, image))
    return [values[order][image[order] == each].tolist() for each in range(matches.num_images)]


def random_call(seed: int, num_images: int = 20) -> tuple[list[dict], list[dict], list[str]]:
    """Few places and scores, so that every kind and every tie comes up."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        truths = [
            (int(rng.integers(2)), (x, 0, x + 9, 9), bool(rng.random() < 0.2))
            for x in rng.choice([0, 3, 20, 40], rng.integers(4))
        ]
        detections = []
        for x in rng.choice([0, 2, 4, 7, 20, 26, 60], rng.integers(6)):
            score = float(rng.choice([0.25, 0.5, 0.75, rng.random()]))
            detections.append((int(rng.integers(2)), score, (x, 0, x + 9, rng.choice([4, 9]))))
        images.append(one_image(detections, truths))
    images.append(one_image([], [(CAT, A), (DOG, A)]))
    return call(*images)


# ---------------------------------------------------------------------------------------------
# Error kinds. Each case: detections, ground truth, their kinds, which truth is missed, the mAP,
# and the gains that are not 0.
# ---------------------------------------------------------------------------------------------

CASES = {
    # The dog is named a cat: cat 1/2 (the false one first), dog 0. Corrected: both 1.
    "class": (
        [(CAT, 0.9, B), (CAT, 0.8, A)],
        [(CAT, A), (DOG, B)],
        ["class", "true"],
        [False, False],
        1 / 4,
        # Without false positives cat is 1. Without the box of the dog, dog is 1, as nothing is
        # left to be found or to be false.
        {"class": 3 / 4, "false positives": 1 / 4, "false negatives": 1 / 2},
    ),
    # The dog is found only by its upper third.
    "localization": (
        [(CAT, 0.9, B), (DOG, 0.8, THIRD_A)],
        [(CAT, B), (DOG, A)],
        ["true", "localization"],
        [False, False],
        1 / 2,
        # Without its box the dog has a false positive and nothing true: 0.
        {"localization": 1 / 2},
    ),
    # A cat over the dog's upper third, ahead of the cat's own detection. The dog is missed.
    "both": (
        [(CAT, 0.9, THIRD_A), (CAT, 0.8, B)],
        [(DOG, A), (CAT, B)],
        ["both", "true"],
        [True, False],
        1 / 4,
        {"both": 1 / 4, "missed": 1 / 2, "false positives": 1 / 4, "false negatives": 1 / 2},
    ),
    # Precision 1, 1/2, 2/3 over two cats: (1 + 2/3) / 2 = 5/6.
    "duplicate": (
        [(CAT, 0.9, A), (CAT, 0.8, A), (CAT, 0.7, B)],
        [(CAT, A), (CAT, B)],
        ["true", "duplicate", "true"],
        [False, False],
        5 / 6,
        {"duplicate": 1 / 6, "false positives": 1 / 6},
    ),
    # Precision 0, 1/2; the first touches the box by one pixel.
    "background": (
        [(CAT, 0.9, NEAR_A), (CAT, 0.8, A)],
        [(CAT, A)],
        ["background", "true"],
        [False],
        1 / 2,
        {"background": 1 / 2, "false positives": 1 / 2},
    ),
    # Precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3: 5/9. Of two boxes instead of three: 5/6.
    "missed": (
        [(CAT, 0.9, A), (CAT, 0.8, FAR), (CAT, 0.7, B)],
        [(CAT, A), (CAT, B), (CAT, (40, 0, 49, 9))],
        ["true", "background", "true"],
        [False, False, True],
        5 / 9,
        {
            "background": 1 / 9,
            "missed": 5 / 6 - 5 / 9,
            "false positives": 1 / 9,
            "false negatives": 5 / 6 - 5 / 9,
        },
    ),
    # The match of the difficult box counts neither way, and nobody misses the other one.
    "ignored": (
        [(CAT, 0.9, B), (CAT, 0.8, A)],
        [(CAT, A), (CAT, B, True), (CAT, FAR, True)],
        ["ignored", "true"],
        [False, False, False],
        1,
        {},
    ),
    # Exactly 0.5 is a match, exactly 0.1 is not background.
    "exact thresholds": (
        [(CAT, 0.9, HALF_A), (DOG, 0.8, HALF_A), (DOG, 0.7, TENTH_A), (CAT, 0.6, TENTH_A)],
        [(CAT, A)],
        ["true", "class", "both", "localization"],
        [False],
        1,
        {},
    ),
    # The wrong name has the higher score, so it is put right and the other removed: before the
    # false dog instead of after it. Dog 1/2 becomes 1, and cat, less a false positive, also.
    "class, of a box found by another with a lower score": (
        [(CAT, 0.9, A), (DOG, 0.7, FAR), (DOG, 0.5, A), (CAT, 0.4, B)],
        [(DOG, A), (CAT, B)],
        ["class", "background", "true", "true"],
        [False, False],
        1 / 2,
        {"class": 1 / 2, "background": 1 / 4, "false positives": 1 / 2},
    ),
    # With a lower score it is removed itself.
    "class, of a box found by another with a higher score": (
        [(DOG, 0.9, A), (CAT, 0.8, A), (CAT, 0.7, B)],
        [(DOG, A), (CAT, B)],
        ["true", "class", "true"],
        [False, False],
        3 / 4,
        {"class": 1 / 4, "false positives": 1 / 4},
    ),
    # Precision 0, 0, 1/3. Put right, the first is true ahead of the false one, the last removed.
    "localization, of a box found by another with a lower score": (
        [(CAT, 0.9, THIRD_A), (CAT, 0.8, FAR), (CAT, 0.7, A)],
        [(CAT, A)],
        ["localization", "background", "true"],
        [False],
        1 / 3,
        {"localization": 2 / 3, "background": 1 / 6, "false positives": 2 / 3},
    ),
    # Precision 0, 0, 1/3 of two. Put right, the first is true and the second removed.
    "two localizations of a box": (
        [(CAT, 0.9, THIRD_A), (CAT, 0.8, TENTH_A), (CAT, 0.7, B)],
        [(CAT, A), (CAT, B)],
        ["localization", "localization", "true"],
        [False, False],
        1 / 6,
        {"localization": 5 / 6, "false positives": 1 / 3, "false negatives": 1 / 6},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error_kinds_by_hand(case):
    detections, truths, kinds, missed, base, gains = CASES[case]
    matches = matched(one_image(detections, truths))
    result = analyze_errors(matches)
    assert by_image(result.kind, matches) == [kinds]
    assert result.gt_missed.tolist() == missed
    assert result.map == pytest.approx(base)
    expected = {name: kinds.count(name) for name in ("true", "ignored", *ERROR_KINDS)}
    assert result.counts == {**expected, "missed": sum(missed)}
    everything = {
        **result.gains,
        "false positives": result.gains_false_positives,
        "false negatives": result.gains_false_negatives,
    }
    assert list(result.gains) == list(ERROR_KINDS)
    assert everything == pytest.approx({name: gains.get(name, 0) for name in everything})


def test_what_an_error_is_about():
    first = one_image(
        [(DOG, 0.9, A), (CAT, 0.8, A), (CAT, 0.95, A), (CAT, 0.7, FAR), (CAT, 0.6, THIRD_A)],
        [(CAT, B), (CAT, A), (DOG, B)],
    )
    second = one_image([(DOG, 0.5, THIRD_A), (CAT, 0.4, B)], [(CAT, B, True), (CAT, A)])
    matches = matched(first, one_image([], []), second, one_image([], [(DOG, A)]))
    result = analyze_errors(matches)
    assert by_image(result.kind, matches) == [
        ["class", "duplicate", "true", "background", "localization"],
        [],
        ["both", "ignored"],
        [],
    ]
    places = np.append(matches.gt_index, -1)[result.matched_gt]
    assert by_image(places, matches) == [[1, 1, 1, -1, 1], [], [1, 0], []]
    iou = by_image(result.iou, matches)
    assert iou == [pytest.approx([1, 1, 1, -1, 0.3]), [], pytest.approx([0.3, 1]), []]
    missed = [[True, False, True], [], [False, True], [True]]  # each error has a found box
    assert by_image(result.gt_missed, matches) == missed
    assert by_image(~matches.gt_found & ~matches.gt_difficult, matches) == missed
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert set(result.to_dict()) >= {"counts", "gains", "map"}


@pytest.mark.parametrize(
    ("detections", "truths", "kind"),
    [
        # A dog's box and 30 % of a cat's: the framing comes first.
        ([(CAT, 0.9, A)], [(CAT, (0, 7, 9, 16)), (DOG, A)], "localization"),
        # On a dog, and on a cat that is taken: the name comes first.
        ([(CAT, 0.95, A), (CAT, 0.9, A)], [(CAT, A), (DOG, A)], "class"),
        # 30 % of a dog, and on a cat that is taken.
        ([(CAT, 0.95, A), (CAT, 0.9, A)], [(CAT, A), (DOG, THIRD_A)], "duplicate"),
        # Of a difficult dog nothing is seen.
        ([(CAT, 0.9, A)], [(DOG, A, True), (CAT, B)], "background"),
        ([(CAT, 0.9, THIRD_A)], [(CAT, A, True), (CAT, B)], "background"),
    ],
)
def test_the_first_kind_that_fits(detections, truths, kind):
    matches = matched(one_image(detections, truths))
    assert by_image(analyze_errors(matches).kind, matches)[0][-1] == kind


def test_other_thresholds_move_the_kinds():
    third = one_image([(CAT, 0.9, THIRD_A)], [(CAT, A)])
    assert analyze_errors(matched(third, iou_threshold=0.3)).kind.tolist() == ["true"]
    matches = matched(third)
    assert analyze_errors(matches, background_threshold=0.4).kind.tolist() == ["background"]
    with pytest.raises(ValueError, match=r"background_threshold must be in 0..iou_threshold"):
        analyze_errors(matches, background_threshold=0.6)
    # Boxes that share nothing are background even then.
    matches = matched(one_image([(CAT, 0.9, FAR)], [(CAT, A)]))
    assert analyze_errors(matches, background_threshold=0).kind.tolist() == ["background"]


def test_a_detector_that_finds_nothing_misses_everything():
    result = analyze_errors(matched(one_image([], [(CAT, A), (DOG, B)]), one_image([], [])))
    assert len(result.kind) == 0
    assert result.counts["missed"] == 2
    assert (result.map, result.gains["missed"], result.gains_false_negatives) == (0, 1, 1)
    # Finding only what is not there is no better for a shorter list of boxes.
    result = analyze_errors(matched(one_image([(CAT, 0.5, FAR)], [(CAT, A)])))
    assert (result.map, result.gains["missed"], result.gains_false_negatives) == (0, 0, 0)
    with pytest.raises(ValueError, match="no ground truth"):
        analyze_errors(matched(one_image([(CAT, 0.5, FAR)], [])))


def test_properties_of_random_errors():
    seen: set[str] = set()
    for seed in range(20):
        arguments = random_call(seed)
        matches = match_detections(*arguments)
        result = analyze_errors(matches)
        scores = average_precision(*arguments)
        assert result.map == scores["mAP"]
        true, false = (sum(scores[f"{column}_positives"].values()) for column in ("true", "false"))
        assert result.counts["true"] == true
        errors = [name for name in ERROR_KINDS if name != "missed"]
        assert sum(result.counts[name] for name in errors) == false
        lost = ~matches.gt_found & ~matches.gt_difficult
        assert lost.sum() == sum(scores["num_ground_truth"].values()) - true
        assert not (result.gt_missed & ~lost).any()
        assert all(-1e-12 < gain <= 1 - result.map + 1e-12 for gain in result.gains.values())
        removals = max(result.gains[name] for name in ("both", "duplicate", "background"))
        assert result.gains_false_positives >= removals - 1e-12
        assert result.gains_false_negatives >= result.gains["missed"] - 1e-12
        # Without false positives the detections score as those of a detector that never had them.
        kept = [
            {key: value[np.array(kinds, dtype=str) == "true"] for key, value in prediction.items()}
            for prediction, kinds in zip(arguments[0], by_image(result.kind, matches), strict=True)
        ]
        without = average_precision(kept, *arguments[1:])["mAP"]
        assert result.gains_false_positives == pytest.approx(without - result.map)
        seen |= {name for name, count in result.counts.items() if count}
    assert seen == {"true", "ignored", *ERROR_KINDS}


def test_the_order_of_images_does_not_matter_without_equal_scores():
    predictions, targets, names = random_call(100)
    rng = np.random.default_rng(0)
    for prediction in predictions:
        prediction["scores"] = rng.random(len(prediction["scores"]))
    there = match_detections(predictions, targets, names)
    back = match_detections(predictions[::-1], targets[::-1], names)
    forward, backward = analyze_errors(there), analyze_errors(back)
    assert backward.to_dict() == forward.to_dict()
    assert by_image(backward.kind, back) == by_image(forward.kind, there)[::-1]
    assert by_image(backward.gt_missed, back) == by_image(forward.gt_missed, there)[::-1]
    assert np.array_equal(confusion_matrix(back), confusion_matrix(there))


# ---------------------------------------------------------------------------------------------
# Confusion matrix
# ---------------------------------------------------------------------------------------------

MATRICES = {
    "right, wrong, invented, missed": (
        [(CAT, 0.9, A), (CAT, 0.8, B), (DOG, 0.7, FAR)],
        [(CAT, A), (DOG, B), (DOG, (40, 0, 49, 9))],
        [[1, 0, 0], [1, 0, 1], [0, 1, 0]],
    ),
    # The higher score takes the box although its class is wrong.
    "two of one box": (
        [(CAT, 0.8, A), (DOG, 0.9, A)],
        [(CAT, A)],
        [[0, 1, 0], [0, 0, 0], [1, 0, 0]],
    ),
    # The second falls back on the box still free, which it overlaps by 90 / 110.
    "second choice": (
        [(CAT, 0.9, A), (CAT, 0.8, A)],
        [(CAT, A), (CAT, (0, 1, 9, 10))],
        [[2, 0, 0], [0, 0, 0], [0, 0, 0]],
    ),
    # By 90 / 110 on a box of its class, exactly on one of the other.
    "most overlap": (
        [(CAT, 0.9, A)],
        [(CAT, (0, 1, 9, 10)), (DOG, A)],
        [[0, 0, 1], [1, 0, 0], [0, 0, 0]],
    ),
    "equal overlaps take the own class": (
        [(DOG, 0.9, A), (CAT, 0.8, A)],
        [(CAT, A), (DOG, A)],
        [[1, 0, 0], [0, 1, 0], [0, 0, 0]],
    ),
    "too little overlap": (
        [(CAT, 0.9, THIRD_A)],
        [(CAT, A)],
        [[0, 0, 1], [0, 0, 0], [1, 0, 0]],
    ),
    "exactly the threshold": ([(CAT, 0.4, HALF_A)], [(CAT, A)], [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
    "too low a score": ([(CAT, 0.39, A)], [(CAT, A)], [[0, 0, 1], [0, 0, 0], [0, 0, 0]]),
    # Any number of detections, of any class, and none.
    "difficult": (
        [(CAT, 0.9, A), (DOG, 0.8, A), (CAT, 0.7, A)],
        [(CAT, A, True), (DOG, B, True)],
        [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    ),
    "no ground truth": ([(DOG, 0.9, A)], [], [[0, 0, 0], [0, 0, 0], [0, 1, 0]]),
    "no detections": ([], [(DOG, A)], [[0, 0, 0], [0, 0, 1], [0, 0, 0]]),
}


@pytest.mark.parametrize("case", MATRICES)
def test_confusion_matrix_by_hand(case):
    detections, truths, expected = MATRICES[case]
    matrix = confusion_matrix(matched(one_image(detections, truths)))
    assert matrix.dtype == np.int64
    assert matrix.tolist() == expected
    image = one_image(detections, truths)
    twice = confusion_matrix(matched(image, one_image([], []), image))
    assert np.array_equal(twice, 2 * matrix)


def test_rows_and_columns_add_up():
    for seed in range(5):
        arguments = random_call(seed)
        matches = match_detections(*arguments)
        matrix = confusion_matrix(matches, score_threshold=0.5)
        assert matrix[:-1].sum(axis=1).tolist() == matches.num_ground_truth.tolist()
        # Columns are the detections but for those on difficult boxes.
        kept = np.bincount(matches.label[matches.score >= 0.5], minlength=2)
        assert (matrix[:, :-1].sum(axis=0) <= kept).all()
        easy = [{**target, "difficult": None} for target in arguments[1]]
        matches = match_detections(arguments[0], easy, NAMES)
        matrix = confusion_matrix(matches, score_threshold=0.5)
        assert matrix[:, :-1].sum(axis=0).tolist() == kept.tolist()
        assert matrix[-1, -1] == 0
