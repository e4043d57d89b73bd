"""Real datasets, one documented command each; the ledger's counts equal an independent count."""

import gzip
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.shards import Split
from overture.data.verify import verify

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.data


def commands() -> dict[str, str]:
    """Return the commands of docs/data.md by the folder that they write."""
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^python src/convert_dataset.py .*$", text, re.MULTILINE)
    return {re.search(r"--out_root data/(\S+)", c)[1]: c for c in found if "$OVERTURE_DATA" in c}


def rows(path: Path, skip: int = 1) -> int:
    return path.read_bytes().removesuffix(b"\n").count(b"\n") + 1 - skip


def squad(path: Path) -> int:
    whole = json.loads((gzip.open if path.suffix == ".gz" else open)(path).read())
    return sum(len(p["qas"]) for article in whole["data"] for p in article["paragraphs"])


def oasst_threads(path: Path) -> int:
    messages = [json.loads(line) for line in path.read_text().splitlines()]
    known = {m["message_id"]: m for m in messages}
    parents = {m["parent_id"] for m in messages}
    threads = 0
    for leaf in (m for m in messages if m["message_id"] not in parents):
        while leaf and leaf["parent_id"]:
            leaf = known.get(leaf["parent_id"])
        threads += leaf is not None
    return threads


def expected(data: Path) -> dict[str, dict[str, int]]:
    """Return folder -> split -> rows, counted without the converter."""
    glue = {
        name: {s: rows(data / "glue" / folder / f"{s}.tsv", skip) for s in ("train", "dev")}
        for name, folder, skip in (
            ("cola", "CoLA", 0), ("sst2", "SST-2", 1), ("mrpc", "MRPC", 1), ("rte", "RTE", 1),
            ("stsb", "STS-B", 1),
        )
    }  # fmt: skip
    wiki = (data / "text" / "wikitext2-valid.txt").read_text().split("\n")
    return glue | {
        "dolly": {"train": 13_509, "test": 1_502},
        "jsquad": {"train": squad(data / "jglue" / "jsquad-valid-v1.3.json")},
        "jaquad": {"train": squad(data / "jaquad" / "jaquad_train.json.gz")},
        "oasst1": {"train": oasst_threads(data / "oasst1" / "oasst1-en-validation.jsonl") + 3},
        "enja": {
            split: rows(data / "small_parallel_enja" / f"{split}.en", 0)
            for split in ("train", "dev", "test")
        },
        "c4": {"train": rows(data / "text" / "c4-en-300.jsonl", 0)},
        "wikitext": {"train": sum(1 for line in wiki if line.strip())},
        "enwiki": {"train": rows(data / "text" / "enwiki-sample.jsonl", 0)},
        "botchan": {"train": rows(data / "text" / "botchan.txt", 0)},
    }


def test_every_dataset_has_a_command(real_data):
    assert set(commands()) == set(expected(real_data))


# The largest take the time of all others together.
LONG = dict.fromkeys(("jaquad", "sst2", "enja"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(n, marks=LONG.get(n, ())) for n in commands()])
def test_counts(name, real_data, tmp_path, smoke, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "src"))
    import convert_dataset

    command = commands()[name].replace("$OVERTURE_DATA", str(real_data))
    # Any tokenizer counts the same rows; this one needs no hub.
    command = re.sub(r"--tokenizer \S+", f"--tokenizer {smoke / 'tokenizer'}", command)
    command = command.replace(f"--out_root data/{name}", f"--out_root {tmp_path / name}")
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    assert not convert_dataset.main()
    for split, count in expected(real_data)[name].items():
        ledger = json.loads((tmp_path / name / split / "dataset.json").read_text())
        lost = {**ledger["rows"]["dropped"], **ledger["rows"]["malformed"]}
        assert ledger["rows"]["in_split"] == count
        assert ledger["rows"]["kept"] + sum(lost.values()) == count
        path = tmp_path / name / split / "rejected.jsonl"
        assert (len(path.read_text().splitlines()) if path.exists() else 0) == sum(lost.values())
        verify(Split(tmp_path / name / split), lambda _: None)


def test_packs_of_dolly_are_full(real_data, tmp_path):
    from transformers import GPT2TokenizerFast

    files = [str(real_data / "tokenizers" / "gpt2" / n) for n in ("encoder.json", "vocab.bpe")]
    tokenizer = GPT2TokenizerFast(vocab_file=files[0], merges_file=files[1])
    tokenizer.save_pretrained(tmp_path / "gpt2")
    source = real_data / "dolly" / "databricks-dolly-15k.jsonl"
    job = Conversion(
        origins={"train": Origin(str(source))}, task="instruct", out_root=str(tmp_path / "out"),
        tokenizer=str(tmp_path / "gpt2"), max_seq_len=2048,
    )  # fmt: skip
    ledger = convert(job, lambda _: None)["train"]
    assert ledger["packing"]["utilisation"] > 0.98
    # An independent count of what is learned: every response that is not dropped, and its EOS.
    rejected = (tmp_path / "out" / "train" / "rejected.jsonl").read_text().splitlines()
    lost = {json.loads(line)["line"] for line in rejected}
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    kept = [row["response"] for number, row in enumerate(rows, 1) if number not in lost]
    ids = tokenizer(kept, add_special_tokens=False)["input_ids"]
    assert ledger["tokens"]["trained"] == sum(len(one) + 1 for one in ids)
    assert ledger["rows"]["kept"] == len(kept) > 14_900
