"""The first reading of a dataset: records are checked and counted before anything is written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from overture.data.prompts import PromptTemplate
from overture.data.sources import Source
from overture.errors import ConfigError, nearest

# What other datasets call our fields, for a better hint than spelling alone can give.
_ALIASES = {
    "response": ("output", "answer", "completion", "target", "chosen"),
    "instruction": ("prompt", "question", "query"),
    "context": ("input", "passage", "document"),
    "text": ("content", "document", "body"),
}


@dataclass
class Examination:
    """What was found in a source. `keys` holds one 64-bit hash of the prompt fields per record."""

    rows: int = 0
    empty: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    duplicate_rows: int = 0
    duplicate_prompts: int = 0
    samples: list[dict[str, str]] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the findings as lines for the terminal."""
        lines = [f"rows               {self.rows:,}"]
        lines += [f"empty {name:<12} {count:,}" for name, count in self.empty.items()]
        if self.categories:
            listed = ", ".join(f"{k} {v:,}" for k, v in self.categories.most_common(12))
            lines.append(f"categories         {listed}")
        lines.append(
            f"duplicates         {self.duplicate_rows:,} rows, "
            f"{self.duplicate_prompts:,} repeated prompts"
        )
        for number, sample in enumerate(self.samples):
            lines.append(f"sample {number}")
            lines += [f"  {name}: {_shorten(text)}" for name, text in sample.items()]
        return lines


def records(source: Source, renamed: dict[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, record) with fields renamed to ours and missing texts as ''.

    Raises:
        ConfigError: a field holds something that is not text.
    """
    back = {theirs: ours for ours, theirs in renamed.items()}
    for number, record in source.read():
        fields = {}
        for name, value in record.items():
            if name in renamed and renamed[name] != name:
                continue  # its place is taken by the field that the user named instead
            if value is not None and not isinstance(value, str):
                if name in back:
                    raise ConfigError(
                        f"{source.name}: line {number}: field {name!r} holds "
                        f"{type(value).__name__}, not text"
                    )
                continue
            try:
                (value or "").encode("utf-8")
            except UnicodeEncodeError:
                raise ConfigError(
                    f"{source.name}: line {number}: field {name!r} holds half of a surrogate pair, "
                    "which is no text"
                ) from None
            fields[back.get(name, name)] = value or ""
        yield number, fields


def examine(source: Source, template: PromptTemplate, renamed: dict[str, str]) -> Examination:
    """Read a source once and return what is in it.

    Raises:
        ConfigError: there are no records, or a field that the template needs is missing.
    """
    found = Examination()
    wanted = template.fields()
    for name in renamed:
        if name not in wanted:
            raise ConfigError(
                f"--field {name}=...: the template reads no field {name!r}{nearest(name, wanted)}"
            )
    missing: dict[str, tuple[int, int]] = {}
    names: Counter[str] = Counter()
    prompts, rows = set(), set()
    learned = [template.response] if template.response else []
    for number, record in records(source, {name: renamed.get(name, name) for name in wanted}):
        found.rows += 1
        names.update(record.keys())  # not update(record): that would add up the texts
        for name in wanted:
            if name not in record:
                count, first = missing.get(name, (0, number))
                missing[name] = (count + 1, first)
        for name, text in record.items():
            found.empty[name] += not text.strip()
        if "category" in record:
            found.categories[record["category"]] += 1
        if len(found.samples) < 3:
            found.samples.append(record)
        key = _hash(record.get(name, "") for name in wanted if name not in learned)
        row = _hash(record.values())
        found.duplicate_prompts += key in prompts
        found.duplicate_rows += row in rows
        prompts.add(key)
        rows.add(row)
        found.keys.append(key)
    if not found.rows:
        raise ConfigError(f"{source.name}: holds no records")
    for name, (count, first) in missing.items():
        if wanted[name] or (count == found.rows and len(wanted) == 1):
            raise ConfigError(_missing(source.name, name, count, first, found.rows, names))
    return found


def _missing(source: str, name: str, count: int, first: int, rows: int, names: Counter) -> str:
    present = [n for n in names if names[n] > rows // 2]
    alias = next((a for a in _ALIASES.get(name, ()) if a in present), None)
    hint = f' (did you mean "--field {name}={alias}"?)' if alias else nearest(name, present)
    return (
        f"{source}: field {name!r} is missing in {count:,} of {rows:,} rows, first at line "
        f"{first}; the fields there are: {', '.join(present)}{hint}"
    )


def _hash(texts: Iterator[str]) -> int:
    joined = "\x1f".join(texts).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _shorten(text: str, width: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
