"""What the inspection shows is what the ledger says and what the model is trained on."""

import json
import re

import pytest

from overture.data.inspect import ledger_lines, sample_lines
from overture.data.streams import TokenStream
from overture.errors import ConfigError
from overture.tokenizer import load_tokenizer


def test_counts_come_from_the_ledger(smoke):
    folder = smoke / "instruct" / "train"
    ledger = json.loads((folder / "dataset.json").read_text())
    text = "\n".join(ledger_lines(folder))
    assert f"{ledger['tokens']['total']:,}, {ledger['tokens']['trained']:,} learned" in text
    assert f"{ledger['documents']:,} in {ledger['samples']:,} samples" in text


def test_samples_tell_prompt_and_learned_part_apart(smoke):
    folder = smoke / "instruct" / "test"
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    dataset = TokenStream(local=str(smoke / "instruct"), split="test", batch_size=1)
    lines = list(sample_lines(folder, dataset, tokenizer, [0], colour=False))
    row = dataset[0]
    assert lines[0] == (
        f"sample 0: {len(row['document_ends'])} documents, {len(row['input_ids'])} tokens"
    )
    masked = [int(m) for m in re.findall(r"tokens, (\d+) masked", "\n".join(lines))]
    assert sum(masked) == int((row["loss_mask"] == 0).sum())
    ids = " ".join(line.split("ids", 1)[1] for line in lines if line.startswith("  ids"))
    assert [int(i) for i in ids.split()] == row["input_ids"].tolist()
    learned = re.findall(r"\[\[(.*?)\]\]", "\n".join(lines), re.DOTALL)
    assert len(learned) == len(row["document_ends"])
    assert all(text.endswith("<|endoftext|>") for text in learned)
    coloured = "\n".join(sample_lines(folder, dataset, tokenizer, [0], colour=True))
    assert "\033[" in coloured
    with pytest.raises(ConfigError, match="holds samples 0 to"):
        list(sample_lines(folder, dataset, tokenizer, [10_000], colour=False))


def test_door(run_door, smoke):
    done = run_door(
        "src/inspect_dataset.py", smoke / "instruct", "--split", "test", "--sample", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "sample 1:" in done.stdout
    done = run_door("src/inspect_dataset.py", smoke / "instruct", "--split", "dev")
    assert done.returncode == 2
    assert "the splits there are: test, train" in done.stderr
    assert "Traceback" not in done.stderr
