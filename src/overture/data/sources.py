"""Where records come from: a jsonl file, a dataset on the hub, or the embedded corpus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overture.data.schema import sha256_file
from overture.errors import ConfigError

EMBEDDED = "embedded"


@dataclass
class Source:
    """A dataset that can be read from its start any number of times, always in the same order."""

    name: str
    read: Callable[[], Iterator[tuple[int, dict[str, Any]]]]  # yields (line number, record)
    fingerprint: dict[str, Any] = field(default_factory=dict)  # file hashes, or a hub revision


def open_source(name: str, split: str = "train") -> Source:
    """Return the source called `name`: a .jsonl path, `embedded`, or a hub name.

    Raises:
        ConfigError: there is no such file or dataset, or a line of it is broken (when read).
    """
    if name == EMBEDDED:
        from overture.data.embedded import generate_rows

        return Source(name, lambda: enumerate(generate_rows(), start=1), {"generated": True})
    path = Path(name)
    if path.is_file():
        fingerprint = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        return Source(name, lambda: _read_jsonl(path), fingerprint)
    looks_local = path.suffix in (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")
    if looks_local or name.startswith(("/", ".")) or name.count("/") != 1:
        raise ConfigError(f"{name}: no such file (and not a hub name of the form owner/dataset)")
    return _hub_source(name, split)


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is not valid JSON: {error}") from None
            if not isinstance(record, dict):
                raise ConfigError(f"{path}: line {number} holds no JSON object")
            yield number, record


def _hub_source(name: str, split: str) -> Source:
    import datasets  # slow to import, and only needed here

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{name}: no such local file, and not to be had from the hub ({reason}); give the "
            "path of a .jsonl file, or log in with HF_TOKEN if the dataset is gated"
        ) from None
    return Source(name, lambda: enumerate(table, start=1), {"hub_fingerprint": table._fingerprint})
