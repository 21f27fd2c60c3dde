"""Bootstrap: weights against images written several times, intervals against known spreads."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from eecs598.metrics.average_precision import average_precision
from eecs598.metrics.bootstrap import bootstrap_difference, bootstrap_map, resampled_map
from eecs598.metrics.matching import Matches, match_detections

NAMES = ["cat", "dog"]
BOX, FAR = [0.0, 0.0, 9.0, 9.0], [60.0, 60.0, 69.0, 69.0]


def image(found: bool, score: float = 0.5, label: int = 0) -> tuple[dict, dict]:
    """One object, and one detection on it or elsewhere."""
    labels = np.array([label])
    prediction = {"boxes": np.array([BOX if found else FAR]), "labels": labels}
    return {**prediction, "scores": np.array([score])}, {"boxes": np.array([BOX]), "labels": labels}


def matched(images: list[tuple[dict, dict]]) -> Matches:
    return match_detections([entry[0] for entry in images], [entry[1] for entry in images], NAMES)


def random_call(
    seed: int, num_images: int = 30, shift: float = 6.0
) -> tuple[list[dict], list[dict], list[str]]:
    """Scores in steps, so that images tie; ground truth that is difficult, absent, not found."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(num_images):
        count = rng.integers(4)
        corner = rng.integers(0, 60, (count, 2))
        boxes = np.hstack([corner, corner + rng.integers(15, 40, (count, 2))]).astype(float)
        labels = rng.integers(0, 2, count)
        chosen = rng.integers(0, max(count, 1), rng.integers(6) if count else 0)
        moved = boxes[chosen] + rng.uniform(0, shift, (len(chosen), 1))
        # Equal scores between images, none within one.
        scores = rng.choice(np.arange(20) / 20, len(chosen), replace=False)
        predictions.append({"boxes": moved, "labels": labels[chosen], "scores": scores})
        targets.append({"boxes": boxes, "labels": labels, "difficult": rng.random(count) < 0.2})
    return predictions, targets, NAMES


def repeated(values: list, times: np.ndarray) -> list:
    return [value for value, count in zip(values, times, strict=True) for _ in range(count)]


def test_the_images_as_they_are_score_as_ever():
    for seed in range(5):
        arguments = random_call(seed)
        expected = average_precision(*arguments)["mAP"]
        matches = match_detections(*arguments)
        assert bootstrap_map(matches, num_samples=2).map == expected
        once = np.ones((1, matches.num_images), dtype=int)
        assert resampled_map(matches, once)[0] == pytest.approx(expected, abs=1e-13)
        assert 0 < expected < 1


@pytest.mark.parametrize("seed", range(5))
def test_weights_score_as_images_written_several_times(seed):
    predictions, targets, names = random_call(seed)
    matches = match_detections(predictions, targets, names)
    weights = np.random.default_rng(seed).integers(0, 4, (200, len(targets)))
    weights[0] = 2  # all images twice
    weights[1, 1:] = 0  # nearly none
    weights[1, [len(t["labels"]) > 0 and not t["difficult"].any() for t in targets]] = 1
    values = resampled_map(matches, weights)
    assert len(set(values.tolist())) > 150
    for row in (0, 1, 2, 50, 127, 128, 199):  # on both sides of a block's end
        times = weights[row]
        again = repeated(predictions, times), repeated(targets, times), names
        assert values[row] == pytest.approx(average_precision(*again)["mAP"], abs=1e-13)


def test_classes_without_ground_truth_in_a_sample_are_left_out():
    matches = matched([image(True), image(True, 0.4), image(False, 0.9, label=1)])
    weights = np.array([[1, 1, 1], [2, 1, 0], [0, 0, 3]])
    values = resampled_map(matches, weights)
    assert values.tolist() == [0.5, 1.0, 0.0]


