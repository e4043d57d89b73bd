"""Time to train over seeds, by MLPerf's rule, and what makes such a figure believable."""

import fcntl
import itertools
import json
import math
import random
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from overture import errors
from overture.callbacks.mlperf_log import PREFIX
from overture.compare import differences
from overture.config.load import dump_config
from overture.config.schema import Config
from overture.errors import ConfigError, DataError, GuardError, Preempted
from overture.training.jobs import ended, is_finished

SLACK = 2.0  # seconds between the end of an evaluation and what is written of it
# What runs of a benchmark may differ in, loggers as their paths may hold the name.
SEEDED = ("seed", "run_name", "run_folder", "save_folder", "loggers")
SUSPICIOUS, PERMUTATIONS = 0.05, 200_000  # p of both sides, and the most looked at for it
SETTING = ("task", "max_seq_len", "global_train_batch_size", "eval_interval")


def events(path: Path) -> list[dict[str, Any]]:
    """Return the events of an mlperf.log; DataError if a line is none."""
    try:
        lines = path.read_text("utf-8").splitlines()
        return [json.loads(line.removeprefix(PREFIX)) for line in lines or [""]]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no log of a run ({error})") from None


def faults(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a finished run, beyond what MLPerf's own checker looks at: order and
    times of all events, samples against steps, the cadence of evaluations, and that the log, the
    result and the metrics say the same.
    """
    log, config = events(folder / "mlperf.log"), _config(folder)
    result = json.loads((folder / "result.json").read_text("utf-8"))
    keys = [event["key"] for event in log]
    if missing := {"run_start", "eval_accuracy", "train_samples", "run_stop"} - {*keys}:
        yield f"the log has no {', '.join(sorted(missing))}"
        return
    first = keys.index("run_start")
    facts = {event["key"]: event["value"] for event in log[1 : first - 1]}
    if [keys[0], keys[first - 1], keys[-1]] != ["init_start", "init_stop", "run_stop"]:
        yield "the log does not go from init_start over init_stop and run_start to run_stop"
    expected, between = {"block_start", "eval_start", "run_stop"}, keys[first + 1 :]
    follows = {
        "block_start": {"block_stop"}, "block_stop": {"eval_start", "run_stop"},
        "eval_start": {"eval_accuracy"}, "eval_accuracy": {"eval_stop"},
        "eval_stop": {"block_start", "run_stop"}, "run_stop": set(),
    }  # fmt: skip
    for number, key in enumerate(between):
        if key not in expected:
            yield f"event {first + number + 2}, {key}, stands where {sorted(expected)} may"
            return
        expected = follows[key]
    if expected:
        yield f"nothing of {sorted(expected)} follows the last event"
        return
    times = [event["time_ms"] for event in log if event["key"] not in facts]
    if times != sorted(times):
        yield "time runs backwards"
    samples = [event["metadata"]["samples_count"] for event in log[first + 1 :]]
    batch = config["global_train_batch_size"]
    if samples != sorted(samples) or any(count % batch for count in samples):
        yield f"the count of samples falls, or is that of no whole batches of {batch}"
    target = config["callbacks"]["loss_target"]["cross_entropy"]
    told = {"seed": config["seed"], "global_batch_size": batch, "quality_target": target}
    for key in [key for key, value in told.items() if facts.get(key) != value]:
        yield f"{key} is {facts.get(key)} in the log and {told[key]} in config.yaml"
    if samples and samples[-1] != result["steps"] * batch:
        yield f"{samples[-1]} samples were logged, but {result['steps']} steps of {batch} were done"
    if not result["steps"]:
        yield "it was at the target before its first step, so no training was timed"
    evals = [event for event in log if event["key"] == "eval_accuracy"]
    every = _interval(config["eval_interval"], config, facts["train_samples"])
    if every is None:
        yield f"eval_interval {config['eval_interval']} cannot be counted in samples"
        return
    places = [event["metadata"]["samples_count"] for event in evals]
    missed = result["status"] != "target_reached"
    if missed and places[-1] != samples[-1]:
        yield f"the last evaluation came after {places[-1]} of {samples[-1]} samples"
    end = _interval(config["max_duration"], config, facts["train_samples"])
    for before, after in itertools.pairwise([-every if config["eval_first"] else 0, *places]):
        # Composer evaluates at the end of training too.
        is_last = after == places[-1] and (missed or (end and after >= end // batch * batch))
        if abs(after - before - every) >= batch and not (is_last and after - before < every):
            yield f"evaluations after {before} and {after} samples, but one is due every {every}"
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    records = {r["step"]: r for r in map(json.loads, lines) if r["kind"] == "eval"}
    for event, place in zip(evals, places, strict=True):
        if records.get(place // batch, {}).get("cross_entropy") != event["value"]:
            yield f"the evaluation after {place} samples is another one in metrics.jsonl"
    last = evals[-1]["value"]
    if any(event["value"] <= target for event in evals[:-1]):
        yield "training went on after the target"
    if {last <= target, log[-1]["metadata"]["status"] == "success"} != {not missed}:
        yield f"ended {result['status']} with {last:.4f}, the target being {target}"
    seconds = (log[-1]["time_ms"] - log[first]["time_ms"]) / 1000
    said = result["time_to_train_seconds"]
    if any('"what": "resumed"' in line for line in lines):
        yield "it went on after an interruption, which its time leaves out"
    elif said is not None and abs(seconds - said) > SLACK:
        yield f"{said:.1f} s to train, but {seconds:.1f} in the log"


def _interval(wanted: str, config: dict[str, Any], train_samples: int) -> int | None:
    """Return a time of the config's in samples, None if it is in another unit."""
    batch = config["global_train_batch_size"]
    if wanted.endswith("dur"):  # as Composer rounds it
        whole = config["max_duration"]
        of = {"ba": 1, "sp": 1, "ep": train_samples // batch}.get(whole[-2:])
        count = of and math.ceil(int(whole[:-2]) * float(wanted.removesuffix("dur")) * of)
        return count and count * (1 if whole.endswith("sp") else batch)
    sizes = {"ba": batch, "sp": 1, "ep": train_samples // batch * batch}
    return int(wanted[:-2]) * sizes[wanted[-2:]] if wanted[-2:] in sizes else None


def faults_of_set(folders: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with runs as a set: a seed used twice, configs that differ."""
    known = [_config(folder) | machine_of(folder) | made_of(folder) for folder in folders]
    seeds = [found["seed"] for found in known]
    if len({*seeds}) < len(seeds):
        yield f"seeds {seeds}: one was used twice"
    for folder, found in zip(folders, known, strict=True):
        for key in _differences(found, known[0]):
            yield f"{folder.name}: {key} is another one than in {folders[0].name}"
        if folder.name != f"seed-{found['seed']}":
            yield f"{folder.name} holds a run of seed {found['seed']}"


def check_kept(folder: Path, config: Config) -> None:
    """Raise ConfigError if what is kept in a run folder was made by another config."""
    if (folder / "config.yaml").is_file():
        wanted = yaml.safe_load(dump_config(config))
        wanted["callbacks"].pop("mlperf_log")
        kept = _config(folder)
        kept["callbacks"].pop("mlperf_log", None)
        if keys := [key for key in _differences(kept, wanted) if key != "progress_bar"]:
            fault = f"holds a run of another config ({', '.join(keys)})"
            raise ConfigError(f"{folder}: {fault}; name another --out, or delete it")


def _config(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text("utf-8"))


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [k for k, value in one.items() if k not in SEEDED and value != other.get(k)]


def score(seconds: Sequence[float | None]) -> float | None:
    """Return the time to train over runs, None if more than one of them (None) missed the target.

    MLPerf's training rules: the fastest and the slowest are dropped, a miss being the slowest, and
    the rest averaged (https://github.com/mlcommons/training_policies, "Quality and results").
    """
    times = sorted(float("inf") if s is None else s for s in seconds)
    rest = times[1:-1]
    return statistics.mean(rest) if rest and rest[-1] < float("inf") else None


def suspicion(ours: Sequence[int], reference: Sequence[int]) -> str | None:
    """Return why runs converge in a way that the reference's make unlikely, None if they do not.

    Takes samples to the target. MLPerf holds a submission's mean against that of twice as many
    reference runs, both without their extremes, by a one-sided t-test, and refuses what is faster
    beyond chance (mlperf_logging's rcp_checker); here it is Fisher's exact permutation test (1935)
    of the means of all, which assumes no distribution, and slower runs are flagged as well: they
    are a regression. So p is of both sides.
    """
    every, count, draw = [*ours, *reference], len(ours), random.Random(0)
    if math.comb(len(every), count) <= PERMUTATIONS:
        sums = [sum(chosen) for chosen in itertools.combinations(every, count)]
    else:  # too many to look at: some, and that which is there
        sums = [sum(ours), *(sum(draw.sample(every, count)) for _ in range(PERMUTATIONS - 1))]
    means = statistics.mean(ours), statistics.mean(reference)
    for word, as_far in {
        "fewer": sum(s <= sum(ours) for s in sums), "more": sum(s >= sum(ours) for s in sums)
    }.items():  # fmt: skip
        if (p := 2 * as_far / len(sums)) <= SUSPICIOUS:
            figures = f"{means[0]:,.0f} on average, the reference {means[1]:,.0f}"
            return f"{word} samples to the target than chance allows: {figures} (p {p:.3f})"
    return None


def setting(config: Config) -> dict[str, Any]:
    """Return the target and what else samples to it are counted by; others are not comparable.

    Raises ConfigError where they could not be counted.
    """
    if "tok" in config.eval_interval + config.max_duration or not config.train_loader.drop_last:
        fault = "samples to the target are counted: set train_loader.drop_last=true"
        raise ConfigError(f"{fault}, and neither eval_interval nor max_duration in tok")
    if config.load_path and not config.load_weights_only:
        fault = "load_path: its steps would count as this run's; set load_weights_only=true"
        raise ConfigError(fault)
    target = config.callbacks.loss_target
    return {"target": target and target.cross_entropy} | {k: getattr(config, k) for k in SETTING}


def other_setting(reference: dict[str, Any], ours: dict[str, Any]) -> str:
    """Return in what a result is of another setting than `ours`, "" if in nothing."""
    if "setting" not in reference:
        return "it does not say of which target and batch it is"
    theirs = reference["setting"]
    keys = [key for key in ours if theirs.get(key) != ours[key]]
    return ", ".join(f"{key} {theirs.get(key)} there, {ours[key]} here" for key in keys)


def run_seeds(
    command: Sequence[str], name: str, seeds: Sequence[int], out: Path
) -> Iterator[tuple[int, Path]]:
    """Run a `command` that trains once for each seed, one after the other, as they are timed; yield
    each seed and its run folder. Those that are finished are kept, others begun anew.

    Raises ConfigError if there is no such program or a run finds its config wrong, GuardError if a
    run breaks off, Preempted if it was asked to stop.
    """
    if not shutil.which(command[0]):
        raise ConfigError(f"--launch {command[0]}: no such program")
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        options = [f"seed={seed}", f"run_name={name}-seed-{seed}", f"run_folder={folder}"]
        options += [f"callbacks.mlperf_log.benchmark=overture_{name}", "progress_bar=false"]
        options.append("save_folder=null")  # nothing is to be gone on from
        if not is_finished(folder):
            _clear(folder)
            kept = f"finished seeds are kept; the same command begins seed {seed} anew"
            with folder.with_suffix(".log").open("ab") as log, ended(running := {}, kept):
                process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
                running[process] = None
                code = process.wait()
            if code == errors.EXIT_PREEMPTED:
                raise Preempted(None, kept)
            if code not in (errors.EXIT_DONE, errors.EXIT_TARGET_MISSED):
                path = folder.with_suffix(".log")
                lines = path.read_text("utf-8", "replace").strip().split("\n")
                # Behind it a launcher says that a rank has ended.
                said = [line for line in lines if line.startswith("error: ")] or lines
                kind = ConfigError if code == ConfigError.exit_code else GuardError
                raise kind(
                    f"seed {seed} ended with exit code {code}; see {path}: {said[-1][-500:]}"
                )
        yield seed, folder


def _clear(folder: Path) -> None:
    """Remove what an interrupted run has left, as a time to train is of one piece; ConfigError if
    it is under way, or is no run.
    """
    if not folder.exists():
        return
    if not (folder / "environment.json").is_file():
        raise ConfigError(f"{folder}: is there, and no run of a benchmark; name another --out")
    with (folder / ".lock").open("w") as file, suppress(OSError):  # of file systems without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process trains into it") from None
    shutil.rmtree(folder)


def stored_in(place: Path) -> dict[str, Any]:
    """Return the result in a folder, or of a file, under the name of that."""
    path = place if place.is_file() else place / "benchmark.json"
    own = path.resolve()
    return {**stored(path), "name": own.stem if own.stem != "benchmark" else own.parent.name}


def stored(path: Path) -> dict[str, Any]:
    """Return a benchmark.json; ConfigError if it is none."""
    try:
        found = {"runs": [], **json.loads(path.read_text("utf-8"))}
        if lacks := {"name", "seconds", "valid", "machine", "tokens"} - found.keys():
            raise ValueError(f"it has no {', '.join(sorted(lacks))}")
        return found
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: is no result of a benchmark ({why})") from None


def machine_of(folder: Path) -> dict[str, Any]:
    """Return what a run ran on."""
    known = json.loads((folder / "environment.json").read_text("utf-8"))
    return {key: known[key] for key in ("devices", "ranks", "cpu_threads", "versions", "platform")}


def made_of(folder: Path) -> dict[str, Any]:
    """Return by content what a run was made of: data, tokenizer, and the weights that stay."""
    checkpoints = sorted(folder.glob("checkpoints/ba*/manifest.json"))
    facts = json.loads(checkpoints[-1].read_text("utf-8"))["facts"] if checkpoints else {}
    keys = ("dataset", "tokenizer", "model")[: 2 + _config(folder)["model"]["pretrained"]]
    return {f"{key} (contents)": facts.get(key) for key in keys}  # random ones are a seed's own


def outcome(seed: int, folder: Path, batch: int) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text("utf-8"))
    reached, stop = result["status"] == "target_reached", events(folder / "mlperf.log")[-1]
    return {
        "seed": seed, "seconds": result["time_to_train_seconds"] if reached else None,
        "samples": result["steps"] * batch, "tokens": result["tokens_seen"],
        "cross_entropy": result["eval_cross_entropy"], "joules": stop["metadata"].get("joules"),
        "faults": list(faults(folder)),
    }  # fmt: skip


def summary(
    name: str, setting: dict[str, Any], runs: Sequence[dict[str, Any]], set_faults: Sequence[str],
    folder: Path, reference: dict[str, Any] | None = None, price: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the content of benchmark.json: the score, whether it is valid, and why it is not.

    Machine and config are those of a run's `folder`.
    """
    seconds = score([run["seconds"] for run in runs])
    wrong = [f"seed {run['seed']}: {fault}" for run in runs for fault in run["faults"]]
    wrong += set_faults
    missed = sum(run["seconds"] is None for run in runs)
    if len(runs) < 3:
        wrong.append(f"{len(runs)} runs: the rule drops two, so three are the least")
    if missed > 1:
        wrong.append(f"{missed} of {len(runs)} runs missed the target; one may")
    # One that missed counts with all that it saw: left out, the others would look faster.
    ours = [run["samples"] for run in runs]
    theirs = [run["samples"] for run in (reference or {}).get("runs", [])]
    odd = suspicion(ours, theirs) if theirs else None
    config = {k: v for k, v in _config(folder).items() if k not in SEEDED}
    return {
        "name": name, "setting": setting, "seconds": seconds, "valid": not wrong and not odd,
        "faults": wrong + ([odd] if odd else []), "runs": list(runs), "machine": machine_of(folder),
        "tokens": statistics.mean(run["tokens"] for run in _timed(runs)), "price_per_hour": price,
        "cost": seconds * price / 3600 if seconds and price is not None else None, "config": config,
    }  # fmt: skip


def _timed(runs: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the runs that the score is of: all but the fastest and the slowest, or one missed."""
    return sorted(runs, key=lambda run: run["seconds"] or math.inf)[1:-1] or runs


def check_reference(reference: dict[str, Any], seeds: int) -> None:
    """Raise ConfigError if a reference is no measure for so many runs."""
    count = len(reference["runs"])
    tells = 2 / math.comb(seeds + count, count) <= SUSPICIOUS  # p where they differ most
    if not reference["valid"] or not tells:
        fault = f"the reference is not valid, or its {count} runs tell nothing of"
        raise ConfigError(f"{fault} {seeds}; name another by --reference, or give more --seeds")


def table(benchmarks: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines that set benchmarks side by side."""
    head = f"{'benchmark':<24}{'runs':>5}{'missed':>7}{'to target':>11}{'tokens':>13}"
    lines = [head + f"{'kJ':>8}{'cost':>9}  on"]
    for one in benchmarks:
        timed = _timed(one["runs"])
        joules = [run["joules"] for run in timed if run["joules"] is not None]
        tokens = statistics.mean(run["tokens"] for run in timed) if timed else one["tokens"]
        cells = (
            f"{len(one['runs']):>5}", f"{sum(run['seconds'] is None for run in one['runs']):>7}",
            f"{one['seconds']:>9.1f} s" if one["seconds"] else f"{'invalid':>11}",
            f"{tokens:>13,.0f}",
            f"{statistics.mean(joules) / 1000:>8.1f}" if joules else f"{'-':>8}",
            f"{one['cost']:>9.4f}" if one["cost"] is not None else f"{'-':>9}",
        )  # fmt: skip
        machine = f"{one['machine']['ranks']} x {one['machine']['devices'][0]}"
        mark = "" if one["valid"] else "  (not valid)"
        lines.append(f"{one['name']:<24}{''.join(cells)}  {machine}{mark}")
        if other := other_setting(one, benchmarks[0].get("setting", {})):
            lines.append(f"  of another setting than the first: {other}")
    if without := [one["name"] for one in benchmarks if "config" not in one]:
        lines.append(f"  written before configs were kept, so not compared: {', '.join(without)}")
    configs = [one["config"] for one in benchmarks if "config" in one]
    lines += [f"  {key}: {' | '.join(found)}" for key, *found in differences(configs) if configs]
    return lines
