"""A trained detector at work: any image file to boxes."""

from eecs598.deploy.prediction import detect, picture_names, to_json, write_picture

__all__ = ["detect", "picture_names", "to_json", "write_picture"]
