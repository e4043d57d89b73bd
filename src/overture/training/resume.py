"""Going on from a checkpoint as if nothing had happened, bit for bit.

Composer 0.32 alone does not: when the dataset finds its own place again, the state of the random
numbers is never restored, so that dropout differs; and a checkpoint at the end of an epoch keeps
that epoch's number for the data, so that the next one repeats its order.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, reproducibility
from omegaconf import OmegaConf

from overture import checkpoint as store
from overture.callbacks.guards import local_part
from overture.config.load import dump_config, same_setting
from overture.config.schema import Config
from overture.errors import ConfigError, DataError, GuardError, OvertureError, Preempted
from overture.training import sharding
from overture.training.preemption import StopRequest

# Settings of the terminal, of loggers and of where and how often to save do not change a result.
FREE = (
    "progress_bar", "console_log_interval", "loggers", "guards", "resume", "save_interval",
    "save_num_checkpoints_to_keep", "load_unverified", "run_folder", "save_folder",
)  # fmt: skip


def local_folder(config: Config) -> Path:
    """Return where the checkpoints of a run are on this machine."""
    if config.save_folder and "://" not in config.save_folder:
        return Path(config.save_folder)
    return Path(config.run_folder) / "checkpoints"


def places_of(config: Config) -> str:
    """Return what is to be deleted of a run that is to begin anew."""
    return " and ".join(filter(None, (config.run_folder, config.save_folder)))


def _folder_before(config: Config) -> Path:
    """Return where the run that is in a run folder had its checkpoints: save_folder may change."""
    known = Path(config.run_folder) / "config.yaml"
    before = OmegaConf.load(known).get("save_folder") if known.is_file() else config.save_folder
    return local_folder(replace(config, save_folder=before))


def find_checkpoint(config: Config) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint of this run and its manifest, the same on every rank;
    ConfigError if it is of a run with another config, or autoresume is off.
    """
    broken, there, remote = [], "", None
    if config.save_folder and "://" in config.save_folder:
        remote, here = store.RemoteFolder(config.save_folder), local_folder(config)
        on_every_node(lambda: remote.fetch_newest(here))
        broken, there = remote.set_aside, f", and what {config.save_folder} holds"

    def look() -> tuple[Path, dict[str, Any]] | None:
        try:
            found = interrupted(config)
        except DataError as error:
            raise DataError(f"{error}{there}") from None
        if found:
            found[1]["set_aside"][:0] = broken
        return found

    found = on_rank_zero(look)
    if found and remote and on_rank_zero(lambda: remote.complete(found[0])):
        on_every_node(lambda: remote.fetch_newest(here))  # what one of them alone had
        found = here / found[0].name, found[1]
    if found:
        seen_by_all(found[0] / store.STATE)
    return found


def seen_by_all(state: Path, remedy: str = "name a save_folder that they share") -> Path:
    """Return a file that rank zero has found; DataError if it is not on the disks of all nodes."""

    def look() -> None:
        if not state.is_file():
            fault = f"{state}: is on the first node, but not on all"
            raise DataError(f"{fault}: copy it there, or {remedy}")

    on_every_node(look)
    return state


