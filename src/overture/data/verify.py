"""Is a split what its ledger says? Every hash and every count anew, from the shards themselves.

`data/integrity.py` asks before each training, by the fastest hash alone; here every row is read.
No tokenizer is loaded.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from streaming.base.hashing import get_hash

from overture.data.integrity import REMEDY
from overture.data.schema import CACHE_MARK, INDEX, LEDGER, sha256_file
from overture.data.shard_writer import REJECTED
from overture.data.shards import Figures, Split, trusting
from overture.errors import DataError

MAX_SHOWN = 100  # faults of one check that are named; all are counted


def verify(split: Split, say: Callable[[str], Any] = print) -> Figures:
    """Check a split, say checks and faults, return its figures; DataError with the first fault."""
    figures, found = Figures(split), []
    checks = {
        f"{len(split.ledger['files'])} files: size and sha256 of {LEDGER}, and no others": _files,
        f"{len(split.readers)} shards: size and hashes of {INDEX}, raw and compressed": _shards,
        f"{len(split):,} rows: ids, labels and borders": _rows,
        "counts of samples, documents, tokens, and of rows kept and not kept": _counts,
    }
    for name, check in checks.items():
        with trusting(split.folder / LEDGER):
            faults = list(check(split, figures))
        say(f"{'FAIL' if faults else 'ok':<6}{name}" + f": {len(faults):,} faults" * bool(faults))
        for fault in faults[:MAX_SHOWN]:
            say(f"      {fault}")
        found += faults
    if found:
        more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        raise DataError(f"{split.folder}: {found[0]}{more}; {REMEDY}")
    say("verified")
    return figures


def _files(split: Split, figures: Figures) -> Iterator[str]:
    recorded = {entry["name"]: entry for entry in split.ledger["files"]}
    there = {path.name: path for path in split.folder.iterdir()}
    needed = {INDEX, *((reader.zip_data or reader.raw_data).basename for reader in split.readers)}
    harmless = {LEDGER, CACHE_MARK, *(reader.raw_data.basename for reader in split.readers)}
    # What a killed run has left begins with the name of a shard.
    left = {n for n in there if re.search(r"\.(tmp|part)$|-\d+$", n)}
    left = {n for n in left if n.partition(".mds.")[0] + ".mds" in harmless}
    for name in sorted(recorded.keys() | needed | there.keys() - harmless - left):
        if name not in recorded:
            yield f"{name}: is not among the files that {LEDGER} says were written"
        elif name not in there:
            yield f"{name}: is missing"
        elif (size := there[name].stat().st_size) != recorded[name]["bytes"]:
            yield f"{name}: has {size} bytes, the ledger says {recorded[name]['bytes']}"
        elif sha256_file(there[name]) != recorded[name]["sha256"]:
            yield f"{name}: its sha256 is not the ledger's"


def _shards(split: Split, figures: Figures) -> Iterator[str]:
    for number, reader in enumerate(split.readers):
        for info in filter(None, (reader.zip_data, reader.raw_data)):
            with suppress(DataError, OSError):  # the other checks name what cannot be read
                path, is_raw = split.folder / info.basename, info is reader.raw_data
                data = split.load(number) if is_raw else path.read_bytes()
                for name, digest in info.hashes.items():
                    if get_hash(name, data) != digest:
                        yield f"{info.basename}: its {name} is not the index's"


def _rows(split: Split, figures: Figures) -> Iterator[str]:
    for shard, reader in enumerate(split.readers):
        for number in range(split.starts[shard], split.starts[shard + 1]):
            try:
                row = split.row(number)
            except DataError as error:
                yield str(error).removeprefix(f"{split.folder}/").removesuffix(f"; {REMEDY}")
                break  # nor would the others be of use
            figures.add(row)
            for fault in _row(split, row):
                yield f"{reader.raw_data.basename}: row {number}: {fault}"


def _row(split: Split, row: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a row; a column that it does not have is taken for a right one."""
    ids, label, names = row.get("input_ids", np.array([-1])), row.get("label", 0), split.labels
    length, largest = len(ids), np.append(ids, row.get("labels", -1)).max()
    mask, types = (row.get(name, np.zeros(length)) for name in ("loss_mask", "token_type_ids"))
    starts = np.append(0, row.get("document_ends", length))
    rise = (np.diff(starts) > 0).all() and starts[-1] == length
    firsts = mask[np.minimum(starts[:-1], len(mask) - 1)]
    is_known = 0 <= label < len(names) if names else np.isfinite(label)
    for is_so, fault in (
        (largest < split.vocab_size, f"id {largest}, outside the vocabulary of {split.vocab_size}"),
        (length <= split.max_seq_len, f"{length} tokens, more than {split.max_seq_len}"),
        (len(mask) == len(types) == length, f"loss_mask or token_type_ids not of {length} tokens"),
        (mask.max() <= 1, "loss_mask is not all 0 and 1"),
        (rise, f"document_ends do not rise to its {length} tokens"),
        (not firsts.any(), "the first token of a document is learned, though none comes before"),
        (is_known, f"label {label} is none of the {len(names)} labels"),
    ):
        if not is_so:
            yield fault


def _counts(split: Split, figures: Figures) -> Iterator[str]:
    ledger, found, rejected = split.ledger, figures.summary(), split.folder / REJECTED
    rows, tokens = ledger["rows"], ledger["tokens"]
    lost = sum(sum(rows.get(why, {}).values()) for why in ("dropped", "malformed"))
    lines = rejected.read_bytes().count(b"\n") if rejected.is_file() else 0
    labels = found["rows_by_label"] or {}
    said = {name: n for name, n in (ledger.get("label_counts") or labels).items() if n}
    for name, written, counted in (
        ("samples", ledger["samples"], found["rows_read"]),
        ("documents", ledger["documents"], found["documents"]),
        ("tokens.total", tokens["total"], found.get("tokens", 0)),
        ("tokens.trained", tokens["trained"], found["learned_tokens"] or 0),
        ("label_counts", said, labels),
        ("rows.in_split", rows["in_split"], rows["kept"] + lost),
        (f"dropped and malformed in {REJECTED}", lost, lines),
    ):
        if written != counted:
            yield f"{LEDGER}: {name} is {written}, counted are {counted}"
