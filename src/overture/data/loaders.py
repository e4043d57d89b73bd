"""From a converted split to the DataSpec that Composer's Trainer takes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from composer import DataSpec
from composer.utils import dist
from streaming import StreamingDataLoader
from streaming.base.storage.download import CloudDownloader

from overture.data.collate import TokenCollator, count_tokens
from overture.data.schema import LEDGER
from overture.data.streams import TokenStream
from overture.errors import ConfigError


def build_loader(
    data_local: str,
    data_remote: str | None,
    split: str,
    shuffle: bool,
    shuffle_seed: int,
    max_seq_len: int,
    pad_token_id: int,
    batch_size: int,
    num_workers: int,
    drop_last: bool,
) -> DataSpec:
    """Return the loader of one split; `batch_size` is rows per rank.

    The order of samples is fixed by the seed and the same on any number of ranks of one node; at
    the end of an epoch Streaming repeats a sample where the ranks would not come out even.
    """
    dataset = TokenStream(
        local=data_local,
        remote=data_remote,
        split=split,
        shuffle=shuffle,
        shuffle_seed=shuffle_seed,
        batch_size=batch_size,
        num_canonical_nodes=1,
        validate_hash="xxh64" if data_remote else None,
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=TokenCollator(max_seq_len, pad_token_id),
        num_workers=num_workers,
        drop_last=drop_last,
        pin_memory=False,
        persistent_workers=False,
    )
    return DataSpec(
        loader,
        num_samples=dataset.num_samples,
        get_num_samples_in_batch=_count_samples,
        get_num_tokens_in_batch=count_tokens,
    )


def _count_samples(batch: dict[str, Any]) -> int:
    return len(batch["input_ids"])


def fetch_ledger(remote: str, local: str, split: str) -> None:
    """Download the ledger of a remote split to its cache, which Streaming itself would leave out.

    Raises:
        ConfigError: there is none.
    """
    source, place = f"{remote.rstrip('/')}/{split}/{LEDGER}", Path(local) / split / LEDGER
    failure = None
    if dist.get_local_rank() == 0:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if "://" in remote:
                CloudDownloader.get(source).download(source, str(place), timeout=60)
            else:
                shutil.copyfile(source, place)
        except Exception as error:  # each store's client raises its own kinds
            failure = " ".join(str(error).split())[:200]
    # Every rank must learn of it: one that raised alone would leave the others waiting.
    failures = [text for text in dist.all_gather_object(failure) if text]
    if failures:
        raise ConfigError(f"data_remote: {source} cannot be read ({failures[0]})")
