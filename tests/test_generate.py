"""Answers: batching and padding change nothing; prompts are those that training saw."""

import copy
import json
import re

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from overture.config.schema import GenerationConfig, ModelConfig
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.encode import Tokens
from overture.data.prompts import PromptTemplate, chat_template
from overture.data.schema import read_ledger
from overture.data.shards import Split
from overture.data.streams import TokenStream
from overture.errors import ConfigError
from overture.generate import answer, encode_prompts, read_rows
from overture.models.build import load_network
from overture.predict import ROW
from overture.talk import Talk, chat_ends
from overture.tokenizer import load_tokenizer
from overture.trained import ledgers
from overture.training.answers import Translations, _has_no_spaces, held_out_prompts, score


@pytest.fixture(scope="module")
def pair(smoke):
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    torch.manual_seed(3)
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "initializer_range": 0.5,
    }  # fmt: skip
    config = ModelConfig("llama", False, "float32", "auto", shape)
    return load_network(config, tokenizer), tokenizer


def test_prompts_and_answers_are_those_of_the_records(smoke, pair):
    _, tokenizer = pair
    dataset = TokenStream(local=str(smoke / "instruct"), split="test", batch_size=1)
    pairs = held_out_prompts(dataset, 1000)
    assert len(pairs) == 40  # every document of the split
    for prompt, response, right in pairs:
        assert right is None
        text = tokenizer.decode(prompt)
        assert text.startswith("### Instruction:\n")
        assert text.endswith("### Response:\n")
        assert response.index(tokenizer.eos_token_id) == len(response) - 1
    assert held_out_prompts(dataset, 3) == pairs[:3]


def test_batched_answers_equal_one_by_one_without_padding(pair):
    model, tokenizer = pair
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [20, 21]]
    batched, made = answer(model, tokenizer, prompts, 3, max_new_tokens=8)
    expected = 0
    for prompt, text in zip(prompts, batched, strict=True):
        ids = list(prompt)
        for _ in range(8):  # an independent loop: no cache, no padding
            following = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            expected += 1
            if following == tokenizer.eos_token_id:
                break
            ids.append(following)
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    assert made == expected


def test_model_goes_back_to_training(pair):
    model, tokenizer = pair
    model.train()
    answer(model, tokenizer, [[5]], 1, max_new_tokens=1)
    assert model.training


def test_exact_match_ignores_space_at_the_ends_only():
    assert score(" In Oslo\n", "In Oslo")[0]
    assert not score("in Oslo", "In Oslo")[0]


def test_f1_counts_characters_as_jglue_does():
    assert score("東京 タワー。", " 東京  タワー")[1] == 1.0
    assert score("OSLO", "oslo")[1] == 1.0
    assert score("abc", "abd")[1] == pytest.approx(2 / 3)
    assert score("", "a")[1] == 0.0


def test_the_best_of_all_right_answers_counts_as_jglue_has_it():
    right = ["東京タワー", "東京 TOWER。", "港区"]
    assert score("東京  tower。。", right[0], right) == (True, 1.0)
    assert score("東京", right[0], right) == (False, pytest.approx(2 * 2 / (2 + 5)))
    assert score("港", right[0], right) == (False, pytest.approx(2 / 3))
    assert score("東京 tower", right[0])[0] is False
    assert score("", right[0], right) == (False, 0.0)


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_all_answers_of_a_question_reach_its_score(smoke, pair, tmp_path, form):
    _, tokenizer = pair
    texts = {f"Which {n}?": ["Oslo", "oslo city", f"{n} Oslo"][: 1 + n % 3] for n in range(9)}
    if form == "nested":
        told = [{"question": q, "answers": [{"text": t} for t in all]} for q, all in texts.items()]
        paragraph = {"context": "Oslo is in Norway.", "qas": told}
        content = json.dumps({"data": [{"title": "Oslo", "paragraphs": [paragraph]}]})
    else:
        fixed = {"title": "Oslo", "context": "Oslo is in Norway."}
        told = [fixed | {"question": q, "answers": {"text": all}} for q, all in texts.items()]
        content = "".join(json.dumps(row) + "\n" for row in told)
    (path := tmp_path / "squad.json").write_text(content)
    common = {"max_seq_len": 128, "tokenizer": str(smoke / "tokenizer")}
    job = Conversion({"train": Origin(str(path))}, "instruct", str(tmp_path / "out"), **common)
    convert(job, say=lambda _: None)
    dataset = TokenStream(local=str(tmp_path / "out"), split="train", batch_size=1)
    assert dataset.num_samples < 9  # some rows hold several
    found = {tokenizer.decode(prompt): right for prompt, _, right in held_out_prompts(dataset, 99)}
    named = {re.search(r"Which \d\?", text).group(): right for text, right in found.items()}
    assert named == texts
    rows = [Split(tmp_path / "out" / "train").row(number) for number in range(dataset.num_samples)]
    assert sum(len(row["document_ends"]) for row in rows) == 9


