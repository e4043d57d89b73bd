"""mlperf.log before MLPerf's own checker and ours; time to train over seeds; odd convergence."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from composer.core import Callback

import benchmark_runs
from overture.benchmark import (
    _interval,
    check_reference,
    events,
    faults,
    faults_of_set,
    other_setting,
    run_seeds,
    score,
    setting,
    stored,
    summary,
    suspicion,
)
from overture.callbacks.mlperf_log import PREFIX
from overture.config.load import load_config
from overture.errors import ConfigError, DataError, GuardError, Preempted
from overture.training import run as recipe
from runs import records, result

YAMLS = Path(__file__).parents[2] / "yamls" / "finetune"

RULES = Path(__file__).parents[2] / "src" / "overture" / "callbacks" / "mlperf_rules.yaml"
TARGET = ("callbacks.loss_target.cross_entropy=6.4", "eval_interval=2ba", "max_duration=20ba")
LOGGED = ("callbacks.mlperf_log.benchmark=overture_tiny",)
INTERRUPTED = "it went on after an interruption, which its time leaves out"


def accepted(log: Path, *rules: object) -> str:
    """What MLPerf's checker has to say of a log."""
    command = [
        sys.executable,
        "-m",
        "mlperf_logging.compliance_checker",
        *map(str, rules),
        log.name,
    ]
    done = subprocess.run(command, cwd=log.parent, capture_output=True, text=True, timeout=60)
    return "" if "SUCCESS" in done.stderr + done.stdout else done.stdout + done.stderr


@pytest.fixture
def logged(run):
    """A run that reaches its target, with its log."""
    code, folder = run(*TARGET, *LOGGED)
    assert code == 0
    return folder


def test_a_log_has_the_events_in_mlperfs_order_and_both_checkers_accept_it(logged):
    log = events(logged / "mlperf.log")
    keys = [event["key"] for event in log]
    block = ["block_start", "block_stop", "eval_start", "eval_accuracy", "eval_stop"]
    evals = records(logged, "eval")
    assert keys[keys.index("run_start") + 1 :] == [
        *block[2:],
        *block * (len(evals) - 1),
        "run_stop",
    ]
    assert len(evals) >= 2
    # What is written of the weights after the last evaluation is no part of the time.
    assert log[-1]["time_ms"] == log[-2]["time_ms"]
    facts = {event["key"]: event["value"] for event in log}
    known = {"seed": 17, "global_batch_size": 4, "gradient_accumulation_steps": 1,
             "quality_target": 6.4, "opt_base_learning_rate": 1e-2}  # fmt: skip
    assert {key: facts[key] for key in known} == known
    assert [e["value"] for e in log if e["key"] == "eval_accuracy"] == [
        record["cross_entropy"] for record in evals
    ]
    assert log[-1]["metadata"] == {
        "status": "success",
        "samples_count": 4 * result(logged)["steps"],
    }
    assert not list(faults(logged))
    assert not accepted(logged / "mlperf.log", "--config", RULES)


def without(key, log):
    return [event for event in log if event["key"] != key]


def test_a_log_that_was_touched_is_found_out(logged):
    path = logged / "mlperf.log"
    log = events(path)
    place = [event["key"] for event in log].index("block_stop")
    last = {**log[-1], "metadata": {**log[-1]["metadata"], "samples_count": 4}}
    lower = [{**e, "value": e["value"] - 1} if e["key"] == "eval_accuracy" else e for e in log]
    late = [*log[:-1], {**log[-1], "time_ms": log[-1]["time_ms"] + 60_000}]
    for changed, said in (
        (without("eval_start", log), "stands where"),
        ([*log[:place], *log[place + 1 :]], "stands where"),
        (without("run_start", log), "the log has no run_start"),
        ([*without("run_start", log), log[[e["key"] for e in log].index("run_start")]],
         "of ['block_start', 'eval_start', 'run_stop'] follows the last event"),
        ([*log[:-1], last], "the count of samples falls"),
        ([{**e, "metadata": {**e["metadata"], "samples_count": 5}}
          if e["metadata"].get("samples_count") == 4 * 2 else e for e in log],
         "that of no whole batches of 4"),
        ([{**e, "value": 1.0} if e["key"] == "quality_target" else e for e in log],
         "quality_target is 1.0 in the log and 6.4 in config.yaml"),
        ([{**e, "value": 3} if e["key"] == "seed" else e for e in log], "seed is 3 in the log"),
        (lower, "is another one in metrics.jsonl"),
        (late, "in the log"),
        ([*log[:3], {**log[3], "time_ms": 0}, *log[4:-1], {**log[-1], "time_ms": 1}], "backwards"),
    ):  # fmt: skip
        path.write_text("".join(f"{PREFIX}{json.dumps(event)}\n" for event in changed))
        assert any(said in fault for fault in faults(logged)), said
        if said == "stands where":
            assert accepted(path, "--config", RULES)


