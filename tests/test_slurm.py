"""A Slurm on this machine runs rendered job scripts; skipped where it cannot be started."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from overture.data.shards import Split
from runs import assert_same, records, result

ROOT = Path(__file__).parents[1]
SMOKE = "yamls/smoke/finetune.yaml"
FOUR = ["global_train_batch_size=4", "device_train_microbatch_size=2"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of two nodes on this machine, with a GPU each in its books."""
    missing = [x for x in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(x)]
    if missing or os.geteuid():
        lack = f"{', '.join(missing)} not found" if missing else "slurmd must be started by root"
        pytest.skip(f"no Slurm here: {lack} (Debian: slurmctld slurmd munge slurm-client)")
    folder, host = tmp_path / "slurm", socket.gethostname()
    for name in ("state", "munge"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = 40000 + os.getpid() % 10000
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports + 1 + i} "
        "CPUs=1 Gres=gpu:1 State=UNKNOWN"
        for i, name in enumerate((host, "localhost"))
    ]
    settings = {
        "ClusterName": "one", "SlurmctldHost": host, "SlurmUser": "root", "SlurmctldPort": ports,
        "AuthType": "auth/munge", "AuthInfo": f"socket={folder}/munge/socket,cred_expire=5",
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": f"{folder}/spool-%n",
        "SlurmctldPidFile": folder / "ctld.pid", "SlurmdPidFile": f"{folder}/%n.pid",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "MpiDefault": "none",
        "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU", "GresTypes": "gpu",
        "SwitchType": "switch/none", "ReturnToService": 2,
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [*nodes, "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text("Name=gpu Count=1 File=/dev/null\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{x}={folder}/munge/{x}" for x in ("socket", "pid-file", "log-file", "seed-file")]
    # Each node has a /dev/shm and a core of its own, as two machines would.
    own = "mount -t tmpfs tmpfs /dev/shm && exec taskset --cpu-list "
    cores = sorted(os.sched_getaffinity(0))
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        *(
            ["unshare", "--mount", "sh", "-c", f"{own}{core} slurmd -D -N {name}"]
            for name, core in ((host, cores[0]), ("localhost", cores[-1]))
        ),
    ]
    started = []
    for number, command in enumerate(commands):
        with (folder / f"log{number}").open("w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
        time.sleep(1)
    deadline = time.monotonic() + 30
    while answer("sinfo", "-h", "-o", "%D %t").strip() != "2 idle":
        if time.monotonic() > deadline:
            pytest.fail((folder / "log1").read_text()[-2000:])
        time.sleep(0.5)
    yield folder
    answer("scancel", "-u", "root")
    while answer("squeue", "-h") and time.monotonic() < deadline + 300:
        time.sleep(0.5)
    for process in reversed(started):
        process.terminate()
        process.wait(timeout=20)


def answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("yaml", "options"),
    [
        (SMOKE, (*FOUR, "model.dtype=float32", "lora.dropout=0.1", "max_duration=160ba",
                 "eval_interval=80ba", "save_interval=60ba")),
        ("yamls/finetune/quickstart.yaml", ("device_train_microbatch_size=8",)),
    ],
    ids=["smoke", "quickstart"],
)  # fmt: skip
def test_preempted_under_slurm_goes_on_to_the_same_weights(
    yaml, options, slurm, smoke, run_door, tmp_path
):
    if yaml != SMOKE and not (ROOT / "runs" / "quickstart-base" / "hf").is_dir():
        pytest.skip("make quickstart has not been run here")

    def send(name: str) -> str:
        done = run_door(
            "src/launch_job.py", yaml, *options, f"run_folder={tmp_path / name}",
            "--scheduler", "slurm", "--nodes", 2, "--gpus", 1, "--time", "0:30:00",
            "--scratch", tmp_path / "scratch", f"--option=--output={tmp_path}/{name}.out",
            "--submit",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return re.search(r"Submitted batch job (\d+)", done.stderr)[1]

    def wait_until(job: str, name: str, is_so) -> str:
        deadline = time.monotonic() + 400
        while not is_so(log := (tmp_path / f"{name}.out")):
            state = answer("squeue", "-h", "-j", job, "-o", "%T %r")
            if time.monotonic() > deadline:
                logs = [log, *(tmp_path / name / "logs").glob("rank*")]
                said = "\n".join(f"{x.name}: {x.read_text()[-2000:]}" for x in logs if x.exists())
                pytest.fail(f"{state}\n{said}")
            time.sleep(0.1)
        return log.read_text()

    def has_trained(name: str, step: int):
        def look(_: Path) -> bool:
            log = tmp_path / name / "metrics.jsonl"
            return log.exists() and f'"train", "step": {step},' in log.read_text()

        return look

    def ended(log: Path) -> bool:
        return log.exists() and bool(re.search(r"exit code (?!75)", log.read_text()))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "exit code 0" in wait_until(send("whole"), "whole", ended)
    steps, status = (result(whole)[key] for key in ("steps", "status"))
    job = send("parts")
    wait_until(job, "parts", has_trained("parts", 10))
    answer("scancel", "--signal=TERM", job)  # preemption: to the steps of the job
    wait_until(job, "parts", lambda log: "start 2" in log.read_text())
    assert result(parts)["status"] == "preempted"
    saved = max(int(path.name[2:]) for path in parts.glob("checkpoints/ba*"))
    assert 10 <= saved < steps
    wait_until(job, "parts", has_trained("parts", saved + 5))
    answer("scancel", "--signal=USR1", "--batch", job)  # the time is nearly up
    said = wait_until(job, "parts", ended)
    assert re.findall(r"start \d", said) == ["start 1", "start 2", "start 3"]
    assert re.findall(r"(?m)^\S+ exit code (\d+)", said) == ["75", "75", "0"]
    assert result(parts)["status"] == status
    assert len(records(parts, "train")) == steps >= 100
    assert_same(whole, parts)
    assert (parts / "logs" / "rank1.out").exists()


@pytest.mark.slow
@pytest.mark.dist
def test_job_cancelled_under_slurm_saves_and_stays_away(slurm, smoke, run_door, tmp_path):
    folder = tmp_path / "run"
    done = run_door(
        "src/launch_job.py", SMOKE, *FOUR, f"run_folder={folder}", "max_duration=4000ba",
        "eval_interval=4000ba", "--scheduler", "slurm", "--nodes", 2, "--gpus", 1,
        "--scratch", tmp_path / "scratch", f"--option=--output={tmp_path}/job.out", "--submit",
    )  # fmt: skip
    job = re.search(r"Submitted batch job (\d+)", done.stderr)[1]
    deadline = time.monotonic() + 120
    while (
        not (folder / "metrics.jsonl").exists()
        or '"step": 5,' not in (folder / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline, answer("squeue", "-j", job)
        time.sleep(0.1)
    answer("scancel", job)
    while answer("squeue", "-h", "-j", job):
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert result(folder)["status"] == "preempted"
    assert len(list(folder.glob("checkpoints/ba*"))) == 1
    assert "JobState=CANCELLED" in answer("scontrol", "show", "job", job)


@pytest.mark.slow
def test_job_array_converts_and_what_depends_on_it_merges(slurm, smoke, run_door, tmp_path):
    lines = [json.dumps({"text": f"text {n} " + "of some words " * (n % 7)}) for n in range(120)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines) + "\n")
    how = ("--task", "text", "--tokenizer", smoke / "tokenizer", "--max_seq_len", 64,
           "--packing", "none")  # fmt: skip
    door = ("src/convert_dataset.py", "--splits", f"train={corpus}", "--out_root")
    assert run_door(*door, tmp_path / "whole", *how).returncode == 0

    def submit(*command: object) -> str:
        options = ("--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%x-%j.out")
        done = subprocess.run(
            ["sbatch", *options, *map(str, command)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    parts, merged = tmp_path / "parts", tmp_path / "merged"
    job = submit("--array=0-2", "launch/convert_array.sh", 3, 40, corpus, parts, *how)
    python = ".venv/bin/python src/convert_dataset.py"
    submit(
        f"--dependency=afterok:{job}", "--wrap", f"{python} --merge {parts}/* --out_root {merged}"
    )
    deadline = time.monotonic() + 300
    while answer("squeue", "-h"):
        assert time.monotonic() < deadline, answer("squeue")
        time.sleep(0.2)
    said = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert (merged / "train").is_dir(), said
    assert [path.name for path in sorted(parts.iterdir())] == ["00000", "00001", "00002"]
    whole, joined = Split(tmp_path / "whole" / "train"), Split(merged / "train")
    assert len(whole) == len(joined) == 120
    for number in range(120):
        one, other = whole.row(number), joined.row(number)
        assert one["sample_id"] == other["sample_id"]
        assert np.array_equal(one["input_ids"], other["input_ids"])
