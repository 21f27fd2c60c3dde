"""An image cache: decoded images in memory, shared by all processes that load them."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["ImageCache"]


class ImageCache:
    """Keep the pixels of the images of a data set from the first time that they are asked for.

    Processes that are forked from this one, as the workers of a ``DataLoader`` are on Linux, share
    the memory: an image that one process has decoded is there for all. Elsewhere each process has
    a cache of its own. Memory is taken as the cache fills.

    Args:
        sizes: height and width of each image.
        max_bytes: limit for all images together; images beyond it are not kept.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], max_bytes: int) -> None:
        self._sizes, self._max_bytes = list(sizes), max_bytes
        ends = list(itertools.accumulate(3 * height * width for height, width in sizes))
        self._starts = [0, *ends[:-1]]
        self.num_images = sum(end <= max_bytes for end in ends)
        self.num_bytes = ends[self.num_images - 1] if self.num_images else 0
        # Anonymous memory, which unlike files in /dev/shm is not limited in containers. After the
        # pixels follows one byte per image, which says whether the image is there.
        shared = mmap.mmap(-1, max(1, self.num_bytes + self.num_images))
        memory = torch.from_numpy(np.frombuffer(shared, dtype=np.uint8))
        self._pixels, self._is_there = memory[: self.num_bytes], memory[self.num_bytes :]

    def get(self, index: int, make: Callable[[], Tensor]) -> Tensor:
        """Return the pixels of an image, ``(3, H, W)`` in uint8, which must not be modified.

        Args:
            index: of the image.
            make: called for the pixels where the cache does not have them.
        """
        if index >= self.num_images:
            return make()
        height, width = self._sizes[index]
        start = self._starts[index]
        kept = self._pixels[start : start + 3 * height * width].view(3, height, width)
        # Two processes may do this at the same time; they write the same values.
        if not self._is_there[index]:
            kept.copy_(make())
            self._is_there[index] = 1
        return kept

    def __len__(self) -> int:
        """Return how many images the cache holds by now."""
        return int(self._is_there[: self.num_images].sum())

    def __str__(self) -> str:
        text = f"{self.num_bytes / 2**20:,.0f} MB for {self.num_images:,} images"
        left = len(self._sizes) - self.num_images
        return (
            f"{text}; {left:,} do not fit into {self._max_bytes / 2**20:,.0f} MB" if left else text
        )

    def __reduce__(self) -> tuple[type[ImageCache], tuple[list[tuple[int, int]], int]]:
        return ImageCache, (self._sizes, self._max_bytes)  # a copy starts empty
