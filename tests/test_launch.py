"""The launch lines of the README as processes: exit codes, two ranks, a kill and a restart."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = "yamls/smoke/finetune.yaml"
COMPOSER = str(Path(sys.executable).parent / "composer")


def losses(folder: Path) -> dict[tuple[str, int], float]:
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        value = record.get("loss", record.get("cross_entropy"))
        found[record["kind"], record["step"]] = value
    return found


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
def test_two_ranks_give_the_losses_of_one_and_exit_3_comes_through(run_door, smoke, tmp_path):
    folders = []
    for ranks in (1, 2):
        folder = tmp_path / f"ranks{ranks}"
        done = run_door(
            "-n", ranks, "finetune.py", SMOKE, f"run_folder={folder}", "max_duration=4ba",
            "model.dtype=float32", "global_train_batch_size=4", "device_train_microbatch_size=2",
            "device_eval_batch_size=3", "callbacks.loss_target.cross_entropy=0.01",
            launcher=COMPOSER,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "loss target missed" in done.stdout
        folders.append(folder)
    one, two = map(losses, folders)
    assert one.keys() == two.keys()
    assert len(one) >= 5
    # The test split holds 11 samples or so: two ranks see one of them twice, and must not count it.
    for key, value in one.items():
        assert two[key] == pytest.approx(value, abs=1e-5), key
    result = json.loads((folders[1] / "result.json").read_text())
    single = json.loads((folders[0] / "result.json").read_text())
    for key in ("tokens_seen", "label_tokens_seen", "steps"):
        assert result[key] == single[key]


def test_killed_run_goes_on_with_the_same_command(smoke, tmp_path):
    folder = tmp_path / "killed"
    command = [
        sys.executable, "finetune.py", SMOKE, f"run_folder={folder}", "max_duration=60ba",
        "save_interval=5ba", "eval_interval=30ba",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "checkpoints/latest-rank0.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = os.readlink(folder / "checkpoints" / "latest-rank0.pt")
    assert not (folder / "result.json").exists()
    lines_before = (folder / "metrics.jsonl").read_text().count('"train"')
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["steps"]) == ("completed", 60)
    start = int(first.split("-ba")[1].split("-")[0])
    lines = (folder / "metrics.jsonl").read_text().count('"train"')
    assert lines - lines_before == 60 - start  # it began after the checkpoint, not at the start
    assert [s for k, s in losses(folder) if k == "train"] == list(range(1, 61))
