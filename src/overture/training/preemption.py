"""Signals that ask a run to stop: finish the batch, save, and exit 75."""

import signal
from typing import Any

import torch
from composer.utils import dist, get_device

from overture.errors import Preempted, stopped
from overture.launcher import follow_launcher

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this run was asked to stop, by SIGTERM, SIGUSR1 or Ctrl-C.

    While `training` is set the request waits for the end of the batch; before and after, there is
    nothing to finish and Preempted is raised at once, with the step that is `saved`, if any.
    A second Ctrl-C stops without saving.
    """

    def __init__(self) -> None:
        self.asked = self.training = False
        self.saved: int | None = None
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        self._launched = follow_launcher()

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not self.training:
            raise stopped(self.saved) if number == signal.SIGTERM else Preempted(self.saved)
        print(f"{signal.Signals(number).name}: saving after this batch ...", flush=True)

    def finish(self) -> None:
        """Let signals pass from here on: all is done, but for a page and some lines."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Give the signals back; a rank that is ending anyway lets the launcher's SIGTERM pass."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._launched:  # which kills after 30 seconds; Composer's handler raises in any line
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def agreed(self) -> bool:
        """Return whether any rank was asked; all ranks must call it at the same time."""
        if dist.get_world_size() == 1:
            return self.asked
        asked = get_device().tensor_to_device(torch.tensor(int(self.asked)))
        dist.all_reduce(asked, reduce_operation="MAX")
        return bool(asked.item())
