"""What a sceptical user tried on the tasks: each was silently wrong once."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from handmade import pair, talk
from overture.data.conversion import Origin
from overture.data.prompts import template
from overture.data.schema import read_ledger
from overture.data.shards import Split
from overture.errors import ConfigError


def test_special_tokens_in_pairs_and_classes_are_text_and_ends_stay(run, tokenizer):
    text = "a </s> b <|endoftext|> c"
    _, rows, _ = run([{"source": text, "target": text}], "seq2seq")
    eos = tokenizer.eos_token_id
    assert [row["labels"].tolist().count(eos) for row in rows] == [1]
    assert rows[0]["labels"][-1] == eos
    assert eos not in rows[0]["input_ids"].tolist()[:-1]
    _, rows, _ = run([{"text": text, "label": "x"}], "classify")
    assert tokenizer.decode(rows[0]["input_ids"]).count(text) == 1
    assert eos not in rows[0]["input_ids"].tolist()[:-1]


def test_a_missing_label_is_no_class(run):
    labels = ["pos", "neg", None, 1, 1.0]
    records = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    ledger, rows, rejected = run(records, "classify", max_rejected=1.0)
    assert ledger["labels"] == ["1", "neg", "pos"]
    assert [int(row["label"]) for row in rows] == [2, 1, 0, 0]
    assert [entry["reason"] for entry in rejected] == ["empty_label"]
    broken = [{"text": "a", "label": 1}, {"text": "b", "label": float("nan")}]
    _, _, rejected = run(broken, "classify", max_rejected=1.0)
    assert [entry["reason"] for entry in rejected] == ["wrong_type"]


def test_dedupe_keeps_one_of_each(run, tmp_path):
    run([pair(i % 20) for i in range(40)], "instruct", test_fraction=0.3, dedupe=True,
        packing="none")  # fmt: skip
    train, test = (Split(tmp_path / "out" / name) for name in ("train", "test"))
    assert len(train) + len(test) == 20


def test_a_dropped_row_holds_nothing_out_and_train_small_is_train(run, tmp_path):
    held = [{**pair(i), "response": ""} for i in range(5)] + [pair(7)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held))
    origins = {
        n: Origin(str(tmp_path / f)) for n, f in (("train", "in.jsonl"), ("val", "val.jsonl"))
    }
    ledger, _, _ = run([pair(i) for i in range(10)], "instruct", origins=origins)
    assert ledger["rows"]["dropped"] == {"also_held_out": 1}
    origins["train_small"] = origins.pop("train")
    with pytest.raises(KeyError, match="train"):
        run([pair(i) for i in range(10)], "instruct", origins=origins, out_root=str(tmp_path / "o"))
    ledger = read_ledger(tmp_path / "o" / "train_small")
    assert ledger["rows"]["dropped"] == {"also_held_out": 1}


def test_threads_of_one_opening_stay_together(run, tmp_path):
    records = [talk(f"opening {i // 4}", f"answer {i}") for i in range(80)]
    run(records, "chat", prompt_template="plain", test_fraction=0.2, packing="none")
    found = {}
    for name in ("train", "test"):
        ledger = read_ledger(tmp_path / "out" / name)
        found[name] = ledger["rows"]["kept"]
        assert not ledger["rows"]["dropped"]
    assert found == {"train": 64, "test": 16}


def test_a_template_that_refuses_a_row_drops_it(run, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    records = [talk("q", "a"), talk("q", "a", system="s"), {"messages": [{"role": ["user"]}]}]
    _, rows, rejected = run(records, "chat", prompt_template=str(tmp_path / "t.jinja"),
                            packing="none", max_rejected=1.0)  # fmt: skip
    assert len(rows) == 1
    assert [entry["reason"] for entry in rejected] == ["wrong_type", "template_refuses"]


def test_edited_template_is_no_resume(run, tmp_path):
    template = tmp_path / "t.yaml"
    template.write_text("sections: ['A {instruction}']\nresponse: response\n")
    records = [pair(i) for i in range(10)]
    run(records, "instruct", prompt_template=str(template))
    same = {"prompt_template": str(template), "overwrite": False, "resume": True}
    run(records, "instruct", **same)
    template.write_text("sections: ['B {instruction}']\nresponse: response\n")
    with pytest.raises(ConfigError, match="is there already and is not of this conversion"):
        run(records, "instruct", **same)


def test_one_bos_and_no_special_token_from_a_text(run, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    template = tmp_path / "t.yaml"
    template.write_text("sections: ['<s>{text}']\n")
    records = [{"text": "a cat"}, {"text": "a <s> dog"}]
    _, rows, rejected = run(records, "text", tokenizer=str(tmp_path / "bos"), packing="none",
                            prompt_template=str(template))  # fmt: skip
    assert [row["input_ids"].tolist().count(tokenizer.bos_token_id) for row in rows] == [1]
    assert [entry["reason"] for entry in rejected] == ["special_token_in_text"]


def test_a_class_row_that_cannot_be_cut_enough_is_dropped(run):
    records = [{"text": "a b c", "label": "x"}, {"text": "d e f", "text_pair": "g h", "label": "x"}]
    _, rows, _ = run([*records, {"text": "a", "label": "x"}], "classify", max_seq_len=2)
    assert all(len(row["input_ids"]) <= 2 for row in rows)


def test_templates_name_their_fields():
    assert template("dolly").fields() == {"instruction": True, "context": False, "response": True}
    with pytest.raises(ConfigError, match='did you mean "dolly"'):
        template("doly")
