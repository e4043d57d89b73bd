"""Shared memory and lock files that killed processes left behind.

Streaming names them `000000_locals`, `000000_cache_filelock` and so on, one number per dataset;
torch `torch_<process>_<random>_<number>`, one per tensor that a worker was about to send.
Whether a segment is in use is asked of the kernel, by a write lease: it is granted only while
nobody else, of any user and in any container, has the file open or mapped (man 2 fcntl). Where
there are no leases, nothing is removed; Streaming then takes the next number.
"""

import fcntl
import os
import signal
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN

SHARED_MEMORY = Path("/dev/shm")
# torch's, for a tensor from a worker: the name is gone as soon as it is mapped, or stays for ever.
ON_ITS_WAY = "torch_[0-9]*_[0-9]*_[0-9]*"


def remove_leftovers() -> None:
    """Remove what dead processes of this user left; called once per node."""
    for path in SHARED_MEMORY.glob(ON_ITS_WAY):
        _claim(path, _lease, remove=True)
    # Locks are listed first: a dataset makes its segments before its locks, so that a lock listed
    # here, if it is in use, has its segments in the later listing.
    locks = _by_number(Path(tempfile.gettempdir()), [BARRIER_FILELOCK, CACHE_FILELOCK])
    for paths in _by_number(SHARED_MEMORY, SHM_TO_CLEAN).values():
        if all(_claim(path, _lease) for path in paths):
            for path in paths:
                _claim(path, _lease, remove=True)
    kept = _by_number(SHARED_MEMORY, SHM_TO_CLEAN)
    for number in locks.keys() - kept.keys():
        for path in locks[number]:
            _claim(path, _lock, remove=True)


def _by_number(folder: Path, names: list[str]) -> dict[str, list[Path]]:
    """Return Streaming's files in a folder by the number that they share."""
    found = defaultdict(list)
    for name in names:
        for path in folder.glob(f"{'[0-9]' * 6}*_{name}"):
            found[path.name.split("_")[0]].append(path)
    return found


def _claim(path: Path, take: Callable[[BinaryIO], None], remove: bool = False) -> bool:
    """Return whether a file is ours alone, and perhaps remove it."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW), "rb+") as file:
            take(file)
            status = os.fstat(file.fileno())
            # With no link left, somebody else removed it and the name may mean a new file.
            if remove and status.st_uid == os.geteuid() and status.st_nlink:
                path.unlink()
            return status.st_uid == os.geteuid()
    except (OSError, AttributeError):  # in use, gone, not ours, or no leases on this system
        return False


def _lease(file: BinaryIO) -> None:
    # Who opens the file in this moment waits for us, and a signal says so: one that is ignored by
    # default, since the usual SIGIO would end this process.
    fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def _lock(file: BinaryIO) -> None:
    # filelock looks again after it has locked, and makes a new file if its own was removed.
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
