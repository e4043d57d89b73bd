"""Fixtures for faults in shards: splits of many small shards, and an end to whatever hangs."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming import MDSWriter
from streaming.base.format import reader_from_json
from transformers import AutoTokenizer

from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.schema import read_ledger, seal, sha256_file
from overture.data.shards import Split


@pytest.fixture
def write_split(smoke, tmp_path) -> Callable[..., Path]:
    """Write a smoke split anew, in shards of some 8 KB, with a ledger; returns its folder."""

    def write(place: str = "data/train", compression: str | None = None, rows: int = 60) -> Path:
        ledger = read_ledger(smoke / "instruct" / "train")
        index = json.loads((smoke / "instruct" / "train" / "index.json").read_text())
        source = reader_from_json(str(smoke / "instruct"), "train", index["shards"][0])
        folder = tmp_path / place
        with MDSWriter(
            columns=ledger["columns"], out=str(folder), compression=compression,
            hashes=["sha256", "xxh64"], size_limit=8192,
        ) as writer:  # fmt: skip
            for number in range(rows):
                writer.write(source[number])
        ledger["samples"] = rows
        ledger["files"] = [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(folder.iterdir())
        ]
        (folder / "dataset.json").write_text(seal(ledger))
        return folder

    return write


@pytest.fixture
def damage() -> Callable[[Path], None]:
    """Flip one bit in the middle of a file; size and time stay."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return flip


@pytest.fixture
def within():
    """Fail a test that hangs: `within(20)` allows it 20 seconds from then on."""

    def expire(*_):
        raise TimeoutError("this hangs")

    before = signal.signal(signal.SIGALRM, expire)
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def tokenizer(smoke):
    return AutoTokenizer.from_pretrained(smoke / "tokenizer")


@pytest.fixture
def run(tmp_path, smoke):
    """Convert records and return (ledger, rows of the split, rejected rows)."""

    def run(records, task, **changes):
        source = tmp_path / "in.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        source.write_text("".join(line + "\n" for line in lines))
        options = {
            "origins": {"train": Origin(str(source))},
            "task": task,
            "out_root": str(tmp_path / "out"),
            "tokenizer": str(smoke / "tokenizer"),
            "max_seq_len": 128,
            "overwrite": True,
        }
        if changes.get("tokenizer", "") is None:
            del options["max_seq_len"]
        ledgers = convert(Conversion(**{**options, **changes}), lambda _: None)
        folder = tmp_path / "out" / "train"
        split = Split(folder)
        rows = [split.row(number) for number in range(len(split))]
        path = folder / "rejected.jsonl"
        rejected = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        return ledgers["train"], rows, rejected

    return run
