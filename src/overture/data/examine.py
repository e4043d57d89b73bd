"""The first reading of a dataset: every row is checked and counted before anything is written."""

import itertools
import json
import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from overture.data.conversations import conversations
from overture.data.readers import MAX_ROW_BYTES, Malformed, Record
from overture.data.schema import EVERY_ANSWER
from overture.data.sources import Place, Source
from overture.errors import ConfigError, nearest

# What other datasets call our fields, for a better hint than spelling alone can give.
ALIASES = {
    "response": ("output", "answer", "completion", "target", "chosen"),
    "instruction": ("prompt", "question", "query"), "context": ("input", "passage", "document"),
    "text": ("content", "document", "body", "sentence", "sentence1"), "text_pair": ("sentence2",),
    "label": ("class", "category", "score"), "messages": ("conversation", "dialog", "turns"),
}  # fmt: skip
_SURROGATE = re.compile(r"[\ud800-\udfff]")
MAX_DETAILS = 10_000  # reasons in words are kept for so many malformed rows, counts for all


@dataclass(frozen=True)
class Fields:
    """The fields that a task reads, and what it expects in them."""

    kinds: dict[str, str]  # ours -> `text` (must be filled), `optional`, `label` or `messages`
    learned: tuple[str, ...] = ()  # those that are the answer; the others are the prompt
    renamed: dict[str, str] = field(default_factory=dict)  # ours -> theirs, where they differ
    identifier: str = "id"  # the field that no two rows may share; '' for none
    stratify: str | None = None

    def reach(self, record: Record) -> Record:
        """Return a record with what dotted names ask for inside of a field, as translation.en."""
        for theirs in (*self.renamed.values(), self.identifier, self.stratify or ""):
            if "." in theirs and theirs not in record:
                value: Any = record
                for part in theirs.split("."):
                    if not isinstance(value, dict) or part not in value:
                        break
                    value = value[part]
                else:
                    record = record | {theirs: value}
        return record

    def read(self, record: Record, known: bool = False, whole: bool = False) -> Record | Malformed:
        """Return the record under our names, all other texts kept, or what is wrong with it.

        A row `known` to be sound is not searched again; of a `whole` one all else is kept too.
        """
        ours: Record = {}
        record = self.reach(record)
        for name, kind in self.kinds.items():
            theirs = self.renamed.get(name, name)
            value = record.get(theirs) if theirs else None  # "" is for none
            if kind == "messages":
                value = conversations(record, theirs)
                if isinstance(value, Malformed):
                    return value
            elif not (theirs and theirs in record) and not kind.startswith("optional"):
                return Malformed("missing_field", f"has no field {theirs!r}")
            elif kind.endswith("label") and isinstance(value, int | float) and math.isfinite(value):
                value = str(int(value) if value == int(value) else value)  # 1, 1.0 and true are one
            elif value is not None and not isinstance(value, str):
                kind_of = type(value).__name__
                return Malformed("wrong_type", f"field {theirs!r} holds {kind_of}, not text")
            ours[name] = value or ""
        names = {theirs: name for name, theirs in self.renamed.items()}
        kept = {names.get(k, k): v for k, v in record.items() if whole or isinstance(v, str)}
        found = kept | ours
        return found if known else _unsound(found) or found


def _unsound(record: Record) -> Malformed | None:
    for name, value in record.items():
        texts = [name, value] if isinstance(value, str) else [m["content"] for m in value]
        for text in texts:
            if len(text) > MAX_ROW_BYTES:
                return Malformed("too_large", f"field {name!r} is over {MAX_ROW_BYTES >> 20} MiB")
            if not text.isascii() and _SURROGATE.search(text):
                what = "bytes that are not UTF-8, or half of a surrogate pair, which is no text"
                return Malformed("not_text", f"field {name!r} holds {what}")
    return None


