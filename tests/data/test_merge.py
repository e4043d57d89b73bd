"""What was converted in parts becomes one dataset, or is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from streaming import StreamingDataset

import convert_dataset
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.merge import merge_splits
from overture.data.schema import read_ledger
from overture.data.shards import Split
from overture.data.verify import verify
from overture.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(tmp_path, smoke):
    """Convert rows of 120, of which one is empty, into a folder; returns it."""
    texts = [f"text {n} " + "of some words " * (n % 7) for n in range(120)]
    lines = [json.dumps({"text": text}) for text in [*texts[:50], "", *texts[51:]]]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")

    def write(name, start, stop, split="train", **options):
        origin = Origin(str(tmp_path / "all.jsonl"), "train", start, stop)
        common = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 64, "max_rejected": 0.1}
        more = {**common, "size_limit": 2_000, **options}
        convert(Conversion({split: origin}, "text", str(tmp_path / name), **more), lambda _: None)
        return tmp_path / name

    return write


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_parts_become_one(part, tmp_path, compression):
    parts = [part(str(n), n, n + 40, compression=compression) for n in (0, 40, 80)]
    out = tmp_path / "out"
    merge_splits(parts, out, False, lambda _: None)
    whole, pieces = Split(out / "train"), [Split(folder / "train") for folder in parts]
    rows = [piece.row(number) for piece in pieces for number in range(len(piece))]
    assert len(whole) == len(rows) > 9
    for number, row in enumerate(rows):
        assert all(
            np.array_equal(whole.row(number)[name], row[name])
            for name in row
            if name != "sample_id"
        )
    streamed = StreamingDataset(local=str(out), split="train", batch_size=1)
    assert [row["input_ids"].tolist() for row in streamed] == [
        r["input_ids"].tolist() for r in rows
    ]
    verify(whole, lambda _: None)
    once = read_ledger(part("once", 0, 120) / "train")
    for key in ("rows", "documents", "tokens"):
        assert whole.ledger[key] == once[key]
    assert whole.ledger["rows"]["malformed"] or whole.ledger["rows"]["dropped"]
    assert len(whole.ledger["source"]["parts"]) == 3
    assert (out / "train" / "rejected.jsonl").read_text().count("\n") == 1
    with pytest.raises(ConfigError, match="out/train is there already; give --overwrite"):
        merge_splits(parts, out, False)
    merge_splits(parts[:2], out, True, lambda _: None)
    assert len(Split(out / "train")) == len(pieces[0]) + len(pieces[1])
    assert sorted(path.name for path in out.iterdir()) == ["train"]
    with pytest.raises(ConfigError, match="its rows would be in"):  # as of any other dataset
        part("out", 0, 9, split="dev")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_seq_len": 32}, "1/train has another max_seq_len than .*0/train"),
        ({"packing": "none"}, "another packing"),
        ({"bos_text": "x"}, "another bos_text"),
        ({"start": 39}, "0/train and .*1/train have rows in common"),
    ],
)
def test_parts_that_are_not_alike(part, tmp_path, options, words):
    rows = {"start": 40, "stop": 80, **options}
    with pytest.raises(ConfigError, match=words):
        merge_splits([part("0", 0, 40), part("1", **rows)], tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_there_or_broken(part, tmp_path):
    one, other = part("0", 0, 40), part("1", 40, 80)
    with pytest.raises(ConfigError, match=r"no has the splits none, but .*0 \['train'\]"):
        merge_splits([one, tmp_path / "no"], tmp_path / "out", False)
    shard = other / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"reads back otherwise"):
        merge_splits([one, other], tmp_path / "out", False)
    assert not list((tmp_path / "out").iterdir())


def test_the_door(part, tmp_path, monkeypatch):
    def door(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_dataset", *map(str, arguments)])
        convert_dataset.main()

    parts = (part("0", 0, 40), part("1", 40, 80))
    door("--merge", *parts, "--out_root", tmp_path / "out")
    assert Split(tmp_path / "out" / "train").ledger["samples"] > 2
    with pytest.raises(ConfigError, match="--merge takes --out_root and --overwrite, not --seed"):
        door("--merge", *parts, "--out_root", tmp_path / "out", "--seed", 3)
    with pytest.raises(ConfigError, match="--merge: name a folder as --out_root"):
        door("--merge", *parts)


def test_tasks_of_a_job_array(part, tmp_path, smoke):
    script = ROOT / "launch" / "convert_array.sh"
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    whole = Split(part("whole", 0, 120, packing="none") / "train")
    options = ("--task", "text", "--tokenizer", smoke / "tokenizer", "--max_seq_len", "64",
               "--max_rejected", "0.1", "--packing", "none")  # fmt: skip
    for task in (0, 1):  # as Slurm starts them; the last takes what is left
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_MAX": "1",
                       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        command = ["bash", script, "50", tmp_path / "all.jsonl", tmp_path / "parts", *options]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
    merge_splits(sorted((tmp_path / "parts").iterdir()), tmp_path / "out", False, lambda _: None)
    merged = Split(tmp_path / "out" / "train")
    assert len(merged) == len(whole) == 119
    for number in range(119):
        one, other = whole.row(number), merged.row(number)
        assert one["sample_id"] == other["sample_id"]
        assert np.array_equal(one["input_ids"], other["input_ids"])
