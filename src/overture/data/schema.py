"""MDS columns, their dtypes, and the ledger `dataset.json`: the one place that knows the format.

A split is the folder `OUT/<split>/` holding shards, `index.json` and `dataset.json`; it is complete
or it is absent. A row is a pack of one or more documents:

    input_ids      [tokens] uint16, or uint32 where the vocabulary needs it
    loss_mask      [tokens] uint8, 1 where the token is to be learned
    document_ends  [documents] uint32, the exclusive end of each document, so ends[-1] == tokens
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from overture.errors import ConfigError, DataError

LEDGER = "dataset.json"
INDEX = "index.json"


def token_columns(vocab_size: int) -> dict[str, str]:
    """Return the MDS column types of token rows; ids take the smallest type that fits."""
    id_dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    return {
        "input_ids": f"ndarray:{id_dtype}",
        "loss_mask": "ndarray:uint8",
        "document_ends": "ndarray:uint32",
    }


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_aside(path: Path, text: str) -> None:
    """Write a text file so that at any moment either the old or the new content is there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return the ledger of a split.

    Raises:
        ConfigError: no split is there; the message names the splits that are.
        DataError: a ledger or index is there but unreadable.
    """
    if not (folder / LEDGER).is_file():
        found = sorted(p.parent.name for p in folder.parent.glob(f"*/{LEDGER}"))
        there = f"the splits there are: {', '.join(found)}" if found else "no split is there"
        raise ConfigError(
            f"{folder}: no converted dataset ({there}); write one with src/convert_dataset.py"
        )
    try:
        return json.loads((folder / LEDGER).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{folder / LEDGER}: unreadable ({error}); convert again") from None


# What a training task reads, by the task that the data was converted for.
CONVERTED_FOR = {"causal_lm": "text", "instruct": "instruct"}


def check_split(
    folder: Path, task: str, max_seq_len: int, batch: int, tokenizer_sha256: str | None = None
) -> dict[str, Any]:
    """Return the ledger of a split that training can read as it wants to.

    Args:
        folder: the split.
        task: the training task.
        max_seq_len: the longest row that training takes, in tokens.
        batch: rows per batch that the split must be able to fill.
        tokenizer_sha256: of the tokenizer that training uses, where it is known.

    Raises:
        ConfigError: the data is for another task, length, tokenizer or batch size.
        DataError: a file of the split is missing or has another size than when it was written.
    """
    ledger = read_ledger(folder)
    wanted = CONVERTED_FOR[task]
    if ledger["task"] != wanted:
        raise ConfigError(
            f"{folder}: was converted with --task {ledger['task']}, but task {task} reads "
            f"--task {wanted}"
        )
    if ledger["max_seq_len"] > max_seq_len:
        raise ConfigError(
            f"max_seq_len: {max_seq_len} is shorter than the rows of {folder} "
            f"(--max_seq_len {ledger['max_seq_len']}); raise it or convert again"
        )
    if ledger["samples"] < batch:
        raise ConfigError(
            f"global_train_batch_size: {batch} samples per batch, but {folder} holds only "
            f"{ledger['samples']}; lower it or convert more data"
        )
    if tokenizer_sha256 is not None and ledger["tokenizer"]["sha256"] != tokenizer_sha256:
        raise ConfigError(
            f"tokenizer_name: another tokenizer than the {ledger['tokenizer']['name']} that "
            f"{folder} was converted with; token ids would mean other words"
        )
    return ledger


def check_files(folder: Path, ledger: dict[str, Any]) -> None:
    """Compare the files of a split with its ledger, by name and size.

    Raises:
        DataError: naming the first file that differs.
    """
    for entry in ledger["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            raise DataError(f"{path}: is missing; convert the dataset again")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(
                f"{path}: has {path.stat().st_size:,} bytes, {entry['bytes']:,} were written; "
                "convert the dataset again"
            )