def test_evaluations_left_out_are_found_out(logged):
    log, path = events(logged / "mlperf.log"), logged / "config.yaml"
    assert any(event["key"] == "eval_accuracy" for event in log)
    begun = path.read_text()

    def found(interval: str, first: str = "true") -> str:
        changed = begun.replace("eval_interval: 2ba", f"eval_interval: {interval}")
        path.write_text(changed.replace("eval_first: true", f"eval_first: {first}"))
        return "; ".join(faults(logged))

    assert "one is due every 4" in found("1ba")
    assert not found("2ba") and not found("8sp")
    assert "one is due every 16" in found("0.2dur")  # of 20 steps of 4 samples
    assert not found("0.1dur")
    assert "evaluations after 0 and 0 samples" in found("2ba", first="false")
    assert "400tok cannot be counted" in found("400tok")


def test_what_a_kill_cut_off_is_taken_back(run):
    options = (*TARGET, *LOGGED, "callbacks.loss_target.cross_entropy=0.001", "save_interval=3ba")
    code, folder = run(*options)
    whole = [(e["key"], e["value"]) for e in events(folder / "mlperf.log")]
    shutil.rmtree(folder / "checkpoints" / "ba20")  # as if it had been killed after step 18
    (folder / "result.json").unlink()
    assert run(*options)[0] == code == 3
    assert [(e["key"], e["value"]) for e in events(folder / "mlperf.log")] == whole
    # Whole as it is, it is no time to train.
    assert list(faults(folder)) == [INTERRUPTED]
    (folder / "result.json").unlink()  # as if it had been killed while it answered prompts
    assert run(*options)[0] == 3
    assert [(e["key"], e["value"]) for e in events(folder / "mlperf.log")] == whole


