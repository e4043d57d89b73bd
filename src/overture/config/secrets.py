"""What counts as a secret, and texts in which none is left.

By its name: `secret` or `passw` anywhere in it, `token` at the end of a word (`hf_token`, but
`tokenizer_name`), `key` as a word or after `api`, `access`, `auth` (`monkey` is none). What is a
number, true or false, or the name of a file that is there is no secret whatever it is called
(`pad_token_id: 0`). By its place: what stands before the @ of a URL.
"""

import os.path
import re
from urllib.parse import quote, unquote

LEAST = 8  # characters; shorter ones would be found in the middle of ordinary words
_NAME = re.compile(
    r"(?i:secret|passw)|(?:(?i:token)|(?:^|[^A-Za-z]|[a-z](?=K)|(?i:api|access|auth))(?i:key))"
    r"(?i:s(?![a-z]))?(?![a-z]|(?<=[A-Z])[A-Z])"
)
_PLAIN = re.compile(r"(?i:[-+\d.e]*|true|false|null|none)")
_URL = re.compile(r"://([^\s/:@]+:[^\s\"'<>]+|[^\s/\"'<>]+)@")
_known: set[str] = set()
_anywhere = re.compile(r"(?!)")


def is_secret(name: str, value: str) -> bool:
    """Return whether a value is a secret by its name."""
    return bool(_NAME.search(name)) and not _PLAIN.fullmatch(value) and not os.path.exists(value)


def learn(name: str, value: str) -> str:
    """Remember the secrets in a value, so that `redact` knows them without a name; return it."""
    global _anywhere
    found = value.splitlines() if is_secret(name, value) else []
    found += [part.partition(":")[2] or part for part in _URL.findall(value)]
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
    return _anywhere.sub("***", _URL.sub("://***@", text))
