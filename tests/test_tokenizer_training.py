"""Tokenizers of every kind: trained, read back by transformers, and held to their own figures."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.encode import Tokens
from overture.data.shards import Split
from overture.errors import ConfigError, GuardError
from overture.tokenizer import load_tokenizer, tokenizer_sha256
from overture.tokenizer_training import END_OF_TEXT, MASK, PADDING, Plan, train_tokenizer

WORDS = [
    "the",
    "owl",
    "hoots",
    "in",
    "forest",
    "and",
    "two",
    "small",
    "ducks",
    "swim",
    "on",
    "a",
    "pond",
    "while",
    "rain",
    "falls",
]
TEXTS = [
    " ".join(WORDS[(i * step + step // 5) % len(WORDS)] for i in range(9)) + f", {step} times.\n"
    for step in range(1, 300)
]
# kind -> (options, whether any text at all comes back)
KINDS = {
    "bytes": ({}, True),
    "bpe": ({"byte_fallback": True, "vocab_size": 360}, True),
    "unigram": ({"model": "unigram", "byte_fallback": True, "vocab_size": 320}, True),
    "unigram, no bytes": ({"model": "unigram", "vocab_size": 70}, False),
    "wordpiece": ({"model": "wordpiece", "vocab_size": 140}, False),
}
ROLES = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PADDING,
         "mask_token": MASK}  # fmt: skip


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(TEXTS))
    return path


@pytest.fixture
def made(source, tmp_path):
    """Train with some options; returns (tokenizer as transformers loads it, figures)."""

    def make(**options):
        given = {"inputs": [str(source)], "vocab_size": 300, "out": tmp_path / "out"}
        size, figures = train_tokenizer(Plan(**{**given, "overwrite": True, **options}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert size == len(tokenizer) == options.get("vocab_size", 300)
        return tokenizer, figures

    return make


def back(tokenizer, text: str) -> str:
    (ids,) = Tokens(tokenizer).ids([text])  # as conversion has it
    return tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_text_back_and_says_how_well(made, kind):
    options, takes_all = KINDS[kind]
    tokenizer, figures = made(eval_fraction=0.1, **options)
    held_out = TEXTS[9::10]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out]
    assert figures._asdict() == {
        "texts": len(held_out),
        "words": sum(len(text.split()) for text in held_out),
        "bytes": sum(len(text.encode()) for text in held_out),
        "tokens": sum(map(len, ids)),
        "unknown": 0,
        "changed": 0,
    }
    assert 1 < figures.tokens / figures.words < 4
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) <= 4
    unseen = "  two  spaces, čšž € 🎻\t日本\x00\n\n"
    if takes_all:
        assert back(tokenizer, unseen) == unseen
    else:
        assert tokenizer.unk_token_id in tokenizer(unseen)["input_ids"]
    # What spells a special token or a byte is text, and stays it.
    for text in (END_OF_TEXT, "<unk>", "<0x41>", "[SEP]", MASK):
        (found,) = Tokens(tokenizer).ids([text])
        assert not {*found.tolist()} & ({*tokenizer.all_special_ids} - {tokenizer.unk_token_id})
        assert back(tokenizer, text) == text or not takes_all


def test_what_is_said_is_learned_of_conversations_and_lines_of_a_folder(made, tmp_path):
    halves = TEXTS[::2], TEXTS[1::2]
    (tmp_path / "chats.jsonl").write_text("".join(
        json.dumps({"prompt_id": None, "conversations": [
            {"from": "human", "value": one}, {"from": "gpt", "value": other}]}) + "\n"
        for one, other in zip(*halves, strict=False)
    ))  # fmt: skip
    (tmp_path / "texts").mkdir()
    for number, half in enumerate(halves):
        (tmp_path / "texts" / f"{number}.txt").write_text("".join(half))
    talks, _ = made(inputs=[str(tmp_path / "chats.jsonl")])
    assert not {"human", "gpt"} & {*talks.get_vocab()}
    assert "the" in "".join(talks.get_vocab())
    options = {"model": "unigram", "vocab_size": 70}
    texts, figures = made(inputs=[str(tmp_path / "texts")], **options)
    assert figures.texts == 2  # every hundredth line, its end included
    assert back(texts, "the\nowl") == "the\nowl"


def test_special_tokens_have_their_roles(made):
    tokenizer, _ = made(special_tokens=["<|tool|>", "<|user|>"])
    assert {role: getattr(tokenizer, role) for role in ROLES} == ROLES
    assert tokenizer.convert_tokens_to_ids([END_OF_TEXT, PADDING, MASK, "<|tool|>"]) == [0, 1, 2, 3]
    assert len(tokenizer("a<|tool|>b")["input_ids"]) == 3
    tokenizer, _ = made(model="unigram", vocab_size=70)
    assert {role: getattr(tokenizer, role) for role in ROLES} == ROLES
    assert tokenizer.unk_token == "<unk>"


def test_word_piece_is_what_a_bert_needs(made, tmp_path):
    tokenizer, _ = made(model="wordpiece", vocab_size=140, lowercase=True)
    pair = tokenizer("The owl", "A pond")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens == ["[CLS]", "the", "owl", "[SEP]", "a", "pond", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.mask_token == "[MASK]"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "two owls", "label": "few"}) + "\n")
    row = converted(rows, "classify", tmp_path)
    assert row["input_ids"].tolist() == tokenizer("two owls")["input_ids"]


def test_the_converter_takes_a_unigram_tokenizer(made, tmp_path):
    tokenizer, _ = made(model="unigram", vocab_size=320, byte_fallback=True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "an owl: 日本"}) + "\n")
    ids = converted(rows, "text", tmp_path)["input_ids"].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "an owl: 日本"


def converted(rows: Path, task: str, tmp_path: Path) -> dict:
    origins, out = {"train": Origin(str(rows))}, tmp_path / "shards"
    job = Conversion(origins, task, str(out), tokenizer=str(tmp_path / "out"), max_seq_len=64)
    convert(job, lambda _: None)
    return Split(out / "train").row(0)


def test_chat_template_brings_its_markers(made):
    tokenizer, _ = made(chat_template="chatml")
    assert {"<|im_start|>", "<|im_end|>"} <= {*tokenizer.all_special_tokens}
    said = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "owls"}]
    ids = tokenizer.apply_chat_template(said)
    assert [tokenizer.decode(ids)] == [
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nowls<|im_end|>\n"
    ]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_coverage_leaves_rare_characters_to_bytes(made, tmp_path, source):
    source.write_text("".join(TEXTS) + "one rare ☃ and another ☂\n")
    options = {"model": "unigram", "byte_fallback": True, "vocab_size": 320, "eval_fraction": 0.0}
    tokenizer, _ = made(**options)
    assert {"☃", "☂"} <= tokenizer.get_vocab().keys()
    tokenizer, _ = made(**options, character_coverage=0.999)
    assert not {"☃", "☂"} & tokenizer.get_vocab().keys()
    assert "e" in tokenizer.get_vocab()
    assert not any("\ufffd" in piece for piece in tokenizer.get_vocab())
    assert back(tokenizer, "a ☃") == "a ☃"


def test_the_same_text_gives_the_same_tokenizer(made, tmp_path):
    for kind in ("bytes", "bpe", "unigram"):  # WordPiece's trainer numbers pieces by a hash table
        hashes = {tokenizer_sha256(made(**KINDS[kind][0])[0]) for _ in range(3)}
        assert len(hashes) == 1, kind


def test_what_is_held_out_is_not_trained_on(made, source, tmp_path):
    source.write_text("".join(t if i % 10 < 9 else "żółć " + t for i, t in enumerate(TEXTS)))
    tokenizer, figures = made(model="unigram", vocab_size=70, eval_fraction=0.1)
    assert "ż" not in tokenizer.get_vocab()
    assert figures.unknown >= figures.changed == figures.texts == 29
    more = tmp_path / "more.ja"  # any other suffix is text, too
    more.write_text("an owl\n" * 7)
    tokenizer, figures = made(model="unigram", vocab_size=75, eval_input=[str(more)])
    assert "ż" in tokenizer.get_vocab()
    assert (figures.texts, figures.words, figures.bytes) == (7, 14, 49)
    rows = tmp_path / "in.jsonl"  # of which all texts are held out, or none
    pairs = [{"instruction": f"ask {text}", "response": text} for text in TEXTS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = {"inputs": [str(rows)], "eval_fraction": 0.1, "vocab_size": 300}
    assert made(**options, prompt_template="dolly")[1].texts == 2 * 29
    pairs = [{"text": text} for text in TEXTS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert made(**options, prompt_template="text")[1].texts == 29


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 200}, r"--vocab_size 200: 256 bytes and 3 special tokens need 259"),
        ({"vocab_size": 5000}, r"--vocab_size 5000: the text gives only \d+ pieces; lower it"),
        ({"model": "unigram", "vocab_size": 20}, r"20: 3\d characters and 4 special tokens leave"),
        ({"model": "unigram", "vocab_size": 9000}, r"9000: the text gives only \d+ pieces"),
        ({"byte_fallback": True, "vocab_size": 270}, r"characters and 260 special tokens and byte"),
        ({"model": "wordpiece", "vocab_size": 30}, r"30: characters and special tokens alone take"),
        ({"model": "wordpiece", "byte_fallback": True}, r"--byte_fallback is for --model bpe or"),
        ({"model": "wordpiece", "library": "sentencepiece"}, r"--library is for --model bpe or"),
        ({"lowercase": True}, r"--lowercase is for --model wordpiece"),
        ({"character_coverage": 0.0}, r"--character_coverage 0\.0: must be above 0"),
        ({"eval_fraction": 0.9}, r"--eval_fraction 0\.9: must be from 0 to 0\.5"),
        ({"eval_fraction": 0.1, "eval_input": ["x.txt"]}, r"leave it or --eval_input out"),
        ({"special_tokens": [" x"]}, r"--special_tokens ' x': is empty, or begins or ends"),
        ({"chat_template": "nope"}, r"--chat_template nope: unknown chat template"),
        ({"inputs": ["missing.txt"]}, r"missing\.txt: no such file"),
        ({"inputs": ["latin1.txt"]}, r"latin1\.txt: cannot be read as text in UTF-8"),
        ({"inputs": ["empty.txt"], "model": "unigram"}, r"empty\.txt: there is no text in it"),
        ({"inputs": ["broken.jsonl"]}, r"broken\.jsonl: line 1 is not valid JSON"),
        (
            {"prompt_template": "dolly"},
            r"--prompt_template dolly: .*in\.txt is text, without fields",
        ),
        ({"data_subset": "en"}, r"--data_subset en: .*in\.txt is text, without fields"),
        (
            {"inputs": ["other.jsonl"], "prompt_template": "dolly"},
            r"--prompt_template dolly: other\.jsonl: line 1 has none of its fields \(instr",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_what_was_there(
    made, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    Path("latin1.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    Path("empty.txt").touch()
    Path("broken.jsonl").write_text("{\n")
    Path("other.jsonl").write_text('{"text": "the owl"}\n')
    made()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match=words) as caught:
        made(**options)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_folders_in_use_stay(made, source, tmp_path):
    made()
    with pytest.raises(ConfigError, match="is there already; give --overwrite"):
        made(overwrite=False)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds no tokenizer, so it is not replaced"):
        made(out=tmp_path / "work")
    assert (tmp_path / "work" / "thesis.tex").exists()


def test_a_full_disk_leaves_the_tokenizer_that_was_there(made, tmp_path, monkeypatch):
    made()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(self, folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # as tokenizers have it

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(GuardError, match=r"out: cannot be written .*No space left"):
        made()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_broken_chat_template_is_refused(made, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages[7].content }}")
    with pytest.raises(ConfigError, match="the chat template"):
        made(chat_template=str(tmp_path / "chat.jinja"))


def test_sentencepiece_that_is_missing_is_named(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="--library sentencepiece: the package is missing"):
        made(library="sentencepiece", model="unigram")


@pytest.mark.parametrize(("model", "size"), [("unigram", 320), ("bpe", 400)])
def test_sentencepiece_model_and_tokenizer_agree(made, tmp_path, model, size):
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"library": "sentencepiece", "model": model, "byte_fallback": True}
    tokenizer, figures = made(**options, vocab_size=size, special_tokens=["<|tool|>"])
    assert figures.tokens
    assert (figures.unknown, figures.changed) == (0, 0)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert [theirs.id_to_piece(i) for i in range(size)] == tokenizer.convert_ids_to_tokens(
        range(size)
    )
    for text in [*(t.strip() for t in TEXTS[:50]), "unseen: čšž 日本 🎻"]:
        assert theirs.encode(text) == tokenizer(text)["input_ids"]
        assert back(tokenizer, text) == text
    with pytest.raises(ConfigError, match="--library sentencepiece: "):
        made(**options, vocab_size=20_000)


def test_the_door_prints_size_and_figures(run_door, source, tmp_path):
    done = run_door("src/train_tokenizer.py", "--input", source, "--vocab_size", 320, "--out",
                    tmp_path / "t", "--model", "unigram", "--byte_fallback")  # fmt: skip
    assert done.returncode == 0, done.stderr
    size, held_out, fertility, unknown = done.stdout.splitlines()
    assert size == f"{tmp_path / 't'}: 320 pieces"
    assert held_out.startswith("held out: 2 texts, 22 words, ")
    assert " tokens a word, 0." in fertility
    assert unknown == "unknown: 0.0000% of the tokens; round trip: 0 of 2 texts come back changed"


@pytest.mark.data
@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_botchan_at_two_thousand_pieces(made, real_data, model):
    text = real_data / "text" / "botchan.txt"
    tokenizer, figures = made(
        inputs=[str(text)], vocab_size=2000, model=model, byte_fallback=model == "unigram"
    )
    held_out = text.read_bytes().decode("utf-8-sig").splitlines(keepends=True)[99::100]
    assert figures.texts == len(held_out) == 42
    assert figures.tokens == sum(len(tokenizer(t)["input_ids"]) for t in held_out)
    assert (figures.unknown, figures.changed) == (0, 0)
    assert 1.5 < figures.tokens / figures.words < 2.0
    assert 0.25 < figures.tokens / figures.bytes < 0.36


@pytest.mark.data
def test_japanese_comes_back_whole(made, real_data, tmp_path):
    with gzip.open(real_data / "jaquad" / "jaquad_dev.json.gz") as file:
        articles = json.load(file)["data"]
    texts = [part["context"] + "\n" for article in articles for part in article["paragraphs"]]
    (tmp_path / "train.ja").write_text("".join(texts[:120]))
    (tmp_path / "dev.ja").write_text("".join(texts[1000:1050]))
    tokenizer, figures = made(
        inputs=[str(tmp_path / "train.ja")], vocab_size=2500, model="unigram", byte_fallback=True,
        character_coverage=0.9995, eval_input=[str(tmp_path / "dev.ja")],
    )  # fmt: skip
    held_out = re.findall(r".*\n", "".join(texts[1000:1050]))
    assert figures.texts == len(held_out)
    assert figures.bytes == len("".join(held_out).encode())
    assert figures.tokens == sum(len(tokenizer(text)["input_ids"]) for text in held_out)
    assert (figures.unknown, figures.changed) == (0, 0)
    assert 0.15 < figures.tokens / figures.bytes < 0.35  # most characters are three bytes
    rare = "薔薇と憂鬱。𠮷野家"
    assert back(load_tokenizer(str(tmp_path / "out")), rare) == rare
    assert any(piece.startswith("<0x") for piece in tokenizer.tokenize(rare))
