"""Best-fit packing: documents of unequal length into rows of at most `capacity` tokens.

Best-fit decreasing: the longest document first, each into the fullest row that still has room. It
never needs more than 11/9 OPT + 1 rows (Johnson 1974) and in practice fills text corpora to well
over 98 %, at the price of holding a window of documents in memory. Documents are never cut.

Concatenation, for pretraining: documents end to end, cut wherever a row is full.
"""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return rows of document indices, each row's lengths summing to at most `capacity`.

    Rows come in the order of their first document, and so do the documents within a row: packing
    changes who sits together, not the drift of the corpus. Raises ValueError: a document is empty
    or longer than `capacity`.
    """
    if lengths and (min(lengths) < 1 or max(lengths) > capacity):
        raise ValueError(f"document lengths must be within 1 and {capacity}")
    rows: list[list[int]] = []
    # Rows by the room left in them. Bit r of `rooms` says that by_room[r] is not empty, so the
    # fullest row with room is the lowest set bit at or above the length: no search over rows.
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = rooms >> lengths[index]
        if fitting:
            room = lengths[index] + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - lengths[index]
        by_room[left].append(row)
        rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


def concatenate(
    documents: Sequence[np.ndarray], carry: Sequence[int], length: int, wrap: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return rows, [rows, length] uint32, ids left for next time, [rest] uint32, and how many lost.

    Of the ids of `documents`, each [tokens] uint32, after those that an earlier call left. What
    does not fit a row begins the next one with `wrap`; else it is lost, and every row begins with
    a document.
    """
    rest = np.array(carry, np.uint32)
    if wrap:
        whole = np.concatenate([rest, *documents])
        rows = len(whole) // length
        return whole[: rows * length].reshape(rows, length), whole[rows * length :], 0
    filled, lost, buffer = [], 0, [rest]
    for document in documents:
        buffer.append(document)
        size = sum(map(len, buffer))
        if size >= length:
            filled.append(np.concatenate(buffer)[:length])
            lost += size - length
            buffer = []
    rest = np.concatenate([np.empty(0, np.uint32), *buffer])
    return np.array(filled, np.uint32).reshape(-1, length), rest, lost