def interrupted(config: Config, ours: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return what find_checkpoint does of those that lie here, with its errors; what is broken is
    set aside only if they are `ours`.
    """
    places = dict.fromkeys((local_folder(config), _folder_before(config)))
    every = [store.newest_checkpoint(place, ours) for place in places]
    found = max(filter(None, every), key=lambda one: one[1]["batch"], default=None)
    if found is None:
        return None
    remedy = f"choose another run_name, or delete {places_of(config)}"
    every = changed_keys(found[1]["config"], dump_config(config))
    if changed := [key for key in every if key not in config.resume.allow]:
        theirs, own = models_of(found[1]["config"], config)
        named = f", of a {theirs} and not a {own}" if theirs != own else ""
        fault = f"was begun with another config ({', '.join(changed)} changed{named}); {remedy}"
        allow = f"or let it change: resume.allow=[{','.join(changed)}]"
        raise ConfigError(f"run_name: {config.run_name} {fault}, {allow}")
    if not config.autoresume:
        raise ConfigError(f"autoresume: false, but {config.run_name} has checkpoints; {remedy}")
    return found


def bring(folder: Path, config: Config) -> None:
    """Copy a checkpoint from where save_folder was to where it is now, for the next start too."""
    place = local_folder(config) / folder.name

    def copy() -> None:
        if not place.exists():
            aside = place.with_name(f".{place.name}.{os.getpid()}")
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(folder, aside)
            aside.rename(place)

    on_rank_zero(copy)


def on_rank_zero(function: Any) -> Any:
    """Return on every rank what a function returns on rank zero, or raise its error on all."""
    return _shared(function, dist.get_global_rank(), 0)


def on_every_node(function: Any) -> Any:
    """Return on every rank what the first rank of its node returns, or raise an error of any."""
    rank = dist.get_local_rank()
    return _shared(function, rank, dist.get_global_rank() - rank)


def _shared(function: Any, rank: int, first: int) -> Any:
    answer = None
    if rank == 0:
        try:
            answer = function()
        except OvertureError as error:
            answer = error
        except Exception as error:  # a bug of ours, or an object store's own kind
            dist.all_gather_object(GuardError(f"rank {dist.get_global_rank()} failed: {error!r}"))
            raise
    answers = dist.all_gather_object(answer)
    for error in answers:
        if isinstance(error, OvertureError):
            raise error
    return answers[first]


def changed_keys(before: str, now: str) -> list[str]:
    """Return the top-level keys in which two dumped configs differ, but for those that are free.

    Secrets are not in them: `***` in one stands for anything, as what is known to be one depends on
    the environment.
    """
    old, new = (OmegaConf.to_container(OmegaConf.create(text)) for text in (before, now))
    keys = [k for k in sorted({*old, *new}) if k not in FREE and not same_setting(old, new, k)]
    return [k for k in keys if not may_be_same(repr(old.get(k)), repr(new.get(k)))]


def may_be_same(one: str, other: str) -> bool:
    """Return whether two texts differ at most in what `***` stands for in one of them."""

    def fits(shown: str, text: str) -> bool:
        parts = map(re.escape, shown.split("***"))
        return "***" in shown and bool(re.fullmatch(".*".join(parts), text, re.DOTALL))

    return fits(one, other) or fits(other, one)


def check_facts(before: dict[str, Any], now: dict[str, Any], allow: list[str]) -> None:
    """Raise DataError if the dataset, the tokenizer or the model of a run is another one now, by
    its content, under the same name.
    """
    if changed := [key for key in now if before.get(key) != now[key] and key not in allow]:
        what, allow = " and the ".join(changed), f"resume.allow=[{','.join(changed)}]"
        fault = f"the {what} of this run is not what it was begun with, though its name is the same"
        raise DataError(f"{fault}; begin a new run, or set {allow}")


def models_of(before: str, config: Config) -> list[str]:
    """Return what the model of a config, as YAML text, and that of another are."""
    theirs = OmegaConf.to_container(OmegaConf.create(before))["model"]
    return [
        f"{m['name']}, pretrained" if m["pretrained"]
        else f"{m['name']} of {m['config'] or 'default shape'}"
        for m in (theirs, vars(config.model))
    ]  # fmt: skip


def checkpoint_bytes(config: Config, model: torch.nn.Module) -> int:
    """Return the size of a checkpoint of a model that is made of something, or of nothing."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # What is not trained is saved too, but beside adapters. Adam keeps two float32 of each.
    weights = sum(t.nbytes for t in model.state_dict().values() if torch.is_tensor(t))
    copies = config.algorithms.ema is not None
    return weights + sum(p.numel() * (copies * p.element_size() + 8) for p in trained)


def check_room(config: Config, one: int) -> None:
    """Raise GuardError if checkpoints of `one` size have no room where they go: those that are
    kept and the one that is being written; with save_num_checkpoints_to_keep of -1, two.

    Those that are there already are counted as kept. A quota of the user's is not seen.
    """
    place = local_folder(config).absolute()
    keep = max(config.save_num_checkpoints_to_keep, 1)
    count = max(keep - len(store.numbered(place)), 0) + 1
    free = shutil.disk_usage(next(p for p in [place, *place.parents] if p.exists())).free
    if free < count * one:
        fault = f"{count} checkpoints take {count * one / 2**30:.1f} GiB, but {free / 2**30:.1f}"
        remedy = "name another one or lower save_num_checkpoints_to_keep"
        raise GuardError(f"save_folder: {place}: {fault} GiB are free; {remedy}")


class Checkpointer(Callback):
    """Saves at an interval, at the end, and when the run is asked to stop; all of it or nothing.

    Args:
        config: `save_folder`, `save_interval` and `save_num_checkpoints_to_keep` are used.
        facts: for the manifest, by content: see `check_facts`.
        request: set by a signal; then the batch is finished, saved, and Preempted raised.
    """

    def __init__(self, config: Config, facts: dict[str, Any], request: StopRequest) -> None:
        self.folder, self.keep = local_folder(config), config.save_num_checkpoints_to_keep
        remote = config.save_folder if config.save_folder and "://" in config.save_folder else None
        self.remote = store.RemoteFolder(remote) if remote and dist.get_global_rank() == 0 else None
        self.facts = {"config": dump_config(config), "facts": facts}
        self.request = request
        self.sharded = config.fsdp_config and config.fsdp_config.state_dict_type == "sharded"
        self._is_due = create_interval_scheduler(config.save_interval)
        self._saved = -1, -1  # step, and how far in its epoch

    def begin_at(self, state: State) -> None:
        """Know of the checkpoint that a run goes on from, which lies in the folder."""
        self._saved = state.timestamp.batch.value, state.timestamp.batch_in_epoch.value

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        due, stop = self._is_due(state, Event.BATCH_CHECKPOINT), self.request.agreed()
        if due or stop:
            self.save(state)
        if stop:
            raise Preempted(state.timestamp.batch.value)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._is_due(state, Event.EPOCH_CHECKPOINT):
            self.save(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Break off a long evaluation if the run is to stop; it is begun again on the way on."""
        if self.request.agreed():
            batch = state.timestamp.batch.value or None
            if batch:
                self.save(state, evaluation_due=True)
            raise Preempted(batch)

    def save(self, state: State, evaluation_due: bool = False) -> None:
        """Write a checkpoint; GuardError if weights are not finite, or the disk is full or out of
        order: the last checkpoint is still there.
        """
        batch, in_epoch = state.timestamp.batch.value, state.timestamp.batch_in_epoch.value
        if batch == self._saved[0]:  # while the evaluation of this very step goes on
            place = self.folder / f"ba{batch}"
            # At the end of an epoch, which comes again after what was saved, it does by itself.
            due = evaluation_due and in_epoch == self._saved[1]

            def change() -> None:
                store.change_manifest(place, evaluation_due=due)
                if self.remote:
                    self.remote.upload_file(place / store.MANIFEST)

            return on_rank_zero(change)
        trained = [local_part(p.detach()) for p in state.model.parameters() if p.requires_grad]
        # After an evaluation those of no layer are still gathered, on the GPU.
        norms = [norm.cpu() for norm in torch._foreach_norm(trained)]
        finite = bool(torch.stack(norms).isfinite().all())
        if not all(dist.all_gather_object(finite)):
            raise GuardError(f"step {batch}: weights are not finite any more, so nothing is saved")
        kept = sharding.rest_of_state(state) if self.sharded else state.state_dict()
        content = {"state": kept, "rng": reproducibility.get_rng_state()}
        if in_epoch == 0:
            # Streaming still counts the epoch that is over.
            content["state"]["dataset_state"]["train"]["epoch"] = state.timestamp.epoch.value
        facts, shards = {**self.facts, "evaluation_due": evaluation_due}, self.folder / ".shards"

        def begin() -> None:
            shutil.rmtree(shards, ignore_errors=True)  # of a run that was killed while it wrote
            shards.mkdir(parents=True)

        def fill(folder: Path) -> None:
            torch.save(content, folder / store.STATE)
            if self.sharded:
                if lost := sharding.missing_shards(shards):
                    raise OSError(f"{min(lost)} is not there: all nodes have to share the folder")
                for file in shards.iterdir():
                    file.rename(folder / file.name)
                shards.rmdir()

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            place = store.write_checkpoint(self.folder, batch, fill, facts)
            if self.remote:
                self.remote.upload(place)
            store.keep_newest(self.folder, self.keep)

        if self.sharded:
            self._on_rank_zero(begin, batch)
            try:
                sharding.save_shards(state, shards)
            except OSError as error:
                shutil.rmtree(shards, ignore_errors=True)
                raise self._unwritten(batch, error) from None
        self._on_rank_zero(write, batch)
        self._saved = batch, in_epoch

    def _on_rank_zero(self, work: Callable[[], None], batch: int) -> None:
        def attempt() -> None:
            try:
                work()
            except (OSError, RuntimeError) as error:  # torch's writer wraps the system's
                raise self._unwritten(batch, error) from None

        on_rank_zero(attempt)

    def _unwritten(self, batch: int, error: Exception) -> GuardError:
        reason = " ".join(str(error).split())[-150:]
        fault = f"the checkpoint cannot be written to {self.folder} ({reason})"
        remedy = "free space or name another save_folder, then run the same command again"
        return GuardError(f"step {batch}: {fault}; {remedy}: the last one is whole")


class ExactResume(Callback):
    """Restores the random numbers where the first batch after a resume is about to be made.

    Making the loader's iterator draws from them too, hence not earlier; at the start of an epoch,
    and at the evaluation that ends one, not later either.
    """

    def __init__(self) -> None:
        self.rng: list[dict[str, Any]] | None = None
        self._fits = False

    def fit_start(self, state: State, logger: Logger) -> None:
        self._fits = True

    def eval_start(self, state: State, logger: Logger) -> None:
        if self._fits:  # and not one that was due
            self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Restore before the loader begins an epoch, or after it has begun in the middle of one."""
        if self.rng is not None:
            reproducibility.load_rng_state(self.rng)
            self.rng = None

    after_dataloader = epoch_start
