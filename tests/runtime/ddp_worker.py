"""One step of training on 16 fixed images, shared by the processes that torchrun starts.

torchrun --nproc-per-node N tests/runtime/ddp_worker.py FILE    writes losses and gradients to FILE
"""

from __future__ import annotations

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from eecs598.runtime.distributed import (
    gather,
    is_main_process,
    mean_over_processes,
    num_processes,
    process_group,
    rank,
)
from one_stage_detector import FCOS


def main(path: str) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 64, 64, generator=rng)
    corners = 40 * torch.rand(16, 2, 2, generator=rng)
    sides = 8 + 16 * torch.rand(16, 2, 2, generator=rng)
    labels = torch.randint(3, (16, 2, 1), generator=rng).float()
    gt_boxes = torch.cat([corners, corners + sides, labels], dim=2)
    gt_boxes[8:, 1] = -1  # the halves differ in their number of objects

    torch.manual_seed(1)
    detector = FCOS(3, 8, [8], weights=None, box_loss="giou", frozen_batch_norm=True).train()
    network = DistributedDataParallel(detector) if num_processes() > 1 else detector
    own = slice(16 // num_processes() * rank(), 16 // num_processes() * (rank() + 1))
    losses = network(images[own], gt_boxes[own])
    sum(losses.values()).backward()
    result = {
        "losses": {name: mean_over_processes(loss.detach()) for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in detector.named_parameters()},
        "normalizer": detector.loss_normalizer,
        "ranks": gather(rank()),
    }
    if is_main_process():
        torch.save(result, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group("cpu"):
        main(sys.argv[1])
