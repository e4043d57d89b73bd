"""Each task through the converter and back: what is learned, what is left out, and why."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from handmade import pair, talk
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.prompts import chat_templates
from overture.errors import ConfigError


def learned(row, tokenizer):
    """Return the learned texts of a row, one per run of learned tokens."""
    ids, mask = row["input_ids"], row["loss_mask"].astype(bool)
    borders = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(ids, borders), np.split(mask, borders), strict=True)
    return [tokenizer.decode(part) for part, given in parts if given[0]]


# ---- chat


def test_only_the_turns_of_the_assistant_are_learned(run, tokenizer):
    record = talk("the cat", "a dog", "old river", "new house", "not answered", system="be short")
    ledger, rows, _ = run([record], "chat", prompt_template="plain", packing="none")
    (row,) = rows
    assert learned(row, tokenizer) == ["a dog<|endoftext|>", "new house<|endoftext|>"]
    shown = record["messages"][:-1]  # what nobody answered teaches nothing
    text = tokenizer.apply_chat_template(
        shown, chat_template=chat_templates()["plain"], tokenize=False
    )
    assert tokenizer.decode(row["input_ids"]) == text.removesuffix("\n")
    assert ledger["tokens"]["trained"] == int(row["loss_mask"].sum())
    # A prompt at generation is what training saw before the answer.
    asked = tokenizer.apply_chat_template(
        shown[:2], chat_template=chat_templates()["plain"], add_generation_prompt=True
    )
    assert row["input_ids"][: len(asked)].tolist() == asked
    assert not row["loss_mask"][: len(asked)].any()


def test_the_tokenizers_own_template_and_shapes_of_other_names(run, tmp_path, smoke):
    own = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    own.chat_template = chat_templates()["chatml"]
    own.save_pretrained(tmp_path / "own")
    other = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    _, rows, _ = run(
        [talk("the", "cat"), other], "chat", tokenizer=str(tmp_path / "own"), packing="none"
    )
    assert [learned(row, own) for row in rows] == [["cat<|im_end|>"], ["a<|im_end|>"]]
    # Without a special token at the end of an answer a model could not learn to stop.
    with pytest.raises(ConfigError, match="ends no answer with a special token"):
        run([talk("the", "cat")], "chat", prompt_template="chatml")
    with pytest.raises(ConfigError, match="has no chat template; name one with"):
        run([talk("the", "cat")], "chat")


def test_conversations_that_cannot_be_learned(run):
    good = [talk(f"the {i}", f"cat {i}") for i in range(50)]
    bad = [
        talk("say", "<|endoftext|> ignore"),
        talk("say", " "),
        {"messages": [{"role": "assistant", "content": "first"}]},
        {"messages": [{"role": "robot", "content": "?"}]},
        {"messages": "none"},
        talk("long", "three cats " * 200),
    ]
    ledger, rows, rejected = run(
        good + bad, "chat", prompt_template="plain", packing="none", max_rejected=0.1
    )
    assert len(rows) == 50
    reasons = {entry["line"]: entry["reason"] for entry in rejected}
    assert reasons == {
        51: "special_token_in_text", 52: "empty_response", 53: "wrong_turns", 54: "wrong_type",
        55: "missing_field", 56: "too_long",
    }  # fmt: skip
    assert ledger["rows"]["malformed"] == {"wrong_turns": 1, "wrong_type": 1, "missing_field": 1}


def test_oldest_turns_go_first(run, tokenizer):
    record = talk("old " * 60, "one", "old " * 60, "two", "the", "three", system="be short")
    ledger, (row,), _ = run([record], "chat", prompt_template="plain")
    assert learned(row, tokenizer) == ["two<|endoftext|>", "three<|endoftext|>"]
    assert tokenizer.decode(row["input_ids"]).startswith("System: be short")
    assert ledger["rows"]["truncated"] == 1


# ---- text


def test_concatenation_loses_nothing_and_cuts_anywhere(run, tokenizer):
    texts = [" ".join(["river", "old", "house"][: i % 3 + 1] * (i % 7 + 1)) for i in range(80)]
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    records = [{"text": text} for text in texts]
    ledger, rows, _ = run(records, "text", packing="concat", max_seq_len=32)
    ids = [i for row in rows for i in row["input_ids"].tolist()]
    assert ids == stream[: len(ids)]
    assert ledger["tokens"]["left_over"] == len(stream) - len(ids) < 32
    assert all(row["document_ends"].tolist() == [32] for row in rows)
    assert all(row["loss_mask"].tolist() == [0] + [1] * 31 for row in rows)
    ledger, rows, _ = run(records, "text", packing="concat", max_seq_len=32, wrap=False)
    beginnings = {tokenizer(word)["input_ids"][0] for word in texts}
    assert all(row["input_ids"][0] in beginnings for row in rows)
    assert ledger["tokens"]["left_over"] == len(stream) - 32 * len(rows)


def test_marks_before_and_after_a_text(run, tokenizer):
    _, (row,), _ = run(
        [{"text": "old river"}], "text", bos_text="<|endoftext|>", eos_text="<|padding|>"
    )
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"])
    assert row["input_ids"][[0, -1]].tolist() == ends
    assert tokenizer.decode(row["input_ids"][1:-1]) == "old river"
    _, (row,), _ = run([{"text": "old river"}], "text", eos_text="")
    assert tokenizer.decode(row["input_ids"]) == "old river"


def test_raw_text_and_its_place(run):
    ledger, rows, _ = run([{"text": "old river"}, {"text": "é\n"}], "text", tokenizer=None)
    assert [row["text"] for row in rows] == ["old river", "é\n"]
    assert ledger["tokenizer"] is None
    assert ledger["samples"] == 2


@pytest.mark.parametrize("length", [3, 4, 5, 31, 32, 33, 34, 65])
def test_a_long_text_in_parts_has_every_token_once(run, tokenizer, length):
    word = tokenizer("a")["input_ids"]
    _, rows, _ = run([{"text": "a" * length}], "text", max_seq_len=4, packing="none")
    ids = [i for row in rows for i in row["input_ids"].tolist()]
    assert tokenizer.decode(ids) == "a" * length + "<|endoftext|>"
    assert all(2 <= len(row["input_ids"]) <= 4 for row in rows)
    assert word


def test_a_tokenizer_that_takes_text_for_its_marks(run, tmp_path):
    """As T5's does, whatever it is told: such rows are left out, and said to be."""
    pieces = [("</s>", 0.0), ("<unk>", -9.0), *((c, -2.0) for c in "▁abs</>")]
    made = Tokenizer(models.Unigram(pieces, unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    folder = str(tmp_path / "unigram")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(folder)
    records = [{"text": "a b"}, {"text": "a </s> b"}]
    ledger, rows, _ = run(records, "text", tokenizer=folder)
    assert (len(rows), ledger["rows"]["dropped"]) == (1, {"special_token_in_text": 1})
    records = [{**record, "label": "x"} for record in records]
    ledger, rows, _ = run(records, "classify", tokenizer=folder)
    assert (len(rows), ledger["rows"]["dropped"]) == (1, {"special_token_in_text": 1})


def test_a_long_text_cut_at_its_end_has_both_marks(run, tokenizer):
    ledger, rows, _ = run([{"text": "a" * 9}, {"text": "a" * 3}], "text", max_seq_len=4,
                          packing="none", overflow="truncate", bos_text="<|padding|>")  # fmt: skip
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "<|padding|>aa<|endoftext|>"
    ] * 2
    assert ledger["rows"]["truncated"] == 2


# ---- rules for rows


def test_every_bad_row_is_named_with_its_reason(run):
    lines = [pair(i) for i in range(400)]
    bad = {
        3: "{broken", 5: "[1]", 8: pair(8, response=7), 13: '{"instruction": "x"}',
        21: '{"instruction": "a", "response": "\\ud800"}', 34: pair(34, response="  "),
        55: pair(55, response=None), 89: pair(3, instruction="word " * 300),
        144: pair(144, response="word " * 300), 233: pair(7, id=9), 234: pair(8, id=9),
    }  # fmt: skip
    for row, line in bad.items():
        lines[row] = line
    ledger, rows, rejected = run(lines, "instruct", max_rejected=0.02, packing="none")
    assert {r["line"] - 1: r["reason"] for r in rejected} == {
        3: "not_json", 5: "not_object", 8: "wrong_type", 13: "missing_field", 21: "not_text",
        34: "empty_response", 55: "empty_response", 89: "too_long", 144: "too_long",
        234: "duplicate_id",
    }  # fmt: skip
    detail = next(r["detail"] for r in rejected if r["reason"] == "wrong_type")
    assert detail == "field 'response' holds int, not text"
    assert ledger["rows"]["malformed"] == {
        "not_json": 1, "not_object": 1, "wrong_type": 1, "missing_field": 1, "not_text": 1,
        "duplicate_id": 1,
    }  # fmt: skip
    assert ledger["rows"]["dropped"] == {"empty_response": 2, "too_long": 2}
    assert ledger["rows"]["kept"] == len(rows) == 390
    with pytest.raises(ConfigError, match=r"6 of 400 rows are malformed, over --max_rejected 0.01"):
        run(lines, "instruct")
    # Answers that are too long are no malformed rows.
    run([pair(i, response="word " * 300) for i in range(9)] + [pair(9)], "instruct")


def test_ids_may_be_named_or_none(run):
    records = [pair(i, id=i // 2, key=i) for i in range(10)]
    with pytest.raises(ConfigError, match="say --field id=OTHER, or --field id="):
        run(records, "instruct")
    assert len(run(records, "instruct", fields={"id": "key"}, packing="none")[1]) == 10
    assert len(run(records, "instruct", fields={"id": ""}, packing="none")[1]) == 10


def test_a_row_that_is_too_long_stops_where_that_is_asked(run):
    records = [pair(1), pair(2, response="word " * 300)]
    with pytest.raises(ConfigError, match="line 2 does not fit --max_seq_len 128"):
        run(records, "instruct", overflow="error")


def test_marks_in_a_text_stay_text(run, tokenizer):
    _, (row,), _ = run([pair(1, response="stop<|endoftext|>go")], "instruct")
    ids = row["input_ids"].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).endswith("stop<|endoftext|>go<|endoftext|>")


def test_marks_of_a_template_count_and_those_in_its_fields_do_not(run, tokenizer, tmp_path):
    template = tmp_path / "t.yaml"
    template.write_text('sections: ["{instruction}<|endoftext|>"]\nresponse: response\n')
    records = [pair(1), pair(2, response="stop<|endoftext|>go")]
    _, (row,), rejected = run(records, "instruct", prompt_template=str(template))
    assert row["input_ids"].tolist().count(tokenizer.eos_token_id) == 2
    assert [(r["line"], r["reason"]) for r in rejected] == [(2, "special_token_in_text")]


def test_marks_count_without_a_role_and_columns_that_nobody_reads_do_not(run, tokenizer, tmp_path):
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    more = {"id": len(tokenizer), "content": "<|header|>", "special": True}
    made["added_tokens"].append({**made["added_tokens"][0], **more})
    backend = Tokenizer.from_str(json.dumps(made))
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token,
                                  pad_token=tokenizer.pad_token)  # fmt: skip
    assert "<|header|>" not in own.all_special_tokens
    own.chat_template = chat_templates()["plain"]
    own.save_pretrained(tmp_path / "own")
    template = tmp_path / "t.yaml"
    template.write_text('sections: ["<|header|>{instruction}"]\nresponse: response\n')
    records = [pair(1, html="<|header|> <|endoftext|>"), pair(2, response="a<|header|>b")]
    options = {"tokenizer": str(tmp_path / "own")}
    _, (row,), rejected = run(records, "instruct", **options, prompt_template=str(template))
    assert row["input_ids"].tolist().count(len(tokenizer)) == 1
    assert [(r["line"], r["reason"]) for r in rejected] == [(2, "special_token_in_text")]
    _, rows, rejected = run([talk("q", "a"), talk("<|header|>system", "a")], "chat", **options)
    assert (len(rows), [r["line"] for r in rejected]) == (1, [2])


def test_a_template_that_asks_for_the_day_gets_the_same_one(run, tokenizer, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }}\n" + chat_templates()["plain"])
    _, (row,), _ = run([talk("q", "a")], "chat", prompt_template=str(path))
    assert tokenizer.decode(row["input_ids"]).startswith("26 Jul 2024")


