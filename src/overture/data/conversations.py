"""Conversations of every common shape to lists of `{"role", "content"}`, checked turn by turn.

Three shapes are known: `messages` (role, content), `conversations` (from, value) and the trees of
OpenAssistant (Köpf et al. 2023), in which each message names its parent: a thread is the way from a
root to a leaf, and siblings carry a rank, 0 being the best.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from overture.data.readers import Malformed
from overture.data.sources import Place, Source
from overture.errors import ConfigError

_ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
_TREE = {"message_id", "parent_id", "role", "text"}


def conversations(record: dict[str, Any], name: str) -> list[dict[str, str]] | Malformed:
    """Return the messages of a record: of field `name`, or of `conversations` if it has that.

    A conversation begins with an optional system message; then user and assistant take turns, and
    the assistant speaks last (what comes after its last turn is left out).
    """
    found = record.get(name, record.get("conversations") if name == "messages" else None)
    if not isinstance(found, list):
        return Malformed("missing_field", f"has no list of messages under {name!r}")
    messages = []
    for turn in found:
        if not isinstance(turn, dict):
            return Malformed("wrong_type", "holds a message that is no object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if str(role) not in _ROLES or not isinstance(content, str):
            return Malformed("wrong_type", f"holds a message without role or text ({role!r})")
        messages.append({"role": _ROLES[str(role)], "content": content})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    turns = [m["role"] for m in messages if m["role"] != "system"]
    alternate = ["user", "assistant"] * (len(turns) // 2)
    if turns != alternate or not turns or "system" in [m["role"] for m in messages[1:]]:
        return Malformed("wrong_turns", "user and assistant do not take turns")
    return messages


def as_threads(source: Source, which: str) -> Source:
    """Return conversation trees as threads, `all` or the `best`-ranked; other sources as is."""
    if not set(source.first()) >= _TREE:
        if which != "all":
            raise ConfigError(f"--threads {which}: {source.name} holds no conversation trees")
        return source
    return replace(source, read=lambda: _threads(source, which))


def _threads(source: Source, which: str) -> Iterator[tuple[Place, Any]]:
    rows: dict[str, tuple[Place, dict[str, Any]]] = {}
    children: dict[str | None, list[str]] = defaultdict(list)
    for place, record in source.read():
        if isinstance(record, Malformed):
            yield place, record
        elif not isinstance(record.get("message_id"), str):
            yield place, Malformed("missing_field", "has no message_id")
        elif record["message_id"] in rows:
            yield place, Malformed("duplicate_id", f"repeats {record['message_id']}")
        else:
            rows[record["message_id"]] = (place, record)
            parent = record.get("parent_id")
            children[None if parent is None else str(parent)].append(record["message_id"])
    # A message whose parent is not here (another language, say) has lost its beginning, and so
    # have those that follow it.
    reached, ahead = set(), list(children[None])
    while ahead:
        reached.add(ahead[-1])
        ahead += children.get(ahead.pop(), ())
    for name, (place, record) in rows.items():
        if name not in reached:
            yield place, Malformed("orphan", f"its parent {record['parent_id']} is not there")
    ways = [[root] for root in reversed(children[None])]
    while ways:
        way = ways.pop()
        # Ranks may be missing; sorting is stable, so the order of the file decides then.
        rank = {m: rows[m][1].get("rank") for m in children.get(way[-1], ())}
        replies = sorted(rank, key=lambda m: rank[m] if isinstance(rank[m], int | float) else 1e9)
        if not replies:
            found = [rows[m][1] for m in way]
            messages = [{"role": m.get("role"), "content": m.get("text")} for m in found]
            yield rows[way[-1]][0], {"messages": messages}
        ways += [[*way, reply] for reply in reversed(replies[:1] if which == "best" else replies)]
