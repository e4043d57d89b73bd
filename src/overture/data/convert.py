"""Records to MDS shards: read, check, split, tokenise, pack, write, and keep the books.

    python src/convert_dataset.py --dataset databricks/databricks-dolly-15k --task instruct \
        --tokenizer meta-llama/Llama-3.2-1B --out_root data/dolly --test_fraction 0.1

Splits are drawn before anything is dropped, so that no filter can move a record between them. A
split is written into a hidden folder beside its place and renamed when it is whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import overture
from overture.data.encode import Document, RecordEncoder
from overture.data.examine import Examination, examine, records
from overture.data.packing import best_fit
from overture.data.prompts import template
from overture.data.schema import LEDGER, sha256_file, token_columns, write_aside
from overture.data.sources import Source, open_source
from overture.errors import ConfigError

BATCH_RECORDS = 1_000  # records tokenised at once, so that the tokenizer can use all cores
WINDOW_DOCUMENTS = 16_384  # documents packed together; bounds memory


@dataclass(frozen=True)
class Conversion:
    """What to convert and how; the arguments of `src/convert_dataset.py`."""

    datasets: dict[str, str]  # split -> source
    task: str  # instruct | text | jsonl
    out_root: Path
    tokenizer: str | None = None
    prompt_template: str = "dolly"
    fields: dict[str, str] = field(default_factory=dict)  # ours -> theirs
    source_split: str = "train"
    test_fraction: float = 0.0
    seed: int = 17
    max_rows: int | None = None
    max_seq_len: int = 2048
    overflow: str = "truncate_prompt"
    packing: str = "best_fit"  # best_fit | none
    compression: str | None = None
    size_limit: int = 1 << 26
    overwrite: bool = False

    def splits(self) -> list[str]:
        """Return the names of the splits to be written."""
        return ["train", "test"] if self.test_fraction else list(self.datasets)

    def place(self, split: str) -> Path:
        """Return where a split goes."""
        return self.out_root / (f"{split}.jsonl" if self.task == "jsonl" else split)


def convert(job: Conversion, say: Callable[[str], Any] = print) -> dict[str, dict[str, Any]]:
    """Convert a dataset and return the ledger of each split written.

    Raises:
        ConfigError: the source, a field, the tokenizer or an argument does not fit, or a split is
            there already; nothing is left behind.
    """
    for split in job.splits():
        if job.place(split).exists() and not job.overwrite:
            raise ConfigError(
                f"{job.place(split)} is there already; give --overwrite to replace it"
            )
    _refuse_other_draws(job)
    parts = [_examined(job, split, say) for split in job.datasets]
    held_out = {
        key for part in parts for key, owner in zip(part.found.keys, part.owners, strict=True)
        if owner != "train"
    }  # fmt: skip
    tokenizer = _load_tokenizer(job.tokenizer) if job.task != "jsonl" else None
    ledgers = {}
    job.out_root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=job.out_root) as folder:
        aside = Path(folder)
        for part in parts:
            for split in dict.fromkeys(part.owners):
                picked = _Picked(job, part, split, held_out)
                place = aside / job.place(split).name
                if tokenizer is None:
                    ledgers[split] = _write_jsonl(picked, place)
                    say(f"{job.place(split)}: {ledgers[split]['rows']['kept']:,} rows")
                else:
                    ledgers[split] = _write_split(picked, job, tokenizer, place)
                    say(describe(job.place(split), ledgers[split]))
        # Every split is whole now: a split that could not be made would have left none behind.
        for split in ledgers:
            _move_into_place(aside / job.place(split).name, job.place(split))
    return ledgers


def describe(folder: Path, ledger: dict[str, Any]) -> str:
    """Return the figures of a ledger as one line for the terminal."""
    rows, tokens, packing = ledger["rows"], ledger["tokens"], ledger["packing"]
    dropped = ", ".join(f"{count:,} {why}" for why, count in rows["dropped"].items() if count)
    return (
        f"{folder}: {rows['in_split']:,} rows, {rows['kept']:,} kept"
        + (f" (dropped: {dropped})" if dropped else "")
        + (f", {rows['truncated']:,} prompts truncated" if rows["truncated"] else "")
        + f"; {tokens['total']:,} tokens, {tokens['trained'] / max(tokens['total'], 1):.1%} learned"
        + f"; {ledger['samples']:,} samples, {packing['utilisation']:.1%} of their room used"
    )


@dataclass
class _Part:
    """A source, what was found in it, and the split that each of its rows belongs to."""

    source: Source
    found: Examination
    owners: list[str]


def _examined(job: Conversion, split: str, say: Callable[[str], Any]) -> _Part:
    """Read a source for the first time, say what is in it, and draw its splits."""
    source = open_source(job.datasets[split], job.source_split)
    if job.max_rows is not None:
        source = replace(source, read=partial(_first_rows, source, job.max_rows))
    found = examine(source, template(job.prompt_template), job.fields)
    say(f"{source.name}")
    for line in found.lines():
        say(f"  {line}")
    owners = [split] * found.rows
    if job.test_fraction:
        # The test share is rounded up, as scikit-learn and datasets have it.
        held_out = math.ceil(found.rows * job.test_fraction)
        if held_out == found.rows:
            raise ConfigError(
                f"--test_fraction {job.test_fraction} of {found.rows} rows leaves none to train on"
            )
        for index in random.Random(job.seed).sample(range(found.rows), held_out):
            owners[index] = "test"
    return _Part(source, found, owners)


def _first_rows(source: Source, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    # The range first: it ends before another line, perhaps a broken one, is read.
    return (row for _, row in zip(range(count), source.read(), strict=False))


class _Picked:
    """The records of one split, without those that must not be in it; counts what it drops."""

    def __init__(self, job: Conversion, part: _Part, split: str, held_out: set[int]) -> None:
        self.part, self.split = part, split
        self.in_split = part.owners.count(split)
        self.dropped: Counter[str] = Counter()
        self._held_out = held_out if split == "train" else set()
        self._template = template(job.prompt_template)
        self._renamed = {n: job.fields.get(n, n) for n in self._template.fields()}

    def __iter__(self) -> Iterator[dict[str, str]]:
        needed = [name for name, must in self._template.fields().items() if must]
        part = self.part
        rows = tqdm(
            zip(part.owners, part.found.keys, records(part.source, self._renamed), strict=True),
            total=part.found.rows,
            desc=f"converting {self.split}",
            unit=" rows",
            delay=2,
            leave=False,
        )
        for owner, key, (_, record) in rows:
            if owner != self.split:
                continue
            empty = next((name for name in needed if not record.get(name, "").strip()), None)
            if empty:
                self.dropped[f"empty_{empty}"] += 1
            elif key in self._held_out:
                self.dropped["also_held_out"] += 1
            else:
                yield record


def _load_tokenizer(name: str | None) -> Any:
    if name is None:
        raise ConfigError("--tokenizer is missing: a folder in Hugging Face format or a hub name")
    from overture.tokenizer import load_tokenizer

    return load_tokenizer(name)


def _write_jsonl(picked: _Picked, place: Path) -> dict[str, Any]:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in picked]
    place.write_text("".join(lines), encoding="utf-8")
    return {"rows": {"in_split": picked.in_split, "kept": len(lines), "dropped": picked.dropped}}


def _write_split(picked: _Picked, job: Conversion, tokenizer: Any, place: Path) -> dict[str, Any]:
    from streaming import MDSWriter  # slow to import: after the arguments are known to be good

    encoder = RecordEncoder(tokenizer, template(job.prompt_template), job.max_seq_len, job.overflow)
    columns = token_columns(len(tokenizer))
    totals: Counter[str] = Counter()
    # Not `with MDSWriter`: on an error it would write an index that looks complete.
    writer = MDSWriter(
        out=str(place),
        columns=columns,
        compression=job.compression,
        hashes=["sha256", "xxh64"],
        size_limit=job.size_limit,
    )
    for row in _rows(picked, encoder, job):
        writer.write(_sample(row, columns))
        totals["samples"] += 1
        totals["documents"] += len(row)
        totals["tokens"] += sum(len(d.input_ids) for d in row)
        totals["trained"] += sum(int(d.loss_mask.sum()) for d in row)
    if not totals["samples"]:
        raise ConfigError(f"{picked.part.source.name}: no row is left for {picked.split!r}")
    writer.finish()
    ledger = {
        **_ledger(picked, encoder, job, totals),
        "tokenizer": _describe_tokenizer(tokenizer, job.tokenizer),
        "columns": columns,
        "files": [
            {"name": p.name, "bytes": p.stat().st_size, "sha256": sha256_file(p)}
            for p in sorted(place.iterdir())
        ],
    }
    write_aside(place / LEDGER, json.dumps(ledger, indent=1, ensure_ascii=False) + "\n")
    return ledger


def _rows(picked: _Picked, encoder: RecordEncoder, job: Conversion) -> Iterator[list[Document]]:
    """Yield the documents of one MDS row at a time, packed window by window."""
    for window in _windows(picked, encoder):
        if job.packing == "none":
            yield from ([document] for document in window)
            continue
        for row in best_fit([len(document.input_ids) for document in window], job.max_seq_len):
            yield [window[index] for index in row]


def _windows(picked: _Picked, encoder: RecordEncoder) -> Iterator[list[Document]]:
    records_left = iter(picked)
    window: list[Document] = []
    while batch := list(itertools.islice(records_left, BATCH_RECORDS)):
        window += encoder.encode(batch)
        if len(window) >= WINDOW_DOCUMENTS:
            yield window
            window = []
    if window:
        yield window


def _sample(row: list[Document], columns: dict[str, str]) -> dict[str, np.ndarray]:
    id_dtype = columns["input_ids"].split(":")[1]
    return {
        "input_ids": np.concatenate([d.input_ids for d in row]).astype(id_dtype),
        "loss_mask": np.concatenate([d.loss_mask for d in row]),
        "document_ends": np.cumsum([len(d.input_ids) for d in row], dtype=np.uint32),
    }


def _ledger(
    picked: _Picked, encoder: RecordEncoder, job: Conversion, totals: Counter[str]
) -> dict[str, Any]:
    dropped = picked.dropped + Counter({w: encoder.counts[w] for w in encoder.DROPS})
    # Where the shards lie is no part of what they are.
    arguments = {k: v for k, v in vars(job).items() if k not in ("out_root", "overwrite")}
    room = totals["samples"] * job.max_seq_len if job.packing != "none" else totals["tokens"]
    return {
        "kit_version": overture.__version__,
        "task": job.task,
        "split": picked.split,
        "source": {"name": picked.part.source.name, **picked.part.source.fingerprint},
        "arguments": arguments,
        "prompt_template": job.prompt_template,
        "rows": {
            "read": picked.part.found.rows,
            "in_split": picked.in_split,
            "kept": picked.in_split - sum(dropped.values()),
            "dropped": dict(dropped),
            "truncated": encoder.counts["truncated"],
            "split": encoder.counts["split"],
            "duplicates": picked.part.found.duplicate_rows,
        },
        "documents": totals["documents"],
        "samples": totals["samples"],
        "tokens": {"total": totals["tokens"], "trained": totals["trained"]},
        "packing": {"method": job.packing, "utilisation": totals["tokens"] / room},
        "max_seq_len": job.max_seq_len,
    }


def _describe_tokenizer(tokenizer: Any, name: str | None) -> dict[str, Any]:
    from overture.tokenizer import tokenizer_sha256

    return {
        "name": name,
        "sha256": tokenizer_sha256(tokenizer),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }


def _refuse_other_draws(job: Conversion) -> None:
    """Refuse to put a split beside one that another draw from the same source has left there."""
    for ledger in job.out_root.glob(f"*/{LEDGER}"):
        name = ledger.parent.name
        if name not in job.splits():
            theirs = json.loads(ledger.read_text(encoding="utf-8"))["source"]["name"]
            if theirs in job.datasets.values():
                raise ConfigError(
                    f"{ledger.parent} was drawn from the same {theirs}: its rows would be in "
                    f"{', '.join(job.splits())} too; choose another --out_root, or delete it"
                )


def _move_into_place(aside: Path, place: Path) -> None:
    """Rename a finished split to its place; an old one goes with the folder of `aside`."""
    if place.exists():
        os.rename(place, aside.with_name(f"old-{place.name}"))
    os.rename(aside, place)
