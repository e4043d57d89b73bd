"""Datasets converted in parts, as by the tasks of a job array, to one: shards, index and ledger."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from overture.data.conversion import OPTIONS, Conversion, share_rows
from overture.data.integrity import verify_split
from overture.data.schema import LEDGER, read_ledger
from overture.data.shard_writer import REJECTED, join_shards, seal_split
from overture.data.workspace import Workspace, refuse_drawn_twice
from overture.errors import ConfigError, DataError, GuardError

# What the rows of all parts must have in common, beside the options, to be rows of one dataset.
ALIKE = ("columns", "labels", "template")
APART = ("origins", "max_rows", "max_rejected", "size_limit")  # options that each part may have
SUMMED = ("rows", "documents", "label_counts", "samples", "tokens")


def merge_parts(
    merge: list[str], out_root: str = "", overwrite: bool = False,
    say: Callable[[str], Any] = print, **others: Any,
) -> None:  # fmt: skip
    """Write the splits of some conversions, one after the other in the order given, as one.

    Shards are linked, or copied from another disk. Raises ConfigError: the parts are not alike, one
    of them was drawn from rows that another or a split beside has too, a split is there already, or
    an option says how to convert. DataError: files of a part are not what its ledger says.
    GuardError: the disk is full. Nothing is left of what could not be finished.
    """
    if others:
        option = OPTIONS.get(next(iter(others)), f"--{next(iter(others))}")
        fault = f"--merge takes --out_root and --overwrite, not {option}"
        raise ConfigError(f"{fault}: the parts are converted already")
    if not out_root or "://" in out_root:
        raise ConfigError("--merge: name a folder as --out_root")
    folders, job = [*map(Path, merge)], Conversion({}, "text", out_root, overwrite=overwrite)
    for folder in folders:
        if Path(out_root).resolve() == folder.resolve():
            raise ConfigError(f"--merge: {folder} is a part and the --out_root too; name another")
    names = _splits(folders)
    ledgers = {name: [read_ledger(folder / name) for folder in folders] for name in names}
    for name, parts in ledgers.items():
        for line in _check(name, folders, parts):
            say(line)
        if Path(job.place(name)).exists() and not overwrite:
            raise ConfigError(f"{job.place(name)} is there already; give --overwrite to replace it")
    drawn = [origin for parts in ledgers.values() for part in parts for origin in _origins(part)]
    subset = next(iter(ledgers.values()))[0]["arguments"].get("data_subset")
    refuse_drawn_twice(Path(out_root), names, drawn, subset)
    with Workspace(job) as work:
        try:
            for name, parts in ledgers.items():
                _write(folders, name, parts, work.folder / name)
        except BaseException as error:
            shutil.rmtree(work.folder)  # there is nothing to go on with
            with suppress(OSError):
                work.home.rmdir()  # if nothing is in it
            if isinstance(error, OSError):
                fault = f"--merge into {out_root}: {error}"
                raise GuardError(f"{fault}; see to the disk, then run it again") from None
            raise
        for name in names:
            work.move_into_place(name)
    for name, parts in ledgers.items():
        samples = sum(part["samples"] for part in parts)
        say(f"{job.place(name)}: {samples:,} samples of {len(parts)} parts")


def _splits(folders: Sequence[Path]) -> list[str]:
    """Return the names of the splits that each part has; ConfigError if they differ."""
    found = [sorted(path.parent.name for path in folder.glob(f"*/{LEDGER}")) for folder in folders]
    for folder, names in zip(folders, found, strict=True):
        if not names:
            raise ConfigError(f"--merge: {folder}: no converted dataset is there")
        if names != found[0]:
            fault = f"{folder} has the splits {', '.join(names)}, but {folders[0]} has"
            raise ConfigError(f"--merge: {fault} {', '.join(found[0])}; convert them alike")
    return found[0]


def _write(folders: Sequence[Path], name: str, parts: list[dict[str, Any]], aside: Path) -> None:
    aside.mkdir()
    for folder, ledger in zip(folders, parts, strict=True):
        verify_split(folder / name, ledger, most=0)  # these are hashed once they are here
    shards = join_shards([folder / name for folder in folders], aside)
    rejected = [folder / name / REJECTED for folder in folders]
    with (aside / REJECTED).open("wb") as file:
        file.writelines(path.read_bytes() for path in rejected if path.exists())
    try:
        seal_split(aside, shards, _merged(folders, parts))
    except DataError:
        for folder, ledger in zip(folders, parts, strict=True):
            verify_split(folder / name, ledger)  # names the file that it came from
        raise


def _check(name: str, folders: Sequence[Path], parts: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what is to be known of the parts of a split; ConfigError if they do not fit."""

    def facts(ledger: dict[str, Any]) -> dict[str, Any]:
        options = {k: v for k, v in ledger["arguments"].items() if k not in (*APART, "tokenizer")}
        tokenizer = {"tokenizer": (ledger["tokenizer"] or {}).get("sha256")}
        return {**options, **tokenizer, **{key: ledger[key] for key in ALIKE}}

    first = facts(parts[0])
    for folder, ledger in zip(folders[1:], parts[1:], strict=True):
        if other := next((k for k, v in facts(ledger).items() if v != first.get(k)), None):
            fault = f"{folder / name} has another {other} than {folders[0] / name}"
            remedy = "convert every part with the same options"
            remedy = "name all classes with --labels" if other == "labels" else remedy
            raise ConfigError(f"--merge: {fault}; {remedy}")
    for (one, ours), (other, theirs) in itertools.combinations(zip(folders, parts, strict=True), 2):
        same = _contents(ours) == _contents(theirs)  # under whatever name
        drawn = [{tuple(origin[:2]) for origin in _origins(one)} for one in (ours, theirs)]
        if not same and drawn[0] & drawn[1] and _file(ours) == _file(theirs) is not None:
            fault = f"{_file(ours)} is not what {one / name} was drawn from, or {other / name}"
            raise ConfigError(f"--merge: {fault}: rows may have moved; convert all of it anew")
        pairs = itertools.product(_origins(ours), _origins(theirs))
        if any(share_rows(mine, its, same) for mine, its in pairs):
            fault = f"{one / name} and {other / name} have rows in common"
            raise ConfigError(f"--merge: {fault}; leave one of them out")
    slices = sorted({tuple(origin) for part in parts for origin in _origins(part)}, key=repr)
    for source, group in itertools.groupby(slices, lambda origin: origin[:2]):
        ends = 0
        for _, _, start, stop in sorted(group, key=lambda origin: origin[2]):
            if start > ends:
                yield f"note: rows {ends:,} to {start:,} of {source[0]} are in no part of {name}"
            ends = start if stop is None else stop
        if stop is not None:
            yield f"note: rows from {ends:,} on of {source[0]}, if any, are in no part of {name}"


