"""Make the weights that come along, and the figures of their model card, from a training run.

    python -m fcos.publish_weights RUN [--data DIR] [--name voc2007]

The weights are rounded to float16 first and evaluated as they are shipped. Written are
``eecs598/deploy/weights/NAME.safetensors``, the figures in ``docs/model-card.md`` and the picture
``docs/cat-detections.jpg``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from a4_helper import VOC2007DetectionTiny
from eecs598.deploy import WEIGHTS_FOLDER, read_checkpoint, write_weights
from eecs598.metrics import bootstrap_map
from eecs598.report import analyze
from eecs598.runtime import atomic_write
from eecs598.training import RunDescription
from fcos import cli
from fcos.evaluate import evaluate
from fcos.model_card import write_card
from fcos.models import load_detector
from fcos.options import EVAL_NMS_THRESH

__all__ = ["draw_cat", "main", "publish"]

DOCS = Path(__file__).resolve().parents[1] / "docs"
LIMIT = 12_000_000  # bytes

LICENSE = (
    "The code that trained these weights is under the MIT license. The backbone started from "
    "tf_efficientnet_lite0 of timm (Apache-2.0). The photographs of PASCAL VOC 2007 are under the "
    "terms of Flickr and their authors; none is included."
)


def main() -> None:
    """Publish the weights of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--data", metavar="DIR", help="data set to evaluate on (that of the run)")
    parser.add_argument("--split", default="val", help="list in ImageSets/Main (val)")
    parser.add_argument("--name", default="voc2007", help="of the weights (voc2007)")
    parser.add_argument("--license", default=LICENSE, help="text for the metadata")
    parser.add_argument("--workers", type=int, default=1, help="processes that load images (1)")
    args = parser.parse_args()
    path = publish(
        args.run,
        args.name,
        data=args.data,
        split=args.split,
        license=args.license,
        workers=args.workers,
    )
    write_card(DOCS / "model-card.md", read_checkpoint(args.name), path.stat().st_size)
    draw_cat(args.name, DOCS / "cat.jpg", DOCS / "cat-detections.jpg")


def publish(
    run: Path,
    name: str,
    *,
    data: str | None = None,
    split: str = "val",
    license: str = LICENSE,
    workers: int = 0,
) -> Path:
    """Evaluate the weights of a run as they will be shipped, and write them with the result.

    Args:
        run: folder of the run; ``best.pt`` is taken where there is one, else ``checkpoint.pt``.
        name: that the weights will have.
        data: folder of the data set; that of the run unless given.
        split: to evaluate on.
        license: text for the metadata.
        workers: processes that load images.

    Returns:
        The file with the weights.

    Raises:
        ValueError: no run, no checkpoint, a file over the limit, or data without ground truth.
    """
    description = RunDescription.read(run)
    best = run / "best.pt"
    source = best if best.is_file() else run / "checkpoint.pt"
    checkpoint = read_checkpoint(source)
    settings = _without_paths(checkpoint["settings"])
    content = {
        "settings": settings,
        "classes": checkpoint["classes"],
        "image_size": settings["data"]["image_size"],
        "training_data": {
            "name": Path(description.data).name,
            "split": "train",
            "images": description.contents["train"]["images"],
            "objects": sum(description.contents["train"]["objects"].values()),
        },
        "iteration": checkpoint["iteration"],
        "commit": description.environment[-1]["commit"],
        "license": license,
    }
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / f"{name}.safetensors"
        write_weights(rounded, checkpoint["model"], **content)
        content["metrics"] = _evaluate(rounded, data or description.data, split, workers)
        write_weights(rounded, checkpoint["model"], **content)
        size = rounded.stat().st_size
        if size > LIMIT:
            raise ValueError(f"the weights take {size:,} bytes; at most {LIMIT:,} are shipped.")
        target = WEIGHTS_FOLDER / rounded.name
        with atomic_write(target) as unfinished:
            shutil.copyfile(rounded, unfinished)
    print(f"{target}: {size:,} bytes, mAP {100 * content['metrics']['mAP']:.2f} %")
    return target


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the path of the backbone's weights by the file's name."""
    model = settings["model"]
    return {**settings, "model": {**model, "weights": Path(model["weights"]).name}}


def _evaluate(weights: Path, data: str, split: str, workers: int) -> dict[str, Any]:
    """Evaluate weights; return what of ``metrics.json`` the metadata and the card need."""
    model = load_detector(weights, backbone="")
    dataset = VOC2007DetectionTiny(
        data,
        split,
        image_size=model.settings.data.image_size,
        classes=model.class_names,
        crop=False,
    )
    evaluation = evaluate(model.detector, dataset, workers, "cpu")
    metrics = analyze(evaluation).metrics
    if evaluation.devkit_matches is not None:
        interval = bootstrap_map(evaluation.devkit_matches)
        metrics["devkit"]["interval"] = [interval.low, interval.high]
    kept = (
        "mAP",
        "interval",
        "mAP_11_point",
        "score_thresh",
        "num_images",
        "AP",
        "errors",
        "coco",
        "devkit",
        "best_f1",
        "best_threshold",
    )
    return {
        **{key: metrics[key] for key in kept},
        "nms_thresh": EVAL_NMS_THRESH,
        "split": split,
        "date": time.strftime("%Y-%m-%d"),
    }


def draw_cat(name: str, photo: Path, picture: Path) -> None:
    """Draw what `fcos predict` finds in a photo, with its own defaults.

    Raises:
        ValueError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if cli.main(["predict", name, str(photo), "--out", str(out), "--workers", "0"]) != 0:
            raise ValueError(f"`fcos predict {name} {photo}` failed.")
        with atomic_write(picture) as unfinished:
            shutil.copyfile(out / f"{photo.stem}.jpg", unfinished)


if __name__ == "__main__":
    main()
