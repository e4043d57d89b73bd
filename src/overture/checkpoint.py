"""Checkpoints that are whole or not there: folders with a manifest, here or in an object store.

Composer writes straight to the final name, so that a kill leaves a part that blocks every restart,
and loads whatever bears the name, flipped bits included. Here a checkpoint is a folder,
`<save_folder>/ba<batch>/`, with the files and `manifest.json`: their sizes and sha256, and what
must be the same for a run to go on. It is written aside, brought to the disk, and renamed.
"""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import overture
from overture.data.schema import seal, sha256_file, unseal, write_aside
from overture.errors import ConfigError, DataError, GuardError, OvertureError

MANIFEST = "manifest.json"
STATE = "state.pt"
OLD = ".old-"  # begins the name of one that another of the same step is about to replace
REST = re.compile(r"\.(old-)?ba\d+(\.\d+(-.*)?)?")
# Of S3: a store that is silent is answered for within a minute, a download within three.
PATIENCE = {
    "connect_timeout": 15, "read_timeout": 15,
    "retries": {"mode": "standard", "total_max_attempts": 3},
}  # fmt: skip
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.lzma", ".tar.xz")


def write_checkpoint(
    parent: Path, batch: int, write: Callable[[Path], None], facts: dict[str, Any]
) -> Path:
    """Write a checkpoint and return its folder; nothing is left of one that could not be written.

    `batch`, the steps done so far, names it; `write` writes the files into the folder that it is
    given; the manifest has the `facts` (JSON) that must hold for it to be of use.
    """
    place = parent / f"ba{batch}"
    aside = parent / f".{place.name}.{os.getpid()}"
    for rest in parent.glob(".*ba*"):  # of a run that was killed while it wrote
        if REST.fullmatch(rest.name):
            shutil.rmtree(rest)
    aside.mkdir(parents=True)
    try:
        write(aside)
        sizes = {path.name: path.stat().st_size for path in _files(aside)}
        hashes = _hashes(aside, sizes)
        files = {name: {"bytes": size, "sha256": hashes[name]} for name, size in sizes.items()}
        manifest = {"overture": overture.__version__, "batch": batch, "files": files, **facts}
        write_aside(aside / MANIFEST, seal(manifest))
        for path in [*_files(aside), aside]:
            _to_disk(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if place.exists():  # of the same step, by an earlier part of the run
        place.rename(parent / f"{OLD}{place.name}")
    aside.rename(place)
    _to_disk(parent)
    shutil.rmtree(parent / f"{OLD}{place.name}", ignore_errors=True)
    return place


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files, several at once: shards of a large model take long."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda n: sha256_file(folder / n), names), strict=True))


def change_manifest(folder: Path, **facts: Any) -> None:
    """Replace some facts in the manifest of a checkpoint."""
    aside = folder / f".{MANIFEST}.{os.getpid()}"
    write_aside(aside, seal({**unseal(folder / MANIFEST), **facts}))
    _to_disk(aside)
    aside.rename(folder / MANIFEST)
    _to_disk(folder)


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are what was written.

    Raises DataError: they are not, or there is no manifest of this kit. GuardError: they cannot be
    read just now, which says nothing of them.
    """
    path = folder / MANIFEST
    try:
        if not path.exists():
            raise DataError(f"{folder}: no {MANIFEST}, so it is no checkpoint of this kit")
        manifest = unseal(path)
        recorded = {name: (row["bytes"], row["sha256"]) for name, row in manifest["files"].items()}
        int(manifest["batch"])
        if STATE not in recorded or any(Path(name).name != name for name in recorded):
            raise DataError(f"{path}: names files that no checkpoint has")
        for name, (size, _) in recorded.items():
            file = folder / name
            if not file.is_file():
                raise DataError(f"{file}: is missing")
            if file.stat().st_size != size:
                raise DataError(f"{file}: {file.stat().st_size:,} bytes, but {size:,} were written")
        for name, digest in _hashes(folder, recorded).items():
            if digest != recorded[name][1]:
                raise DataError(f"{folder / name}: its sha256 is not the one that was written")
    except OSError as error:
        fault = f"{folder}: cannot be read ({error}); it may well be whole"
        raise GuardError(f"{fault}: see to the disk, then run the same command again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: unreadable ({error})") from None
    return manifest


def newest_checkpoint(parent: Path, ours: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its manifest, None if there never was one.

    Broken ones are named, in `set_aside` of the manifest too, and set aside if they are `ours`.
    Raises DataError: there were some, and none is whole: to begin anew is the user's to say.
    GuardError: one cannot be read.
    """
    broken = []
    for old in parent.glob(f"{OLD}ba*") if ours else ():  # killed between two renames
        place = old.with_name(old.name.removeprefix(OLD))
        if not place.exists():
            old.rename(place)
    for folder in reversed(numbered(parent)):
        try:
            return folder, {**read_checkpoint(folder), "set_aside": broken}
        except DataError as error:
            broken.append(set_aside(folder, error) if ours else str(error))
            print(f"{broken[-1]}; going back to an earlier checkpoint", flush=True)
    before = [path.name for path in parent.glob("broken-*")]
    if broken or before:
        last = broken[-1] if broken else f"{', '.join(sorted(before))} were set aside"
        remedy = f"; to begin anew delete {parent}" if ours else ""
        raise DataError(f"{parent}: no checkpoint there is whole ({last}){remedy}")
    return None


def set_aside(folder: Path, error: DataError) -> str:
    """Give a broken checkpoint another name, and return what to say of it."""
    aside = folder.with_name(f"broken-{folder.name}-{len([*folder.parent.glob('broken-*')])}")
    with suppress(FileNotFoundError):  # another node was first
        folder.rename(aside)
    return f"{error}; set aside as {aside.name}"


def numbered(parent: Path) -> list[Path]:
    """Return the checkpoints of a run, whole or not, the oldest first."""
    found = [p for p in parent.glob("ba*") if p.is_dir() and p.name[2:].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name[2:]))


