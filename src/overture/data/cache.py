"""The local cache of a remote split: its ledger and index proven, what is stale or damaged gone.

Streaming itself keeps whatever lies in a cache, even when the remote was converted anew.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.utils import dist

from overture.data.integrity import damaged, verified_index
from overture.data.remote import fetch
from overture.data.schema import CACHE_MARK, INDEX, LEDGER, read_ledger, write_aside
from overture.errors import ConfigError, OvertureError

_held: dict[Path, int] = {}  # locks of this process, until it ends


def claim_cache(folder: Path) -> None:
    """Keep a cache to this process and its workers; ConfigError if another has it.

    Streaming too looks for others, but not beyond the first number that an ended one has freed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in _held:
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        fault = f"data_local: {folder}: another process fetches into this cache"
        raise ConfigError(f"{fault}; wait for its end or name another folder") from None
    except OSError:  # a file system without locks
        pass
    _held[folder.resolve()] = lock


def open_cache(remote: str, local: str, split: str, say: Callable[[str], Any] = print) -> None:
    """Bring the cache of a remote split up to date; called by every rank.

    A cached shard that is damaged is deleted: it is fetched again when it is needed. Raises
    ConfigError if the remote cannot be read, or `local` not written, or it holds other data;
    DataError if the remote's ledger or index is not what was written.
    """
    failure = None
    if dist.get_local_rank() == 0:
        with tempfile.TemporaryDirectory() as aside:
            source = f"{remote.rstrip('/')}/{split}"
            try:
                _refresh(source, Path(local) / split, Path(aside), say)
            except OvertureError as error:
                failure = type(error)(str(error).replace(aside, source))
            except OSError as error:
                failure = ConfigError(f"data_local: {local} cannot be a cache ({error})")
    # Every rank must learn of it: one that raised alone would leave the others waiting.
    for error in filter(None, dist.all_gather_object(failure)):
        raise error


def _refresh(source: str, folder: Path, aside: Path, say: Callable[[str], Any]) -> None:
    for name in (LEDGER, INDEX):
        try:
            fetch(f"{source}/{name}", aside / name)
        except Exception as error:  # each store's client raises its own kinds
            text = " ".join(str(error).split())[:200]
            raise ConfigError(f"data_remote: {source}/{name} cannot be read ({text})") from None
    shards = verified_index(aside / INDEX, read_ledger(aside))
    claim_cache(folder.parent)
    ledger, cached = ((place / LEDGER) for place in (aside, folder))
    if not cached.is_file() or cached.read_bytes() != ledger.read_bytes():
        if folder.is_dir() and any(folder.iterdir()):
            # Whoever converts to data_local and forgets to upload must not lose it.
            if not (folder / CACHE_MARK).is_file():
                fault = f"{folder} holds other data than {source}, and is no cache of it"
                remedy = "name another folder, or train without data_remote"
                raise ConfigError(f"data_local: {fault}; {remedy}")
            say(f"{folder}: emptied, since {source} was converted anew")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CACHE_MARK).touch()
    for name in (INDEX, LEDGER):
        write_aside(folder / name, (aside / name).read_text(encoding="utf-8"))
    files = [f for shard in shards for f in shard if f and (folder / f.name).exists()]
    for file, fault in damaged(folder, files):
        say(f"{folder / file.name}: {fault}; deleted, to be fetched again")
        (folder / file.name).unlink()
