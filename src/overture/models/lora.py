"""LoRA adapters through peft, in float32 over a base of any type (Hu et al. 2021, 2106.09685).

peft's own forward pass goes through float32 for every output of every layer; over a bfloat16 base
that takes longer than the adapters' arithmetic. Here the adapters are rounded to the type of the
base for the products, as autocast would do, added in place, and their gradients are float32 again.
Under autocast, with dropout and for DoRA it is peft's own that runs.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overture.errors import ConfigError, nearest
from overture.offline import in_reach

RECORD = "trained_on.json"  # beside exported adapters: what they were trained in

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("adapter_*", "*.json", "*.jinja", "*.txt", "*.model")  # and the tokenizer's

EXACT = 1e-3  # of the spread of logits: that of sums in another order

# By the head of a model. Of a classifier peft trains and saves the head too.
TASK_TYPES = {
    "CausalLM": "CAUSAL_LM", "Seq2SeqLM": "SEQ_2_SEQ_LM", "SequenceClassification": "SEQ_CLS",
}  # fmt: skip


def add_lora(
    model: Any, r: int, alpha: float, dropout: float, target_modules: str | list[str],
    rslora: bool = False, dora: bool = False, head: str = "CausalLM", whole: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Return the model as a PeftModel with fresh adapters; everything else is frozen, but for the
    `head` of a classifier, and modules that are trained `whole`. Raises ConfigError if
    `target_modules` names no module of this model.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules,
        use_rslora=rslora, use_dora=dora, task_type=TASK_TYPES.get(head),
        modules_to_save=[*whole] or None,
    )  # fmt: skip
    names = [name for name, _ in model.named_modules()]
    for target in target_modules if isinstance(target_modules, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = nearest(target, {name.rpartition(".")[2] for name in names})
            raise ConfigError(f"lora.target_modules: {target!r} is the name of no module{hint}")
    try:
        # peft casts the adapters of a half-precision base to float32 (autocast_adapter_dtype).
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:200]}") from None
    if _changes_head(model):
        fault = "the output head takes no adapter here"
        raise ConfigError(f"lora.target_modules: {fault}; leave it out")
    return _with_our_layers(adapted)


def load_adapters(model: Any, folder: Path, trained: bool = False) -> Any:
    """Return the model as a PeftModel with the adapters of a folder, to be used or `trained` on;
    ConfigError if they cannot be read, or are for a model with other tensors.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        with warnings.catch_warnings():
            # What the file lacks would stay as it was drawn; peft only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trained)
        # What the model has no room for would be left out.
        here = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        theirs = load_peft_weights(str(folder), device="cpu")
        # A checkpoint's magnitudes, of DoRA, have a name of their own.
        kept = {key for key in theirs if {key, key.removesuffix(".weight")} & here.keys()}
        if more := sorted(key for key in theirs.keys() - kept if "lora_" in key):
            raise ValueError(f"it has no place for {len(more)} of their tensors, as {more[0]}")
    except Exception as error:  # peft, torch and safetensors have a dozen kinds; all mean the same
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder}: adapters that do not fit this model ({reason})") from None
    return _with_our_layers(adapted)


def adapters_of_hub(name: str, required: bool = False) -> Path | None:
    """Return a copy of the adapters under a name of the hub's; None if it has none there, or it is
    a path's. ConfigError if they cannot be fetched, or are `required` and it cannot be asked.
    """
    first = name.split("/")[0]
    if not HUB_NAME.fullmatch(name) or first == "runs" or Path(first).exists():
        return None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    asked = False
    in_reach(name)
    try:
        hf_hub_download(name, "adapter_config.json")
        asked = True
        # Not the checkpoints that some leave in folders beside them.
        folder = snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*")
        if not any(Path(folder).glob("adapter_model.*")):  # of which one offline has a part
            raise OSError("adapter_model.safetensors is not there")
        return Path(folder)
    except (OSError, ValueError, RuntimeError) as error:
        has_none = type(error) is EntryNotFoundError  # below it is one for want of a connection
        if not asked and (has_none or not required):
            return None  # whoever loads a model of this name says what is wrong
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name}: adapters that cannot be fetched ({reason})") from None


