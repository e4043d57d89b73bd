"""Conversion through the real door's function, read back through the real reader."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.schema import read_ledger
from overture.data.shards import Split
from overture.errors import ConfigError
from overture.tokenizer import load_tokenizer

WORDS = ["the", "a", "cat", "dog", "sees", "hears", "old", "new", "river", "house", "green", "blue"]
WORDS += ["three", "seven"]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [
        {
            "instruction": f"{text(2, 6)} {number}",
            "context": text(5, 30) if number % 3 else "",
            "response": text(1, 8),
            "category": "qa",
        }
        for number in range(count)
    ]


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def job(tmp_path, smoke):
    """A function that converts rows with defaults fit for a test."""

    def run(records, **changes):
        source = records if isinstance(records, str) else write(tmp_path / "in.jsonl", records)
        options = {
            "origins": {"train": Origin(source)},
            "task": "instruct",
            "out_root": str(tmp_path / "out"),
            "tokenizer": str(smoke / "tokenizer"),
            "max_seq_len": 128,
        }
        if changes.get("task") == "jsonl":
            del options["max_seq_len"]
        changes = {name: str(v) if name == "out_root" else v for name, v in changes.items()}
        said: list[str] = []
        ledgers = convert(Conversion(**{**options, **changes}), said.append)
        return ledgers, tmp_path / "out", "\n".join(said)

    return run


def documents(root: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """Read (ids, mask) of every document back."""
    rows = Split(Path(root) / split)
    found = []
    for row in map(rows.row, range(len(rows))):
        starts = [0, *row["document_ends"][:-1].tolist()]
        for start, end in zip(starts, row["document_ends"].tolist(), strict=True):
            ids, mask = row["input_ids"][start:end], row["loss_mask"][start:end]
            found.append((ids.tolist(), mask.tolist()))
    return found


def test_documents_equal_an_independent_encoding(job, smoke):
    records = rows(60)
    ledgers, root, _ = job(records)
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    expected = []
    for r in records:
        prompt = "### Instruction:\n" + r["instruction"] + "\n\n"
        prompt += f"### Context:\n{r['context']}\n\n" if r["context"] else ""
        prompt = tokenizer(prompt + "### Response:\n", add_special_tokens=False)["input_ids"]
        answer = tokenizer(r["response"], add_special_tokens=False)["input_ids"]
        learned = [*answer, tokenizer.eos_token_id]
        expected.append((prompt + learned, [0] * len(prompt) + [1] * len(learned)))
    found = documents(root, "train")
    assert sorted(found) == sorted(expected)
    ledger = ledgers["train"]
    assert ledger["tokens"]["total"] == sum(len(ids) for ids, _ in expected)
    assert ledger["tokens"]["trained"] == sum(sum(mask) for _, mask in expected)
    assert ledger["documents"] == ledger["rows"]["kept"] == 60
    ids, mask = found[0]
    assert tokenizer.decode(np.array(ids)[np.array(mask) == 1][:-1]) in {
        r["response"] for r in records
    }


def test_packing_none_keeps_a_document_a_row(job):
    packed, root, _ = job(rows(40))
    apart, _, _ = job(rows(40), out_root=root.parent / "apart", packing="none")
    assert apart["train"]["samples"] == 40 > packed["train"]["samples"]
    assert sorted(documents(root, "train")) == sorted(documents(root.parent / "apart", "train"))


def test_split_is_rounded_up_drawn_before_drops_and_by_seed(job):
    records = rows(95)
    records[3]["response"] = "  "
    ledgers, root, _ = job(records, test_fraction=0.1)
    assert (ledgers["train"]["rows"]["in_split"], ledgers["test"]["rows"]["in_split"]) == (85, 10)
    dropped = ledgers["train"]["rows"]["dropped"] | ledgers["test"]["rows"]["dropped"]
    assert dropped == {"empty_response": 1}
    job(records, test_fraction=0.1, out_root=root.parent / "again", seed=18)
    assert documents(root, "test") != documents(root.parent / "again", "test")


def test_no_held_out_prompt_stays_in_train(job):
    records = rows(50) + [{**r, "response": "other"} for r in rows(50)]
    ledgers, root, _ = job(records, test_fraction=0.2, task="jsonl", tokenizer=None)

    def prompts(split):
        lines = (root / f"{split}.jsonl").read_text().splitlines()
        return [(json.loads(x)["instruction"], json.loads(x)["context"]) for x in lines]

    assert len(prompts("test")) == 20
    assert not set(prompts("train")) & set(prompts("test"))
    assert ledgers["train"]["rows"]["dropped"]["also_held_out"] == 80 - len(prompts("train")) > 0


def test_jsonl_keeps_what_is_no_text(job):
    records = [{**rows(1)[0], "id": 5, "n": 3, "tags": ["a"]}]
    _, root, said = job(
        [*records, {"instruction": 1}], task="jsonl", tokenizer=None, max_rejected=1
    )
    assert [json.loads(x) for x in (root / "train.jsonl").read_text().splitlines()] == records
    assert "1 rows (dropped: 1 wrong_type)" in said
    (entry,) = map(json.loads, (root / "rejected-train.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (2, "wrong_type")


def test_a_file_name_that_is_no_utf8(job, tmp_path):
    name = os.fsdecode(b"caf\xe9.jsonl")
    write(tmp_path / name, rows(20))
    ledgers, root, _ = job(str(tmp_path / name))
    assert read_ledger(root / "train")["source"]["name"] == ledgers["train"]["source"]["name"]


def test_held_out_prompts_are_known_across_files(job, tmp_path):
    train, test = write(tmp_path / "a.jsonl", rows(30)), write(tmp_path / "b.jsonl", rows(5))
    ledgers, _, _ = job("", origins={"train": Origin(train), "test": Origin(test)})
    assert ledgers["train"]["rows"]["dropped"] == {"also_held_out": 5}
    assert ledgers["test"]["rows"]["kept"] == 5


def test_same_input_gives_the_same_bytes(job):
    _, root, _ = job(rows(80), test_fraction=0.1)
    job(rows(80), test_fraction=0.1, out_root=root.parent / "again")
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert len(files) == 6
    for file in files:
        assert (root / file).read_bytes() == (root.parent / "again" / file).read_bytes()


def test_long_context_is_cut_and_the_answer_never_is(job, smoke):
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    long = {"instruction": "sum up", "context": "old river " * 200, "response": "green house"}
    emoji = {
        "instruction": "sum up",
        "context": "\U0001f355\U0001f32e" * 100,
        "response": "blue dog",
    }
    hopeless = {"instruction": "say", "context": "", "response": "three cats " * 100}
    ledgers, root, _ = job([long, emoji, hopeless], max_seq_len=64)
    assert ledgers["train"]["rows"]["dropped"] == {"too_long": 1}
    assert ledgers["train"]["rows"]["truncated"] == 2
    found = documents(root, "train")
    assert [len(ids) <= 64 for ids, _ in found] == [True, True]
    assert max(len(ids) for ids, _ in found) > 56  # cut to fit, not to nothing
    texts = [tokenizer.decode(ids) for ids, _ in found]
    assert any(t.endswith("### Response:\ngreen house<|endoftext|>") for t in texts)
    assert all("### Context:" in t and "### Instruction:\nsum up" in t for t in texts)
    ledgers, _, _ = job([long], max_seq_len=64, overflow="truncate_prompt", overwrite=True)
    with pytest.raises(ConfigError, match="no row is left"):
        job([long], max_seq_len=64, overflow="drop", overwrite=True)
    # The failed conversion left what was there before.
    assert len(documents(root, "train")) == 1


def test_text_is_split_and_first_tokens_are_not_learned(job, smoke):
    records = [{"text": "river house " * 100}, {"text": "a cat"}, {"text": ""}]
    ledgers, root, _ = job(records, task="text", prompt_template="text", max_seq_len=32)
    found = documents(root, "train")
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    ids = [i for doc, _ in sorted(found, key=lambda d: -len(d[0])) for i in doc]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert all(len(doc) <= 32 and mask == [0] + [1] * (len(doc) - 1) for doc, mask in found)
    assert ledgers["train"]["rows"]["split"] == 1
    assert ledgers["train"]["rows"]["dropped"] == {"empty_text": 1}


def test_existing_split_is_refused_and_replaced_only_when_asked(job):
    _, root, _ = job(rows(10))
    before = (root / "train" / "dataset.json").read_bytes()
    with pytest.raises(ConfigError, match=r"out/train is there already; give --overwrite"):
        job(rows(20))
    assert (root / "train" / "dataset.json").read_bytes() == before
    ledgers, _, _ = job(rows(20), overwrite=True)
    assert ledgers["train"]["rows"]["kept"] == len(documents(root, "train")) == 20
    assert [p.name for p in root.iterdir()] == ["train"]


def test_a_write_that_fails_half_way_leaves_what_was_there(job, smoke, tmp_path):
    _, root, _ = job(rows(10))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    source = write(tmp_path / "more.jsonl", rows(600))
    done = subprocess.run(
        [sys.executable, "src/convert_dataset.py", "--dataset", source, "--task", "instruct",
         "--tokenizer", smoke / "tokenizer", "--max_seq_len", "128", "--out_root", root,
         "--overwrite"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
        # No file may grow past 30 kB: the shard's write fails as it does on a full disk.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)),
    )  # fmt: skip
    assert done.returncode == 5
    assert "File too large" in done.stderr
    assert "run the same command again with --resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (root / "train").iterdir()} == before
    # The next conversion clears up what is left of this one.
    job(rows(10), overwrite=True)
    assert [p.name for p in root.iterdir()] == ["train"]


def test_findings_are_said(job):
    records = rows(12)
    records[4] = dict(records[2])
    _, _, said = job(records)
    assert "rows               12" in said
    assert "empty context      4" in said
    assert "categories         qa 12" in said
    assert "duplicates         1 rows, 1 repeated prompts" in said
    assert said.count("sample ") == 3


def test_a_field_of_the_template_is_counted_once(job, tmp_path):
    text = 'sections: ["{category}: {instruction} "]\nresponse: response\ncut: instruction\n'
    (tmp_path / "own.yaml").write_text(text)
    records = rows(12)
    records[3]["category"] = ""
    _, _, said = job(records, prompt_template=str(tmp_path / "own.yaml"), max_rejected=1)
    assert "empty category     1" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"instruction": "a", "context": "", "response": "b"}\n{"x": \n',
            "line 2 is not valid JSON",
        ),
        ("[1]\n", "line 1 holds no JSON object"),
        ("", "holds no records"),
        (
            '{"instruction": "a", "output": "b"}\n',
            "1 of 1 rows are malformed, over --max_rejected 0.01 (1 missing_field, first: line 1 "
            "has no field 'response'); the fields there are: instruction, output (did you mean "
            '"--field response=output"?)',
        ),
        ('{"instruction": "a", "response": 3}\n', "line 1 field 'response' holds int, not text"),
        ('{"instruction": "a", "response": null}\n', "no row is left for 'train'"),
    ],
)
def test_bad_files_get_a_sentence(job, tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        job(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_renamed_fields(job):
    records = [{"q": r["instruction"], "a": r["response"]} for r in rows(5)]
    ledgers, root, _ = job(records, fields={"instruction": "q", "response": "a"})
    assert ledgers["train"]["rows"]["kept"] == 5
    assert sorted(documents(root, "train")) != []


def test_fields_inside_of_a_field(job):
    flat = [{"instruction": r["instruction"], "response": r["response"]} for r in rows(5)]
    _, root, _ = job(flat)
    expected = documents(root, "train")
    records = [{"said": {"q": r["instruction"], "to": {"a": r["response"]}}} for r in flat]
    job(records, fields={"instruction": "said.q", "response": "said.to.a"}, out_root=root / "in")
    assert documents(root / "in", "train") == expected != []
    # An empty one is dropped, as a flat one is; identifiers may be inside too.
    records += [{"said": {"q": "x", "to": {"a": None}}, "of": {"id": "1"}}] * 2
    fields = {"instruction": "said.q", "response": "said.to.a", "id": "of.id"}
    ledgers, *_ = job(records, fields=fields, max_rejected=0.2, out_root=root / "more")
    found = ledgers["train"]["rows"]
    assert (found["dropped"], found["malformed"]) == ({"empty_response": 1}, {"duplicate_id": 1})
    wrong = {"fields": {"instruction": "said.q", "response": "said.to.b"}, "max_rejected": 1.0}
    with pytest.raises(ConfigError, match="no row has that field"):
        job(records, **wrong, out_root=root / "none")


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "missing.jsonl", "./x"])
def test_missing_source(job, name):
    with pytest.raises(ConfigError, match="no such file"):
        job(name)


def test_compressed_shards_read_back_the_same(job):
    _, root, _ = job(rows(30))
    job(rows(30), compression="zstd", out_root=root.parent / "zstd")
    assert list((root.parent / "zstd" / "train").glob("*.zstd"))
    assert documents(root, "train") == documents(root.parent / "zstd", "train")


def test_split_that_cannot_be_made_leaves_the_other_out_too(job, tmp_path):
    train = write(tmp_path / "a.jsonl", rows(10))
    test = write(tmp_path / "b.jsonl", [{**rows(11)[10], "response": " "}])
    with pytest.raises(ConfigError, match="no row is left for 'test'"):
        job("", origins={"train": Origin(train), "test": Origin(test)})
    assert not (tmp_path / "out").exists()


def test_split_of_another_draw_from_the_same_source_is_refused(job, tmp_path):
    source = write(tmp_path / "a.jsonl", rows(20))
    job(source, test_fraction=0.2)
    with pytest.raises(ConfigError, match="out/test was drawn from the same"):
        job(source, overwrite=True)
    two = {"a": Origin(source), "b": Origin(write(tmp_path / "b.jsonl", rows(30)))}
    for origins in (two, {"a": Origin(source, "train", 0, 9)}):  # one of them made anew
        job("", origins=origins, overwrite=True, out_root=tmp_path / "two")


def test_named_field_wins_over_one_of_our_name(job, smoke):
    record = {"instruction": "say", "output": "wanted", "response": "other"}
    _, root, _ = job([record], fields={"response": "output"})
    ((ids, _),) = documents(root, "train")
    assert "wanted" in load_tokenizer(str(smoke / "tokenizer")).decode(ids)
    with pytest.raises(ConfigError, match=r'--field respnse=.*did you mean "response"'):
        job([record], fields={"respnse": "output"}, overwrite=True)


def test_lone_surrogate_names_its_line(job, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a", "response": "\\ud800"}\n')
    with pytest.raises(ConfigError, match=r"line 1 field 'response' holds .* half of a surrogate"):
        job(str(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--dataset", "embedded", "--field", "response"], "--field is written OURS=THEIRS"),
        (["--dataset", "embedded", "--test_fraction", "1.5"], "--test_fraction 1.5"),
        (["--splits", "a.jsonl"], "--splits is written SPLIT=DATASET"),
        (["--splits", "dev=a", "--test_fraction", "0.1"], "give no other names"),
        (["--dataset", "embedded", "--prompt_template", "text"], "is not for --task instruct"),
        (
            ["--dataset", "a", "--task", "chat", "--test_fraction", "0.1", "--stratify", "x"],
            "--stratify is for --task text or instruct",
        ),
    ],
)
def test_door_refuses_with_one_sentence(run_door, tmp_path, options, words):
    done = run_door(
        "src/convert_dataset.py", "--task", "instruct", "--out_root", tmp_path / "x",
        "--tokenizer", "data/smoke/tokenizer", *options,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.data
def test_dolly_counts(job, real_data, smoke):
    source = real_data / "dolly" / "databricks-dolly-15k.jsonl"
    ledgers, _, said = job(str(source), test_fraction=0.1, max_seq_len=512)
    assert "rows               15,011" in said
    for field, empty in (("instruction", 0), ("context", 10_544), ("response", 0), ("category", 0)):
        assert f"empty {field:<12} {empty:,}" in said
    assert ledgers["train"]["rows"]["in_split"] == 13_509
    assert ledgers["test"]["rows"]["in_split"] == 1_502
    assert ledgers["train"]["packing"]["utilisation"] > 0.98
    for ledger in ledgers.values():
        counted = ledger["rows"]["kept"] + sum(ledger["rows"]["dropped"].values())
        assert counted == ledger["rows"]["in_split"]
