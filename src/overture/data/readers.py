"""Readers of local files: each yields (line, record), broken rows included.

Why these and not `datasets`' or pyarrow's readers for text formats: those stop at the first broken
row and cannot say on which line it stood. Parquet, whose rows cannot break singly, is pyarrow's.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from overture.errors import ConfigError

MAX_ROW_BYTES = 32 << 20  # a larger row is a mistake in the file, not a text to learn
COMPRESSED = (".gz", ".zst")


class Malformed(NamedTuple):
    """Stands where a record should be: why there is none, in one word and in a sentence."""

    reason: str
    detail: str


_TOO_LARGE = Malformed("too_large", f"is over {MAX_ROW_BYTES >> 20} MiB")
Record = dict[str, Any]
Rows = Iterator[tuple[int, Record | Malformed]]


class Format(NamedTuple):
    """How to read files that do not say it themselves."""

    columns: tuple[str, ...] = ()  # of csv and tsv without a header
    text_rows: str = "file"  # file | line | block


PLAIN = Format()


def reader(path: Path) -> Callable[[Path, Format], Rows] | None:
    """Return the reader for a file by its name, or None where there is none."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    return READERS.get(suffixes[-1].lower()) if suffixes else None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if it is `.gz` or `.zst`."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="detect"))


def _lines(path: Path) -> Iterator[tuple[int, str | Malformed]]:
    """Yield numbered lines without their ends; one that is too long is read past, not kept."""
    with open_bytes(path) as file:
        lines = iter(lambda: file.readline(MAX_ROW_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield number, _TOO_LARGE
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, _decoded(line.rstrip(b"\r\n"))


def _decoded(data: bytes) -> str | Malformed:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return Malformed("invalid_utf8", f"is not UTF-8 (byte {error.start})")


def read_jsonl(path: Path, _: Format = PLAIN) -> Rows:
    """Yield the record of each line that is not blank."""
    for number, line in _lines(path):
        if isinstance(line, Malformed):
            yield number, line
        elif line and not line.isspace():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                record = Malformed("not_json", f"is not valid JSON: {error}")
            yield number, _object(record)


def _object(record: Any) -> Record | Malformed:
    if isinstance(record, (dict, Malformed)):
        return record
    return Malformed("not_object", "holds no JSON object")


def _read_json(path: Path, form: Format) -> Rows:
    """Yield records of a list, of `{"data": [...]}`, of SQuAD's nesting, or of JSON lines."""
    with open_bytes(path) as file:
        try:
            whole = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            if "Extra data" not in str(error):
                raise ConfigError(f"{path}: is not valid JSON: {error}") from None
            yield from read_jsonl(path, form)
            return
    rows = whole.get("data", [whole]) if isinstance(whole, dict) else whole
    if not isinstance(rows, list):
        raise ConfigError(f'{path}: holds neither a list of records nor one under "data"')
    if rows and isinstance(rows[0], dict) and "paragraphs" in rows[0]:
        rows = _squad_questions(rows)
    yield from ((number, _object(row)) for number, row in enumerate(rows, start=1))


def _squad_questions(articles: list[Any]) -> Iterator[Record | Malformed]:
    """Yield a record per question of a SQuAD-format file (Rajpurkar et al. 2016)."""
    for article in articles:
        for paragraph in _parts(article, "paragraphs"):
            for question in _parts(paragraph, "qas"):
                try:
                    answers = [answer["text"] for answer in question.get("answers") or []]
                    yield {
                        "id": question.get("id"), "title": article.get("title", ""),
                        "context": paragraph["context"], "question": question["question"],
                        "answer": answers[0] if answers else "", "answers": answers,
                    }  # fmt: skip
                except (KeyError, TypeError, AttributeError) as error:
                    yield Malformed("not_squad", f"is not in SQuAD format ({error!r})")


def _parts(whole: Any, name: str) -> list[Any]:
    """Return a list within an object; where there is none, one thing that is no part either."""
    found = whole.get(name) if isinstance(whole, dict) else None
    return found if isinstance(found, list) else [None]


def _read_csv(path: Path, form: Format) -> Rows:
    csv.field_size_limit(MAX_ROW_BYTES)
    with open_bytes(path) as file:
        # Broken bytes become lone surrogates, which the check of the fields then names by row.
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        yield from _table(path, _cells(path, csv.reader(text, strict=True)), form)


def _cells(path: Path, rows: Any) -> Iterator[tuple[int, list[str] | Malformed]]:
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                fault = f"a quotation mark that opens in or after line {begin} is never closed"
                what = "so the rest of the file would be one cell"
                raise ConfigError(f"{path}: {fault}, {what}") from None
            row = Malformed("not_csv", f"is not valid CSV: {error}")
        yield rows.line_num, row


def _read_tsv(path: Path, form: Format) -> Rows:
    """Yield rows of tab-separated cells; quotes are characters like any other."""
    split = ((n, x if isinstance(x, Malformed) else x.split("\t")) for n, x in _lines(path))
    yield from _table(path, split, form)


def _table(path: Path, rows: Iterator[tuple[int, Any]], form: Format) -> Rows:
    names = list(form.columns)
    for number, cells in rows:
        if isinstance(cells, Malformed):
            yield number, cells
        elif not names:
            names = cells
            if twice := next((n for n in names if n and names.count(n) > 1), None):
                fault = f"{path}: the column {twice!r} is there twice in line 1"
                raise ConfigError(f"{fault}; if that is no header, name them with --columns")
        elif not cells or cells == [""]:
            continue
        elif len(cells) != len(names):
            wrong = f"has {len(cells)} cells, not {len(names)} ({', '.join(names)[:80]})"
            yield number, Malformed("wrong_columns", wrong)
        else:
            yield number, dict(zip(names, cells, strict=True))


def _read_parquet(path: Path, _: Format) -> Rows:
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1_000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: cannot be read as Parquet ({error})") from None


def _read_text(path: Path, form: Format) -> Rows:
    """Yield documents under `text`: the whole file, its lines, or blocks between blank lines."""
    if form.text_rows == "file":
        with open_bytes(path) as file:
            content = file.read(MAX_ROW_BYTES + 1)
        text = _decoded(content.removeprefix(b"\xef\xbb\xbf"))
        if len(content) > MAX_ROW_BYTES:
            advice = "; is it one document? --text_rows line or block divides it"
            text = Malformed("too_large", _TOO_LARGE.detail + advice)
        yield 1, text if isinstance(text, Malformed) else {"text": text}
        return
    block: list[tuple[int, str]] = []
    for number, line in itertools.chain(_lines(path), [(0, "")]):  # which ends the last block
        if isinstance(line, Malformed):
            yield number, line
            continue
        if line.strip():
            block.append((number, line))
        if block and (form.text_rows == "line" or not line.strip()):
            yield block[0][0], {"text": "\n".join(text for _, text in block)}
            block = []


def read_parallel(paths: list[Path]) -> Rows:
    """Yield `source` and `target` from two files; ConfigError if one has fewer lines."""
    for one, other in itertools.zip_longest(*map(_lines, paths)):
        if one is None or other is None:
            fault = f"{paths[one is not None]} ends earlier than the other: their lines do not"
            raise ConfigError(f"{paths[0]} and {paths[1]}: {fault} belong together")
        (number, source), (_, target) = one, other
        bad = next((x for x in (source, target) if isinstance(x, Malformed)), None)
        yield number, bad or {"source": source, "target": target}


READERS: dict[str, Callable[[Path, Format], Rows]] = {
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl), ".json": _read_json, ".csv": _read_csv,
    ".tsv": _read_tsv, ".parquet": _read_parquet, ".txt": _read_text,
}  # fmt: skip
