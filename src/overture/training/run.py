"""The recipe: config in, trained model and run folder out. Reads top to bottom."""

import json
import math
import os
import signal
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import get_precision_context
from composer.utils import dist, reproducibility

from overture.callbacks.early_stop import EarlyStop
from overture.callbacks.guards import FiniteGuard, GradientGuard, SpikeGuard, Watchdog
from overture.callbacks.loss_target import LossTarget
from overture.callbacks.mlperf_log import MLPerfLog, facts_of
from overture.callbacks.run_log import RunLog
from overture.callbacks.throughput import Throughput
from overture.checkpoint import STATE
from overture.config.schema import Config, LoaderConfig
from overture.config.secrets import redact
from overture.data.labels import describe_labels, head_config
from overture.data.loaders import build_loader
from overture.data.schema import INDEX, sha256_file, write_aside
from overture.errors import EXIT_DONE, EXIT_TARGET_MISSED, ConfigError, DataError, Preempted
from overture.export import save_model
from overture.generate import end_tokens
from overture.models.attention import describe_attention
from overture.models.build import position_limit
from overture.models.lora import base_record, model_fingerprint
from overture.models.trainable import describe_trained
from overture.report import TOKEN_LOSSES, build_report, summary_lines
from overture.talk import chat_ends
from overture.tokenizer import load_tokenizer, tokenizer_sha256
from overture.training import load_path, monitors, resume, sharding
from overture.training import run_folder as runs
from overture.training.answers import Translations, held_out_answers
from overture.training.cores import use_cores
from overture.training.monitors import build_callbacks
from overture.training.network import begin_of_targets, build_network, check_splits, choose_device
from overture.training.optim import (
    adopt_settings,
    build_optimizer,
    build_scheduler,
    drop_empty_scaler,
)
from overture.training.preemption import StopRequest
from overture.training.quiet import quiet_libraries, quiet_trainer
from overture.training.tasks import TASKS
from overture.training.token_losses import write_token_losses

BEFORE = "before.json"  # the answers before training, until the end
BEST = "best.safetensors"  # the trained weights of the best evaluation, until the end


def train(config: Config, command: str) -> int:
    """Train as a config says and return the exit code; `command` is noted in the run folder.

    Raises ConfigError if what the config names does not exist or fit, and the other errors of
    `errors.py` as they are described there.
    """
    request = StopRequest()
    try:
        return _train(config, command, request)
    except (RuntimeError, OSError) as error:  # ranks that are gone and full disks, at any time
        raise runs.explain(error, config) from None
    finally:
        request.close()
        runs.end_run()


