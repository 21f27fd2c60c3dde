"""Ablation: the mAP that each change of the settings gives, with everything else equal.

    python -m benchmarks.ablation --data DIR --out runs/ablation [fcos train's options]

trains once with the options given, and once more for each row of CHANGES. Every training run is a
folder of ``fcos train`` in --out. Runs that are finished are not repeated, and one that was stopped
is resumed, so the benchmark can be interrupted at any time. With --seeds 0,1,2 each row is trained
with each seed. Prints a table, with --table of the runs that are finished so far. The interval
holds 95 % of the differences on other samples of the same number of images, the same sample for
both runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from eecs598.metrics import bootstrap_difference, match_detections, read_text_format

ADAMW = ["--optimizer", "adamw", "--lr", "5e-4", "--weight-decay", "0.05"]
# The row "AdamW and GIoU" without pretraining. SGD at 8e-3 ends in NaN from there.
FROM_SCRATCH = [*ADAMW, "--box-loss", "giou", "--max-grad-norm", "5", "--weights", "none"]
# Name of a row -> options of `fcos train` that differ from the first row's.
CHANGES: dict[str, list[str]] = {
    "base": [],
    "recipe strong": ["--recipe", "strong"],
    "flip": ["--augment", "flip"],
    "flip + zoom": ["--augment", "flip,zoom"],
    "GIoU": ["--box-loss", "giou"],
    "cosine and warm-up": ["--schedule", "cosine", "--warmup-iters", "100"],
    "moving average": ["--ema-decay", "0.998"],
    "frozen batch norm": ["--frozen-batch-norm"],
    "center sampling 1.5": ["--center-radius", "1.5"],
    "group norm in the head": ["--head-norm", "group"],
    "four convolutions in each stem": ["--stem", "128,128,128,128"],
    "four convolutions and group norm": ["--stem", "128,128,128,128", "--head-norm", "group"],
    "group norm before the boxes": ["--head-norm", "group_box"],
    "four convolutions and group norm before the boxes": [
        *("--box-stem", "128,128,128,128"),
        *("--head-norm", "group_box"),
    ],
    "scale per level": ["--level-scales"],
    "gradients clipped at 5": ["--max-grad-norm", "5"],
    "backbone lr x 0.1": ["--backbone-lr-factor", "0.1"],
    "flip + IoU crop": ["--augment", "flip,iou_crop"],
    "flip + photometric": ["--augment", "flip,photometric"],
    "flip + zoom + photometric": ["--augment", "flip,zoom,photometric"],
    "flip + zoom + mosaic": ["--augment", "flip,zoom,mosaic"],
    "flip + zoom + erasing": ["--augment", "flip,zoom,erasing"],
    # A tenth of the 2,400 iterations of "Changes to `strong`" in docs/experiments.md.
    "flip + zoom + mosaic without the last 240 iterations": [
        *("--augment", "flip,zoom,mosaic"),
        *("--mosaic-off-iters", "240"),
    ],
    "batches of 128 to 192 px": ["--image-sizes", "128,160,192"],
    "AdamW 5e-4": ADAMW,
    "AdamW and GIoU": [*ADAMW, "--box-loss", "giou"],
    "AdamW with cosine and warm-up": [*ADAMW, "--schedule", "cosine", "--warmup-iters", "100"],
    "AdamW and group norm": [*ADAMW, "--head-norm", "group"],
    "no weight decay on biases and norms": ["--no-decay-all"],
    "stochastic depth 0.1": ["--drop-path-rate", "0.1"],
    "stochastic depth 0.2": ["--drop-path-rate", "0.2"],
    "dropout 0.1 before the classes": ["--head-dropout", "0.1"],
    "difficult objects ignored": ["--ignore-difficult"],
    "ATSS": ["--assignment", "atss"],
    "ATSS and IoU in place of centerness": ["--assignment", "atss", "--quality", "iou"],
    "IoU in place of centerness": ["--quality", "iou"],
    "DIoU": ["--box-loss", "diou"],
    "moving average 0.999": ["--ema-decay", "0.999"],
    "moving average 0.9998": ["--ema-decay", "0.9998"],
    "float32 and no channels last": ["--amp", "off", "--no-channels-last"],
    "random weights": FROM_SCRATCH,
    "RegNetX-400MF from random weights": [*FROM_SCRATCH, "--backbone", "regnet_x_400mf"],
}


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--table", action="store_true", help="print the finished runs, train nothing"
    )
    parser.add_argument(
        "--rows", default=",".join(CHANGES), help="names of the rows to run, comma between them"
    )
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="for each row (0)")
    args, common = parser.parse_known_args()
    rows = [] if args.table else args.rows.split(",")
    unknown = set(rows) - set(CHANGES)
    if unknown:
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(CHANGES)}")
    for seed, name in itertools.product(args.seeds.split(","), rows):
        folder = _folder(args.out, name, seed)
        if (folder / "metrics.json").is_file():
            continue
        command = [sys.executable, "-m", "fcos", "train", "--out", str(folder), "--data", args.data]
        command += [*common, *CHANGES[name], "--seed", seed]
        if (folder / "run.json").is_file():
            command.append("--resume")
        print(f"\n== {name}, seed {seed}", flush=True)
        with subprocess.Popen(command) as training:
            try:
                status = training.wait()
            except KeyboardInterrupt:  # the training run received it, too, and saves first
                training.wait()
                break
        if status == 2:
            print(f"== {name} failed")  # it would fail again, but other rows may not
        elif status:
            break
    print(table(args.out))


def _folder(out: Path, name: str, seed: str = "0") -> Path:
    """Return the run folder of a row."""
    suffix = "" if seed == "0" else f".seed-{seed}"
    return out / ("".join(c if c.isalnum() else "-" for c in name.lower()) + suffix)


def table(out: Path) -> str:
    """Return a Markdown table of the finished rows; over several seeds, means are compared."""
    lines = ["| change | mAP@0.5 | difference | 95 % interval |", "|---|---|---|---|"]
    base = _finished(out, "base")
    for name in CHANGES:
        runs = _finished(out, name)
        if not runs:
            continue
        difference = interval = ""
        if base and name != "base":
            difference = f"{statistics.mean(_scores(runs)) - statistics.mean(_scores(base)):+.1f}"
            if len(runs) == len(base) == 1:
                interval = _interval(*runs, *base)
        cell = ", ".join(f"{score:.1f}" for score in _scores(runs))
        lines.append(f"| {name} | {cell} % | {difference} | {interval} |")
    return "\n".join(lines)


def _finished(out: Path, name: str) -> list[Path]:
    """Return the run folder of each seed that is finished."""
    folder = _folder(out, name)
    folders = [folder, *sorted(out.glob(f"{folder.name}.seed-*"))]
    return [each for each in folders if (each / "metrics.json").is_file()]


def _scores(runs: list[Path]) -> list[float]:
    """Return the mAP of each run in percent."""
    files = [run / "metrics.json" for run in runs]
    return [100 * json.loads(file.read_text(encoding="utf-8"))["mAP"] for file in files]


def _interval(run: Path, base: Path) -> str:
    """Return the interval of the difference of two runs, in points of mAP."""
    ours, theirs = (match_detections(*read_text_format(folder)[1:]) for folder in (run, base))
    result = bootstrap_difference(ours, theirs)
    return f"{100 * result.low:+.1f} to {100 * result.high:+.1f}"


if __name__ == "__main__":
    main()
