"""Records to token documents: ids with a loss mask, the prompt masked by position.

Prompt and response are tokenised apart, so the border between them is exact and generation, which
sees the prompt alone, meets the same ids as training did. A response is never cut; EOS always
follows it and is learned. What stands in a record is text: a `</s>` in it does not become EOS.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from overture.data.prompts import PromptTemplate
from overture.data.schema import ANSWERS, EVERY_ANSWER, ids_type
from overture.data.word_cache import SAFE, WordCache
from overture.errors import ConfigError

Document = dict[str, Any]  # column -> [tokens] array, or a single value
Records = Sequence[dict[str, Any]]
Found = Iterator[list[Document] | str]  # a record's documents, or the reason that it has none


class Encoded(NamedTuple):
    """The documents of some records, the records that gave none, and what happened to others."""

    documents: list[Document]
    drops: list[tuple[int, str]]  # (number of the record in its batch, reason)
    notes: Counter[str]  # truncated, split


class Tokens:
    """A Hugging Face tokenizer as the encoders need it; ConfigError if it has no EOS.

    With `specials`, what spells a special token in a text is one, rather than plain text.
    """

    def __init__(self, tokenizer: Any, specials: bool = False) -> None:
        name = tokenizer.name_or_path
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # BERT's kind has CLS and SEP
        self.eos = ends[0] if ends[0] is not None else ends[1]
        if self.eos is None:
            fault = f"{name}: the tokenizer has no EOS token, so a model could not learn to stop"
            raise ConfigError(f"{fault}; set eos_token in its tokenizer_config.json")
        self.tokenizer, self.specials = tokenizer, specials
        # Asking the tokenizer itself is the only way that holds for every family.
        first = tokenizer("a")["input_ids"][0]
        has_bos = first in (tokenizer.bos_token_id, tokenizer.cls_token_id)
        self.bos = np.array([first] if has_bos else [], np.uint32)
        marks = special_tokens(tokenizer)
        # The longest first: one may begin as another does.
        names = sorted(filter(None, marks), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, names)))
        self.vocab_size = len(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not specials
        self._words = WordCache.of(self.backend)
        # SentencePiece's unigram models take what spells one for it, whatever they are told.
        texts = {f"a {name} b": number for name, number in marks.items()}
        found = zip(texts.values(), self.backend.encode_batch(list(texts)), strict=True)
        ends = {*self.backend.encode("a b").ids}
        self._leaks = any(number in one.ids and number not in ends for number, one in found)

    def __reduce__(self) -> Any:
        """Let another process make it anew: pickled, the backend forgets what it was told."""
        return Tokens, (self.tokenizer, self.specials)

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of some texts, each [tokens] uint32, nothing added."""
        cached = [self._words is not None and SAFE.fullmatch(text) for text in texts]
        others = [text for text, safe in zip(texts, cached, strict=True) if not safe]
        found = self.backend.encode_batch_fast(others, add_special_tokens=False)
        rest = (np.array(one.ids, np.uint32) for one in found)
        if len(others) == len(texts):
            return list(rest)
        safe_ids = iter(self._words.ids([t for t, safe in zip(texts, cached, strict=True) if safe]))
        return [next(safe_ids) if safe else next(rest) for safe in cached]

    def call(self, *texts: Any, **options: Any) -> Any:
        """Return what the tokenizer makes of texts with its own ends, as transformers has it."""
        return self.tokenizer(*texts, split_special_tokens=not self.specials, **options)

    @cached_property
    def border(self) -> str:
        """What stands between two texts of a pair, nothing where the tokenizer puts in its own.

        BERT's kind does; others would run two texts together as if they were one.
        """
        owners = self.call(["a"], ["b"]).encodings[0].sequence_ids
        if None in owners[owners.index(0) : owners.index(1)]:
            return ""
        plain, broken = map(len, self.ids(["b", "\nb"]))
        return "\n" if broken > plain else " | "  # some take a new line for a space

    def forbids(self, texts: Iterable[str]) -> bool:
        """Return whether one of the texts spells a special token where those count as such."""
        counts = self._leaks or not self.backend.encode_special_tokens
        return counts and any(map(self.special.search, texts))

    def marker(self, text: str) -> np.ndarray:
        """Return the ids of a text in which special tokens count as such, [tokens] uint32."""
        plain, self.backend.encode_special_tokens = self.backend.encode_special_tokens, False
        ids = self.backend.encode(text, add_special_tokens=False).ids
        self.backend.encode_special_tokens = plain
        return np.array(ids, np.uint32)


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens of a tokenizer with their ids, also those that have no role in it,
    as Llama 3's headers.
    """
    marks = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    others = tokenizer.added_tokens_decoder.items()
    return marks | {token.content: number for number, token in others if token.special}


def missing_bos(bos: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the BOS that a document is to begin with, nothing if a template wrote it."""
    return bos[:0] if ids[: len(bos)].tolist() == bos.tolist() else bos


def token_document(parts: Sequence[tuple[np.ndarray, bool]]) -> Document:
    """Return the columns of a document made of (ids, whether they are learned) parts."""
    learned = np.array([learned for _, learned in parts], np.uint8)
    ids = [ids for ids, _ in parts]
    return {"input_ids": np.concatenate(ids), "loss_mask": np.repeat(learned, [*map(len, ids)])}


