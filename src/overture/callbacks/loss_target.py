"""Stop as soon as the eval loss is at or below a target, and measure the time it took."""

from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from overture.callbacks.run_log import RunLog


class LossTarget(Callback):
    """MLPerf-style quality target: training ends at the first evaluation at or below it.

    Composer's own ThresholdStopper takes a falling metric for a rising one unless told otherwise,
    and compares strictly. The target is in nats per label token. Time to train follows the MLPerf
    training rules, but that shards were hashed before: from before the first batch is read, when
    `log` was made, to the end of the evaluation that saw the target.
    """

    def __init__(self, cross_entropy: float, log: RunLog) -> None:
        self.target, self.log = cross_entropy, log  # which has heard of an evaluation before
        self.seconds_to_train: float | None = None

    @property
    def reached(self) -> bool:
        """Whether an evaluation was at or below the target."""
        return self.seconds_to_train is not None

    def eval_end(self, state: State, logger: Logger) -> None:
        if not self.reached and self.log.last_eval <= self.target:
            self.seconds_to_train = self.log.seconds()
            state.stop_training()

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target, "seconds_to_train": self.seconds_to_train}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the outcome of another target is not ours."""
        if state["target"] == self.target:
            self.seconds_to_train = state["seconds_to_train"]
