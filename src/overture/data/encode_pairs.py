"""Records to rows for encoder-decoder models (seq2seq) and for classifiers.

Ends are what the tokenizer's own family wants (CLS and SEP, language codes, EOS), so the tokenizer
is called as transformers call it; what spells a special token in a record stays text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from overture.data.encode import Encoded, InstructEncoder, Tokens
from overture.data.schema import ids_type
from overture.errors import ConfigError

MAX_CLASSES = 1_000


class Seq2SeqEncoder(InstructEncoder):
    """Encodes the template's prompt as `input_ids` and its response as `labels`, EOS learned.

    Takes what InstructEncoder takes; `max_seq_len` holds for source and target each.
    """

    def __init__(self, tokens: Tokens, *common: Any) -> None:
        super().__init__(tokens, *common)
        self.columns = dict.fromkeys(("input_ids", "labels"), ids_type(tokens.vocab_size))
        self._special = set(tokens.tokenizer.all_special_ids)

    def encode(self, records: Sequence[dict[str, str]]) -> Encoded:
        """Return the pairs of some records, in order."""
        out = Encoded([], [], Counter())
        prompts = [self.template.prompt(record) for record in records]
        sources = self.tokens.call(prompts)["input_ids"]
        texts = [record[self.template.response] for record in records]
        targets = self.tokens.call(text_target=texts)["input_ids"]
        for number, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if self.tokens.eos not in target[-2:]:  # a language code may follow it
                target = [*target, self.tokens.eos]
            if not set(target) - self._special:
                out.drops.append((number, "empty_response"))
                continue
            if len(target) > self.max_seq_len:
                out.drops.append((number, "too_long"))
                continue
            if len(source) > self.max_seq_len:
                source = None
                if self.overflow == "truncate_prompt":
                    source = self.tokens.cut_prompt(
                        self.template, records[number], self.max_seq_len, self._source
                    )
                if source is None:
                    out.drops.append((number, "too_long"))
                    continue
                out.notes["truncated"] += 1
            pair = {"input_ids": source, "labels": target}
            out.documents.append({name: np.array(ids, np.uint32) for name, ids in pair.items()})
        return out

    def _source(self, text: str) -> list[int]:
        return self.tokens.call(text)["input_ids"]


class ClassifyEncoder:
    """Encodes `text` and, where it is filled, `text_pair`, with the number of the label.

    Args:
        tokens: the tokenizer.
        labels: names of the classes in the order of their numbers; None for regression.
        max_seq_len: the longest row.
        overflow: `truncate_prompt` shortens the longer text; `drop`.
    """

    def __init__(
        self, tokens: Tokens, labels: list[str] | None, max_seq_len: int, overflow: str
    ) -> None:
        self.tokens, self.max_seq_len, self.overflow = tokens, max_seq_len, overflow
        self.numbers = None if labels is None else {name: i for i, name in enumerate(labels)}
        self.columns = {
            "input_ids": ids_type(tokens.vocab_size),
            "token_type_ids": "ndarray:uint8",
            "label": "float32" if labels is None else "int32",
        }

    def encode(self, records: Sequence[dict[str, str]]) -> Encoded:
        """Return the rows of some records, in order."""
        out = Encoded([], [], Counter())
        for number, (record, row) in enumerate(zip(records, self._rows(records), strict=True)):
            if len(row.ids) > self.max_seq_len:
                if self.overflow != "truncate_prompt":
                    out.drops.append((number, "too_long"))
                    continue
                row = self._rows([record], truncation=True, max_length=self.max_seq_len)[0]
                if len(row.ids) > self.max_seq_len:  # no room even for what must be there
                    out.drops.append((number, "too_long"))
                    continue
                out.notes["truncated"] += 1
            label = record["label"]
            out.documents.append(
                {
                    "input_ids": np.array(row.ids, np.uint32),
                    "token_type_ids": np.array(row.type_ids, np.uint8),
                    "label": np.float32(label)
                    if self.numbers is None
                    else np.int32(self.numbers[label]),
                }
            )
        return out

    def _rows(self, records: Sequence[dict[str, str]], **options: Any) -> list[Any]:
        pairs = [record.get("text_pair") for record in records]
        if any(pairs) and not all(pairs):  # a batch takes pairs or single texts, not both
            return [row for record in records for row in self._rows([record], **options)]
        texts = [record["text"] for record in records]
        return self.tokens.call(texts, pairs if all(pairs) else None, **options).encodings


def class_names(found: Counter[str], given: Sequence[str], regression: bool) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, or None for regression.

    Args:
        found: how often each label is there.
        given: the names that the user gave; empty: those found, numbers in order, then names.
        regression: labels are numbers.

    Raises:
        ConfigError: a label is no number, or not among the names given, or there are too many.
    """
    numeric = {name: _number(name) for name in found}
    if regression:
        bad = next((name for name, value in numeric.items() if value is None), None)
        if bad is not None:
            raise ConfigError(f"--regression: the label {bad!r} ({found[bad]:,} rows) is no number")
        return None
    if given:
        bad = next((name for name in found if name not in given), None)
        if bad is not None:
            raise ConfigError(
                f"--labels {' '.join(given)}: the label {bad!r} ({found[bad]:,} rows) is not there"
            )
        return list(given)
    if any(value is not None and value % 1 for value in numeric.values()):
        raise ConfigError("the labels are numbers with fractions: say --regression, or --labels")
    if len(found) > MAX_CLASSES:
        raise ConfigError(f"{len(found):,} different labels: name the classes with --labels")
    return sorted(found, key=lambda n: (numeric[n] is None, numeric[n] or 0, n))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None
