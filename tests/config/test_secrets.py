"""What is taken for a secret, and that every form of it is found in a text."""

import pytest

from overture.config import secrets
from overture.config.secrets import is_secret, learn, redact


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(secrets, "_anywhere", secrets._anywhere)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HFTOKEN", "hub.token", "auth_tokens", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY",
        "apikey", "apiKey", "accessKeyId", "ssh-key", "client_secret", "PGPASSWORD", "passwd",
        "SSHKEY", "privatekey", "STORAGEKEY", "mykey", "tokenvalue", "storageAccountKey",
    ],
)  # fmt: skip
def test_names_of_secrets(name):
    assert is_secret(name, "some text")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_name", "TOKENIZERS_PARALLELISM", "tokenization", "monkey", "MONKEY_PATCH",
        "keyword", "KEYBOARD", "turkey", "run_name",
    ],
)  # fmt: skip
def test_names_that_only_look_like_it(name):
    assert not is_secret(name, "some text")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", "512"), ("label_tokens_per_second", "1.5e3"), ("num_key_value_heads", "2"),
        ("skip_special_tokens", "true"), ("pad_token_id", "null"), ("SSL_KEY_FILE", __file__),
    ],
)  # fmt: skip
def test_numbers_switches_and_files_are_none(name, value):
    assert not is_secret(name, value)
    assert redact(value, name) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "at https://me:pw@host/x and s3://id@bucket.",
            "at https://***@host/x and s3://***@bucket.",
        ),
        ("s3://me:a/b+c@d@bucket/x", "s3://***@bucket/x"),
        ("mail me@host, see https://host/x", "mail me@host, see https://host/x"),
        (
            "s3://b/x?X-Amz-Signature=0a1b&part=2&access_token=abc to",
            "s3://b/x?X-Amz-Signature=***&part=2&access_token=*** to",
        ),
    ],
)
def test_credentials_in_urls(text, shown):
    assert redact(text) == shown


def test_a_password_may_be_a_number():
    assert is_secret("DB_PASSWORD", "1234567890")
    assert not is_secret("password", "false")


def test_what_was_learned_is_found_in_every_form():
    learn("HF_TOKEN", "canary/of+mine")
    learn("proxy", "http://me:pass%40word@host:80")
    learn("SIGNING_KEY", "-----BEGIN-----\nfirst line\nsecond line")
    learn("MY_KEY", "short")
    for text in ("canary/of+mine", "canary%2Fof%2Bmine", "pass%40word", "pass@word", "second line"):
        assert redact(f"<{text}>") == "<***>"
    assert redact("short") == "short"  # it may be a part of any word
    assert redact("nothing here") == "nothing here"
