"""Records to token documents: ids with a loss mask, the prompt masked by position.

Prompt and response are tokenised apart, so the border between them is exact and generation, which
sees the prompt alone, meets the same ids as training did. A response is never cut; EOS always
follows it and is learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from overture.data.prompts import PromptTemplate
from overture.errors import ConfigError


class Document(NamedTuple):
    """One document: `input_ids` [tokens] uint32 and `loss_mask` [tokens] uint8."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


class RecordEncoder:
    """Encodes batches of records; counts what it drops, cuts and splits in `counts`.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an EOS token.
        template: what the model sees of a record. Without a response field all text is learned.
        max_seq_len: the longest document, in tokens.
        overflow: `truncate_prompt` shortens the template's `cut` field; `drop` does not.

    Raises:
        ConfigError: the tokenizer is not a fast one or has no EOS token.
    """

    DROPS = ("too_long", "empty", "empty_prompt")  # the counts that stand for a record lost

    def __init__(
        self, tokenizer: Any, template: PromptTemplate, max_seq_len: int, overflow: str
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"{tokenizer.name_or_path}: only fast tokenizers are supported")
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no EOS token, so a model could "
                "not learn to stop; set eos_token in its tokenizer_config.json"
            )
        self.template = template
        self.max_seq_len = max_seq_len
        self.overflow = overflow
        self.eos = tokenizer.eos_token_id
        # Asking the tokenizer itself is the only way that holds for every family.
        first = tokenizer("a")["input_ids"][0]
        self.bos = [first] if first == tokenizer.bos_token_id else []
        self.counts: Counter[str] = Counter()
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, records: Sequence[dict[str, str]]) -> list[Document]:
        """Return the documents of some records, in order; dropped records yield none."""
        prompts = self._ids([self.template.prompt(record) for record in records])
        if self.template.response is None:
            return [part for ids in prompts for part in self._text(ids)]
        responses = self._ids([record[self.template.response] for record in records])
        found = map(self._answer, records, prompts, responses)
        return [document for document in found if document is not None]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]

    def _text(self, ids: list[int]) -> list[Document]:
        """Return a plain text as one document, or as several of at most max_seq_len tokens."""
        if not ids:
            self.counts["empty"] += 1
            return []
        whole = np.array([*self.bos, *ids, self.eos], np.uint32)
        parts = [whole[i : i + self.max_seq_len] for i in range(0, len(whole), self.max_seq_len)]
        self.counts["split"] += len(parts) > 1
        # The first token of a document has nothing before it that could predict it.
        masks = [np.ones(len(part), np.uint8) for part in parts]
        for mask in masks:
            mask[0] = 0
        return [Document(*pair) for pair in zip(parts, masks, strict=True) if len(pair[0]) > 1]

    def _answer(
        self, record: dict[str, str], prompt: list[int], response: list[int]
    ) -> Document | None:
        learned = [*response, self.eos]
        room = self.max_seq_len - len(learned) - len(self.bos)
        if len(prompt) > room:
            cut = self.overflow == "truncate_prompt"
            prompt = self._cut_prompt(record, prompt, room) if cut else None
            if prompt is None:
                self.counts["too_long"] += 1
                return None
            self.counts["truncated"] += 1
        prompt = [*self.bos, *prompt]
        if not prompt:
            self.counts["empty_prompt"] += 1
            return None
        mask = np.zeros(len(prompt) + len(learned), np.uint8)
        mask[len(prompt) :] = 1
        return Document(np.array(prompt + learned, np.uint32), mask)

    def _cut_prompt(self, record: dict[str, str], ids: list[int], room: int) -> list[int] | None:
        """Return prompt ids that fit in `room`, the cut field shortened at a token border."""
        name = self.template.cut
        text = record.get(name, "") if name else ""
        while text.strip() and len(ids) > room:
            pieces = self._backend.encode(text, add_special_tokens=False).offsets
            keep = len(pieces) - (len(ids) - room)
            # Cut text may tokenise differently at its new end, hence the loop; pieces of one
            # character share its end, hence the second bound, without which it might not end.
            end = min(pieces[keep - 1][1], len(text) - 1) if keep > 0 else 0
            text = text[:end].rstrip()
            ids = self._ids([self.template.prompt({**record, name: text})])[0]
        return ids if len(ids) <= room else None
