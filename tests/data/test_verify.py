"""A split that was written well is verified; whatever is changed in it afterwards is named."""

import json
import shutil

import numpy as np
import pytest

import handmade
from overture.data.schema import seal, unseal
from overture.data.shards import Split
from overture.data.verify import verify
from overture.errors import DataError

PROMPT, ANSWER = [5, 6, 7], [8, 9, 0]


def rows(count=40):
    return [handmade.pack((PROMPT, ANSWER), ([11] * (1 + n % 9), [12, 0])) for n in range(count)]


@pytest.fixture
def split(tmp_path):
    """Return a function that writes a split of several shards."""

    def write(task="instruct", content=None, **options):
        folder = tmp_path / "data" / "train"
        shutil.rmtree(folder, ignore_errors=True)
        options = {"size_limit": 1024, **options}
        return handmade.write(folder, task, content or rows(), "none such", **options)

    return write


def faults(folder):
    """Return what verification says of a split that it refuses, and its closing sentence."""
    said = []
    with pytest.raises(DataError) as error:
        verify(Split(folder), said.append)
    assert "verified" not in said
    sentence = str(error.value)
    assert "\n" not in sentence
    return "\n".join(said), sentence


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_good_split(split, compression):
    said = []
    found = verify(Split(split(compression=compression)), said.append).summary()
    assert said[-1] == "verified" and all(line.startswith("ok") for line in said[:-1])
    assert (found["rows_read"], found["documents"]) == (40, 80)
    assert found["learned_tokens"] == 40 * 5


def test_smoke_splits_are_good(smoke):
    for folder in sorted(path.parent for path in smoke.glob("*/*/dataset.json")):
        verify(Split(folder), lambda line: None)


def test_a_changed_byte(split, run_door):
    folder = split()
    shard = folder / "shard.00003.mds"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1  # in the ids or borders of the last row
    shard.write_bytes(data)
    said, sentence = faults(folder)
    for name in ("sha256 is not the ledger's", "sha256 is not the index's", "xxh64 is not"):
        assert f"shard.00003.mds: its {name}" in said
    assert "shard.00002" not in said
    assert sentence.startswith(f"{folder}: shard.00003.mds: its sha256") and "more)" in sentence
    done = run_door("src/inspect_dataset.py", folder.parent, "--verify")
    assert done.returncode == 4
    assert done.stderr.startswith("error:") and "shard.00003.mds" in done.stderr
    assert "Traceback" not in done.stderr and "verified" not in done.stdout


def test_a_changed_byte_in_a_compressed_shard(split):
    folder = split(compression="zstd")
    shard = folder / "shard.00001.mds.zstd"
    shard.write_bytes(shard.read_bytes()[:-9] + b"otherwise")
    said, _ = faults(folder)
    assert "shard.00001.mds.zstd: its xxh64 is not the index's" in said
    assert "shard.00001.mds" in said and "shard.00002" not in said


def test_hashes_of_the_raw_form_are_checked_too(split):
    folder = split(compression="zstd")
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["hashes"]["xxh64"] = "0" * 16
    (folder / "index.json").write_text(json.dumps(index))
    handmade.sign(folder)
    said, _ = faults(folder)
    assert "shard.00000.mds: its xxh64 is not the index's" in said


def test_missing_cut_and_unknown_files(split):
    folder = split()
    (folder / "shard.00001.mds").unlink()
    cut = folder / "shard.00002.mds"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / "notes.txt").write_text("mine")
    for name in ("shard.00000.mds.node-7.tmp", "shard.00000.mds.part"):  # left by a kill
        (folder / name).touch()
    said, _ = faults(folder)
    assert "shard.00001.mds: is missing" in said
    assert "shard.00002.mds: has 300 bytes" in said
    assert "mds.node" not in said and ".part" not in said
    assert "notes.txt: is not among the files that dataset.json says were written" in said
    assert "cannot be read" in said  # rows beyond the cut


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"samples": 41}, "samples is 41, counted are 40"),
        ({"documents": 79}, "documents is 79, counted are 80"),
        ({"tokens": {"total": 1, "trained": 200}}, "tokens.total is 1, counted are"),
        ({"tokens": {"total": 1, "trained": 201}}, "tokens.trained is 201, counted are 200"),
        ({"rows": {"kept": 79, "in_split": 80}}, "rows.in_split is 80, counted are 79"),
        (
            {"rows": {"kept": 80, "in_split": 80, "dropped": {"empty": 2}}},
            "dropped and malformed in rejected.jsonl is 2, counted are 0",
        ),
        (
            {"rows": {"kept": 76, "in_split": 80, "dropped": {"a": 1}, "malformed": {"b": 2}}},
            "rows.in_split is 80, counted are 79",
        ),
        ({"rows": {"kept": "many"}}, "dataset.json: cannot be read (KeyError"),
        ({"max_seq_len": 8}, "tokens, more than 8"),
        ({"tokenizer": {"name": "x", "vocab_size": 12}}, "id 12, outside the vocabulary of 12"),
    ],
)
def test_an_edited_ledger(split, changes, named):
    folder = split()
    handmade.sign(folder, **changes)
    said, sentence = faults(folder)
    assert named in said + sentence
    assert named in sentence or "more)" in sentence


