"""Match detections to ground truth, and compute all metrics from the matches.

An evaluation is matched once, by ``match_detections`` or ``Evaluation.matches``; the measures take
the ``Matches``. ``average_precision`` and ``score_folder`` do both steps in one call.
"""

from eecs598.metrics.average_precision import (
    PrecisionRecall,
    average_precision,
    format_table,
    plot_average_precision,
    precision_recall,
    precision_recall_curves,
    score_folder,
    score_matches,
)
from eecs598.metrics.bootstrap import (
    BootstrapResult,
    DifferenceResult,
    bootstrap_difference,
    bootstrap_map,
)
from eecs598.metrics.coco import coco_metrics
from eecs598.metrics.diagnostics import Diagnostic, find_broken_numbers, find_diagnostics
from eecs598.metrics.errors import ErrorAnalysis, analyze_errors, confusion_matrix
from eecs598.metrics.evaluation import Evaluation, image_names
from eecs598.metrics.folder_diagnostics import find_folder_diagnostics
from eecs598.metrics.matching import Matches, Pairs, check_class_names, match_detections
from eecs598.metrics.text_format import TextFormat, read_text_format, write_text_format

__all__ = [
    "BootstrapResult",
    "Diagnostic",
    "DifferenceResult",
    "ErrorAnalysis",
    "Evaluation",
    "Matches",
    "Pairs",
    "PrecisionRecall",
    "TextFormat",
    "analyze_errors",
    "average_precision",
    "bootstrap_difference",
    "bootstrap_map",
    "check_class_names",
    "coco_metrics",
    "confusion_matrix",
    "find_broken_numbers",
    "find_diagnostics",
    "find_folder_diagnostics",
    "format_table",
    "image_names",
    "match_detections",
    "plot_average_precision",
    "precision_recall",
    "precision_recall_curves",
    "read_text_format",
    "score_folder",
    "score_matches",
    "write_text_format",
]
