"""Loading tokenizers; always a fast tokenizer in Hugging Face format."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from overture.errors import ConfigError
from overture.offline import AWAY, in_reach


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Return the fast tokenizer of a folder, run or hub name, able to pad; ConfigError if none."""
    from transformers import AutoTokenizer, PretrainedConfig, logging  # seconds to import

    logging.set_verbosity_error()  # its warnings on tokenizers speak to their authors
    folder = Path(name)
    if not folder.is_dir() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise ConfigError(f"{name}: no such tokenizer folder")
    reached = in_reach(name)
    place = str(folder / "hf") if (folder / "hf").is_dir() else name  # a run folder has one
    with contextlib.suppress(OSError):  # no config.json, as many have none
        content = PretrainedConfig.get_config_dict(place)[0]
        if '"trust_remote_code":' in json.dumps(content) and not trust_remote_code:
            fault = f"{name}: its config.json trusts code of its maker's (CVE-2026-5241)"
            raise ConfigError(f"{fault}; name a folder that holds the tokenizer's files alone")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's client raises a dozen kinds; all mean the same here
        reason = " ".join(str(error).split())[:200] if reached else AWAY
        raise ConfigError(f"{name}: no tokenizer to be had there ({reason})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{name}: only fast tokenizers are supported, with a tokenizer.json")
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
