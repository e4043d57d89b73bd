"""The errors that a user can cause or meet, each with the exit code that a script can act on.

Exit codes: 0 done, 2 config or arguments, 3 loss target not reached, 4 data or checkpoint failed
verification, 5 stopped by a guard, 75 preempted (run the same command again to continue).
Any other exception is a bug of ours and keeps its traceback.
"""

import difflib
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

from overture.config.secrets import learn, redact
from overture.launcher import follow_launcher, rank_is_gone

EXIT_DONE = 0
EXIT_TARGET_MISSED = 3
EXIT_GUARD = 5
EXIT_PREEMPTED = 75
GOES_ON = "the same command goes on from there"
# What OSError says of a disk that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class OvertureError(Exception):
    """Base class: the message says what is wrong, where, and what to do about it."""

    exit_code = 1


class ConfigError(OvertureError):
    """The user's config, arguments or input files are wrong."""

    exit_code = 2


class DataError(OvertureError):
    """Shards, a ledger or a checkpoint are not what they were when they were written."""

    exit_code = 4


class GuardError(OvertureError):
    """Training was stopped because going on would have wasted or spoilt the run."""

    exit_code = EXIT_GUARD


class Preempted(BaseException):
    """The run was asked to stop; `batch` is the step that was saved, None if there was none.

    Of other work `saved` says what is kept of it, and how it goes on. A signal may raise it in any
    line, also where libraries, or we, take whatever Exception there is for a fault: hence it is
    none.
    """

    exit_code = EXIT_PREEMPTED

    def __init__(
        self, batch: int | None, saved: str = f"nothing was to be saved yet; {GOES_ON}"
    ) -> None:
        saved = saved if batch is None else f"saved at step {batch}; {GOES_ON}"
        super().__init__(f"stopped as asked, {saved}")


def stopped(batch: int | None) -> BaseException:
    """Return what to raise on a signal to stop: Preempted, unless the launcher sends it for a rank
    that has ended, whose own error says why.
    """
    if rank_is_gone(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
        return GuardError("another rank ended; the same command goes on once that is mended")
    return Preempted(batch)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the most similar of the known names, or ``''``."""
    # A case slip is the commonest one, and difflib alone would not see it as a near match.
    folded = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f' (did you mean "{folded[match[0]]}"?)' if match else ""


def _asked(function: Callable[[], int | None], trains: bool) -> int | None:
    try:
        return function()
    except SystemExit as error:  # ours or Composer's answer to SIGTERM, as long as there is no run
        if not trains or error.code != 128 + signal.SIGTERM:
            raise
        raise stopped(None) from None


def exit_on_error(function: Callable[[], int | None], trains: bool = False) -> int:
    """Run a door's main function; print an OvertureError as one sentence and return its code.

    A door that `trains` hears SIGTERM from its first import on. From here on nothing that this
    process prints, or a library logs, shows a secret.
    """
    given = [*os.environ.items(), *(("", argument) for argument in sys.argv)]
    given += [argument.partition("=")[::2] for argument in sys.argv]
    pairs = zip(sys.argv, sys.argv[1:], strict=False)  # --name value; pieces are no secrets
    given += [p for p in pairs if p[0].startswith("--") and not p[0].endswith("tokens")]
    for named in given:
        learn(*named)
    if "HUGGINGFACE_HUB_TOKEN" in os.environ:  # serves where what the hub's client reads is not set
        os.environ.setdefault("HF_TOKEN", os.environ["HUGGINGFACE_HUB_TOKEN"])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows ASCII only is no error
            stream.reconfigure(errors="backslashreplace")
            stream.write = partial(lambda write, text: write(redact(text)), stream.write)
    if "LOCAL_RANK" in os.environ:
        follow_launcher()
    if trains and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return _asked(function, trains) or EXIT_DONE
    except (OvertureError, Preempted) as error:
        # Mostly every rank meets the same error. Rank zero goes first: the launcher then ends the
        # others and returns its code. If rank zero was fine, this rank speaks for itself.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)
            if isinstance(error, Preempted):  # rank zero says so; of two codes the launcher
                return EXIT_DONE  # would make one of its own
        print(error if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `... | head` is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