def _train(config: Config, command: str, request: StopRequest) -> int:
    quiet_libraries()
    device = choose_device(config)
    cpu_autocast = device == "cpu" and config.precision == "amp_bf16"
    precision = "fp32" if cpu_autocast else config.precision
    if config.fsdp_config is not None and config.fsdp_config.cpu_offload:
        sharding.speak_from_hosts()
    # Ranks wait for rank zero while it saves; one that is gone is noticed at once.
    dist.initialize_dist(device, timeout=max(config.guards.timeout or 7 * 86_400.0, 300.0))
    reproducibility.seed_all(config.seed)
    run_folder = runs.refuse_finished_run(config)
    found = resume.find_checkpoint(config)
    if found is None:
        resume.on_rank_zero(lambda: runs.refuse_lost_run(config))
    say = print if dist.get_global_rank() == 0 else lambda *_, **__: None

    # Model: base weights, then adapters.
    name = config.tokenizer_name or config.model.name
    tokenizer = load_tokenizer(name, config.model.trust_remote_code)
    ledgers = check_splits(config, tokenizer)
    network = build_network(config, tokenizer, device, ledgers)
    if config.task == "chat":  # so that it is asked as it was trained, and ends so
        asked = next(iter(ledgers.values()))["template"]
        tokenizer.chat_template = asked or tokenizer.chat_template
        ends = {*(end_tokens(network, tokenizer) or ()), *chat_ends(tokenizer)}
        network.generation_config.eos_token_id = sorted(ends)
    monitors.exchange_modules(network, config, precision)
    data = _same_data(config)
    facts = {"dataset": data, **resume.on_rank_zero(lambda: _facts(tokenizer, network))}
    if found:
        resume.check_facts(found[1]["facts"], facts, config.resume.allow)
        say(f"going on from {found[0]}")
    if not any(p.requires_grad for p in network.parameters()):
        raise ConfigError(f"trainable: {config.trainable}: no parameter would be trained")
    say(config.model.name, *describe_trained(network), sep="\n")
    if config.trainable == "lora" and not config.model.pretrained:
        say("warning: adapters over weights drawn at random, which nobody can use without them")
    if network.made_anew:
        shown = ", ".join(network.made_anew[:4]) + ", ..." * (len(network.made_anew) > 4)
        say(f"made anew, as {config.model.name} has none of that name and shape: {shown}")
    for line in describe_labels(ledgers):
        say(line)
    say(describe_attention(network, device))
    if device == "cpu" or (config.fsdp_config is not None and config.fsdp_config.cpu_offload):
        say(use_cores())  # where the optimizer steps

    # Held-out data, and what the model makes of it before training.
    workers = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, stacks of those of the loaders
    task = TASKS[config.task]

    def loader(of: LoaderConfig, batch_size: int, training: bool) -> Any:
        collate = task.collator(config, tokenizer, training)
        return build_loader(config, of, collate, batch_size, workers)

    per_rank = config.global_train_batch_size // dist.get_world_size()
    evaluation = samples = training = None
    if config.eval_loader is not None:
        evaluation = loader(config.eval_loader, config.device_eval_batch_size, training=False)
        samples = evaluation.num_samples
    if config.task == "chat":
        ends = network.generation_config.eos_token_id
        facts["use"] = {"generation": {"eos_token_id": ends}}
    if config.task == "classify":
        facts["use"] = {"labels": head_config(ledgers)}
    if config.task == "seq2seq":
        if evaluation is None:
            training = loader(config.train_loader, per_rank, training=True)
        targets = (evaluation or training).dataloader.dataset
        begins = begin_of_targets(config, network, targets, tokenizer)
        facts["use"] = {"generation": begins}
    model = task.model(config, network, tokenizer, samples, cpu_autocast)
    if config.fsdp_config is None:
        model.to("cuda" if device == "gpu" else "cpu")
    if config.compile:
        model.compile_backbone()
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    start = found[0] / STATE if found else None
    if config.load_path and not found:
        start = load_path.find_load_path(config, facts["model"])
        load_path.refuse_as_long(config, start)
    answers = None
    if config.generation is not None:
        held_out, limit = evaluation.dataloader.dataset, position_limit(network)
        answers = held_out_answers(config, held_out, tokenizer, limit)
        if found:
            answers.recall(run_folder / BEFORE)
        elif config.load_path:
            load_path.take_weights(model, start, shapes)
        if not answers.before and not (found and config.load_path):  # whose weights are not here
            answers.before = answers.ask(network, "answers before training")

    # Time to train starts here, before a batch is read; shards were hashed before.
    clock_ms = time.time_ns() // 10**6
    throughput = Throughput(**vars(config.callbacks.throughput))
    log = RunLog(run_folder, throughput)
    early = target = None
    if config.callbacks.early_stop is not None:
        early = EarlyStop(**vars(config.callbacks.early_stop), path=run_folder / BEST, log=log)
    if config.callbacks.loss_target is not None:
        target = LossTarget(config.callbacks.loss_target.cross_entropy, log)
    training = training or loader(config.train_loader, per_rank, training=True)
    resume.check_room(config, resume.checkpoint_bytes(config, model))
    weights_only = config.load_weights_only and not found
    strict = config.trainable == "all"  # adapters are saved by themselves
    sharded = start is not None and (start.parent / sharding.METADATA).is_file()
    foreign = partial(load_path.foreign_state, trained=shapes, path=start)
    # From here on there is a run; what failed before left nothing.
    if found:
        resume.bring(found[0], config)
    runs.begin_run(config, command, found is not None, ledgers)
    if answers and dist.get_global_rank() == 0:  # a part that goes on has other weights
        write_aside(run_folder / BEFORE, json.dumps(answers.before))
    for event in [*found[1]["set_aside"], "resumed"] if found else []:
        log.note(found[1]["batch"], event)
    saver = resume.Checkpointer(config, facts, request)
    exact, stacks = resume.ExactResume(), run_folder / f"stacks-{os.getpid()}.txt"

    def fail(why: str, preempted: bool = False) -> None:
        status = "preempted" if preempted else "failed"
        known = {"run_name": config.run_name, "status": status, "error": redact(why)}
        with suppress(OSError):  # a full disk may be why
            log.flush()
        with suppress(OSError):
            runs.write_result(run_folder, known)
        if dist.get_global_rank() == 0 and not preempted:
            with suppress(Exception):  # the page shows where it went wrong, if it can be made
                build_report(run_folder)

    watchdog = Watchdog(config.guards.timeout, stacks, workers, fail)
    if isinstance(answers, Translations):
        answers.enough = lambda: request.asked
        log.more = watchdog.unwatched(partial(answers.judge, network, log))
    finite = FiniteGuard(config.guards.non_finite, config.guards.max_skips, log)
    spikes = SpikeGuard(config.guards.loss_spike == "stop", log)
    mlperf = None
    if config.callbacks.mlperf_log is not None:
        known = facts_of(config, training.num_samples, samples)
        mlperf = MLPerfLog(log, known, clock_ms, resumed=found is not None)
    optimizer = build_optimizer(model, config.optimizer)
    settings = [dict(group) for group in optimizer.param_groups]
    trainer = Trainer(
        model=model,
        train_dataloader=training,
        eval_dataloader=evaluation,
        eval_interval=config.eval_interval,
        max_duration=config.max_duration,
        optimizers=optimizer,
        schedulers=build_scheduler(config.scheduler),
        parallelism_config=sharding.parallelism(config, network),
        algorithms=monitors.build_algorithms(config, network),
        callbacks=[
            exact,
            *build_callbacks(config),
            GradientGuard(),
            finite,
            throughput,  # before the log, which reads its figures
            log,
            spikes,
            *filter(None, (target, mlperf, early)),  # the times end before weights are written
            watchdog,
            # Last, as it keeps the state of the others.
            saver,
        ],
        loggers=monitors.build_loggers(config),
        run_name=config.run_name,
        device=device,
        precision=precision,
        device_train_microbatch_size=config.device_train_microbatch_size,
        # The mean over the label tokens of the global batch, however it is divided.
        accumulate_train_batch_on_tokens=True,
        seed=config.seed,
        load_path=str(start) if start and not (sharded and weights_only) else None,
        load_weights_only=weights_only,
        load_ignore_keys=drop_empty_scaler if found else foreign,
        load_strict_model_weights=strict,
        progress_bar=config.progress_bar,
        log_to_console=config.console_log_interval is not None,
        console_log_interval=config.console_log_interval or "1ep",
    )
    if found:
        saver.begin_at(trainer.state)
    if isinstance(answers, Translations):
        answers.break_off = lambda: saver.eval_batch_end(trainer.state, trainer.logger)
    sharding.gather_in_forward(model)
    if sharded:
        if not found:
            load_path.check_shapes(sharding.shard_shapes(start.parent), shapes, start)
        sharding.load_shards(trainer.state, start.parent, weights_only, strict)
    if start and not weights_only:
        adopt_settings(trainer.state, settings)
    quiet_trainer(trainer)
    exact.rng, trainer._rng_state = trainer._rng_state, None
    due = found is not None and found[1]["evaluation_due"]  # it was broken off
    try:
        request.training = True
        _fit(trainer, config.eval_first and not found, due, log.step, target, early)
        seconds = log.seconds()
        request.training, request.saved = False, trainer.state.timestamp.batch.value
        if request.asked:  # too late for a batch to end
            raise Preempted(request.saved)
        if mlperf:
            mlperf.stop(trainer.state, target is not None and target.reached)
        if early:
            early.restore(trainer.state)
    except (Exception, Preempted) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises from it, in any line
        error = runs.explain(error, config)
        fail(str(error), preempted=isinstance(error, Preempted))
        trainer.engine.close()  # not the trainer, which waits for the others: they may be waiting
        raise error from None
    monitors.adopt_average(trainer.state)
    trainer.close()

    # Outcome: model, answers, result.json, report.
    try:
        weights = sharding.whole_weights(network)
        if dist.get_global_rank() == 0:
            trained_on = base_record(vars(config.model), facts)
            save_model(network, tokenizer, run_folder / "hf", trained_on, weights)
        if answers:
            answers.after = answers.ask(network, "answers after training")
        of_tokens = evaluation is not None and config.task != "classify"
        if of_tokens and config.fsdp_config is None and dist.get_global_rank() == 0:
            model.uncompile()
            rows, collate = evaluation.dataloader.dataset, task.collator(config, tokenizer, False)
            with get_precision_context(trainer.state.precision):
                write_token_losses(run_folder / TOKEN_LOSSES, model, rows, collate, tokenizer)
        result = _result(config, log, throughput, target, seconds)
        result["steps"] = trainer.state.timestamp.batch.value
        result["metrics"] = {} if isinstance(answers, Translations) else log.scores
        if isinstance(answers, Translations):
            result["bleu_tokenize"] = answers.tokenize
        result["guards"] = {"loss_spikes": spikes.steps, "skipped_steps": finite.skipped}
        request.finish()
        if dist.get_global_rank() == 0:
            if answers:
                result["metrics"] |= answers.write(run_folder / "generations.jsonl")
            runs.write_result(run_folder, result)
            for path in (run_folder / BEFORE, run_folder / BEST):  # which might have been needed
                path.unlink(missing_ok=True)
            page = build_report(run_folder)
            print("\n".join([*summary_lines(result), f"report: {page}"]))
    except Preempted as error:  # what is left of the run is made by the same command
        fail(str(error), preempted=True)
        raise
    with suppress(RuntimeError):  # rank zero may have been stopped, which speaks for all
        dist.barrier()
    return _exit_code(target, log)


