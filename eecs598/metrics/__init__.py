"""Detections matched to ground truth, and every measure made from the matches."""

from eecs598.metrics.average_precision import (
    PrecisionRecall,
    average_precision,
    curves_of_matches,
    format_table,
    plot_average_precision,
    precision_recall,
    score_folder,
    score_matches,
)
from eecs598.metrics.bootstrap import DifferenceResult, bootstrap_difference, bootstrap_map
from eecs598.metrics.coco import coco_metrics
from eecs598.metrics.diagnostics import Smell, find_folder_smells, find_smells
from eecs598.metrics.errors import ErrorAnalysis, analyse_errors, confusion_matrix
from eecs598.metrics.evaluation import Evaluation, image_names
from eecs598.metrics.matching import Matches, check_class_names, match_detections
from eecs598.metrics.text_format import TextFormat, read_text_format, write_text_format

__all__ = [
    "DifferenceResult",
    "ErrorAnalysis",
    "Evaluation",
    "Matches",
    "PrecisionRecall",
    "Smell",
    "TextFormat",
    "analyse_errors",
    "average_precision",
    "bootstrap_difference",
    "bootstrap_map",
    "check_class_names",
    "coco_metrics",
    "confusion_matrix",
    "curves_of_matches",
    "find_folder_smells",
    "find_smells",
    "format_table",
    "image_names",
    "match_detections",
    "plot_average_precision",
    "precision_recall",
    "read_text_format",
    "score_folder",
    "score_matches",
    "write_text_format",
]
