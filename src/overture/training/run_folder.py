"""The run folder: begun once, gone on with after an interruption, refused when finished."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from omegaconf import OmegaConf

import overture
from overture.config.load import dump_config
from overture.config.schema import Config
from overture.data.schema import write_aside
from overture.errors import ConfigError
from overture.training.cores import processor

FINISHED = ("target_reached", "target_missed", "completed")
PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "datasets", "peft", "numpy")
# Settings of the terminal and of loggers may differ between the parts of one run.
_FREE = ("progress_bar", "console_log_interval", "loggers")


def refuse_finished_run(config: Config) -> Path:
    """Return the run folder, which may hold an unfinished run of the same config.

    Raises:
        ConfigError: the run is finished, was begun with another config, or may not be resumed.
    """
    folder = Path(config.run_folder)
    remedy = f"choose another run_name, or delete {folder}"
    result, begun = folder / "result.json", folder / "config.yaml"
    if result.is_file():
        status = json.loads(result.read_text(encoding="utf-8")).get("status")
        if status in FINISHED:
            raise ConfigError(f"run_name: {config.run_name} is finished ({status}); {remedy}")
    if begun.is_file() and _has_checkpoint(config):
        changed = _changed(begun.read_text(encoding="utf-8"), dump_config(config))
        if changed:
            raise ConfigError(
                f"run_name: {config.run_name} was begun with another config "
                f"({', '.join(changed)} changed); {remedy}"
            )
        if not config.autoresume:
            raise ConfigError(f"autoresume: false, but {config.run_name} has checkpoints; {remedy}")
    return folder


def begin_run(config: Config, command: str) -> None:
    """Make the run folder, or go on with the one that is there."""
    folder = Path(config.run_folder)
    dist.barrier()  # no rank writes before every rank has looked
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if not _has_checkpoint(config):
            # Steps of an attempt that left nothing to go on from are no part of this run.
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        write_aside(folder / "config.yaml", dump_config(config))
        write_aside(folder / "environment.json", json.dumps(environment(command), indent=1) + "\n")
        (folder / "result.json").unlink(missing_ok=True)


def _has_checkpoint(config: Config) -> bool:
    folder = config.save_folder or str(Path(config.run_folder) / "checkpoints")
    return "://" in folder or any(Path(folder).glob("*.pt"))


def environment(command: str) -> dict[str, Any]:
    """Return what one needs to know of this process to run it again."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": command,
        "versions": {
            "overture": overture.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "devices": devices or [processor()],
        "ranks": dist.get_world_size(),
        "cpu_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json; figures that are not finite become null, as JSON has no NaN."""
    if dist.get_global_rank() == 0:
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in result.items()
        }
        write_aside(folder / "result.json", json.dumps(clean, indent=1) + "\n")


def _changed(before: str, now: str) -> list[str]:
    old, new = (OmegaConf.to_container(OmegaConf.create(text)) for text in (before, now))
    return [k for k in sorted({*old, *new}) if k not in _FREE and old.get(k) != new.get(k)]
