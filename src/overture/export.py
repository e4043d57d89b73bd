"""A trained model as a folder in Hugging Face format, safetensors only."""

import json
import os
import shutil
from pathlib import Path
from typing import Any


def save_model(model: Any, tokenizer: Any, folder: Path, trained_on: dict[str, Any]) -> None:
    """Write a model, or the adapters of a PeftModel and what they were `trained_on`, with its
    tokenizer; whole or not at all.
    """
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, safe_serialization=True)
    tokenizer.save_pretrained(aside)
    if (aside / "adapter_config.json").is_file():
        (aside / "trained_on.json").write_text(json.dumps(trained_on, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