def test_an_answer_ends_before_a_stop_text_whatever_is_beside_it(pair):
    model, tokenizer = pair
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16]]
    whole, _ = answer(model, tokenizer, prompts, 3, max_new_tokens=12)
    stop = re.search("[a-zA-Z]{2}", whole[0][3:]).group()
    cut, made = answer(model, tokenizer, prompts, 3, max_new_tokens=12, stop=[stop])
    assert cut == [text.split(stop)[0] for text in whole]
    assert made < 36


def test_what_a_model_came_with_as_an_end_is_one(pair):
    model, tokenizer = pair
    end = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, [end]
    _, made = answer(model, tokenizer, [[5, 6, 7]], 1, max_new_tokens=8)
    model.generation_config.eos_token_id = before
    assert made == 1


@pytest.mark.parametrize("kind", ["separator", "mark"])
def test_an_end_that_the_text_does_not_show_is_one(pair, kind, monkeypatch):
    model, tokenizer = pair
    made = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    tokenizer = copy.deepcopy(tokenizer)
    piece = tokenizer.convert_ids_to_tokens(made)
    tokenizer.add_special_tokens({"sep_token": piece})
    assert answer(model, tokenizer, [[5, 6, 7]], 1, max_new_tokens=8)[1] == 8
    if kind == "separator":  # as BERT's kind has it in the place of an end
        tokenizer.eos_token = None
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    stop = [piece] if kind == "mark" else []
    assert answer(model, tokenizer, [[5, 6, 7]], 1, max_new_tokens=8, stop=stop) == ([""], 1)


@pytest.mark.parametrize("unknown", ["<unk>", "<end>"])
def test_what_a_tokenizer_does_not_know_is_missed_by_every_answer(unknown):
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2, "one": 3, "two": 4}  # and no third
    made = Tokenizer(WordLevel(words, unk_token=unknown))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token=unknown
    )
    ids = torch.tensor(tokenizer("one two one two three one")["input_ids"] + [1])
    rows = [{"input_ids": ids, "labels": ids}]
    dataset = type("Rows", (list,), {"num_samples": 1})(rows)
    held_out = Translations(dataset, tokenizer, GenerationConfig(bleu_tokenize="none"), 80)
    # An end is none of what was meant to be said, also where it stands for the unknown.
    said = "one two one two <unk> one" if unknown == "<unk>" else "one two one two one"
    assert held_out.expected == [said]
    assert (held_out.scores(["one two one two one"])["bleu"] > 99) == (unknown == "<end>")


ROWS = [
    {"instruction": "Name a colour.", "context": "", "response": "red"},
    {"instruction": " Where?\n", "context": "Oslo is in Norway. ", "response": "In Norway"},
    {"instruction": "{text}? 100 % <|endoftext|>", "context": "a\tb", "response": "yes"},
    {"instruction": "東京はどこですか。", "context": "東京は日本の首都です。", "response": "日本"},
]


def documents(folder):
    """The (prompt, response) ids of every document of a split."""
    split, found = Split(folder), []
    for number in range(len(split)):
        row, start = split.row(number), 0
        for end in row["document_ends"].tolist():
            ids, mask = (row[name][start:end] for name in ("input_ids", "loss_mask"))
            found.append((ids[mask == 0].tolist(), ids[mask == 1].tolist()))
            start = end
    return found


class Bytes:
    """A tokenizer of bytes, of which a Japanese letter takes three, over the fixture's ids."""

    def __init__(self, tokenizer, text):
        self.inner, self.text = tokenizer, text.encode()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def batch_decode(self, rows, **_):
        return [self.text[: len(row)].decode(errors="replace") for row in rows]


def test_an_answer_ends_at_a_text_of_several_tokens_and_not_at_one_in_the_prompt(pair):
    model, tokenizer = pair
    made = Bytes(tokenizer, "東京答大阪")
    found, count = answer(model, made, [[5, 6, 7]], 1, max_new_tokens=15, stop=["答"])
    assert found == ["東京"] and count <= 9
    # What stands at the end of a prompt is no part of the answer.
    given = tokenizer("a\n")["input_ids"]
    first, _ = answer(model, tokenizer, [given], 1, max_new_tokens=3)
    stop = tokenizer.decode(given)[-1] + first[0][:1]
    cut, _ = answer(model, tokenizer, [given], 1, max_new_tokens=3, stop=[stop])
    assert cut == [text.split(stop)[0] for text in first]


def test_a_models_own_settings_do_not_bend_greedy_answers(pair):
    model, tokenizer = pair
    plain, _ = answer(model, tokenizer, [[5, 6, 7]], 1, max_new_tokens=12)
    bent = copy.deepcopy(model)
    bent.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_length=9)
    assert answer(bent, tokenizer, [[5, 6, 7]], 1, max_new_tokens=12)[0] == plain


def job(path, **changes):
    return Conversion({"train": Origin(str(path))}, "jsonl", "", **changes)


