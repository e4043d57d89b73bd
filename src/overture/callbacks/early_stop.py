"""Stop when evaluations get no better, and keep the weights of the best one."""

import hashlib
import math
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from overture.callbacks.run_log import RunLog
from overture.data.schema import sha256_file, write_aside
from overture.errors import DataError


class EarlyStop(Callback):
    """Ends training once eval cross-entropy has not fallen by more than `min_delta` (nats) in
    `patience` evaluations in a row.

    With `keep_best` the trained weights of each best evaluation, by however little, are written to
    `path`, whole or not at all, from where `restore` takes them back. Composer's own EarlyStopper
    takes a falling metric for a rising one unless told otherwise, and keeps nothing. The `log`
    comes before it.
    """

    def __init__(
        self, patience: int, min_delta: float, keep_best: bool, path: Path, log: RunLog
    ) -> None:
        self.patience, self.min_delta, self.keep_best = patience, min_delta, keep_best
        self.path, self.log = path, log
        # Step, cross-entropy and other scores of the best evaluation so far.
        self.best: tuple[int, float, dict[str, float]] | None = None
        self.mark, self.waited = math.inf, 0  # the loss that others have to be below, since when
        self.digest: str | None = None  # of the file

    @property
    def is_over(self) -> bool:
        return self.waited >= self.patience

    def fit_start(self, state: State, logger: Logger) -> None:
        """Begin anew where the best weights are not here: on another machine, say."""
        here = dist.all_gather_object(self.path.is_file())[0]  # rank zero wrote them
        if self.best and self.keep_best and not here:
            self.log.note(self.best[0], "the best weights, of this step, are not here: begun anew")
            self.best, self.waited = None, 0

    def eval_end(self, state: State, logger: Logger) -> None:
        step, loss = state.timestamp.batch.value, self.log.last_eval
        first = self.best is None or (math.isnan(self.best[1]) and not math.isnan(loss))
        if first or loss < self.best[1]:
            self.best = (step, loss, self.log.scores)
            if self.keep_best and dist.get_global_rank() == 0:
                self._write(state)
        if first or loss < self.mark - self.min_delta:
            self.mark, self.waited = loss, 0
            return
        self.waited += 1
        if self.is_over and state.timestamp < state.max_duration:
            fault = f"no fall in {self.waited} evaluations below {self.mark:.4f}"
            self.log.note(step, f"stopped early: {fault}, the best being of step {self.best[0]}")
            state.stop_training()

    def _write(self, state: State) -> None:
        from safetensors.torch import save

        kept = {name: p.detach().cpu().contiguous() for name, p in _trained(state).items()}
        # Not its own save_file, whose error on a full disk is none of the system's.
        content = save(kept)
        self.digest = hashlib.sha256(content).hexdigest()
        write_aside(self.path, content)

    def restore(self, state: State) -> None:
        """Give the model the weights, and the log the scores, of the best evaluation.

        Raises DataError if the file is not of that evaluation.
        """
        if not self.keep_best or self.best is None:
            return
        step, self.log.last_eval, self.log.scores = self.best
        if step == state.timestamp.batch.value:
            return
        fault = self._read(state) if dist.get_global_rank() == 0 else None
        (fault, *_) = dist.all_gather_object(fault)
        if fault:
            remedy = "callbacks.early_stop.keep_best=false resume.allow=[callbacks]"
            raise DataError(f"{self.path}: {fault}; the last weights are given with {remedy}")
        for p in _trained(state).values():
            dist.broadcast(p.data, src=0)
        self.log.note(step, "the weights of this step are kept, as no evaluation was better")

    def _read(self, state: State) -> str | None:
        from safetensors.torch import load_file

        try:
            if sha256_file(self.path) != self.digest:
                return "its weights are not what was written"
            kept = load_file(self.path)
            for name, p in _trained(state).items():
                p.data.copy_(kept[name])
        except (OSError, KeyError) as error:
            return f"the weights of the best evaluation cannot be read ({error})"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best", "mark", "waited", "digest")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.best and "mark" not in state:  # as it was before
            self.mark = self.best[1]


def _trained(state: State) -> dict[str, Any]:
    """Return the trained parameters by their names, with or without DDP around the model."""
    named = state.model.named_parameters()
    return {name.removeprefix("module."): p for name, p in named if p.requires_grad}
