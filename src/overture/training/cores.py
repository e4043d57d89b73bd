"""The CPU's threads and memory allocator: chosen once, and said."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from composer.utils import dist

_ALLOCATORS = ("tcmalloc", "jemalloc")


def use_cores() -> str:
    """Give this rank its share of the cores and return one line on it.

    Fewer threads, as by OMP_NUM_THREADS, are left as they are.
    """
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // dist.get_local_world_size())
    torch.set_num_threads(min(torch.get_num_threads(), share))
    libraries = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    allocator = next((name for name in _ALLOCATORS if name in libraries), "the system's allocator")
    return f"CPU: {torch.get_num_threads()} of {cores} cores for each rank, {allocator}"
