"""A trained model by any of its names: run, checkpoint, folder of transformers' or peft's, hub."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from overture.checkpoint import MANIFEST, checkpoint_to_load, numbered
from overture.config.schema import ModelConfig
from overture.data.schema import LEDGER, read_ledger
from overture.errors import ConfigError
from overture.models import lora
from overture.models.build import load_network, locate_model
from overture.offline import in_reach
from overture.tokenizer import load_tokenizer
from overture.training.sharding import METADATA, whole_from_shards

ADAPTERS = "adapter_config.json"
HEADS = {kind: head for head, kind in lora.TASK_TYPES.items()}
TYPES = ("float32", "bfloat16", "float16")
# What our functions call by the key of a config is an option of the doors that load a model.
_OPTIONS = {
    "model.name: ": "", "load_path: ": "", "set load_unverified=true": "give --load_unverified",
    "set model.trust_remote_code=true": "give --trust_remote_code",
    "; on a CPU model.dtype=bfloat16 halves the weights": ", as it was trained",
}  # fmt: skip


class Trained(NamedTuple):
    """A model that writes or classifies, ready to be asked."""

    name: str
    head: str  # of transformers: CausalLM, Seq2SeqLM or SequenceClassification
    model: Any  # of transformers, or a PeftModel over one
    tokenizer: Any
    base: str | None  # what adapters, if it has some, are over
    record: dict[str, Any]  # what they keep of it, where they are ours
    run: Path | None  # the run folder that it comes from
    at_end: bool = True  # rather than one of its checkpoints


def load_trained(
    name: str, adapter: str | None = None, trust: bool = False, unverified: bool = False,
    device_map: str | None = None,
) -> Trained:  # fmt: skip
    """Return a model, on the accelerator if there is one, with the adapters that it has.

    `unverified` allows for a checkpoint without our manifest, `trust` for code of its maker's;
    a `device_map` of accelerate's, as "auto", spreads it over several devices. Raises ConfigError:
    nothing of the kind is there, it neither writes nor classifies, or the adapters are for another
    one, by its content. DataError: a checkpoint is not what was written.
    """
    with tempfile.TemporaryDirectory() as aside, _options_named():
        place = _place(name, Path(aside) / "model", unverified)
        base, adapters, record = place, None, {}
        if adapter:
            of_hub = lora.adapters_of_hub(adapter, required=True)
            adapters = of_hub or Path(_place(adapter, Path(aside) / "adapter", unverified))
            if not (adapters / ADAPTERS).is_file():
                raise ConfigError(f"--adapter {adapter}: holds no adapters ({ADAPTERS} is missing)")
        elif (of_hub := lora.adapters_of_hub(place)) or (Path(place) / ADAPTERS).is_file():
            base, adapters = None, of_hub or Path(place)
        if adapters:
            record = _read(adapters / lora.RECORD) if (adapters / lora.RECORD).is_file() else {}
            base = base or _base_of(name, adapters, record)
        kind = _read(adapters / ADAPTERS).get("task_type") if adapters else None
        head, dtype = _saved_as(base, trust, HEADS.get(kind))
        use = record.get("facts", {}).get("use") or {}
        labels = _labels(use, adapters) if kind == "SEQ_CLS" else None
        dtype = record["dtype"] if record.get("dtype") in TYPES else dtype
        options = {key: True for key in ("load_in_4bit", "load_in_8bit") if record.get(key)}
        options |= {"config": record.get("config", {}), "trust_remote_code": trust}
        wanted = ModelConfig(base, True, dtype, **options)
        has_own = adapters and (adapters / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(str(adapters) if has_own else base, trust)
        model = load_network(wanted, tokenizer, head=head, labels=labels, device_map=device_map)
        # A classifier's head may come with its adapters.
        beside = f"{model.base_model_prefix}." if adapters and head == HEADS["SEQ_CLS"] else ""
        if lost := [key for key in model.made_anew if key.startswith(beside)]:
            fault = f"lacks {len(lost)} tensors of its model ({lost[0]}, ...)"
            raise ConfigError(f"{name}: {fault}, which would be drawn at random")
        if adapters and any(p.is_meta for p in model.parameters()):
            fault = "not all of the base fits on the devices, and adapters want it there"
            raise ConfigError(f"--device_map {device_map}: {name}: {fault}")
        if not device_map and not getattr(model, "is_quantized", False):
            try:
                model.to("cuda" if torch.cuda.is_available() else "cpu")
            except torch.OutOfMemoryError:
                advice = "give --device_map auto, or for a CPU set CUDA_VISIBLE_DEVICES="
                raise ConfigError(f"{name}: does not fit on one GPU; {advice}") from None
        model.eval()
        if "generation" in use:  # how the decoder begins, which the base does not know
            model.generation_config.update(**use["generation"], _from_model_config=False)
        if adapters:
            model = lora.load_adapters(model, adapters).eval()
        if record:
            lora.check_base(adapters / lora.RECORD, lora.model_fingerprint(model))
        run = _run_folder(adapter or name)
        within = Path(adapter or name).absolute().relative_to(run.absolute()) if run else Path()
        at_end = "checkpoints" not in within.parts
        base = base if adapters else None
        return Trained(name, head, model, tokenizer, base, record, run, at_end)


def ledgers(run: Path | None) -> list[dict[str, Any]]:
    """Return the ledgers of the splits of a run that are there as they were, of training first."""
    if run is None:
        return []
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    streams: list[dict[str, Any]] = []
    for loader in filter(None, (config.get("train_loader"), config.get("eval_loader"))):
        single = {"data_local": config["data_local"], "split": loader["dataset"]["split"]}
        streams += (loader.get("streams") or {"": single}).values()
    folders = [Path(stream["data_local"]) / stream["split"] for stream in streams]
    found = [{**read_ledger(f), "folder": f} for f in folders if (f / LEDGER).is_file()]
    data = _read(run / "environment.json").get("data", ())
    known = [(row["samples"], row["tokens"]) for row in data]  # others may lie there by now
    return [x for x in found if not known or (x["samples"], x["tokens"]["total"]) in known]


@contextmanager
def _options_named() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for key, option in _OPTIONS.items():
            text = text.replace(key, option)
        raise ConfigError(text) from None


def _run_folder(name: str) -> Path | None:
    parents = (Path(name), *Path(name).absolute().parents[:3]) if Path(name).exists() else ()
    return next((p for p in parents if (p / "environment.json").is_file()), None)


def _place(name: str, aside: Path, unverified: bool) -> str:
    """Return the folder of what is there under a name, unpacked `aside`, or a name of the hub."""
    path = Path(name)
    if (path / "hf").is_dir():
        return str(path / "hf")
    is_checkpoint = path.is_file() or "://" in name or (path / MANIFEST).is_file()
    if not is_checkpoint and not (numbered(path) or numbered(path / "checkpoints")):
        return name
    file = checkpoint_to_load(name, unverified, aside.with_name("fetched"))
    return str(_unpack(file, aside))


def _base_of(name: str, adapters: Path, record: dict[str, Any]) -> str:
    """Return the model that adapters are for, as their record or peft's config has it."""
    base = record.get("base") or _read(adapters / ADAPTERS).get("base_model_name_or_path")
    if not record.get("pretrained", True):
        fault = "the weights under its adapters were drawn at random, and are kept nowhere"
        raise ConfigError(f"{name}: {fault}: it cannot be used")
    if not isinstance(base, str):
        raise ConfigError(f"{name}: names no base model; give that, and this as --adapter")
    return base


