"""The command line: train, evaluate, use and grade one-stage detectors.

    fcos train                          generate the embedded data set, train, evaluate
    fcos train --data DIR               the same on a folder in VOC layout, or with COCO's JSON
    fcos train --resume                 go on with a training that was stopped
    torchrun --nproc-per-node N -m fcos train ...    with several GPUs
    fcos eval CHECKPOINT --data DIR     metrics and a report of a trained detector
    fcos predict CHECKPOINT IMAGES... --out DIR      detections in image files
    fcos score DIR                      mAP of a folder of text files
    fcos data shapes|voc2007|check DIR  make, download or check a data set
    fcos grade FOLDER...                points for what others handed in

``fcos COMMAND --help`` lists the options. This is the only file that knows all the others; it
imports what is heavy when a command needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from a4_helper import VOC2007DetectionTiny
    from eecs598.metrics import Evaluation
    from eecs598.report import Comparison
    from eecs598.training import Settings
    from one_stage_detector import FCOS

# Average precision is the area under the whole curve, so evaluation keeps detections with low
# scores, too. The assignment's own evaluation uses 0.4.
EVAL_SCORE_THRESH = 0.05
EVAL_NMS_THRESH = 0.6

# What else `fcos train` keeps to when it goes on, but may change.
RUN_OPTIONS = {"checkpoint_every": 500, "keep_every": 0, "eval_every": 1500, "tensorboard": False}

# Pictures are for people: only what the detector is confident of.
SHEET_SCORE_THRESH = 0.4
SHEET_IMAGES = 12


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    The exit status is 0, 1 for data with errors or missing points, 2 for wrong input, and 128 plus
    the number of a signal that ended it.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    try:
        with _sigterm_as_interrupt():
            return args.run(args) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        # An error in a process that loads data brings its traceback along as text.
        text = str(error)
        text = text.strip().splitlines()[-1] if "Original Traceback" in text else text
        print(f"fcos: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("fcos: interrupted", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within the block, SIGTERM ends the command in good order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may do this
        yield
        return

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# --------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fcos", description="FCOS, a one-stage object detector: train, evaluate, use, grade."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    known = {
        "train": ("train a detector and evaluate it", _train_options),
        "eval": ("evaluate a trained detector", _eval_options),
        "predict": ("detections in image files", _predict_options),
        "score": ("mAP of a folder of text files", _score_options),
        "data": ("make, download or check a data set", _data_options),
        "grade": ("points for what others handed in", _grade_options),
    }
    for name, (text, add_options) in known.items():
        command = commands.add_parser(name, help=text)
        if name in argv:  # those of the others would only cost time
            add_options(command)
    return parser


def _train_options(parser: argparse.ArgumentParser) -> None:
    from eecs598.training import RECIPES

    parser.description = (
        "Train a detector and evaluate it. Without --data, on the generated set. The "
        "folder of the run gets run.json, checkpoint.pt, best.pt, history.jsonl and history.json, "
        "loss.png, report.html, metrics.json, ap.png, detections.png and, as text files, "
        "detections and ground truth."
    )
    parser.set_defaults(run=_train)
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
            f"--{option}", type=_natural, default=argparse.SUPPRESS, metavar="N", help=text
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
    _add_machine_options(parser)
    _add_settings(parser)


def _eval_options(parser: argparse.ArgumentParser) -> None:
    from eecs598.training import RECIPES

    parser.description = (
        "Evaluate a trained detector. The folder of the evaluation gets report.html, "
        "metrics.json and, as text files, the detections and the ground truth."
    )
    parser.set_defaults(run=_eval)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file written by fcos train")
    parser.add_argument(
        "--data", metavar="DIR", required=True, help="folder in VOC layout, or with COCO's JSON"
    )
    parser.add_argument(
        "--backbone",
        default=RECIPES["handout"].backbone,
        metavar="NAME",
        help="where CHECKPOINT is a plain state dict, which doesn't tell (regnet_x_400mf)",
    )
    parser.add_argument("--split", default="val", help="list in ImageSets/Main (val)")
    _add_detection_options(parser, EVAL_SCORE_THRESH)
    parser.add_argument(
        "--out", metavar="DIR", help="new folder for results (eval-SPLIT beside CHECKPOINT)"
    )
    parser.add_argument(
        "--compare",
        metavar="DIR",
        help="another evaluation of the same images: the folder with its text files",
    )
    parser.add_argument(
        "--export", metavar="DIR", help="write the text files here instead of into --out"
    )
    _add_json(parser, "write the metrics here, too")
    _add_machine_options(parser)


def _predict_options(parser: argparse.ArgumentParser) -> None:
    from eecs598.training import RECIPES

    parser.description = (
        "Detect objects in image files: a picture of each with its boxes, and all "
        "boxes in pixels of the original files as JSON. The exit status is 1 when a file could "
        "not be read; it is named and skipped."
    )
    parser.set_defaults(run=_predict)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file written by fcos train")
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|GLOB",
        help="files; folders, without their subfolders; or patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder for the results")
    _add_json(parser, "the boxes (DIR/predictions.json)")
    parser.add_argument(
        "--pictures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the detections (yes)",
    )
    _add_detection_options(parser, SHEET_SCORE_THRESH)
    parser.add_argument(
        "--batch-size",
        type=_positive_int,
        default=8,
        metavar="N",
        help="images a step; those of one size go through the network together (8)",
    )
    plain = parser.add_argument_group(
        "where CHECKPOINT is a plain state dict", "which tells neither backbone nor class names"
    )
    plain.add_argument(
        "--backbone", default=RECIPES["handout"].backbone, metavar="NAME", help="(regnet_x_400mf)"
    )
    names = plain.add_mutually_exclusive_group()
    names.add_argument(
        "--classes", metavar="A,B,C", help="in the order of training (for 20: those of VOC)"
    )
    names.add_argument("--data", metavar="DIR", help="the data set that has the classes")
    _add_machine_options(parser)


def _score_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_score)
    parser.add_argument(
        "folder", metavar="DIR", help="folder with detection-results/ and ground-truth/"
    )
    _add_json(parser, "write the metrics as JSON")
    parser.add_argument(
        "--figure", metavar="FILE", help="where to draw the AP of every class (DIR/ap.png)"
    )


def _data_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", required=True, metavar="WHAT")
    check = kinds.add_parser("check", help="find what is wrong with a data set before training")
    check.set_defaults(run=_data_check)
    check.add_argument("folder", metavar="DIR", help="in VOC layout, or with COCO's JSON")
    _add_json(check, "write the report as JSON")
    shapes = kinds.add_parser("shapes", help="draw the generated set")
    shapes.set_defaults(run=_data_shapes)
    shapes.add_argument("folder", metavar="DIR")
    shapes.add_argument("--train", type=_positive_int, default=800, metavar="N", help="(800)")
    shapes.add_argument("--val", type=_positive_int, default=200, metavar="N", help="(200)")
    shapes.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    voc2007 = kinds.add_parser("voc2007", help="download PASCAL VOC 2007 train and val")
    voc2007.set_defaults(run=_data_voc2007)
    voc2007.add_argument("folder", metavar="DIR")


def _grade_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Check folders with common.py, one_stage_detector.py and a4_helper.py, each "
        "in confined processes of its own, and say what is wrong. The exit status is 0 when all "
        "have all points, 1 when not, and 2 when a folder or an option could not be used."
    )
    parser.set_defaults(run=_grade)
    parser.add_argument(
        "folders", type=_some_name, metavar="FOLDER", nargs="+", help="a submission"
    )
    parser.add_argument("--format", choices=("text", "json", "gradescope"), default="text")
    _add_json(parser, "write JSON to a file, too; Gradescope's with that format")
    parser.add_argument(
        "--rubric", metavar="FILE", help="points in TOML, in place of eecs598/grading/rubric.toml"
    )
    parser.add_argument(
        "--timeout",
        type=_positive_int,
        default=60,
        metavar="S",
        help="seconds for loading a submission, and for each check (60)",
    )
    parser.add_argument(
        "--jobs", type=_positive_int, metavar="N", help="submissions at a time (one a core)"
    )
    parser.add_argument(
        "--memory",
        type=_positive_int,
        default=2048,
        metavar="MB",
        help="what a submission may allocate (2048)",
    )


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


def _add_detection_options(parser: argparse.ArgumentParser, score_thresh: float) -> None:
    parser.add_argument(
        "--image-size", type=_positive_int, metavar="N", help="another one than in training"
    )
    parser.add_argument(
        "--score-thresh",
        type=_fraction,
        default=score_thresh,
        metavar="X",
        help=f"detections score above it ({score_thresh})",
    )
    parser.add_argument(
        "--nms-thresh",
        type=_fraction,
        default=EVAL_NMS_THRESH,
        metavar="X",
        help=f"IoU above which the lower of two is dropped ({EVAL_NMS_THRESH})",
    )
    parser.add_argument(
        "--amp",
        choices=("auto", "off"),
        default="off",
        help="auto: compute in bfloat16 or float16 where that is faster; the last digits of "
        "boxes and scores change (off)",
    )


def _add_json(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", type=_output_file, metavar="FILE", help=text)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--workers", type=_natural, metavar="N", help="processes that load data (up to 4)"
    )


def _positive_int(text: str) -> int:
    return _checked(int, text, lambda value: value >= 1, "a whole number of at least 1")


def _natural(text: str) -> int:
    return _checked(int, text, lambda value: value >= 0, "a whole number of at least 0")


def _fraction(text: str) -> float:
    return _checked(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _some_name(text: str) -> str:
    return _checked(str, text, bool, "the name of a folder")


def _output_file(text: str) -> Path:
    return _checked(Path, text, _is_writable, "a file in a folder that may be written to")


def _is_writable(path: Path) -> bool:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return folder.is_dir() and os.access(folder, os.W_OK) and not path.is_dir()


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


def _train(args: argparse.Namespace) -> int:
    from eecs598.runtime import is_main_process, process_group
    from eecs598.training import TrainingStopped

    with contextlib.ExitStack() as stack:
        device = stack.enter_context(process_group(_device(args.device)))
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

    from a4_helper import AugmentedTrainingSet, plot_losses, train_detector
    from eecs598 import reset_seed
    from eecs598.data import TrainingSampler
    from eecs598.metrics import check_class_names, score_matches
    from eecs598.runtime import claimed, gather, is_main_process, num_processes, rank, write_json
    from eecs598.training import Settings, TrainingRun, ignore_signals, precision_name

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
    train_set = _dataset(
        data, "train", settings.image_size, classes, cache=args.cache and not settings.augment
    )
    val_set = _dataset(data, "val", settings.image_size, classes, cache=args.cache)
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
    detector = _build_detector(settings, len(classes), "none" if resume else settings.weights)

    evaluation = None  # the last one

    def evaluate(model: nn.Module) -> dict[str, Any]:
        nonlocal evaluation
        evaluation = _evaluate(model, val_set, args.workers, device)
        return score_matches(evaluation.matches)

    run = TrainingRun(
        out,
        settings.to_dict(),
        classes,
        evaluate=evaluate,
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
        num_workers=_workers(args.workers),
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
        evaluate(detector)
    if not is_main_process():
        return
    write_json(out / "history.json", history)
    _export(evaluation, out)
    facts = {
        "checkpoint": str(checkpoint),
        "data": data,
        "split": "val",
        "image_size": settings.image_size,
        "nms_thresh": EVAL_NMS_THRESH,
    }
    metrics = _write_report(evaluation, out, facts)
    _report(metrics, figure_path=out / "ap.png")
    _print_findings(metrics, None)
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
        description["out"] = str(_make_empty(Path(name), "--out"))
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


def _eval(args: argparse.Namespace) -> None:
    from eecs598.metrics import image_names, read_text_format
    from eecs598.report import check_comparable, compare
    from eecs598.runtime import write_json

    detector, settings, classes = _load_detector(args)
    device = _device(args.device)
    dataset = _dataset(args.data, args.split, settings.image_size, classes, crop=False)
    beside = Path(args.checkpoint).parent / f"eval-{args.split}"
    other = None
    if args.compare is not None:
        other = read_text_format(args.compare)
        names = image_names([path for path, _ in dataset.instances])
        check_comparable(classes, names, other, args.compare)
    out = _make_empty(Path(args.out) if args.out else _next_free(beside), "--out")
    export = out if args.export is None else _make_empty(Path(args.export), "--export")
    evaluation = _evaluate(
        detector,
        dataset,
        args.workers,
        device,
        score_thresh=args.score_thresh,
        nms_thresh=args.nms_thresh,
        amp=args.amp,
    )
    _export(evaluation, export)
    comparison = other and compare(evaluation, other, args.compare)
    facts = {
        "checkpoint": str(args.checkpoint),
        "data": str(args.data),
        "split": args.split,
        "image_size": settings.image_size,
        "nms_thresh": args.nms_thresh,
    }
    metrics = _write_report(evaluation, out, facts, comparison)
    if args.json is not None:
        write_json(args.json, metrics)
    _report(metrics)
    _print_findings(metrics, comparison)
    print(f"\n{out / 'report.html'}")


def _predict(args: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    from eecs598.data import ImageFiles, find_images, read_image
    from eecs598.deploy import detect, picture_names, to_json, write_picture
    from eecs598.runtime import write_json
    from eecs598.training import ignore_signals

    paths = find_images(args.images)
    detector, settings, classes = _load_detector(args)
    device = _device(args.device)
    detector.to(device).eval()
    out = _make_empty(Path(args.out), "--out")
    workers = _workers(args.workers)
    loader = DataLoader(
        ImageFiles(paths, settings.image_size),
        batch_size=args.batch_size,
        collate_fn=list,
        num_workers=workers,
        worker_init_fn=ignore_signals,
    )
    predict = partial(detector.predict, score_thresh=args.score_thresh, nms_thresh=args.nms_thresh)

    def draw(path: Path, detections: dict[str, Any], name: str) -> None:
        # Read again: originals of any size would fill the memory on their way here.
        write_picture(read_image(path), detections, classes, out / name)

    images, skipped, pictures = [], [], []
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(max(1, workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        stack.enter_context(_autocast(device, args.amp))
        bar = stack.enter_context(tqdm(total=len(paths), desc="detection", disable=None))
        found = detect(predict, loader, device)
        for name, (image, detections) in zip(picture_names(paths), found, strict=True):
            bar.update()
            if detections is None:
                bar.write(f"fcos: skipped {image.error}", file=sys.stderr)
                skipped.append({"path": str(image.path), "error": image.error})
                continue
            images.append(to_json(image, detections, classes))
            if args.pictures:
                images[-1]["picture"] = name
                pictures.append(pool.submit(draw, image.path, detections, name))
        write_json(
            args.json if args.json is not None else out / "predictions.json",
            {
                "checkpoint": str(args.checkpoint),
                "classes": classes,
                "image_size": settings.image_size,
                "score_thresh": args.score_thresh,
                "nms_thresh": args.nms_thresh,
                "images": images,
                "skipped": skipped,
            },
        )
        for picture in pictures:
            picture.result()
    count = sum(len(image["detections"]) for image in images)
    seconds = time.perf_counter() - start
    print(f"{count} detections in {len(images)} images, {seconds:.1f} s: {out}")
    if skipped:
        print(f"fcos: {len(skipped)} of {len(paths)} images skipped", file=sys.stderr)
    return 1 if skipped else 0


def _score(args: argparse.Namespace) -> None:
    from eecs598.metrics import find_folder_diagnostics, score_folder

    figure = args.figure if args.figure is not None else Path(args.folder) / "ap.png"
    _report(score_folder(args.folder), json_path=args.json, figure_path=figure)
    for diagnostic in find_folder_diagnostics(args.folder):
        print(f"warning: {diagnostic.message}", file=sys.stderr)


def _data_check(args: argparse.Namespace) -> int:
    from eecs598.data import check_data, format_report
    from eecs598.runtime import write_json

    report = check_data(args.folder)
    print(format_report(report))
    if args.json is not None:
        write_json(args.json, report.to_dict())
    return 1 if report.has_errors else 0


def _data_shapes(args: argparse.Namespace) -> None:
    from eecs598.data import write_shapes

    folder = write_shapes(args.folder, num_train=args.train, num_val=args.val, seed=args.seed)
    print(f"{args.train} training and {args.val} validation images in {folder}")


def _data_voc2007(args: argparse.Namespace) -> None:
    from eecs598.data import download_voc2007

    print(f"PASCAL VOC 2007 in {download_voc2007(args.folder)}")


def _grade(args: argparse.Namespace) -> int:
    from eecs598.grading import (
        Graded,
        Options,
        Report,
        format_table,
        format_text,
        grade_folders,
        load_rubric,
        to_dict,
        to_gradescope,
    )
    from eecs598.runtime import write_json

    if args.format == "gradescope" and len(args.folders) > 1:
        raise ValueError(
            f"{len(args.folders)} folders given; --format gradescope is for one. Use --format json."
        )
    rubric = load_rubric(args.rubric)
    options = Options(
        timeout=args.timeout,
        total_timeout=15 * args.timeout,
        jobs=args.jobs,
        memory_mb=args.memory,
        checks=tuple(rubric.checks),
    )
    count = 0

    def show_progress(graded: Graded) -> None:
        nonlocal count
        count += 1
        if len(args.folders) > 1:
            print(f"{count}/{len(args.folders)} {graded.folder}", file=sys.stderr)

    graded = grade_folders(args.folders, Path(__file__).parents[1], options, show_progress)
    reports = [Report(one, rubric.grade(one.results)) for one in graded]
    if args.format == "gradescope":
        result: Any = to_gradescope(reports[0])
    else:
        result = {"submissions": [to_dict(report) for report in reports]}
    if args.json is not None:
        write_json(args.json, result)
    if args.format == "text":
        for report in reports:
            to_look_at = report.graded.findings or report.graded.suspicious
            if len(reports) == 1 or to_look_at or not report.is_full:
                print(f"{format_text(report)}\n")
        if len(reports) > 1:
            print(format_table(reports))
    else:
        print(json.dumps(result, indent=1))
    failed = [one for one in graded if one.error is not None]
    for one in failed:
        print(f"fcos: error: {one.folder} {one.error}", file=sys.stderr)
    if failed:
        return 2
    return 0 if all(report.is_full for report in reports) else 1


# --------------------------------------------------------------------------------------------
# Steps that commands share
# --------------------------------------------------------------------------------------------


def _embedded_shapes() -> Path:
    """The generated set in the user's cache folder, drawn on first use."""
    from eecs598.data import write_shapes

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


