"""Pairs and labels through the converter and back."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from overture.errors import ConfigError


def test_pairs(run, smoke, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smoke / "tokenizer")
    records = [{"source": "the cat", "target": "a dog"}, {"source": "x " * 200, "target": "b"},
               {"source": "c", "target": "y " * 200}]  # fmt: skip
    ledger, rows, rejected = run(records, "seq2seq")
    assert rows[0]["input_ids"].tolist() == tokenizer("the cat")["input_ids"]
    assert rows[0]["labels"].tolist() == [*tokenizer("a dog")["input_ids"], tokenizer.eos_token_id]
    assert rows[0]["labels"].dtype == np.uint16
    assert len(rows[1]["input_ids"]) <= 128
    assert [(r["line"], r["reason"]) for r in rejected] == [(3, "too_long")]
    assert ledger["rows"]["truncated"] == 1
    template = tmp_path / "en_ja.yaml"
    template.write_text('sections: ["to Japanese: {en}"]\nresponse: ja\ncut: en\n')
    _, rows, _ = run([{"en": "cat", "ja": "ねこ"}], "seq2seq", prompt_template=str(template))
    assert tokenizer.decode(rows[0]["input_ids"]) == "to Japanese: cat"


def test_classes_by_name(run, tokenizer):
    records = [{"text": "good", "label": "yes"}, {"text": "bad", "text_pair": "b", "label": "no"}]
    ledger, rows, _ = run(records, "classify")
    assert ledger["labels"] == ["no", "yes"]
    assert [int(row["label"]) for row in rows] == [1, 0]
    # This tokenizer puts nothing between two texts, so a new line stands there.
    assert rows[1]["input_ids"].tolist() == tokenizer("bad", "\nb")["input_ids"]
    assert len(rows[1]["token_type_ids"]) == len(rows[1]["input_ids"])
    ledger, rows, _ = run(records, "classify", labels=("yes", "no"))
    assert [int(row["label"]) for row in rows] == [0, 1]
    numbers = [{"text": "a", "label": n} for n in (10, 9, 10)]
    assert run(numbers, "classify")[0]["labels"] == ["9", "10"]
    with pytest.raises(ConfigError, match=r"--labels: these .* none of yes: 'no' \(1 rows\)"):
        run(records, "classify", labels=("yes",))
    with pytest.raises(ConfigError, match="say --regression"):
        run([{"text": "a", "label": 0.5}], "classify")
    ledger, rows, _ = run([{"text": "a", "label": 0.5}], "classify", regression=True)
    assert (ledger["labels"], float(rows[0]["label"])) == (None, 0.5)
    with pytest.raises(ConfigError, match=r"are no number: 'yes' \(1 rows\), 'no' \(1 rows\)"):
        run(records, "classify", regression=True)
    many = [{"text": "a", "label": f"l{n % 8}"} for n in range(24)]
    with pytest.raises(ConfigError, match=r"none of l0: 'l1' \(3 rows\),.* and 2 more"):
        run(many, "classify", labels=("l0",))


def test_two_texts_never_run_together(run, tmp_path):
    """Of a pair too where the tokenizer has no border of its own."""
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "|": 2, "</s>": 3}, unk_token="b"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # which takes a new line for a space
    folder = str(tmp_path / "words")
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(folder)
    _, (row,), _ = run(
        [{"text": "a", "text_pair": "b", "label": "x"}], "classify", tokenizer=folder
    )
    assert row["input_ids"].tolist() == [0, 2, 1]
    plain.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(folder)
    _, (row,), _ = run(
        [{"text": "a", "text_pair": "b", "label": "x"}], "classify", tokenizer=folder
    )
    assert row["input_ids"].tolist() == [0, 3, 1, 3]


def test_a_second_text_may_be_left_out(run):
    records = [{"sentence1": f"a{n}", "sentence2": "b", "label": "xy"[n % 2]} for n in range(6)]
    fields = {"text": "sentence1"}
    with pytest.raises(ConfigError, match="or --field text_pair= for none"):
        run(records, "classify", fields=fields, packing="none")
    _, rows, _ = run(records, "classify", fields={**fields, "text_pair": ""}, packing="none")
    assert len(rows) == 6
