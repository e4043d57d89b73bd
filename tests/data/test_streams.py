"""Streams for real: samples with their numbers, in a fixed order, and no short epoch."""

import inspect
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter, Stream, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import SHM_TO_CLEAN

from overture.config.schema import (
    Config,
    DatasetConfig,
    LoaderConfig,
    ModelConfig,
    StreamConfig,
)
from overture.data.cache import open_cache
from overture.data.collate import TokenCollator
from overture.data.loaders import build_loader
from overture.data.streams import TokenStream
from overture.errors import ConfigError, DataError


def loader(local, remote=None, num_workers=0, batch_size=4, drop_last=False):
    config = Config("instruct", ModelConfig("none"), 128, "1ep", batch_size)
    config.data_local, config.data_remote = str(local), str(remote) if remote else None
    rows = LoaderConfig(num_workers=num_workers, drop_last=drop_last)
    return build_loader(config, rows, TokenCollator(128, 0), batch_size=batch_size).dataloader


def numbers(batches):
    return [int(number) for batch in batches for number in batch["sample_ids"]]


def test_rows_carry_their_number(smoke):
    stream = TokenStream(local=str(smoke / "instruct"), split="test", batch_size=1)
    seen = list(stream)
    assert [row["sample_id"] for row in seen] == list(range(stream.num_samples))
    for row in seen:
        assert row["document_ends"][-1] == len(row["input_ids"]) == len(row["loss_mask"])
        assert row["input_ids"].dtype == np.uint16


def test_any_columns_will_do(tmp_path):
    columns = {"text": "str", "label": "int", "input_ids": "ndarray:uint16"}
    with MDSWriter(columns=columns, out=str(tmp_path), hashes=["xxh64"]) as writer:
        writer.write({"text": "a", "label": 3, "input_ids": np.arange(2, dtype=np.uint16)})
    (row,) = TokenStream(local=str(tmp_path), batch_size=1)
    assert (row["text"], row["label"], row["sample_id"]) == ("a", 3, 0)


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


def test_epoch_may_be_left_and_begun_anew(smoke):
    stream = TokenStream(local=str(smoke / "instruct"), split="train", batch_size=1)
    left = iter(stream)
    next(left)
    assert len(list(stream)) == stream.num_samples
    assert len(list(left)) < stream.num_samples  # given up for the new one, which is no fault


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_cache_is_filled_from_the_remote(write_split, tmp_path, within, num_workers, compression):
    remote, cache = write_split(compression=compression).parent, tmp_path / "cache"
    within(60)
    for _ in range(2):
        open_cache(str(remote), str(cache), "train")
        batches = loader(cache, remote, num_workers)
        assert sorted(numbers(batches)) == list(range(60))
        del batches
    assert not list(cache.rglob("*.part"))


def test_a_shard_is_unpacked_under_a_name_of_its_own(write_split, monkeypatch):
    folder, names, replace = write_split(compression="zstd:3"), [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(str(a)), replace(a, b)))
    assert sorted(numbers(loader(folder.parent, None, 0))) == list(range(60))
    unpacked = [name for name in names if ".mds." in name]
    assert unpacked and all(name.endswith(f"-{os.getpid()}") for name in unpacked)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", ["gone", "cut", "unreadable"])
