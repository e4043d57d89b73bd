"""The ids of a text from the ids of its words: exact, and several times the library's speed.

A byte-level BPE tokenizer (Radford et al. 2019) first cuts a text into words by a regular
expression, then encodes each word by itself. Words repeat, so their ids are remembered. The library
still encodes every new word; only the cutting is done here, by Python's own expressions, and only
in texts of characters on whose classes both engines agree. Everything else is left to the library.
"""

import json
import re
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers.models import BPE
from tokenizers.normalizers import NFC

MAX_WORDS = 200_000  # about 40 MB
# Latin, phonetic, Greek and Cyrillic letters, punctuation, currencies, arrows and mathematics. Left
# out is what Python counts among letters and the others among numbers (superscripts, fractions),
# what NFC would change, and rare white space.
SAFE = re.compile(
    r"[\t\n\r\x20-\x7e\xa0-\xb1\xb4-\xb8\xba\xbb\xbf-\u02ff\u0370-\u0373\u0376-\u037d"
    r"\u037f-\u0386\u0388-\u0482\u048a-\u052f\u2002-\u2027\u202f-\u205f\u20a0-\u20c0\u2122"
    r"\u2190-\u2328\u232b-\u23ff\u2500-\u2775\u2794-\u2adb\u2add-\u2bff]*"
)
# The expressions of known tokenizers, and the same in Python's dialect: there, LL stands for the
# letters of SAFE, as inside of brackets.
_LINES = r" ?[^\sLL0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nLL0-9]?[LL]+|"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r" ?[LL]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sLL0-9]+|\s+(?!\S)|\s+"
_KNOWN = {
    _SPLIT % "{1,3}": rf"{_WORDS}[0-9]{{1,3}}|{_LINES}",  # Llama 3
    _SPLIT % "": rf"{_WORDS}[0-9]|{_LINES}",  # Qwen 2
}


@cache
def _letters() -> str:
    """Return the letters of SAFE as ranges, which match much faster than classes like `\\w` do."""
    letters = [c for c in map(chr, range(0x530)) if c.isalpha() and SAFE.fullmatch(c)]
    runs = groupby(enumerate(letters), lambda pair: ord(pair[1]) - pair[0])
    ranges = [[letter for _, letter in run] for _, run in runs]
    return "".join(f"{run[0]}-{run[-1]}" for run in ranges)


class WordCache:
    """Encodes texts by the words into which `pattern` cuts them as the backend does."""

    def __init__(self, backend: Any, pattern: str) -> None:
        self._backend = backend
        self._find = re.compile(pattern.replace("LL", _letters())).findall
        self._known: dict[str, bytes] = {}  # word -> its ids as uint32, ready to be joined

    @classmethod
    def of(cls, backend: Any) -> "WordCache | None":
        """Return the cache for a tokenizer, or None if words are not all that it is made of."""
        is_plain = backend.normalizer is None or isinstance(backend.normalizer, NFC)  # SAFE is NFC
        is_bpe = isinstance(backend.model, BPE) and not backend.model.dropout
        only_special = all(token.special for token in backend.get_added_tokens_decoder().values())
        if not (is_plain and is_bpe and only_special and backend.encode_special_tokens):
            return None
        cutter = backend.pre_tokenizer
        pattern = _pattern(json.loads(cutter.__getstate__())) if cutter is not None else None
        return None if pattern is None else cls(backend, pattern)

    def ids(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of some texts, each [tokens] uint32; all are of SAFE characters."""
        words = [self._find(text) for text in texts]
        if len(self._known) > MAX_WORDS:
            self._known.clear()
        self._learn(list(set().union(*words).difference(self._known)))
        get = self._known.__getitem__
        return [np.frombuffer(b"".join(map(get, found)), np.uint32) for found in words]

    def _learn(self, words: list[str]) -> None:
        # Many words in one encoding: most of the library's time for a word goes into wrapping it.
        chunks = [words[i : i + 500] for i in range(0, len(words), 500)]
        options = {"is_pretokenized": True, "add_special_tokens": False}
        encodings = self._backend.encode_batch(chunks, **options)
        for chunk, encoding in zip(chunks, encodings, strict=True):
            ids = np.array(encoding.ids, np.uint32)
            ends = np.searchsorted(encoding.word_ids, np.arange(len(chunk)), side="right").tolist()
            for word, start, end in zip(chunk, [0, *ends[:-1]], ends, strict=True):
                self._known[word] = ids[start:end].tobytes()


def _pattern(cutter: dict[str, Any]) -> str | None:
    """Return the expression, in Python's dialect, of a pre-tokenizer as its JSON describes it."""
    match cutter:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return _KNOWN.get(pattern.get("Regex"))
    return None
