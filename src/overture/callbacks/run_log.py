"""The run folder: a line of metrics per step and eval, and the clock of time to train."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from overture.callbacks.throughput import Throughput
from overture.config.secrets import redact

METRIC = "TokenCrossEntropy"
SECONDS = 0.2  # train records of fewer are written together


class RunLog(Callback):
    """Appends to `metrics.jsonl`; only rank zero writes.

    Its clock starts when it is made, before the first batch is read (shards were hashed before),
    runs through evaluation, and goes on where it was after a resume.

    A train record is written per step, an eval record per evaluation, an event record for what
    guards did or a resume met, a translation record for each that is shown. After a resume steps
    may occur twice: the last record of one holds.
    A kill may lose the train records since the last write, but none before a checkpoint.
    """

    def __init__(self, run_folder: Path, throughput: Throughput) -> None:
        self.path, self.throughput = run_folder / "metrics.jsonl", throughput
        self._started, self.before = time.monotonic(), 0.0  # seconds of earlier parts
        self.step = 0  # of the last evaluation
        self.first_eval: float | None = None
        self.last_eval: float | None = None  # nats for each label token
        self.scores: dict[str, float] = {}  # of the last evaluation, where the model has others
        self.more: Callable[[], dict[str, float]] = dict  # asked for more of them
        self._lines: list[str] = []
        self._written = self._rate = 0.0

    def seconds(self) -> float:
        """Return the seconds so far, over all parts of the run."""
        return self.before + time.monotonic() - self._started

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._rate = state.schedulers[0].get_last_lr()[0]  # at its end it is that of the next one

    def batch_end(self, state: State, logger: Logger) -> None:
        loss = finite(state.total_loss_dict["loss/train/total"])
        figures = {"loss": loss, "learning_rate": self._rate, **self.throughput.figures()}
        self._append("train", state.timestamp.batch.value, figures)

    def eval_end(self, state: State, logger: Logger) -> None:
        loss = self.last_eval = float(state.eval_metrics["eval"][METRIC].compute())
        self.step = state.timestamp.batch.value
        self.first_eval = loss if self.first_eval is None else self.first_eval
        others = {n: m for n, m in state.eval_metrics["eval"].items() if n != METRIC}
        self.scores = {name: float(metric.compute()) for name, metric in others.items()}
        perplexity = {} if others else {"perplexity": math.exp(min(loss, 700.0))}
        self.scores |= self.more()
        figures = {"cross_entropy": loss, **perplexity, **self.scores}
        logger.log_metrics({f"metrics/eval/{name}": value for name, value in figures.items()})
        self._append("eval", self.step, {name: finite(value) for name, value in figures.items()})

    def note(self, step: int, what: str, kind: str = "event") -> None:
        self._append(kind, step, {"what": redact(what)})

    def close(self, state: State, logger: Logger) -> None:
        self.flush()

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        kept = {n: getattr(self, n) for n in ("step", "first_eval", "last_eval", "scores")}
        return {**kept, "before": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _append(self, kind: str, step: int, more: dict[str, Any]) -> None:
        if dist.get_global_rank() == 0:
            seconds = round(self.seconds(), 3)
            record = {"kind": kind, "step": step, "seconds": seconds, **more}
            self._lines.append(json.dumps(record) + "\n")
            if kind != "train" or time.monotonic() - self._written >= SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what waits, all at once: no kill then leaves half a line."""
        lines, self._lines, self._written = self._lines, [], time.monotonic()
        if lines:
            with self.path.open("ab") as file:
                file.write("".join(lines).encode())


def finite(value: float) -> float | None:
    """Return a figure for JSON, which has no NaN."""
    return value if math.isfinite(value) else None