def test_rejected_rows_are_counted(split):
    folder = split()
    (folder / "rejected.jsonl").write_text('{"line": 1}\n{"line": 2}\n')
    lost = {"kept": 80, "in_split": 82, "dropped": {"empty": 1}, "malformed": {"no_text": 1}}
    handmade.sign(folder, rows=lost)
    verify(Split(folder), lambda line: None)
    handmade.sign(folder, rows={**lost, "in_split": 81, "malformed": {}})
    assert "rejected.jsonl is 1, counted are 2" in faults(folder)[0]


def test_many_faults_are_counted_and_the_first_named(split):
    content = rows(120)
    for row in content:
        row["loss_mask"] = row["loss_mask"] * 2
    said, sentence = faults(split(content=content))
    assert "FAIL  120 rows: ids, labels and borders: 120 faults" in said
    assert said.count("is not all 0 and 1") == 100
    assert "shard.00000.mds: row 0: loss_mask" in sentence and "(and 119 more)" in sentence


@pytest.mark.parametrize(
    ("column", "change", "named"),
    [
        ("document_ends", lambda ends: ends - 1, "do not rise to its"),
        ("document_ends", lambda ends: ends[::-1].copy(), "do not rise to its"),
        ("loss_mask", lambda mask: mask * 2, "is not all 0 and 1"),
        ("loss_mask", lambda mask: mask[1:], "loss_mask or token_type_ids not of"),
        ("loss_mask", lambda mask: np.ones_like(mask), "the first token of a document is"),
        ("input_ids", lambda ids: ids + np.uint16(1020), "outside the vocabulary of 1024"),
    ],
)
def test_a_row_that_cannot_be(split, column, change, named):
    content = rows()
    content[17][column] = change(content[17][column])
    said, sentence = faults(split(content=content))
    assert "row 17: " in sentence or "row 17: " in said
    assert named in said and "row 16" not in said


def test_other_tasks(split):
    ids = np.array([5, 6], np.uint16)
    pairs = [{"input_ids": ids, "labels": np.array([7, 0], np.uint16)}] * 2
    assert verify(Split(split("seq2seq", pairs)), lambda line: None).summary()["rows_read"] == 2
    pairs[1] = {"input_ids": ids, "labels": ids + np.uint16(1020)}
    assert "row 1: id 1026, outside the vocabulary of 1024" in faults(split("seq2seq", pairs))[0]
    types = np.array([0, 1], np.uint8)
    good = {"input_ids": ids, "token_type_ids": types, "label": np.int32(1)}
    summary = verify(Split(split("classify", [good] * 3)), lambda line: None).summary()
    assert summary["rows_by_label"] == {"yes": 3}
    wrong = [good, {**good, "label": np.int32(2)}, {**good, "token_type_ids": types[:1]}]
    said, _ = faults(split("classify", wrong))
    assert "row 1: label 2 is none of the 2" in said
    assert "row 2: loss_mask or token_type_ids not of 2 tokens" in said
    verify(Split(split("text", [{"text": "some"}, {"text": " "}])), lambda line: None)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"task": "instruct"}', "null"])
@pytest.mark.parametrize("name", ["dataset.json", "index.json"])
def test_malformed_json(split, name, content):
    folder = split()
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        verify(Split(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"files": [3, {"name": "../x"}]}, {"files": {}}, {"columns": []}, {"rows": None},
        {"columns": {"input_ids": "pkl"}}, {"columns": {"a": "str"}},
        {"tokens": {"total": "many"}}, {"tokenizer": []}, {"tokenizer": {"vocab_size": "x"}},
        {"labels": 5}, {"samples": None}, {"max_seq_len": "x"},
        {"rows": {"dropped": 3}}, {"rows": {"dropped": {"why": "x"}, "kept": 3}},
    ],
)  # fmt: skip
def test_malformed_entries(split, change):
    folder = split()
    ledger = unseal(folder / "dataset.json") | change
    (folder / "dataset.json").write_text(seal(ledger))
    with pytest.raises(DataError, match=r"dataset\.json|shard"):
        verify(Split(folder), lambda line: None)


def test_index_without_ledger(split):
    folder = split()
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json: is missing"):
        Split(folder)


def test_pickled_columns_are_never_opened(split):
    folder = split()
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_encodings"] = ["pkl"] * 3
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="unsafe"):
        Split(folder)
