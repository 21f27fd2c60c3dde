"""Input pipeline: time from a JPEG file to a training tensor, next to Pillow and torchvision.

The images are those of ../shared/voc2007-original or of the folder in VOC layout that the variable
FCOS_BENCHMARK_DATA names; without them, there are no rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from a4_helper import VOC2007DetectionTiny
from benchmarks.timing import Row, side_by_side
from eecs598.data import IMAGENET_MEAN, IMAGENET_STD

SIDE = 224
DATA = Path(__file__).resolve().parents[2] / "shared" / "voc2007-original"


def rows(device: str) -> Iterator[Row]:
    """One process and one thread: the first epoch, and the second with the images in memory."""
    folder = Path(os.environ.get("FCOS_BENCHMARK_DATA", DATA))
    if not folder.is_dir():
        print(f"no images in {folder}: nothing to decode", file=sys.stderr)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from _rows(folder)
    finally:
        torch.set_num_threads(threads)


def _rows(folder: Path) -> Iterator[Row]:
    dataset = VOC2007DetectionTiny(folder, "train", image_size=SIDE)
    in_memory = VOC2007DetectionTiny(folder, "train", image_size=SIDE, cache=True)
    plain = transforms.Compose(
        [
            transforms.Resize(SIDE),
            transforms.CenterCrop(SIDE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    paths = [instance.path for instance in dataset.instances]

    def ours() -> list[torch.Tensor]:
        return [dataset[index][1] for index in range(len(dataset))]

    def ours_in_memory() -> list[torch.Tensor]:
        return [in_memory[index][1] for index in range(len(in_memory))]

    def theirs() -> list[torch.Tensor]:
        return [plain(Image.open(path).convert("RGB")) for path in paths]

    one_level = 1.01 / 255 / min(IMAGENET_STD)
    for image, cached, peers in zip(ours(), ours_in_memory(), theirs(), strict=True):
        assert torch.equal(image, cached)
        assert _is_within(image, peers, one_level)
    peer = "Pillow and torchvision.transforms"
    question = f"{len(dataset)} JPEG files to tensors of {SIDE} px"
    yield Row(question, peer, *side_by_side(ours, theirs), 1 / 3)
    question = f"the same from memory, {in_memory.images.cache}"
    yield Row(question, peer, *side_by_side(ours_in_memory, theirs), 1 / 15)


def _is_within(image: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Return whether two images agree, up to a shift of one pixel: crops may round differently."""
    shifted = (image, image[:, 1:, :], image[:, :, 1:], image[:, 1:, 1:])
    return any(
        (part - other[:, : part.shape[1], : part.shape[2]]).abs().max() <= tolerance
        for part in shifted
    )
