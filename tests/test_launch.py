"""The launch lines of the README as processes: exit codes, two ranks, a kill and a restart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import assert_same, curve, records

ROOT = Path(__file__).parents[1]
SMOKE = "yamls/smoke/finetune.yaml"
COMPOSER = str(Path(sys.executable).parent / "composer")


def test_config_error_comes_through_the_launcher(run_door, smoke):
    done = run_door("finetune.py", SMOKE, "optimiser.lr=1", launcher=COMPOSER)
    assert done.returncode == 2
    assert 'optimiser.lr: unknown key (did you mean "optimizer.lr"?)' in done.stderr + done.stdout


@pytest.mark.dist
def test_exit_code_of_two_ranks_is_that_of_the_error(run_door, smoke):
    # The launcher made 241 of it when rank one was the first to go.
    done = run_door(
        "-n",
        2,
        "finetune.py",
        SMOKE,
        "data_local=no/such",
        "device_train_microbatch_size=4",
        launcher=COMPOSER,
    )
    assert done.returncode == 2
    assert (done.stderr + done.stdout).count("no converted dataset") == 1


@pytest.mark.dist
@pytest.mark.parametrize(
    ("yaml", "more"),
    [
        (SMOKE, ("model.dtype=float32", "algorithms.ema.half_life=2ba")),
        pytest.param(
            "yamls/smoke/seq2seq.yaml", ("model.config.dropout=0.0", "generation.num_prompts=3"),
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_two_ranks_give_the_losses_of_one_and_exit_3_comes_through(
    yaml, more, run_door, smoke, tmp_path
):
    folders = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = run_door(
            "-n", ranks, "finetune.py", yaml, f"run_folder={folder}", "max_duration=4ba",
            "global_train_batch_size=4", "device_train_microbatch_size=2", *more,
            "device_eval_batch_size=3", "callbacks.loss_target.cross_entropy=0.01",
            launcher=COMPOSER,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "loss target missed" in done.stdout
        folders.append(folder)
    one, two = map(curve, folders)
    assert one.keys() == two.keys()
    assert len(one) >= 5
    # The test split holds 11 samples or so: two ranks see one of them twice, and must not count it.
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5), key
    result = json.loads((folders[1] / "result.json").read_text())
    single = json.loads((folders[0] / "result.json").read_text())
    for key in ("tokens_seen", "label_tokens_seen", "steps"):
        assert result[key] == single[key]
    assert result["metrics"] == pytest.approx(single["metrics"], abs=1e-3)


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_command(smoke, tmp_path):
    folder = tmp_path / "killed"
    command = [
        sys.executable, "finetune.py", SMOKE, f"run_folder={folder}", "max_duration=40ba",
        "save_interval=5ba", "eval_interval=20ba",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(folder.glob("checkpoints/ba*")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = max(int(p.name[2:]) for p in folder.glob("checkpoints/ba*"))
    assert not (folder / "result.json").exists()
    lines_before = (folder / "metrics.jsonl").read_text().count('"train"')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("completed", 40)
    lines = (folder / "metrics.jsonl").read_text().count('"train"')
    assert lines - lines_before == 40 - start  # it began after the checkpoint, not at the start
    assert [s for k, s in curve(folder) if k == "train"] == list(range(1, 41))


def test_sigterm_while_libraries_are_imported_is_heard():
    code = "import sys; from overture.errors import exit_on_error as run; "
    code += "sys.exit(run(lambda: sys.exit(143), trains=True))"  # as Composer answers to it
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, "the same command goes on" in done.stderr) == (75, True)


TWO = (
    "model.dtype=float32", "global_train_batch_size=4", "device_train_microbatch_size=2",
    "lora.dropout=0.1", "eval_first=false", "max_duration=24ba", "eval_interval=12ba",
    "save_interval=4ba",
)  # fmt: skip


def start(ranks: int, folder: Path, *options: str) -> subprocess.Popen:
    """Start a run under the launcher, in a process group of its own."""
    command = [COMPOSER, "-n", str(ranks), "finetune.py", SMOKE, f"run_folder={folder}", *TWO]
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def wait_for(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    log = folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count(f'"train", "step": {step},')):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.dist
def test_what_one_rank_alone_meets_ends_all_of_them(smoke, tmp_path):
    folder = tmp_path / "run"
    longer = ("max_duration=4000ba", "eval_interval=4000ba", "save_interval=4000ba")
    process = start(2, folder, *longer, "train_loader.num_workers=1")

    def children(of: int) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(of)], capture_output=True, text=True)
        return [*map(int, found.stdout.split())]

    wait_for(folder, 5, process)
    begin = time.monotonic()
    os.kill(children(children(process.pid)[-1])[-1], signal.SIGKILL)  # the last rank's worker
    said, _ = process.communicate(timeout=200)
    assert process.returncode and time.monotonic() - begin < 100
    assert b"a worker of the loader died" in said, said


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_fails_alone_before_training_is_no_request_to_stop(smoke, tmp_path):
    # As one that runs out of memory where the other is still busy.
    code = (
        "import os, sys, time; sys.path.insert(0, 'src'); from overture.errors import *\n"
        "from overture.training.preemption import StopRequest\n"
        "def main():\n"
        "    StopRequest(); time.sleep(2)\n"
        "    if os.environ['LOCAL_RANK'] == '1': raise GuardError('out of memory')\n"
        "    time.sleep(60)\n"
        "sys.exit(exit_on_error(main, trains=True))\n"
    )
    (tmp_path / "door.py").write_text(code)
    command = [COMPOSER, "-n", "2", str(tmp_path / "door.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 5, done.stderr + done.stdout
    assert "another rank ended" in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_experts_that_meet_no_token_stop_no_rank(smoke, tmp_path):
    shape = "{hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4,"
    shape += " num_key_value_heads: 2, num_local_experts: 64, num_experts_per_tok: 1}"
    command = [COMPOSER, "-n", "2", "main.py", "yamls/smoke/pretrain.yaml", "model.name=mixtral"]
    options = [f"model.config={shape}", "max_duration=3ba", "eval_interval=3ba",
               f"run_folder={tmp_path / 'run'}", "global_train_batch_size=2",
               "device_train_microbatch_size=1"]  # fmt: skip
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_killed_go_on_bit_for_bit_and_one_rank_takes_over(smoke, tmp_path):
    whole, parts, single = (tmp_path / name for name in ("whole", "parts", "single"))
    said, _ = start(2, whole).communicate(timeout=200)
    assert len(curve(whole)) == 26, said
    process = start(2, parts)
    wait_for(parts, 10, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.copytree(parts, single)
    said, _ = start(2, parts).communicate(timeout=200)
    assert_same(whole, parts)
    saved = max(int(path.name[2:]) for path in single.glob("checkpoints/ba*"))
    process = start(1, single, "device_train_microbatch_size=2")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    # The same global batches; dropout is drawn by other ranks, so losses are only alike.
    ours, theirs = curve(single), curve(whole)
    assert ours.keys() == theirs.keys()
    assert ours["train", saved + 1] == pytest.approx(theirs["train", saved + 1], abs=0.01)
    ours, theirs = ({r["step"]: r["tokens"] for r in records(f, "train")} for f in (single, whole))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_may_change_in_any_epoch(smoke, tmp_path):
    # 123 rows make 30 batches of four, where the two ranks of Streaming would see 31. The power
    # goes out in the first epoch and in the second, which one rank begins and two end.
    one, parts = tmp_path / "one", tmp_path / "parts"
    options = (
        "lora.dropout=0",
        "train_loader.num_workers=1",
        "max_duration=70ba",
        "eval_interval=1ep",
        "save_interval=5ba",
    )
    said, _ = start(1, one, *options).communicate(timeout=400)
    for ranks, step in ((2, 12), (1, 42)):
        process = start(ranks, parts, *options)
        wait_for(parts, step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said, _ = start(2, parts, *options).communicate(timeout=400)
    ours, theirs = curve(parts), curve(one)
    assert ours.keys() == theirs.keys(), said
    assert [step for kind, step in ours if kind == "eval"] == [30, 60, 70]
    assert len(ours) == 70 + 3
    assert list(ours.values()) == pytest.approx([theirs[key] for key in ours], abs=0.01)
    counts = [{r["step"]: r["label_tokens"] for r in records(f, "train")} for f in (one, parts)]
    assert counts[0] == counts[1]


@pytest.mark.dist
@pytest.mark.parametrize(
    "whom", ["group", *(pytest.param(x, marks=pytest.mark.slow) for x in ("launcher", "rank"))]
)
def test_signal_to_two_ranks_saves_and_leaves_nobody_behind(smoke, tmp_path, whom):
    folder = tmp_path / "run"
    process = start(2, folder, "max_duration=400ba", "save_interval=400ba", "eval_interval=400ba",
                    "train_loader.num_workers=1")  # fmt: skip
    wait_for(folder, 3, process)
    ranks = [int(x) for x in subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()]  # fmt: skip
    began = time.monotonic()
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid if whom == "launcher" else ranks[-1], signal.SIGTERM)
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() - began < 25
        time.sleep(0.1)
    process.wait(timeout=30)
    assert len(list(folder.glob("checkpoints/ba*"))) == 1
    assert json.loads((folder / "result.json").read_text())["status"] == "preempted"
    if whom == "rank":  # the launcher is alive to pass the code on
        assert process.returncode == 75


@pytest.mark.dist
def test_launcher_killed_while_ranks_still_import(smoke, tmp_path):
    process = start(2, tmp_path / "run", "max_duration=400ba")
    deadline = time.monotonic() + 120
    while len(ranks := children(process.pid)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)
    process.kill()
    process.wait()
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "run").exists()


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def test_a_shell_of_another_name_is_no_launcher(tmp_path):
    program = "from overture.launcher import follow_launcher as f; print(f())"
    (tmp_path / "composer-kit").mkdir()
    script = tmp_path / "composer-kit" / "run.sh"
    script.write_text(f"PYTHONPATH=src {sys.executable} -c '{program}'\ntrue\n")
    done = subprocess.run(["bash", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.dist
def test_dead_rank_ends_the_run(smoke, tmp_path):
    process = start(2, tmp_path / "run", "max_duration=4000ba", "eval_interval=4000ba")
    wait_for(tmp_path / "run", 3, process)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    began = time.monotonic()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    assert not any(alive(int(rank)) for rank in ranks)
    assert b"another rank ended" in said and b"the same command goes on" in said
    assert b"Traceback" not in said


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]
    except FileNotFoundError:
        return False
