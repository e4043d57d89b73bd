"""Loading and training tokenizers; always a fast tokenizer in Hugging Face format."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overture.data.prompts import PromptTemplate, template
from overture.data.readers import Malformed
from overture.data.sources import Place, open_source
from overture.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Return the fast tokenizer of a folder, a run folder or a hub name, with a padding token.

    Raises:
        ConfigError: there is none of that name, or it cannot be loaded.
    """
    from transformers import AutoTokenizer, logging  # seconds to import

    logging.set_verbosity_error()  # its warnings on tokenizers speak to their authors

    folder = Path(name)
    if (folder / "hf").is_dir():  # a run folder
        folder = folder / "hf"
    if not folder.is_dir() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise ConfigError(f"{name}: no such tokenizer folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=trust_remote_code
        )
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
    """Train a byte-level BPE tokenizer on text or jsonl files and write it to `out`.

    Every string field of a jsonl record counts as text or, with a template, what the model will
    see of it, so that the template's own words become single pieces too. Byte-level pieces mean
    that nothing is unknown and every text comes back as it went in (Radford et al. 2019, GPT-2).

    Returns:
        The size of the vocabulary reached, special tokens included.

    Raises:
        ConfigError: an input is missing or broken, or `out` is there already.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if out.exists() and not overwrite:
        raise ConfigError(f"{out} is there already; give --overwrite to replace it")
    if vocab_size < 258:
        raise ConfigError(f"--vocab_size {vocab_size}: 256 bytes and 2 special tokens need 258")
    sources = [_texts(name, prompt_template) for name in inputs]
    tokenizer = Tokenizer(models.BPE())
    # Splitting digits keeps small numbers from becoming opaque pieces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for source in sources for text in source), trainer)
    _save(tokenizer, out)
    return tokenizer.get_vocab_size()


def _texts(name: str, prompt_template: str | None) -> Iterator[str]:
    path = Path(name)
    if path.suffix == ".txt" and path.is_file():
        return iter(path.read_text(encoding="utf-8-sig").splitlines(keepends=True))
    chosen = template(prompt_template) if prompt_template else None
    source = open_source(name)  # here, so that a missing file is an error before training
    return (text for row in source.read() for text in _record_texts(name, *row, chosen))


def _record_texts(
    name: str, place: Place, record: dict[str, Any] | Malformed, chosen: PromptTemplate | None
) -> list[str]:
    if isinstance(record, Malformed):
        raise ConfigError(f"{name}: {place} {record.detail}")
    texts = {name: value for name, value in record.items() if isinstance(value, str) and value}
    if chosen is None:
        return list(texts.values())
    return [chosen.prompt(texts), texts.get(chosen.response or "", "")]


def _save(tokenizer: Any, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
