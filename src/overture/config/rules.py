"""Combinations of well-typed config values that cannot work, found before torch is imported."""

import re
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, get_args

from overture.config.schema import DOORS, Config, GlueConfig, GlueTask, LoraConfig
from overture.errors import nearest

Problem = tuple[str, str]  # key, what is wrong


def _written(pattern: str, examples: str) -> tuple[Callable, str]:
    return re.compile(pattern).fullmatch, "{!r} is none that can be used here; write " + examples


_SHARE = r"0?\.\d*[1-9]\d*dur|1(\.0)?dur"
_INTERVAL = _written(rf"[1-9]\d*(ep|ba|sp|tok)|{_SHARE}", "1ep, 50ba or 0.25dur")
_AT_LEAST_ONE = (
    "global_train_batch_size", "device_eval_batch_size", "lora.r", "callbacks.throughput.window",
    "generation.num_prompts", "generation.max_new_tokens", "generation.batch_size",
    "generation.num_beams", "callbacks.early_stop.patience",
    "algorithms.seq_length_warmup.step_size",
)  # fmt: skip
_ABOVE_ZERO = (
    "optimizer.lr", "optimizer.eps", "callbacks.loss_target.cross_entropy", "lora.alpha",
    "algorithms.gradient_clipping.clipping_threshold",
)  # fmt: skip
_NOT_NEGATIVE = (
    "optimizer.weight_decay", "train_loader.num_workers", "eval_loader.num_workers",
    "callbacks.early_stop.min_delta", "generation.num_shown", "guards.timeout",
    "guards.max_skips",
)  # fmt: skip
# key -> (whether a value is fine, what is wrong with it); what is not set is fine.
_VALUES: dict[str, tuple[Callable, str]] = {
    **dict.fromkeys(_AT_LEAST_ONE, (lambda n: n >= 1, "must be at least 1")),
    **dict.fromkeys(_ABOVE_ZERO, (lambda n: n > 0, "must be above 0")),
    **dict.fromkeys(_NOT_NEGATIVE, (lambda n: n >= 0, "must not be negative")),
    **dict.fromkeys(("eval_interval", "save_interval"), _INTERVAL),
    "max_seq_len": (lambda n: n >= 2, "must be at least 2 tokens"),
    "seed": (lambda n: 0 <= n < 2**32, "must be between 0 and 2**32 - 1"),
    "device_train_microbatch_size": (lambda n: n == "auto" or n > 0, "must be at least 1, or auto"),
    "optimizer.betas": (lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas),
                        "must be two numbers in [0, 1)"),
    **dict.fromkeys(("train_loader.dataset.mlm_probability", "eval_loader.dataset.mlm_probability"),
                    (lambda share: 0 < share < 1, "must be above 0 and below 1")),
    **dict.fromkeys(("lora.dropout", "label_smoothing"),
                    (lambda share: 0 <= share < 1, "must be in [0, 1)")),
    "algorithms.ema.half_life": _written(r"[1-9]\d*ba", "1000ba"),
    "algorithms.seq_length_warmup.duration": (lambda share: 0 < share <= 1, "must be in (0, 1]"),
    "save_num_checkpoints_to_keep": (lambda n: n >= 1 or n == -1,
                                     "must be at least 1, or -1 to keep all"),
    "max_duration": _written(r"[1-9]\d*(ep|ba|sp|tok)", "3ep, 200ba, 1000sp or 50000tok"),
    "scheduler.t_warmup": _written(r"\d+(ep|ba|sp|tok)|0?\.\d+dur", "0.03dur, 20ba or 0ba"),
    "console_log_interval": _written(r"[1-9]\d*(ep|ba)", "10ba or 1ep"),
}  # fmt: skip


def contradictions(config: Config, tasks: tuple[str, ...], world_size: int) -> list[Problem]:
    """Return (key, what is wrong) for every value out of range and every impossible combination.

    A missing `lora` section is filled with its defaults where `trainable: lora` asks for one.
    """
    found: list[Problem] = []
    for key, (is_fine, text) in _VALUES.items():
        value = _at(config, key)
        if value is not None and not is_fine(value):
            found.append((key, text.format(value)))
    found += _combinations(config, tasks, world_size)
    total, warmup = config.max_duration, config.scheduler.t_warmup
    is_share = warmup.endswith("dur") or {"max_duration", "scheduler.t_warmup"} & dict(found).keys()
    if not is_share and _unit(total) != _unit(warmup):
        text = f"{warmup} and max_duration {total} are in different units; write it as 0.03dur"
        found.append(("scheduler.t_warmup", text))
    return found


def _at(config: Config, key: str) -> Any:
    """Return the value at a dotted key, None where its section is not set."""
    return reduce(lambda section, name: getattr(section, name, None), key.split("."), config)


