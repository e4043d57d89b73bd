"""Checkpoints that are whole or not there: folders with a manifest, here or in an object store.

Composer writes straight to the final name, so that a kill leaves a part that blocks every restart,
and loads whatever bears the name, flipped bits included. Here a checkpoint is a folder,
`<save_folder>/ba<batch>/`, with the files and `manifest.json`: their sizes and sha256, and what
must be the same for a run to go on. It is written aside, brought to the disk, and renamed.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import overture
from overture.data.schema import seal, sha256_file, unseal, write_aside
from overture.errors import ConfigError, DataError

MANIFEST = "manifest.json"
STATE = "state.pt"


def write_checkpoint(
    parent: Path, batch: int, write: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Write a checkpoint and return its folder; nothing is left of one that could not be written.

    Args:
        parent: folder of the checkpoints of a run.
        batch: steps done so far, which names it.
        write: writes the files into the folder that it is given.
        facts: for the manifest, what must hold for it to be of use, as JSON.
    """
    place = parent / f"ba{batch}"
    aside = parent / f".{place.name}.{os.getpid()}"
    for rest in parent.glob(".ba*"):  # of a run that was killed while it wrote
        shutil.rmtree(rest)
    aside.mkdir(parents=True)
    try:
        write(aside)
        sizes = {path.name: path.stat().st_size for path in _files(aside)}
        files = {n: {"bytes": s, "sha256": sha256_file(aside / n)} for n, s in sizes.items()}
        manifest = {"overture": overture.__version__, "batch": batch, "files": files, **facts}
        write_aside(aside / MANIFEST, seal(manifest))
        for path in [*_files(aside), aside]:
            _to_disk(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if place.exists():  # of the same step, by an earlier part of the run
        shutil.rmtree(place)
    aside.rename(place)
    _to_disk(parent)
    return place


def change_manifest(folder: Path, **facts: Any) -> None:
    """Replace some facts in the manifest of a checkpoint."""
    write_aside(folder / MANIFEST, seal({**unseal(folder / MANIFEST), **facts}))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are what was written.

    Raises:
        DataError: they are not, or there is no manifest of this kit.
    """
    path = folder / MANIFEST
    try:
        manifest = unseal(path)
        recorded = {name: (row["bytes"], row["sha256"]) for name, row in manifest["files"].items()}
        int(manifest["batch"])
    except FileNotFoundError:
        raise DataError(f"{folder}: no {MANIFEST}, so it is no checkpoint of this kit") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path}: unreadable ({error})") from None
    if STATE not in recorded or any(Path(name).name != name for name in recorded):
        raise DataError(f"{path}: names files that no checkpoint has")
    for name, (size, digest) in recorded.items():
        file = folder / name
        if not file.is_file():
            raise DataError(f"{file}: is missing")
        if file.stat().st_size != size:
            raise DataError(f"{file}: {file.stat().st_size:,} bytes, but {size:,} were written")
        if sha256_file(file) != digest:
            raise DataError(f"{file}: its sha256 is not the one that was written")
    return manifest


def newest_checkpoint(parent: Path, ours: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its manifest.

    Broken ones are named, in `set_aside` of the manifest too, and set aside if they are `ours`.
    """
    broken = []
    for folder in sorted(numbered(parent), key=_batch, reverse=True):
        try:
            return folder, {**read_checkpoint(folder), "set_aside": broken}
        except DataError as error:
            if ours:
                aside = folder.with_name(f"broken-{folder.name}-{len([*parent.glob('broken-*')])}")
                folder.rename(aside)
                error = f"{error}; set aside as {aside.name}"
            broken.append(str(error))
            print(f"{error}; going back to an earlier checkpoint", flush=True)
    return None


def numbered(parent: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, in no order."""
    return [p for p in parent.glob("ba*") if p.is_dir() and p.name[2:].isdigit()]


def keep_newest(parent: Path, count: int) -> None:
    """Delete all but the newest checkpoints; -1 keeps all."""
    for folder in sorted(numbered(parent), key=_batch)[: -count if count > 0 else 0]:
        shutil.rmtree(folder)


def checkpoint_to_load(load_path: str, unverified: bool, cache: Path) -> Path:
    """Return the state file that a user's load_path means.

    Args:
        load_path: a checkpoint, a run folder, or a folder of checkpoints; may be s3:// and the
            like. With `unverified` also a file that this kit did not write.
        unverified: load without a manifest.
        cache: folder to download to.

    Raises:
        ConfigError: nothing is there, or it has no manifest and `unverified` is not set.
        DataError: it is not what was written.
    """
    if "://" in load_path:
        newest = RemoteFolder(load_path).fetch_newest(cache)
        if newest is None:
            raise ConfigError(f"load_path: {load_path}: no whole checkpoint is there")
        return newest / STATE
    path = Path(load_path)
    for parent in (path, path / "checkpoints"):
        if numbered(parent):
            newest = newest_checkpoint(parent, ours=False)
            if newest:
                return newest[0] / STATE
    if (path / MANIFEST).is_file():
        read_checkpoint(path)
        return path / STATE
    if not path.is_file():
        raise ConfigError(f"load_path: {load_path}: no checkpoint is there")
    if path.name == STATE and (path.parent / MANIFEST).is_file():
        read_checkpoint(path.parent)
    elif not unverified:
        raise ConfigError(
            f"load_path: {load_path}: no manifest of this kit is beside it; a checkpoint is a "
            "pickle, which can run any code as it is loaded: set load_unverified=true if you "
            "trust its maker"
        )
    return path


class RemoteFolder:
    """Checkpoints in an object store, through Composer's clients; the manifest is stored last.

    Args:
        uri: `s3://bucket/folder` or another scheme that Composer knows.
    """

    def __init__(self, uri: str) -> None:
        from composer.utils import maybe_create_object_store_from_uri, parse_uri

        self.uri, self.prefix = uri.rstrip("/"), parse_uri(uri)[2].strip("/")
        self._store = maybe_create_object_store_from_uri(uri)

    def upload(self, folder: Path) -> None:
        """Store a checkpoint that is whole here; each store's client raises its own errors."""
        for path in sorted(_files(folder), key=lambda path: path.name == MANIFEST):
            self._store.upload_object(f"{self.prefix}/{folder.name}/{path.name}", str(path))

    def fetch_newest(self, into: Path) -> Path | None:
        """Return the newest checkpoint that is whole, as a folder in `into`, or None.

        Raises:
            ConfigError: the store cannot be read.
        """
        found = {}
        try:
            names = self._store.list_objects(f"{self.prefix}/")
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{self.uri}: cannot be read ({reason})") from None
        for name in names:
            folder, _, file = name.removeprefix(f"{self.prefix}/").partition("/")
            if file == MANIFEST and folder[2:].isdigit():
                found[int(folder[2:])] = folder
        for batch in sorted(found, reverse=True):
            place = into / found[batch]
            try:
                if not (place / MANIFEST).is_file():
                    self._fetch(found[batch], place)
                read_checkpoint(place)
                return place
            except DataError as error:
                shutil.rmtree(place, ignore_errors=True)
                print(f"{error}, from {self.uri}; going back to an earlier checkpoint", flush=True)
        return None

    def _fetch(self, name: str, place: Path) -> None:
        aside = place.with_name(f".{name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for file in (MANIFEST, STATE):
            try:
                self._store.download_object(f"{self.prefix}/{name}/{file}", str(aside / file))
            except FileNotFoundError:
                shutil.rmtree(aside)
                raise DataError(f"{self.uri}/{name}/{file}: is missing") from None
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def _batch(folder: Path) -> int:
    return int(folder.name[2:])


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