def test_local_shard_that_fails_under_way(write_split, within, num_workers, fault):
    folder = write_split()
    batches = loader(folder.parent, None, num_workers)
    shard = sorted(folder.glob("shard*"))[-2]
    if fault == "gone":
        shard.unlink()
    elif fault == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    within(20)
    with pytest.raises(DataError) as caught:
        list(batches)
    assert str(caught.value).startswith(f"{shard}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize("fault", ["gone", "damaged", "remote gone"])
def test_remote_shard_that_cannot_be_had(
    write_split, damage, tmp_path, within, num_workers, compression, fault
):
    folder = write_split(compression=compression)
    cache = tmp_path / "cache"
    open_cache(str(folder.parent), str(cache), "train")
    shard = sorted(folder.glob("shard*"))[-2]
    if fault == "gone":
        shard.unlink()
    elif fault == "damaged":
        damage(shard)
    else:
        shard = folder / "shard.00000.mds"  # the first to be missed
        shutil.rmtree(folder.parent)
    batches = loader(cache, folder.parent, num_workers)
    within(20)
    with pytest.raises(DataError) as caught:
        list(batches)
    assert str(caught.value).startswith(f"{folder}/shard.") and "\n" not in str(caught.value)
    if fault != "remote gone":
        assert str(caught.value).startswith(f"{shard}: ")
    assert not (cache / "train" / shard.name).exists()
    while list(cache.rglob("*.part")):  # a thread that came late may try once more
        time.sleep(0.05)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shard_that_arrives_damaged_once_is_fetched_again(
    write_split, damage, tmp_path, within, num_workers, monkeypatch
):
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS, LocalDownloader

    class Noisy(LocalDownloader):
        """A store whose first delivery of each shard has a flipped bit."""

        @staticmethod
        def _client_identifier():
            return "noisy"

        def _download_file_impl(self, remote, local, timeout):
            super()._download_file_impl(remote.removeprefix("noisy:"), local, timeout)
            seen = tmp_path / f"seen-{Path(remote).name}"
            if Path(remote).name.startswith("shard") and not seen.exists():
                seen.touch()
                damage(Path(local))

    monkeypatch.setitem(DOWNLOADER_MAPPINGS, "noisy", Noisy)
    remote, cache = f"noisy:{write_split().parent}", tmp_path / "cache"
    within(20)
    open_cache(remote, str(cache), "train")
    assert sorted(numbers(loader(cache, remote, num_workers))) == list(range(60))
    assert len(list(tmp_path.glob("seen-shard*"))) > 2


def test_damaged_cache_is_mended(write_split, damage, tmp_path):
    folder, cache = write_split(), tmp_path / "cache"
    said = []
    open_cache(str(folder.parent), str(cache), "train", said.append)
    assert len(numbers(loader(cache, folder.parent))) == 60
    damage(cache / "train" / "shard.00001.mds")
    damage(cache / "train" / "index.json")
    open_cache(str(folder.parent), str(cache), "train", said.append)
    assert said == [
        f"{cache}/train/shard.00001.mds: holds other bytes than were written; deleted, to be "
        "fetched again"
    ]
    assert len(numbers(loader(cache, folder.parent))) == 60
    for name in ("shard.00001.mds", "index.json"):
        assert (cache / "train" / name).read_bytes() == (folder / name).read_bytes()


def test_remote_converted_anew_replaces_the_cache(write_split, tmp_path):
    folder, cache = write_split(), tmp_path / "cache"
    said = []
    open_cache(str(folder.parent), str(cache), "train", said.append)
    assert len(numbers(loader(cache, folder.parent))) == 60
    shutil.rmtree(folder)
    write_split(rows=30)
    open_cache(str(folder.parent), str(cache), "train", said.append)
    assert said == [f"{cache}/train: emptied, since {folder} was converted anew"]
    assert not list((cache / "train").glob("shard*"))
    assert len(numbers(loader(cache, folder.parent))) == 30


def test_what_is_no_cache_is_never_emptied(write_split, tmp_path):
    remote, own = write_split(rows=30).parent, write_split("own/train")
    before = sorted(own.iterdir())
    with pytest.raises(ConfigError, match=r"data_local: .*own/train holds other data than"):
        open_cache(str(remote), str(own.parent), "train")
    assert sorted(own.iterdir()) == before
    # The very data that was uploaded may stand in for its cache.
    shutil.copytree(own, remote / "train", dirs_exist_ok=True)
    open_cache(str(remote), str(own.parent), "train")
    assert sorted(own.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("dataset.json", ConfigError, r"data_remote: .*/train/dataset\.json cannot be read"),
        ("index.json", ConfigError, r"data_remote: .*/train/index\.json cannot be read"),
        ("dataset.json", DataError, r"data/train/dataset\.json: unreadable"),
        ("index.json", DataError, r"data/train/index\.json: is not the index"),
    ],
)
def test_remote_ledger_and_index(write_split, damage, tmp_path, name, error, text):
    folder = write_split()
    if error is ConfigError:
        (folder / name).unlink()
    elif name == "index.json":
        damage(folder / name)
    else:
        (folder / name).write_text("{")
    with pytest.raises(error, match=text):
        open_cache(str(folder.parent), str(tmp_path / "cache"), "train")
    assert not (tmp_path / "cache").exists()


