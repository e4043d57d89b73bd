"""Conversions that are killed: nothing half-written is left, and --resume gives the same bytes."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.errors import ConfigError

FORK = multiprocessing.get_context("fork")


def rows(count: int) -> list[dict[str, str]]:
    rng = random.Random(5)
    words = ["river", "house", "green", "old", "cat", "sees", "hears", "three", "é", "“", "seven"]

    def text(most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(1, most)))

    return [
        {
            "instruction": f"{text(9)} {i}",
            "context": text(40),
            "response": text(60 if i % 9 else 400),
        }
        for i in range(count)
    ]


@pytest.fixture
def job(tmp_path, smoke, monkeypatch):
    # A process forked from one whose tokenizer has threads must not wait for them.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    # Small windows, so that a conversion of a second has many of them.
    monkeypatch.setattr("overture.data.write.WINDOW_DOCUMENTS", 500)
    monkeypatch.setattr("overture.data.convert.BATCH_RECORDS", 250)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows(6_000)) + "{broken\n")
    return Conversion(
        origins={"train": Origin(str(source))},
        task="instruct",
        out_root=str(tmp_path / "whole"),
        tokenizer=str(smoke / "tokenizer"),
        test_fraction=0.2,
        max_seq_len=256,
        size_limit=30_000,
        compression="zstd",
    )


def contents(root: str) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def killed_after(job: Conversion, seconds: float) -> int:
    """Convert in a process of its own that is killed, and return how it ended."""
    process = FORK.Process(target=convert, args=(job, lambda _: None))
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def test_ten_kills_and_a_resume_each_give_the_same_bytes(job, tmp_path):
    start = time.perf_counter()
    convert(job, lambda _: None)
    seconds = time.perf_counter() - start
    whole = contents(job.out_root)
    assert len(whole) > 20
    rng = random.Random(11)
    kills = 0
    for trial in range(100):  # as many as it takes: on a busy machine most are done in time
        again = replace(job, out_root=str(tmp_path / f"killed-{trial}"))
        while killed_after(again, rng.uniform(0, 1.2 * seconds)) == -signal.SIGKILL:
            kills += 1
            there = contents(again.out_root) if Path(again.out_root).exists() else {}
            for name in ("train", "test"):  # a split is whole, or it is not there
                split = {k: v for k, v in there.items() if k.startswith(f"{name}/")}
                assert not split or split == {k: v for k, v in whole.items() if k in split}
                assert not split or f"{name}/dataset.json" in split
            again = replace(again, resume=True)
        assert contents(again.out_root) == whole, trial
        if kills >= 10 and trial >= 4:
            break
    assert kills >= 10


def interrupted(job: Conversion, tmp_path: Path) -> Conversion:
    job = replace(job, out_root=str(tmp_path / "cut"))
    journal = Path(job.out_root) / ".partial" / "train.journal"
    process = FORK.Process(target=convert, args=(job, lambda _: None))
    process.start()
    while not journal.exists() or len(json.loads(journal.read_text())["shards"]) < 5:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return replace(job, resume=True)


def test_resume_keeps_finished_shards(job, tmp_path):
    cut = interrupted(job, tmp_path)
    shard = Path(cut.out_root) / ".partial" / "train" / "shard.00000.mds.zstd"
    written = shard.stat().st_mtime_ns
    convert(cut, lambda _: None)
    assert (Path(cut.out_root) / "train" / shard.name).stat().st_mtime_ns == written
    convert(job, lambda _: None)
    assert contents(cut.out_root) == contents(job.out_root)
    with pytest.raises(ConfigError, match="is there already and is not of this conversion"):
        convert(replace(cut, max_seq_len=128), lambda _: None)
    convert(cut, lambda _: None)  # all of it is there: nothing to do
    assert (Path(cut.out_root) / "train" / shard.name).stat().st_mtime_ns == written


def test_resume_of_another_conversion_is_refused_and_keeps_the_traces(job, tmp_path):
    cut = interrupted(job, tmp_path)
    with pytest.raises(ConfigError, match="had max_seq_len 256, not 128"):
        convert(replace(cut, max_seq_len=128), lambda _: None)
    source = Path(job.origins["train"].dataset)
    text = source.read_text()
    source.write_text(text + json.dumps(rows(1)[0]) + "\n")
    with pytest.raises(ConfigError, match="the interrupted conversion had source of train"):
        convert(cut, lambda _: None)
    source.write_text(text)
    convert(cut, lambda _: None)
    # Not to go on is to start over.
    convert(replace(cut, resume=False, overwrite=True, max_seq_len=128), lambda _: None)
    assert sorted(p.name for p in Path(cut.out_root).iterdir()) == ["test", "train"]


def test_another_conversion_does_not_drop_what_an_interrupted_one_has(job, tmp_path):
    cut = interrupted(job, tmp_path)
    traces, other = Path(cut.out_root) / ".partial", tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(r) + "\n" for r in rows(20)))
    origins = {"more": Origin(str(other))}
    with pytest.raises(ConfigError, match=r"\.partial: a conversion of train was interrupted ther"):
        convert(replace(cut, resume=False, test_fraction=0.0, origins=origins), lambda _: None)
    assert (traces / "train.journal").exists()
    convert(cut, lambda _: None)


def test_a_folder_that_cannot_be_written_to_is_one_sentence(job, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / ".partial").touch()  # as root may write anywhere
    with pytest.raises(ConfigError, match=r"whole: no folder to write to \(File exists\)"):
        convert(job, lambda _: None)


def test_workers_end_with_whoever_started_them(job, tmp_path):
    job = replace(job, out_root=str(tmp_path / "cut"), processes=3)
    process = FORK.Process(target=convert, args=(job, lambda _: None))
    process.start()
    while not (Path(job.out_root) / ".partial" / "train.journal").exists():
        assert process.is_alive()
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder, deadline = os.open(job.out_root, os.O_RDONLY), time.monotonic() + 10
    while True:  # until the lock is free, which each of them holds
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(folder)
    convert(replace(job, resume=True), lambda _: None)


def test_two_conversions_into_one_folder_exclude_each_other(job, tmp_path):
    job = replace(job, out_root=str(tmp_path / "shared"))
    process = FORK.Process(target=convert, args=(job, lambda _: None))
    process.start()
    while not (Path(job.out_root) / ".partial" / "train").exists():
        assert process.is_alive()
        time.sleep(0.005)
    with pytest.raises(ConfigError, match="another conversion is writing there"):
        convert(job, lambda _: None)
    process.join()
    assert process.exitcode == 0


def test_processes_change_speed_and_not_bytes(job, tmp_path):
    convert(job, lambda _: None)
    two = replace(job, out_root=str(tmp_path / "two"), processes=2)
    convert(two, lambda _: None)
    assert contents(two.out_root) == contents(job.out_root)
