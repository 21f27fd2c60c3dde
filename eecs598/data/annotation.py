"""What a data set says about one image, in the one form that VOC and COCO are read into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ImageAnnotation"]


@dataclass
class ImageAnnotation:
    """One image of a data set, with all its objects.

    Attributes:
        path: of the image file, absolute.
        objects: ``{"name": str, "xyxy": [x1, y1, x2, y2], "difficult": bool}`` for each object.
            Crowd regions of COCO count as difficult, as in the mAP they count neither way, too.
        size: height and width of the image that was annotated, or None where it is not given.
        difficult_known: whether the source has the difficult objects. The course's JSON index
            leaves them out.
    """

    path: Path
    objects: list[dict[str, Any]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    difficult_known: bool = True

    @property
    def ordinary(self) -> list[dict[str, Any]]:
        """The objects that are not difficult, with the keys of the course's index."""
        return [
            {"name": item["name"], "xyxy": item["xyxy"]}
            for item in self.objects
            if not item["difficult"]
        ]
