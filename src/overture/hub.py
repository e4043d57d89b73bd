"""An exported model on the hub: what its card says, and the upload."""

import json
from pathlib import Path

import yaml

from overture.errors import ConfigError
from overture.models.trainable import numbers
from overture.report import summary_lines
from overture.trained import Trained

WRITER = "Written by Overture's export_model.py."  # ends a card, and tells an export from others
PIPELINES = {
    "CausalLM": "text-generation", "Seq2SeqLM": "text2text-generation",
    "SequenceClassification": "text-classification",
}  # fmt: skip
LOADED = ["model*.safetensors*", "pytorch_model*.bin*", "adapter_*", "trained_on.json", "*.jinja"]
# What of a run folder the card shows: file, heading, content -> text.
SHOWN = (
    ("result.json", "Figures", lambda text: "\n".join(summary_lines(json.loads(text)))),
    ("config.yaml", "Recipe", str),
    ("environment.json", "Versions", lambda text: yaml.safe_dump(json.loads(text)["versions"])),
)


def model_card(trained: Trained, merged: bool, license: str) -> str:
    """Return what a model is, was trained on and reached, as Markdown under the hub's fields."""
    base, run = trained.base, trained.run
    is_adapter = base is not None and not merged
    head = {"license": license, "pipeline_tag": PIPELINES[trained.head]}
    head["library_name"] = "peft" if is_adapter else "transformers"
    if base and not Path(base).exists():  # a path here means nothing there
        head["base_model"] = base
    what = {True: f"Adapters for {base}", False: f"{base} with its adapters merged in"}
    beside = ("lora_", ".original_module.") if merged else ()
    named = dict(trained.model.named_parameters())
    if is_adapter:
        from peft import get_peft_model_state_dict

        named = get_peft_model_state_dict(trained.model)
    count = sum(numbers(p) for n, p in named.items() if not any(part in n for part in beside))
    about = what[is_adapter] if base else f"A model of {trained.head}"
    parts = [f"---\n{yaml.safe_dump(head)}---", f"# {(run or Path(trained.name)).name}"]
    parts.append(f"{about}; {count:,} parameters.")
    if rows := json.loads((run / "environment.json").read_text("utf-8")).get("data") if run else []:
        table = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        shown = [["" if x is None else str(x) for x in row] for row in table]
        lines = [f"| {' | '.join(row)} |" for row in shown]
        parts.append("## Data\n\n" + "\n".join(lines))
    for file, heading, form in SHOWN if run else ():
        # The figures are those of the end.
        if (run / file).is_file() and (trained.at_end or heading != "Figures"):
            text = form((run / file).read_text(encoding="utf-8")).strip()
            parts.append(f"## {heading}\n\n```\n{text}\n```")
    return "\n\n".join([*parts, WRITER]) + "\n"


def check_hub(name: str) -> None:
    """Raise ConfigError if a name cannot be one of the hub, or there is no token to write with."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push_to_hub {name}: {' '.join(str(error).split())}") from None
    if get_token() is None:
        raise ConfigError("--push_to_hub: there is no token; set HF_TOKEN to one that may write")


def push_to_hub(folder: Path, name: str, private: bool) -> tuple[str, str]:
    """Upload a folder as a hub model; return its whole name and address, or raise ConfigError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        repo = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(repo.repo_id).private:
            raise ConfigError(f"--private: {name} is there already, and public: nothing was sent")
        # Adapters or weights of an earlier export would be loaded in place of these.
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, delete_patterns=LOADED)
        return repo.repo_id, str(repo)
    except HfHubHTTPError as error:
        said = {401: "the token is not valid", 403: "the token has no right to write there"}
        reason = said.get(error.response.status_code) or str(error)
    except (OSError, RuntimeError, ValueError) as error:  # no connection, or one that broke off
        reason = f"cannot be reached or written to: {error}"
    reason = " ".join(reason.split())[:200]
    raise ConfigError(f"--push_to_hub {name}: {reason}; {folder} is whole, so that it can be sent")
