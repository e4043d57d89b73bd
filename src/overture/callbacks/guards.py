"""Guards: what would waste or spoil a run silently stops it, with a reason."""

import faulthandler
import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor

from overture.callbacks.run_log import RunLog
from overture.errors import EXIT_GUARD, GuardError


class FiniteGuard(Callback):
    """Catches a loss or gradient that is not finite before the optimizer steps on it.

    Composer's NaNMonitor looks at the loss alone, misses Inf, and comes a step late. The policy is
    to stop, or to skip the step, `most` of them in all. The log is told, and beside it the samples
    of a bad batch are noted in `bad_batch.json`. A scaler's steps are its own to skip, as that is
    how it finds its scale, but not `SCALED` of them in a row.
    """

    SCALED = 50  # by then it has halved its scale to nothing

    def __init__(self, policy: Literal["stop", "skip"], most: int, log: RunLog) -> None:
        self.policy, self.most, self.log = policy, most, log
        self.path = log.path.with_name("bad_batch.json")
        self.skipped = self._scaled = 0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Refuse a batch without a label on any rank: its mean loss would be 0 / 0."""
        self._ids = state.batch["sample_ids"]
        self._bad = state.device.tensor_to_device(torch.zeros(()))
        labels = sum(state.batch["num_labels"])
        if dist.get_world_size() > 1:
            every = state.device.tensor_to_device(torch.tensor(labels))
            dist.all_reduce(every, reduce_operation="SUM")
            labels = every.item()
        if not labels:
            self._stop(state, "the batch has no label tokens, so nothing could be learned from it")

    def after_loss(self, state: State, logger: Logger) -> None:
        """Look at a microbatch's loss, without waiting for the device."""
        self._bad += ~state.loss.detach().isfinite()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look at the gradients of all microbatches, after the ranks have added theirs up."""
        norms_bad = gradients_not_finite(state.model)
        scaled = state.precision == Precision.AMP_FP16  # whose scaler skips such steps
        loss_bad = self._bad.clone()
        if norms_bad is not None:
            if scaled:
                self._scaled = self._scaled + 1 if norms_bad else 0
            if not scaled or self._scaled >= self.SCALED:
                self._bad += norms_bad
        if dist.get_world_size() > 1:
            dist.all_reduce(self._bad, reduce_operation="SUM")
        if not self._bad.item():
            return
        what = "the loss" if loss_bad.item() else "a gradient"
        if self.policy == "stop" or self.skipped >= self.most:
            after = f" after {self.skipped} skipped steps" if self.skipped else ""
            self._stop(state, f"{what} is not finite{after}")
        self.skipped += 1
        self._note(state, f"{what} is not finite; step skipped")
        for parameter in state.model.parameters():
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]

    def _note(self, state: State, reason: str) -> None:
        ids = dist.all_gather_object(self._ids.tolist())
        if dist.get_global_rank() == 0:
            step = state.timestamp.batch.value + 1
            samples = [number for each in ids for number in each]
            self.log.note(step, reason)
            record = {"step": step, "reason": reason, "sample_ids": samples}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _stop(self, state: State, reason: str) -> None:
        self._note(state, reason)
        where = f"its samples are in {self.path}, the last checkpoint is from before it"
        raise GuardError(f"step {state.timestamp.batch.value + 1}: {reason}; {where}")


class GradientGuard(Callback):
    """Refuses to train on when a parameter that is to be trained is out of the gradient's reach.

    The first steps show no gradient for half of every LoRA adapter: the other half is zero, and
    stays so while a warm-up begins with a learning rate of zero.
    """

    STEPS = 4

    def __init__(self) -> None:
        self._reached: set[str] = set()
        self._from_the_start = False

    def state_dict(self) -> dict[str, Any]:
        return {"reached": sorted(self._reached), "from_the_start": self._from_the_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reached, self._from_the_start = {*state["reached"]}, state["from_the_start"]

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self._from_the_start |= state.timestamp.batch.value == 0
        if state.timestamp.batch.value >= self.STEPS or not self._from_the_start:
            return
        trained = {n: p for n, p in state.model.named_parameters() if p.requires_grad}
        moved = {n: p.grad for n, p in trained.items() if p.grad is not None}
        self._reached |= {n for n, grad in moved.items() if local_part(grad).any()}
        if state.timestamp.batch.value == self.STEPS - 1:
            self._reached = set().union(*dist.all_gather_object(self._reached))  # of all shards
            # An expert waits until a token is sent to it.
            if missing := [n for n in trained if n not in self._reached and ".experts." not in n]:
                fault = f"{len(missing)} of {len(trained)} trained tensors got no gradient in"
                shown = f"{self.STEPS} steps, so they would never learn: {', '.join(missing[:3])}"
                raise GuardError(f"{fault} {shown}; train others (trainable, lora.target_modules)")


class Watchdog(Callback):
    """Ends a run that has finished no batch for `timeout` seconds (0: never), with exit code 5.

    It looks from the first evaluation or step on; saving counts too. The stacks of all threads go
    to `path`, with those that the loaders' workers write on SIGUSR2 to `workers`, an open file;
    `report` is told the reason before the end.
    """

    def __init__(
        self, timeout: float, path: Path, workers: IO[bytes], report: Callable[[str], None]
    ) -> None:
        self.timeout, self.path, self.workers, self.report = timeout, path, workers, report
        self._beat, self._watching = time.monotonic(), False
        self._over = threading.Event()

    def fit_start(self, state: State, logger: Logger) -> None:
        self._beat = time.monotonic()
        if self.timeout and not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, daemon=True).start()

    eval_start = fit_start

    def batch_end(self, state: State, logger: Logger) -> None:
        self._beat = time.monotonic()

    eval_batch_end = batch_end

    def unwatched(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """Return work that finishes no batch, such as translating, and may take its time."""

        def go() -> Any:
            self._beat = math.inf
            try:
                return work()
            finally:
                self._beat = time.monotonic()

        return go

    def close(self, state: State, logger: Logger) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(self.timeout / 4, 5)):
            if time.monotonic() - self._beat > self.timeout:
                self._end()

    def _end(self) -> None:
        doing = f"what every thread and every worker of a loader was doing is in {self.path}"
        reason = f"no batch was finished for {self.timeout:g} seconds (guards.timeout); {doing}"
        children = multiprocessing.active_children()
        try:
            with self.path.open("wb", buffering=0) as file:
                faulthandler.dump_traceback(file)
                for child in children:
                    self.workers.write(f"\nworker {child.pid}:\n".encode())
                    os.kill(child.pid, signal.SIGUSR2)
                    time.sleep(0.5)
                self.workers.seek(0)
                file.write(self.workers.read())
            self.report(reason)
            print(f"error: {reason}", flush=True)
        finally:
            for child in children:  # a sleeping one would outlive this process
                child.kill()
            os._exit(EXIT_GUARD)


class SpikeGuard(Callback):
    """Tells the log of a training loss far above the recent ones, or `stop`s the run.

    Far is six standard deviations and a tenth above the mean of the last 50 steps.
    """

    WINDOW, LEAST = 50, 20

    def __init__(self, stop: bool, log: RunLog) -> None:
        self.stop, self.log = stop, log
        self.steps: list[int] = []
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def batch_end(self, state: State, logger: Logger) -> None:
        loss, step = state.total_loss_dict["loss/train/total"], state.timestamp.batch.value
        if not math.isfinite(loss):  # of a step that was skipped
            return
        if len(self._recent) >= self.LEAST:
            mean, spread = statistics.fmean(self._recent), statistics.pstdev(self._recent)
            if loss > max(mean + 6 * spread, 1.1 * mean):
                self.steps.append(step)
                said = f"loss {loss:.4g} after a mean of {mean:.4g}: a spike"
                self.log.note(step, said)
                if self.stop:
                    raise GuardError(f"step {step}: {said}; guards.loss_spike=mark would go on")
                if dist.get_global_rank() == 0:
                    print(f"warning: step {step}: {said}", flush=True)
        self._recent.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self._recent = state["steps"], deque(state["recent"], maxlen=self.WINDOW)


def gradients_not_finite(model: torch.nn.Module) -> torch.Tensor | None:
    """Return whether a gradient is NaN or Inf, [] bool on their device; None if there are none."""
    gradients = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    return ~torch.stack(torch._foreach_norm(gradients)).isfinite().all() if gradients else None


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a rank holds of a tensor: its shard under FSDP2, or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
