"""Streams for real: samples with their numbers, in a fixed order, and no short epoch."""

import shutil

import numpy as np
import pytest

from overture.data.streams import TokenStream
from overture.errors import DataError


def test_rows_carry_their_number(smoke):
    stream = TokenStream(local=str(smoke / "instruct"), split="test", batch_size=1)
    seen = list(stream)
    assert [row["sample_id"] for row in seen] == list(range(stream.num_samples))
    for row in seen:
        assert row["document_ends"][-1] == len(row["input_ids"]) == len(row["loss_mask"])
        assert row["input_ids"].dtype == np.uint16


def test_shuffle_is_fixed_by_the_seed(smoke):
    def order(seed):
        stream = TokenStream(
            local=str(smoke / "instruct"), split="train", batch_size=1, shuffle=True,
            shuffle_seed=seed, num_canonical_nodes=1,
        )  # fmt: skip
        return [row["sample_id"] for row in stream]

    first = order(3)
    assert first == order(3) != order(4)
    assert sorted(first) == list(range(len(first)))


def test_shard_that_vanishes_ends_in_an_error_not_in_a_short_epoch(smoke, tmp_path):
    # Streaming's own loop would end after what was loaded so far, as if that were the epoch.
    shutil.copytree(smoke / "instruct", tmp_path / "data")
    stream = TokenStream(
        local=str(tmp_path / "cache"), remote=str(tmp_path / "data"), split="train", batch_size=1,
        download_retry=1, download_timeout=2,
    )  # fmt: skip
    next((tmp_path / "data" / "train").glob("shard*")).unlink()
    with pytest.raises(DataError, match="a shard is missing, broken or could not be fetched"):
        list(stream)
