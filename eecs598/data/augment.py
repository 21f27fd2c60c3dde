"""Random changes of training images: more data than there are photographs.

Built from ``torchvision.transforms.v2``; the boxes travel with the image as ``tv_tensors``. Every
image is made from a seed of its own, so that a training can be repeated and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "Augmentation"]

AUGMENTATIONS = ("flip", "zoom", "iou_crop", "photometric", "mosaic")

# The colour that stands for "nothing here": ImageNet's mean, 0 once normalised.
FILL = (124, 116, 104)

# For "zoom": the longer side of the image against the side of the result. Evaluation sees images
# whose shorter side has that length, so photographs of 4 to 3 at a scale of 1.33.
ZOOM_RANGE = (0.8, 2.0)

# What is left of an object after the geometry has to have sides of so many pixels.
MIN_BOX_SIDE = 4.0

MOSAIC_PROBABILITY = 0.5

Loader = Callable[[int], tuple[Tensor, Tensor]]
Target = dict[str, Tensor]


class Augmentation:
    """Makes square training images.

    Args:
        names: any of
            ``"flip"``: mirrored left to right, half of the time;
            ``"zoom"``: scaled, then cropped or padded, at a random place
            (arXiv 2012.07177, large-scale jitter);
            ``"iou_crop"``: a random part that cuts no object beyond a random overlap
            (SSD, arXiv 1512.02325, section 2.2);
            ``"photometric"``: brightness, contrast, saturation, hue (same section);
            ``"mosaic"``: four images beside each other, half of the time (arXiv 2004.10934,
            section 3.3).

    Raises:
        ValueError: another name.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unknown = set(names) - set(AUGMENTATIONS)
        if unknown:
            raise ValueError(
                f"augmentation {', '.join(sorted(unknown))}; expected names of "
                f"{', '.join(AUGMENTATIONS)}."
            )
        self.names = frozenset(names)

    def __call__(
        self, load: Loader, num_images: int, index: int, seed: int, side: int
    ) -> tuple[Tensor, Tensor]:
        """Make one image.

        Args:
            load: gives the picture ``(3, H, W)`` in uint8, which stays as it is, and the boxes
                ``(M, 5)``, in its pixels, of an index.
            num_images: how many there are.
            index: the image to make.
            seed: of everything that is random.
            side: of the result, in pixels.

        Returns:
            The picture ``(3, side, side)`` in uint8 and its boxes ``(M, 5)``: x1, y1, x2, y2, class
            id.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and not that of the GPU
            indices = [index]
            if "mosaic" in self.names and torch.rand(()) < MOSAIC_PROBABILITY:
                indices += torch.randint(num_images, (3,)).tolist()
            pictures = [
                _with_boxes(pixels, boxes[:, :4], boxes[:, 4])
                for pixels, boxes in map(load, indices)
            ]
            picture = pictures[0] if len(pictures) == 1 else self._mosaic(pictures, side)
            steps = self._geometry(picture[0].shape[1:], side)
            if "photometric" in self.names:  # for colours, Pillow is the faster one
                steps += [v2.ToPILImage(), v2.RandomPhotometricDistort(p=0.5), v2.PILToTensor()]
            pixels, target = v2.Compose(steps)(*picture)
        boxes = target["boxes"].as_subclass(Tensor)
        boxes = torch.cat([boxes, target["labels"][:, None]], dim=1)
        return pixels.as_subclass(Tensor), boxes

    def _geometry(self, size: Sequence[int], side: int) -> list[v2.Transform]:
        # Of a strip that is a hundred times as long as wide, zoom would leave nothing.
        zoom = "zoom" in self.names and min(size) * side * ZOOM_RANGE[0] > 2 * max(size)
        steps: list[v2.Transform] = []
        if "iou_crop" in self.names:
            steps.append(v2.RandomIoUCrop())
        if zoom:
            steps.append(v2.ScaleJitter((side, side), ZOOM_RANGE))
            steps.append(v2.RandomCrop(side, pad_if_needed=True, fill=FILL))
        else:
            steps += [v2.Resize(side), v2.CenterCrop(side)]
        steps.append(v2.SanitizeBoundingBoxes(min_size=MIN_BOX_SIDE))
        if "flip" in self.names:
            steps.append(v2.RandomHorizontalFlip())
        return steps

    @staticmethod
    def _mosaic(parts: list[tuple[Tensor, Target]], side: int) -> tuple[Tensor, Target]:
        """Four images, each cut to a square of ``side``, as the quarters of one."""
        whole = torch.empty(3, 2 * side, 2 * side, dtype=torch.uint8)
        boxes, labels = [], []
        to_square = v2.Compose([v2.Resize(side), v2.RandomCrop(side), v2.SanitizeBoundingBoxes()])
        for number, part in enumerate(parts):
            pixels, target = to_square(*part)
            left, top = side * (number % 2), side * (number // 2)
            whole[:, top : top + side, left : left + side] = pixels
            boxes.append(target["boxes"].as_subclass(Tensor) + torch.tensor([left, top] * 2))
            labels.append(target["labels"])
        return _with_boxes(whole, torch.cat(boxes), torch.cat(labels))


def _with_boxes(pixels: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Target]:
    """The picture and its boxes as ``torchvision.transforms.v2`` takes them."""
    size = tuple(pixels.shape[1:])
    return tv_tensors.Image(pixels), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": labels,
    }
