"""MDS columns, their dtypes, and the ledger `dataset.json`: the one place that knows the format.

A split is the folder `OUT/<split>/` holding shards, `index.json` and `dataset.json`; it is complete
or it is absent. A row is a pack of one or more documents:

    input_ids      [tokens] uint16, or uint32 where the vocabulary needs it
    loss_mask      [tokens] uint8, 1 where the token is to be learned
    document_ends  [documents] uint32, the exclusive end of each document, so ends[-1] == tokens

    answers        str, where a source names several that are right, as SQuAD's format does: JSON,
                   for each document a list of them

Other tasks have one record a row:

    seq2seq   input_ids, labels   [tokens] each, with the ends that the tokenizer's family wants
    classify  input_ids, token_type_ids [tokens] uint8, label int32 (or float32 for regression)
    text without a tokenizer      text, a str
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from overture.errors import ConfigError, DataError, GuardError

LEDGER = "dataset.json"
INDEX = "index.json"
ANSWERS = "answers"  # a column, which no training reads
EVERY_ANSWER = "all that is in answers"  # a field of records: JSON, as theirs are texts
CACHE_MARK = ".cache"  # in a folder that was made as a cache, and may therefore be emptied


def ids_type(vocab_size: int) -> str:
    """Return the MDS type of token ids: the smallest that holds them."""
    return f"ndarray:{'uint16' if vocab_size <= 2**16 else 'uint32'}"


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file so that at any moment either the old or the new content is there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    # A file name may be no UTF-8; its escape is JSON's own, so it reads back as the same name.
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes its name and place when all went well.

    ConfigError if there can be no such folder, GuardError if the disk is full or out of order.
    """
    names = (f".{folder.name}.{part}-{os.getpid()}" for part in ("partial", "old"))
    aside, old = map(folder.with_name, names)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        aside.rename(folder)
    except Exception as error:
        # Of a full disk tokenizers raise what is of no kind of its own.
        if not isinstance(error, (OSError, SafetensorError)) and type(error) is not Exception:
            raise
        refused = PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError
        kind = ConfigError if isinstance(error, refused) else GuardError
        raise kind(f"{folder}: cannot be written ({error})") from None
    finally:
        if old.exists() and not folder.exists():  # nothing could take its place
            old.rename(folder)
        for rest in (aside, old):
            shutil.rmtree(rest, ignore_errors=True)


def seal(record: dict[str, Any]) -> str:
    """Return JSON text that holds its own sha256, so that `unseal` finds any changed bit in it."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return f'{text[:-2]},\n "sha256": "{digest}"\n}}\n'


def unseal(path: Path) -> dict[str, Any]:
    """Return the record of a file that `seal` wrote; ValueError if it is not what was written."""
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict) or not record.pop("sha256", None):
        raise ValueError("it does not hold its own sha256")
    if seal(record).encode(errors="backslashreplace") != content:
        raise ValueError("it was changed since it was written")
    return record


def read_ledger(folder: Path) -> dict[str, Any]:
    """Return a split's ledger; ConfigError, naming what is there, if none; DataError if broken."""
    if not (folder / LEDGER).is_file():
        found = sorted(p.parent.name for p in folder.parent.glob(f"*/{LEDGER}"))
        there = f"the splits there are: {', '.join(found)}" if found else "no split is there"
        fault = f"{folder}: no converted dataset ({there})"
        raise ConfigError(f"{fault}; write one with src/convert_dataset.py")
    try:
        ledger = unseal(folder / LEDGER)
        files = [entry.keys() for entry in ledger["files"]]
        if not all({"name", "sha256"} <= keys for keys in files) or "task" not in ledger:
            raise ValueError("keys are missing")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{folder / LEDGER}: unreadable ({error}); convert again") from None
    return ledger


def check_split(
    folder: Path, task: str, max_seq_len: int, batch: int, tokenizer_sha256: str | None = None
) -> dict[str, Any]:
    """Return a split's ledger if it has what training wants, else ConfigError or DataError.

    It wants rows of at most `max_seq_len` tokens for its task, enough of them to fill a `batch`,
    made by the tokenizer that it uses, where that is known.
    """
    ledger = read_ledger(folder)
    wanted, known = "text" if task.endswith("_lm") else task, ledger["tokenizer"]
    if ledger["task"] != wanted:
        theirs = f"was converted with --task {ledger['task']}"
        raise ConfigError(f"{folder}: {theirs}, but task {task} reads --task {wanted}")
    if known is None:
        raise ConfigError(f"{folder}: holds raw text; convert it again with --tokenizer")
    if ledger["max_seq_len"] > max_seq_len:
        rows = f"the rows of {folder} (--max_seq_len {ledger['max_seq_len']})"
        fault = f"{max_seq_len} is shorter than {rows}"
        raise ConfigError(f"max_seq_len: {fault}; raise it or convert again")
    if ledger["samples"] < batch:
        fault = f"{batch} samples per batch, but {folder} holds only {ledger['samples']}"
        raise ConfigError(f"global_train_batch_size: {fault}; lower it or convert more data")
    if wanted != "classify" and not ledger["tokens"]["trained"]:
        fault = f"{folder}: none of its tokens is a label, so there is nothing to learn or measure"
        raise ConfigError(f"{fault}; convert again, with responses and a longer --max_seq_len")
    if tokenizer_sha256 and tokenizer_sha256 != known["sha256"]:
        fault = f"another tokenizer than the {known['name']} that {folder} was converted with"
        raise ConfigError(f"tokenizer_name: {fault}; token ids would mean other words")
    return ledger
