"""The default tokenizer, and loading of any, through files and back."""

import json

import pytest

from overture.errors import ConfigError
from overture.tokenizer import load_tokenizer, tokenizer_sha256
from overture.tokenizer_training import END_OF_TEXT, Plan, train_tokenizer

TEXTS = [
    "The owl hoots in the forest.",
    "12 owls and 7 ducks",
    "naïve \U0001f355 日本語\ttab\n\nend  ",
]


@pytest.fixture
def trained(tmp_path):
    source = tmp_path / "in.jsonl"
    records = [{"instruction": t, "context": "", "response": "an owl", "n": 3} for t in TEXTS * 20]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    return source, tmp_path / "tokenizer"


def test_round_trip_of_any_text_and_hf_format(trained):
    source, out = trained
    size, _ = train_tokenizer(Plan([str(source)], 300, out))
    tokenizer = load_tokenizer(str(out))
    assert size == len(tokenizer) <= 300
    for text in [*TEXTS, "unseen: čšž € \x00 🎻"]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4  # digit by digit


def test_template_words_become_pieces(trained):
    source, out = trained
    train_tokenizer(Plan([str(source)], 320, out, prompt_template="dolly"))
    tokenizer = load_tokenizer(str(out))
    assert len(tokenizer("### Response:\n")["input_ids"]) <= 4


def test_hash_tells_vocabularies_apart_and_nothing_else(trained, tmp_path):
    source, out = trained
    train_tokenizer(Plan([str(source)], 300, out))
    train_tokenizer(Plan([str(source)], 280, tmp_path / "other"))
    one, again, other = (load_tokenizer(str(p)) for p in (out, out, tmp_path / "other"))
    again("pad me", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_sha256(one) == tokenizer_sha256(again) != tokenizer_sha256(other)


def test_refusals(trained, tmp_path):
    source, out = trained
    train_tokenizer(Plan([str(source)], 300, out))
    with pytest.raises(ConfigError, match="is there already"):
        train_tokenizer(Plan([str(source)], 300, out))
    with pytest.raises(ConfigError, match="need 259"):
        train_tokenizer(Plan([str(source)], 200, tmp_path / "x"))
    with pytest.raises(ConfigError, match="no such file"):
        train_tokenizer(Plan(["missing.txt"], 300, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.data
def test_config_that_trusts_code_itself_runs_none(tmp_path):
    ran = tmp_path / "ran"
    for name, content in {
        # LightGlue's config loads the one that it names with the trust that it asks for itself.
        "victim": {
            "model_type": "lightglue",
            "trust_remote_code": True,
            "keypoint_detector_config": {"model_type": "x", "_name_or_path": str(tmp_path / "x")},
        },
        "x": {"model_type": "x", "auto_map": {"AutoConfig": "code.X"}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "x" / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    with pytest.raises(ConfigError, match=r"config\.json trusts code"):
        load_tokenizer(str(tmp_path / "victim"))
    assert not ran.exists()


def test_text_file_with_a_bom(real_data, tmp_path):
    train_tokenizer(Plan([str(real_data / "text" / "botchan.txt")], 1000, tmp_path / "t"))
    vocabulary = load_tokenizer(str(tmp_path / "t")).get_vocab()
    assert len(vocabulary) == 1000
    assert not any(piece.startswith("\u00ef\u00bb\u00bf") for piece in vocabulary)
