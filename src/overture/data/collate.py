"""Rows of shards to batches, of one fixed shape or of few."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Kernels are built once for each shape, hence these.
LENGTHS = 8  # that a batch of a classifier may have
STEP = 4  # lengths of pairs are multiples of it


class TokenCollator:
    """Pads rows to `max_seq_len`, so that every batch has the same shape.

    Returns a dict of
        input_ids     [rows, tokens] int64
        labels        [rows, tokens] int64, the token's own id where it is learned, else -100
        position_ids  [rows, tokens] int64, restarting at each document (and at the padding)
        document_starts [rows, tokens] int32, where in its row the document of each token begins, -1
                      for padding: what keeps documents apart; there is no attention mask
        sample_ids    [rows] int64, numbers of the rows in their dataset
    and, as lists of ints, which stay with the host so that nothing has to wait for a GPU to count,
        num_tokens    of each row, tokens that are not padding
        num_labels    of each row, tokens that are learned
        num_spans     of each row, documents, and one more for the padding if there is any
        longest       of each row, tokens of the longest of these
    """

    def __init__(self, max_seq_len: int, pad_token_id: int) -> None:
        self.max_seq_len, self.pad_token_id = max_seq_len, pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        shape = (len(rows), self.max_seq_len)
        input_ids = np.full(shape, self.pad_token_id, np.int64)
        labels = np.full(shape, -100, np.int64)
        position_ids = np.empty(shape, np.int64)
        document_starts = np.full(shape, -1, np.int32)
        lengths, num_labels, num_spans, longest = [], [], [], []
        for index, row in enumerate(rows):
            # int64 first: -100 would wrap round in the uint16 of the shards.
            ids, ends = (row[name].astype(np.int64) for name in ("input_ids", "document_ends"))
            length = len(ids)
            starts = np.concatenate([[0], ends[:-1]])
            learned = row["loss_mask"].astype(bool)
            learned[starts] = False  # nothing of its own document comes before a first token
            input_ids[index, :length] = ids
            labels[index, :length] = np.where(learned, ids, -100)
            document_starts[index, :length] = np.repeat(starts, ends - starts)
            lengths.append(length)
            num_labels.append(int(learned.sum()))
            num_spans.append(len(ends) + (length < self.max_seq_len))
            longest.append(max(int((ends - starts).max()), self.max_seq_len - length))
            position_ids[index] = np.arange(self.max_seq_len)
            # One document is causal as it is: positions run on over the padding behind it, which
            # lets torch's own kernel take its fast path without a mask.
            if len(ends) > 1:
                starts, ends = np.append(starts, length), np.append(ends, self.max_seq_len)
                position_ids[index] -= np.repeat(starts, ends - starts)
        arrays = {
            "input_ids": input_ids, "labels": labels, "position_ids": position_ids,
            "document_starts": document_starts,
            "sample_ids": np.array([row["sample_id"] for row in rows]),
        }  # fmt: skip
        counts = {"num_tokens": lengths, "num_labels": num_labels, "num_spans": num_spans}
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {**tensors, **counts, "longest": longest}


class ClassifyCollator:
    """Pads rows to their longest, rounded up to one of 8 even shares of `max_seq_len`.

    Returns a dict of
        input_ids, attention_mask, token_type_ids  [rows, tokens] int64
        labels        [rows] int64, the number of the class, or float32 for regression
        sample_ids    [rows] int64, numbers of the rows in their dataset
    and the lists of counts of TokenCollator: a row has one label, and one span, itself.
    """

    def __init__(self, max_seq_len: int, pad_token_id: int) -> None:
        self.max_seq_len, self.pad_token_id = max_seq_len, pad_token_id
        self._step = -(-max_seq_len // LENGTHS)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        length = min(-(-max(lengths) // self._step) * self._step, self.max_seq_len)
        labels = np.array([row["label"] for row in rows])
        arrays = {
            "input_ids": _padded(rows, "input_ids", length, self.pad_token_id),
            "attention_mask": (np.arange(length) < np.array(lengths)[:, None]).astype(np.int64),
            "token_type_ids": _padded(rows, "token_type_ids", length, 0),
            "labels": labels.astype(np.int64 if labels.dtype.kind == "i" else np.float32),
            "sample_ids": np.array([row["sample_id"] for row in rows]),
        }
        ones = [1] * len(rows)
        counts = {"num_tokens": lengths, "num_labels": ones, "num_spans": ones}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts


class PairCollator:
    """Pads sources and targets, sorted by their length, so that few of a microbatch are padding.

    Returns a dict of
        input_ids, attention_mask  [rows, source tokens] int64
        labels        [rows, target tokens] int64, -100 behind the end
        sample_ids    [rows] int64, numbers of the rows in their dataset
    and the lists of counts of TokenCollator, a row being one span, with
        source_room, target_room   of each row, the longest of its microbatch, to a multiple of 4:
                      what is further right is padding in all of them
    """

    def __init__(self, pad_token_id: int, microbatch: int) -> None:
        self.pad_token_id, self.microbatch = pad_token_id, microbatch

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = sorted(rows, key=lambda row: (len(row["input_ids"]), len(row["labels"])))
        sources, targets = ([len(row[name]) for row in rows] for name in ("input_ids", "labels"))
        rooms = {"source_room": self._rooms(sources), "target_room": self._rooms(targets)}
        input_ids = _padded(rows, "input_ids", max(rooms["source_room"]), self.pad_token_id)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": np.arange(input_ids.shape[1]) < np.array(sources)[:, None],
            "labels": _padded(rows, "labels", max(rooms["target_room"]), -100),
            "sample_ids": np.array([row["sample_id"] for row in rows]),
        }
        both = [a + b for a, b in zip(sources, targets, strict=True)]
        counts = {"num_tokens": both, "num_labels": targets, "num_spans": [1] * len(rows)}
        tensors = {n: torch.from_numpy(array.astype(np.int64)) for n, array in arrays.items()}
        return tensors | counts | rooms

    def _rooms(self, lengths: list[int]) -> list[int]:
        rooms: list[int] = []
        for begin in range(0, len(lengths), self.microbatch):
            group = lengths[begin : begin + self.microbatch]
            rooms += [-(-max(group) // STEP) * STEP] * len(group)
        return rooms


def _padded(rows: Sequence[dict[str, Any]], name: str, room: int, filler: int) -> np.ndarray:
    padded = np.full((len(rows), room), filler, np.int64)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row[name])] = row[name]
    return padded


def count_tokens(batch: dict[str, Any]) -> dict[str, int]:
    """Return the real tokens of a batch, and those that make loss."""
    return {"total": sum(batch["num_tokens"]), "loss_generating": sum(batch["num_labels"])}
