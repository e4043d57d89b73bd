"""Shards of one split, written so that an interrupted writing goes on to the same bytes.

Whenever a shard is full, a journal beside the split says which shards are finished and where the
window of documents began that the writer stands in. Going on means reading from that window on and
writing only what no finished shard holds.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from overture.data.schema import INDEX, LEDGER, seal, sha256_file, write_aside
from overture.errors import DataError

REJECTED = "rejected.jsonl"


@dataclass
class Progress:
    """How far a split has come at the start of a window: all that later windows depend on."""

    row: int = 0  # the first row of the source that has not been read
    samples: int = 0
    # documents, tokens, trained, kept, truncated, split, left_over (which found no place)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    carry: list[list[int]] = field(default_factory=list)  # its ids that wait for the next window
    rejected_bytes: int = 0

    def __post_init__(self) -> None:  # a journal has them as plain dicts
        self.counts, self.dropped = Counter(self.counts), Counter(self.dropped)


class ShardWriter:
    """Writes samples into `place`, not yet the split's final name; `progress` is where to begin.

    `columns` are MDS types; a shard has at most `size_limit` bytes before `compression`.
    """

    def __init__(
        self, place: Path, columns: dict[str, str], compression: str | None, size_limit: int
    ) -> None:
        self.place = place
        self._journal = place.with_name(f"{place.name}.journal")
        self.progress, shards = Progress(), []
        if self._journal.exists():
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            self.progress, shards = Progress(**journal["progress"]), journal["shards"]
        if place.exists():
            known = {shard[_kind(shard)]["basename"] for shard in shards} | {REJECTED}
            for path in [p for p in place.iterdir() if p.name not in known]:
                path.unlink()  # begun but not finished
        place.mkdir(parents=True, exist_ok=True)
        # Streaming's writer wants an empty folder, which it then never looks at again.
        empty = place.with_name(f"{place.name}.empty")
        shutil.rmtree(empty, ignore_errors=True)
        # Not `with MDSWriter`: on an error it would write an index that looks complete.
        options = {"compression": compression, "size_limit": size_limit, "columns": columns}
        self._writer = MDSWriter(out=str(empty), hashes=["sha256", "xxh64"], **options)
        empty.rmdir()
        self._writer.local = str(place)
        self._writer.shards = shards
        self._written = sum(shard["samples"] for shard in shards)
        self._rejected = (place / REJECTED).open("ab")
        self._rejected.truncate(self.progress.rejected_bytes)
        self._rejected.seek(0, os.SEEK_END)

    def reject(self, entry: dict[str, Any]) -> None:
        """Note a row that is not kept, and why."""
        self._rejected.write(json.dumps(entry).encode() + b"\n")
        self.progress.rejected_bytes = self._rejected.tell()

    def write(self, sample: dict[str, Any], number: int, window: Progress) -> None:
        """Write sample `number` unless a shard has it; `window` is where its window began."""
        if number < self._written:
            return
        finished = len(self._writer.shards)
        self._writer.write(sample)
        if len(self._writer.shards) > finished:
            self._rejected.flush()
            journal = {"progress": vars(window), "shards": self._writer.shards}
            write_aside(self._journal, json.dumps(journal))

    def finish(self, ledger: dict[str, Any]) -> dict[str, Any]:
        """Write the index, then the ledger, which says that the split is whole; return it."""
        self._rejected.close()
        self._writer.finish()
        return seal_split(self.place, self._writer.shards, ledger)


def seal_split(place: Path, shards: list[Any], ledger: dict[str, Any]) -> dict[str, Any]:
    """Write and return a folder's ledger, with all files; DataError: a shard is not as indexed."""
    if not (place / REJECTED).stat().st_size:
        (place / REJECTED).unlink()
    files = {p.name: (p.stat().st_size, sha256_file(p)) for p in sorted(place.iterdir())}
    for shard in shards:
        meant = shard[_kind(shard)]
        if files[meant["basename"]] != (meant["bytes"], meant["hashes"]["sha256"]):
            fault = f"{place / meant['basename']}: reads back otherwise than written"
            raise DataError(f"{fault}; check the disk and convert again without --resume")
    ledger["files"] = [{"name": n, "bytes": s, "sha256": d} for n, (s, d) in files.items()]
    write_aside(place / LEDGER, seal(ledger))
    return ledger


def join_shards(folders: list[Path], place: Path) -> list[dict[str, Any]]:
    """Bring the shards of some folders, in order, into the folder `place`, and write its index.

    They are linked, or copied from another disk. Returns what the index says of them.
    """
    shards = []
    for folder in folders:
        for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]:
            there = folder / shard[_kind(shard)]["basename"]
            for meant in filter(None, (shard["raw_data"], shard.get("zip_data"))):
                ending = Path(meant["basename"]).name.split(".", 2)[2]  # mds, or mds.zstd
                meant["basename"] = f"shard.{len(shards):05}.{ending}"
            here = place / shard[_kind(shard)]["basename"]
            try:
                here.hardlink_to(there)
            except OSError:
                shutil.copyfile(there, here)
            shards.append(shard)
    write_aside(place / INDEX, json.dumps({"version": 2, "shards": shards}, sort_keys=True))
    return shards


def _kind(shard: dict[str, Any]) -> str:
    """Return under which key of an index's shard its file on disk is described."""
    return "zip_data" if shard.get("zip_data") else "raw_data"
