"""Ids put together from words equal the library's own, for every character and any mixture."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from overture.data.word_cache import _KNOWN, SAFE, WordCache

LLAMA_3, QWEN_2 = _KNOWN
TEXTS = [
    "It's the THIRD river's   end,\n\nwasn't it?  1234567 hears (old) “dogs”…",
    "\tfor i in range(10):\r\n    print(i)  # é ü ß  \n\n\n",
    "I'VE SEEN I'M he'd they'll we're   'quoted' ''s don''t \u2013 \u2014 a\u2019s",
]
SAFE_CHARACTERS = [chr(i) for i in range(0x3000) if SAFE.fullmatch(chr(i))]


def trained(pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def split(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


KINDS = {
    "gpt2": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt-neox": trained(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()),
    "llama-3": trained(split(LLAMA_3)),
    "qwen-2": trained(split(QWEN_2)),
}


def library(tokenizer, texts):
    return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


def ours(cache, texts):
    return [ids.tolist() for ids in cache.ids(texts)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_in_every_company(kind):
    cache = WordCache.of(KINDS[kind])
    texts = list(TEXTS)
    for c in SAFE_CHARACTERS:
        texts += [
            c,
            f"a{c}b",
            f" {c}",
            f"{c} a",
            f"1{c}1",
            f"!{c}!",
            f"{c}{c}a",
            f"\n{c}\n",
            f"'{c}",
        ]
    assert ours(cache, texts) == library(KINDS[kind], texts)


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.lists(
        st.one_of(
            st.text(st.sampled_from(SAFE_CHARACTERS), max_size=12),
            st.text("aZé19 \t\n\r'!_-stmdrevl", max_size=20),
        ),
        max_size=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_random_texts(kind, texts):
    whole = [*texts, "".join(texts), " ".join(texts), "<|endoftext|>".join(texts)]
    assert ours(WordCache.of(KINDS[kind]), whole) == library(KINDS[kind], whole)


def test_a_full_cache_forgets_and_goes_on(monkeypatch):
    monkeypatch.setattr("overture.data.word_cache.MAX_WORDS", 5)
    cache = WordCache.of(KINDS["gpt2"])
    for text in TEXTS * 2:
        assert ours(cache, [text]) == library(KINDS["gpt2"], [text])
    assert len(cache._known) < 60


@pytest.mark.parametrize(
    "spoil",
    [
        lambda parts: parts.update(normalizer={"type": "Lowercase"}),
        lambda parts: parts["model"].update(dropout=0.1),
        lambda parts: parts["pre_tokenizer"].update(add_prefix_space=True),
        lambda parts: parts.update(pre_tokenizer={"type": "Whitespace"}),
        lambda parts: parts.update(pre_tokenizer=None),
        lambda parts: parts["added_tokens"][0].update(special=False),
    ],
)
def test_other_kinds_are_left_to_the_library(spoil):
    parts = json.loads(KINDS["gpt2"].to_str())
    spoil(parts)
    other = Tokenizer.from_str(json.dumps(parts))
    other.encode_special_tokens = True
    assert WordCache.of(other) is None


def test_special_tokens_that_count_as_such_are_left_to_the_library():
    other = Tokenizer.from_str(KINDS["gpt2"].to_str())
    assert WordCache.of(other) is None


@pytest.mark.data
def test_dolly_with_the_real_tokenizer(real_data):
    from transformers import GPT2TokenizerFast

    files = [str(real_data / "tokenizers" / "gpt2" / n) for n in ("encoder.json", "vocab.bpe")]
    backend = GPT2TokenizerFast(vocab_file=files[0], merges_file=files[1]).backend_tokenizer
    backend.encode_special_tokens = True
    lines = (real_data / "dolly" / "databricks-dolly-15k.jsonl").read_text().splitlines()
    texts = [t for line in lines[:3000] for t in json.loads(line).values() if SAFE.fullmatch(t)]
    assert len(texts) > 10_000
    assert ours(WordCache.of(backend), texts) == library(backend, texts)
