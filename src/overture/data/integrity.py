"""Is a split what was written: its index, and the names, sizes and contents of its shards.

The ledger holds the sha256 of `index.json`, and the index an xxh64 for every shard file, which
hashes at the speed of memory. Streaming is not imported: the answer comes before torch is loaded.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from overture.data.schema import INDEX, LEDGER, sha256_file
from overture.errors import DataError

REMEDY = "restore it from where it came, or convert the dataset again"

_SHARD_KEYS = {
    "column_encodings", "column_names", "column_sizes", "compression", "format", "hashes",
    "raw_data", "samples", "size_limit", "version", "zip_data",
}  # fmt: skip
# A list of what may pass, since a `pkl` column runs code and image columns run their parsers.
_NUMBER = "(u?int(8|16|32|64)|float(16|32|64))"
_SAFE_ENCODING = re.compile(rf"str|bytes|int|{_NUMBER}|ndarray(:{_NUMBER}(:\d+(,\d+)*)?)?")
_SAFE_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


class ShardFile(NamedTuple):
    """A file of a shard as the index records it."""

    name: str
    bytes: int
    xxh64: str


class Shard(NamedTuple):
    """The files of a shard; where it is compressed, `raw` appears once Streaming unpacks it."""

    raw: ShardFile
    packed: ShardFile | None


def read_index(path: Path) -> list[Shard]:
    """Return the shards of any index; DataError if it is unsound, could run code, or leads out."""
    if not path.is_file():
        raise DataError(f"{path}: is missing; {REMEDY}")
    try:
        index = json.loads(path.read_bytes())
        if _take(index, "version", int) != 2:
            raise ValueError(f"version {index['version']}, not 2")
        shards = [_shard(node) for node in _take(index, "shards", list)]
        names = [file.name for shard in shards for file in shard if file]
        if not names or len(set(names)) < len(names):
            raise ValueError("no shards, or two that share a file name")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not a sound index of shards ({error}); {REMEDY}") from None
    return shards


def _shard(node: Any) -> Shard:
    if not isinstance(node, dict) or node.keys() != _SHARD_KEYS:
        raise ValueError("a shard lacks keys or has unknown ones")
    if node["version"] != 2 or node["format"] != "mds":
        raise ValueError(f"a shard of format {node['format']!r} version {node['version']!r}")
    if _take(node, "samples", int) == 0:
        raise ValueError("a shard without samples")
    columns = [_take(node, f"column_{part}", list) for part in ("names", "encodings", "sizes")]
    for name, encoding, size in zip(*columns, strict=True):
        if not isinstance(name, str) or not _SAFE_ENCODING.fullmatch(str(encoding)):
            raise ValueError(f"column {name!r} of the unknown or unsafe type {encoding!r}")
        _take({"column size": size or 0}, "column size", int)
    _take(node, "size_limit", int)
    if "xxh64" not in _take(node, "hashes", list):
        raise ValueError(f"hashes: {node['hashes']!r}")
    for key, kind in (("compression", str), ("zip_data", dict)):
        if node[key] is not None:
            _take(node, key, kind)
    if (node["compression"] is None) != (node["zip_data"] is None):
        raise ValueError("compression and zip_data do not match")
    packed = None if node["zip_data"] is None else _file(node["zip_data"])
    return Shard(_file(node["raw_data"]), packed)


def _file(node: Any) -> ShardFile:
    name = _take(node, "basename", str)
    if not _SAFE_NAME.fullmatch(name) or name in (INDEX, LEDGER):
        raise ValueError(f"file name {name!r}")
    if node.keys() != {"basename", "bytes", "hashes"}:
        raise ValueError(f"{name} lacks keys or has unknown ones")
    return ShardFile(name, _take(node, "bytes", int), _take(node["hashes"], "xxh64", str))


def _take(node: Any, key: str, kind: type) -> Any:
    """Return `node[key]` if it is there and of its kind; counts are never negative."""
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
        raise ValueError(f"{key}: {str(value)[:40]}")
    return value


def verified_index(path: Path, ledger: dict[str, Any]) -> list[Shard]:
    """Return the shards of an index; raises DataError if it is not the one that `ledger` knows."""
    recorded = {entry["name"]: entry["sha256"] for entry in ledger["files"]}
    if path.is_file() and sha256_file(path) != recorded.get(INDEX):
        raise DataError(f"{path}: is not the index that its {LEDGER} was written with; {REMEDY}")
    return read_index(path)


def verify_split(folder: Path, ledger: dict[str, Any], most: float = math.inf) -> None:
    """Raise DataError for the first file of a split with another size or, if read, other contents.

    Read are files of `most` bytes or so, evenly spread over the split.
    """
    shards = verified_index(folder / INDEX, ledger)
    written = [shard.packed or shard.raw for shard in shards]
    # Sizes first: a copy that broke off is the commonest fault, and is found at once.
    sizes = [(file, _size_fault(folder / file.name, file)) for file in written]
    for file, fault in itertools.chain(sizes, damaged(folder, _spread(written, most))):
        if fault:
            raise DataError(f"{folder / file.name}: {fault}; {REMEDY}")
    unpacked = [s.raw for s in shards if s.packed and (folder / s.raw.name).exists()]
    for file, fault in damaged(folder, _spread(unpacked, most)):
        raise DataError(f"{folder / file.name}: {fault}; delete it: it will be unpacked again")


def _spread(files: list[ShardFile], most: float) -> list[ShardFile]:
    return files[:: math.ceil(sum(f.bytes for f in files) / most) or 1] if most else []


def damaged(folder: Path, files: Sequence[ShardFile]) -> Iterator[tuple[ShardFile, str]]:
    """Yield each of the files that differs from its record, and how; in order."""
    # xxhash lets go of the interpreter lock, so that threads hash side by side.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        faults = pool.map(lambda file: find_fault(folder / file.name, file), files)
        yield from ((file, fault) for file, fault in zip(files, faults, strict=True) if fault)
    finally:
        pool.shutdown(cancel_futures=True)


def find_fault(path: Path, file: ShardFile) -> str:
    """Return how the file at `path` differs from its record, or an empty text."""
    if fault := _size_fault(path, file):
        return fault
    digest, block = xxhash.xxh64(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as opened:
        while count := opened.readinto(block):
            digest.update(block[:count])
    return "" if digest.hexdigest() == file.xxh64 else "holds other bytes than were written"


def _size_fault(path: Path, file: ShardFile) -> str:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return "" if size == file.bytes else f"has {size:,} bytes, {file.bytes:,} were written"
