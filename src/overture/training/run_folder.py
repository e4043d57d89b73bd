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

FINISHED = ("target_reached", "target_missed", "completed")
PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "datasets", "peft", "numpy")
# Settings of the terminal and of loggers may differ between the parts of one run.
_FREE = ("progress_bar", "console_log_interval", "loggers")


def begin_run(config: Config, command: str) -> Path:
    """Make or re-enter the run folder and return it.

    Raises:
        ConfigError: the run is finished, or was begun with another config.
    """
    folder = Path(config.run_folder)
    remedy = f"choose another run_name, or delete {folder}"
    resolved = dump_config(config)
    result, begun = folder / "result.json", folder / "config.yaml"
    if result.is_file():
        status = json.loads(result.read_text(encoding="utf-8")).get("status")
        if status in FINISHED:
            raise ConfigError(f"run_name: {config.run_name} is finished ({status}); {remedy}")
    if begun.is_file():
        changed = _changed(begun.read_text(encoding="utf-8"), resolved)
        if changed:
            raise ConfigError(
                f"run_name: {config.run_name} was begun with another config "
                f"({', '.join(changed)} changed); {remedy}"
            )
    dist.barrier()  # no rank writes before every rank has looked
    if dist.get_global_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(begun, resolved)
        write_aside(folder / "environment.json", json.dumps(environment(command), indent=1) + "\n")
        result.unlink(missing_ok=True)
    return folder


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
        "devices": devices or [platform.processor() or platform.machine()],
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
