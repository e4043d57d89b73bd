"""The rows of a local split straight from its files, and their figures; no file is trusted."""

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.reader import MDSReader

from overture.data.integrity import REMEDY, read_index
from overture.data.schema import ANSWERS, INDEX, LEDGER, read_ledger
from overture.errors import DataError, OvertureError

BARS = 10  # of a length histogram
KINDS = {
    "tokens": {"input_ids", "loss_mask", "document_ends"}, "seq2seq": {"input_ids", "labels"},
    "classify": {"input_ids", "token_type_ids", "label"}, "raw": {"text"},
}  # fmt: skip


@contextmanager
def trusting(place: Path, part: str = "") -> Iterator[None]:
    """Use what was read from a file as if it were well formed; raises DataError if it was not."""
    try:
        yield
    except OvertureError:
        raise
    except Exception as error:  # no list of kinds would hold what malformed content can run into
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise DataError(f"{place}: {part}cannot be read ({reason}); {REMEDY}") from error


class Split:
    """A split opened for reading: its `ledger`, the `kind` of its rows, a `reader` per shard, and
    in `starts`, [shards + 1] int64, the number of each shard's first row. Of the ledger `labels`
    and `max_seq_len`, and `tokenizer` and `vocab_size`, None and 0 for raw text, are sound. Raises
    ConfigError if no split is there, DataError if ledger or index are malformed or do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file() and not (folder / LEDGER).is_file():
            raise DataError(f"{folder / LEDGER}: is missing; {REMEDY}")
        self.ledger = read_ledger(folder)
        read_index(folder / INDEX)  # nothing in it can run code or lead out of the folder
        with trusting(folder / INDEX):
            index = json.loads((folder / INDEX).read_bytes())
            self.readers = [MDSReader.from_json(str(folder), None, o) for o in index["shards"]]
            self.starts = np.cumsum([0, *(reader.samples for reader in self.readers)])
            for reader in self.readers:
                columns = dict(zip(reader.column_names, reader.column_encodings, strict=True))
                known = columns.keys() - {ANSWERS}
                kinds = [kind for kind, names in KINDS.items() if names == known]
                if columns != self.ledger["columns"] or not kinds:
                    raise ValueError(f"columns that {LEDGER} or the kit does not know")
            self.kind = kinds[0]
        with trusting(folder / LEDGER):
            self.labels = [str(label) for label in self.ledger.get("labels") or ()]
            self.max_seq_len = int(self.ledger["max_seq_len"])
            is_raw, known = self.kind == "raw", self.ledger["tokenizer"]
            self.tokenizer = None if is_raw else str(known["name"])
            self.vocab_size = 0 if is_raw else int(known["vocab_size"])
        self._loaded = (-1, np.empty(0, np.uint8))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def load(self, shard: int) -> np.ndarray:
        """Return a shard's raw bytes, [bytes] uint8, from its file or unpacked, else DataError."""
        reader = self.readers[shard]
        path = self.folder / reader.raw_data.basename
        if is_packed := reader.zip_data is not None and not path.is_file():
            path = path.with_name(reader.zip_data.basename)
        with trusting(path):
            data = np.memmap(path, np.uint8, "r")
            return np.frombuffer(decompress(reader.compression, data), "u1") if is_packed else data

    def row(self, number: int) -> dict[str, Any]:
        """Return a row, `sample_id` included; cheapest in rising order; DataError if broken."""
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        if self._loaded[0] != shard:
            self._loaded = shard, self.load(shard)
        data, place = self._loaded[1], 4 * (1 + number - int(self.starts[shard]))
        reader = self.readers[shard]
        with trusting(self.folder / reader.raw_data.basename, f"row {number} "):
            begin, end = np.frombuffer(data[place : place + 8].tobytes(), np.uint32)
            if not begin < end <= len(data):
                raise ValueError("it lies outside the file")
            row = reader.decode_sample(data[begin:end].tobytes())
            others = ("text", "label", ANSWERS)
            lists = [value for name, value in row.items() if name not in others]
            if any(value.ndim != 1 or not len(value) for value in lists):
                raise ValueError("a column is empty or no list of numbers")
        return {**row, "sample_id": number}

    def label(self, row: dict[str, Any]) -> str:
        """Return the label of a row by name, or its score."""
        label = row["label"].item()
        return self.labels[int(label)] if 0 <= label < len(self.labels) else f"{label:g}"


class Figures:
    """Collects figures of rows, beginning with `most` of them, spread over the split.

    `numbers`, `lengths` (in tokens, of raw text in characters) and `learned` (tokens) have an entry
    for each row, `documents` the length of each document; a pair of source and target is one.
    """

    def __init__(self, split: Split, most: int = 0) -> None:
        self.split = split
        self.numbers, self.lengths, self.learned, self.documents = (array("q") for _ in range(4))
        self.labels: Counter[str] = Counter()
        self.scores = array("d")
        for number in np.linspace(0, len(split) - 1, min(most, len(split))).astype(int):
            self.add(split.row(int(number)))

    def add(self, row: dict[str, Any]) -> None:
        targets = len(row.get("labels", ()))
        length = targets + len(row["text"] if "text" in row else row["input_ids"])
        self.numbers.append(row["sample_id"])
        self.lengths.append(length)
        self.learned.append(targets + int(np.sum(row.get("loss_mask", 0))))
        self.documents.extend(np.diff(row.get("document_ends", [length]), prepend=0).tolist())
        if "label" in row and self.split.labels:
            self.labels[self.split.label(row)] += 1
        elif "label" in row:
            self.scores.append(row["label"])

    def summary(self) -> dict[str, Any]:
        """Return the figures for json; null stands for what such rows do not have."""
        kind, total, learned = self.split.kind, sum(self.lengths), sum(self.learned)
        has_loss = kind in ("tokens", "seq2seq")
        room = len(self.lengths) * self.split.max_seq_len if kind == "tokens" else 0
        return {
            "task": self.split.ledger["task"], "rows_in_split": len(self.split),
            "rows_read": len(self.lengths), "documents": len(self.documents),
            "characters" if kind == "raw" else "tokens": total,
            "learned_tokens": learned if has_loss else None,
            "learned_share": learned / max(total, 1) if has_loss else None,
            "rows_without_learned_tokens": self.learned.count(0) if has_loss else None,
            "packing_utilisation": total / room if room else None,
            "rows_by_length": _by_length(self.lengths),
            "documents_by_length": _by_length(self.documents), "row_lengths": _spread(self.lengths),
            "document_lengths": _spread(self.documents),
            "rows_by_label": dict(sorted(self.labels.items())) or None,
            "scores": _spread(self.scores),
        }  # fmt: skip


def _by_length(lengths: array) -> dict[str, int]:
    width = max(lengths, default=0) // BARS + 1
    counts = Counter(length // width for length in lengths)
    return {f"{i * width:,} to {(i + 1) * width - 1:,}": counts[i] for i in range(BARS)}


def _spread(values: array) -> dict[str, float] | None:
    if not values:
        return None
    median, p99 = np.percentile(values, [50, 99]).tolist()
    mean = sum(values) / len(values)
    return {"min": min(values), "median": median, "mean": mean, "p99": p99, "max": max(values)}