@pytest.mark.data
def test_one_bos_where_the_tokenizer_uses_one(run, real_data, tmp_path):
    model = real_data / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(model)
    _, (row,), _ = run([pair(1)], "instruct", tokenizer=str(model))
    assert row["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id
    _, (row,), _ = run([pair(1, instruction="<s> say")], "instruct", tokenizer=str(model))
    assert row["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}" + chat_templates()["plain"]
    tokenizer.save_pretrained(tmp_path / "own")
    _, (row,), _ = run([talk("q", "a")], "chat", tokenizer=str(tmp_path / "own"))
    assert row["input_ids"].tolist().count(tokenizer.bos_token_id) == 1


def test_duplicates_are_counted_and_dropped_when_asked(run):
    records = [pair(i % 7) for i in range(10)]
    ledger, rows, _ = run(records, "instruct", packing="none")
    assert (len(rows), ledger["rows"]["duplicates"]) == (10, 3)
    ledger, rows, rejected = run(records, "instruct", packing="none", dedupe=True)
    assert len(rows) == 7
    assert [(r["line"], r["reason"]) for r in rejected] == [(n, "duplicate") for n in (8, 9, 10)]


def test_stratified_division(tmp_path):
    rng = random.Random(3)
    kinds = ["a"] * 70 + ["b"] * 25 + ["c"] * 5
    rng.shuffle(kinds)
    numbers = {"a": 1, "b": 2, "c": 3}  # what is divided by need not be text
    records = [pair(i, category=numbers[kind]) for i, kind in enumerate(kinds)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    job = Conversion(
        origins={"train": Origin(str(source))}, task="jsonl", out_root=str(tmp_path / "out"),
        test_fraction=0.2, stratify="category",
    )  # fmt: skip
    convert(job, lambda _: None)
    held_out = map(json.loads, (tmp_path / "out" / "test.jsonl").read_text().splitlines())
    drawn = [int(r["response"].split()[1]) for r in held_out]
    assert Counter(kinds[number] for number in drawn) == {"a": 14, "b": 5, "c": 1}


def test_ids_take_the_smallest_type(run, tmp_path, smoke):
    wide = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    wide.add_tokens([f"<{i}>" for i in range(70_000)], special_tokens=True)
    wide.save_pretrained(tmp_path / "wide")
    ledger, rows, _ = run([pair(1)], "instruct", tokenizer=str(tmp_path / "wide"))
    assert ledger["columns"]["input_ids"] == "ndarray:uint32"
    assert rows[0]["input_ids"].dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n", "has no list of sections"),
        ("sections: ['{a}']\nanswer: b\n", "unknown key 'answer'"),
        ("sections: ['{a']\nresponse: b\n", "a section cannot be filled in"),
        ("sections: ['a']\nresponse: b\n", "no section names a field"),
        ("sections: ['{a}']\nresponse: b\ncut: c\n", "cut names 'c'"),
        ("sections: ['{a}', '{b}']\nresponse: b\n", "a section holds b, which is to be learned"),
        ("sections: [\n", "is not YAML"),
    ],
)
def test_templates_from_files_are_checked(run, tmp_path, content, words):
    path = tmp_path / "t.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        run([pair(1)], "instruct", prompt_template=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overflow": "split"}, "--overflow split: --task instruct takes"),
        ({"packing": "concat"}, "--concat_tokens is for --task text, not instruct"),
        ({"labels": ("a",)}, "--labels is for --task classify"),
        ({"wrap": False}, "--no_wrap is for --task text"),
        ({"tokenizer": None}, "--tokenizer is missing"),
        ({"stratify": "category"}, "--stratify says how --test_fraction divides"),
        ({"max_rejected": 2.0}, "--max_rejected 2.0: is a share"),
        ({"size_limit": 1 << 32}, "--size_limit"),
        ({"max_seq_len": 1}, "--max_seq_len 1"),
        ({"task": "text", "tokenizer": None, "eos_text": "x"}, "needs a --tokenizer"),
        ({"origins": {"../x": Origin("a")}}, "a split's name is a folder's"),
        ({"prompt_template": "pair", "task": "text"}, "is not for --task text"),
        ({"fields": {"answr": "b"}}, "no field 'answr' is read"),
        ({"stratify": "kind", "test_fraction": 0.5}, "--stratify kind: no row has that field"),
        ({"tokenizer": "/no/such/tokenizer"}, "no such tokenizer folder"),
        ({"fields": {"context": "pasage"}}, "--field context=pasage: no row has that field"),
        ({"fields": {"id": "nosuch"}}, "--field id=nosuch: no row has that field"),
        ({"columns": ("a", "a")}, "--columns: a is there twice"),
        ({"seed": 3}, "--seed is that of --test_fraction"),
        ({"task": "text", "packing": "concat", "overflow": "drop"}, "--overflow has nothing to do"),
        (
            {"task": "text", "tokenizer": None, "max_seq_len": 3},
            "--max_seq_len needs a --tokenizer",
        ),
        ({"task": "jsonl", "tokenizer": None, "compression": "zstd"}, "--compression is for"),
        ({"task": "chat", "threads": "best"}, "holds no conversation trees"),
    ],
)
def test_what_does_not_fit_is_refused(run, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run([pair(1), pair(2)], changes.pop("task", "instruct"), **changes)
    assert not Path(tmp_path / "out").exists()


def test_a_slow_or_endless_tokenizer_is_refused(run, tmp_path, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no EOS token"):
        run([pair(1)], "instruct", tokenizer=str(tmp_path / "bare"))


# ---- text


def test_ends_longer_than_a_row_are_refused(run):
    options = {"overflow": "truncate", "max_seq_len": 4, "eos_text": "one two three four five"}
    with pytest.raises(ConfigError, match=r"--bos_text and --eos_text alone are .*raise --max_seq"):
        run([{"text": "the cat"}], "text", **options)


def test_a_field_that_may_be_left_out_is_not_overlooked(smoke, tmp_path):
    records = [{"instruction": f"say {n}", "input": "x", "response": "b"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))

    def tokens(name, **fields):
        known = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 64, "fields": fields}
        origin = {"train": Origin(str(tmp_path / "a.jsonl"))}
        job = Conversion(origin, "instruct", str(tmp_path / name), **known)
        return convert(job, say=lambda _: None)["train"]["tokens"]["total"]

    with pytest.raises(ConfigError, match="no row has 'context', but 'input'; say --field cont"):
        tokens("none")
    named = tokens("without", context="")
    assert tokens("with", context="input") > named
    # A table that was saved with its index has a column without a name.
    lines = (json.dumps({"": str(n), **row}) for n, row in enumerate(records))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert tokens("index", context="", id="") == named
