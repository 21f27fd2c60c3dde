"""The figures in the model card of weights that come along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eecs598.runtime import atomic_write

__all__ = ["BEGIN", "END", "write_card"]

# Around the figures, which each publication replaces.
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def write_card(card: Path, content: dict[str, Any], size: int) -> None:
    """Put the figures into the model card.

    Args:
        card: the page; its figures are between two comments.
        content: what ``read_checkpoint`` returns.
        size: of the file with the weights, in bytes.

    Raises:
        ValueError: the page does not have the two comments.
    """
    text = card.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{card} has not {BEGIN} and {END}, once each, around its figures.")
    block = f"{BEGIN}\n\n{_figures(content, size)}\n\n{END}"
    with atomic_write(card) as unfinished:
        unfinished.write_text(pattern.sub(lambda _: block, text), encoding="utf-8")


def _figures(content: dict[str, Any], size: int) -> str:
    metrics, data = content["metrics"], content["training_data"]
    ranked = sorted(metrics["AP"].items(), key=lambda item: -item[1])
    gains = sorted(metrics["errors"]["gains"].items(), key=lambda item: -item[1])
    rows = []
    rules = {"the course's rule": metrics, "the VOC devkit's rule": metrics["devkit"]}
    for rule, result in rules.items():
        if result is not None:
            low, high = map(_percent, result["interval"])
            interval = f"95 % interval {low} to {high}"
            rows += [
                (f"mAP at IoU 0.5 by {rule}", f"{_percent(result['mAP'])} ({interval})"),
                ("the same with the 11 points of VOC 2007", _percent(result["mAP_11_point"])),
            ]
    coco = metrics["coco"]
    if coco is not None:
        rows += [
            (f"COCO {key}", _percent(value))
            for key, value in coco.items()
            if key.startswith("AP") and value is not None
        ]
    rows += [
        (
            "evaluated on",
            f"`{metrics['split']}`, {metrics['num_images']} images, shorter side "
            f"{content['image_size']} px, score threshold {metrics['score_thresh']:g}, "
            f"NMS threshold {metrics['nms_thresh']:g}",
        ),
        (
            "trained on",
            f"`{data['split']}`, {data['images']} images with {data['objects']} objects, "
            f"{content['iteration']} iterations",
        ),
        ("backbone", f"`{content['settings']['model']['backbone']}`"),
        (
            "best F1 over all classes",
            f"{metrics['best_f1']:.2f} at a score of {metrics['best_threshold']:.2f}"
            if metrics["best_threshold"] is not None
            else "none",
        ),
        ("size of the file", f"{size / 1e6:.1f} MB"),
        (
            "measured",
            f"{metrics['date']}, trained at commit {content['commit'][:7]}"
            if content["commit"]
            else metrics["date"],
        ),
    ]
    kinds = "; ".join(f"{kind} {100 * gain:.1f}" for kind, gain in gains)
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "Points of mAP that repairing each kind of error would gain: " + kinds + ".",
            "",
            "| class | AP |",
            "|---|---|",
            *(f"| {name} | {_percent(value)} |" for name, value in ranked),
        ]
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