def continue_adapters(model: Any, name: str, wanted: dict[str, Any] | None) -> Any:
    """Return the model with the adapters of a run, a folder of peft's or the hub's, to be trained.

    Raises ConfigError: no adapters are there, or for another model, or not what is `wanted` (a
    section `lora` of the config, None for what they are), or they are ours and were trained in
    another base, by its content.
    """
    folder = Path(name) / "hf" if (Path(name) / "hf").is_dir() else Path(name)
    folder = adapters_of_hub(name, required=True) or folder
    if not (folder / "adapter_config.json").is_file():
        fault = "holds no adapters (adapter_config.json is missing)"
        raise ConfigError(f"model.adapter: {name}: {fault}")
    adapted = load_adapters(model, folder, trained=True)
    if (folder / RECORD).is_file():
        check_base(folder / RECORD, model_fingerprint(adapted))
    config = adapted.peft_config["default"]
    if not hasattr(config, "lora_alpha"):
        raise ConfigError(f"model.adapter: {name}: holds adapters of {config.peft_type}, not LoRA")
    if config.bias != "none":
        raise ConfigError(f"model.adapter: {name}: trains biases, which is not done here")
    if _changes_head(model):
        raise ConfigError(f"model.adapter: {name}: changes the output head, which is not trained")
    if wanted is not None and wanted["target_modules"] != "all-linear":
        fault = f"the adapters of {name} are where they were put"
        raise ConfigError(f"lora.target_modules: {fault}; leave it out")
    theirs = {
        "r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout,
        "rslora": config.use_rslora, "dora": config.use_dora,
    }  # fmt: skip
    for key, value in theirs.items():
        if wanted is not None and wanted[key] != value:
            fault = f"{wanted[key]}, but the adapters of {name} have {value}"
            raise ConfigError(f"lora.{key}: {fault}; write that, or leave lora out")
    config.base_model_name_or_path = model.name_or_path  # the maker's may mean nothing here
    return adapted


@torch.no_grad()
def merge_where_exact(model: Any, positions: int) -> float | None:
    """Add adapters to the weights that they are beside, in memory, and return by how much of their
    spread logits differ then; None where it is not done, and weights are as they were.

    In float32 alone: rounded to a half precision, the sum is another model (RESULTS.md).
    """
    kinds = {config.peft_type for config in getattr(model, "peft_config", {}).values()}
    if kinds != {"LORA"} or {p.dtype for p in model.parameters()} != {torch.float32}:
        return None
    held = {name: p.data for name, p in model.named_parameters()}  # merging puts others there
    ids = torch.arange(min(32, positions), device=model.device)[None]
    ids = ids % model.config.get_text_config().vocab_size
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    before = model(**given).logits
    try:
        model.merge_adapter(safe_merge=True)
        differ = ((model(**given).logits - before).abs().max() / before.std()).item()
    except (NotImplementedError, RuntimeError, ValueError):  # peft's, of kinds that cannot be
        differ = float("inf")
    if differ <= EXACT:
        return differ
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on layers that had not been merged yet
        model.unmerge_adapter()
    for name, p in model.named_parameters():
        p.data = held[name]
    return None


