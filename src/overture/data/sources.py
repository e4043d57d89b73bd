"""Where records come from: files of many kinds, a dataset on the hub, or the embedded corpus."""

import glob
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from overture.data.embedded import generate_rows
from overture.data.readers import PLAIN, READERS, Format, Malformed, Rows, read_parallel, reader
from overture.data.schema import sha256_file
from overture.errors import ConfigError
from overture.offline import in_reach

_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")


class Place(NamedTuple):
    """Where a row stands. `file` is empty where the source is a single one."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line}" + (f" of {self.file}" if self.file else "")

    def rejected(self, reason: str, more: dict[str, str] | None = None) -> dict[str, Any]:
        """Return what `rejected.jsonl` says of the row."""
        file = {"file": self.file} if self.file else {}
        return {**file, "line": self.line, "reason": reason, **(more or {})}


@dataclass(frozen=True)
class Source:
    """A dataset that can be read from its start any number of times, always in the same order."""

    name: str
    read: Callable[[], Iterator[tuple[Place, dict[str, Any] | Malformed]]]
    fingerprint: dict[str, Any] = field(default_factory=dict)  # file hashes, or a hub revision
    streamed: bool = False  # from the network: better kept than read again

    def first(self) -> dict[str, Any]:
        """Return the first record, or an empty one."""
        return next((r for _, r in self.read() if not isinstance(r, Malformed)), {})

    def rows(self, start: int, stop: int | None) -> "Source":
        """Return the same source from row start up to row stop."""
        # islice ends before another line, perhaps a broken one, is read.
        return replace(self, read=lambda: itertools.islice(self.read(), start, stop))

    def kept(self, path: Path, before: int = 0) -> "Source":
        """Return the source as read from a copy at `path`, which is written if it is not there;
        so many rows `before` it count.
        """
        if not path.exists():
            aside = path.with_suffix(".partial")
            with aside.open("w", encoding="utf-8", errors="surrogatepass") as file:
                for _, record in self.read():
                    file.write(json.dumps(record, default=str) + "\n")
            os.replace(aside, path)
        fingerprint = {**self.fingerprint, "sha256": sha256_file(path)}
        jsonl = READERS[".jsonl"]

        def read() -> Iterator[tuple[Place, Any]]:
            for place, record in _readable(self.name, jsonl(path, PLAIN)):
                yield place._replace(line=place.line + before), record

        return Source(self.name, read, fingerprint)


def open_source(
    name: str, split: str = "train", form: Format = PLAIN, subset: str | None = None,
    revision: str | None = None,
) -> Source:  # fmt: skip
    """Return a source: file, folder, pattern, aligned files as `FILE,FILE`, `embedded`, hub name.

    In a folder, `split` picks the files of that name (`train.tsv`, `train/*.jsonl`); all of them
    are `train` where none is called so. Raises ConfigError: no such file, split or dataset.
    """
    if not name:
        raise ConfigError("--dataset is empty: name a file, a folder, a hub dataset or `embedded`")
    pair = [Path(part) for part in name.split(",")]
    if name == "embedded":
        _refuse_choice(name, split, subset, revision)
        known = {"generated": True}
        return Source(name, lambda: _readable(name, enumerate(generate_rows(), 1)), known)
    if len(pair) == 2 and not Path(name).exists() and pair[0].is_file():
        _refuse_choice(name, split, subset, revision)
        if not pair[1].is_file():
            raise ConfigError(f"{pair[1]}: no such file")
        return Source(name, lambda: _readable(name, read_parallel(pair)), _fingerprint(pair))
    if files := local_files(name, split):
        _refuse_choice(name, "train", subset, revision)
        return _file_source(name, files, form)
    looks_local = reader(Path(name)) or name.startswith(("/", ".", "~")) or glob.has_magic(name)
    if looks_local or name.count("/") > 1:
        raise ConfigError(f"{name}: no such file (and not a hub name of the form owner/dataset)")
    return _hub_source(name, split, subset, revision)


def _refuse_choice(name: str, split: str, subset: str | None, revision: str | None) -> None:
    if split != "train":
        raise ConfigError(f"{name}: is not divided: its only split is train, not {split}")
    if subset or revision:
        raise ConfigError(f"{name}: is local: --data_subset and --revision are for hub names")


def local_files(name: str, split: str) -> list[Path]:
    """Return the files of a split that a path, a pattern or a folder stands for, [] for none.

    Raises ConfigError where a folder's names do not say which they are.
    """
    path = Path(name)
    if path.is_file() or (glob.has_magic(name) and not path.is_dir()):
        _refuse_choice(name, split, None, None)
        found = [path] if path.is_file() else map(Path, sorted(glob.glob(name, recursive=True)))
        return [p for p in found if p.is_file()]
    if not path.is_dir():
        return []
    known = [p for p in sorted(path.rglob("*")) if p.is_file() and reader(p)]
    files = [p for p in known if not any(n.startswith(".") for n in p.relative_to(path).parts)]
    if not files:
        raise ConfigError(f"{name}: holds no file of a known kind ({', '.join(READERS)})")
    below = {p: p.relative_to(path) for p in files}
    trained, others = (
        [p for p in files if any(_is_called(below[p], s, within=True) for s in names)]
        for names in (("train",), _HELD_OUT)
    )
    divided = bool(trained and others)  # or a word may be no more than that: Night train.txt
    named = [p for p in files if _is_called(below[p], split)]
    named = named or [p for p in files if divided and _is_called(below[p], split, within=True)]
    if not named and (split != "train" or others):
        there = ", ".join(str(p.relative_to(path)) for p in files[:8])
        fault = f"has no files for split {split!r}; there are: {there}"
        raise ConfigError(f"{name}: {fault}; name a pattern, as in '*.jsonl'")
    files = named or files
    kinds = {reader(p): p.name for p in files}
    if len(kinds) > 1:
        some = " and ".join(list(kinds.values())[:2])
        raise ConfigError(f"{name}: holds {some}; say which with a pattern, as in '*.jsonl'")
    return files


def _is_called(path: Path, split: str, within: bool = False) -> bool:
    """Return whether the name of a file or of one of its folders begins with that of a split, or
    has it as a word `within`, of any case, as the hub has them: train.tsv, my_Train.jsonl.
    """
    word = rf"{re.escape(split)}(?![^\W_])"
    if within:
        return any(re.search(rf"(?<![^\W_]){word}", part, re.I) for part in path.parts)
    return any(re.match(word, part) for part in path.parts)


def _file_source(name: str, files: list[Path], form: Format) -> Source:
    kinds = {reader(path): path for path in reversed(files)}
    if None in kinds:
        known = f"there are: {', '.join(READERS)}, each also as .gz and .zst"
        raise ConfigError(f"{kinds[None]}: no reader for this kind of file; {known}")
    if form.columns and not kinds.keys() & {READERS[".csv"], READERS[".tsv"]}:
        raise ConfigError(f"--columns names those of csv and tsv files; {name} is none")
    if form.text_rows != "file" and READERS[".txt"] not in kinds:
        raise ConfigError(f"--text_rows is for txt files; {name} is none")

    def read() -> Iterator[tuple[Place, Any]]:
        for path in files:
            rows = reader(path)(path, form)
            yield from _readable(str(path), rows, "" if len(files) == 1 else str(path))

    return Source(name, read, _fingerprint(files))


def _readable(name: str, rows: Rows, file: str = "") -> Iterator[tuple[Place, Any]]:
    """Yield placed rows; a truncated or foreign .gz, or a file gone, is one sentence."""
    try:
        yield from ((Place(file, line), record) for line, record in rows)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{name}: cannot be read ({error})") from None


def _fingerprint(files: list[Path]) -> dict[str, Any]:
    found = [{"sha256": sha256_file(p), "bytes": p.stat().st_size} for p in files]
    if len(files) == 1:
        return found[0]
    return {"files": [{"name": p.name, **f} for p, f in zip(files, found, strict=True)]}


def _hub_source(name: str, split: str, subset: str | None, revision: str | None) -> Source:
    in_reach(name)
    import datasets  # slow to import, and only needed here

    def read() -> Iterator[tuple[Place, Any]]:
        # The hub's client raises a dozen kinds of error; all mean the same here.
        try:
            table = datasets.load_dataset(name, subset, **where, streaming=True)
            yield from ((Place("", line), record) for line, record in enumerate(table, start=1))
        except Exception as error:
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            fault = f"{name}: no such local file, and not to be had from the hub ({reason})"
            advice = "give the path of a file, or log in with HF_TOKEN if the dataset is gated"
            if "Config name is missing" in reason:  # what follows it are the names
                advice = "name one with --data_subset"
            raise ConfigError(f"{fault}; {advice}") from None

    where = {"split": split, "revision": revision}
    return Source(name, read, {"subset": subset, **where}, streamed=True)
