"""Rows of a classifier to batches of a few fixed lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

LENGTHS = 8  # that a batch may have: kernels are built once for each shape


class ClassifyCollator:
    """Pads rows to their longest, rounded up to one of 8 even shares of `max_seq_len`.

    Returns a dict of
        input_ids, attention_mask, token_type_ids  [rows, tokens] int64
        labels        [rows] int64, the number of the class, or float32 for regression
        sample_ids    [rows] int64, numbers of the rows in their dataset
    and the lists of counts of `data/collate.py`: a row has one label, and one span, itself.
    """

    def __init__(self, max_seq_len: int, pad_token_id: int) -> None:
        self.max_seq_len, self.pad_token_id = max_seq_len, pad_token_id
        self._step = -(-max_seq_len // LENGTHS)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        length = min(-(-max(lengths) // self._step) * self._step, self.max_seq_len)
        input_ids = np.full((len(rows), length), self.pad_token_id, np.int64)
        mask, types = np.zeros((2, len(rows), length), np.int64)
        for index, row in enumerate(rows):
            input_ids[index, : lengths[index]] = row["input_ids"]
            types[index, : lengths[index]] = row["token_type_ids"]
            mask[index, : lengths[index]] = 1
        labels = np.array([row["label"] for row in rows])
        kind = np.int64 if labels.dtype.kind == "i" else np.float32
        arrays = {
            "input_ids": input_ids, "attention_mask": mask, "token_type_ids": types,
            "labels": labels.astype(kind),
            "sample_ids": np.array([row["sample_id"] for row in rows]),
        }  # fmt: skip
        ones = [1] * len(rows)
        counts = {"num_tokens": lengths, "num_labels": ones, "num_spans": ones}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | counts
