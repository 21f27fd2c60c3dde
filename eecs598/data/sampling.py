"""The training sampler: which images are in which batch, reproducible from any iteration on.

The usual shuffling loader forgets its place when the process ends. Here the images of batch k
follow from the seed and k alone, and so do the random numbers of their augmentation: to resume, it
is enough to know the number of iterations done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

__all__ = ["Sample", "TrainingSampler"]


@dataclass(frozen=True)
class Sample:
    """What ``TrainingSet`` needs to know to make one training image.

    Attributes:
        index: of the image in the data set.
        seed: of the augmentation.
        image_size: side of the result in pixels, the same for a whole batch; None for the usual
            one.
        allows_mosaic: whether the augmentation may add other images to this one.
    """

    index: int
    seed: int
    image_size: int | None = None
    allows_mosaic: bool = True


class TrainingSampler(Sampler[list[Sample]]):
    """Batches for iterations ``start`` to ``stop``: every image once per epoch, in random order.

    Epochs follow each other without a gap, so a batch may span two of them and all batches are
    full.

    Args:
        num_images: size of the data set.
        batch_size: images per batch of this process.
        stop: number of iterations of the whole training run.
        start: number of iterations that are already done.
        seed: of the order and of the augmentation.
        image_sizes: sizes in pixels of which each batch gets one at random; without any, batches
            have the usual size.
        mosaic_off_iters: the last iterations, in which no image may become a mosaic, so that the
            detector ends on images like those it will see (YOLOX, arXiv 2107.08430, section 2.1).
        rank: number of this process.
        num_processes: processes that share the work. Together they see the images that a single
            process with ``num_processes * batch_size`` images per batch would see.

    Raises:
        ValueError: ``num_images`` is 0.

    Example:
        >>> batches = list(TrainingSampler(num_images=4, batch_size=2, stop=2))
        >>> sorted(sample.index for batch in batches for sample in batch)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        stop: int,
        *,
        start: int = 0,
        seed: int = 0,
        image_sizes: Sequence[int] = (),
        mosaic_off_iters: int = 0,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError("the training set has no image; expected at least 1.")
        self.num_images = num_images
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.seed = seed
        self.image_sizes = tuple(image_sizes)
        self.mosaic_off_iters = mosaic_off_iters
        self.rank, self.num_processes = rank, num_processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = -1, np.arange(0)
        for iteration in range(self.start, self.stop):
            image_size = None
            if self.image_sizes:  # from the iteration alone, so that all processes choose the same
                choice = self._rng(1, iteration).integers(len(self.image_sizes))
                image_size = self.image_sizes[choice]
            allows_mosaic = iteration < self.stop - self.mosaic_off_iters
            batch = []
            first = (iteration * self.num_processes + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.num_images != epoch:
                    epoch = position // self.num_images
                    order = self._rng(0, epoch).permutation(self.num_images)
                seed = int(self._rng(2, position).integers(2**31))
                index = int(order[position % self.num_images])
                batch.append(Sample(index, seed, image_size, allows_mosaic))
            yield batch

    def _rng(self, stream: int, number: int) -> np.random.Generator:
        """Return the generator of one purpose (``stream``) at one point of the training run."""
        return np.random.default_rng([self.seed, stream, number])
