"""The run folder: begun once, gone on with after an interruption, refused when finished."""

import errno
import fcntl
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.utils import dist

import overture
from overture.callbacks.run_log import finite
from overture.config.load import dump_config
from overture.config.schema import Config
from overture.data.schema import write_aside
from overture.errors import FULL, ConfigError, DataError, GuardError
from overture.training.cores import processor
from overture.training.rehearsal import too_large
from overture.training.resume import local_folder, on_rank_zero, places_of

FINISHED = ("target_reached", "target_missed", "completed")
_held: dict[Path, TextIO] = {}  # locks of this process
PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "datasets", "peft", "numpy")
MEMORY = re.compile("can't allocate memory|CUDA out of memory|CUDA error: out of memory")
# What torch says, in any line of ours, of another process that is gone.
LOST = {
    r"DataLoader worker": "a worker of the loader died",
    r"(reset|closed) by peer|likely closed|Broken pipe|process exited|ncclRemoteError|"
    r"NCCL communicator was aborted|Watchdog caught collective": "another rank ended",
}


def refuse_finished_run(config: Config) -> Path:
    """Return the run folder; ConfigError if a finished run, or another process, is in it."""
    on_rank_zero(lambda: _lock(config))
    return check_run_folder(config)


def check_run_folder(config: Config) -> Path:
    """Return the run folder; ConfigError if a finished run is in it, or what is no run."""
    folder = Path(config.run_folder)
    result = folder / "result.json"
    status = json.loads(result.read_text("utf-8")).get("status") if result.is_file() else None
    if (folder / "config.yaml").exists() and not (folder / "environment.json").exists():
        fault = f"{folder} is no folder of a run, and its config.yaml would be overwritten"
        raise ConfigError(f"run_folder: {fault}; name another")
    if status in FINISHED:
        fault = f"run_name: {config.run_name} is finished ({status})"
        raise ConfigError(f"{fault}; choose another run_name, or delete {places_of(config)}")
    return folder


def refuse_lost_run(config: Config) -> None:
    """Raise DataError if a run says that it has saved, but not here: on a disk of another node."""
    file = Path(config.run_folder) / "result.json"
    said = str(json.loads(file.read_text("utf-8")).get("error")) if file.is_file() else ""
    if "saved at step" in said:
        fault = f"{file}: {said}; but {local_folder(config)} has no checkpoint here"
        raise DataError(f"{fault}: name a save_folder that all nodes share, or delete that file")


def begin_run(config: Config, command: str, resumed: bool, ledgers: dict[str, Any]) -> None:
    """Make the run folder, or go on with the one that is there."""
    folder = Path(config.run_folder)
    dist.barrier()  # no rank writes before every rank has looked
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if config.save_folder and "://" not in config.save_folder:
            Path(config.save_folder).mkdir(parents=True, exist_ok=True)
    on_rank_zero(lambda: _lock(config))
    if dist.get_global_rank() == 0:
        log = folder / "metrics.jsonl"
        if not resumed:
            # Steps of an attempt that left nothing to go on from are no part of this run.
            for left in (log, folder / "generations.jsonl", folder / "token_losses.jsonl"):
                left.unlink(missing_ok=True)
        elif log.exists():  # a full disk, or a power cut, may have left half a line
            with log.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        known = environment(command) | {"data": [*map(_data, ledgers.items())]}
        write_aside(folder / "environment.json", json.dumps(known, indent=1) + "\n")
        write_aside(folder / "config.yaml", dump_config(config))
        (folder / "result.json").unlink(missing_ok=True)


def _lock(config: Config) -> None:
    """Keep the folders of a run that are there to this process; ConfigError if another has one."""
    run, checkpoints = Path(config.run_folder), local_folder(config)
    folders = {run: "run_folder", checkpoints: "save_folder"}
    if run in checkpoints.parents:
        del folders[checkpoints]
    for folder, key in folders.items():
        if folder in _held or not folder.is_dir():
            continue
        _held[folder] = (folder / ".lock").open("w")
        try:
            fcntl.flock(_held[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{key}: another process trains into {folder}") from None
        except OSError:  # a file system without locks
            pass


def end_run() -> None:
    """Let another process have the folders."""
    while _held:
        _held.popitem()[1].close()


def environment(command: str) -> dict[str, Any]:
    """Return what one needs to know of this process to run it again."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"overture": overture.__version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "command": command, "versions": versions, "devices": devices or [processor()],
        "ranks": dist.get_world_size(), "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }  # fmt: skip


def _data(named: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what stays of a split, whose folder may go: its name, where it is from, how much."""
    name, ledger = named
    rows, tokens = ledger["rows"], ledger["tokens"]
    dropped = sum(rows["malformed"].values()) + sum(rows["dropped"].values())
    source = {"source": ledger["source"]["name"], "sha256": ledger["source"].get("sha256")}
    much = {"rows": rows["kept"], "dropped": dropped, "cut": rows["truncated"]}
    much |= {"samples": ledger["samples"], "tokens": tokens["total"], "learned": tokens["trained"]}
    return {"split": name, **source, **much}


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json; figures that are not finite become null, as JSON has no NaN."""
    if dist.get_global_rank() == 0:
        clean = {k: finite(v) if isinstance(v, float) else v for k, v in result.items()}
        write_aside(folder / "result.json", json.dumps(clean, indent=1) + "\n")


def explain(error: Exception, config: Config) -> Exception:
    """Return a GuardError for a process that is gone, a disk or a memory that is full, else the
    error.
    """
    if "non-addressable cuda error" in str(error) and error.__cause__:  # auto's cover
        error = error.__cause__
    if isinstance(error, torch.OutOfMemoryError) or MEMORY.search(str(error)):
        allow = "where it had saved already with resume.allow=[device_train_microbatch_size,model]"
        ways = f"{too_large(config)}, or in an evaluation a lower device_eval_batch_size"
        return GuardError(f"out of memory: {ways}; {allow}")
    if isinstance(error, OSError) and error.errno in FULL:
        how = "read or written to" if error.errno == errno.EIO else "written to"
        fault = (
            f"{error.filename or config.run_folder}: cannot be {how} ({error.strerror}); free space"
        )
        return GuardError(f"{fault}, then run the same command again: the last checkpoint is whole")
    for pattern, said in LOST.items():
        if isinstance(error, RuntimeError) and re.search(pattern, str(error)):
            reason = str(error).strip().splitlines()[0][:200]
            return GuardError(f"{said} ({reason}); the same command goes on")
    return error