def test_prompts_of_data_are_the_ids_of_its_shards(smoke, pair, tmp_path):
    _, tokenizer = pair
    path, squad = tmp_path / "rows.jsonl", tmp_path / "squad.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    answers = [{"text": "Oslo", "answer_start": 0}]
    questions = [{"id": str(n), "question": f"Which {n}?", "answers": answers} for n in range(3)]
    paragraph = {"context": "Oslo is in Norway.", "qas": questions}
    squad.write_text(json.dumps({"data": [{"title": "Oslo", "paragraphs": [paragraph]}]}))
    for source in (path, squad):
        out = tmp_path / source.stem
        convert(
            Conversion(
                {"train": Origin(str(source))}, "instruct", str(out), max_seq_len=128,
                tokenizer=str(smoke / "tokenizer"),
            ),
            say=lambda _: None,
        )  # fmt: skip
        rows, template = read_rows(job(source), None, None, 17)
        prompts = encode_prompts(rows, template, tokenizer, 128)
        assert sorted(prompts) == sorted(prompt for prompt, _ in documents(out / "train"))
        assert all(record[template.response] for _, record in rows)


def test_a_conversation_has_the_ids_of_its_shards(smoke, pair, tmp_path):
    _, tokenizer = pair
    turns = ["Hello", "Hi!", "Where is Oslo?", "In Norway."]
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    convert(
        Conversion(
            {"train": Origin(str(tmp_path / "chat.jsonl"))}, "chat", str(tmp_path / "out"),
            max_seq_len=128, tokenizer=str(smoke / "tokenizer"), prompt_template="plain",
        ),
        say=lambda _: None,
    )  # fmt: skip
    row = Split(tmp_path / "out" / "train").row(0)
    tokenizer.chat_template = chat_template("plain")
    encoder = Talk(Tokens(tokenizer, specials=True), None, None, "drop")
    ids, (end,) = encoder.asked("", messages[:3], 128)
    learned = row["loss_mask"].nonzero()[0]
    last = learned[(learned[1:] - learned[:-1]).argmax() + 1]  # where the last answer begins
    assert ids == row["input_ids"][:last].tolist()
    assert end == row["input_ids"][-1] == tokenizer.eos_token_id
    tokenizer.chat_template = None


def test_a_sample_of_the_rows_is_the_same_each_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"instruction": f"say {n}", "response": str(n)} for n in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def said(seed):
        return [record["response"] for _, record in read_rows(job(path), None, 5, seed)[0]]

    assert said(3) == said(3) == sorted(said(3), key=int)
    assert len(said(3)) == 5
    assert said(3) != said(4)


def test_a_prompt_that_is_too_long_is_cut_where_training_would_cut_it_or_refused(pair, tmp_path):
    _, tokenizer = pair
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**ROWS[1], "context": "Oslo is in Norway. " * 40}) + "\n")
    rows, template = read_rows(job(path), None, None, 17)
    (ids,) = encode_prompts(rows, template, tokenizer, 60)
    assert 50 < len(ids) <= 60
    assert tokenizer.decode(ids).endswith("### Response:\n")
    with pytest.raises(ConfigError, match=r"line 1: a prompt of \d+ tokens, .* take 1 to 5 "):
        encode_prompts(rows, template, tokenizer, 5)


def test_a_field_of_the_template_that_is_not_in_the_data_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Where?", "answer": "Here"}) + "\n")
    with pytest.raises(ConfigError, match=r"has no field 'instruction'.*--field instruction=quest"):
        read_rows(job(path), None, None, 17)
    renamed = job(path, fields={"instruction": "question", "response": "answer"})
    ((_, record),), _ = read_rows(renamed, None, None, 17)
    assert record["response"] == "Here"
    wanted = PromptTemplate(("{title}: ", "{question}"), "answer")
    with pytest.raises(ConfigError, match="has no field 'title'"):
        read_rows(job(path), wanted, None, 17)


def test_labels_may_be_numbers_or_missing(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "x"}, {"text": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [record["label"] for _, record in read_rows(job(path), ROW, None, 17)[0]]
    assert found == ["1", "x", ""]


def test_other_data_in_the_place_of_a_runs_own_are_not_its_own(smoke, tmp_path):
    config = {"data_local": str(smoke / "instruct"), "train_loader": {"dataset": {"split": "test"}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    ledger = read_ledger(smoke / "instruct" / "test")
    row = {"samples": ledger["samples"], "tokens": ledger["tokens"]["total"]}
    for data, count in (([row], 1), ([{**row, "tokens": 7}], 0)):
        (tmp_path / "environment.json").write_text(json.dumps({"data": data}))
        assert len(ledgers(tmp_path)) == count


def test_of_several_chat_templates_the_default_is_taken(pair):
    tokenizer = copy.deepcopy(pair[1])
    tokenizer.chat_template = {"tool_use": "{{ no }}", "default": chat_template("plain")}
    assert chat_ends(tokenizer) == [tokenizer.eos_token_id]


def test_texts_without_spaces_are_known():
    assert _has_no_spaces(["東京は日本の首都です。", "これは pen です。"])
    assert not _has_no_spaces(["The capital is Tokyo (東京).", "Wo ist Oslo?"])
    assert not _has_no_spaces(["서울은 수도이다.", "1 2 3"])