def keep_newest(parent: Path, count: int) -> None:
    """Delete all but the newest checkpoints; -1 keeps all."""
    for folder in numbered(parent)[: -count if count > 0 else 0]:
        shutil.rmtree(folder)


def checkpoint_to_load(load_path: str, unverified: bool, cache: Path) -> Path:
    """Return the state file that a user's load_path means.

    That is a checkpoint, a run folder, or a folder of checkpoints; may be s3:// and the like, which
    is downloaded to `cache`. With `unverified` also a file here that this kit did not write.
    Raises ConfigError: nothing is there, or it has no manifest and `unverified` is not set.
    DataError: it is not what was written.
    """
    if "://" in load_path:
        for uri in (load_path, f"{load_path.rstrip('/')}/checkpoints"):
            remote = RemoteFolder(uri)
            if newest := remote.fetch_newest(cache):
                return newest / STATE
            if remote.set_aside:
                fault = f"load_path: {uri}: no checkpoint there is whole"
                raise DataError(f"{fault} ({remote.set_aside[-1]})")
        raise ConfigError(f"load_path: {load_path}: no whole checkpoint is there")
    path = Path(load_path)
    for parent in (path, path / "checkpoints"):
        if newest := newest_checkpoint(parent, ours=False):
            return newest[0] / STATE
    if (path / MANIFEST).is_file():
        read_checkpoint(path)
        return path / STATE
    if not path.is_file():
        raise ConfigError(f"load_path: {load_path}: no checkpoint is there")
    if path.name.endswith(ARCHIVES):
        fault = "is an archive, whose files could go anywhere; unpack it yourself"
        raise ConfigError(f"load_path: {load_path}: {fault}, and name the file in it")
    if path.name == STATE and (path.parent / MANIFEST).is_file():
        read_checkpoint(path.parent)
    elif unverified:
        print(f"warning: {path} is loaded unverified: a pickle, which runs its maker's code")
    else:
        fault = "no manifest of this kit is beside it; a checkpoint is a pickle, which can run any"
        remedy = "code as it is loaded: set load_unverified=true if you trust its maker"
        raise ConfigError(f"load_path: {load_path}: {fault} {remedy}")
    return path


