"""What was converted in parts becomes one dataset, or is refused."""

import fcntl
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
from overture.data.merge import merge_parts
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

    def write(name, start, stop, split="train", file=tmp_path / "all.jsonl", **options):
        origin = Origin(str(file), "train", start, stop)
        common = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 64, "max_rejected": 0.1}
        more = {**common, "size_limit": 2_000, **options}
        convert(Conversion({split: origin}, "text", str(tmp_path / name), **more), lambda _: None)
        return tmp_path / name

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def join(parts, out, overwrite=False) -> list[str]:
    said = []
    merge_parts([*map(str, parts)], str(out), overwrite, said.append)
    return said


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_parts_become_one(part, tmp_path, compression):
    parts = [part(str(n), n, n + 40, compression=compression) for n in (0, 40, 80)]
    out = tmp_path / "out"
    join(parts, out)
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
        join(parts, out)
    join(parts[:2], out, True)
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
        join([part("0", 0, 40), part("1", **rows)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_in_no_part_and_those_that_are_in_two(part, tmp_path):
    one, other = part("0", 10, 40), part("1", 60, None)
    assert join([one, other], tmp_path / "out")[:2] == [
        f"note: rows {gap} of {tmp_path}/all.jsonl are in no part of train"
        for gap in ("0 to 10", "40 to 60")
    ]
    closed = [part("x/3", 0, 40), part("x/4", 40, 60)]
    assert join(closed, tmp_path / "x" / "all")[:1] == [
        f"note: rows from 60 on of {tmp_path}/all.jsonl, if any, are in no part of train"
    ]
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "all.jsonl", tmp_path / "copy" / "all.jsonl")
    again = part("2", 0, 11, file=tmp_path / "copy" / "all.jsonl")
    with pytest.raises(ConfigError, match=r"0/train and .*2/train have rows in common"):
        join([one, again], tmp_path / "out", True)
    with pytest.raises(
        ConfigError, match=r"out/train was drawn from the same .*all\.jsonl: its rows"
    ):
        join([part("3", 0, 11, split="test")], tmp_path / "out")
    with pytest.raises(ConfigError, match="1 is a part and the --out_root too"):
        join([one, other], other, True)
    fold = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(fold, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="out: another conversion is writing there"):
        join([one, other], tmp_path / "out", True)
    os.close(fold)


@pytest.mark.parametrize("damage", ["cut", "gone", "bit", "index"])
def test_a_part_that_is_broken_or_not_there(part, tmp_path, damage):
    one, other, out = part("0", 0, 40), part("1", 40, 80), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--merge: .*/no: no converted dataset is there"):
        join([one, tmp_path / "no"], out)
    shard = other / "train" / ("index.json" if damage == "index" else "shard.00000.mds")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.unlink()
    if damage != "gone":
        shard.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(DataError, match=r"1/train/(shard\.00000\.mds|index\.json): "):
        join([one, other], out)
    assert not out.exists()
    join([one], out)
    before = contents(out)
    with pytest.raises(DataError):
        join([one, other], out, True)
    assert contents(out) == before  # as it was, with nothing beside it


def test_parts_of_a_file_that_was_changed_between_them(part, tmp_path):
    one, file = part("0", 0, 40), tmp_path / "all.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ConfigError, match=r"all\.jsonl is not what .*0/train was drawn from, or"):
        join([one, part("1", 40, 80)], tmp_path / "out")


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
    for task in (0, 1, 2):  # as Slurm starts them; the last takes what is left
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task),
                       "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        command = ["bash", script, "2", "50", tmp_path / "all.jsonl", tmp_path / "parts", *options]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == (2 if task == 2 else 0), done.stderr
    assert "task 2 is none of 2, which count from 0: sbatch --array=0-1" in done.stderr
    join(sorted((tmp_path / "parts").iterdir()), tmp_path / "out")
    merged = Split(tmp_path / "out" / "train")
    assert len(merged) == len(whole) == 119
    for number in range(119):
        one, other = whole.row(number), merged.row(number)
        assert one["sample_id"] == other["sample_id"]
        assert np.array_equal(one["input_ids"], other["input_ids"])