def test_score_is_that_of_mlperf():
    assert score([9.0, 1.0, 3.0, 5.0, 4.0]) == 4.0
    assert score([9.0, 1.0, None, 5.0, 4.0]) == 6.0  # a miss is the slowest
    assert score([9.0, None, None, 5.0, 4.0]) is None
    assert score([1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("ours", "said"),
    [([90, 100, 95], None), ([60, 62, 61], "fewer samples"), ([150, 160, 170], "more samples")],
)
def test_runs_that_converge_oddly_are_flagged(ours, said):
    reference = [88, 92, 96, 100, 104, 98]
    found = suspicion(ours, reference)
    assert (found is None) == (said is None)
    assert said is None or said in found


def test_equal_runs_are_not_odd():
    assert suspicion([1920] * 5, [1920] * 5) is None
    assert "fewer" in suspicion([1440] * 5, [1920] * 5)
    assert "more" in suspicion([2400] * 3, [1920] * 5)  # the least that can be told
    assert suspicion([2400] * 3, [1920] * 4) is None


def test_seeds_are_run_scored_kept_and_set_side_by_side(tiny_yaml, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    monkeypatch.setattr(benchmark_runs, "REFERENCES", tmp_path)
    out = tmp_path / "out"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark_runs.py", *map(str, arguments)])
        return benchmark_runs.main(), capsys.readouterr().out

    job = (tmp_path / "tiny.yaml", *TARGET, "--seeds", 3, "--out", out)
    code, said = call(*job, "--price", 3.6)
    found = json.loads((out / "benchmark.json").read_text())
    times = sorted(run["seconds"] for run in found["runs"])
    assert (code, found["valid"], found["seconds"]) == (0, True, times[1]), said
    assert found["cost"] == pytest.approx(times[1] / 1000)
    assert [run["seed"] for run in found["runs"]] == [17, 18, 19]
    before = [(out / f"seed-{seed}" / "mlperf.log").stat().st_mtime for seed in (17, 18, 19)]
    # A reference that took ten times as long makes the same runs suspicious; none is run again.
    slow = [{**run, "samples": 10 * run["samples"], "seconds": 1.0} for run in found["runs"]]
    (tmp_path / "odd.json").write_text(json.dumps(found | {"runs": slow * 2}))
    code, said = call(*job, "--reference", tmp_path / "odd.json")
    assert (code, "fewer samples" in said) == (3, True), said
    # One of another target or batch tells nothing; where it was asked for, that is an error.
    odd = found | {"runs": slow * 2, "setting": found["setting"] | {"target": 1.0}}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    with pytest.raises(ConfigError, match=r"--reference .*: target 1\.0 there"):
        call(*job, "--reference", tmp_path / "odd.json")
    (tmp_path / "odd.json").rename(tmp_path / f"{found['name']}.json")
    code, said = call(*job)
    assert (code, "held against no reference: target 1.0 there" in said) == (0, True), said
    assert before == [(out / f"seed-{s}" / "mlperf.log").stat().st_mtime for s in (17, 18, 19)]
    with pytest.raises(ConfigError, match=r"seed-17: holds a run of another config \(optimizer\)"):
        call(*job, "optimizer.lr=0.02")
    code, said = call("--compare", out, out)
    assert code == 0
    assert said.count(f"{times[1]:.1f} s") == 2 and "another setting" not in said
    with pytest.raises(ConfigError, match="--compare takes folders alone, and no --price"):
        call("--compare", out, "--price", 0)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "benchmark.json").write_text(json.dumps(odd))
    said = call("--compare", out, tmp_path / "odd")[1]
    assert "of another setting than the first: target 1.0 there, " in said
    other = json.loads((out / "benchmark.json").read_text())
    other["config"]["optimizer"]["lr"] = 0.5
    (tmp_path / "rate.json").write_text(json.dumps(other))
    assert "  optimizer.lr: 0.01 | 0.5" in call("--compare", out, tmp_path / "rate.json")[1]
    pair = [out / "seed-17", out / "seed-18"]
    assert not list(faults_of_set(pair))
    assert any("used twice" in f for f in faults_of_set([pair[0], pair[0]]))
    # The rule: one run may miss, two may not; and a run of other data or cores is none of the set.
    for misses, valid in ((1, True), (2, False)):
        some = [{**run, "seconds": None} for run in found["runs"][:misses]]
        told = summary("x", {}, [*some, *found["runs"]], [], pair[0])
        assert told["valid"] is valid
        assert any("missed the target" in fault for fault in told["faults"]) is not valid
    # Tokens are those of the runs that the time is of; what one that missed saw counts, too.
    missed = {**found["runs"][0], "seconds": None, "tokens": 10**9}
    of = [missed, *(run | {"tokens": n} for n, run in enumerate(found["runs"][1:]))]
    assert summary("x", {}, of, [], pair[0], reference=found)["tokens"] < 2
    few = [found["runs"][0] | {"samples": count} for count in (900, 950, 1000, 1050, 1100)]
    fewer = [run | {"samples": run["samples"] - 160} for run in few]
    told = [summary("x", {}, [*fewer[:4], {**fewer[4], "seconds": None, "samples": count}], [],
                    pair[0], reference=found | {"runs": few}) for count in (940, 1500)]  # fmt: skip
    assert [t["valid"] for t in told] == [False, True]
    place = pair[1] / "environment.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"cpu_threads": 99}))
    newest = max(pair[1].glob("checkpoints/ba*/manifest.json"))
    manifest = json.loads(newest.read_text())
    newest.write_text(json.dumps(manifest | {"facts": manifest["facts"] | {"dataset": {}}}))
    wrong = [*faults_of_set(pair)]
    assert any("seed-18: cpu_threads is another one" in fault for fault in wrong)
    assert any("seed-18: dataset (contents) is another one" in fault for fault in wrong)
    for other, seeds in ((found | {"valid": False}, 50), (found, 3)):
        with pytest.raises(ConfigError, match="the reference is not valid, or its 3 runs tell"):
            check_reference(other, seeds)
    # One that was stopped within is begun anew: its time is to be of one piece.
    (out / "seed-19" / "result.json").write_text('{"status": "preempted"}')
    code, said = call(*job)
    assert not list(faults(out / "seed-19")) and "seed-19: " not in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train_loader.drop_last=false", "set train_loader.drop_last=true"),
        ("eval_interval=4096tok", "neither eval_interval nor max_duration in tok"),
        ("max_duration=90000tok", "neither eval_interval nor max_duration in tok"),
        ("load_path=runs/other", "load_path: its steps would count as this run's; set load_weigh"),
    ],
)
def test_what_cannot_be_counted_in_samples_is_refused(override, said):
    options = ["eval_interval=2ba", "scheduler.t_warmup=0.03dur", override]
    config = load_config([str(YAMLS / "quickstart.yaml"), *options], ("instruct",))
    with pytest.raises(ConfigError, match=said):
        setting(config)


