"""The order of training images."""

from __future__ import annotations

import itertools

import pytest

from eecs598.data.sampling import TrainingSampler


def flat(batches) -> list:
    return list(itertools.chain.from_iterable(batches))


def test_an_epoch_shows_every_image_once():
    samples = flat(TrainingSampler(10, 4, 10, seed=1))
    epochs = [[s.index for s in samples[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({s.seed for s in samples}) == 40


@pytest.mark.parametrize("start", [0, 1, 7, 19, 20])
def test_a_later_start_gives_the_rest(start):
    whole = list(TrainingSampler(7, 3, 20, seed=5, image_sizes=(32, 64)))
    rest = TrainingSampler(7, 3, 20, start=start, seed=5, image_sizes=(32, 64))
    assert list(rest) == whole[start:]
    assert len(rest) == 20 - start


def test_processes_share_the_batch_of_one():
    alone = list(TrainingSampler(10, 4, 9, seed=2, image_sizes=(32, 48, 64)))
    shares = [
        list(TrainingSampler(10, 2, 9, seed=2, image_sizes=(32, 48, 64), rank=r, num_processes=2))
        for r in range(2)
    ]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_seeds_give_different_orders():
    orders = {
        tuple(s.index for s in flat(TrainingSampler(20, 4, 5, seed=seed))) for seed in range(5)
    }
    assert len(orders) == 5
    assert list(TrainingSampler(20, 4, 5, seed=3)) == list(TrainingSampler(20, 4, 5, seed=3))


def test_a_batch_has_one_size():
    batches = list(TrainingSampler(8, 4, 40, image_sizes=(32, 64)))
    assert all(len({s.image_size for s in batch}) == 1 for batch in batches)
    assert {s.image_size for s in flat(batches)} == {32, 64}
    assert {s.image_size for s in flat(TrainingSampler(8, 4, 5))} == {None}


def test_mosaics_end_before_the_training_run():
    batches = list(TrainingSampler(10, 4, 9, start=5, mosaic_off_iters=2))
    allowed = [{sample.allows_mosaic for sample in batch} for batch in batches]
    assert allowed == [{True}, {True}, {False}, {False}]


def test_no_images():
    with pytest.raises(ValueError, match="no image"):
        TrainingSampler(0, 4, 5)
