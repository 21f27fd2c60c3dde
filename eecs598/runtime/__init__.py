"""Files, loader processes, errors and description of the machine, distributed training."""

from eecs598.runtime.distributed import (
    any_process,
    broadcast_buffers,
    gather,
    is_main_process,
    mean_over_processes,
    num_processes,
    process_group,
    rank,
)
from eecs598.runtime.environment import describe_environment, package_versions, processor_name
from eecs598.runtime.errors import RunError, explain, explained
from eecs598.runtime.files import (
    atomic_write,
    folder_lock,
    read_json,
    read_text,
    remove_unfinished,
    write_json,
)
from eecs598.runtime.loading import batches_of, fit_workers, make_loader

__all__ = [
    "RunError",
    "any_process",
    "atomic_write",
    "batches_of",
    "broadcast_buffers",
    "describe_environment",
    "explain",
    "explained",
    "fit_workers",
    "folder_lock",
    "gather",
    "is_main_process",
    "make_loader",
    "mean_over_processes",
    "num_processes",
    "package_versions",
    "process_group",
    "processor_name",
    "rank",
    "read_json",
    "read_text",
    "remove_unfinished",
    "write_json",
]
