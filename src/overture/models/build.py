"""Model names to models of Hugging Face's, with weights or freshly initialised."""

import json
import re
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from overture.config.schema import ModelConfig
from overture.errors import ConfigError, nearest
from overture.models.attention import choose_attention
from overture.offline import AWAY, in_reach

ALIASES = {"hf_bert": "bert"}  # so that it stands beside mosaic_bert


def load_network(
    wanted: ModelConfig, tokenizer: Any, max_seq_len: int = 0, head: str = "CausalLM",
    labels: dict[str, Any] | None = None, device_map: str | None = None, hollow: bool = False,
) -> Any:  # fmt: skip
    """Return a model of Hugging Face's with a head, as in AutoModelForCausalLM.

    A model type such as `llama` gets the vocabulary of the `tokenizer`; rows may have `max_seq_len`
    tokens. The head on whole rows is for the `labels` of `data/labels.py`, and padding is what the
    tokenizer takes for it. `made_anew` of the model names the tensors that no checkpoint had. With
    a `device_map` of accelerate's, as "auto", it is spread over the devices that there are. A
    `hollow` one is on the meta device, its weights not read.

    Raises ConfigError: no such model, none with such a head, no such key in its config or weights
    of another shape, or too few embeddings for the tokenizer or positions for the rows.
    """
    import transformers

    from overture.models.mosaic_bert.model import register_mosaic_bert

    register_mosaic_bert()
    auto = getattr(transformers, f"AutoModelFor{head}")
    name, location = wanted.name, locate_model(wanted.name)
    config = _model_config(location, wanted, tokenizer)
    pairs = getattr(config, "is_encoder_decoder", False)
    both = f"model.name: {name} is a {config.model_type}, an encoder with a decoder"
    if pairs and head == "SequenceClassification":
        raise ConfigError(f"{both}; task classify takes one of the two alone")
    if pairs and head in ("CausalLM", "MaskedLM"):
        raise ConfigError(f"{both}; set task: seq2seq, or name another model")
    if labels:
        _set_labels(config, labels, wanted)
    model_class = auto._model_mapping.get(type(config), None)
    if model_class is None and not wanted.trust_remote_code:
        fault = f"{name} is a {config.model_type}, of which there is none for {head}"
        raise ConfigError(f"model.name: {fault}; name another model, or set another task")
    options = {"dtype": getattr(torch, wanted.dtype), "trust_remote_code": wanted.trust_remote_code}
    options["attn_implementation"] = choose_attention(wanted.attention, model_class, pairs)
    if wanted.load_in_4bit or wanted.load_in_8bit:
        options |= _quantised(wanted)
    if device_map:
        options["device_map"] = device_map
    try:
        if wanted.pretrained and not hollow:
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, loaded = auto.from_pretrained(location, config=config, **options)
            model.made_anew = _made_anew(model, loaded, wanted, location, bool(labels))
        else:
            with torch.device("meta") if hollow else nullcontext():
                model = auto.from_config(config, **options)
            model.made_anew = []
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {name}: {' '.join(str(error).split())[:300]}") from None
    if labels:
        model.config.pad_token_id = tokenizer.pad_token_id
    _let_be_saved(model)
    embeddings = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id is None:  # its own, or the one for the end
        raise ConfigError(f"tokenizer_name: {tokenizer.name_or_path} has no token to pad with")
    if len(tokenizer) > embeddings:
        theirs = f"the tokenizer {tokenizer.name_or_path} has {len(tokenizer):,} pieces"
        fault = f"model.name: {name} has {embeddings:,} embeddings, but {theirs}"
        raise ConfigError(f"{fault}; use the model's own tokenizer")
    if max_seq_len > position_limit(model):
        known = f"{position_limit(model)} positions (model.config.max_position_embeddings)"
        fault = f"max_seq_len: {max_seq_len}, but {name} has {known}"
        raise ConfigError(f"{fault}; convert the data to fit")
    return model


