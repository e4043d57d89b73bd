"""What the inspection shows is what the shards hold and what the model is trained on."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from streaming import StreamingDataset

import handmade
import inspect_dataset
from overture.data.collate import TokenCollator
from overture.data.inspect import ledger_figures, pieces, sample_lines, samples, write_split_page
from overture.data.shards import Figures, Split
from overture.errors import ConfigError, DataError
from overture.tokenizer import load_tokenizer

DOOR = "src/inspect_dataset.py"


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


@pytest.fixture
def other(tmp_path, smoke, tokenizer):
    """Write a small split of a task and return it opened, with the text of a row, if any."""

    def ids(text):
        return np.array(tokenizer(text)["input_ids"], np.uint16)

    rows = {
        "seq2seq": [
            {"input_ids": ids("one"), "labels": np.append(ids("une chose"), np.uint16(0))},
            {"input_ids": ids("two things"), "labels": np.append(ids("deux"), np.uint16(0))},
        ],
        "classify": [
            {
                "input_ids": ids("good"),
                "token_type_ids": np.arange(len(ids("good")), dtype=np.uint8) % 2,
                "label": np.int32(n > 0),
            }
            for n in range(3)
        ],
        "text": [{"text": "a plain text"}, {"text": "with <b>tags</b>\x1b[31m"}],
    }

    def write(task, **options):
        split = tmp_path / "data" / "train"
        return Split(handmade.write(split, task, rows[task], str(smoke / "tokenizer"), **options))

    return write


class Page(HTMLParser):
    """Collects token spans by sample, and all else as text."""

    def __init__(self, html):
        super().__init__()
        self.samples, self.tags, self.text, self._span = [], [], "", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        if tag == "section":
            self.samples.append([])
        if tag == "span":
            number = re.match(r"id (\d+)|no token yet", attrs["title"])[1]
            self._span = [attrs["class"], number and int(number), attrs["title"], ""]
            self.samples[-1].append(self._span)

    def handle_endtag(self, tag):
        if tag == "span":
            self._span = None

    def handle_data(self, data):
        self.text += data
        if self._span:
            self._span[3] += data


def page_of(tmp_path, split, tokenizer, numbers=(0,), rows=None):
    file = tmp_path / "page.html"
    figures = Figures(split, len(split) if rows is None else rows)
    write_split_page(file, split, figures, tokenizer, list(numbers))
    html = file.read_text()
    assert not re.search(r"<script|https?://|@import|url\(", html)
    assert [p.name for p in tmp_path.glob("*.html*")] == ["page.html"]  # nothing aside is left
    return Page(html)


def test_counts_come_from_the_ledger(smoke):
    folder = smoke / "instruct" / "train"
    ledger = json.loads((folder / "dataset.json").read_text())
    figures = ledger_figures(Split(folder))
    total, trained = ledger["tokens"]["total"], ledger["tokens"]["trained"]
    assert figures["tokens"].startswith(f"total {total:,}, trained {trained:,}")
    assert figures["learned"] == f"{trained / total:.1%} of the tokens"
    assert figures["rows"].startswith(f"read {ledger['rows']['read']:,}, in split ")
    assert (figures["documents"], figures["task"]) == (f"{ledger['documents']:,}", "instruct")
    assert figures["tokenizer"] == ledger["tokenizer"]["name"]
    assert "files" not in figures


def test_a_ledger_moves_no_cursor_and_lacks_no_counts(other, tmp_path):
    split = other("classify", labels=["no\x1b[31m", "yes"], prompt_template="a\rb")
    figures = ledger_figures(split)
    assert figures["labels"] == "no␛[31m, yes" and figures["prompt_template"] == "a␍b"
    split.ledger |= {"packing": 1, "task": 2, "rows": [{"a": {}}]}  # shown, whatever they are
    assert ledger_figures(split)["packing"] == "1"
    split.ledger["tokens"] = {"total": "many", "trained": 3}
    with pytest.raises(DataError, match=r"dataset\.json: cannot be read"):
        ledger_figures(split)


def test_rows_are_those_of_streaming(smoke, tmp_path, tokenizer):
    stored = StreamingDataset(local=str(smoke / "instruct"), split="train", batch_size=1)
    rows = [stored[n] for n in range(len(stored))]
    packed = handmade.write(
        tmp_path / "zipped" / "train", "instruct", rows, "x", compression="zstd", size_limit=4096
    )
    for folder in (smoke / "instruct" / "train", packed):
        split = Split(folder)
        assert len(split) == len(rows)
        for number, row in enumerate(rows):
            found = split.row(number)
            assert found.pop("sample_id") == number
            assert found.keys() == row.keys()
            assert all(np.array_equal(found[name], row[name]) for name in row)
    assert len(split.readers) > 5
    assert Figures(split, len(rows)).numbers.tolist() == list(range(len(rows)))
    few = Figures(split, 10).numbers.tolist()
    assert len(few) == len(set(few)) == 10
    assert few[0] == 0 and few[-1] == len(rows) - 1


def test_statistics_are_those_of_the_rows(smoke):
    stored = StreamingDataset(local=str(smoke / "instruct"), split="train", batch_size=1)
    rows = [stored[n] for n in range(len(stored))]
    lengths = [len(row["input_ids"]) for row in rows]
    documents = [int(n) for r in rows for n in np.diff(np.append(0, r["document_ends"]))]
    learned = [int((row["loss_mask"] == 1).sum()) for row in rows]
    split = Split(smoke / "instruct" / "train")
    found = Figures(split, len(split)).summary()
    assert found["rows_read"] == found["rows_in_split"] == len(rows)
    assert (found["documents"], found["tokens"]) == (len(documents), sum(lengths))
    assert found["learned_tokens"] == sum(learned)
    assert found["learned_share"] == pytest.approx(sum(learned) / sum(lengths))
    room = len(rows) * split.ledger["max_seq_len"]
    assert found["packing_utilisation"] == pytest.approx(sum(lengths) / room)
    for name, values in (("row_lengths", lengths), ("document_lengths", documents)):
        expected = [min(values), np.median(values), np.mean(values), np.percentile(values, 99)]
        expected.append(max(values))
        assert list(found[name].values()) == pytest.approx(expected)
    for name, values in (("rows_by_length", lengths), ("documents_by_length", documents)):
        for bar, count in found[name].items():
            low, high = (int(n.replace(",", "")) for n in bar.split(" to "))
            assert count == sum(low <= value <= high for value in values)
        assert sum(found[name].values()) == len(values)


def test_statistics_of_other_tasks(other, tmp_path):
    found = Figures(split := other("seq2seq"), 2).summary()
    rows = [split.row(n) for n in range(2)]
    assert found["learned_tokens"] == sum(len(row["labels"]) for row in rows)
    assert found["tokens"] == sum(len(r["labels"]) + len(r["input_ids"]) for r in rows)
    assert found["packing_utilisation"] is None
    shutil.rmtree(tmp_path / "data")
    found = Figures(other("classify"), 3).summary()
    assert found["rows_by_label"] == {"no": 1, "yes": 2}
    assert found["learned_tokens"] is None
    shutil.rmtree(tmp_path / "data")
    found = Figures(other("text"), 2).summary()
    assert found["characters"] == 12 + len("with <b>tags</b>\x1b[31m") and "tokens" not in found


def test_scores_of_a_regression(tmp_path, smoke, tokenizer):
    columns = {**handmade.COLUMNS["classify"], "label": "float32"}
    ids, types = np.array([5, 6], np.uint16), np.array([0, 0], np.uint8)
    rows = [
        {"input_ids": ids, "token_type_ids": types, "label": np.float32(x)} for x in (0.5, 2, 5)
    ]
    folder = handmade.write(
        tmp_path / "d" / "train", "classify", rows, str(smoke / "tokenizer"), columns
    )
    split = Split(folder)
    found = Figures(split, 3).summary()
    assert found["scores"]["max"] == 5 and found["scores"]["mean"] == 2.5
    assert "label 0.5" in next(sample_lines(next(samples(split, [0], tokenizer)), False))
    assert "scoresmin0.5median2mean2.5" in page_of(tmp_path, split, tokenizer).text


def test_samples_tell_prompt_and_learned_part_apart(smoke, tokenizer):
    split = Split(smoke / "instruct" / "test")
    sample = next(samples(split, [0], tokenizer))
    lines, row = list(sample_lines(sample, colour=False)), split.row(0)
    assert lines[0] == (
        f"sample 0: {len(row['document_ends'])} documents, {len(row['input_ids'])} tokens, "
        f"{int(row['loss_mask'].sum())} learned"
    )
    masked = [int(m) for m in re.findall(r"tokens, (\d+) masked", "\n".join(lines))]
    assert sum(masked) == int((row["loss_mask"] == 0).sum())
    ids = " ".join(line.split("ids", 1)[1] for line in lines if line.startswith("  ids"))
    assert [int(i) for i in ids.split()] == row["input_ids"].tolist()
    labels = " ".join(line.split("labels", 1)[1] for line in lines if line.startswith("  labels"))
    assert [int(i) for i in labels.split()] == TokenCollator(len(row["input_ids"]), 0)([row])[
        "labels"
    ][0].tolist()
    learned = re.findall(r"\[\[(.*?)\]\]", "\n".join(lines), re.DOTALL)
    assert len(learned) == len(row["document_ends"])
    assert all(text.endswith("<|endoftext|>") for text in learned)
    coloured = "\n".join(sample_lines(sample, colour=True))
    assert coloured.count("\033[1;35m<|endoftext|>") == len(learned)
    with pytest.raises(ConfigError, match="holds samples 0 to"):
        list(samples(split, [10_000], tokenizer))


def test_other_tasks_in_the_terminal(other, tmp_path, tokenizer):
    def shown(split, number):
        sample = next(samples(split, [number], tokenizer))
        return "\n".join(sample_lines(sample, colour=False))

    text = shown(other("seq2seq"), 1)
    assert "two things[[deux<|endoftext|>]]" in text
    assert "labels  -100 " in text
    shutil.rmtree(tmp_path / "data")
    text = shown(other("classify"), 2)
    assert "label yes" in text and re.search(r"go?\{\{", text)  # the second segment
    shutil.rmtree(tmp_path / "data")
    assert "with <b>tags</b>␛[31m" in shown(other("text"), 1)  # nor does it colour the terminal


@pytest.mark.parametrize("part", ["instruct", "text"])
def test_page_draws_the_labels_of_the_collator(tmp_path, smoke, tokenizer, part):
    split = Split(smoke / part / "train")
    page, pad = page_of(tmp_path, split, tokenizer, numbers=[0, 7]), tokenizer.pad_token_id
    assert len(page.samples) == 5  # and the longest, the shortest, the most masked
    for number, spans in zip([0, 7], page.samples, strict=False):
        collate = TokenCollator(split.ledger["max_seq_len"], tokenizer.pad_token_id)
        batch = collate([split.row(number)])
        labels, count = batch["labels"][0].tolist(), batch["num_tokens"][0]
        padding = [span for span in spans if span[0] == "padding"]
        spans = [span for span in spans if span[0] != "padding"]
        assert len(spans) == count
        assert [span[1] for span in spans] == batch["input_ids"][0, :count].tolist()
        names = {-100: "prompt", tokenizer.eos_token_id: "end"}
        assert [s[0] for s in spans] == [names.get(label, "learned") for label in labels[:count]]
        missing = split.ledger["max_seq_len"] - count
        assert [span[1:] for span in padding] == (
            [[pad, f"id {pad}", f"{missing} × padding"]] if missing else []
        )
        drawn = "".join(span[3] for span in spans).replace("↵", "")
        assert drawn == tokenizer.decode(split.row(number)["input_ids"])
        ends = split.row(number)["document_ends"]
        assert f"document {len(ends) - 1}: {np.diff(ends, prepend=0)[-1]} tokens" in page.text
    lengths = [len(split.row(n)["input_ids"]) for n in range(len(split))]
    drawn = [sum(s[0] != "padding" for s in spans) for spans in page.samples]
    assert drawn[2:4] == [max(lengths), min(lengths)]
    share = [sum(s[0] in ("learned", "end") for s in spans) for spans in page.samples]
    learned = [split.row(n)["loss_mask"].mean() for n in range(len(split))]
    assert share[4] / drawn[4] == pytest.approx(min(learned))
    assert f"rows read{len(split)}" in page.text and "learned share" in page.text
    few = page_of(tmp_path, split, tokenizer, rows=10).text
    assert f"rows in split{len(split)}" in few and "rows read10" in few


def test_page_keeps_markup_as_text(tmp_path, smoke, tokenizer):
    evil = '<script>alert("1")</script> & </pre>\x00\x1b\u202e'
    ids = tokenizer(evil)["input_ids"]
    row = handmade.pack((ids, [*ids, 0]))
    name = str(smoke / "tokenizer")
    folder = tmp_path / "a<script>b" / "train"
    split = Split(handmade.write(folder, "instruct", [row], name, max_seq_len=999))
    page = page_of(tmp_path, split, tokenizer)
    assert "script" not in page.tags
    assert '<script>alert("1")</script> & </pre>␀␛' in "".join(s[3] for s in page.samples[0])
    assert "\u202e" not in page.text and "\x1b" not in page.text
    shutil.rmtree(folder)
    rows = [{"text": evil}]
    page = page_of(tmp_path, Split(handmade.write(folder, "text", rows, name)), None)
    assert "script" not in page.tags and '<script>alert("1")' in page.text


def test_pieces_of_one_character_are_readable(tokenizer):
    text = "né 日本 €\n😀 a"
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) > len(text)
    assert "".join(found) == text
    place = found.index("😀")
    assert found[place : place + 4] == ["😀", "", "", ""]
    # A character of which a part is missing, and an id that stands for nothing.
    broken = [*ids[place : place + 2], *tokenizer("ok")["input_ids"], 60_000]
    texts = pieces(tokenizer, broken)
    assert texts[0].startswith("⟨") and "".join(texts[2:-1]) == "ok" and texts[-1] == "⟨None⟩"


def test_parts_of_a_character_are_dots_on_the_page(tmp_path, smoke, tokenizer):
    ids = tokenizer("😀")["input_ids"]
    row = handmade.pack((ids, [*ids, 0]))
    folder = tmp_path / "d" / "train"
    split = Split(handmade.write(folder, "instruct", [row], str(smoke / "tokenizer")))
    spans = page_of(tmp_path, split, tokenizer).samples[0]
    assert [span[3] for span in spans[:4]] == ["😀", "·", "·", "·"]
    assert "😀[[😀<|endoftext|>]]" in "\n".join(
        sample_lines(next(samples(split, [0], tokenizer)), colour=False)
    )


def test_page_of_other_tasks(other, tmp_path, tokenizer):
    split = other("seq2seq")
    spans = page_of(tmp_path, split, tokenizer, [1]).samples[0]
    row = split.row(1)
    kinds = ["prompt"] * len(row["input_ids"]) + ["learned"] * (len(row["labels"]) - 1) + ["end"]
    assert [span[0] for span in spans] == kinds
    shutil.rmtree(tmp_path / "data")
    page = page_of(tmp_path, other("classify"), tokenizer, [2])
    assert {span[0] for span in page.samples[0]} == {"prompt", "second"}
    assert "label yes" in page.text and "rows by labelno1yes2" in page.text


@pytest.fixture
def door(monkeypatch, capsys):
    """Run the door's main function here, as a process of its own takes its time to begin."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_dataset", *map(str, arguments)])
        capsys.readouterr()
        inspect_dataset.main()
        return capsys.readouterr()

    return run


