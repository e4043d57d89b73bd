"""Loading and training tokenizers; always a fast tokenizer in Hugging Face format."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overture.data.prompts import template
from overture.data.readers import Malformed
from overture.data.sources import open_source
from overture.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
MASK = "<|mask|>"  # for masked language models


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Return the fast tokenizer of a folder, run or hub name, able to pad; ConfigError if none."""
    from transformers import AutoTokenizer, PretrainedConfig, logging  # seconds to import

    logging.set_verbosity_error()  # its warnings on tokenizers speak to their authors
    folder = Path(name)
    if not folder.is_dir() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise ConfigError(f"{name}: no such tokenizer folder")
    place = str(folder / "hf") if (folder / "hf").is_dir() else name  # a run folder has one
    with contextlib.suppress(OSError):  # no config.json, as many have none
        content = PretrainedConfig.get_config_dict(place)[0]
        if '"trust_remote_code":' in json.dumps(content) and not trust_remote_code:
            fault = f"{name}: its config.json trusts code of its maker's (CVE-2026-5241)"
            raise ConfigError(f"{fault}; name a folder that holds the tokenizer's files alone")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's client raises a dozen kinds; all mean the same here
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: no tokenizer to be had there ({reason})") from None
    if tokenizer.pad_token is None:
        # Padding is never learned and never seen by a real token, so any valid id will do.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return a hash of all that decides which ids a text becomes."""
    # Truncation and padding are settings of the last caller, not of the vocabulary.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.eos_token), tokenizer.bos_token]
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8")).hexdigest()


def train_tokenizer(
    inputs: list[str],
    vocab_size: int,
    out: Path,
    prompt_template: str | None = None,
    overwrite: bool = False,
) -> int:
    """Train a byte-level BPE tokenizer on text or jsonl files, write it to `out`, return its size.

    Every string field of a jsonl record counts as text or, with a template, what the model will
    see of it, so that the template's own words become single pieces too. Byte-level pieces mean
    that nothing is unknown and every text comes back as it went in (Radford et al. 2019, GPT-2).
    The size counts special tokens. Raises ConfigError: a bad input, or `out` is there already.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; give --overwrite to replace it")
    if vocab_size < 259:
        raise ConfigError(f"--vocab_size {vocab_size}: 256 bytes and 3 special tokens need 259")
    sources = [_texts(name, prompt_template) for name in inputs]
    tokenizer = Tokenizer(models.BPE())
    # Splitting digits keeps small numbers from becoming opaque pieces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": [END_OF_TEXT, PADDING, MASK], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator((text for source in sources for text in source), trainer)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    ends = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PADDING}
    options = {"clean_up_tokenization_spaces": False, **ends, "mask_token": MASK}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return tokenizer.get_vocab_size()


def _texts(name: str, prompt_template: str | None) -> Iterator[str]:
    path = Path(name)
    if path.suffix == ".txt" and path.is_file():
        return iter(path.read_text(encoding="utf-8-sig").splitlines(keepends=True))
    chosen = template(prompt_template) if prompt_template else None
    source = open_source(name)  # here, so that a missing file is an error before training

    def read() -> Iterator[str]:
        for place, record in source.read():
            if isinstance(record, Malformed):
                raise ConfigError(f"{name}: {place} {record.detail}")
            texts = {key: text for key, text in record.items() if text and isinstance(text, str)}
            seen = (chosen.prompt(texts), texts.get(chosen.response, "")) if chosen else ()
            yield from seen or texts.values()

    return read()
