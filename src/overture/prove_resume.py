"""The proof on a user's own config, in miniature, that a kill changes nothing."""

import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from overture.checkpoint import STATE
from overture.config.schema import DOORS, Config
from overture.data.schema import sha256_file
from overture.errors import ConfigError
from overture.report import read_records

ROOT = Path(__file__).parents[2]
SMALL = (
    "save_interval=2ba", "eval_first=false", "eval_loader=null", "generation=null",
    "callbacks.loss_target=null", "callbacks.early_stop=null", "callbacks.mlperf_log=null",
    "metrics=null", "loggers={tensorboard: null, wandb: null, mlflow: null}", "autoresume=true",
    "save_folder=null", "save_num_checkpoints_to_keep=2", "progress_bar=false",
    "console_log_interval=null", "scheduler.t_warmup=0ba",
)  # fmt: skip


def prove_resume(config: Config, arguments: list[str], steps: int = 12) -> Iterator[str]:
    """Train for some steps, and again with a kill -9 in between; yield what is seen.

    `config` is that of the `arguments`; what these evaluate or generate is left out. The steps are
    doubled while the kill comes too late. Raises ConfigError if the run fails by itself, or is over
    before it can be killed.
    """
    with tempfile.TemporaryDirectory() as name:
        for attempt in range(4):
            count = steps * 2**attempt
            whole, parts = (Path(name, f"{kind}{attempt}") for kind in ("whole", "parts"))
            sharded = config.fsdp_config is not None  # one process has no need of shards
            small = (*SMALL, "fsdp_config.state_dict_type=full") if sharded else SMALL
            if config.load_path:  # whose steps would count
                small = (*small, "load_weights_only=true")
            options = [*arguments, *small, f"max_duration={count}ba", f"eval_interval={count}ba"]
            command = [sys.executable, str(ROOT / DOORS[config.task]), *options]
            _finish([*command, f"run_folder={whole}"])
            yield f"{count} steps without an interruption"
            step = _kill([*command, f"run_folder={parts}"], parts, count // 2)
            if step is not None:
                break
            for folder in (whole, parts):
                shutil.rmtree(folder)
        else:
            raise ConfigError(f"{count} steps were over before the run could be killed")
        saved = sorted(int(p.name[2:]) for p in (parts / "checkpoints").glob("ba*"))
        yield f"killed at step {step}, with checkpoints of steps {saved}"
        _finish([*command, f"run_folder={parts}"])
        found = _difference(whole, parts, count)
        if found and torch.cuda.is_available():
            again = Path(name, "again")
            _finish([*command, f"run_folder={again}"])
            if _difference(whole, again, count):
                fault = "two runs without an interruption differ too, as kernels of this GPU add up"
                remedy = "CUDA_VISIBLE_DEVICES= before the command tries it on the CPU"
                raise ConfigError(f"{fault} in another order each time; {remedy}")
        yield found or "identical: losses, weights and optimizer"


def _difference(one: Path, other: Path, count: int) -> str | None:
    """Return in what two runs of so many steps differ, None if in nothing."""
    losses = [_losses(folder) for folder in (one, other)]
    for number in range(1, count + 1):
        if losses[0].get(number) != losses[1].get(number):
            return f"differs at step {number}: {losses[0].get(number)}, {losses[1].get(number)}"
    for what, load in (("weights", _exported), ("weights or optimizer", _saved)):
        if load(one, count) != load(other, count):
            return f"differs in the {what} at step {count}"
    return None


def _exported(folder: Path, _: int) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in (folder / "hf").glob("*.safetensors")}


def _saved(folder: Path, step: int) -> dict[str, bytes]:
    """Return the tensors of a checkpoint, its model's and its optimizer's, by their places."""
    from torch.utils import _pytree as trees

    path = folder / "checkpoints" / f"ba{step}" / STATE
    state = torch.load(path, map_location="cpu", weights_only=False)["state"]
    leaves, _ = trees.tree_flatten_with_path([state["model"], state["optimizers"]])
    found = {trees.keystr(path): t for path, t in leaves if torch.is_tensor(t)}
    raw = {place: t.contiguous().flatten().view(torch.uint8) for place, t in found.items()}
    return {place: hashlib.sha256(t.numpy()).digest() for place, t in raw.items()}


def _finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"the run fails by itself: {done.stderr.strip()[-500:]}")


def _kill(command: list[str], folder: Path, after: int) -> int | None:
    """Return the step that a process was killed after, None if it was over before."""
    silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    process = subprocess.Popen(command, **silent)
    while process.poll() is None and len(_losses(folder)) < after:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return None if (folder / "result.json").exists() else len(_losses(folder))


def _losses(folder: Path) -> dict[int, float]:
    records = read_records(folder / "metrics.jsonl", [])
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
