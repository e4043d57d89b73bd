"""GLUE: the table of tasks, the queue of jobs, what is kept, and the table of scores."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glue_files import ROWS, write_glue
from overture.config.load import load_glue
from overture.data.schema import read_ledger
from overture.data.shards import Split
from overture.errors import ConfigError, Preempted
from overture.training import glue as whole
from overture.training import jobs as queue
from overture.training.glue import evaluate, plan, summarise, table_lines
from overture.training.glue_tasks import TASKS, convert_task, find_missing
from overture.training.jobs import ended

ROOT = Path(__file__).parents[2]
YAML = """
data: {data}
finetune:
  max_seq_len: 64
  tokenizer_name: {smoke}/tokenizer
  model: {{name: bert, pretrained: false, config: {{hidden_size: 32, intermediate_size: 64,
           num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}}}}
  optimizer: {{lr: 1.0e-3}}
  max_duration: 2ba
  global_train_batch_size: 8
  device_train_microbatch_size: 8
  device_eval_batch_size: 64
"""


@pytest.fixture
def glue(tmp_path, smoke, monkeypatch):
    """The config of an evaluation of a tiny BERT on tiny files, with overrides."""
    monkeypatch.chdir(tmp_path)
    data = write_glue(tmp_path / "tsv")
    Path("tiny.yaml").write_text(YAML.format(data=data, smoke=smoke))
    return lambda *overrides: load_glue(["tiny.yaml", *overrides])


# ---- the table of tasks


def test_every_task_is_converted_once_from_its_files(glue, smoke):
    config = glue()
    for task, row in TASKS.items():
        assert not convert_task(config, task, f"{smoke}/tokenizer", 64)
        assert convert_task(config, task, f"{smoke}/tokenizer", 64)
        names = list(row.labels) or (None if row.regression else ["0", "1"])
        for split, file, _ in row.splits:
            ledger = read_ledger(Path(config.data_local, task, split))
            assert ledger["rows"]["in_split"] == ROWS[file.removesuffix(".tsv")], split
            assert ledger["labels"] == names
            counted = sum((ledger["label_counts"] or {}).values())
            assert counted == (0 if row.regression else ledger["samples"])
    assert {s: len(r.splits) for s, r in TASKS.items() if len(r.splits) > 2} == {"mnli": 3}
    first = Split(Path(config.data_local, "mnli", "dev_mm")).row(0)
    assert set(first["token_type_ids"]) <= {0, 1}
    assert not convert_task(config, "rte", f"{smoke}/tokenizer", 32)  # of another length


@pytest.mark.data
@pytest.mark.parametrize(
    "task", ["cola", "mrpc", "rte", "stsb", pytest.param("sst2", marks=pytest.mark.slow)]
)
def test_real_files(task, glue, smoke, real_data):
    config = glue(f"data={real_data}/glue", f"tasks=[{task}]")
    find_missing(config)
    convert_task(config, task, f"{smoke}/tokenizer", 64)
    header = 0 if task == "cola" else 1
    for split, file, _ in TASKS[task].splits:
        ledger = read_ledger(Path(config.data_local, task, split))
        lines = (real_data / "glue" / TASKS[task].folder / file).read_bytes().rstrip(b"\n")
        assert ledger["rows"]["in_split"] == lines.count(b"\n") + 1 - header
        lost = {**ledger["rows"]["dropped"], **ledger["rows"]["malformed"]}
        assert ledger["rows"]["kept"] + sum(lost.values()) == ledger["rows"]["in_split"]
        assert set(lost) <= {"also_held_out"}
    if task == "stsb":
        assert ledger["labels"] is None
    else:
        assert all(count > 50 for count in ledger["label_counts"].values())


def test_plan_follows_the_table_and_what_the_user_says(glue):
    config = glue("seeds=[1,2]", "overrides.rte.max_duration=5ba", "finetune.optimizer.lr=null")
    del config.finetune["optimizer"], config.finetune["max_duration"]
    jobs = {job.name: job for job in plan(config)}
    assert len(jobs) == 5 * 2 + 3 + 1  # the three largest tasks have one seed
    cola, rte = jobs["cola-1"].config, jobs["rte-2"].config
    assert (cola["max_duration"], cola["optimizer"]["lr"]) == ("10ep", 5e-5)
    assert cola["metrics"] == ["matthews"]
    assert cola["model"]["config"]["hidden_size"] == 32
    assert (rte["max_duration"], rte["seed"], rte["optimizer"]["lr"]) == ("5ba", 2, 1e-5)
    assert jobs["rte-2"].needs == jobs["mnli_mm-1"].needs == "mnli-1"
    assert rte["model"] == {"name": "runs/glue/tiny/mnli-1", "pretrained": True}
    assert {job.needs for job in plan(glue("tasks=[rte,mrpc,stsb]"))} == {None}
    own = glue("tasks=[rte,cola]", "overrides.rte.max_seq_len=32")
    assert [whole._encoding(own, task)[1] for task in own.tasks] == [32, 64]


# ---- bad input


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tasks=[colo]"], r'tasks\[0\]: unknown value .*did you mean "cola"'),
        (["tasks=[cola,cola]"], "tasks: .* must name some, each once"),
        (["seeds=[]"], "seeds: .* must name some"),
        (["parallel=0"], "parallel: must be at least 1"),
        (["finetune.seed=3"], "finetune.seed: is set for each job"),
        (["finetune.save_folder=s3://x/{run_name}"], "finetune.save_folder: is set for each job"),
        (["overrides.colo.seed=3"], "overrides.colo: is none of the tasks"),
        (["data=/no/such"], "data: /no/such: no such folder, nor a name on the hub"),
        (["finetune.optimizer.lrr=1"], r"tiny, job mnli-17: optimizer.lrr: unknown key"),
        (["finetune.max_seq_len=null"], "finetune.max_seq_len: missing"),
        (["finetune.model.name=null"], "finetune.model.name: missing"),
        (
            ["finetune.trainable=lora"],
            "finetune.trainable: lora leaves .* from which mrpc-17 cannot",
        ),
    ],
)
def test_nothing_runs_before_all_fits(glue, overrides, words):
    with pytest.raises(ConfigError, match=words):
        evaluate(glue(*overrides))
    assert not Path("runs").exists() and not Path("data").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes what is refused here")
def test_what_a_cpu_cannot_do_is_said_before_anything_runs(glue):
    with pytest.raises(ConfigError, match="device_train_microbatch_size: auto needs a CUDA"):
        evaluate(glue("finetune.device_train_microbatch_size=auto"))
    assert not Path("runs").exists() and not Path("data").exists()


def test_a_task_goes_from_files_to_the_table(glue, capsys):
    assert evaluate(glue("tasks=[rte]")) == 0
    (row,) = json.loads(Path("runs/glue/tiny/glue.json").read_text())["rows"]
    outcome = json.loads(Path("runs/glue/tiny/rte-17/result.json").read_text())
    assert (row["task"], outcome["steps"]) == ("rte", 2)
    with Path("runs/glue/tiny/glue.csv").open() as file:
        assert [cells["task"] for cells in csv.DictReader(file)] == ["rte"]
    said = capsys.readouterr().out
    assert f"accuracy {outcome['metrics']['accuracy']:.4f}" in said
    assert f"{100 * outcome['metrics']['accuracy']:.2f}" in said
    # What the bar on a terminal says of a job, before it begins and from its log.
    job = queue.Job("rte-17", {}, None)
    assert queue._progress(Path("elsewhere"), job) == "rte-17 starts"
    assert queue._progress(Path("runs/glue/tiny"), job) == "rte-17 step 2"


def test_missing_files_are_named_and_the_door_says_so(glue, tmp_path):
    for name in ("QNLI/train.tsv", "MNLI/dev_mismatched.tsv"):
        (tmp_path / "tsv" / name).unlink()
    done = subprocess.run(
        [sys.executable, str(ROOT / "src/evaluate_glue.py"), "tiny.yaml"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no MNLI/dev_mismatched.tsv, QNLI/train.tsv; put them there" in done.stderr
    assert "Traceback" not in done.stderr
    find_missing(glue("tasks=[cola,sst2]"))


# ---- the queue, with a program in the place of finetune.py


DOOR = """
import json, os, pathlib, sys, time
config = pathlib.Path(sys.argv[1])
name, folder = config.stem, config.parent.parent / config.stem
with (config.parent / "order").open("a") as file:
    file.write(name + "\\n")