def test_runs_that_do_not_end_are_no_result(tmp_path):
    (tmp_path / "seed-1" / "hf").mkdir(parents=True)  # of one that was stopped on its last metres
    (tmp_path / "seed-1" / "result.json").write_text('{"status": "preempted"}')
    with pytest.raises(ConfigError, match="seed-1: is there, and no run of a benchmark"):
        list(run_seeds([sys.executable], "x", [1], tmp_path))
    (tmp_path / "seed-1" / "environment.json").write_text("{}")
    with (tmp_path / "seed-1" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="seed-1: another process trains into it"):
            list(run_seeds([sys.executable], "x", [1], tmp_path))
    with pytest.raises(ConfigError, match="--launch nowhere: no such program"):
        list(run_seeds(["nowhere"], "x", [1], tmp_path))
    with pytest.raises(GuardError, match="seed 1 ended with exit code 7"):
        list(run_seeds([sys.executable, "-c", "raise SystemExit(7)"], "x", [1], tmp_path))
    saves = f"import signal; signal.signal(15, lambda *_: exit(open('{tmp_path}/saved', 'w')))"
    asked = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGUSR1))
    asked.start()
    with pytest.raises(Preempted, match=r"seeds are kept; the same command begins seed \d+ anew$"):
        list(run_seeds([sys.executable, "-c", f"{saves}; signal.pause()"], "x", [1], tmp_path))
    assert (tmp_path / "saved").exists()


def test_a_run_that_misses_its_target_has_a_sound_log(run):
    missed = ("callbacks.loss_target.cross_entropy=0.1", "eval_interval=2ba", "max_duration=4ba")
    code, folder = run(*missed, *LOGGED)
    assert code == 3
    assert not list(faults(folder))
    log = events(folder / "mlperf.log")
    assert log[-1]["metadata"]["status"] == "aborted"
    # An evaluation, or its end, that comes after the run or not at all, is of no sound log.
    late = [*log, *({**e, "time_ms": log[-1]["time_ms"]} for e in log[-4:-1])]
    for changed in (late, [*log[:-2], log[-1]]):
        path = folder / "mlperf.log"
        path.write_text("".join(f"{PREFIX}{json.dumps(event)}\n" for event in changed))
        assert accepted(path, "--config", RULES) and list(faults(folder))
    path.write_text("")
    with pytest.raises(DataError, match="is no log of a run"):
        events(path)


