"""Deployment: detect objects in image files with a trained detector, some of which come along."""

from eecs598.deploy.demo import launch_demo
from eecs598.deploy.journal import Journal, Totals
from eecs598.deploy.onnx import (
    OPSET,
    ExportCheck,
    OnnxDescription,
    OnnxDetector,
    check_onnx_device,
    export_onnx,
    missing_onnx_packages,
)
from eecs598.deploy.prediction import detect, picture_names, to_json, write_picture
from eecs598.deploy.pretrained import (
    WEIGHTS_FOLDER,
    pretrained_names,
    read_checkpoint,
    write_weights,
)

__all__ = [
    "OPSET",
    "WEIGHTS_FOLDER",
    "ExportCheck",
    "Journal",
    "OnnxDescription",
    "OnnxDetector",
    "Totals",
    "check_onnx_device",
    "detect",
    "export_onnx",
    "launch_demo",
    "missing_onnx_packages",
    "picture_names",
    "pretrained_names",
    "read_checkpoint",
    "to_json",
    "write_picture",
    "write_weights",
]
