"""What ``fcos eval`` and ``fcos train`` leave at their end: text files, report, figures."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos.options import EVAL_NMS_THRESH
from fcos.predict import draw_examples

if TYPE_CHECKING:
    from a4_helper import VOC2007DetectionTiny
    from eecs598.metrics import Evaluation
    from eecs598.report import Comparison
    from eecs598.training import RunDescription
    from one_stage_detector import FCOS

__all__ = ["export_text", "print_results", "write_report", "write_results"]


def export_text(evaluation: Evaluation, folder: Path, *, keep_difficult: bool = False) -> None:
    """Write detections and ground truth as the text files that ``fcos score`` reads.

    Args:
        evaluation: to write, in pixels of the original images.
        folder: for the files.
        keep_difficult: write difficult objects, too, and mark them.
    """
    from eecs598.metrics import image_names, write_text_format

    names = image_names(evaluation.image_paths)
    targets = evaluation.devkit_targets if keep_difficult else evaluation.targets
    results = zip(names, evaluation.predictions, targets, strict=True)
    for name, prediction, target in results:
        write_text_format(folder, name, prediction, target, evaluation.class_names)


def write_report(
    evaluation: Evaluation,
    out: Path,
    facts: dict[str, Any],
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """Write ``report.html`` and ``metrics.json``.

    Args:
        evaluation: what the report is about.
        out: folder for the files.
        facts: ``checkpoint``, ``data``, ``split``, ``image_size`` and ``nms_thresh``; they go into
            both files.
        comparison: with another evaluation of the same images.

    Returns:
        What ``metrics.json`` holds.
    """
    from eecs598 import report
    from eecs598.runtime import describe_environment, write_json

    analysis = report.analyze(evaluation)
    environment = describe_environment()
    metrics = {**analysis.metrics, **facts, "environment": environment}
    if comparison is not None:
        metrics["comparison"] = {"with": comparison.name, **comparison.difference.to_dict()}
    write_json(out / "metrics.json", metrics)
    report.write_report(
        out / "report.html",
        analysis,
        title=f"{Path(facts['data']).resolve().name} {facts['split']}",
        facts=[
            facts["checkpoint"],
            f"shorter side {facts['image_size']} px",
            f"score threshold {evaluation.score_thresh:g}",
            f"NMS threshold {facts['nms_thresh']:g}",
        ],
        footer=f"{time.strftime('%Y-%m-%d')}, commit {environment['commit']}, "
        f"PyTorch {environment['packages']['torch']}",
        comparison=comparison,
    )
    return metrics


def print_results(metrics: dict[str, Any], comparison: Comparison | None = None) -> None:
    """Print the table of classes, the mAP by both rules, how it compares and what looks wrong."""
    from eecs598.metrics import format_table

    print(format_table(metrics))
    low, high = metrics["interval"]
    print(
        f"mAP by the course's rule {100 * metrics['mAP']:.2f}: difficult objects do not exist; "
        f"95 % interval {100 * low:.2f} to {100 * high:.2f}"
    )
    devkit = metrics["devkit"]
    print(
        "mAP by the devkit's rule not known: the course's index leaves difficult objects out"
        if devkit is None
        else f"mAP by the devkit's rule {100 * devkit['mAP']:.2f}: a match to one of "
        f"{devkit['num_difficult']} difficult objects counts neither way"
    )
    if comparison is not None:
        result = comparison.difference
        print(
            f"{100 * result.difference:+.2f} against {comparison.name}, 95 % interval "
            f"{100 * result.low:+.2f} to {100 * result.high:+.2f}: "
            + ("more than chance explains" if result.exceeds else "may be chance")
        )
    for message in metrics["diagnostics"]:
        print(f"warning: {message}", file=sys.stderr)


def write_results(
    description: RunDescription,
    detector: FCOS,
    val_set: VOC2007DetectionTiny,
    evaluation: Evaluation,
    history: dict[str, list[float]],
    usage: dict[str, Any],
    device: str,
) -> None:
    """Write the files of a run that is complete, and print what they hold.

    Args:
        description: of the run; what it has used goes into its ``run.json``.
        detector: that was trained.
        val_set: images to draw detections on.
        evaluation: of the detector on these images.
        history: of the losses.
        usage: as ``eecs598.training.UsageMeter`` returns it.
        device: of the detector.
    """
    from eecs598.metrics import plot_average_precision
    from eecs598.runtime import write_json
    from eecs598.training import describe_usage

    out = description.out
    description.environment[-1]["usage"] = usage
    description.write()
    write_json(out / "history.json", history)
    export_text(evaluation, out)
    facts = {
        "checkpoint": str(out / "checkpoint.pt"),
        "data": description.data,
        "split": "val",
        "image_size": description.settings.data.image_size,
        "nms_thresh": EVAL_NMS_THRESH,
    }
    metrics = write_report(evaluation, out, facts)
    plot_average_precision(metrics, out / "ap.png")
    print_results(metrics)
    draw_examples(detector, val_set, out / "detections.png", device)
    print(describe_usage(usage))
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))
