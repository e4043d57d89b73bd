"""Properties that hold for any document: nothing is lost, and only the answer is learned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overture.data.collate import TokenCollator
from overture.data.encode import InstructEncoder, TextEncoder, Tokens
from overture.data.packing import best_fit, concatenate
from overture.data.prompts import template
from overture.tokenizer import load_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
FILLED = TEXT.filter(str.strip)
LENGTH = 192


@pytest.fixture(scope="module")
def tokens(smoke):
    return Tokens(load_tokenizer(str(smoke / "tokenizer")))


def sample(documents):
    return {
        "input_ids": np.concatenate([d["input_ids"] for d in documents]).astype(np.uint16),
        "loss_mask": np.concatenate([d["loss_mask"] for d in documents]),
        "document_ends": np.cumsum([len(d["input_ids"]) for d in documents], dtype=np.uint32),
        "sample_id": 0,
    }


@given(st.lists(st.tuples(FILLED, TEXT, FILLED), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_labels_are_the_answers_and_decode_to_them(tokens, rows):
    records = [dict(zip(("instruction", "context", "response"), r, strict=True)) for r in rows]
    encoder = InstructEncoder(tokens, template("dolly"), LENGTH, "drop")
    encoded = encoder.encode(records)
    lost = {number for number, _ in encoded.drops}
    kept = [r for number, r in enumerate(records) if number not in lost]
    assert len(encoded.documents) == len(kept)
    lengths = [len(d["input_ids"]) for d in encoded.documents]
    packs = best_fit(lengths, LENGTH) if lengths else []
    assert sorted(i for pack in packs for i in pack) == list(range(len(kept)))
    for pack in packs:
        row = sample([encoded.documents[i] for i in pack])
        batch = TokenCollator(LENGTH, 1)([row])
        labels = batch["labels"][0].numpy()
        # An independent mask, from the response's own ids.
        wanted = np.full(LENGTH, -100)
        at = 0
        for index in pack:
            answer = tokens.tokenizer(kept[index]["response"], add_special_tokens=False)
            answer = [*answer["input_ids"], tokens.eos]
            at += lengths[index]
            wanted[at - len(answer) : at] = answer
            text = tokens.tokenizer.decode(wanted[at - len(answer) : at - 1])
            assert text == kept[index]["response"]
        assert labels.tolist() == wanted.tolist()


@given(st.lists(FILLED, min_size=1, max_size=8), st.integers(2, 40))
@settings(max_examples=80, deadline=None)
def test_texts_come_back_whole(tokens, texts, length):
    encoded = TextEncoder(tokens, template("text"), length, "split").encode(
        [{"text": text} for text in texts]
    )
    lengths = [len(d["input_ids"]) for d in encoded.documents]
    order = [i for pack in best_fit(lengths, length) for i in pack]
    assert sorted(order) == list(range(len(lengths)))
    ids = np.concatenate([d["input_ids"] for d in encoded.documents])
    assert tokens.tokenizer.decode(ids) == "".join(f"{text}<|endoftext|>" for text in texts)


@given(
    st.lists(st.integers(1, 20), max_size=20), st.lists(st.integers(1, 9), max_size=5),
    st.integers(2, 12), st.booleans(),
)  # fmt: skip
def test_concatenation_accounts_for_every_token(lengths, carry, length, wrap):
    numbers = iter(range(100, 10_000))
    documents = [np.array([next(numbers) for _ in range(n)], np.uint32) for n in lengths]
    stream = [*carry[: length - 1], *(i for d in documents for i in d.tolist())]
    rows, rest, lost = concatenate(documents, carry[: length - 1], length, wrap)
    assert rows.shape[1] == length
    assert rows.size + len(rest) + lost == len(stream)
    if wrap:
        assert [*rows.ravel().tolist(), *rest.tolist()] == stream
    else:
        first = {d[0] for d in documents} | set(carry[:1])
        assert all(row[0] in first for row in rows)
