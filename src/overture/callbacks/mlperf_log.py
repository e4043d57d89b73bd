"""`mlperf.log`: a run in the events of MLPerf's training benchmarks, for their tools to read."""

import json
import time
from typing import Any

import psutil
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from overture.callbacks.run_log import RunLog
from overture.config.schema import Config

PREFIX = ":::MLLOG "  # of mlperf_logging.mllog
KINDS = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}  # by the end of a key


def facts_of(config: Config, train_samples: int, eval_samples: int | None) -> dict:
    """Return what a log says before the run, by MLPerf's names; what a config lacks is left out."""
    warmup, target = config.scheduler.t_warmup, config.callbacks.loss_target
    clipping, lora = config.algorithms.gradient_clipping, config.lora
    micro = config.device_train_microbatch_size
    per_rank = config.global_train_batch_size // dist.get_world_size()
    found = {
        "submission_benchmark": config.callbacks.mlperf_log.benchmark, "seed": config.seed,
        "global_batch_size": config.global_train_batch_size,
        "gradient_accumulation_steps": None if micro == "auto" else max(per_rank // micro, 1),
        "train_samples": train_samples, "eval_samples": eval_samples,
        "opt_name": config.optimizer.name, "opt_base_learning_rate": config.optimizer.lr,
        "opt_adamw_weight_decay": config.optimizer.weight_decay, "opt_learning_rate_warmup": warmup,
        "opt_learning_rate_training_duration": config.max_duration,
        "opt_gradient_clip_norm": clipping and clipping.clipping_threshold,
        "lora_rank": lora and lora.r, "lora_alpha": lora and lora.alpha,
        "eval_interval": config.eval_interval, "quality_target": target and target.cross_entropy,
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


class MLPerfLog(Callback):
    """Writes the events of MLPerf's LoRA benchmark, in their order, under a name of our own.

    Between run_start and run_stop blocks of training and evaluations take turns; each says after
    how many samples. The run starts before the first batch is read; shards were hashed before, off
    the clock. What a kill has cut off is taken back on resume. `facts` are logged before the run:
    hyperparameters and sizes by MLPerf's names. Nothing here claims compliance with MLPerf's rules.
    """

    def __init__(self, log: RunLog, facts: dict[str, Any], started: int, resumed: bool) -> None:
        """Take the time of the run's start, in milliseconds of time.time()."""
        self.log, self.path = log, log.path.with_name("mlperf.log")
        self.facts, self.started, self.resumed = facts, started, resumed
        self._in_block, self._joules, self._evaluated = False, None, None
        self._before: dict[str, Any] | None = None  # the evaluation that is under way

    def init(self, state: State, logger: Logger) -> None:
        if self.resumed:
            return
        if dist.get_global_rank() == 0:
            self.path.write_bytes(b"")
        self._write("init_start", at=int(psutil.Process().create_time() * 1000))
        for key, value in self.facts.items():
            self._write(key, value)
        self._write("init_stop", at=self.started)
        self._write("run_start", at=self.started)
        self._joules = _joules()

    def batch_start(self, state: State, logger: Logger) -> None:
        if not self._in_block:
            self._block("start", state)

    def eval_start(self, state: State, logger: Logger) -> None:
        self._before = self.state_dict()
        if self._in_block:
            self._block("stop", state)
        self._write("eval_start", samples_count=state.timestamp.sample.value)

    def eval_end(self, state: State, logger: Logger) -> None:
        samples = state.timestamp.sample.value
        self._write("eval_accuracy", self.log.last_eval, samples_count=samples)
        self._evaluated, self._before = self._write("eval_stop", samples_count=samples), None

    def stop(self, state: State, reached: bool) -> None:
        """End the log of a run that came to its end, a `reached` target with its evaluation: what
        is written of the weights after it is no training.
        """
        if self._in_block:
            self._block("stop", state)
        more = {"status": "success" if reached else "aborted"}
        # Not of a run that was resumed, whose parts are not added up.
        now = None if self._joules is None else _joules()
        used = None if now is None else now - self._joules
        of_nodes = dist.all_gather_object(used if dist.get_local_rank() == 0 else 0.0)
        if None not in of_nodes:
            more["joules"] = sum(of_nodes)
        at = self._evaluated if reached else None
        self._write("run_stop", at=at, samples_count=state.timestamp.sample.value, **more)

    def state_dict(self) -> dict[str, Any]:
        """Return where to go on: an evaluation that a stop breaks off is begun anew."""
        if self._before:
            return self._before
        size = self.path.stat().st_size if self.path.exists() else 0
        return {"size": size, "in_block": self._in_block}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what was written after the checkpoint."""
        self._in_block = state["in_block"]
        if self.path.exists() and dist.get_global_rank() == 0:
            with self.path.open("r+b") as file:
                file.truncate(min(state["size"], self.path.stat().st_size))

    def _block(self, which: str, state: State) -> None:
        self._in_block = which == "start"
        self._write(f"block_{which}", samples_count=state.timestamp.sample.value)

    def _write(self, key: str, value: Any = None, at: int | None = None, **metadata: Any) -> int:
        at = at or int(time.time() * 1000)
        if dist.get_global_rank() == 0:
            kind = KINDS.get(key.rpartition("_")[2], "POINT_IN_TIME")
            event = {"namespace": "", "time_ms": at, "event_type": kind, "key": key,
                     "value": value, "metadata": metadata}  # fmt: skip
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{PREFIX}{json.dumps(event)}\n")
        return at


def _joules() -> float | None:
    """Return what the GPUs here have used since the driver was loaded; None if none says."""
    try:
        import pynvml
    except ImportError:  # nvidia-ml-py is optional
        return None
    try:
        pynvml.nvmlInit()
        cards = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, cards)) / 1000 or None
    except pynvml.NVMLError:  # no driver, or a card too old
        return None
