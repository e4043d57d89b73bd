"""Some steps of a run before the run: do gradients arrive, how long a step takes, and its memory.

Memory is that above what the process held after the imports: of a GPU what torch has allocated,
else the resident size. A few rows are tried, and more of them are taken to cost as much again each:
what a step keeps for its backward pass grows with the rows, and nothing else does. Where there is
time and room for it, a whole microbatch follows, twice before the optimizer and once behind it: the
allocator of a CPU finds less room for the second, as gradients lie among what the first gave back.
"""

import ctypes
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import Precision
from composer.core.precision import get_precision_context
from composer.utils import dist

from overture.config.schema import Config
from overture.data.loaders import build_loader
from overture.models.attention import describe_attention
from overture.models.build import position_limit
from overture.models.lora import model_fingerprint
from overture.models.loss import CHUNK, LARGE_CHUNK
from overture.models.trainable import describe_trained
from overture.tokenizer import load_tokenizer
from overture.training import load_path, resume
from overture.training.answers import held_out_answers
from overture.training.cores import use_cores
from overture.training.monitors import exchange_modules
from overture.training.network import begin_of_targets, build_network, check_splits, choose_device
from overture.training.optim import build_optimizer
from overture.training.tasks import TASKS

SEARCHED, PLACES = 1000, 8  # rows, among which the longest are looked for, and in how many shards
TRIED = (1, 4)  # rows
AT_ONCE = 15.0  # seconds that a whole microbatch may take to be tried too


class Rehearsal(NamedTuple):
    """What some steps have shown; bytes are those at the peak, above the imports."""

    described: list[str]  # of the model: what is trained
    attention: str  # how it attends, and what that was proven to keep apart
    rows: int  # of a microbatch
    samples: int  # of an epoch
    tokens: float  # real ones of a row among those that were looked at, mean
    seconds: float  # for a microbatch, forward and backward pass
    update: float  # seconds of an optimizer's step
    loss: float
    parts: dict[str, int]  # bytes by what they are for, of a microbatch; together the forecast
    loading: int  # bytes while the model was loaded
    per_row: int  # bytes
    foretold: int  # bytes, from the few rows alone
    whole: bool  # whether a whole microbatch was tried, whose memory is the forecast then
    without: list[str]  # trained tensors that no gradient reaches
    checkpoint: int  # bytes


