"""A StreamingDataset that cannot end an epoch early without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streaming import StreamingDataset

from overture.errors import DataError


class TokenStream(StreamingDataset):
    """Yields rows of `data/schema.py`, each with its `sample_id`.

    Streaming's loader threads swallow a missing shard or a failing remote and simply stop; here
    fewer samples than this worker was given is an error.
    """

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Return one row by its number in the dataset."""
        return {**super().get_item(sample_id, retry), "sample_id": int(sample_id)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over this worker's share of an epoch.

        Raises:
            DataError: the share ended early.
        """
        yield from super().__iter__()
        work = getattr(self, "_iterator", None)
        if work is not None and work.yield_index < work.total:
            raise DataError(
                f"{self.streams[0].local}: the data ended after {work.yield_index:,} of "
                f"{work.total:,} samples: a shard is missing, broken or could not be fetched"
            )
