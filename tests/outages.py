"""A run that the power goes out of."""

from composer import Callback

# 24 rows a batch make epochs of five steps of the smoke data; 16 steps are more than three.
RESUMED = (
    "global_train_batch_size=24", "device_train_microbatch_size=8", "max_duration=16ba",
    "trainable=lora", "lora.r=4", "lora.dropout=0.1", "model.dtype=bfloat16", "eval_interval=5ba",
    "eval_first=false",
)  # fmt: skip


class Power(Exception):
    """The power went out."""


class Outage(Callback):
    """Breaks off a run at the end of a step, before that step is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == self.step:
            raise Power
