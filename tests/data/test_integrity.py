"""Every fault that a split can have on disk is refused before training, by the name of the file."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from overture.data.integrity import read_index, verify_split
from overture.data.schema import read_ledger, seal
from overture.errors import DataError


def verify(folder: Path, most: float = math.inf) -> None:
    verify_split(folder, read_ledger(folder), most)


def test_sound_splits_pass(smoke, write_split):
    for ledger in smoke.glob("*/*/dataset.json"):
        verify(ledger.parent)
    folder = write_split()
    assert len(read_index(folder / "index.json")) > 2
    verify(folder)
    verify(write_split("packed/train", compression="zstd:3"))


def test_a_part_of_the_shards_is_read_where_all_would_be_too_many(write_split, damage):
    folder = write_split()
    shards = sorted(folder.glob("shard*"))
    assert len(shards) > 3
    most = sum(shard.stat().st_size for shard in shards) / 2
    damage(shards[1])
    verify(folder, most)  # every second one
    damage(shards[2])
    with pytest.raises(DataError, match=f"{shards[2].name}: holds other bytes"):
        verify(folder, most)


@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize(
    ("fault", "text"),
    [("flip", "holds other bytes"), ("cut", "were written"), ("remove", "is missing")],
)
def test_damaged_shard_is_named(write_split, damage, compression, which, fault, text):
    folder = write_split(compression=compression)
    shard = sorted(folder.glob("shard*"))[which]
    if fault == "flip":
        damage(shard)
        verify(folder, most=0)  # what the other ranks look at
    elif fault == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.unlink()
    with pytest.raises(DataError, match=text) as caught:
        verify(folder)
    assert str(caught.value).startswith(f"{shard}: ") and caught.value.exit_code == 4
    if fault != "flip":
        with pytest.raises(DataError, match=text):
            verify(folder, most=0)


def test_unpacked_shard_beside_its_zip_is_hashed_too(write_split, damage):
    from overture.data.streams import TokenStream

    folder = write_split(compression="zstd:3")
    stream = TokenStream(local=str(folder.parent), split="train", batch_size=1)
    assert len(list(stream)) == 60
    verify(folder)
    raw = folder / "shard.00001.mds"
    damage(raw)
    with pytest.raises(DataError, match=r"shard\.00001\.mds: holds other bytes.*delete it"):
        verify(folder)
    raw.unlink()
    verify(folder)


def test_index_missing_foreign_edited(write_split, smoke):
    folder = write_split()
    index = folder / "index.json"
    sound = index.read_bytes()
    index.unlink()
    with pytest.raises(DataError, match=r"index\.json: is missing"):
        verify(folder)
    shutil.copyfile(smoke / "text" / "train" / "index.json", index)
    with pytest.raises(DataError, match=r"index\.json: is not the index that its dataset\.json"):
        verify(folder)
    index.write_bytes(sound.replace(b'"samples": ', b'"samples":  ', 1))
    with pytest.raises(DataError, match=r"index\.json: is not the index"):
        verify(folder)


def without(key):
    return lambda index: index["shards"][1].pop(key)


def setting(value, *path):
    def change(index):
        node = index
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return change


SHARD = ("shards", 1)
NAME = (*SHARD, "raw_data", "basename")
BAD_INDEXES = {
    "version": setting(3, "version"),
    "no version": lambda index: index.pop("version"),
    "no shards": lambda index: index.pop("shards"),
    "empty": setting([], "shards"),
    "shards is a number": setting(7, "shards"),
    "shard is text": setting("x", *SHARD),
    "shard lacks raw_data": without("raw_data"),
    "shard lacks columns": without("column_names"),
    "other format": setting("csv", *SHARD, "format"),
    "negative samples": setting(-1, *SHARD, "samples"),
    "no samples": setting(0, *SHARD, "samples"),
    "samples is text": setting("many", *SHARD, "samples"),
    "negative bytes": setting(-5, *SHARD, "raw_data", "bytes"),
    "no bytes": lambda index: index["shards"][1]["raw_data"].pop("bytes"),
    "no xxh64": setting({"sha256": "0"}, *SHARD, "raw_data", "hashes"),
    "column lists differ": setting([None], *SHARD, "column_sizes"),
    "negative column": setting([None, None, -2], *SHARD, "column_sizes"),
    "zip without compression": setting("zstd", *SHARD, "compression"),
    "size limit is text": setting("x", *SHARD, "size_limit"),
    "no size limit": setting(None, *SHARD, "size_limit"),
    "no hashes": setting([], *SHARD, "hashes"),
    "hashes is text": setting("xxh64", *SHARD, "hashes"),
    "zip is an empty list": setting([], *SHARD, "zip_data"),
    "compression is an object": setting({}, *SHARD, "compression"),
    "column name is a number": setting(3, *SHARD, "column_names", 0),
    "pickle": setting("pkl", *SHARD, "column_encodings", 0),
    "pickle with options": setting("pkl:x", *SHARD, "column_encodings", 0),
    "array of objects": setting("ndarray:object", *SHARD, "column_encodings", 0),
    "image": setting("pil", *SHARD, "column_encodings", 0),
    "encoding is a number": setting(3, *SHARD, "column_encodings", 0),
    "parent": setting("../../x", *NAME),
    "absolute": setting("/tmp/x", *NAME),
    "dots": setting("..", *NAME),
    "no name": setting("", *NAME),
    "subfolder": setting("a/b", *NAME),
    "backslash": setting("..\\x", *NAME),
    "null byte": setting("a\0b", *NAME),
    "newline": setting("a\n", *NAME),
    "hidden": setting(".x", *NAME),
    "name is a number": setting(4, *NAME),
    "shard called index": setting("index.json", *NAME),
    "name twice": setting("shard.00000.mds", *NAME),
}


@pytest.mark.parametrize("change", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_unsound_index_is_one_sentence(write_split, change):
    path = write_split() / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: is not a sound index of sh") as caught:
        read_index(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_index_that_is_no_index(tmp_path, text):
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(DataError, match=r"index\.json: is not a sound index of shards \("):
        read_index(tmp_path / "index.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, {"files": []}, {"files": [3]}])
def test_unsound_ledger(write_split, text):
    folder = write_split()
    (folder / "dataset.json").write_text(text if isinstance(text, str) else seal(text))
    with pytest.raises(DataError, match=r"dataset\.json: unreadable"):
        verify(folder)


def test_any_changed_bit_of_a_ledger_is_found(write_split):
    ledger = write_split() / "dataset.json"
    content = ledger.read_bytes()
    for bit in range(0, 8 * len(content), 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        ledger.write_bytes(changed)
        with pytest.raises(DataError, match=r"dataset\.json: unreadable"):
            read_ledger(ledger.parent)


def test_no_torch_is_needed():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, overture.data.integrity; "
         "sys.exit(bool({'torch', 'streaming', 'composer'} & sys.modules.keys()))"],
        cwd=Path(__file__).parents[2] / "src", timeout=60,
    )  # fmt: skip
    assert done.returncode == 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_door_ends_with_4_and_one_sentence(smoke, tmp_path, damage, run_door, ranks):
    shutil.copytree(smoke / "text", tmp_path / "data")
    shard = tmp_path / "data" / "train" / "shard.00000.mds"
    damage(shard)
    command = ["main.py", "yamls/smoke/pretrain.yaml", f"data_local={tmp_path / 'data'}"]
    command += [f"run_folder={tmp_path / 'run'}", "device_train_microbatch_size=4"]
    if ranks == 1:
        done = run_door(*command)
        assert done.stderr == f"error: {shard}: holds other bytes than were written; restore it " \
            "from where it came, or convert the dataset again\n"  # fmt: skip
    else:
        composer = str(Path(sys.executable).with_name("composer"))
        done = run_door("-n", ranks, *command, launcher=composer)
        assert f"error: {shard}: holds other bytes" in done.stdout + done.stderr
    assert done.returncode == 4