def test_a_target_may_be_met_at_the_end_of_training_off_the_cadence(run):
    missed = ("callbacks.loss_target.cross_entropy=0.1", "eval_interval=3ba", "max_duration=4ba")
    folder = run(*missed, *LOGGED)[1]
    assert [record["step"] for record in records(folder, "eval")] == [0, 3, 4]
    last = records(folder, "eval")[-1]["cross_entropy"]
    log, outcome = events(folder / "mlperf.log"), result(folder)
    facts = {"quality_target": {"value": last}, "run_stop": {
        "metadata": {**log[-1]["metadata"], "status": "success"}}}  # fmt: skip
    changed = [{**event, **facts.get(event["key"], {})} for event in log]
    lines = "".join(f"{PREFIX}{json.dumps(event)}\n" for event in changed)
    (folder / "mlperf.log").write_text(lines)
    (folder / "result.json").write_text(json.dumps(outcome | {"status": "target_reached"}))
    text = (folder / "config.yaml").read_text()
    text = text.replace("cross_entropy: 0.1", f"cross_entropy: {last}")
    (folder / "config.yaml").write_text(text)
    assert not list(faults(folder))
    (folder / "config.yaml").write_text(text.replace("max_duration: 4ba", "max_duration: 9ba"))
    assert any("one is due every 12" in fault for fault in faults(folder))


def test_shares_of_a_duration_are_rounded_as_composer_rounds_them():
    config = {"global_train_batch_size": 16, "max_duration": "1ep"}
    assert _interval("0.05dur", config, 741 * 16) == 38 * 16
    assert _interval("0.07dur", config | {"max_duration": "100ba"}, 1) == 8 * 16
    assert _interval("0.5dur", config | {"max_duration": "75sp"}, 1) == 38
    assert _interval("0.5dur", config | {"max_duration": "75tok"}, 1) is None


def test_more_permutations_than_can_be_looked_at_are_drawn():
    ours, theirs = [1000 + n % 7 for n in range(20)], [2000 + n % 5 for n in range(20)]
    assert "fewer" in suspicion(ours, theirs)
    assert suspicion(ours, ours) is None


def test_an_evaluation_that_a_stop_breaks_off_is_logged_once(run, monkeypatch):
    build = recipe.build_callbacks

    class Ask(Callback):
        def eval_batch_start(self, state, logger):
            if state.timestamp.batch.value == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), Ask()])
    with pytest.raises(Preempted, match="saved at step 2"):
        run(*TARGET, *LOGGED)
    monkeypatch.setattr(recipe, "build_callbacks", build)
    code, folder = run(*TARGET, *LOGGED)
    keys = [event["key"] for event in events(folder / "mlperf.log")]
    begun = [number for number, key in enumerate(keys) if key == "eval_start"]
    assert code == 0 and len(begun) >= 2
    assert all(keys[n + 1 : n + 3] == ["eval_accuracy", "eval_stop"] for n in begun)
    assert keys.count("block_start") == keys.count("block_stop") == len(begun) - 1
    assert not accepted(folder / "mlperf.log", "--config", RULES)
    assert list(faults(folder)) == [INTERRUPTED]


def test_a_log_of_mlperfs_kind_is_of_runs_to_a_target(run):
    with pytest.raises(ConfigError, match=r"set callbacks\.loss_target too"):
        run(*LOGGED)


DOLLY = (  # as docs/benchmarking.md has it
    "dolly.yaml", "generation=null", "callbacks.loss_target.cross_entropy=2.95",
    "eval_interval=20ba",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), [("quickstart", ("quickstart.yaml",)), ("dolly-stories260k", DOLLY)]
)
def test_a_reference_is_of_its_recipe(name, config):
    known = stored(benchmark_runs.REFERENCES / f"{name}.json")
    config = load_config([str(YAMLS / config[0]), *config[1:]], ("instruct",))
    assert known["valid"] and not other_setting(known, setting(config))
    samples = [run["samples"] for run in known["runs"]]
    assert all(count % config.global_train_batch_size == 0 for count in samples)
    assert len({run["seed"] for run in known["runs"]}) == 5 and suspicion(samples, samples) is None
    assert "fewer samples" in suspicion([count // 2 for count in samples], samples)