@dataclass
class Examination:
    """What was found in a source. Per row: what becomes of it, and 64-bit keys of its contents."""

    reasons: list[str] = field(default_factory=lambda: ["kept"])
    malformed: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    samples: list[Record] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)  # reason -> the first malformed row
    details: dict[int, dict[str, str]] = field(default_factory=dict)  # row -> more on its reason
    # [rows] uint16, index in `reasons`, then [rows] int64, equal where the prompt fields are, where
    # all fields that the task reads are, where the identifier is, and where the stratum is.
    fates: Any = field(default_factory=lambda: array("H"))
    prompts: Any = field(default_factory=lambda: array("q"))
    contents: Any = field(default_factory=lambda: array("q"))
    identifiers: Any = field(default_factory=lambda: array("q"))
    strata: Any = field(default_factory=lambda: array("q"))

    @property
    def rows(self) -> int:
        return len(self.fates)

    def fate(self, reason: str) -> int:
        """Return the number of a reason."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)

    def reject(self, row: int, place: Place, why: Malformed) -> int:
        """Count a malformed row and return the number of the reason."""
        self.malformed[why.reason] += 1
        self.first.setdefault(why.reason, f"{place} {why.detail}")
        if len(self.details) < MAX_DETAILS:
            self.details[row] = {"detail": why.detail}
        return self.fate(why.reason)

    def lines(self) -> list[str]:
        """Return the findings as lines for the terminal."""
        lines = [f"rows               {self.rows:,}"]
        lines += [f"malformed          {count:,} {why}" for why, count in self.malformed.items()]
        lines += [f"empty {name:<12} {count:,}" for name, count in self.empty.items()]
        for title, counts in (("categories", self.categories), ("labels", self.labels)):
            if counts and len(counts) <= 100:
                listed = ", ".join(f"{k} {v:,}" for k, v in counts.most_common(12))
                lines.append(f"{title:<18} {listed}")
        twice, asked = (repeats(keys).sum() for keys in (self.contents, self.prompts))
        lines.append(f"duplicates         {twice:,} rows, {asked:,} repeated prompts")
        for number, sample in enumerate(self.samples):
            shown = (f"  {name}: {_shorten(text)}" for name, text in sample.items())
            lines += [f"sample {number}", *shown]
        return lines


def repeats(keys: np.ndarray) -> np.ndarray:
    """Return [rows] bool, True where a key was there in an earlier row."""
    later = np.ones(len(keys), bool)
    later[np.unique(keys, return_index=True)[1]] = False
    return later


def examine(source: Source, fields: Fields, max_rejected: float) -> Examination:
    """Return what is in a source; ConfigError if nothing, or over `max_rejected` is malformed."""
    found = Examination()
    for row, (place, raw) in enumerate(source.read()):
        record = raw
        if not isinstance(raw, Malformed):
            raw = fields.reach(raw)
            found.names.update(raw.keys())  # not update(raw): that would add up the texts
            record = fields.read(raw)
        if isinstance(record, Malformed):
            found.fates.append(found.reject(row, place, record))
            # Keys that nothing shares: a broken row is nobody's duplicate.
            for keys in (found.prompts, found.contents, found.identifiers, found.strata):
                keys.append(hash((row, source.name)))
            continue
        _count(found, fields, record)
        identifier = raw.get(fields.identifier) if fields.identifier else None
        found.identifiers.append(hash((row,) if identifier in (None, "") else str(identifier)))
        found.strata.append(hash(str(raw.get(fields.stratify))))
    if not found.rows:
        raise ConfigError(f"{source.name}: holds no records")
    for name in ("fates", "prompts", "contents", "identifiers", "strata"):
        setattr(found, name, np.array(getattr(found, name)))
    repeated = repeats(found.identifiers)
    for row, (place, record) in enumerate(source.read() if repeated.any() else ()):
        if repeated[row]:
            identifier = fields.reach(record)[fields.identifier]
            what = f"repeats {fields.identifier} {identifier!r}"
            found.fates[row] = found.reject(row, place, Malformed("duplicate_id", what))
    if sum(found.malformed.values()) / found.rows > max_rejected:
        raise ConfigError(_too_many(source, found, fields, max_rejected))
    return found


def _count(found: Examination, fields: Fields, record: Record) -> None:
    shown = list(dict.fromkeys([*fields.kinds, *(record.keys() & {"category"})]))
    unfilled = [n for n in shown if not record[n] or str(record[n]).isspace()]
    found.empty.update(dict.fromkeys(shown, 0))
    found.empty.update(unfilled)
    empty = next((n for n in unfilled if fields.kinds.get(n) in ("text", "label")), None)
    if "category" in record:
        found.categories[record["category"]] += 1
    if "label" in fields.kinds and not empty:
        found.labels[record["label"]] += 1
    if len(found.samples) < 3:
        found.samples.append({name: record[name] for name in shown})
    given = (_opening(record[n]) for n in fields.kinds if n not in fields.learned)
    found.prompts.append(hash(tuple(given)))
    found.contents.append(hash(tuple(str(record[n]) for n in fields.kinds)))
    found.fates.append(found.fate(f"empty_{empty}") if empty else 0)


def _opening(value: Any) -> str:
    """Return a text, or what a conversation has before its first answer."""
    if isinstance(value, str):
        return value
    return json.dumps([*itertools.takewhile(lambda m: m["role"] != "assistant", value)])


def _too_many(source: Source, found: Examination, fields: Fields, limit: float) -> str:
    counts, rows, hint = found.malformed, found.rows, ""
    reasons = (f"{counts[why]:,} {why}, first: {where}" for why, where in found.first.items())
    if "missing_field" in found.first:
        names = [n for n in found.names if found.names[n] > rows // 2 and n != EVERY_ANSWER]
        needed = [n for n, kind in fields.kinds.items() if not kind.startswith("optional")]
        name = next((n for n in needed if fields.renamed.get(n, n) not in names), "")
        alias = next((a for a in ALIASES.get(name, ()) if a in names), None)
        guess = f' (did you mean "--field {name}={alias}"?)' if alias else nearest(name, names)
        hint = f"; the fields there are: {', '.join(map(str, names))}{guess}"
    elif "duplicate_id" in found.first:
        hint = "; if that field is no identifier, say --field id=OTHER, or --field id= for none"
    said = f"{sum(counts.values()):,} of {rows:,} rows are malformed, over --max_rejected {limit:g}"
    return f"{source.name}: {said} ({'; '.join(reasons)}){hint}"


def _shorten(value: Any, width: int = 90) -> str:
    text = value if isinstance(value, str) else " | ".join(m["content"] for m in value)
    flat = " ".join(text[: 4 * width].split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def dropped(counts: dict[str, int]) -> str:
    """Return ` (dropped: 3 too_long, ...)`, or nothing if nothing was."""
    why = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    return f" (dropped: {why})" if why else ""
