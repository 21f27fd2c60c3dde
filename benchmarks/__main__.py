"""Run the benchmarks: our times relative to those of other libraries (the peers), in one table.

    python -m benchmarks [MODULE ...] [--device cuda]

Each module has ``rows(device)``, which checks that both sides do the same work, as far as they can
give the same results, and then times them by turns. The peers come with
``pip install -e ".[bench]"``. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import platform

import torch

from benchmarks.timing import table
from eecs598.runtime import package_versions, processor_name

MODULES = (
    "nms",
    "detector",
    "onnx_runtime",
    "losses",
    "roofline",
    "input_pipeline",
    "average_precision",
    "report",
    "command_line",
)
PACKAGES = ("torch", "torchvision", "pillow", "faster-coco-eval", "pycocotools", "onnxruntime")


def main() -> None:
    """Run what was named, or all of it."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(MODULES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    if unknown := set(args.modules) - set(MODULES):
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    hardware = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{torch.get_num_threads()} cores of {processor_name()}"
    )
    versions = {"Python": platform.python_version(), **package_versions(PACKAGES)}
    print(", ".join([hardware, *(f"{name} {version}" for name, version in versions.items())]), "\n")
    rows = []
    for name in args.modules or MODULES:
        for row in importlib.import_module(f"benchmarks.{name}").rows(args.device):
            print(f"{row.question}: {row.ratio:.2f} of {row.peer}", flush=True)
            rows.append(row)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
