"""Tokens per second that mean something: real and label tokens, padding, waiting, utilisation."""

import time
from collections import deque
from typing import Any

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist

from overture.flops import peak_flops


class Throughput(Callback):
    """Counts tokens over all ranks and logs rates over the last `window` steps.

    Time is Composer's batch time, with waiting for data and checkpoints, without evaluation.
    """

    def __init__(self, window: int = 10, measure_peak: bool = False) -> None:
        self.measure_peak = measure_peak
        self.tokens = self.label_tokens = 0
        self._seconds = self._asked = self._waited = self._began = 0.0
        # Per step: tokens, label tokens, padded size, FLOPs (all ranks), seconds, of these waited
        # for data, and in the model and its optimizer.
        self._recent: deque[tuple[float, ...]] = deque(maxlen=window)
        self._counted = (0, 0, 0, 0.0)
        self._peak: float | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        trained = {name: p.requires_grad for name, p in state.model.named_parameters()}
        if not all(trained.values()) and not any("lora_" in name for name in trained):
            return  # how far back a gradient goes is not counted, so there is no MFU
        _plain(state).flops_per_batch = _plain(state).flops_of  # where Composer's monitor looks
        on_gpu, peak = state.device.name == "gpu", None
        if self.measure_peak:
            half = {Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}
            dtype = half.get(state.precision, _plain(state).compute_dtype)
            peak = measured_peak(dtype, "cuda" if on_gpu else "cpu")
        elif on_gpu:
            peak = peak_flops(torch.cuda.get_device_name())
        self._peak = peak and peak * dist.get_world_size()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = time.monotonic()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count the batch while it is still in the host's memory."""
        self._waited = time.monotonic() - self._asked
        batch = state.batch
        tokens, labels = sum(batch["num_tokens"]), sum(batch["num_labels"])
        room = batch["input_ids"].numel()  # places that are computed on, padding included
        if "source_room" in batch:  # of pairs, without what all rows of a microbatch pad
            room = sum(batch["source_room"]) + sum(batch["target_room"])
        self._counted = tokens, labels, room, _plain(state).flops_of(batch)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._began = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        # Forward, backward and optimizer, and the guards between them.
        inside = time.monotonic() - self._began
        counted = torch.tensor(self._counted, dtype=torch.float64)
        if dist.get_world_size() > 1:
            counted = state.device.tensor_to_device(counted)
            dist.all_reduce(counted, reduce_operation="SUM")
        counted = counted.tolist()
        seconds = state.timestamp.batch_wct.total_seconds() if state.timestamp.batch_wct else 0.0
        self.tokens += int(counted[0])
        self.label_tokens += int(counted[1])
        self._seconds += seconds
        self._recent.append((*counted, seconds, self._waited, inside))
        figures = self.figures()
        logger.log_metrics({f"overture/{k}": v for k, v in figures.items() if isinstance(v, float)})

    def figures(self) -> dict[str, Any]:
        """Return totals, and rates over the window."""
        columns = zip(*self._recent, strict=True)
        tokens, labels, room, flops, seconds, waited, inside = map(sum, columns)
        seconds = max(seconds, 1e-9)
        return {
            "tokens": self.tokens, "label_tokens": self.label_tokens,
            "tokens_per_second": tokens / seconds, "label_tokens_per_second": labels / seconds,
            "padding_share": 1 - tokens / room, "data_wait_share": min(waited / seconds, 1.0),
            # On CUDA the optimizer's step is only queued inside, so this holds for CPUs.
            "outside_share": max(1 - inside / seconds, 0.0),
            "mfu": flops / seconds / self._peak if self._peak else None,
        }  # fmt: skip

    def rates(self) -> dict[str, float | None]:
        """Return tokens and label tokens per second over the whole run, None before a step."""
        counts = {"tokens": self.tokens, "label_tokens": self.label_tokens}
        seconds = self._seconds
        return {f"{n}_per_second": c / seconds if seconds else None for n, c in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "labels": self.label_tokens, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tokens, self.label_tokens = state["tokens"], state["labels"]
        self._seconds = state["seconds"]


def _plain(state: State) -> Any:
    return getattr(state.model, "module", state.model)  # without DDP around it


def measured_peak(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Return the FLOP/s that this process reaches in large matrix products on a device."""
    size = 2048 if torch.device(device).type == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        (one @ other)[-1, -1].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