if name == "slow":
    time.sleep(60)
if device := os.environ.get("CUDA_VISIBLE_DEVICES"):  # no other may be on it
    (mine := config.parent / f"on-{device}").touch(exist_ok=False)
    time.sleep(0.5)
    mine.rename(config.parent / f"{name}-was-on-{device}")
seen = config.parent / (name + ".seen")
if name == "wrong" or (name == "flaky" and not seen.exists()):
    seen.touch()
    print("error: it did not work")
    sys.exit(2 if name == "wrong" else 5)
if name != "silent":
    folder.mkdir(exist_ok=True)
    result = {"status": "completed", "metrics": {"accuracy": 0.5}}
    (folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Run jobs in tmp_path/work; returns (those that failed, the order in which they began)."""
    (tmp_path / "door.py").write_text(DOOR)
    monkeypatch.setattr(queue, "FINETUNE", tmp_path / "door.py")
    folder = tmp_path / "work"
    (folder / "jobs").mkdir(parents=True)

    def go(*names, needs=None, slots=(None, None), retries=1):
        jobs = [queue.Job(name, {}, (needs or {}).get(name)) for name in names]
        failed = queue.run_jobs(jobs, folder, slots, retries)
        return failed, (folder / "jobs" / "order").read_text().split()

    go.folder = folder
    return go


def test_failures_are_tried_again_and_reported_and_take_no_other_along(work, capsys):
    needs = {"after": "flaky", "never": "wrong"}
    failed, order = work("wrong", "flaky", "never", "after", "silent", "plain", needs=needs)
    assert failed == {"wrong": 2, "never": 2, "silent": 5}
    assert order.count("flaky") == 2 and order.count("wrong") == 1 and order.count("silent") == 2
    assert "never" not in order
    assert order.index("after") > order.index("flaky")
    said = capsys.readouterr().out
    assert "flaky: failed with exit code 5; once more" in said
    assert "wrong: failed with exit code 2: error: it did not work" in said
    assert "never: not run, as wrong failed" in said
    assert "plain: accuracy 0.5000" in said
    # The same again: what is finished is kept.
    (work.folder / "jobs" / "order").unlink()
    failed, order = work("plain", "flaky", "after", "silent", retries=0)
    assert (failed, order) == ({"silent": 5}, ["silent"])
    assert "3 of 4 jobs are finished and kept" in capsys.readouterr().out


@pytest.mark.parametrize(("visible", "devices"), [(None, {"0", "1"}), ("5,7", {"5", "7"})])
def test_each_device_has_one_job_at_a_time(work, monkeypatch, visible, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    failed, order = work(*"abcde", slots=(0, 1), retries=0)
    assert not failed and sorted(order) == [*"abcde"]
    places = (work.folder / "jobs").glob("*-was-on-*")
    assert {place.name.partition("-was-on-")[2] for place in places} == devices


@pytest.mark.parametrize("name", ["TERM", "USR1", "HUP"])
def test_asked_to_stop_it_leaves_no_process(work, name):
    timer = subprocess.Popen(["sh", "-c", f"sleep 2; kill -{name} {os.getpid()}"])
    start = time.monotonic()
    with pytest.raises(Preempted, match="what was running has saved; the same command goes on"):
        work("slow", slots=(None,))
    assert time.monotonic() - start < 20
    timer.wait()
    found = subprocess.run(["pgrep", "-f", str(work.folder)], capture_output=True, text=True)
    assert found.stdout == ""
    assert signal.getsignal(signal.SIGTERM) is not None


def test_a_signal_within_poll_is_no_wait():
    process = subprocess.Popen(["sleep", "60"])
    process._waitpid_lock.acquire()  # as an exception leaves it that comes behind this line
    start = time.monotonic()
    with pytest.raises(Preempted), ended({process: None}):
        raise KeyboardInterrupt
    assert time.monotonic() - start < 20
    process._waitpid_lock.release()
    assert process.wait() == -signal.SIGTERM


def test_what_nohup_has_made_deaf_stays_deaf():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended({}):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- what is kept


def test_results_are_of_what_is_there_now(glue, smoke, tmp_path, capsys, monkeypatch):
    began = []
    monkeypatch.setattr(whole, "run_jobs", lambda jobs, *_: began.append(jobs) or {})
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}")
    options = ("tasks=[rte]", f"finetune.model.name={encoder}", f"data={tmp_path}/elsewhere/there")
    with pytest.raises(ConfigError, match="no such folder"):
        evaluate(glue(*options))
    data = write_glue(tmp_path / "other")
    options = (*options[:2], f"data={data}")
    assert evaluate(glue(*options)) == 0  # the data that were not there are forgotten
    assert "rte: converted\n" in capsys.readouterr().out
    held_out = (data / "RTE" / "dev.tsv").read_text()
    (data / "RTE" / "dev.tsv").write_text((data / "RTE" / "train.tsv").read_text())
    with pytest.raises(ConfigError, match="no row"):  # all of train is held out now
        evaluate(glue(*options))
    (data / "RTE" / "dev.tsv").write_text(held_out + held_out.splitlines()[-1] + "\n")
    evaluate(glue(*options))
    assert "rte: converted\n" in capsys.readouterr().out  # as its files are others
    part = Path("runs/glue/tiny/rte-17")
    part.mkdir()
    evaluate(glue(*options, "finetune.optimizer.lr=3"))
    assert "rte-17: begun anew, as its config has changed" in capsys.readouterr().out
    assert not part.exists()
    part.mkdir()
    (part / "result.json").write_text('{"status": "completed", "metrics": {"accuracy": 1}}')
    (encoder / "model.safetensors").write_bytes(b"trained on")
    with pytest.raises(ConfigError, match=r"begun with another config \(model\)"):
        evaluate(glue(*options, "finetune.optimizer.lr=3"))
    (encoder / "model.safetensors").unlink()
    lines = (data / "RTE" / "train.tsv").read_text().splitlines(keepends=True)
    (data / "RTE" / "train.tsv").write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match=r"begun with another config \(data of rte\)"):
        evaluate(glue(*options, "finetune.optimizer.lr=3"))


# ---- the table of scores


def test_table_of_scores(glue, capsys):
    config = glue("seeds=[1,2]", "tasks=[mnli,mrpc]")
    scores = {
        "mnli-1": {"accuracy": 0.75}, "mnli-2": {"accuracy": 0.1}, "mnli_mm-1": {"accuracy": 0.6},
        "mrpc-1": {"accuracy": 0.9, "f1": 0.5}, "mrpc-2": {"accuracy": 0.8, "f1": 0.7},
    }  # fmt: skip
    for name, metrics in scores.items():
        folder = Path(config.run_folder, name)
        folder.mkdir(parents=True)
        status = {"status": "completed", "metrics": metrics}
        (folder / "result.json").write_text(json.dumps(status))
    rows, average = summarise(config, Path(config.run_folder))
    found = {(row["task"], row["metric"]): row for row in rows}
    f1 = found["mrpc", "f1"]
    assert (f1["mean"], f1["values"]) == (pytest.approx(0.6), [0.5, 0.7])
    assert f1["std"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert (found["mnli_mm", "accuracy"]["values"], found["mnli_mm", "accuracy"]["std"]) == (
        [0.6],
        None,
    )
    mnli, mrpc = (0.75 + 0.6) / 2, (0.85 + 0.6) / 2
    assert average == pytest.approx((mnli + mrpc) / 2)
    lines = table_lines(rows, average)
    assert f"{'mnli_mm':<10}{'accuracy':<10}{'60.00':>8}{'-':>8}{1:>7}" in lines
    assert lines[-1] == f"{'average of 2':<20}{100 * average:>8.2f}"
    config.seeds = [3]
    assert summarise(config, Path(config.run_folder))[1] is None


@pytest.mark.slow
def test_whole_evaluation_of_a_tiny_model(glue, capsys):
    options = ("tasks=[mnli,rte]", "parallel=2")
    assert evaluate(glue(*options)) == 0
    folder = Path("runs/glue/tiny")
    table = json.loads((folder / "glue.json").read_text())
    assert [row["task"] for row in table["rows"]] == ["mnli", "rte", "mnli_mm"]
    assert 0 < table["average"] < 1
    with (folder / "glue.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == ["mnli", "rte", "mnli_mm"]
    rte = (folder / "jobs" / "rte-17.log").read_text()
    assert "made anew, as runs/glue/tiny/mnli-17 has none" in rte
    outcome = json.loads((folder / "mnli_mm-17" / "result.json").read_text())
    assert outcome["steps"] == 0
    before = (folder / "rte-17" / "result.json").stat().st_mtime_ns
    assert evaluate(glue(*options)) == 0
    assert "3 of 3 jobs are finished and kept" in capsys.readouterr().out
    assert (folder / "rte-17" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"was begun with another config \(mnli-17"):
        evaluate(glue(*options, "finetune.max_duration=3ba"))
    with pytest.raises(ConfigError, match=r"was begun with another config \(rte-17\)"):
        evaluate(glue("tasks=[rte]"))
