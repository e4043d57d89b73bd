"""Records to rows for encoder-decoder models (seq2seq) and for classifiers.

Ends are what the tokenizer's own family wants (CLS and SEP, language codes, EOS), so the tokenizer
is called as transformers call it; what spells a special token in a record stays text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from overture.data.encode import Encoder, Found, InstructEncoder, Records, Tokens, special_tokens
from overture.data.schema import ids_type
from overture.errors import ConfigError

MAX_CLASSES = 1_000


class Seq2SeqEncoder(InstructEncoder):
    """Encodes prompts as `input_ids`, responses with EOS as `labels`; each fits `max_seq_len`."""

    def __init__(self, tokens: Tokens, *common: Any) -> None:
        super().__init__(tokens, *common)
        self.columns = dict.fromkeys(("input_ids", "labels"), ids_type(tokens.vocab_size))
        self._special = set(special_tokens(tokens.tokenizer).values())
        if getattr(tokens.tokenizer, "tgt_lang", "") is None:
            fault = "translates between languages that have to be named, which cannot be done here"
            raise ConfigError(f"--tokenizer {tokens.tokenizer.name_or_path}: {fault}; save it with "
                              "its src_lang and tgt_lang set, and name that folder")  # fmt: skip

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        prompts = [self.template.prompt(record) for record in records]
        sources = self.tokens.call(prompts)["input_ids"]
        texts = [record[self.template.response] for record in records]
        targets = self.tokens.call(text_target=texts)["input_ids"]
        for record, source, target in zip(records, sources, targets, strict=True):
            if self.tokens.eos not in target[-2:]:  # a language code may follow it
                target = [*target, self.tokens.eos]
            if self.forbids(record):
                yield "special_token_in_text"
                continue
            if not set(target) - self._special:
                yield "empty_response"
                continue
            fits = len(target) <= self.max_seq_len
            source = self.fit_prompt(record, source, self.max_seq_len, notes) if fits else None
            if source is None:
                yield "too_long"
                continue
            pair = {"input_ids": source, "labels": target}
            yield [{name: np.array(ids, np.uint32) for name, ids in pair.items()}]

    def prompt_ids(self, text: str) -> list[int]:
        return self.tokens.call(text)["input_ids"]


class ClassifyEncoder(Encoder):
    """Encodes `text` and, where it is filled, `text_pair`, with the number of the label.

    `labels` are the classes in the order of their numbers, None for regression. The overflow
    `truncate_prompt` shortens the longer text.
    """

    def __init__(self, tokens: Tokens, labels: list[str] | None, *limits: Any) -> None:
        super().__init__(tokens, None, *limits)
        numbers = {name: np.int32(number) for number, name in enumerate(labels or ())}
        self._number = np.float32 if labels is None else numbers.__getitem__
        self.columns = {"input_ids": ids_type(tokens.vocab_size), "token_type_ids": "ndarray:uint8"}
        self.columns["label"] = "float32" if labels is None else "int32"

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        for record, row in zip(records, self._rows(records), strict=True):
            if self.forbids(record):
                yield "special_token_in_text"
                continue
            is_long = len(row.ids) > self.max_seq_len
            if is_long and self.overflow == "truncate_prompt":
                row = self._rows([record], truncation=True, max_length=self.max_seq_len)[0]
            if len(row.ids) > self.max_seq_len:  # perhaps even what must be there has no room
                yield "too_long"
                continue
            notes["truncated"] += is_long
            ids, types = np.array(row.ids, np.uint32), np.array(row.type_ids, np.uint8)
            label = self._number(record["label"])
            yield [{"input_ids": ids, "token_type_ids": types, "label": label}]

    def _rows(self, records: Sequence[dict[str, str]], **options: Any) -> list[Any]:
        pairs = [record.get("text_pair") for record in records]
        if any(pairs) and not all(pairs):  # a batch takes pairs or single texts, not both
            return [row for record in records for row in self._rows([record], **options)]
        texts = [record["text"] for record in records]
        others = [[self.tokens.border + other for other in pairs]] if all(pairs) else []
        return self.tokens.call(texts, *others, **options).encodings


def class_names(found: Counter[str], given: Sequence[str], regression: bool) -> list[str] | None:
    """Return the names of the classes in the order of their numbers, or None for regression.

    Without names `given`, they are those `found`: numbers in order, then names. ConfigError where
    labels are no numbers, or not among the names given, or there are too many.
    """
    numeric = {name: _number(name) for name in found}
    for option, wrong, what in (
        ("--regression", [n for n in found if regression and numeric[n] is None], "no number"),
        ("--labels", [n for n in found if given and n not in given], f"none of {', '.join(given)}"),
    ):
        if wrong:
            shown = ", ".join(f"{name!r} ({found[name]:,} rows)" for name in wrong[:5])
            more = f" and {len(wrong) - 5} more" * (len(wrong) > 5)
            raise ConfigError(f"{option}: these labels are {what}: {shown}{more}")
    if regression or given:
        return list(given) or None
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
