"""One run of ``fcos predict``: its images, its detector, and its results in a journal."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eecs598.data import ImageFiles, LoadedImage, find_images, read_image
from eecs598.deploy import Journal, Totals, detect, picture_names, to_json, write_picture
from eecs598.runtime import (
    batches_of,
    fit_workers,
    is_main_process,
    make_loader,
    remove_unfinished,
)
from eecs598.training import mixed_precision
from fcos.engine import Predictor, load_predictor_once
from fcos.options import choose_workers, make_empty_folder

__all__ = ["Prediction", "result_file"]

# Pictures that wait for being drawn; more would fill the memory.
MAX_WAITING = 64


class Prediction:
    """One prediction: the images, the detector, the results so far."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.args = args
        self.paths = find_images(args.images)
        self.predictor: Predictor = load_predictor_once(
            args.checkpoint,
            backbone=args.backbone,
            data=args.data,
            classes=args.classes,
            image_size=args.image_size,
            classes_per_location=args.classes_per_location,
            device=device,
            engine=args.engine,
            amp=args.amp,
            num_images=len(self.paths),
        )
        size = self.predictor.image_size
        batch = (args.batch_size, size, 2 * size)
        self.workers = fit_workers(choose_workers(args.workers), batch)
        self.journal = Journal(Path(args.out), len(self.paths))

    def begin(self) -> None:
        """Make the folder and start the journal.

        Raises:
            ValueError: the folder is not empty.
        """
        folder = self.journal.folder
        if self.journal.exists:
            raise ValueError(
                f"{folder} has a prediction that was stopped: go on with --resume, or choose "
                "another folder with --out."
            )
        make_empty_folder(folder, "--out")
        self.journal.begin(self._all_facts())

    def go_on(self) -> None:
        """Check that the journal is of this prediction, and tidy up after a crash.

        Raises:
            ValueError: it is of another one.
        """
        self.journal.check(self._all_facts())
        remove_unfinished(self.journal.folder)

    def _all_facts(self) -> dict[str, Any]:
        """Return what decides the results."""
        files = hashlib.sha256("\0".join(map(str, self.paths)).encode(errors="surrogateescape"))
        return {
            **self._facts(),
            "detector": self.predictor.detector_hash,
            "pictures": self.args.pictures,
            "image files": files.hexdigest(),
        }

    def _facts(self) -> dict[str, Any]:
        """Return what the result says of itself."""
        return {
            "checkpoint": str(self.args.checkpoint),
            "classes": self.predictor.class_names,
            "image_size": self.predictor.image_size,
            "score_thresh": self.args.score_thresh,
            "nms_thresh": self.args.nms_thresh,
        }

    def detect(self, todo: Sequence[int], process: int) -> None:
        """Detect objects in the images of these numbers, and write each result to the journal."""
        names = picture_names(self.paths) if self.args.pictures else []
        waiting: deque[tuple[Future[None] | None, int, dict[str, Any]]] = deque()
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(max(1, self.workers))
            stack.callback(pool.shutdown, cancel_futures=True)
            file = stack.enter_context(self.journal.appending(process))

            def write_first() -> None:
                picture, index, result = waiting.popleft()
                if picture is not None:
                    picture.result()  # an image in the journal has its picture
                self.journal.write(file, index, result)

            detections = stack.enter_context(closing(self._detections(todo)))
            try:
                for index, (image, found) in zip(todo, detections, strict=True):
                    result: dict[str, Any] = {"path": str(image.path), "error": image.error}
                    picture = None
                    if found is not None:
                        result = to_json(image, found, self.predictor.class_names)
                        if names:
                            result["picture"] = names[index]
                            picture = pool.submit(self._draw, image.path, found, names[index])
                    waiting.append((picture, index, result))
                    while waiting and (len(waiting) > MAX_WAITING or _is_done(waiting[0][0])):
                        write_first()
                while waiting:
                    write_first()
            except BaseException:  # keep what there is
                pool.shutdown(cancel_futures=True)
                for picture, index, result in waiting:
                    if picture is None or not (picture.cancelled() or picture.exception()):
                        self.journal.write(file, index, result)
                raise

    def _detections(self, todo: Sequence[int]) -> Generator[tuple[LoadedImage, Any], None, None]:
        args, predictor = self.args, self.predictor
        loader = make_loader(
            ImageFiles([self.paths[index] for index in todo], predictor.image_size),
            self.workers,
            batch_size=args.batch_size,
            collate_fn=list,
        )
        predict = partial(predictor, score_thresh=args.score_thresh, nms_thresh=args.nms_thresh)
        autocast, _ = mixed_precision(torch.device(predictor.device), args.amp)
        hidden = None if is_main_process() else True
        with ExitStack() as stack:
            stack.enter_context(autocast)
            bar = stack.enter_context(tqdm(total=len(todo), desc="detection", disable=hidden))
            batches = stack.enter_context(batches_of(loader))
            for image, found in detect(predict, batches, predictor.device):
                bar.update()
                if found is None:
                    bar.write(f"fcos: skipped {image.error}", file=sys.stderr)
                yield image, found

    def _draw(self, path: Path, detections: dict[str, Any], name: str) -> None:
        # Read again: originals of any size would fill the memory on their way here.
        picture = self.journal.folder / name
        write_picture(read_image(path), detections, self.predictor.class_names, picture)

    def finish(self) -> Totals:
        """Write ``predictions.json`` from the journal."""
        path = result_file(self.args)
        totals = self.journal.merge(path, {**self._facts(), "engine": self.predictor.engine})
        self.journal.remove()
        return totals


def result_file(args: argparse.Namespace) -> Path:
    """Return the file that a prediction ends with."""
    return args.json or Path(args.out) / "predictions.json"


def _is_done(picture: Future[None] | None) -> bool:
    return picture is None or picture.done()
