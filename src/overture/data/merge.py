"""Datasets converted in parts, as by the tasks of a job array, to one: shards, index and ledger."""

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from overture.data.conversion import share_rows
from overture.data.schema import LEDGER, read_ledger
from overture.data.shard_writer import REJECTED, join_shards, seal_split
from overture.errors import ConfigError, GuardError

# What the rows of all parts must have in common, beside the options, to be rows of one dataset.
ALIKE = ("columns", "labels", "template")
APART = ("origins", "max_rows", "max_rejected", "size_limit")  # options that each part may have
SUMMED = ("rows", "documents", "label_counts", "samples")


def merge_parts(
    merge: list[str], out_root: str = "", overwrite: bool = False, **others: Any
) -> None:
    """Do what `--merge` asks for; ConfigError for an option that says how to convert."""
    if others:
        fault = f"--merge takes --out_root and --overwrite, not --{next(iter(others))}"
        raise ConfigError(f"{fault}: the parts are converted already")
    if not out_root or "://" in out_root:
        raise ConfigError("--merge: name a folder as --out_root")
    merge_splits(list(map(Path, merge)), Path(out_root), overwrite)


def merge_splits(
    folders: Sequence[Path], out_root: Path, overwrite: bool, say: Callable[[str], Any] = print
) -> None:
    """Write the splits of some conversions, one after the other in the order given, as one.

    Shards are linked, or copied from another disk. Raises ConfigError: the parts are not alike, one
    of them was drawn from rows that another has too, or a split is there already. DataError: a
    shard is not what its index says. GuardError: the disk is full.
    """
    found = [sorted(path.parent.name for path in folder.glob(f"*/{LEDGER}")) for folder in folders]
    for folder, names in zip(folders, found, strict=True):
        if not names or names != found[0]:
            fault = f"{folder} has the splits {names or 'none'}, but {folders[0]} {found[0]}"
            raise ConfigError(f"--merge: {fault}; convert every part with the same options")
    ledgers = {name: [read_ledger(folder / name) for folder in folders] for name in found[0]}
    for name, parts in ledgers.items():
        _check(name, folders, parts)
        if (out_root / name).exists() and not overwrite:
            raise ConfigError(f"{out_root / name} is there already; give --overwrite to replace it")
    for name, parts in ledgers.items():
        aside = out_root / f".{name}.{os.getpid()}"
        try:
            aside.mkdir(parents=True)
            shards = join_shards([folder / name for folder in folders], aside, keep=True)
            rejected = [folder / name / REJECTED for folder in folders]
            with (aside / REJECTED).open("wb") as file:
                file.writelines(path.read_bytes() for path in rejected if path.exists())
            if not (aside / REJECTED).stat().st_size:
                (aside / REJECTED).unlink()
            merged = seal_split(aside, shards, _merged(folders, parts))
            if (out_root / name).exists():
                (out_root / name).rename(out_root / f".old-{name}")
            aside.rename(out_root / name)
        except OSError as error:
            raise GuardError(f"--merge: {out_root / name} cannot be written ({error})") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(out_root / f".old-{name}", ignore_errors=True)
        say(f"{out_root / name}: {merged['samples']:,} samples of {len(parts)} parts")


def _check(name: str, folders: Sequence[Path], parts: list[dict[str, Any]]) -> None:
    """Raise ConfigError if the parts of a split are not alike, or have rows in common."""

    def facts(ledger: dict[str, Any]) -> dict[str, Any]:
        options = {k: v for k, v in ledger["arguments"].items() if k not in (*APART, "tokenizer")}
        tokenizer = {"tokenizer": (ledger["tokenizer"] or {}).get("sha256")}
        return {**options, **tokenizer, **{key: ledger[key] for key in ALIKE}}

    first = facts(parts[0])
    for folder, ledger in zip(folders[1:], parts[1:], strict=True):
        if other := next((k for k, v in facts(ledger).items() if v != first.get(k)), None):
            fault = f"{folder / name} has another {other} than {folders[0] / name}"
            raise ConfigError(f"--merge: {fault}; convert every part with the same options")
    for (one, ours), (other, theirs) in itertools.combinations(zip(folders, parts, strict=True), 2):
        if any(itertools.starmap(share_rows, itertools.product(_origins(ours), _origins(theirs)))):
            fault = f"{one / name} and {other / name} have rows in common"
            raise ConfigError(f"--merge: {fault}; leave one of them out")


def _origins(ledger: dict[str, Any]) -> list[list[Any]]:
    return list(ledger["arguments"]["origins"].values())


def _merged(folders: Sequence[Path], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ledger of all parts together, but for its files."""
    merged = {**parts[0], **{key: _sum([part[key] for part in parts]) for key in SUMMED}}
    merged["tokens"] = tokens = _sum([part["tokens"] for part in parts])
    if merged["packing"]["method"] != "none":
        room = merged["samples"] * merged["max_seq_len"]
        merged["packing"] = {**merged["packing"], "utilisation": tokens["total"] / room}
    merged["source"] = {
        "name": f"{len(parts)} parts: {', '.join(part['source']['name'] for part in parts)}",
        "parts": [part["source"] for part in parts],
    }
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