def _combinations(config: Config, tasks: tuple[str, ...], world_size: int) -> Iterator[Problem]:
    if config.task not in tasks:
        yield "task", f"{config.task!r} is run by {DOORS[config.task]} (here: {', '.join(tasks)})"
    yield from _trainable(config)
    if config.task == "masked_lm" and config.trainable == "lora":
        yield "trainable", "adapters are not trained by task: masked_lm; set trainable: all"
    for key in ("train_loader", "eval_loader"):
        key = f"{key}.dataset.mlm_probability"
        if config.task != "masked_lm" and _at(config, key) is not None:
            yield key, "needs task: masked_lm"
    yield from _streams(config)
    if config.fsdp_config is not None:
        yield from sharding_problems(config)
    for key in (
        "callbacks.loss_target", "callbacks.early_stop", "eval_first", "generation", "metrics",
    ):  # fmt: skip
        if config.eval_loader is None and _at(config, key):
            yield key, "needs an eval_loader"
    if config.callbacks.mlperf_log is not None and config.callbacks.loss_target is None:
        yield "callbacks.mlperf_log", "is of runs to a target: set callbacks.loss_target too"
    if config.generation is not None and config.task not in ("instruct", "chat", "seq2seq"):
        yield "generation", "scores answers to prompts, so it needs task: instruct, chat or seq2seq"
    if config.task != "seq2seq":
        for key in ("label_smoothing", "generation.bleu_tokenize", "generation.num_shown"):
            if _at(config, key):
                yield key, f"is for task: seq2seq, not {config.task}"
    elif config.compile:
        yield "compile", "is for models without an encoder before them; leave it out"
    if config.algorithms.ema is not None:
        for key in ("callbacks.early_stop", "generation" if config.task == "seq2seq" else ""):
            if _at(config, key) is not None:
                yield key, "would meet other weights than algorithms.ema evaluates; leave one out"
    if config.task == "classify":
        if config.compile:
            yield "compile", "is for language models; leave it out of task: classify"
        for key in sorted({"id2label", "label2id", "problem_type"} & config.model.config.keys()):
            yield f"model.config.{key}", "is what the converted data says; leave it out"
    elif config.metrics is not None:
        yield "metrics", f"{config.metrics} is for task: classify, not {config.task}"
    cached = [(s.data_local, s.split) for _, s, _ in config.splits() if s.data_remote]
    if twice := next((place for place in cached if cached.count(place) > 1), None):
        place = "/".join(map(str, twice))
        yield "data_local", f"{place} is a cache, which only one loader can read"
    if config.eval_loader is not None and config.eval_loader.drop_last:
        yield "eval_loader.drop_last", "would leave samples out of the evaluation"
    if not re.fullmatch(r"(?!\.)[\w.=-]+", config.run_name or ""):
        yield "run_name", f"{config.run_name!r} must be letters, digits, and any of . _ = -"
    if config.load_weights_only and config.load_path is None:
        yield "load_weights_only", "needs a load_path"
    if config.progress_bar and config.console_log_interval is not None:
        yield "console_log_interval", "needs progress_bar: false (both would write over each other)"
    if config.scheduler.name == "constant_with_warmup" and config.scheduler.alpha_f is not None:
        yield "scheduler.alpha_f", "has no effect on constant_with_warmup"
    warmup = config.algorithms.seq_length_warmup
    if warmup and not 2 <= warmup.min_seq_length < config.max_seq_len:
        text = f"{warmup.min_seq_length} must be from 2 to below max_seq_len {config.max_seq_len}"
        yield "algorithms.seq_length_warmup.min_seq_length", text
    if warmup and config.task != "causal_lm":
        yield "algorithms.seq_length_warmup", "cuts documents, so it is for task: causal_lm"
    total, micro = config.global_train_batch_size, config.device_train_microbatch_size
    each, rest = divmod(total, world_size)
    if total >= 1 and rest:
        yield "global_train_batch_size", f"{total} cannot be divided evenly over {world_size} ranks"
    elif total >= 1 and micro != "auto" and 1 <= micro < each and each % micro:
        divided = f"global_train_batch_size {total} over {world_size} ranks"
        text = f"{micro} does not divide the {each} samples of each rank ({divided})"
        yield "device_train_microbatch_size", text


def _trainable(config: Config) -> Iterator[Problem]:
    trainable, model = config.trainable, config.model
    known = ("lora", "all", "last_layer")
    if isinstance(trainable, str) and trainable not in known:
        hint = nearest(trainable, known)
        text = f"{trainable!r} is none{hint}; allowed: {', '.join(known)}, or a list of patterns"
        yield "trainable", text
    if not trainable:
        yield "trainable", "names nothing to train"
    if trainable != "lora":
        for key in ("lora", "model.adapter"):
            if _at(config, key) is not None:
                yield key, f"is set, but trainable is {trainable!r}; set trainable: lora"
        if model.dtype != "float32":
            reason = "needs float32 (bfloat16 loses small updates)"
            yield "model.dtype", f"trainable: {trainable} {reason}"
    elif model.adapter is None:
        config.lora = config.lora or LoraConfig()
    quantised = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(model, key)]
    for key in quantised:
        if trainable != "lora":
            yield f"model.{key}", "such weights cannot be trained; set trainable: lora"
        elif not model.pretrained:
            yield f"model.{key}", "is for weights that were trained; leave it out"
    if len(quantised) == 2:
        yield "model.load_in_8bit", "is set, and so is load_in_4bit; leave one of them out"


