"""GLUE: each task converted once, `finetune.py` once for each task and seed, one table at the end.

Every job is a process of its own with a run folder and a log: several run side by side, one that
fails is tried again and takes only those with it that start from it, and what is finished is kept.
"""

import csv
import hashlib
import io
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from overture.config.load import check_config
from overture.config.schema import GlueConfig
from overture.config.secrets import redact
from overture.data.schema import sha256_file, write_aside
from overture.errors import ConfigError
from overture.models.build import locate_model
from overture.training.glue_tasks import TASKS, convert_task, files_read, find_missing
from overture.training.jobs import Job, is_finished, run_jobs
from overture.training.network import choose_device
from overture.training.resume import may_be_same

# No loss is above it: a run with this target ends at its first evaluation, before a step.
ANY_LOSS = 1e9
MISMATCHED = "mnli_mm"


def evaluate(config: GlueConfig) -> int:
    """Run what is not done yet, print and write the table, and return the exit code.

    0 if every job came to its end, else that of the first that failed. Raises ConfigError before
    anything runs: files are missing, a job's config is wrong, or the hub has no such data.
    """
    find_missing(config)
    jobs, folder = plan(config), Path(config.run_folder)
    for job in jobs:
        choose_device(check_config(job.config, str, ("classify",)))
    _begin(config, folder, jobs)
    for task in config.tasks:
        kept = convert_task(config, task, *_encoding(config, task))
        print(f"{task}: converted{' already' if kept else ''}", flush=True)
    devices = torch.cuda.device_count()
    count = config.parallel or max(devices, 1)
    slots = [number % devices if devices else None for number in range(count)]
    failed = run_jobs(jobs, folder, slots, config.retries)
    for job in jobs:  # a finished run never goes on from them
        if job.name not in failed:
            shutil.rmtree(folder / job.name / "checkpoints", ignore_errors=True)
    rows, average = summarise(config, folder)
    model = config.finetune["model"]["name"]
    table = {"run_name": config.run_name, "model": model, "average": average, "rows": rows}
    write_aside(folder / "glue.json", json.dumps(table, indent=1) + "\n")
    writer = csv.DictWriter(file := io.StringIO(), rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_aside(folder / "glue.csv", file.getvalue())
    print("\n".join([*table_lines(rows, average), f"in {folder}/glue.json and glue.csv"]))
    for job in (job for job in jobs if job.name in failed):
        log = f"with exit code {failed[job.name]}; see {folder}/jobs/{job.name}.log"
        print(f"failed: {job.name} {f'as {job.needs} did' if job.needs in failed else log}")
    return next(iter(failed.values()), 0)


def plan(config: GlueConfig) -> list[Job]:
    """Return the jobs, those that others start from first; ConfigError if a config is wrong."""
    ordered = [task for task in TASKS if task in config.tasks]
    jobs = [_job(config, task, seed) for task in ordered for seed in _seeds(config, task)]
    if "mnli" in config.tasks:
        jobs.append(_mismatched(config))
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        place = f"{config.run_name}, job {job.name}"
        check_config(job.config, lambda _, place=place: place, ("classify",))
        if job.needs and by_name[job.needs].config.get("trainable") == "lora":
            fault = f"lora leaves adapters of MNLI's head, from which {job.name} cannot start"
            raise ConfigError(f"finetune.trainable: {fault}; leave mnli out of tasks, or train all")
    return jobs


def _seeds(config: GlueConfig, task: str) -> list[int]:
    return config.seeds[:1] if TASKS[task].one_seed else config.seeds


def _job(config: GlueConfig, task: str, seed: int) -> Job:
    row, name, common = TASKS[task], f"{task}-{seed}", config.finetune
    needs = f"mnli-{config.seeds[0]}" if row.from_mnli and "mnli" in config.tasks else None
    if needs:
        common = {**common, **_tuned_on_mnli(config)}
    defaults = {
        "max_duration": f"{row.epochs}ep", "global_train_batch_size": row.batch,
        "optimizer": {"lr": row.lr, "weight_decay": row.decay},
        "eval_loader": {"dataset": {"split": "dev"}}, "progress_bar": False,
    }  # fmt: skip
    fixed = {
        "task": "classify", "seed": seed, "run_name": name,
        "run_folder": f"{config.run_folder}/{name}", "data_local": f"{config.data_local}/{task}",
        "metrics": list(row.metrics),
    }  # fmt: skip
    merged = OmegaConf.merge(defaults, common, config.overrides.get(task, {}), fixed)
    return Job(name, OmegaConf.to_container(merged), needs)


def _tuned_on_mnli(config: GlueConfig) -> dict[str, Any]:
    """Return what makes a job start from the model that was tuned on MNLI, whose sizes it has."""
    model = {key: value for key, value in config.finetune["model"].items() if key != "config"}
    model |= {"name": f"{config.run_folder}/mnli-{config.seeds[0]}", "pretrained": True}
    return {"model": model, "tokenizer_name": _encoding(config, "mnli")[0]}


def _mismatched(config: GlueConfig) -> Job:
    """Return the job that evaluates the model tuned on MNLI on texts of other kinds."""
    seed = config.seeds[0]
    job, name = _job(config, "mnli", seed), f"{MISMATCHED}-{seed}"
    changes = {
        **_tuned_on_mnli(config), "run_name": name, "run_folder": f"{config.run_folder}/{name}",
        "eval_loader": {"dataset": {"split": "dev_mm"}}, "eval_first": True,
        "callbacks": {"loss_target": {"cross_entropy": ANY_LOSS}},
    }  # fmt: skip
    job.config.pop("model")
    return Job(name, OmegaConf.to_container(OmegaConf.merge(job.config, changes)), job.name)


def _encoding(config: GlueConfig, task: str) -> tuple[str, int]:
    own = OmegaConf.merge(config.finetune, config.overrides.get(task, {}))
    return own.get("tokenizer_name") or own.model.name, own.max_seq_len


def _begin(config: GlueConfig, folder: Path, jobs: list[Job]) -> None:
    """Make the folder, or go on with the one that is there.

    Raises ConfigError if a job was finished with another config, or the data are others.
    """
    path, now = folder / "glue.yaml", {"data": config.data, "model": _content(config)}
    now |= {f"data of {task}": files_read(config, task) for task in config.tasks}
    now |= {job.name: job.config for job in jobs}
    before = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
    changed = {
        key for key in now if key in before and before[key] != now[key]
        and not may_be_same(repr(before[key]), repr(now[key]))
    }  # fmt: skip
    touched = {job.name: sorted(_rests_on(job) & changed) for job in jobs}
    if done := {
        key for name, keys in touched.items() if is_finished(folder / name) for key in keys
    }:
        what = ", ".join(sorted(done))
        fault = f"run_name: {config.run_name} was begun with another config ({what})"
        raise ConfigError(f"{fault}; choose another run_name, or delete {folder}")
    for job in jobs:
        if touched[job.name] and (folder / job.name).exists():
            print(f"{job.name}: begun anew, as its config has changed")
            shutil.rmtree(folder / job.name)
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    write_aside(path, redact(OmegaConf.to_yaml(OmegaConf.create({**before, **now}))))


def _rests_on(job: Job) -> set[str]:
    """Return the keys of `glue.yaml` that the result of a job depends on."""
    names = {job.name, job.needs} - {None}
    tasks = {name.partition("-")[0].removesuffix("_mm") for name in names}
    return {"data", "model", *names, *(f"data of {task}" for task in tasks)}


def _content(config: GlueConfig) -> str | None:
    """Return a sha256 over the files of the encoder that is tuned and of a tokenizer elsewhere,
    None of those of the hub.
    """
    places = [Path(locate_model(config.finetune["model"]["name"]))]
    places += map(Path, filter(None, [config.finetune.get("tokenizer_name")]))
    files = [p for place in places for p in sorted(place.glob("*"))
             if p.suffix in (".json", ".safetensors", ".bin")]  # fmt: skip
    named = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(named.encode()).hexdigest() if files else None


def summarise(config: GlueConfig, folder: Path) -> tuple[list[dict[str, Any]], float | None]:
    """Return mean, spread and values over the seeds for each metric of each task, and the average.

    GLUE's is the mean over the tasks of the mean of their metrics, MNLI's two parts being one task;
    None while a task has no result.
    """
    rows, parts = [], {}
    for name in [t for t in (*TASKS, MISMATCHED) if t.removesuffix("_mm") in config.tasks]:
        task = name.removesuffix("_mm")
        runs = [folder / f"{name}-{seed}" for seed in _seeds(config, task)]
        results = [json.loads((r / "result.json").read_text()) for r in runs if is_finished(r)]
        for metric in TASKS[task].metrics:
            values = [result["metrics"][metric] for result in results]
            mean = statistics.fmean(values) if values else None
            std = statistics.stdev(values) if len(values) > 1 else None
            figures = {"mean": mean, "std": std, "values": values}
            rows.append({"task": name, "metric": metric, **figures})
            parts.setdefault(task, []).append(mean)
    is_whole = all(None not in means for means in parts.values())
    return rows, statistics.fmean(map(statistics.fmean, parts.values())) if is_whole else None


def table_lines(rows: list[dict[str, Any]], average: float | None) -> list[str]:
    """Return the table for the terminal, scores times 100."""

    def shown(value: float | None) -> str:
        return f"{'-' if value is None else f'{100 * value:.2f}':>8}"

    lines = [f"{'task':<10}{'metric':<10}{'mean':>8}{'std':>8}{'seeds':>7}"]
    for row in rows:
        figures = f"{shown(row['mean'])}{shown(row['std'])}{len(row['values']):>7}"
        lines.append(f"{row['task']:<10}{row['metric']:<10}{figures}")
    count = len({row["task"].removesuffix("_mm") for row in rows})
    return [*lines, f"{f'average of {count}':<20}{shown(average)}"]
