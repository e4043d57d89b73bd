"""What can be known before training: is the data there, and does the machine work."""

import importlib.util
import math
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from overture.config.load import local_rank
from overture.config.schema import Config
from overture.data.integrity import verify_split
from overture.data.labels import head_config
from overture.data.schema import check_split
from overture.errors import ConfigError

NEEDED = ("torch", "composer", "streaming", "transformers", "datasets", "peft", "omegaconf")
OPTIONAL = {
    "flash_attn": "faster attention on CUDA", "wandb": "logging to Weights & Biases",
    "mlflow": "logging to MLflow", "tensorboard": "logging to TensorBoard",
    "bitsandbytes": "a base in 4 or 8 bits",
}  # fmt: skip


def check_data(config: Config, most: float = math.inf) -> None:
    """Check the local splits that a config names, reading `most` bytes of each; imports no torch.

    Raises ConfigError if one is missing or does not fit, or the package of a logger, DataError if a
    split is not what was written.
    """
    if config.load_path and "://" not in config.load_path and not Path(config.load_path).exists():
        raise ConfigError(f"load_path: {config.load_path}: no such file")
    for name, options in vars(config.loggers).items():  # each is named like the package it needs
        if options is not None and not importlib.util.find_spec(name):
            raise ConfigError(f"loggers.{name}: needs `pip install {name}`")
    ledgers = {}
    for name, stream, batch in config.splits():
        if stream.data_remote is not None:
            continue  # what lies there is checked when it arrives
        folder = Path(stream.data_local) / stream.split
        ledgers[name] = ledger = check_split(folder, config.task, config.max_seq_len, batch)
        verify_split(folder, ledger, most if local_rank() == 0 else 0)  # hashed once per node
    if config.task == "classify" and ledgers:
        head_config(ledgers)


def check_environment() -> Iterator[tuple[str, bool, str]]:
    """Yield (what, whether it is fine, finding) for this machine and its packages."""
    supported = ("3", "10") <= platform.python_version_tuple()[:2] <= ("3", "12")
    yield "Python", supported, f"{platform.python_version()} (3.10 to 3.12 are supported)"
    found = {name: _import(name) for name in NEEDED}
    yield from ((name, *finding) for name, finding in found.items())
    if not all(fine for fine, _ in found.values()):
        return
    import torch

    from overture.callbacks.throughput import measured_peak
    from overture.training.cores import processor

    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    yield "CPU", True, f"{processor()}, {torch.get_num_threads()} threads"

    def tried(what: str, of: Callable[[], tuple[bool, str]]) -> tuple[str, bool, str]:
        try:
            return what, *of()
        except RuntimeError as error:  # torch has nothing for this device, or others have it
            return what, False, str(error).splitlines()[0]

    def memory(device: torch.device) -> tuple[bool, str]:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        return True, f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free"

    for device in cards:
        yield tried(str(device), partial(memory, device))
    for device in [torch.device("cpu"), *cards]:
        for dtype in (torch.float32, torch.bfloat16):
            rate = partial(measured_peak, dtype, device)
            label = f"{device} {str(dtype).removeprefix('torch.')}"
            yield tried(label, lambda rate=rate: (True, f"{rate() / 1e9:,.0f} GFLOP/s"))
        yield tried(f"{device} model", partial(_tiny_training_step, device))
    for name, purpose in OPTIONAL.items():
        fine, finding = _import(name)
        yield name, True, finding if fine else f"not installed (optional: {purpose})"


def _import(name: str) -> tuple[bool, str]:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken wheel can raise anything at import
        return False, f"cannot be imported: {error}"
    return True, str(getattr(module, "__version__", "present"))


def _tiny_training_step(device: Any) -> tuple[bool, str]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config).to(device)
    ids = torch.randint(0, 64, (2, 16), device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    fine = all(torch.isfinite(p.grad).all() for p in model.parameters())
    return fine, f"forward and backward {'give' if fine else 'do not give'} finite gradients"