def _fit(
    trainer: Trainer, first: bool, due: bool, step: int, target: LossTarget | None, early: Any
) -> None:
    """Train to the end, with an evaluation `first`, or one that is `due` from an earlier part,
    whose last one was after `step`.
    """
    state = trainer.state
    if due or first:
        trainer.eval()
    if (target and target.reached) or (early and early.is_over):
        return
    if state.timestamp < state.max_duration:
        trainer.fit()
    elif state.evaluators and not due and state.timestamp.batch != step:
        trainer.eval()  # the last part of this run got to the end of training only


def _result(
    config: Config, log: RunLog, throughput: Throughput, target: LossTarget | None, seconds: float
) -> dict[str, Any]:
    """Return the content of result.json, but for the task's own metrics and what guards did."""
    status = "target_reached" if target and target.reached else "target_missed"
    of_tokens = log.last_eval and config.task != "classify"
    perplexity = math.exp(min(log.last_eval, 700.0)) if of_tokens else None
    return {
        "run_name": config.run_name, "status": status if target else "completed",
        "target": target.target if target else None, "eval_cross_entropy": log.last_eval,
        "eval_perplexity": perplexity,
        "eval_cross_entropy_before": log.first_eval if config.eval_first else None,
        "time_to_train_seconds": target.seconds_to_train if target else seconds,
        "tokens_seen": throughput.tokens, "label_tokens_seen": throughput.label_tokens,
        **throughput.rates(), "seed": config.seed,
    }  # fmt: skip


