"""The command line: train, evaluate and score one-stage detectors.

    fcos train                          generate the embedded data set, train, evaluate
    fcos train --data DIR               the same on a folder in VOC layout
    fcos eval CHECKPOINT --data DIR     mAP of a trained detector
    fcos score DIR                      mAP of a folder of text files
    fcos data shapes|voc2007 DIR        make or download a data set

``fcos COMMAND --help`` lists the options. This is the only file that knows all the others; it
imports what is heavy when a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from a4_helper import VOC2007DetectionTiny
    from one_stage_detector import FCOS

# What `fcos train` does on photographs: the assignment's model and schedule.
ASSIGNMENT_DEFAULTS: dict[str, Any] = {
    "iters": 9000,
    "batch_size": 16,
    "lr": 8e-3,
    "optimizer": "sgd",
    "schedule": "step",
    "warmup_iters": 0,
    "max_grad_norm": None,
    "amp": "off",
    "image_size": 224,
    "fpn_channels": 128,
    "stem": [128, 128],
    "weights": "default",
}

# And on the generated set, where a small model learns from random weights in minutes.
SHAPES_DEFAULTS: dict[str, Any] = {
    "iters": 850,
    "batch_size": 16,
    "lr": 2e-3,
    "optimizer": "adamw",
    "schedule": "cosine",
    "warmup_iters": 100,
    "max_grad_norm": 5.0,
    "amp": "auto",
    "image_size": 128,
    "fpn_channels": 64,
    "stem": [64, 64],
    "weights": "none",
}

# Average precision is the area under the whole curve, so evaluation keeps detections with low
# scores, too. The assignment's own evaluation uses 0.4.
EVAL_SCORE_THRESH = 0.05
EVAL_NMS_THRESH = 0.6

# Pictures are for people: only what the detector is confident of.
SHEET_SCORE_THRESH = 0.4
SHEET_IMAGES = 12


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for wrong input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"fcos: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fcos: interrupted", file=sys.stderr)
        return 130
    return 0


# --------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcos", description="FCOS, a one-stage object detector: train, evaluate, score."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a detector and evaluate it",
        description="Train a detector and evaluate it. Without --data, on the generated set. "
        "Leaves checkpoint.pt, history.json, loss.png, metrics.json, ap.png and detections.png.",
    )
    train.set_defaults(run=_train)
    train.add_argument(
        "--data", metavar="DIR", help="folder in VOC layout; class names come from the data"
    )
    train.add_argument("--out", metavar="DIR", help="new folder for results (runs/NAME)")
    train.add_argument("--iters", type=_positive_int, metavar="N", help="optimizer steps")
    train.add_argument("--batch-size", type=_positive_int, metavar="N", help="images a step")
    train.add_argument("--lr", type=_positive_float, metavar="X", help="learning rate")
    train.add_argument("--optimizer", choices=("sgd", "adamw"))
    train.add_argument(
        "--amp", choices=("auto", "off"), help="bfloat16 where the processor has it, or float32"
    )
    train.add_argument(
        "--image-size", type=_positive_int, metavar="N", help="shorter side in pixels"
    )
    train.add_argument(
        "--backbone",
        metavar="NAME",
        default="regnet_x_400mf",
        help="torchvision classification network, or timm:NAME (regnet_x_400mf)",
    )
    train.add_argument(
        "--weights",
        metavar="default|none|FILE",
        help="of the backbone: ImageNet weights, random ones, or a state dict",
    )
    train.add_argument("--fpn-channels", type=_positive_int, metavar="N", help="FPN width")
    train.add_argument(
        "--stem", type=_int_list, metavar="N,N", help="channels of the head's convolutions"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="of everything (0)")
    _add_machine_options(train)

    evaluate = commands.add_parser("eval", help="mAP of a trained detector")
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="file written by fcos train")
    evaluate.add_argument("--data", metavar="DIR", required=True, help="folder in VOC layout")
    evaluate.add_argument("--split", default="val", help="list in ImageSets/Main (val)")
    evaluate.add_argument(
        "--score-thresh",
        type=_fraction,
        default=EVAL_SCORE_THRESH,
        metavar="X",
        help=f"detections score above it ({EVAL_SCORE_THRESH})",
    )
    evaluate.add_argument(
        "--nms-thresh",
        type=_fraction,
        default=EVAL_NMS_THRESH,
        metavar="X",
        help=f"IoU above which the lower of two is dropped ({EVAL_NMS_THRESH})",
    )
    evaluate.add_argument(
        "--export", metavar="DIR", help="write detections and ground truth as text files"
    )
    evaluate.add_argument("--json", metavar="FILE", help="write the metrics as JSON")
    _add_machine_options(evaluate)

    score = commands.add_parser("score", help="mAP of a folder of text files")
    score.set_defaults(run=_score)
    score.add_argument(
        "folder", metavar="DIR", help="folder with detection-results/ and ground-truth/"
    )
    score.add_argument("--json", metavar="FILE", help="write the metrics as JSON")
    score.add_argument(
        "--figure", metavar="FILE", help="where to draw the AP of every class (DIR/ap.png)"
    )

    data = commands.add_parser("data", help="make or download a data set")
    kinds = data.add_subparsers(title="data sets", required=True, metavar="KIND")
    shapes = kinds.add_parser("shapes", help="draw the generated set")
    shapes.set_defaults(run=_data_shapes)
    shapes.add_argument("folder", metavar="DIR")
    shapes.add_argument("--train", type=_positive_int, default=800, metavar="N", help="(800)")
    shapes.add_argument("--val", type=_positive_int, default=200, metavar="N", help="(200)")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    voc2007 = kinds.add_parser("voc2007", help="download PASCAL VOC 2007 train and val")
    voc2007.set_defaults(run=_data_voc2007)
    voc2007.add_argument("folder", metavar="DIR")
    return parser


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--workers", type=_natural, metavar="N", help="processes that load data (up to 4)"
    )


def _positive_int(text: str) -> int:
    return _checked(int, text, lambda value: value >= 1, "a whole number of at least 1")


def _natural(text: str) -> int:
    return _checked(int, text, lambda value: value >= 0, "a whole number of at least 0")


def _positive_float(text: str) -> float:
    return _checked(float, text, lambda value: 0 < value < float("inf"), "a positive number")


def _fraction(text: str) -> float:
    return _checked(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _int_list(text: str) -> list[int]:
    return [_positive_int(part) for part in text.split(",")] if text else []


def _checked(kind, text: str, accepts, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text!r} given; expected {expected}")
    return value


# --------------------------------------------------------------------------------------------
# Commands
# --------------------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    import torch

    from a4_helper import train_detector
    from eecs598 import reset_seed
    from eecs598.checkpoint import save_checkpoint
    from eecs598.files import write_json
    from eecs598.voc import class_names

    data = args.data if args.data is not None else _embedded_shapes()
    defaults = ASSIGNMENT_DEFAULTS if args.data is not None else SHAPES_DEFAULTS
    given = vars(args)
    chosen = {key: given[key] for key in defaults if given.get(key) is not None}
    settings = {**defaults, **chosen, "backbone": args.backbone, "seed": args.seed}
    device = _device(args.device)

    classes = class_names(data)
    train_set = _dataset(data, "train", settings["image_size"], classes)
    val_set = _dataset(data, "val", settings["image_size"], classes)
    print(f"{len(train_set)} training and {len(val_set)} validation images, classes: {classes}")
    name = f"{Path(data).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = _make_empty(Path(args.out if args.out is not None else f"runs/{name}"), "--out")

    reset_seed(args.seed)
    detector = _build_detector(settings, len(classes), settings["weights"])
    train_loader = torch.utils.data.DataLoader(
        train_set,
        batch_size=settings["batch_size"],
        shuffle=True,
        # A last batch of one or two images would disturb the batch-norm statistics.
        drop_last=len(train_set) >= settings["batch_size"],
        num_workers=_workers(args.workers),
        persistent_workers=_workers(args.workers) > 0,
        pin_memory=device == "cuda",
        generator=torch.Generator().manual_seed(args.seed),
    )
    history = train_detector(
        detector,
        train_loader,
        learning_rate=settings["lr"],
        max_iters=settings["iters"],
        log_period=max(1, min(100, settings["iters"] // 10)),
        device=device,
        plot_path=out / "loss.png",
        **{
            key: settings[key]
            for key in ("optimizer", "schedule", "warmup_iters", "max_grad_norm", "amp")
        },
    )
    checkpoint = out / "checkpoint.pt"
    save_checkpoint(
        checkpoint, detector.state_dict(), settings, classes, iteration=settings["iters"]
    )
    write_json(out / "history.json", history)

    loader = _test_loader(val_set, args.workers, device)
    result = _evaluate(detector, loader, EVAL_SCORE_THRESH, EVAL_NMS_THRESH, device)
    result.update(checkpoint=str(checkpoint), split="val")
    _report(result, json_path=out / "metrics.json", figure_path=out / "ap.png")
    _draw_sheet(detector, val_set, out / "detections.png", device)
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def _eval(args: argparse.Namespace) -> None:
    from eecs598.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(args.checkpoint)
    settings, classes = checkpoint["settings"], checkpoint["classes"]
    device = _device(args.device)
    dataset = _dataset(args.data, args.split, settings["image_size"], classes)
    detector = _build_detector(settings, len(classes), "none")
    try:
        detector.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise ValueError(
            f"{args.checkpoint} holds the weights of another model than its settings say: {error}"
        ) from error
    if args.export is not None:
        _make_empty(Path(args.export), "--export")
    loader = _test_loader(dataset, args.workers, device)
    result = _evaluate(
        detector, loader, args.score_thresh, args.nms_thresh, device, export=args.export
    )
    result.update(checkpoint=str(args.checkpoint), split=args.split)
    _report(result, json_path=args.json)


def _score(args: argparse.Namespace) -> None:
    from eecs598.metrics import score_folder

    figure = args.figure if args.figure is not None else Path(args.folder) / "ap.png"
    _report(score_folder(args.folder), json_path=args.json, figure_path=figure)


def _data_shapes(args: argparse.Namespace) -> None:
    from eecs598.shapes import write_shapes

    folder = write_shapes(args.folder, num_train=args.train, num_val=args.val, seed=args.seed)
    print(f"{args.train} training and {args.val} validation images in {folder}")


def _data_voc2007(args: argparse.Namespace) -> None:
    from eecs598.voc import download_voc2007

    print(f"PASCAL VOC 2007 in {download_voc2007(args.folder)}")


# --------------------------------------------------------------------------------------------
# Steps that commands share
# --------------------------------------------------------------------------------------------


def _embedded_shapes() -> Path:
    """The generated set in the user's cache folder, drawn on first use."""
    from eecs598.shapes import write_shapes

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "eecs598-fcos" / "shapes"
    print(f"generated data set: {folder}")
    return write_shapes(folder)


