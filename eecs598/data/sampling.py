"""Which images go into which training batch, so that a training can go on where it stopped.

The usual shuffling loader forgets its place when the process ends. Here the images of batch k
follow from the seed and k alone, and so do the random numbers of their augmentation: there is no
state to save beside the number of iterations done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

__all__ = ["Sample", "TrainingSampler"]


class Sample(NamedTuple):
    """What a data set needs to make one training image."""

    index: int
    seed: int  # of the augmentation
    side: int | None  # of the image in pixels, one for the whole batch; None for the usual one


class TrainingSampler(Sampler[list[Sample]]):
    """Batches for iterations ``start`` to ``stop``: every image once an epoch, in random order.

    Epochs follow each other without a gap, so a batch may span two of them and all batches are
    full.

    Args:
        num_images: size of the data set.
        batch_size: images of one batch of this process.
        stop: iterations of the whole training.
        start: iterations that are done already.
        seed: of the order and of the augmentation.
        sides: sizes in pixels of which each batch gets one at random.
        rank: number of this process.
        num_processes: processes that share the work. Together they see the images that one
            process with ``num_processes * batch_size`` images a batch would see.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        stop: int,
        *,
        start: int = 0,
        seed: int = 0,
        sides: Sequence[int] = (),
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError("the training set has no image; expected at least 1.")
        self.num_images = num_images
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.seed = seed
        self.sides = tuple(sides)
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = -1, np.empty(0)
        for iteration in range(self.start, self.stop):
            side = None
            if self.sides:  # from the iteration alone, so that all processes choose the same
                side = self.sides[self._rng(1, iteration).integers(len(self.sides))]
            batch = []
            first = (iteration * self.num_processes + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    order = self._rng(0, epoch).permutation(self.num_images)
                seed = int(self._rng(2, position).integers(2**31))
                batch.append(Sample(int(order[position % self.num_images]), seed, side))
            yield batch

    def _rng(self, stream: int, number: int) -> np.random.Generator:
        """Random numbers for one purpose at one point of the training."""
        return np.random.default_rng([self.seed, stream, number])