def _saved_as(location: str, trust: bool, head: str | None) -> tuple[str, str]:
    """Return the head and the type that weights are saved with; ConfigError unless they are a
    model's that writes or classifies. With adapters for a `head` it may be another one's.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto import modeling_auto as auto

    place = locate_model(location)
    in_reach(place)
    try:
        content = PretrainedConfig.get_config_dict(place)[0]
    except (OSError, ValueError):
        return head or "CausalLM", "float32"  # that there is none will be said where it is loaded
    kinds, pairs = content.get("architectures") or [], content.get("is_encoder_decoder")
    saved = str(content.get("dtype") or content.get("torch_dtype")).removeprefix("torch.")
    dtype = saved if saved in TYPES else "float32"
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        head = head or "SequenceClassification"
    if head == "SequenceClassification":
        return head, dtype
    names = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM" if pairs else "MODEL_FOR_CAUSAL_LM"
    known = {*getattr(auto, f"{names}_MAPPING_NAMES").values()}
    if kinds and not trust and not {*kinds} & known:
        fault = f"a {kinds[0]} neither writes nor classifies, so it can only be trained on"
        raise ConfigError(f"{location}: {fault}")
    return "Seq2SeqLM" if pairs else "CausalLM", dtype


def _labels(use: dict[str, Any], adapters: Path) -> dict[str, Any]:
    labels = use.get("labels")
    if not isinstance(labels, dict):
        fault = f"it is not known which labels the adapters are for ({lora.RECORD})"
        raise ConfigError(f"{adapters.name}: {fault}; use the run that they are from")
    return labels | {"id2label": {int(n): name for n, name in labels["id2label"].items()}}


def _read(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _averaged(state: dict[str, Any]) -> dict[str, Any]:
    """Return the averaged weights of a checkpoint that lie beside those of training, if any."""
    for _, kept in state.get("algorithms", ()):
        if kept.get("ema_started") and not kept["ema_weights_active"]:
            named = kept["ema_model"]["named_parameters_dict"].items()
            found = {name.removeprefix("module."): tensor for name, tensor in named}
            return {name: found[name] for name in state["model"].keys() & found.keys()}
    return {}


def _unpack(file: Path, into: Path) -> Path:
    """Write the model or adapters, and the tokenizer, in a checkpoint of Composer's as a folder."""
    from composer.models import HuggingFaceModel
    from safetensors.torch import save_file

    into.mkdir(parents=True)
    try:
        # A pickle: `checkpoint_to_load` has compared its hash, or the user trusts its maker.
        state = torch.load(file, map_location="cpu", weights_only=False)["state"]
        if (file.parent / METADATA).is_file():
            state["model"] = whole_from_shards(file.parent)
        state["model"].update(_averaged(state))
        known = state["integrations"]["huggingface"]
        HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(known, False, str(into))
        weights = {n.removeprefix("model."): t.clone() for n, t in state["model"].items()}
        has_adapters = "peft_config" in known["model"]
        config = known["model"]["peft_config" if has_adapters else "config"]["content"]
        if not has_adapters:  # the config is that of its base, whose head may have been another
            kind = known["model"]["config"]["class"].rpartition(".")[2]
            config["architectures"] = [kind.removeprefix("FSDP")]  # as that of a sharded one begins
    except Exception as error:  # unpickling can run into anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise ConfigError(f"{file}: holds no model of transformers' ({reason})") from None
    for part in (".modules_to_save", ".default") if has_adapters else ():  # which peft puts in
        weights = {name.replace(part, ""): tensor for name, tensor in weights.items()}
    name = "adapter_model" if has_adapters else "model"
    save_file(weights, into / f"{name}.safetensors", {"format": "pt"})
    place = into / (ADAPTERS if has_adapters else "config.json")
    place.write_text(json.dumps(config), encoding="utf-8")
    if (file.parent / MANIFEST).is_file():
        manifest = _read(file.parent / MANIFEST)
        record = lora.base_record(yaml.safe_load(manifest["config"])["model"], manifest["facts"])
        begins = manifest["facts"].get("use", {}).get("generation")
        if has_adapters:
            (into / lora.RECORD).write_text(json.dumps(record), encoding="utf-8")
        elif begins:
            from transformers import GenerationConfig, PretrainedConfig

            made = GenerationConfig.from_model_config(PretrainedConfig.from_dict(config))
            made.update(**begins, _from_model_config=False)  # or it would be made of that again
            made.save_pretrained(into)
    return into
