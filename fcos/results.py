"""What ``fcos train`` leaves at its end: text files, report, figures, what the run has used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fcos.evaluate import export_text, print_results, write_report
from fcos.options import EVAL_NMS_THRESH
from fcos.predict import draw_examples

if TYPE_CHECKING:
    from a4_helper import VOC2007DetectionTiny
    from eecs598.metrics import Evaluation
    from eecs598.training import RunDescription
    from one_stage_detector import FCOS

__all__ = ["write_results"]


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