def rehearse(config: Config, room: int) -> Rehearsal:
    """Take some steps as a run of this config would, on its longest rows, and write nothing.

    A whole microbatch is tried if it fits in `room` bytes and is fast enough. Raises what a run
    that begins anew does before its first step.
    """
    meter = Meter()
    device = choose_device(config)
    cpu_autocast = device == "cpu" and config.precision == "amp_bf16"
    precision = "fp32" if cpu_autocast else config.precision
    dist.initialize_dist(device, timeout=300)
    name, task = config.tokenizer_name or config.model.name, TASKS[config.task]
    tokenizer = load_tokenizer(name, config.model.trust_remote_code)
    ledgers = check_splits(config, tokenizer)
    network = build_network(config, tokenizer, device, ledgers)
    exchange_modules(network, config, precision)
    described, fingerprint = describe_trained(network), model_fingerprint(network)
    attention = describe_attention(network, device).removeprefix("attention: ")
    attention += f"; {network.proven}"
    if device == "cpu":
        use_cores()
    collate = task.collator(config, tokenizer, True)
    loader = build_loader(config, config.train_loader, collate, config.global_train_batch_size)
    rows = loader.dataloader.dataset
    if config.task == "seq2seq":
        begin_of_targets(config, network, rows, tokenizer)
    model = task.model(config, network, tokenizer, None, cpu_autocast).to(network.device)
    checkpoint = resume.checkpoint_bytes(config, model)
    resume.check_room(config, checkpoint)
    if config.load_path and "://" not in config.load_path:
        shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        start = load_path.find_load_path(config, fingerprint)
        load_path.refuse_as_long(config, start)
        load_path.take_weights(model, start, shapes)
    if config.generation is not None:
        collator = task.collator(config, tokenizer, False)
        held_out = build_loader(config, config.eval_loader, collator, config.device_eval_batch_size)
        held_out_answers(config, held_out.dataloader.dataset, tokenizer, position_limit(network))
    if config.compile:
        model.compile_backbone()
    optimizer, loading = build_optimizer(model, config.optimizer), meter.peak()
    model.train()

    count = rows.num_samples
    step = -(-count // PLACES)
    each = min(step, SEARCHED // PLACES)
    places = [range(begin, min(begin + each, count)) for begin in range(0, count, step)]
    looked_at = [rows[number] for place in places for number in place]
    looked_at.sort(key=_tokens, reverse=True)

    # As Composer's, but begun lower, as there is no time to find what is not too much.
    scaler = torch.amp.GradScaler(init_scale=2.0**12, enabled=precision == "amp_fp16")

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()

    def passes(size: int) -> float:
        batch = collate((looked_at * (size // len(looked_at) + 1))[:size])
        batch = {k: v.to(network.device) if hasattr(v, "to") else v for k, v in batch.items()}
        with get_precision_context(Precision(precision)):
            loss = model.loss(model(batch), batch)
        scaler.scale(loss).backward()
        return loss.item()

    def step(size: int) -> tuple[int, int, float, float, float]:
        """Return the peaks in bytes and the seconds of both passes and of the update; the loss."""
        meter.reset()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = passes(size)
        in_passes, between = meter.peak(), time.perf_counter()  # a peak waits for a GPU
        update()
        peak, end = meter.peak(), time.perf_counter()
        return in_passes, peak, between - start, end - between, loss

    size = config.device_train_microbatch_size
    batch = config.global_train_batch_size
    size = batch if size == "auto" else min(size, batch)
    few, more = (min(tried, size) for tried in TRIED)
    *_, before = step(few)  # makes the optimizer's state, and gradients for what is behind zeros
    low, *_ = step(few)
    step(more)
    high, updating, seconds, taken, _ = step(more)
    per_row = max(high - low, 0) // max(more - few, 1)
    foretold = forecast = max(high + (size - more) * per_row, updating)
    seconds = seconds * size / more
    whole = foretold < 0.8 * room and seconds + taken < AT_ONCE
    if whole:
        meter.reset()
        optimizer.zero_grad()
        passes(size)
        start = time.perf_counter()
        passes(size)
        meter.peak()
        seconds = time.perf_counter() - start
        update()
        optimizer.zero_grad()
        passes(size)
        forecast = meter.peak()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in trained.items() if ".experts." not in name}  # which wait
    without = [n for n, g in grads.items() if g is None or not g.any() or not g.isfinite().all()]
    parts = {
        "weights": sum(t.nbytes for t in [*network.parameters(), *network.buffers()]),
        "gradients": sum(p.nbytes for p in trained.values()),
        "optimizer": sum(
            value.nbytes for state in optimizer.state.values()
            for value in state.values() if torch.is_tensor(value)
        ),
    }  # fmt: skip
    rest = max(forecast - sum(parts.values()), 0)
    logits = min(_logits(network, size * _tokens(looked_at[0]), config.precision), rest)
    # Of one row alone it is not known what grows with rows.
    parts["activations"] = min(size * per_row, rest) if more > few else rest - logits
    parts["logits"] = min(logits, rest - parts["activations"])
    parts["workspace"] = rest - parts["activations"] - parts["logits"]
    if config.algorithms.ema is not None:  # which was not made here
        parts["moving average"] = parts["gradients"]
    mean = sum(map(_tokens, looked_at)) / len(looked_at)
    return Rehearsal(described, attention, size, rows.epoch_size, mean, seconds, taken, before,
                     parts, loading, per_row, foretold, whole, without, checkpoint)  # fmt: skip


def _logits(network: torch.nn.Module, labels: int, precision: str) -> int:
    """Return the bytes of the logits that exist at once, in the loss's precision and in float32."""
    if (head := network.get_output_embeddings()) is None:
        return 0
    on_gpu, weight = head.weight.is_cuda, head.weight
    rows = min(LARGE_CHUNK if on_gpu or weight.requires_grad else CHUNK, labels)
    wide = weight.element_size() if precision == "fp32" else 2
    return rows * len(weight) * (wide + (8 if on_gpu else 4))


def _tokens(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) + len(row.get("labels", ()))


def too_large(config: Config) -> str:
    ways = ["device_train_microbatch_size=1"]
    ways *= config.device_train_microbatch_size not in (1, "auto")
    ways += ["model.activation_checkpointing=true"] * (not config.model.activation_checkpointing)
    return f"it does not fit; try {' or '.join([*ways, 'a lower max_seq_len'])}"


class Meter:
    """The peak of this process's memory, in bytes, above what it was when this was made."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        self.start = 0 if self.on_gpu else _status("VmRSS")

    def reset(self) -> None:
        """Begin anew, with what is freed given back."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5): VmHWM begins anew

    def peak(self) -> int:
        if self.on_gpu:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
