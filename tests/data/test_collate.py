"""Batches: shapes, labels, positions, against an independent reading of the rows."""

import numpy as np
import torch

from overture.data.collate import TokenCollator, count_tokens


def row(documents: list[tuple[list[int], list[int]]], sample_id: int = 0) -> dict:
    ids = [i for d, _ in documents for i in d]
    mask = [m for _, d in documents for m in d]
    ends = np.cumsum([len(d) for d, _ in documents])
    return {
        "input_ids": np.array(ids, np.uint16),
        "loss_mask": np.array(mask, np.uint8),
        "document_ends": ends.astype(np.uint32),
        "sample_id": sample_id,
    }


def test_packed_row():
    batch = TokenCollator(8, pad_token_id=9)([row([([1, 2, 3], [0, 1, 1]), ([4, 5], [1, 1])], 7)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    # 4 opens a document: nothing of its own comes before it, so it cannot be learned.
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["sample_ids"].tolist() == [7]
    assert (batch["num_tokens"], batch["num_labels"], batch["num_spans"]) == ([5], [3], [3])
    assert count_tokens(batch) == {"total": 5, "loss_generating": 3}


def test_single_document_positions_run_on():
    batch = TokenCollator(4, pad_token_id=0)([row([([1, 2], [0, 1])])])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_shape_and_dtype_do_not_depend_on_the_rows():
    collate = TokenCollator(16, pad_token_id=0)
    for length in (1, 9, 16):
        batch = collate([row([([3] * length, [1] * length)])] * 2)
        for name in ("input_ids", "labels", "position_ids"):
            assert batch[name].shape == (2, 16)
            assert batch[name].dtype == torch.int64


def test_large_uint16_ids_survive():
    # -100 in a uint16 array would wrap round to 65436.
    batch = TokenCollator(3, pad_token_id=0)([row([([65_000, 65_535, 1], [0, 1, 1])])])
    assert batch["labels"].tolist() == [[-100, 65_535, 1]]
