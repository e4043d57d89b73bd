"""Pairs of source and target to batches whose rows of like length stand together."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

STEP = 4  # lengths are multiples of it: kernels are built once for each shape


class PairCollator:
    """Pads sources and targets, sorted by their length, so that few of a microbatch are padding.

    Returns a dict of
        input_ids, attention_mask  [rows, source tokens] int64
        labels        [rows, target tokens] int64, -100 behind the end
        sample_ids    [rows] int64, numbers of the rows in their dataset
    and the lists of counts of `data/collate.py`, a row being one span, with
        source_room, target_room   of each row, the longest of its microbatch, to a multiple of 4:
                      what is further right is padding in all of them
    """

    def __init__(self, pad_token_id: int, microbatch: int) -> None:
        self.pad_token_id, self.microbatch = pad_token_id, microbatch

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = sorted(rows, key=lambda row: (len(row["input_ids"]), len(row["labels"])))
        sources, targets = ([len(row[name]) for row in rows] for name in ("input_ids", "labels"))
        rooms = {"source_room": self._rooms(sources), "target_room": self._rooms(targets)}
        input_ids = self._padded(rows, "input_ids", max(rooms["source_room"]), self.pad_token_id)
        arrays = {
            "input_ids": input_ids,
            "attention_mask": np.arange(input_ids.shape[1]) < np.array(sources)[:, None],
            "labels": self._padded(rows, "labels", max(rooms["target_room"]), -100),
            "sample_ids": np.array([row["sample_id"] for row in rows]),
        }
        counts = {
            "num_tokens": [a + b for a, b in zip(sources, targets, strict=True)],
            "num_labels": targets,
            "num_spans": [1] * len(rows),
        }
        tensors = {n: torch.from_numpy(array.astype(np.int64)) for n, array in arrays.items()}
        return tensors | counts | rooms

    def _rooms(self, lengths: list[int]) -> list[int]:
        rooms: list[int] = []
        for begin in range(0, len(lengths), self.microbatch):
            group = lengths[begin : begin + self.microbatch]
            rooms += [-(-max(group) // STEP) * STEP] * len(group)
        return rooms

    def _padded(self, rows: list[dict[str, Any]], name: str, room: int, filler: int) -> np.ndarray:
        padded = np.full((len(rows), room), filler, np.int64)
        for into, row in zip(padded, rows, strict=True):
            into[: len(row[name])] = row[name]
        return padded
