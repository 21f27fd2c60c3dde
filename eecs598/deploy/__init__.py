"""Deployment: detect objects in image files with a trained detector."""

from eecs598.deploy.prediction import detect, picture_names, to_json, write_picture

__all__ = ["detect", "picture_names", "to_json", "write_picture"]
