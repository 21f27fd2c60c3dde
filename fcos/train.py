"""``fcos train``: train a detector and evaluate it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcos.evaluate import (
    evaluate,
    export_text,
    mean_average_precision,
    print_findings,
    print_metrics,
    write_report,
)
from fcos.options import (
    EVAL_NMS_THRESH,
    PICTURE_SCORE_THRESH,
    add_machine_options,
    choose_device,
    choose_workers,
    make_empty_folder,
    natural,
)

if TYPE_CHECKING:
    from torch import nn

    from a4_helper import VOC2007DetectionTiny
    from eecs598.metrics import Evaluation
    from one_stage_detector import FCOS

__all__ = ["add_options", "run"]

# What else a run keeps to when it goes on, but may change.
RUN_OPTIONS = {"checkpoint_every": 500, "keep_every": 0, "eval_every": 1500, "tensorboard": False}

SHEET_IMAGES = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    from eecs598.training import RECIPES

    parser.description = (
        "Train a detector and evaluate it. Without --data, on the generated set. The "
        "folder of the run gets run.json, checkpoint.pt, best.pt, history.jsonl and history.json, "
        "loss.png, report.html, metrics.json, ap.png, detections.png and, as text files, "
        "detections and ground truth."
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder in VOC layout, or with COCO's JSON; class names come from the data",
    )
    parser.add_argument("--out", metavar="DIR", help="new folder for results (runs/NAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training in --out, or with the latest one in runs/",
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="settings to start from: the assignment's, better ones, those for the generated set "
        "(handout with --data, otherwise shapes)",
    )
    for option, text in (
        ("checkpoint-every", "iterations between two checkpoints (500)"),
        ("keep-every", "keep the checkpoint of every N-th iteration (of none)"),
        ("eval-every", "iterations between two evaluations on val (1500)"),
    ):
        parser.add_argument(
            f"--{option}", type=natural, default=argparse.SUPPRESS, metavar="N", help=text
        )
    parser.add_argument(
        "--cache", action="store_true", help="keep the images in memory (up to 4 GB a split)"
    )
    parser.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="write the curves for TensorBoard, too",
    )
    add_machine_options(parser)
    _add_settings(parser)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting; only those that are given end up among the arguments."""
    import dataclasses

    from eecs598.training import Settings

    group = parser.add_argument_group("settings", "in place of those of the recipe")
    for field in dataclasses.fields(Settings):
        option = "--" + field.name.replace("_", "-")
        common = {"help": field.metadata["help"], "default": argparse.SUPPRESS}
        if field.type == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
            continue
        choices = field.metadata["choices"]
        if choices:
            mark = "," if field.type.startswith("tuple") else "|"
            common["metavar"] = mark.join(choices)
        else:
            common["metavar"] = (
                "N" if "int" in field.type else "X" if "float" in field.type else "S"
            )
        group.add_argument(option, type=_setting_parser(field.name), **common)


