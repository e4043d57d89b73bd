"""What a rank computes on: its GPU; or the CPU, its name, its threads and its allocator."""

import ctypes
import os
import platform
import re
from pathlib import Path

import torch
from composer.utils import dist

from overture.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def has_gpu() -> bool:
    """Return whether there is a GPU for this rank; ConfigError if there are some for others."""
    rank, count = dist.get_local_rank(), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= count:
        fault = f"rank {rank} of this node has no GPU, of which {count} can be seen"
        raise ConfigError(f"{fault}; start as many ranks: composer -n {count}")
    return torch.cuda.is_available()


def use_cores() -> str:
    """Give this rank its share of the cores, keep its memory, and return one line on both.

    Fewer threads, as by OMP_NUM_THREADS, are left as they are.
    """
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // dist.get_local_world_size())
    torch.set_num_threads(min(torch.get_num_threads(), share))
    return f"CPU: {torch.get_num_threads()} of {cores} cores for each rank, {_keep_memory()}"


def _keep_memory() -> str:
    """Let the process keep what it frees, and return the name of its allocator.

    glibc gives large blocks back to the kernel, which then has to clear them for the next step.
    """
    libraries = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    allocator = next((name for name in ("tcmalloc", "jemalloc") if name in libraries), None)
    if allocator is None and platform.libc_ver()[0] == "glibc":
        allocator = "glibc's allocator, which keeps what is freed"
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(setting, 2**30)
    return allocator or "the system's allocator"


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def host_memory() -> int:
    """Return the bytes that are free of this machine's memory, or its container's."""
    info = Path("/proc/meminfo").read_text()
    free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", info)[1])
    own = re.findall(r"^\d+:(?:memory)?:/(.*)", Path("/proc/self/cgroup").read_text(), re.M)
    roots = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
    below = [root / part for root in roots for part in ("", *own)]
    for place in {p for path in below for p in (path, *path.parents) if "cgroup" in str(p)}:
        for limit, use in (("limit_in_bytes", "usage_in_bytes"), ("max", "current")):
            limit, use = place / f"memory.{limit}", place / f"memory.{use}"
            if limit.is_file() and (most := limit.read_text().strip()).isdigit():
                # The kernel gives back the files that it only remembers.
                text = (place / "memory.stat").read_text()
                files = re.findall(r"^(?:total_)?inactive_file (\d+)", text, re.M)
                free = min(free, int(most) - int(use.read_text()) + max(map(int, files), default=0))
    return free