def _contents(ledger: dict[str, Any]) -> Any:
    """Return what identifies a source whatever its name, or else something like no other."""
    known = {key: value for key, value in ledger["source"].items() if key != "name"}
    return known if "sha256" in known or "files" in known else object()


def _file(ledger: dict[str, Any]) -> str | None:
    """Return the name of a source that lies here, whose hash is of all of it; None of another."""
    source = ledger["source"]
    is_whole = "files" in source or ("sha256" in source and "split" not in source)
    return source["name"] if is_whole else None


def _origins(ledger: dict[str, Any]) -> list[list[Any]]:
    return list(ledger["arguments"]["origins"].values())


def _merged(folders: Sequence[Path], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ledger of all parts together, but for its files."""
    merged = {**parts[0], **{key: _sum([part[key] for part in parts]) for key in SUMMED}}
    if merged["packing"]["method"] != "none":
        room = merged["samples"] * merged["max_seq_len"]
        merged["packing"] = {**merged["packing"], "utilisation": merged["tokens"]["total"] / room}
    sources = [part["source"] for part in parts]
    name = f"{len(parts)} parts: {', '.join(source['name'] for source in sources)}"
    merged["source"] = {"name": name, "parts": sources}
    origins = {
        f"{split} of {folder}": origin
        for folder, part in zip(folders, parts, strict=True)
        for split, origin in part["arguments"]["origins"].items()
    }
    merged["arguments"] = {**merged["arguments"], "origins": origins}
    return merged


def _sum(values: list[Any]) -> Any:
    """Return numbers added up, those in dicts by their names, None where all are."""
    if isinstance(values[0], dict):
        names = dict.fromkeys(itertools.chain.from_iterable(values))
        return {name: _sum([value.get(name, 0) for value in values]) for name in names}
    return None if None in values else sum(values)
