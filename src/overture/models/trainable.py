"""Which parameters of a model are trained, by `trainable` of the config, and how many they are."""

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from overture.errors import ConfigError, nearest

NORMS = (
    "norm", "norm_f", "ln_f", "final_norm", "final_layer_norm", "final_layernorm", "layer_norm",
)  # fmt: skip


def freeze_others(model: Any, trainable: str | list[str], head: str) -> None:
    """Leave a gradient to what is to be trained alone: all, last_layer, or patterns of names.

    Patterns are those of a shell, on names of parameters, as in "*.self_attn.*". The last layer is
    the head of a classifier, with what is made anew below it; of a language model its last block,
    with the norm behind it and an output embedding of its own, in an encoder-decoder those of the
    decoder.
    Raises ConfigError: a pattern that no parameter has, or a model without such a layer.
    """
    if trainable in ("all", "lora"):
        return
    named = dict(model.named_parameters())
    if trainable == "last_layer":
        chosen = _last_layer(model, head)
    else:
        chosen = {name for name in named if any(fnmatchcase(name, p) for p in trainable)}
        for pattern in trainable:
            if not any(fnmatchcase(name, pattern) for name in named):
                parts = {part for name in named for part in name.split(".")}
                hint = nearest(pattern.strip("*."), parts) or nearest(pattern, named)
                fault = f"{pattern!r} is the name of no parameter{hint}"
                raise ConfigError(f"trainable: {fault}; names are as {next(iter(named))}")
    for name, p in named.items():
        p.requires_grad_(name in chosen)


def _last_layer(model: Any, head: str) -> set[str]:
    within = {id(p) for p in model.base_model.parameters()}
    behind = {name for name, p in model.named_parameters() if id(p) not in within}
    if head == "SequenceClassification":
        return behind | {*getattr(model, "made_anew", ())}
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        fault = f"a {type(model).__name__} has no list of layers"
        raise ConfigError(f"trainable: {fault}; name its parameters by patterns")
    stack = max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()))
    parts = [stack[-1]]
    for parent in decoder.modules():
        children = dict(parent.named_children())
        if any(child is stack for child in children.values()):
            parts += [child for name, child in children.items() if name in NORMS]
    output, table = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is not table.weight:
        parts.append(output)
    chosen = {id(p) for part in parts for p in part.parameters()}
    return behind | {name for name, p in model.named_parameters() if id(p) in chosen}


def numbers(p: Any) -> int:
    """Return how many numbers a parameter stands for: those of 4 bits share bytes."""
    shared = type(p).__name__ == "Params4bit" and p.bnb_quantized
    return 2 * p.nbytes if shared else p.numel()


def describe_trained(model: Any) -> list[str]:
    """Return lines on the parts of a model that are trained, and the memory of all that is held.

    An optimizer such as Adam keeps two numbers for each trained one, and there is its gradient.
    """
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    rows, total = dict(_groups(trained)), sum(map(numbers, named.values()))
    count = sum(rows.values())
    rows = {} if count == total else rows  # all of them
    rows |= {"trained": count, "of all parameters": total}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {size:>13,}" for name, size in rows.items()]
    lines[-2] += f"  {count / total:.2%}"
    held, moved = (sum(p.nbytes for p in of.values()) / 2**20 for of in (named, trained))
    figures = f"weights {held:,.1f}, gradients {moved:,.1f}, optimizer {2 * moved:,.1f}"
    return [*lines, f"  MiB: {figures}"]


def _groups(named: dict[str, Any]) -> Counter[str]:
    """Return the sizes of parameters that have a name in common, but for numbers of layers."""
    sizes: Counter[str] = Counter()
    for name, p in named.items():
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        short, *adapter = ".".join(parts[:-1]).removeprefix("base_model.model.").split(".lora_")
        short = short.removesuffix(".base_layer")
        sizes[f"{short} (adapters)" if adapter else short or name] += numbers(p)
    return sizes
