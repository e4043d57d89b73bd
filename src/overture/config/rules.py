"""Combinations of well-typed config values that cannot work, found before torch is imported."""

from __future__ import annotations

import re

from overture.config.schema import Config, LoraConfig

_DURATION = re.compile(r"[1-9]\d*(ep|ba|sp|tok)")
_INTERVAL = re.compile(r"[1-9]\d*(ep|ba|sp|tok)|0?\.\d*[1-9]\d*dur|1(\.0)?dur")
_WARMUP = re.compile(r"\d+(ep|ba|sp|tok)|0?\.\d+dur")
_CONSOLE = re.compile(r"[1-9]\d*(ep|ba)")


def contradictions(
    config: Config, tasks: tuple[str, ...], world_size: int
) -> list[tuple[str, str]]:
    """Return (key, what is wrong) for every value out of range and every impossible combination.

    A missing `lora` section is filled with its defaults where `trainable: lora` asks for one.
    """
    found = _ranges(config) + _durations(config) + _batches(config, world_size)

    def refuse(key: str, text: str) -> None:
        found.append((key, text))

    if config.task not in tasks:
        door = "finetune.py" if config.task == "instruct" else "main.py"
        refuse("task", f"{config.task!r} is run by {door} (here: {', '.join(tasks)})")
    if config.trainable == "lora":
        config.lora = config.lora or LoraConfig()
    elif config.lora is not None:
        refuse("lora", f"is set, but trainable is {config.trainable!r}; set trainable: lora")
    if config.trainable == "all" and config.model.dtype != "float32":
        refuse("model.dtype", "training all weights needs float32 (bfloat16 loses small updates)")
    if config.data_local is None:
        refuse("data_local", "missing: the folder of the shards, or the cache for data_remote")
    if config.eval_loader is None:
        for key, value in (
            ("callbacks.loss_target", config.callbacks.loss_target),
            ("eval_first", config.eval_first),
            ("generation", config.generation),
        ):
            if value:
                refuse(key, "needs an eval_loader")
    if config.generation is not None and config.task != "instruct":
        refuse("generation", "scores answers to prompts, so it needs task: instruct")
    if config.eval_loader is not None and config.eval_loader.drop_last:
        refuse("eval_loader.drop_last", "would leave samples out of the evaluation")
    if not re.fullmatch(r"[\w.=-]+", config.run_name or "") or config.run_name.startswith("."):
        refuse("run_name", f"{config.run_name!r} must be letters, digits, and any of . _ = -")
    if config.load_weights_only and config.load_path is None:
        refuse("load_weights_only", "needs a load_path")
    if config.progress_bar and config.console_log_interval is not None:
        refuse(
            "console_log_interval", "needs progress_bar: false (both would write over each other)"
        )
    if config.scheduler.name == "constant_with_warmup" and config.scheduler.alpha_f is not None:
        refuse("scheduler.alpha_f", "has no effect on constant_with_warmup")
    return found


def _ranges(config: Config) -> list[tuple[str, str]]:
    lora = config.lora or LoraConfig()
    generation, window = config.generation, config.callbacks.throughput.window
    rows = [
        ("max_seq_len", config.max_seq_len >= 2, "must be at least 2 tokens"),
        ("seed", 0 <= config.seed < 2**32, "must be between 0 and 2**32 - 1"),
        ("global_train_batch_size", config.global_train_batch_size >= 1, "must be at least 1"),
        ("device_eval_batch_size", config.device_eval_batch_size >= 1, "must be at least 1"),
        ("optimizer.lr", config.optimizer.lr > 0, "must be above 0"),
        ("optimizer.eps", config.optimizer.eps > 0, "must be above 0"),
        ("optimizer.weight_decay", config.optimizer.weight_decay >= 0, "must not be negative"),
        (
            "optimizer.betas",
            len(config.optimizer.betas) == 2 and all(0 <= b < 1 for b in config.optimizer.betas),
            "must be two numbers in [0, 1)",
        ),
        ("lora.r", lora.r >= 1, "must be at least 1"),
        ("callbacks.throughput.window", window >= 1, "must be at least 1"),
        ("lora.dropout", 0 <= lora.dropout < 1, "must be in [0, 1)"),
        ("train_loader.num_workers", config.train_loader.num_workers >= 0, "must not be negative"),
        (
            "save_num_checkpoints_to_keep",
            config.save_num_checkpoints_to_keep >= 1 or config.save_num_checkpoints_to_keep == -1,
            "must be at least 1, or -1 to keep all",
        ),
    ]
    if config.eval_loader is not None:
        workers = config.eval_loader.num_workers
        rows.append(("eval_loader.num_workers", workers >= 0, "must not be negative"))
    if config.callbacks.loss_target is not None:
        target = config.callbacks.loss_target.cross_entropy
        rows.append(("callbacks.loss_target.cross_entropy", target > 0, "must be above 0"))
    if generation is not None:
        for name in ("num_prompts", "max_new_tokens", "batch_size"):
            rows.append(
                (f"generation.{name}", getattr(generation, name) >= 1, "must be at least 1")
            )
    return [(key, text) for key, fine, text in rows if not fine]


def _durations(config: Config) -> list[tuple[str, str]]:
    rows = [
        ("max_duration", config.max_duration, _DURATION, "3ep, 200ba, 1000sp or 50000tok"),
        ("scheduler.t_warmup", config.scheduler.t_warmup, _WARMUP, "0.03dur, 20ba or 0ba"),
        ("eval_interval", config.eval_interval, _INTERVAL, "1ep, 50ba or 0.25dur"),
        ("save_interval", config.save_interval, _INTERVAL, "1ep, 50ba or 0.25dur"),
        ("console_log_interval", config.console_log_interval, _CONSOLE, "10ba or 1ep"),
    ]
    found = [
        (key, f"{value!r} is none that can be used here; write {examples}")
        for key, value, pattern, examples in rows
        if value is not None and not pattern.fullmatch(value)
    ]
    total, warmup = config.max_duration, config.scheduler.t_warmup
    if not found and not warmup.endswith("dur") and {_unit(total), _unit(warmup)} > {"steps"}:
        text = f"{warmup} and max_duration {total} are in different units; write it as 0.03dur"
        found.append(("scheduler.t_warmup", text))
    return found


def _unit(duration: str) -> str:
    # Composer converts between epochs and batches, but to neither from samples or tokens.
    unit = duration.lstrip("0123456789")
    return "steps" if unit in ("ep", "ba") else unit


def _batches(config: Config, world_size: int) -> list[tuple[str, str]]:
    total, micro = config.global_train_batch_size, config.device_train_microbatch_size
    if total < 1:
        return []
    if total % world_size:
        text = f"{total} cannot be divided evenly over {world_size} ranks"
        return [("global_train_batch_size", text)]
    if micro == "auto":
        return []
    if micro < 1:
        return [("device_train_microbatch_size", "must be at least 1, or auto")]
    if (total // world_size) % micro:
        text = (
            f"{micro} does not divide the {total // world_size} samples of each rank "
            f"(global_train_batch_size {total} over {world_size} ranks)"
        )
        return [("device_train_microbatch_size", text)]
    return []
