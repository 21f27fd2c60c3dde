"""What does each ingredient of a training give? One change at a time, everything else equal.

    python -m benchmarks.ablation --data DIR --out runs/ablation [fcos train's options]

trains once with the options given, and once more for each row of CHANGES. Every training is a run
folder of `fcos train` in --out; those that are finished are not repeated, one that was stopped goes
on, so that the whole can be interrupted at any time. Prints a table, also of what there is so far
(--table).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ADAMW = ["--optimizer", "adamw", "--lr", "5e-4", "--weight-decay", "0.05"]
# Name of a row -> options of `fcos train` that differ from the first row's.
CHANGES: dict[str, list[str]] = {
    "base": [],
    "recipe strong": ["--recipe", "strong"],
    "flip": ["--augment", "flip"],
    "flip + zoom": ["--augment", "flip,zoom"],
    "GIoU": ["--box-loss", "giou"],
    "cosine and warm-up": ["--schedule", "cosine", "--warmup-iters", "100"],
    "moving average": ["--average-decay", "0.998"],
    "frozen batch norm": ["--frozen-batch-norm"],
    "centre sampling 1.5": ["--center-radius", "1.5"],
    "group norm in the head": ["--head-norm", "group"],
    "scale per level": ["--level-scales"],
    "gradients clipped at 5": ["--max-grad-norm", "5"],
    "backbone lr x 0.1": ["--pretrained-lr-factor", "0.1"],
    "flip + IoU crop": ["--augment", "flip,iou_crop"],
    "flip + photometric": ["--augment", "flip,photometric"],
    "flip + zoom + mosaic": ["--augment", "flip,zoom,mosaic"],
    "batches of 128 to 192 px": ["--image-sizes", "128,160,192"],
    "AdamW 5e-4": ADAMW,
    "AdamW and GIoU": [*ADAMW, "--box-loss", "giou"],
    "AdamW with cosine and warm-up": [*ADAMW, "--schedule", "cosine", "--warmup-iters", "100"],
    "AdamW and group norm": [*ADAMW, "--head-norm", "group"],
    "random weights": ["--weights", "none"],
    "RegNetX-400MF from random weights": ["--backbone", "regnet_x_400mf", "--weights", "none"],
}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    parser.add_argument(
        "--rows", default=",".join(CHANGES), help="names of the rows to run, comma between them"
    )
    args, common = parser.parse_known_args()
    rows = [] if args.table else args.rows.split(",")
    unknown = set(rows) - set(CHANGES)
    if unknown:
        parser.error(f"no rows {', '.join(sorted(unknown))}; there are {', '.join(CHANGES)}")
    for name in rows:
        folder = _folder(args.out, name)
        if (folder / "metrics.json").is_file():
            continue
        command = [sys.executable, "-m", "fcos", "train", "--out", str(folder)]
        if (folder / "run.json").is_file():
            command.append("--resume")
        else:
            command += ["--data", args.data, *common, *CHANGES[name]]
        print(f"\n== {name}", flush=True)
        with subprocess.Popen(command) as training:
            try:
                status = training.wait()
            except KeyboardInterrupt:  # the training got it, too, and saves first
                training.wait()
                break
        if status == 2:
            print(f"== {name} failed")  # it would fail again, but others need not
        elif status:
            break
    print(table(args.out))


def _folder(out: Path, name: str) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in name.lower())


def table(out: Path) -> str:
    """The finished rows as a Markdown table."""
    lines = ["| change | mAP@0.5 | difference |", "|---|---|---|"]
    scores = {
        name: json.loads(path.read_text(encoding="utf-8"))["mAP"]
        for name in CHANGES
        if (path := _folder(out, name) / "metrics.json").is_file()
    }
    for name, score in scores.items():
        difference = f"{100 * (score - scores['base']):+.1f}" if "base" in scores else ""
        lines.append(f"| {name} | {100 * score:.1f} % | {'' if name == 'base' else difference} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