class Encoder:
    """Encodes records; `columns` are the MDS columns of the documents.

    Each task has its own `documents`. The `template` says what the model sees and learns. Without
    `max_seq_len` they stay whole, for concatenation; `overflow` is one of `conversion.OVERFLOWS`.
    """

    def __init__(
        self, tokens: Tokens, template: Any, max_seq_len: int | None, overflow: str
    ) -> None:
        self.tokens, self.template = tokens, template
        self.max_seq_len, self.overflow = max_seq_len, overflow
        has_fields = isinstance(template, PromptTemplate)
        self._read = (*template.fields(),) if has_fields else ("text", "text_pair")
        others = {"loss_mask": "ndarray:uint8", "document_ends": "ndarray:uint32"}
        self.columns = {"input_ids": ids_type(tokens.vocab_size), **others}

    def encode(self, records: Records) -> Encoded:
        """Return the documents of some records, in order."""
        out = Encoded([], [], Counter())
        # Tokenizers take no empty batch, which is left where all rows are held out.
        every = self.documents(records, out.notes) if records else ()
        for number, found in enumerate(every):
            if isinstance(found, str):
                out.drops.append((number, found))
            else:
                out.documents.extend(found)
        return out

    def forbids(self, record: dict[str, str]) -> bool:
        """Return whether a special token is spelled where it would be taken for one."""
        return self.tokens.forbids(record.get(name) or "" for name in self._read)


class TextEncoder(Encoder):
    """Encodes plain text, all learned but its first token, between `bos_text` and `eos_text`."""

    def __init__(
        self, *common: Any, bos_text: str | None = None, eos_text: str | None = None
    ) -> None:
        super().__init__(*common)
        tokens = self.tokens
        self.bos = tokens.bos if bos_text is None else tokens.marker(bos_text)
        self.eos = np.uint32([tokens.eos]) if eos_text is None else tokens.marker(eos_text)
        ends = len(self.bos) + len(self.eos)
        if self.overflow == "truncate" and self.max_seq_len and ends > self.max_seq_len:
            fault = f"--bos_text and --eos_text alone are {ends} tokens: raise --max_seq_len"
            raise ConfigError(f"{fault} ({self.max_seq_len})")

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        texts = self.tokens.ids([self.template.prompt(record) for record in records])
        longest = self.max_seq_len or 2**62
        for record, ids in zip(records, texts, strict=True):
            whole = np.concatenate([missing_bos(self.bos, ids), ids, self.eos])
            if self.forbids(record):
                yield "special_token_in_text"
            elif not len(ids) or len(whole) < 2:
                yield "empty"
            elif len(whole) > longest and self.overflow == "truncate":
                notes["truncated"] += 1
                room = longest - len(whole) + len(ids)
                whole = np.concatenate([missing_bos(self.bos, ids), ids[:room], self.eos])
                yield [token_document([(whole[:1], False), (whole[1:], True)])]
            elif len(whole) > longest and self.overflow != "split":
                yield "too_long"
            else:
                notes["split"] += len(whole) > longest
                ends = list(range(longest, len(whole), longest))
                if ends and len(whole) - ends[-1] == 1:
                    ends[-1] -= 1  # one token alone teaches none
                parts = np.split(whole, ends)
                yield [token_document([(part[:1], False), (part[1:], True)]) for part in parts]


class InstructEncoder(Encoder):
    """Encodes a prompt, which is masked, and the response with its EOS, which is learned.

    Where `columns` have the answers, a document brings all of them.
    """

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        count = len(records)
        prompts = [self.template.prompt(record) for record in records]
        # One call for both: the tokenizer's threads are kept busy to the end.
        ids = self.tokens.ids(prompts + [record[self.template.response] for record in records])
        eos = np.uint32([self.tokens.eos])
        for record, prompt, answer in zip(records, ids[:count], ids[count:], strict=True):
            bos = missing_bos(self.tokens.bos, prompt)
            room = self.max_seq_len - len(bos) - len(answer) - len(eos)
            if self.forbids(record):
                yield "special_token_in_text"
            elif not len(answer):  # the tokenizer may drop what it takes for no text
                yield "empty_response"
            elif (prompt := self.fit_prompt(record, prompt, room, notes)) is None:
                yield "too_long"
            elif not len(bos) and not len(prompt):
                yield "empty_prompt"
            else:
                parts = [(bos, False), (prompt, False), (answer, True), (eos, True)]
                document = token_document(parts)
                if ANSWERS in self.columns:
                    document[ANSWERS] = json.loads(record.get(EVERY_ANSWER, "[]"))
                yield [document]

    def fit_prompt(
        self, record: dict[str, str], ids: Sequence[int], room: int, notes: Counter[str]
    ) -> Sequence[int] | None:
        """Return the ids of a prompt that fits in `room`, its `cut` field shortened, or None.

        The field ends at a token border, never within a character; it may vanish if it is optional.
        """
        if len(ids) <= room:
            return ids
        name = self.template.cut
        text = record.get(name, "") if self.overflow == "truncate_prompt" else ""
        while text.strip() and len(ids) > room:  # what is cut may tokenise otherwise at its end
            pieces = self.tokens.backend.encode(text, add_special_tokens=False).offsets
            keep = len(pieces) - (len(ids) - room)
            # Pieces of one character share its end, hence the second bound: it always shortens.
            text = text[: min(pieces[keep - 1][1], len(text) - 1) if keep > 0 else 0].rstrip()
            ids = self.prompt_ids(self.template.prompt({**record, name: text}))
        if len(ids) > room or not (text or not self.template.fields()[name]):
            return None
        notes["truncated"] += 1
        return ids

    def prompt_ids(self, text: str) -> Sequence[int]:
        return self.tokens.ids([text])[0]


class RawTextEncoder(Encoder):
    """Keeps texts as they are, for models whose tokenizer runs with the loader."""

    def __init__(self, template: PromptTemplate) -> None:
        self.template, self.columns = template, {"text": "str"}

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        texts = (self.template.prompt(record) for record in records)
        yield from ([{"text": text}] if text.strip() else "empty" for text in texts)
