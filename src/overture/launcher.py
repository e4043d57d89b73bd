"""What a rank of the composer launcher owes it: it ends when that does."""

import ctypes
import os
import re
import signal
from functools import cache
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@cache
def follow_launcher() -> bool:
    """Let this process be sent SIGTERM when its launcher is gone; return whether it has one.

    The launcher dies of signals and would leave its ranks behind. Called first in the life of a
    rank: later, a launcher that is gone already could not be told from none.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
        named = re.compile(rb"(.*/)?composer|composer\.cli(\.\w+)*")
        launched = any(map(named.fullmatch, command))
    except OSError:
        launched = False
    if launched:
        end_with(parent, signal.SIGTERM)
    return launched


def end_with(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # gone in between
        os.kill(os.getpid(), number)


def rank_is_gone(ranks: int) -> bool:
    """Return whether the launcher of this one of `ranks` has lost another: it then ends all by
    SIGTERM, which is no request of a user's to stop.
    """
    if not follow_launcher():
        return False
    parent = os.getppid()
    try:
        left = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:  # it is gone itself, or the kernel does not tell
        return False
    return 0 < len(left) < ranks
