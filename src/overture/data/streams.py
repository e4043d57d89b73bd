"""A StreamingDataset that reads what was written or says why not.

Streaming 0.13 trusts every file that bears a shard's name; where a shard cannot be had, it ends the
epoch early without a word and leaves the other workers waiting for ever. What must be known of its
private parts to mend that is all in this file; tests/data/test_streams.py watches over it.
"""

import os
import platform
import random
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from composer.utils import dist
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _ShardState

from overture.config.schema import StreamConfig
from overture.data.cache import claim_cache
from overture.data.integrity import REMEDY, find_fault, read_index
from overture.data.remote import fetch
from overture.data.schema import INDEX
from overture.errors import ConfigError, DataError


class CheckedStream(Stream):
    """A Stream in which a file gets its name only when its content is proven."""

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """Return the shard readers of a sound index."""
        index, self._recorded = Path(self.local, self.split, INDEX), {}
        if world.is_local_leader:  # for all; the others wait for the file in Streaming's own way
            if self.remote and not index.exists():
                self._download_file(INDEX)
            read_index(index)
        shards = super().get_shards(world, allow_unsafe_types=False)
        self._recorded = {file.name: file for shard in read_index(index) for file in shard if file}
        return shards

    def prepare_shard(self, shard: Any) -> int:
        """Fetch and unpack a shard, or DataError; return the bytes that it added to the cache."""
        try:
            return super().prepare_shard(shard)
        except DataError:
            raise
        except Exception as error:  # each store's client raises its own kinds
            source = self._source((shard.zip_data or shard.raw_data).basename)
            raise DataError(f"{source}: cannot be fetched or unpacked ({_words(error)})") from error

    def _decompress_shard_part(
        self, zip_info: Any, zip_filename: str, raw_filename: str, compression: str | None
    ) -> None:
        # Other nodes, and other runs, may unpack the same: each under a name of its own.
        own = f"{raw_filename}.{platform.node()}-{os.getpid()}"
        super()._decompress_shard_part(zip_info, zip_filename, own, compression)
        os.replace(own, raw_filename)

    def _source(self, name: str) -> str:
        return os.path.join(self.remote or self.local, self.split, name)

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        if not self.remote:
            raise DataError(f"{self._source(from_basename)}: is missing; {REMEDY}")
        place = Path(self.local, self.split, to_basename or from_basename)
        arriving = place.with_name(place.name + ".part")
        recorded = self._recorded.get(from_basename)
        download = partial(super()._download_file, from_basename, arriving.name)
        for _ in range(2):  # once more where it arrives damaged
            arriving.unlink(missing_ok=True)  # or a part of an earlier run would pass as fetched
            fetch(self._source(from_basename), arriving, download)
            fault = find_fault(arriving, recorded) if recorded else ""
            if not fault:
                os.replace(arriving, place)
                return str(place)
        arriving.unlink()
        raise DataError(f"{self._source(from_basename)}: {fault} (fetched twice); upload it again")


class TokenStream(StreamingDataset):
    """Yields the rows of a split, or of several mixed, whatever their columns are.

    Each has the `epoch`, and its `sample_id`, which counts through the splits in order. Takes the
    arguments of StreamingDataset; `local` is where the splits lie, or are cached where there is a
    `remote`; `streams` stand in their place. Raises ConfigError if another process uses the same
    cache, DataError if an index is missing or unsound.
    """

    def __init__(
        self, *, local: str = "", split: str = "", remote: str | None = None,
        streams: Sequence[StreamConfig] = (), **more: Any,
    ) -> None:  # fmt: skip
        streams = streams or [StreamConfig(local, remote, split)]
        self._failed: set[int] = set()
        self._epoch = 0
        for stream in streams:
            if stream.data_remote and dist.get_local_rank() == 0:
                claim_cache(Path(stream.data_local))
        try:
            for left in range(20, -1, -1):
                try:
                    super().__init__(streams=[_checked(stream) for stream in streams], **more)
                    break
                except FileExistsError:  # another process took its number at the same moment
                    if not left or dist.get_world_size() > 1:  # ranks have to agree on one
                        raise
                    time.sleep(random.SystemRandom().random() / 5)
        except ValueError as error:
            if "Reused local directory" not in str(error):
                raise
            places = ", ".join(f"{stream.data_local}/{stream.split}" for stream in streams)
            fault = f"data_local: {places}: is a cache that is in use already"
            raise ConfigError(f"{fault}; wait for its end or name another folder") from None

    def rows_left(self) -> int:
        """Return how many rows the epoch that begins next still has, all but after a resume."""
        return self.epoch_size - self._resume(self._parallel_rank_world, self.next_epoch)[1]

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Make a shard ready or raise DataError; not `blocking`, that is left to the reader."""
        if not blocking and shard_id in self._failed:
            return  # it asks anew for every sample of the shard
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            # Streaming leaves the shard in preparation, for which the other workers wait without
            # end. Called local, it is missed by whoever reads from it; he then fetches it himself
            # and meets the same error where it can be raised: not in a thread but at a sample.
            self._failed.add(shard_id)
            self._shard_states[shard_id] = _ShardState.LOCAL
            if blocking:
                raise

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """Return one row by its number in the dataset; raises DataError if it cannot be read."""
        try:
            row = super().get_item(sample_id, retry)
        except DataError:
            raise
        except Exception as error:  # whatever the decoding of damaged bytes runs into
            shard = self.spanner[sample_id][0]
            stream = self.streams[self.stream_per_shard[shard]]
            place = os.path.join(stream.local, stream.split, self.shards[shard].raw_data.basename)
            fault = f"sample {sample_id} cannot be read ({_words(error)})"
            raise DataError(f"{place}: {fault}; {REMEDY}") from error
        return row | {"sample_id": int(sample_id), "epoch": self._epoch}

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self._epoch, begin = super()._resume_incr_epoch()
        return self._epoch, begin

    def _ready_thread(self, it: Any) -> None:
        # While it waits for a shard it looks at nothing else, and the process would never end.
        threading._register_atexit(self._event.set)
        super()._ready_thread(it)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        yield from super()._each_sample_id(it)
        # Unless a new epoch was begun before this one was through.
        if it.yield_index < it.total and not it.should_exit():
            where = ", ".join(stream.local for stream in self.streams)
            fault = f"the data ended after {it.yield_index:,} of {it.total:,} samples"
            raise DataError(f"{where}: {fault}: a shard is missing, broken or could not be fetched")


def _checked(stream: StreamConfig) -> CheckedStream:
    place = {"local": stream.data_local, "remote": stream.data_remote, "split": stream.split}
    weights = {name: getattr(stream, name) for name in ("proportion", "repeat", "choose")}
    return CheckedStream(**place, **weights, keep_zip=False)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