def test_door(run_door, door, smoke, tmp_path):
    done = run_door(DOOR, smoke / "instruct", "--split", "dev")
    assert done.returncode == 2
    assert "the splits there are: test, train" in done.stderr
    assert "Traceback" not in done.stderr
    test = (smoke / "instruct", "--split", "test")
    said = door(*test, "--sample", "1").out
    assert "sample 1:" in said and "\033" not in said
    page = tmp_path / "page.html"
    said = door(*test, "--stats", "--verify", "--html", page)
    assert json.loads(said.out)["rows_read"] > 0
    assert "verified" in said.err and page.read_text().startswith("<!DOCTYPE html>")


def test_door_streams_in_the_order_of_arrival(door, smoke, tmp_path):
    remote = ("--data_remote", smoke / "instruct", "--data_local", tmp_path / "cache")
    streamed = door(*remote, "--split", "test", "--sample", "0", "2")
    assert streamed.out == door(smoke / "instruct", "--split", "test", "--sample", "0", "2").out
    assert (tmp_path / "cache" / "test" / "shard.00000.mds").is_file()
    with pytest.raises(ConfigError, match="give a FOLDER"):
        door(smoke / "instruct", *remote)


def test_door_refuses_another_tokenizer(door, smoke, tmp_path):
    shutil.copytree(smoke / "tokenizer", tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not the one that"):
        door(smoke / "instruct", "--tokenizer", tmp_path / "t")
    handmade.write(tmp_path / "d" / "train", "text", [{"text": "some"}], "x")
    with pytest.raises(ConfigError, match="not the one that"):
        door(tmp_path / "d", "--tokenizer", smoke / "tokenizer")
    assert "sample 0: 4 characters" in door(tmp_path / "d").out