def test_cache_that_cannot_be_written(write_split, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data_local: .*/file cannot be a cache"):
        open_cache(str(write_split().parent), str(tmp_path / "file"), "train")


def test_remote_index_cannot_write_outside_the_cache(write_split, tmp_path):
    folder, cache = write_split(), tmp_path / "deep" / "er" / "cache"
    index = folder / "index.json"
    index.write_text(index.read_text().replace("shard.00001.mds", "../../escaped"))
    shutil.copyfile(folder / "shard.00001.mds", folder.parents[1] / "escaped")
    with pytest.raises(DataError, match=r"file name '\.\./\.\./escaped'"):
        TokenStream(local=str(cache), remote=str(folder.parent), split="train", batch_size=1)
    assert [p.name for p in (tmp_path / "deep").rglob("*") if p.is_file()] == ["index.json"]


def test_cache_of_a_live_process_is_not_shared(write_split, tmp_path):
    remote, cache = write_split().parent, tmp_path / "cache"
    live = TokenStream(local=str(cache), remote=str(remote), split="train", batch_size=1)
    code = (
        "import sys; from overture.data.streams import TokenStream\n"
        "try: TokenStream(local=sys.argv[1], remote=sys.argv[2], split='train', batch_size=1)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(cache), str(remote)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2] / "src", timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith(f"ConfigError data_local: {cache}: another process fetches")
    assert len(list(live)) == 60


def test_processes_that_begin_at_one_moment_take_numbers_of_their_own(smoke):
    code = (
        "import os, sys; from overture.data.streams import TokenStream\n"
        "one, two = os.fork(), os.fork()  # four processes\n"
        "for _ in range(10):\n"
        "    stream = TokenStream(local=sys.argv[1], split='test', batch_size=1)\n"
        "    assert len(list(stream)) > 0\n"
        "for child in (two, one and two and one): assert not child or not os.waitpid(child, 0)[1]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(smoke / "instruct")], capture_output=True, text=True,
        cwd=Path(__file__).parents[2] / "src", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_process_ends_while_a_shard_is_awaited(write_split):
    code = (
        "import sys, time; from overture.data.streams import TokenStream\n"
        "stream = TokenStream(local=sys.argv[1], split='train', batch_size=1, predownload=99)\n"
        "stream._shard_states[1:] = 2  # in preparation, by nobody\n"
        "rows = iter(stream); next(rows); time.sleep(1); print('over')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write_split().parent)], capture_output=True, text=True,
        cwd=Path(__file__).parents[2] / "src", timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


def test_batch_that_no_data_fill_is_refused(smoke):
    with pytest.raises(ConfigError, match="4096 samples make a batch, but train holds only"):
        loader(smoke / "text", batch_size=4096, drop_last=True)
    assert len(list(loader(smoke / "text", batch_size=4096))) == 1


def mix(write_split, rows={"a": 60, "b": 30}, shuffle=True, **weights):  # noqa: B006
    """The batches of some epochs of streams with those rows; weights are by name."""
    streams = {}
    for name, count in rows.items():
        split = write_split(f"{name}/train", rows=count)
        streams[name] = StreamConfig(str(split.parent), **weights.get(name, {}))
    config = Config("instruct", ModelConfig("none"), 128, "1ep", 4)
    order = DatasetConfig(shuffle=shuffle)
    loader = LoaderConfig(order, streams=streams, num_workers=0, drop_last=True)
    return build_loader(config, loader, TokenCollator(128, 0), batch_size=3)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, (60, 30)),
        # 90 rows to an epoch, of which a quarter and three quarters are 22 and 67, and one more.
        ({"a": {"proportion": 1}, "b": {"proportion": 3}}, (22, 67)),
        ({"a": {"repeat": 0.5}, "b": {"repeat": 2}}, (30, 60)),
        ({"a": {"choose": 9}}, (9, 30)),
    ],
)
def test_streams_are_mixed_as_they_are_weighted(write_split, weights, expected):
    data = mix(write_split, **weights)
    assert data.num_samples in range(sum(expected), sum(expected) + 2)
    assert len(data.dataloader) == data.num_samples // 3
    epochs = [numbers(data.dataloader) for _ in range(2)]
    for seen in epochs:
        assert len(seen) == data.num_samples // 3 * 3
        counts = sum(n < 60 for n in seen), sum(n >= 60 for n in seen)
        # A row or two are dropped with the incomplete batch.
        assert all(-3 < found - wanted <= 1 for found, wanted in zip(counts, expected, strict=True))
        assert {*seen} <= {*range(90)}
    assert epochs[0] != epochs[1]


def test_rows_of_streams_keep_what_they_are(write_split):
    data = mix(write_split, {"a": 6, "b": 9}, shuffle=False)
    rows = [ids for batch in data.dataloader for ids in batch["input_ids"]]
    one, other = rows[:6], rows[6:]
    assert len(other) == 9
    assert all((x == y).all() for x, y in zip(one, other[:6], strict=True))  # of the same source
    assert numbers(data.dataloader) == list(range(15))


def test_stream_that_gives_nothing_is_refused(write_split):
    with pytest.raises(ConfigError, match=r"streams\.b: gives none of the 60 rows of an epoch"):
        mix(write_split, b={"repeat": 0.01})


def test_damage_in_one_of_several_streams_is_named(write_split):
    data = mix(write_split)
    shard = sorted(Path(data.dataloader.dataset.streams[1].local, "train").glob("shard*"))[0]
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(DataError, match=rf"^{shard}: sample \d+ cannot be read"):
        list(data.dataloader)


def test_streaming_is_still_the_one_that_data_streams_knows():
    # If this fails, Streaming has changed: read the overrides in data/streams.py again.
    def arguments(function):
        return list(inspect.signature(function).parameters)

    assert arguments(Stream.get_shards) == ["self", "world", "allow_unsafe_types"]
    assert arguments(Stream.prepare_shard) == ["self", "shard"]
    assert arguments(Stream._download_file) == ["self", "from_basename", "to_basename"]
    assert arguments(StreamingDataset.prepare_shard) == ["self", "shard_id", "blocking"]
    assert arguments(StreamingDataset.get_item) == ["self", "sample_id", "retry"]
    assert arguments(StreamingDataset._each_sample_id) == ["self", "it"]
    assert "self.epoch_size = Stream.apply_weights(" in inspect.getsource(StreamingDataset.__init__)
    work = streaming_dataset._Iterator(np.arange(3))
    assert (work.yield_index, work.total, work.should_exit()) == (0, 3, False)
    assert [state.name for state in streaming_dataset._ShardState] == [
        "INVALID", "REMOTE", "PREPARING", "LOCAL",
    ]  # fmt: skip
    for thread in (StreamingDataset._prepare_thread, StreamingDataset._ready_thread):
        assert "self.prepare_shard(shard_id, False)" in inspect.getsource(thread)
    assert "self._event.is_set()" in inspect.getsource(StreamingDataset._ready_thread)
    assert "self._each_sample_id(it)" in inspect.getsource(StreamingDataset.__iter__)
    assert "self._download_file(" in inspect.getsource(Stream._prepare_shard_part)
    assert len(SHM_TO_CLEAN) == 9
