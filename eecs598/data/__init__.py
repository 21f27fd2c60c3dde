"""Data: read VOC or COCO annotations, load and augment images, sample batches."""

from eecs598.data.augment import AUGMENTATIONS, Augmentation
from eecs598.data.check import check_data
from eecs598.data.check_report import DataReport, format_problems, format_report
from eecs598.data.image_cache import ImageCache
from eecs598.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFiles,
    LoadedImage,
    annotated_size,
    find_images,
    normalize,
    orientation_of,
    read_annotated_image,
    read_image,
    resize_shorter_side,
    resized_size,
    shows_upright,
    to_pixels,
    unnormalize,
)
from eecs598.data.index import IGNORED, Instance, class_names, load_index, load_instances
from eecs598.data.locations import Level
from eecs598.data.sampling import Sample, TrainingSampler
from eecs598.data.shapes import CLASSES as SHAPES_CLASSES
from eecs598.data.shapes import shapes_folder, write_shapes
from eecs598.data.training_set import (
    MAX_CACHE_BYTES,
    AnnotatedImages,
    Item,
    TrainingSet,
    crop_center,
    make_item,
)
from eecs598.data.voc import VOC2007_CLASSES
from eecs598.data.voc_download import download_voc2007

__all__ = [
    "AUGMENTATIONS",
    "AnnotatedImages",
    "Augmentation",
    "IGNORED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataReport",
    "ImageCache",
    "ImageFiles",
    "Instance",
    "Item",
    "Level",
    "LoadedImage",
    "MAX_CACHE_BYTES",
    "SHAPES_CLASSES",
    "Sample",
    "TrainingSampler",
    "TrainingSet",
    "VOC2007_CLASSES",
    "annotated_size",
    "check_data",
    "class_names",
    "crop_center",
    "download_voc2007",
    "find_images",
    "format_problems",
    "format_report",
    "load_index",
    "load_instances",
    "make_item",
    "normalize",
    "orientation_of",
    "read_annotated_image",
    "read_image",
    "resize_shorter_side",
    "resized_size",
    "shapes_folder",
    "shows_upright",
    "to_pixels",
    "unnormalize",
    "write_shapes",
]