class RemoteFolder:
    """Checkpoints in an object store, through Composer's clients; the manifest is stored last.

    `uri` is `s3://bucket/folder` or of another scheme that Composer knows; of a checkpoint alone it
    ends in `ba<step>`.
    """

    def __init__(self, uri: str) -> None:
        from composer.utils import S3ObjectStore, maybe_create_object_store_from_uri, parse_uri

        self.uri, self.prefix = uri.rstrip("/"), parse_uri(uri)[2].strip("/")
        self.only, self.set_aside = None, []
        parent, _, name = self.prefix.rpartition("/")
        if name[:2] == "ba" and name[2:].isdigit():
            self.prefix, self.only = parent, name
        backend, bucket, _ = parse_uri(uri)
        with self._named():
            if backend == "s3":
                tries = {"num_download_attempts": 3}  # also of what breaks off
                self._store = S3ObjectStore(
                    bucket, client_config={**PATIENCE}, transfer_config=tries
                )
            else:
                self._store = maybe_create_object_store_from_uri(uri)

    def upload(self, folder: Path) -> None:
        """Store a checkpoint that is whole here; GuardError if the store does not take it."""
        for path in sorted(_files(folder), key=lambda path: path.name == MANIFEST):
            self.upload_file(path)

    def complete(self, folder: Path) -> bool:
        """Store a checkpoint that is whole here alone, as one is when it was not sent to its end;
        return whether there was a need.
        """
        with self._named():
            names = {*self._store.list_objects(f"{self.prefix}/{folder.name}/")}
        if missing := f"{self.prefix}/{folder.name}/{MANIFEST}" not in names:
            self.upload(folder)
        return missing

    def upload_file(self, path: Path) -> None:
        """Store a file of a checkpoint; GuardError if the store does not take it."""
        with self._named(GuardError, "cannot be written"):
            self._store.upload_object(f"{self.prefix}/{path.parent.name}/{path.name}", str(path))

    def fetch_newest(self, into: Path) -> Path | None:
        """Return the newest checkpoint that is whole, as a folder in `into`, or None; ConfigError
        if the store cannot be read.

        One that lies there broken is set aside, and fetched again; so is one that comes broken
        twice, so that whoever looks there knows that there was one.
        """
        found = {}
        with self._named():
            names = {*self._store.list_objects(f"{self.prefix}/")}
        for name in names:
            folder, _, file = name.removeprefix(f"{self.prefix}/").partition("/")
            if file == MANIFEST and folder[2:].isdigit() and self.only in (None, folder):
                found[int(folder[2:])] = folder
        for batch in sorted(found, reverse=True):
            place = into / found[batch]
            if place.is_dir():
                try:
                    read_checkpoint(place)
                    return place
                except DataError as error:
                    self.set_aside.append(set_aside(place, error))
                    print(f"{self.set_aside[-1]}; fetched again from {self.uri}", flush=True)
            for again in (True, False):  # what was sent wrongly comes well
                self._fetch(found[batch], place, names)
                try:
                    read_checkpoint(place)
                    return place
                except DataError as error:
                    if again:
                        shutil.rmtree(place, ignore_errors=True)
                        continue
                    self.set_aside.append(f"{set_aside(place, error)}, from {self.uri}")
                    print(f"{self.set_aside[-1]}; going back to an earlier checkpoint", flush=True)
        return None

    def _fetch(self, name: str, place: Path, there: set[str]) -> None:
        # Other nodes may fetch the same into the same folder.
        aside = place.with_name(f".{name}.{os.getpid()}-{platform.node()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for path in (path for path in there if path.startswith(f"{self.prefix}/{name}/")):
            with self._named():
                self._store.download_object(path, str(aside / Path(path).name))
        try:
            aside.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(aside)

    @contextmanager
    def _named(
        self, kind: type[OvertureError] = ConfigError, what: str = "cannot be read"
    ) -> Iterator[None]:
        """Raise an error of ours for those of the store's client, of which each has its own."""
        try:
            yield
        except OvertureError:
            raise
        except Exception as error:
            raise kind(f"{self.uri}: {what} ({' '.join(str(error).split())[:200]})") from None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def _to_disk(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