def _next_free(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that is not there yet."""
    names = itertools.chain([folder], (Path(f"{folder}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _device(name: str) -> str:
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda was given, but PyTorch sees no CUDA GPU; use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def _autocast(device: str, amp: str) -> contextlib.AbstractContextManager:
    import torch

    from eecs598.training import mixed_precision

    return mixed_precision(torch.device(device), amp)[0]


def _workers(given: int | None) -> int:
    return given if given is not None else min(4, os.cpu_count() or 1)


def _dataset(
    data: str | Path, split: str, image_size: int, classes: list[str], **options: bool
) -> VOC2007DetectionTiny:
    from a4_helper import VOC2007DetectionTiny

    return VOC2007DetectionTiny(data, split, image_size=image_size, classes=classes, **options)


def _contents(dataset: VOC2007DetectionTiny) -> dict[str, Any]:
    """How many images a split has, and how many objects of each class."""
    labels = [int(label) for _, boxes in dataset.instances for label in boxes[:, 4]]
    objects = {name: labels.count(i) for name, i in dataset.class_to_idx.items()}
    return {"images": len(dataset), "objects": objects}


def _load_detector(args: argparse.Namespace) -> tuple[FCOS, Settings, list[str]]:
    """The detector of a checkpoint, or of a plain state dict; its settings and classes."""
    import dataclasses

    import torch

    from eecs598.training import Settings, load_checkpoint

    checkpoint = load_checkpoint(args.checkpoint)
    state, classes = checkpoint["model"], checkpoint["classes"]
    if classes is not None and getattr(args, "classes", None) is not None:
        raise ValueError(
            f"{args.checkpoint} knows its classes: {', '.join(classes)}. Leave out --classes, "
            "which is for plain state dicts."
        )
    if checkpoint["settings"] is None:
        settings = _settings_of(state, args)
        classes = _classes_of(state, args)
    else:
        settings = Settings.from_dict(checkpoint["settings"])
    if args.image_size is not None:
        settings = dataclasses.replace(settings, image_size=args.image_size)
    detector = _build_detector(settings, len(classes), "none")
    try:
        detector.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{args.checkpoint} holds the weights of another model than its settings say: {error}"
        ) from error
    detector.to(memory_format=torch.channels_last)  # as in training: most processors are faster
    return detector, settings, classes


def _settings_of(state: dict[str, Any], args: argparse.Namespace) -> Settings:
    """The settings that the shapes in a plain state dict tell; the backbone is the user's word."""
    from eecs598.training import Settings

    def weights(prefix: str) -> list[Any]:
        return [value for name, value in state.items() if name.startswith(prefix)]

    stem = weights("pred_net.stem_cls.")
    fpn = weights("backbone.fpn_params.")
    if not fpn:
        raise ValueError(f"{args.checkpoint} is a state dict, but not one of FCOS.")
    convolutions = [value for value in stem if value.dim() == 4]
    return Settings(
        backbone=args.backbone,
        fpn_channels=len(fpn[0]),
        stem=tuple(len(value) for value in convolutions),
        # A convolution has a weight and a bias, and so has a group norm.
        head_norm="group" if len(stem) > 2 * len(convolutions) else "none",
        level_scales=bool(weights("pred_net.scales.")),
    )


def _classes_of(state: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The class names of a plain state dict: given, those of the data, or VOC's where they fit."""
    from eecs598.data import VOC2007_CLASSES, class_names

    count = len(state["pred_net.pred_cls.bias"])
    if getattr(args, "classes", None) is not None:
        names = args.classes.split(",")
    else:
        names = class_names(args.data) if args.data is not None else []
        if count == len(VOC2007_CLASSES) and set(names) <= set(VOC2007_CLASSES):
            if args.data is None:
                print(f"fcos: no class names in {args.checkpoint}; VOC assumed", file=sys.stderr)
            return list(VOC2007_CLASSES)
    if count != len(names):
        raise ValueError(
            f"{args.checkpoint} knows {count} classes; {len(names)} names were given: {names}. A "
            "plain state dict has no class names; give those that it was trained on, by the data "
            "or, for pictures, as --classes A,B,C."
        )
    return names


def _build_detector(settings: Settings, num_classes: int, weights: str) -> FCOS:
    """Build FCOS; unlike in a notebook, a start without the wanted weights is an error."""
    from common import PretrainedWeightsWarning
    from one_stage_detector import FCOS

    names = {"default": "DEFAULT", "none": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", PretrainedWeightsWarning)
        try:
            return FCOS(
                num_classes,
                settings.fpn_channels,
                settings.stem,
                weights=names.get(weights, weights),
                **{
                    name: getattr(settings, name)
                    for name in (
                        "backbone",
                        "box_loss",
                        "center_radius",
                        "head_norm",
                        "level_scales",
                        "frozen_batch_norm",
                    )
                },
            )
        except PretrainedWeightsWarning as warning:
            raise ValueError(
                f"{warning}\nGive the backbone's weights as --weights FILE, or start from random "
                "ones on purpose with --weights none."
            ) from None


def _evaluate(
    detector: FCOS,
    dataset: VOC2007DetectionTiny,
    workers: int | None,
    device: str,
    *,
    score_thresh: float = EVAL_SCORE_THRESH,
    nms_thresh: float = EVAL_NMS_THRESH,
    amp: str = "off",
) -> Evaluation:
    from a4_helper import evaluate_detector
    from one_stage_detector import fcos_level_ranges

    with _autocast(device, amp):
        return evaluate_detector(
            detector,
            dataset,
            score_thresh,
            nms_thresh,
            levels=fcos_level_ranges(detector.backbone.fpn_strides),
            num_workers=_workers(workers),
            device=device,
        )


def _export(evaluation: Evaluation, folder: Path) -> None:
    """The text files that `fcos score` and `--compare` read."""
    from eecs598.metrics import image_names, write_text_format

    for name, prediction, target in zip(
        image_names(evaluation.image_paths),
        evaluation.predictions,
        evaluation.targets,
        strict=True,
    ):
        write_text_format(folder, name, prediction, target, evaluation.class_names)


def _write_report(
    evaluation: Evaluation,
    out: Path,
    facts: dict[str, Any],
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """``report.html`` and ``metrics.json``; returns what the latter holds."""
    from eecs598.report import analyze, write_report
    from eecs598.runtime import describe_environment, write_json

    analysis = analyze(evaluation)
    environment = describe_environment()
    metrics = {**analysis.metrics, **facts, "environment": environment}
    if comparison is not None:
        metrics["comparison"] = {"with": comparison.name, **comparison.difference.to_dict()}
    write_json(out / "metrics.json", metrics)
    write_report(
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


def _print_findings(metrics: dict[str, Any], comparison: Comparison | None) -> None:
    low, high = metrics["interval"]
    print(f"95 % interval of the mAP {100 * low:.2f} to {100 * high:.2f}")
    if comparison is not None:
        result = comparison.difference
        print(
            f"{100 * result.difference:+.2f} against {comparison.name}, 95 % interval "
            f"{100 * result.low:+.2f} to {100 * result.high:+.2f}: "
            + ("more than chance explains" if result.exceeds else "may be chance")
        )
    for message in metrics["diagnostics"]:
        print(f"warning: {message}", file=sys.stderr)


def _report(
    result: dict[str, Any],
    json_path: str | Path | None = None,
    figure_path: str | Path | None = None,
) -> None:
    from eecs598.metrics import format_table, plot_average_precision
    from eecs598.runtime import write_json

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
