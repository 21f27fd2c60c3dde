"""Images and boxes: from files on disk to the items that a training run asks for."""

from eecs598.data.augment import Augmentation
from eecs598.data.check import check_data, format_report
from eecs598.data.image_cache import ImageCache
from eecs598.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFiles,
    LoadedImage,
    find_images,
    normalized,
    read_image,
    resize_shorter_side,
    resized_size,
    stored_size,
    to_pixels,
)
from eecs598.data.index import class_names, load_index
from eecs598.data.sampling import Sample, TrainingSampler
from eecs598.data.shapes import write_shapes
from eecs598.data.voc import VOC2007_CLASSES
from eecs598.data.voc_download import download_voc2007

__all__ = [
    "Augmentation",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageCache",
    "ImageFiles",
    "LoadedImage",
    "Sample",
    "TrainingSampler",
    "VOC2007_CLASSES",
    "check_data",
    "class_names",
    "download_voc2007",
    "find_images",
    "format_report",
    "load_index",
    "normalized",
    "read_image",
    "resize_shorter_side",
    "resized_size",
    "stored_size",
    "to_pixels",
    "write_shapes",
]