def sharding_problems(config: Config) -> Iterator[Problem]:
    whole = "needs the whole model on each rank, so it cannot be used with fsdp_config"
    for key in (
        "compile", "generation", "model.adapter", "model.load_in_4bit", "model.load_in_8bit",
        "algorithms.ema", "callbacks.early_stop.keep_best", "algorithms.low_precision_layernorm",
    ):  # fmt: skip
        if _at(config, key):
            yield key, whole
    if _at(config, "algorithms.gradient_clipping.clipping_type") == "adaptive":
        yield "algorithms.gradient_clipping.clipping_type", f"adaptive {whole}"
    if config.model.dtype != "float32":
        text = "shards are of one type, float32; precision: amp_bf16 computes in bfloat16"
        yield "model.dtype", f"with fsdp_config {text}"
    if config.fsdp_config.cpu_offload and config.callbacks.memory_monitor is not None:
        text = "looks at the GPU that holds the weights, which is none with fsdp_config.cpu_offload"
        yield "callbacks.memory_monitor", f"{text}; leave it out"
    if config.precision == "amp_fp16":
        yield "precision", "amp_fp16 is not scaled with fsdp_config; set amp_bf16"
    if config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size", "auto is not found out with fsdp_config; say it"
    if config.fsdp_config.state_dict_type == "sharded" and "://" in (config.save_folder or ""):
        text = f"sharded is written to a folder that all nodes share, not to {config.save_folder}"
        yield "fsdp_config.state_dict_type", f"{text}; set full"


def _streams(config: Config) -> Iterator[Problem]:
    loaders = {key: of for key in ("train_loader", "eval_loader") if (of := getattr(config, key))}
    if not any(loader.streams for loader in loaders.values()):
        if config.data_local is None:
            yield "data_local", "missing: the folder of the shards, or the cache for data_remote"
        return
    for key in ("data_local", "data_remote"):
        if getattr(config, key) is not None:
            yield key, "is set, and so are streams, which name their own; leave one of them out"
    for key, loader in loaders.items():
        if not loader.streams:
            yield f"{key}.streams", "missing: if one loader has streams, the other has them too"
        if loader.streams and loader.dataset.split != "train":
            yield f"{key}.dataset.split", "has no effect: streams name their own splits"
        places: dict[tuple[str, str], str] = {}
        relative = [name for name, s in loader.streams.items() if s.proportion is not None]
        for name, stream in loader.streams.items():
            here = f"{key}.streams.{name}"
            weights = {w: getattr(stream, w) for w in ("proportion", "repeat", "choose")}
            weights = {w: value for w, value in weights.items() if value is not None}
            if key == "eval_loader" and weights:
                yield f"{here}.{next(iter(weights))}", "an evaluation reads every row once"
            elif len(weights) > 1:
                yield here, f"takes one of {', '.join(weights)}"
            elif relative and "proportion" not in weights:
                yield here, f"has no proportion, but {relative[0]} has; all have one or none does"
            for weight in [w for w, value in weights.items() if value <= 0]:
                yield f"{here}.{weight}", "must be above 0"
            other = places.setdefault((stream.data_local, stream.split), name)
            if other != name:
                yield here, f"is the same split of the same folder as {other}"


# What evaluate_glue.py sets for each of its jobs.
_OF_A_JOB = (
    "task", "seed", "run_name", "run_folder", "data_local", "data_remote", "metrics",
    "save_folder", "load_path",
)  # fmt: skip


def glue_contradictions(config: GlueConfig) -> Iterator[Problem]:
    """Yield (key, what is wrong) for every value of a GLUE config that cannot be used."""
    for key in ("tasks", "seeds"):
        values = getattr(config, key)
        if not values or len(set(values)) < len(values):
            yield key, f"{values} must name some, each once"
    for key, least in (("parallel", 1), ("retries", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            yield key, f"must be at least {least}"
    for task in config.overrides.keys() - {*get_args(GlueTask)}:
        yield f"overrides.{task}", f"is none of the tasks ({', '.join(get_args(GlueTask))})"
    model = config.finetune.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("name"), str):
        yield "finetune.model.name", "missing: the encoder that is tuned"
    if not isinstance(config.finetune.get("max_seq_len"), int):
        yield "finetune.max_seq_len", "missing: tokens of the longest row"
    sections = {"finetune": config.finetune}
    sections |= {f"overrides.{task}": keys for task, keys in config.overrides.items()}
    for name, keys in sections.items():
        for key in _OF_A_JOB:
            if key in keys:
                yield f"{name}.{key}", "is set for each job; leave it out"


def _unit(duration: str) -> str:
    # Composer converts between epochs and batches, but to neither from samples or tokens.
    unit = duration.lstrip("0123456789")
    return "steps" if unit in ("ep", "ba") else unit