def _same_data(config: Config) -> dict[str, str]:
    """Return the hashes of the splits' indices, which hold those of the shards; DataError if they
    are not the same for all ranks, whose nodes may have copies of their own.
    """
    indices = {name: Path(s.data_local) / s.split / INDEX for name, s, _ in config.splits()}
    found = dist.all_gather_object({name: sha256_file(path) for name, path in indices.items()})
    for rank, theirs in enumerate(found):
        for name in [name for name in theirs if theirs[name] != found[0][name]]:
            fault = f"{indices[name].parent}: is another dataset on rank {rank} than on rank 0"
            raise DataError(f"{fault}; give all nodes the same")
    return found[0]


def _facts(tokenizer: Any, network: Any) -> dict[str, Any]:
    """Return by content what a run must find again when it goes on, besides its data."""
    return {"tokenizer": tokenizer_sha256(tokenizer), "model": model_fingerprint(network)}


def _exit_code(target: LossTarget | None, log: RunLog) -> int:
    # The launcher makes 241 of two ranks that exit non-zero seconds apart: one speaks for all.
    if target is None or target.reached or dist.get_local_rank() != 0:
        return EXIT_DONE
    print(
        f"loss target missed: eval cross-entropy {log.last_eval:.4f}, {target.target} was asked "
        f"for ({log.last_eval - target.target:.4f} to go); train longer or raise the target"
    )
    return EXIT_TARGET_MISSED
