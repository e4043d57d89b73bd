"""From a config to the network that is trained: device, splits, weights, adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from overture.config.schema import Config
from overture.data.cache import open_cache
from overture.data.labels import head_config
from overture.data.schema import check_split
from overture.errors import ConfigError
from overture.models.build import load_network, position_limit
from overture.models.isolation import proven
from overture.models.lora import add_lora, continue_adapters
from overture.models.seq2seq import begin_as_trained, refuse_unknown_family
from overture.models.trainable import freeze_others
from overture.tokenizer import load_tokenizer, tokenizer_sha256
from overture.training.cores import has_gpu
from overture.training.tasks import TASKS


def choose_device(config: Config) -> str:
    """Return gpu or cpu; ConfigError if the config asks a CPU for what it cannot do."""
    device = "gpu" if has_gpu() else "cpu"
    if device == "cpu" and config.precision == "amp_fp16":
        raise ConfigError("precision: amp_fp16 needs a CUDA device; CPUs take fp32 or amp_bf16")
    if device == "cpu" and config.device_train_microbatch_size == "auto":
        raise ConfigError("device_train_microbatch_size: auto needs a CUDA device; give a number")
    return device


def check_splits(config: Config, tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Check the splits against the tokenizer and return their ledgers, the trained one's first."""
    ledgers, known = {}, tokenizer_sha256(tokenizer)
    for name, stream, batch in config.splits():
        if stream.data_remote is not None:
            open_cache(stream.data_remote, stream.data_local, stream.split)
        folder = Path(stream.data_local) / stream.split
        ledgers[name] = check_split(folder, config.task, config.max_seq_len, batch, known)
    return ledgers


def build_network(
    config: Config, tokenizer: Any, device: str, ledgers: dict[str, dict[str, Any]]
) -> Any:
    """Return the network of a config on its device, proven, with its adapters or others frozen."""
    task = TASKS[config.task]
    labels = head_config(ledgers) if config.task == "classify" else None
    packed = any(ledger["packing"]["method"] == "best_fit" for ledger in ledgers.values())
    known = config.model, tokenizer, config.max_seq_len, task.head, labels
    hollow = config.fsdp_config is not None and dist.get_global_rank() != 0  # is sent its shards
    network = load_network(*known, hollow=hollow)
    # Which hollow ones do not know.
    network.made_anew = dist.all_gather_object(network.made_anew)[0]
    if config.task == "seq2seq":
        refuse_unknown_family(network)
    # Quantised, it is where it belongs already. peft's preparation of such models is left out: it
    # makes norms, embeddings and head float32, so that what is trained is not what is loaded later.
    sharded = config.fsdp_config is not None
    moved = not getattr(network, "is_quantized", False) and not hollow
    if moved and sharded and device == "gpu":  # for the proof alone, where the whole model fits
        moved = network.get_memory_footprint() < 0.8 * torch.cuda.mem_get_info()[0]
    if moved:
        network.to("cuda" if device == "gpu" else "cpu")
    if not hollow:
        _prove(config, network, len(tokenizer), packed)
    if moved and sharded and device == "gpu":
        network.to("cpu")  # from where the shards are sent
        torch.cuda.empty_cache()
    if config.model.activation_checkpointing:
        if not network.supports_gradient_checkpointing:
            fault = f"a {type(network).__name__} has none; leave it out"
            raise ConfigError(f"model.activation_checkpointing: {fault}")
        network.gradient_checkpointing_enable({"use_reentrant": False})
        for module in network.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _checkpoint
    freeze_others(network, config.trainable, task.head)
    for name, p in network.named_parameters():
        if name in network.made_anew and not p.requires_grad:
            fault = f"{name} is not in {config.model.name}, and would stay as drawn at random"
            raise ConfigError(f"trainable: {fault}; name it too, or train all")
    if config.model.adapter is not None:
        section = config.lora and vars(config.lora)
        network = continue_adapters(network, config.model.adapter, section)
    elif config.trainable == "lora":
        within = f"{network.base_model_prefix}."  # of which no adapter keeps a tensor
        if lost := [name for name in network.made_anew if name.startswith(within)]:
            fault = f"{lost[0]} is not in {config.model.name}, and would be drawn at random"
            raise ConfigError(f"trainable: {fault}; train all, or the last layer, or another base")
        drawn = {name.rpartition(".")[0] for name in network.made_anew}  # of a head
        # Beside what peft takes whole itself, with all that is within.
        beside = sorted(n for n in drawn if n and not {"classifier", "score"} & {*n.split(".")})
        network = add_lora(network, **vars(config.lora), head=task.head, whole=beside)
    if not network.get_input_embeddings().weight.requires_grad:
        _refuse_grown_tokenizer(config, tokenizer)
    return network


def _refuse_grown_tokenizer(config: Config, tokenizer: Any) -> None:
    """Raise ConfigError if a tokenizer has pieces that its pretrained model never saw, and whose
    rows would stay as they are: many models have spare ones, of which the size alone says nothing.
    """
    model, name = config.model, config.tokenizer_name
    if not model.pretrained or name in (None, model.name):
        return
    try:
        own = load_tokenizer(model.name, model.trust_remote_code)
    except ConfigError:  # the weights came alone
        return
    if len(tokenizer) > len(own):
        new = tokenizer.convert_ids_to_tokens(len(own))
        fault = f"{name} has {len(tokenizer) - len(own)} pieces more, from {new!r} on, than that of"
        remedy = "which would stay as drawn at random; train the embeddings too, or all"
        raise ConfigError(f"tokenizer_name: {fault} {model.name}, {remedy}")


def _prove(config: Config, network: Any, vocabulary: int, packed: bool) -> None:
    """Raise ConfigError if documents see each other in a network, where they are not to."""
    prove = TASKS[config.task].prove
    network.proven = proven(prove, packed)
    dtype = torch.float16 if config.precision == "amp_fp16" else torch.bfloat16
    # It would keep a copy of every weight that is not frozen yet.
    half = {"enabled": config.precision != "fp32", "cache_enabled": False}
    with torch.autocast(network.device.type, dtype, **half):
        longest = min(position_limit(network), config.max_seq_len)
        prove(network, vocabulary, longest, packed)
        if config.algorithms.seq_length_warmup and not packed:
            try:
                prove(network, vocabulary, longest, True)
            except ConfigError:
                fault = f"pieces of a document see each other in a {type(network).__name__}"
                remedy = f"({config.model.name}); leave it out"
                raise ConfigError(f"algorithms.seq_length_warmup: {fault} {remedy}") from None


def _checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    # Stopping a layer's second forward pass early is an exception, in which torch 2.7 loses
    # an operator of ours that is just saving its tensors: no layer's activations were let go.
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


def begin_of_targets(config: Config, network: Any, rows: Any, tokenizer: Any) -> dict[str, int]:
    """Let a decoder begin as the targets of a dataset do, and return how that is."""
    some = np.linspace(0, rows.num_samples - 1, 64).astype(int)  # of every stream
    targets = [rows[number]["labels"].tolist() for number in {*some.tolist()}]
    plain = network.get_base_model() if config.trainable == "lora" else network
    return begin_as_trained(plain, targets, {*tokenizer.all_special_ids})
