"""All comparisons with peers in one table.

    python -m benchmarks [MODULE ...] [--device cuda]

Each module has ``rows(device)``, which checks that both sides give the same and then times them by
turns. The peers come with ``pip install -e ".[bench]"``. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import platform

import torch
import torchvision

from benchmarks.timing import table

MODULES = (
    "nms",
    "detector",
    "losses",
    "roofline",
    "input_pipeline",
    "average_precision",
    "command_line",
)


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
        else f"{torch.get_num_threads()} cores"
    )
    print(
        f"{hardware}, {platform.machine()}, PyTorch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}\n"
    )
    rows = []
    for name in args.modules or MODULES:
        for row in importlib.import_module(f"benchmarks.{name}").rows(args.device):
            print(f"{row.question}: {row.ratio:.2f} of {row.peer}", flush=True)
            rows.append(row)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