def _make_empty(folder: Path, option: str) -> Path:
    """Make a folder; one that holds something already is left alone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another one with {option}.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda was given, but PyTorch sees no CUDA GPU; use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def _workers(given: int | None) -> int:
    return given if given is not None else min(4, os.cpu_count() or 1)


def _dataset(
    data: str | Path, split: str, image_size: int, classes: list[str]
) -> VOC2007DetectionTiny:
    from a4_helper import VOC2007DetectionTiny

    return VOC2007DetectionTiny(data, split, image_size=image_size, classes=classes)


def _test_loader(dataset: VOC2007DetectionTiny, workers: int | None, device: str) -> DataLoader:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset, batch_size=1, num_workers=_workers(workers), pin_memory=device == "cuda"
    )


def _build_detector(settings: dict[str, Any], num_classes: int, weights: str) -> FCOS:
    """Build FCOS; unlike in a notebook, a start without the wanted weights is an error."""
    from common import PretrainedWeightsWarning
    from one_stage_detector import FCOS

    names = {"default": "DEFAULT", "none": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainedWeightsWarning)
        try:
            return FCOS(
                num_classes,
                settings["fpn_channels"],
                settings["stem"],
                backbone=settings["backbone"],
                weights=names.get(weights, weights),
            )
        except PretrainedWeightsWarning as warning:
            raise ValueError(
                f"{warning}\nGive the backbone's weights as --weights FILE, or start from random "
                "ones on purpose with --weights none."
            ) from None


def _evaluate(
    detector: FCOS,
    loader: DataLoader,
    score_thresh: float,
    nms_thresh: float,
    device: str,
    export: str | None = None,
) -> dict[str, Any]:
    """Metrics of a detector; with ``export``, also the text files that `fcos score` reads."""
    from a4_helper import iterate_detections
    from eecs598.metrics import average_precision, write_text_format

    classes = list(loader.dataset.class_to_idx)
    predictions, targets = [], []
    for path, _, prediction, target in iterate_detections(
        detector, loader, score_thresh, nms_thresh, device=device
    ):
        predictions.append(prediction)
        targets.append(target)
        if export is not None:
            write_text_format(export, Path(path).stem, prediction, target, classes)
    result = average_precision(predictions, targets, classes)
    result.update(
        score_thresh=score_thresh, nms_thresh=nms_thresh, image_size=loader.dataset.image_size
    )
    return result


def _report(
    result: dict[str, Any],
    json_path: str | Path | None = None,
    figure_path: str | Path | None = None,
) -> None:
    from eecs598.files import write_json
    from eecs598.metrics import format_table, plot_average_precision

    print(format_table(result))
    if json_path is not None:
        write_json(json_path, result)
    if figure_path is not None:
        plot_average_precision(result, figure_path)


def _draw_sheet(detector: FCOS, dataset: VOC2007DetectionTiny, path: Path, device: str) -> None:
    """Draw detections on images spread evenly over a data set."""
    from torch.utils.data import DataLoader, Subset

    from a4_helper import iterate_detections, prediction_rows, target_rows
    from eecs598.utils import contact_sheet

    count = min(SHEET_IMAGES, len(dataset))
    chosen = Subset(dataset, [i * len(dataset) // count for i in range(count)])
    pictures = [
        (image, target_rows(target), prediction_rows(prediction))
        for _, image, prediction, target in iterate_detections(
            detector, DataLoader(chosen), SHEET_SCORE_THRESH, EVAL_NMS_THRESH, device=device
        )
    ]
    contact_sheet(pictures, dataset.idx_to_class, path)


if __name__ == "__main__":
    sys.exit(main())
