"""``fcos train``: one training run, from its settings to its report."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fcos.data import check_before_training, choose_data, describe_contents
from fcos.evaluate import evaluate
from fcos.options import (
    add_check_option,
    add_machine_options,
    add_settings,
    choose_device,
    choose_workers,
    given_settings,
    make_empty_folder,
)
from fcos.results import write_results

if TYPE_CHECKING:
    from eecs598.metrics import Evaluation
    from eecs598.training import RunDescription
    from one_stage_detector import FCOS

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command, one for each setting among them."""
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
        help="go on with the training run in --out, or with the latest one in runs/",
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="settings to start from: the assignment's, better ones, those for the generated set "
        "(handout with --data, otherwise shapes)",
    )
    parser.add_argument(
        "--cache", action="store_true", help="keep the images in memory (up to 4 GB per split)"
    )
    add_check_option(parser)
    add_machine_options(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Train in this process, or in this one and those that torchrun started beside it."""
    from eecs598.runtime import is_main_process, process_group
    from eecs598.training import TrainingStopped

    with contextlib.ExitStack() as stack:
        device = stack.enter_context(process_group(choose_device(args.device)))
        if not is_main_process():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            _train(args, device)
        except TrainingStopped as stopped:
            print(f"fcos: {stopped}", file=sys.stderr)
            return 128 + stopped.signal_number
    return 0


def _train(args: argparse.Namespace, device: str) -> None:
    """Do all steps of a run: settings, data, detector, training, report."""
    from a4_helper import VOC2007DetectionTiny, train_detector
    from eecs598 import reset_seed
    from eecs598.data import TrainingSampler, TrainingSet, load_instances
    from eecs598.metrics import score_matches
    from eecs598.runtime import (
        fit_workers,
        folder_lock,
        gather,
        is_main_process,
        make_loader,
        num_processes,
        rank,
    )
    from eecs598.training import TrainingRun, UsageMeter, plot_losses, precision_name
    from fcos.models import build_detector

    # Settings
    description = _resumed_run(args) if args.resume else _new_run(args)
    out, settings, names = description.out, description.settings, description.class_names
    data = settings.data
    if data.batch_size % num_processes():
        raise ValueError(
            f"--batch-size {data.batch_size} can't be shared evenly by {num_processes()} "
            "processes; choose a multiple."
        )
    own_batch_size = data.batch_size // num_processes()
    side = max([data.image_size, *data.image_sizes])
    # Batches of training wait in memory while images are evaluated.
    batches = (own_batch_size, side, side), (1, data.image_size, 2 * data.image_size)
    workers = fit_workers(choose_workers(args.workers), *batches)

    # Data
    train_set = TrainingSet(
        load_instances(description.data, "train", names),
        data.image_size,
        data.augment,
        image_sizes=data.image_sizes,
        cache=args.cache,
        ignore_difficult=data.ignore_difficult,
        pixel_edges=data.pixel_edges,
    )
    val_set = VOC2007DetectionTiny(
        description.data, "val", image_size=data.image_size, classes=names, cache=args.cache
    )
    splits = {"train": train_set.images.instances, "val": val_set.instances}
    description.check_contents(describe_contents(description.data, splits, names))
    print(f"{len(train_set)} training and {len(val_set)} validation images, classes: {names}")
    print(settings)

    # Detector. A checkpoint holds the backbone's weights, too.
    reset_seed(data.seed)
    checkpoint = out / "checkpoint.pt"
    resume = gather(args.resume and checkpoint.is_file())[0]
    detector = build_detector(settings.model, len(names), names, load_weights=not resume)

    # Training
    evaluation: Evaluation | None = None  # the last one
    meter = UsageMeter(device)

    def validate(model: FCOS) -> float:
        nonlocal evaluation
        with meter.paused():
            evaluation = evaluate(model, val_set, workers, device, pixel_edges=data.pixel_edges)
        return score_matches(evaluation.matches)["mAP"]

    training_run = TrainingRun(
        out,
        settings.to_dict(),
        names,
        evaluate=validate,
        plot=plot_losses,
        resume=resume,
        **settings.run.kwargs(),
    )
    first = training_run.iteration
    sampler = TrainingSampler(
        len(train_set),
        own_batch_size,
        settings.optimization.max_iters,
        start=first,
        seed=data.seed,
        image_sizes=data.image_sizes,
        mosaic_off_iters=data.mosaic_off_iters,
        rank=rank(),
        num_processes=num_processes(),
    )
    train_loader = make_loader(
        train_set, workers, batch_sampler=sampler, pin_memory=device != "cpu"
    )
    description.environment[-1] |= {
        "device": device,
        "processes": num_processes(),
        "precision": precision_name(device, settings.optimization.amp),
    }
    with folder_lock(out) if is_main_process() else contextlib.nullcontext():
        if is_main_process():
            description.write()
        with meter.running():
            history = train_detector(
                detector,
                train_loader,
                log_period=max(1, min(100, settings.optimization.max_iters // 10)),
                device=device,
                run=training_run,
                **settings.optimization.kwargs(),
            )

    # Report. The last step was evaluated, unless there was none left to do.
    if evaluation is None:
        evaluation = evaluate(detector, val_set, workers, device, pixel_edges=data.pixel_edges)
    if not is_main_process():
        return
    done = len(history["iteration"]) - first
    usage = meter.usage(detector, detector.network_outputs, data.image_size, done * data.batch_size)
    write_results(description, detector, val_set, evaluation, history, usage, device)


def _new_run(args: argparse.Namespace) -> RunDescription:
    """Decide on settings, data and folder of a new run, and make the folder."""
    from eecs598.runtime import describe_environment, gather, is_main_process
    from eecs598.training import RunDescription, from_recipe
    from fcos.fine_tuning import with_architecture

    recipe = args.recipe or ("shapes" if args.data is None else "handout")
    settings = from_recipe(recipe, **with_architecture(given_settings(args)))
    description = None
    if is_main_process():
        data, names = choose_data(args, settings)
        out = args.out or f"runs/{Path(data).name}-{time.strftime('%Y%m%d-%H%M%S')}"
        description = RunDescription(
            out=make_empty_folder(Path(out), "--out"),
            recipe=recipe,
            settings=settings,
            data=data,
            class_names=names,
            environment=[describe_environment()],
        )
    # The other processes wait until the data is drawn, and agree on the name.
    return gather(description)[0]


def _resumed_run(args: argparse.Namespace) -> RunDescription:
    """Read what is known of a run that was stopped, and compare it with the options given now."""
    from eecs598.runtime import describe_environment
    from eecs598.training import RunDescription

    if args.out is not None:
        description = RunDescription.read(args.out)
    else:
        description = RunDescription.latest_unfinished("runs")
    description.change(args.recipe, given_settings(args))
    if args.data is not None:  # the same data may be in another folder now
        description.data = os.path.abspath(args.data)
    check_before_training(description.data, description.settings, args)
    print(f"going on with {description.out}")
    description.environment.append(describe_environment())
    return description