def _let_be_saved(model: Any) -> None:
    """Mend a generation config that transformers load but will not save, as some of the hub's are:
    a temperature, say, of a model that does not sample.
    """
    config = getattr(model, "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def position_limit(model: Any) -> int:
    """Return how many positions a model knows."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    # RoBERTa and its kind count positions from behind the one of the padding.
    base = model.get_base_model().base_model if hasattr(model, "peft_config") else model.base_model
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return known if padding is None else known - padding - 1


def locate_model(name: str) -> str:
    """Return the folder that holds a model in Hugging Face format, or the hub name as it is."""
    name = ALIASES.get(name, name)
    path = Path(name)
    if (path / "hf").is_dir():  # a run folder
        path, name = path / "hf", str(path / "hf")
    if (path / "adapter_config.json").is_file():
        raise ConfigError(f"model.name: {name}: holds adapters only; name their base model")
    if not path.exists() and (name.startswith(("/", ".", "runs/")) or name.count("/") > 1):
        raise ConfigError(f"model.name: {name}: no such folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"model.name: {name}: holds no model (config.json is missing)")
    return name


def _model_config(location: str, wanted: ModelConfig, tokenizer: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    known, trust = not wanted.pretrained and location in CONFIG_MAPPING, wanted.trust_remote_code
    fresh = CONFIG_MAPPING[location] if known else None
    reached = bool(fresh) or in_reach(location)
    try:
        if not fresh:
            _refuse_hidden_code(PretrainedConfig.get_config_dict(location)[0], location, trust)
        config = fresh() if fresh else AutoConfig.from_pretrained(location, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        hint = "" if wanted.pretrained else nearest(location, CONFIG_MAPPING)
        reason = " ".join(str(error).split())[:200] if reached else AWAY
        raise ConfigError(f"model.name: {location}: {reason}{hint}") from None
    for key in ("attention_chunk_size", "num_kv_shared_layers"):
        if getattr(config, key, None):
            raise ConfigError(f"model.name: {location}: has {key}, which cannot be trained here")
    for key, value in wanted.config.items():
        if key == "output_router_logits" and value:
            raise ConfigError("model.config.output_router_logits: the router's loss is not used")
        if key.startswith("_") or not hasattr(config, key):
            hint = nearest(key, config.to_dict())
            raise ConfigError(f"model.config.{key}: {type(config).__name__} has no such key{hint}")
        setattr(config, key, value)
    if fresh:
        # Made anew, as some defaults follow others: key-value heads are as many as heads.
        ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if config.is_encoder_decoder:  # as Marian and T5 have it; families differ
            ids["decoder_start_token_id"] = tokenizer.pad_token_id
            ids |= {"forced_eos_token_id": tokenizer.eos_token_id, "forced_bos_token_id": None}
        config = fresh(**{"vocab_size": len(tokenizer), **ids, **wanted.config})
    return config


def _quantised(wanted: ModelConfig) -> dict[str, Any]:
    """Return what loads a model in 4 or 8 bits; ConfigError where that cannot be."""
    from transformers import BitsAndBytesConfig

    key = f"model.load_in_{4 if wanted.load_in_4bit else 8}bit"
    if not torch.cuda.is_available():
        fault = "needs a CUDA device; on a CPU model.dtype=bfloat16 halves the weights"
        raise ConfigError(f"{key}: {fault}")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{key}: needs bitsandbytes (requirements-gpu.txt)")
    # As in the paper: normal floats of 4 bits, their scales quantised once more.
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = BitsAndBytesConfig(**(four if wanted.load_in_4bit else {"load_in_8bit": True}))
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _made_anew(
    model: Any, loaded: dict[str, Any], wanted: ModelConfig, location: str, may_differ: bool
) -> list[str]:
    """Return the tensors that no checkpoint had in their shape.

    Raises ConfigError for a config whose model has other layers, or layers of another size, than
    the weights, but for those of a head that `may_differ`.
    """
    from transformers import PretrainedConfig

    within = f"{model.base_model_prefix}."
    every = sorted(loaded["mismatched_keys"])
    resized = [name for name in every if not may_differ or name.startswith(within)]
    both = (*loaded["missing_keys"], *loaded["unexpected_keys"])
    numbered = [name for name in both if re.search(r"\.\d+\.", name)]  # those of layers
    theirs = PretrainedConfig.get_config_dict(location)[0]
    sizes = {key: value for key, value in wanted.config.items() if isinstance(value, int)}
    differ = {key: size for key, size in sizes.items() if theirs.get(key, size) != size}
    if resized and not differ:
        fault = f"the shape of {resized[0]} is not what its own config.json says"
        raise ConfigError(f"model.name: {wanted.name}: {fault}; save the model anew")
    if resized or (numbered and differ):
        ours = ", ".join(f"{key} {value}" for key, value in differ.items())
        there = ", ".join(f"{key} {theirs[key]}" for key in differ)
        fault = f"{ours}, but {wanted.name} holds a {theirs['model_type']} with {there}"
        raise ConfigError(f"model.config: {fault}; leave them out, or set model.pretrained: false")
    return sorted(loaded["missing_keys"]) + every


def _set_labels(config: Any, labels: dict[str, Any], wanted: ModelConfig) -> None:
    """Give a model's config its classes; ConfigError if `model.config.num_labels` is another."""
    count, classes = wanted.config.get("num_labels"), len(labels["id2label"])
    if count not in (None, classes):
        is_one = labels["problem_type"] == "regression"
        there = "numbers (--regression)" if is_one else f"{classes} classes"
        fault = f"{count}, but the labels of the data are {there}"
        raise ConfigError(f"model.config.num_labels: {fault}; leave it out")
    config.update(labels)


def _refuse_hidden_code(content: dict[str, Any], location: str, trust: bool) -> None:
    """Refuse a config.json that names code to run (CVE-2026-4372, auto_map, CVE-2026-5241)."""
    text = json.dumps(content)  # configs within it too
    for key in ("_attn_implementation_internal", "auto_map", "trust_remote_code"):
        if f'"{key}":' in text and not trust:
            fault = f"its config.json has {key}, which can run code of its maker's"
            remedy = "set model.trust_remote_code=true once you have read it"
            raise ConfigError(f"model.name: {location}: {fault}; {remedy}")
