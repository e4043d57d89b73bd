"""What counts as a secret, and texts in which none is left.

By its name: `secret` or `passw` anywhere in it, `token` (but `tokenizer_name`), `key` at the end of
a word (`SSHKEY`, but `keyword`, and `monkey` is none). What is true or false, the name of a file
that is there, or a number, but for a password, is no secret whatever it is called (`pad_token_id:
0`). By its place: what stands before the @ of a URL, and what is so named behind its question mark.
"""

import os.path
import re
from urllib.parse import quote, unquote

LEAST = 8  # characters; shorter ones would be found in the middle of ordinary words
_ANIMALS = "".join(f"(?<!(?i:{begin}))" for begin in ("mon", "tur", "don", "hoc", "joc", "whis"))
_NAME = re.compile(
    r"(?i:secret|passw|token(?!i[sz]))"
    rf"|{_ANIMALS}(?i:key)(?i:s(?![a-z]))?(?![a-z]|(?<=[A-Z])[A-Z])"
)
_PASSWORD = re.compile(r"(?i:secret|passw)")
_WORD, _NUMBER = re.compile(r"(?i:true|false|null|none)?"), re.compile(r"(?i:[-+\d.e]*)")
_QUERY = re.compile(
    r"([?&][\w.-]*(?i:token|signature|sig|secret|passw\w*|key|credential)[\w.-]*=)([^\s&\"'<>]+)"
)
_URL = re.compile(r"://([^\s/:@]+:[^\s\"'<>]+|[^\s/\"'<>]+)@")
_known: set[str] = set()
_anywhere = re.compile(r"(?!)")


def is_secret(name: str, value: str) -> bool:
    """Return whether a value is a secret by its name."""
    if not _NAME.search(name) or _WORD.fullmatch(value) or os.path.exists(value):
        return False
    return bool(_PASSWORD.search(name)) or not _NUMBER.fullmatch(value)


def learn(name: str, value: str) -> str:
    """Remember the secrets in a value, so that `redact` knows them without a name; return it."""
    global _anywhere
    found = value.splitlines() if is_secret(name, value) else []
    found += [part.partition(":")[2] or part for part in _URL.findall(value)]
    found += [part for _, part in _QUERY.findall(value)]
    found = [form for text in found for form in (text, quote(text, ""), unquote(text))]
    if new := {text for text in found if len(text) >= LEAST} - _known:
        _known.update(new)
        longest_first = sorted(_known, key=len, reverse=True)
        _anywhere = re.compile("|".join(map(re.escape, longest_first)))
    return value


def redact(text: str, name: str = "") -> str:
    """Return a text with `***` for what is a secret by its `name`, by its place, or is known."""
    if is_secret(name, text):
        return "***"
    text = _QUERY.sub(r"\1***", _URL.sub("://***@", text))
    return _anywhere.sub("***", text)