def test_samples_by_hand():
    # Found with high scores or not at all: the mAP of a sample is its share of found objects.
    hits, count = 30, 40
    images = [image(True, 0.9)] * hits + [image(False, 0.1)] * (count - hits)
    result = bootstrap_map(matched(images), num_samples=4000)
    assert result.map == hits / count
    shares = result.samples * count
    assert shares == pytest.approx(np.round(shares))
    share = hits / count
    spread = math.sqrt(share * (1 - share) / count)
    assert result.samples.mean() == pytest.approx(share, abs=5 * spread / math.sqrt(4000))
    assert result.samples.std() == pytest.approx(spread, rel=0.06)
    # The ends of 95 % lie two spreads out, to a step of 1/40.
    assert result.low == pytest.approx(share - 1.96 * spread, abs=1 / count)
    assert result.high == pytest.approx(share + 1.96 * spread, abs=1 / count)
    inside = (result.samples >= result.low) & (result.samples <= result.high)
    assert inside.mean() >= 0.95
    narrow = bootstrap_map(matched(images), num_samples=4000, confidence=0.5)
    assert result.low < narrow.low < narrow.high < result.high
    assert np.array_equal(narrow.samples, result.samples)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.to_dict()["num_samples"] == 4000


def test_the_seed_decides():
    matches = match_detections(*random_call(0))
    results = [bootstrap_map(matches, num_samples=50, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(results[0].samples, results[1].samples)
    assert not np.array_equal(results[0].samples, results[2].samples)


def test_few_images():
    result = bootstrap_map(matched([image(True)]), num_samples=10)
    assert (result.map, result.low, result.high, len(result.samples)) == (1, 1, 1, 10)
    # Samples of the empty image alone have nothing to score: one in four.
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    result = bootstrap_map(matched([image(True), (nothing, nothing)]), num_samples=400)
    assert 250 < len(result.samples) < 350
    assert result.low == result.high == 1
    images = [image(True), *[(nothing, nothing)] * 999]
    seed = next(
        s for s in range(9) if not np.random.default_rng(s).multinomial(1000, [1e-3] * 1000)[0]
    )
    with pytest.raises(ValueError, match="none of 1 samples of 1000 images has ground truth"):
        bootstrap_map(matched(images), num_samples=1, seed=seed)
    result = bootstrap_map(matched([(nothing, image(True)[1])]), num_samples=10)
    assert (result.map, result.low, result.high) == (0, 0, 0)


def test_difference_of_a_run_to_itself_is_none():
    matches = match_detections(*random_call(0))
    result = bootstrap_difference(matches, matches, num_samples=50)
    assert (result.difference, result.low, result.high, result.exceeds) == (0, 0, 0, False)


def test_difference_is_paired():
    predictions, targets, names = random_call(1, 100)
    good = match_detections(predictions, targets, names)
    worse = match_detections(random_call(1, 100, shift=12.0)[0], targets, names)
    result = bootstrap_difference(good, worse, num_samples=300)
    one, other = (bootstrap_map(run, num_samples=300) for run in (good, worse))
    assert result.difference == one.map - other.map > 0
    samples = one.samples - other.samples
    assert [result.low, result.high] == pytest.approx(np.quantile(samples, [0.025, 0.975]))
    assert result.exceeds
    back = bootstrap_difference(worse, good, num_samples=300)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-result.difference, -result.high, -result.low)
    )
    assert back.exceeds
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.to_dict()["exceeds"] is True
    # One more object found among forty is no difference that would be seen again.
    images = [image(True, 0.9)] * 30 + [image(False, 0.1)] * 10
    better = [*images[:30], image(True, 0.9), *images[31:]]
    result = bootstrap_difference(matched(better), matched(images))
    assert result.difference == pytest.approx(1 / 40)
    assert result.low == 0 and not result.exceeds


def test_differences_of_other_data_are_refused():
    one, two = matched([image(True)]), matched([image(True)] * 2)
    with pytest.raises(ValueError, match="run a has 1 images and run b 2"):
        bootstrap_difference(one, two)
    others = match_detections(*([part] for part in image(True)), ["bee"])
    with pytest.raises(ValueError, match="run a has the objects {'cat': 1} and run b {'bee': 1}"):
        bootstrap_difference(one, others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ({"confidence": 1}, "confidence must lie between 0 and 1"),
    ],
)
def test_wrong_calls_are_named(changes, message):
    matches = matched([image(True)])
    with pytest.raises(ValueError, match=message):
        bootstrap_map(matches, **changes)
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(matches, matches, **changes)


def test_no_ground_truth_is_named():
    prediction, target = image(True)
    hard = {**target, "difficult": np.array([True])}
    with pytest.raises(ValueError, match="no ground truth box that is not difficult"):
        bootstrap_map(matched([(prediction, hard)]))