def _setting_parser(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        from eecs598.training import parse_setting

        try:
            return parse_setting(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def run(args: argparse.Namespace) -> int:
    from eecs598.runtime import is_main_process, process_group
    from eecs598.training import TrainingStopped

    with contextlib.ExitStack() as stack:
        device = stack.enter_context(process_group(choose_device(args.device)))
        if not is_main_process():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            _train_and_evaluate(args, device)
        except TrainingStopped as stopped:
            print(f"fcos: {stopped}", file=sys.stderr)
            return 128 + stopped.signal_number
    return 0


def _train_and_evaluate(args: argparse.Namespace, device: str) -> None:
    import torch

    from a4_helper import AugmentedTrainingSet, VOC2007DetectionTiny, plot_losses, train_detector
    from eecs598 import reset_seed
    from eecs598.data import TrainingSampler
    from eecs598.metrics import check_class_names
    from eecs598.runtime import claimed, gather, is_main_process, num_processes, rank, write_json
    from eecs598.training import Settings, TrainingRun, ignore_signals, precision_name
    from fcos.models import build_detector

    description = _resumed(args) if args.resume else _new_run(args)
    out, data, classes = Path(description["out"]), description["data"], description["classes"]
    settings = Settings.from_dict(description["settings"])
    if settings.batch_size % num_processes():
        raise ValueError(
            f"--batch-size {settings.batch_size} can't be shared evenly by {num_processes()} "
            "processes; choose a multiple."
        )
    # Augmentations, and batches of other sizes, start from the originals.
    varies = bool(settings.augment or settings.image_sizes)
    size = settings.image_size
    train_set, val_set = (
        VOC2007DetectionTiny(data, split, image_size=size, classes=classes, cache=cache)
        for split, cache in (("train", args.cache and not settings.augment), ("val", args.cache))
    )
    contents = {dataset.split: _contents(dataset) for dataset in (train_set, val_set)}
    if description.setdefault("contents", contents) != contents:
        raise ValueError(
            f"{data} has changed since the training in {out} began: it had "
            f"{description['contents']} and has {contents}. Bring back the old data, or start "
            "another training."
        )
    check_class_names(classes)
    for split, content in contents.items():
        if not any(content["objects"].values()):
            raise ValueError(
                f"{split} of {data} has no object that counts; `fcos data check {data}` shows what "
                "is there."
            )
    print(f"{len(train_set)} training and {len(val_set)} validation images, classes: {classes}")
    print(settings)

    description["environment"][-1] |= {
        "device": device,
        "processes": num_processes(),
        "precision": precision_name(device, settings.amp),
    }
    reset_seed(settings.seed)
    checkpoint = out / "checkpoint.pt"
    resume = gather(args.resume and checkpoint.is_file())[0]
    # The checkpoint holds the backbone's weights, too.
    detector = build_detector(settings, len(classes), "none" if resume else settings.weights)

    evaluation: Evaluation | None = None  # the last one

    def validate(model: nn.Module) -> dict[str, float]:
        nonlocal evaluation
        evaluation = evaluate(model, val_set, choose_workers(args.workers), device)
        return {"mAP": mean_average_precision(evaluation)}

    run = TrainingRun(
        out,
        settings.to_dict(),
        classes,
        evaluate=validate,
        plot=lambda history, evaluations: plot_losses(history, out / "loss.png", evaluations),
        resume=resume,
        **description["options"],
    )
    sampler = TrainingSampler(
        len(train_set),
        settings.batch_size // num_processes(),
        settings.iters,
        start=run.iteration,
        seed=settings.seed,
        sides=settings.image_sizes,
        rank=rank(),
        num_processes=num_processes(),
    )
    train_loader = torch.utils.data.DataLoader(
        AugmentedTrainingSet(train_set, settings.augment, cache=args.cache and varies),
        batch_sampler=sampler,
        num_workers=choose_workers(args.workers),
        worker_init_fn=ignore_signals,
        pin_memory=device != "cpu",
        generator=torch.Generator(),  # or the loader would draw from the one of the training
    )
    with claimed(out) if is_main_process() else contextlib.nullcontext():
        if is_main_process():
            write_json(out / "run.json", description)
        history = train_detector(
            detector,
            train_loader,
            learning_rate=settings.lr,
            max_iters=settings.iters,
            log_period=max(1, min(100, settings.iters // 10)),
            device=device,
            run=run,
            **{
                name: getattr(settings, name)
                for name in (
                    "optimizer",
                    "weight_decay",
                    "schedule",
                    "warmup_iters",
                    "max_grad_norm",
                    "pretrained_lr_factor",
                    "average_decay",
                    "amp",
                    "channels_last",
                    "compile",
                )
            },
        )
    # The last step was evaluated, unless there was none left to do.
    if evaluation is None:
        validate(detector)
    if not is_main_process():
        return
    write_json(out / "history.json", history)
    export_text(evaluation, out)
    facts = {
        "checkpoint": str(checkpoint),
        "data": data,
        "split": "val",
        "image_size": settings.image_size,
        "nms_thresh": EVAL_NMS_THRESH,
    }
    metrics = write_report(evaluation, out, facts)
    print_metrics(metrics, figure_path=out / "ap.png")
    print_findings(metrics)
    _draw_sheet(detector, val_set, out / "detections.png", device)
    print(f"\n{out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def _new_run(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a training before it starts; its folder is made."""
    from eecs598.data import class_names
    from eecs598.runtime import describe_environment, gather, is_main_process
    from eecs598.training import from_recipe

    recipe = args.recipe or ("shapes" if args.data is None else "handout")
    settings = from_recipe(recipe, **_given_settings(args))
    description = {"recipe": recipe, "settings": settings.to_dict()}
    description["options"] = {**RUN_OPTIONS, **_given(args, RUN_OPTIONS)}
    if is_main_process():
        data = os.path.abspath(args.data if args.data is not None else _embedded_shapes())
        description |= {"data": data, "classes": class_names(data)}
        name = args.out or f"runs/{Path(data).name}-{time.strftime('%Y%m%d-%H%M%S')}"
        description["out"] = str(make_empty_folder(Path(name), "--out"))
        description["environment"] = [describe_environment()]
    # The other processes wait until the data is drawn, and agree on the name.
    return gather(description)[0]


def _resumed(args: argparse.Namespace) -> dict[str, Any]:
    """What is known of a training that was stopped."""
    from eecs598.runtime import describe_environment
    from eecs598.training import RECIPES

    if args.out is not None:
        out = Path(args.out)
    else:
        runs = [path.parent for path in Path("runs").glob("*/run.json")]
        unfinished = [run for run in runs if not (run / "metrics.json").exists()]
        if not unfinished:
            raise ValueError("no unfinished training in runs/; name its folder with --out.")
        out = max(unfinished, key=lambda run: (run / "run.json").stat().st_mtime)
    try:
        description = json.loads((out / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{out} is no folder that a training could go on in: {error}.") from error
    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in _given_settings(args).items()
    }
    if args.recipe is not None:
        given["recipe"] = args.recipe
    kept = {"recipe": description["recipe"], **RECIPES["handout"].to_dict()}
    kept |= description["settings"]
    for name, value in given.items():
        if value != kept[name]:
            raise ValueError(
                f"{out} was started with {name} {kept[name]}, and now {value} was given. A "
                "training goes on with the settings that it began with; leave the option out, or "
                "start another training."
            )
    if args.data is not None:  # the same data may lie elsewhere now
        description["data"] = os.path.abspath(args.data)
    description["options"] |= _given(args, RUN_OPTIONS)
    print(f"going on with {out}")
    description["out"] = str(out)  # it may have moved
    description["environment"].append(describe_environment())
    return description


def _given_settings(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from eecs598.training import Settings

    return _given(args, [field.name for field in dataclasses.fields(Settings)])


def _given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those arguments that were given, of options that have no default of their own."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def _embedded_shapes() -> Path:
    """The generated set in the user's cache folder, drawn on first use."""
    from eecs598.data import write_shapes

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "eecs598-fcos" / "shapes"
    print(f"generated data set: {folder}")
    return write_shapes(folder)


def _contents(dataset: VOC2007DetectionTiny) -> dict[str, Any]:
    """How many images a split has, and how many objects of each class."""
    labels = [int(label) for _, boxes in dataset.instances for label in boxes[:, 4]]
    objects = {name: labels.count(i) for name, i in dataset.class_to_idx.items()}
    return {"images": len(dataset), "objects": objects}


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
            detector, DataLoader(chosen), PICTURE_SCORE_THRESH, EVAL_NMS_THRESH, device=device
        )
    ]
    contact_sheet(pictures, dataset.idx_to_class, path)