def base_record(model: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return what adapters keep of their base, of the `model` of a config, and a run's facts."""
    kept = {key: model[key] for key in ("pretrained", "dtype", "config")}
    kept |= {key: True for key in ("load_in_4bit", "load_in_8bit") if model.get(key)}
    return {"base": model["name"], **kept, "facts": facts}


def check_base(record: Path, model: str, or_else: str = "") -> None:
    """Raise ConfigError if weights were trained in another model: here they mean something else.

    Args:
        record: the manifest of a checkpoint, or `trained_on.json` beside exported adapters.
        model: as `model_fingerprint` makes it.
        or_else: ends the message: what else can be done.
    """
    if json.loads(record.read_text(encoding="utf-8")).get("facts", {}).get("model") != model:
        fault = "was trained in another model than this one"
        why = "trained tensors or frozen weights differ; use its base model, dtype and lora"
        raise ConfigError(f"{record}: {fault}: {why}{or_else}")


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return a sha256 over names, shapes and types of all parameters, and the content of those
    that are frozen under adapters, which no checkpoint of adapters holds.
    """
    rows = []
    # Also where adapters are only used; and the head that one of a classifier is in place of.
    apart = ("lora_", ".modules_to_save.", ".original_module.")
    for name, p in model.named_parameters():
        is_trained = p.requires_grad or any(part in name for part in apart)
        content = is_trained or _checksum(p.detach())
        rows.append((name, *p.shape, p.dtype, content))
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def _checksum(weights: Tensor) -> int:
    """Return a number that depends on every bit of a tensor and on its place, on any device."""
    content = weights.contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(content, (0, -len(content) % 8)).view(torch.int64)
    total = 0
    for part in words.split(1 << 22):  # odd factors, of which none hides a bit
        factors = torch.arange(1, 2 * len(part), 2, device=part.device)
        total = (31 * total + int((part * factors).sum())) % (1 << 64)
    return total


def _changes_head(model: Any) -> bool:
    """Return whether adapters have changed the output embedding, which the loss reads itself."""
    head = model.get_output_embeddings()
    return any(hasattr(head, name) for name in ("lora_A", "modules_to_save"))


def _with_our_layers(adapted: Any) -> Any:
    ours = _layer_class()
    for name, layer in adapted.named_modules():
        if ".modules_to_save." in name and type(layer) is torch.nn.Linear:
            # The head's own weights are trained: a half-precision base would lose small updates.
            layer.float().register_forward_pre_hook(lambda _, given: (given[0].float(),))
        # Exactly these: quantised layers and the like are subclasses with a forward of their own.
        if type(layer) is ours.__base__ and type(layer.base_layer) is torch.nn.Linear:
            layer.__class__ = ours
    return adapted


def _layer_class() -> type:
    from peft.tuners.lora import Linear

    class LoraLinear(Linear):
        """peft's layer, with the plain case of one vanilla adapter in one function."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Return what peft's own forward pass returns, to rounding."""
            base, names = self.base_layer, self.active_adapters
            name = names[0] if len(names) == 1 else None
            if (
                name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]
                or self.disable_adapters or self.merged or args or kwargs
                or base.weight.requires_grad or x.dtype != base.weight.dtype
                or torch.is_autocast_enabled(x.device.type)
                or (self.training and getattr(self.lora_dropout[name], "p", 0))
            ):  # fmt: skip
                return super().forward(x, *args, **kwargs)
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            # A and B may be of a wider type than x, and their gradients are.
            down, up = down.to(x.dtype), (up * self.scaling[name]).to(x.dtype)
            rows = x.reshape(-1, x.shape[-1])
            out, _ = _added_product(rows, base.weight, base.bias, down, up)
            return out.view(*x.shape[:-1], out.shape[-1])

    return LoraLinear


# An operator, as torch.compile would copy what is added to in place, at a tenth of a GPU's step.
@torch.library.custom_op("overture::added_product", mutates_args=())
def _added_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """x W' + b + x A' B', and x A', of rows x, with W and b frozen, all of one type."""
    narrow = x @ down.t()
    return torch.nn.functional.linear(x, weight, bias).addmm_(narrow, up.t()), narrow


@_added_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Any:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(down))


@torch.library.custom_op("overture::added_product_backward", mutates_args=())
def _backward(
    given: Tensor, x: Tensor, narrow: Tensor, weight: Tensor, down: Tensor, up: Tensor, of_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_narrow = given @ up
    back = torch.mm(given, weight).addmm_(of_narrow, down) if of_x else x.new_empty(0)
    return back, of_narrow.t() @ x, given.t() @ narrow


@_backward.register_fake
def _(
    given: Tensor, x: Tensor, narrow: Tensor, weight: Tensor, down: Tensor, up: Tensor, of_x: bool
) -> Any:
    back = torch.empty_like(x) if of_x else x.new_empty(0)
    return back, torch.empty_like(down), torch.empty_like(up)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, down, up = inputs
    ctx.save_for_backward(x, output[1], weight, down, up)


def _gradients(ctx: Any, given: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[0]
    of_x, of_down, of_up = _backward(given.contiguous(), *ctx.saved_tensors, wanted)
    return of_x if wanted else None, None, None, of_down, of_up


_added_product.register_autograd(_gradients, setup_context=_keep)
