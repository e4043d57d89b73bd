"""Beginning a run with the weights of another one's checkpoint: load_path."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from composer.core import Time, Timestamp

from overture import checkpoint as store
from overture.config.schema import Config
from overture.errors import ConfigError
from overture.models.lora import check_base
from overture.training import sharding
from overture.training.jobs import private_folder
from overture.training.optim import drop_empty_scaler
from overture.training.resume import models_of, on_every_node, on_rank_zero, seen_by_all


def find_load_path(config: Config, model: str) -> Path:
    """Return the state file that load_path means, downloaded, verified, and of a like `model`."""
    remote = "://" in str(config.load_path)

    def look() -> Path:
        # Of this process alone: what lies in a folder that others know could be theirs.
        cache = private_folder() if remote else Path()
        state = store.checkpoint_to_load(str(config.load_path), config.load_unverified, cache)
        manifest = state.parent / store.MANIFEST
        if manifest.is_file() and "model" not in config.resume.allow:
            try:
                check_base(manifest, model, ", or set resume.allow=[model]")
            except ConfigError:
                record = json.loads(manifest.read_text(encoding="utf-8"))
                theirs, ours = models_of(record["config"], config)
                if theirs != ours:  # which says more
                    fault = f"load_path: {state.parent}: is a {theirs}, but model is a {ours}"
                    raise ConfigError(f"{fault}; set model to what the checkpoint is of") from None
                raise
        return state

    if remote:
        return on_every_node(look)
    return seen_by_all(on_rank_zero(look), "name a load_path in a folder that they share")


def refuse_as_long(config: Config, path: Path) -> None:
    """Raise ConfigError if a state, whose steps count, has been trained for all of max_duration."""
    if not config.load_weights_only:
        lazily = zipfile.is_zipfile(path)
        known = torch.load(path, map_location="cpu", weights_only=False, mmap=lazily)
        clock = Timestamp()
        if kept := known.get("state", {}).get("timestamp"):  # weights alone have none
            clock.load_state_dict(kept["Timestamp"])
        if clock >= Time.from_timestring(config.max_duration):
            fault = f"has been trained for {clock.batch} already, all of max_duration"
            raise ConfigError(f"load_path: {path}: {fault}; raise it, or set load_weights_only")


def take_weights(model: torch.nn.Module, path: Path, trained: dict[str, list[int]]) -> None:
    """Give a model the weights of another run's checkpoint, before it is asked anything.

    Raises ConfigError as `check_shapes` does.
    """
    if (path.parent / sharding.METADATA).is_file():
        weights = sharding.whole_from_shards(path.parent)
    else:
        state = torch.load(path, map_location="cpu", weights_only=False)  # verified, as all are
        weights = state["state"]["model"]
    check_shapes({name: list(tensor.shape) for name, tensor in weights.items()}, trained, path)
    model.load_state_dict(weights, strict=False)


def foreign_state(state_dict: dict[str, Any], trained: dict[str, list[int]], path: Path) -> None:
    """Take from another run's state what is not ours: its clock, its counts and its outcome.

    Raises ConfigError as `check_shapes` does.
    """
    drop_empty_scaler(state_dict)
    state_dict["state"].pop("callbacks", None)
    if "model" in state_dict["state"]:  # shards are beside it
        weights = state_dict["state"]["model"]
        check_shapes({name: list(x.shape) for name, x in weights.items()}, trained, path)


def check_shapes(theirs: dict[str, list[int]], trained: dict[str, list[int]], path: Path) -> None:
    """Raise ConfigError if a checkpoint lacks weights that are to be trained, or has them in other
    shapes, as that of another model would.
    """
    for name in sorted(trained.keys() & theirs.keys()):
        if theirs[name] != trained[name]:
            fault = f"{name} is {theirs[name]} there, but {trained[name]} here"
            remedy = "name its run as model.name, and a head that does not fit is made anew"
            raise ConfigError(f"load_path: {path}: {fault}; {remedy}")
    if missing := sorted(trained.keys() - theirs.keys()):
        fault = f"has not {len(missing)} of the {len(trained)} tensors that are to be trained"
        shown = f"({missing[0]}, ...), so it is of another model"
        raise ConfigError(f"load_path: {path}: {fault} {shown}")
