"""One split: encoded documents to packed samples to shards, window by window, with its ledger."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from overture.data.conversion import Conversion
from overture.data.encode import Document, Encoded
from overture.data.examine import dropped, repeats
from overture.data.packing import best_fit, concatenate
from overture.data.schema import ANSWERS
from overture.data.shard_writer import Progress, ShardWriter
from overture.errors import ConfigError

# Documents packed together. More would bind more memory, and packing wait for workers' ends.
WINDOW_DOCUMENTS = 4_096
WINDOW_REJECTED = 65_536


def write_split(
    job: Conversion, folder: Path, rows: Any, workers: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write one split into `folder` and return its ledger; goes on where a journal says.

    `rows` are a `convert.Selected`, `workers` a `workers.Workers`, `facts` those of the ledger that
    all splits share. Raises ConfigError: no row is left, or one is too long under
    `--overflow error`.
    """
    columns = workers.encoder.columns
    writer = ShardWriter(folder / rows.split, columns, job.compression, job.size_limit)
    progress = writer.progress
    counts = progress.counts
    for window in windows(job, rows, workers.encode(rows.batches(progress.row))):
        start = deepcopy(progress)
        for entry in window.rejected:
            writer.reject(entry)
        for row in packed(job, window.documents, progress):
            writer.write(sample_of(row, columns, facts), progress.samples, start)
            progress.samples += 1
            counts.update(tally(row, facts["labels"]))
        progress.row = window.end
        counts.update(window.notes)
        progress.dropped.update(entry["reason"] for entry in window.rejected)
    counts["left_over"] += len(progress.carry)
    return writer.finish(ledger_of(job, rows, columns, facts, progress))


def tally(documents: list[Document], labels: Any) -> Counter[str]:
    """Return how many documents, tokens, trained ones and, of each of the `labels`, documents."""
    counts = Counter(documents=len(documents))
    for document in documents:  # of a classifier's, no token is learned
        answer = len(document.get("labels", ()))
        counts["tokens"] += len(document.get("input_ids", ())) + answer
        counts["trained"] += int(np.sum(document.get("loss_mask", 0))) + answer
        if labels:
            counts[f"label {document['label']}"] += 1
    return counts


@dataclass
class Window:
    """Documents that are packed together, and what was not kept on the way to them."""

    documents: list[Document] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    end: int = 0  # the row of the source after the last one
    batches: int = 0  # how many it is made of


def windows(job: Conversion, rows: Any, batches: Iterable[tuple[Any, Encoded]]) -> Iterator[Window]:
    """Yield windows of the encoded batches of `rows`; ConfigError where one is too long."""
    window = Window()
    for (end, places, rejected), encoded in batches:
        window.rejected += rejected
        for number, reason in encoded.drops:
            place = places[number]
            if reason == "too_long" and job.overflow == "error":
                fault = f"{place} does not fit --max_seq_len {job.max_seq_len}"
                raise ConfigError(f"{rows.part.source.name}: {fault}, and --overflow is error")
            window.rejected.append(place.rejected(reason))
        window.documents += encoded.documents
        window.notes.update(encoded.notes)
        window.notes["kept"] += len(places) - len(encoded.drops)
        window.end = end
        window.batches += 1
        if len(window.documents) >= WINDOW_DOCUMENTS or len(window.rejected) >= WINDOW_REJECTED:
            yield window
            window = Window()
    if window.end:
        yield window


def packed(job: Conversion, documents: list[Document], done: Progress) -> Iterator[list[Document]]:
    """Yield the documents of a window row by row; what waits for the next is left in `done`."""
    method = job.how_packed()
    if method == "none":
        yield from ([document] for document in documents)
    elif method == "concat":
        ids = [document["input_ids"] for document in documents]
        filled, rest, lost = concatenate(ids, done.carry, job.max_seq_len, job.wrap)
        done.carry = rest.tolist()
        done.counts["left_over"] += lost
        mask = np.ones(job.max_seq_len, np.uint8)
        mask[0] = 0  # nothing could predict it
        yield from ([{"input_ids": row, "loss_mask": mask}] for row in filled)
    else:
        for row in best_fit([len(d["input_ids"]) for d in documents], job.max_seq_len):
            yield [documents[index] for index in row]


def sample_of(row: list[Document], kinds: dict[str, str], facts: dict[str, Any]) -> dict[str, Any]:
    """Return what a row of documents is in a shard; ConfigError for an id out of range."""
    sample, known = {}, facts["tokenizer"]
    for name, kind in kinds.items():
        if name == "document_ends":
            sample[name] = np.cumsum([len(d["input_ids"]) for d in row], dtype=np.uint32)
        elif name == ANSWERS:
            sample[name] = json.dumps([d[name] for d in row])
        elif kind.startswith("ndarray:"):
            values = row[0][name] if len(row) == 1 else np.concatenate([d[name] for d in row])
            if name in ("input_ids", "labels") and values.max() >= known["vocab_size"]:
                fault = f"the tokenizer gives id {values.max()}, outside its own vocabulary"
                raise ConfigError(f"{known['name']}: {fault} of {known['vocab_size']:,}")
            sample[name] = values.astype(kind.split(":")[1])
        else:
            sample[name] = row[0][name]
    return sample


def ledger_of(
    job: Conversion, rows: Any, columns: dict[str, str], facts: dict[str, Any], done: Progress
) -> dict[str, Any]:
    """Return the ledger of a split but for its files; ConfigError if no row is left."""
    if not done.samples:
        why = dropped(done.dropped)
        raise ConfigError(f"{rows.part.source.name}: no row is left for {rows.split!r}{why}")
    found, counts = rows.part.found, done.counts
    method, room = job.how_packed(), done.samples * job.max_seq_len
    used = counts["tokens"] / room if method != "none" else 1.0
    malformed = {why: n for why, n in done.dropped.items() if why in found.malformed}
    dropped_rows = {why: n for why, n in done.dropped.items() if why not in malformed}
    names = enumerate(facts["labels"] or ())
    return {
        **facts, "split": rows.split,
        "source": {"name": rows.part.source.name, **rows.part.source.fingerprint},
        "arguments": job.identity(),
        "rows": {
            "read": found.rows, "in_split": rows.in_split,
            **{name: counts[name] for name in ("kept", "truncated", "split")},
            "malformed": malformed, "dropped": dropped_rows,
            "duplicates": int(repeats(found.contents).sum()),
        },
        "documents": counts["documents"],
        "label_counts": {name: counts[f"label {number}"] for number, name in names} or None,
        "samples": done.samples,
        "tokens": {"total": counts["tokens"]} | {n: counts[n] for n in ("trained", "left_over")},
        "packing": {"method": method, "utilisation": used},
        "max_seq_len": job.max_seq_len, "columns": columns,
    }  # fmt: skip
