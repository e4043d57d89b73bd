"""Runs on a GPU that is not there: see stand_in_gpu. What a real one shows is in test_cuda."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "stand_in_gpu"
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(
        not (torch.version.cuda or "").startswith("12."), reason="this torch is not for CUDA 12"
    ),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc"),
]


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory, smoke):
    """Run a program of Python on so many GPUs, and return what it says."""
    libraries = tmp_path_factory.mktemp("libraries")
    library = libraries / "libcuda.so.1"  # as torch opens the driver; the runtime is before it
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "cudart.c"], check=True)
    paths = ":".join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    there = {"LD_LIBRARY_PATH": paths, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE)}

    def run(*options: str, gpus: int = 1, mebibytes: int = 80 * 1024, code: int = 0) -> str:
        env = os.environ | there | {"OVERTURE_STAND_IN_GPUS": str(gpus)}
        env["OVERTURE_STAND_IN_MIB"] = str(mebibytes)
        env.pop("CUDA_VISIBLE_DEVICES", None)
        done = subprocess.run([sys.executable, *options], cwd=ROOT, env=env, capture_output=True,
                              text=True, timeout=900)  # fmt: skip
        assert done.returncode == code, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout + done.stderr * (code != 0)

    return run


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_kernels_and_a_run(on_gpus):
    chosen = "attention or loss or adapted or options0"
    said = on_gpus(*PYTEST, "tests/models/test_cuda.py", "-k", chosen)
    assert " passed" in said and "skipped" not in said


def test_the_doctor(on_gpus):
    shards = "fsdp_config={cpu_offload: true, state_dict_type: sharded}"
    said = on_gpus("src/check_setup.py", "yamls/smoke/pretrain.yaml", shards, "run_name=doctor")
    assert said.endswith("this run can begin\n") and "FlashAttention kernel where it can" in said
    assert "weights, gradients and optimizer in the hosts' memory: 0.0 GiB at once" in said
    assert "0.0 on each GPU; at least 1 ranks like this device of 80.0 GiB" in said
    assert "on one device (0.00 GPU-hours) without cpu_offload, which is slower" in said


@pytest.mark.slow
def test_memory_that_the_doctor_says_is_too_small_is(on_gpus, tmp_path):
    wide = ("model.config.hidden_size=256", "model.config.intermediate_size=1024")
    rows = "device_train_microbatch_size={}".format
    run = ("main.py", "yamls/smoke/pretrain.yaml", *wide, "max_duration=2ba")
    said = on_gpus("src/check_setup.py", *run[1:], rows(8), mebibytes=100, code=2)
    assert "STOP    memory       8 rows" in said and "device_train_microbatch_size=4, at no" in said
    said = on_gpus(*run, rows(8), f"run_folder={tmp_path}/8", mebibytes=100, code=5)
    assert "error: out of memory: it does not fit; try device_train_microbatch_size=1 or" in said
    on_gpus(*run, rows(4), f"run_folder={tmp_path}/4", mebibytes=100)
    on_gpus(*run, rows("auto"), f"run_folder={tmp_path}/auto", mebibytes=100)


def test_a_run_begun_on_a_cpu_goes_on(on_gpus, run_door, tmp_path):
    run = ("finetune.py", "yamls/smoke/finetune.yaml", "generation=null")
    done = run_door(*run, f"run_folder={tmp_path}/cpu")
    assert done.returncode == 0, done.stderr
    more = (f"run_folder={tmp_path}/gpu", f"load_path={tmp_path}/cpu", "max_duration=18ba")
    assert "steps               18" in on_gpus(*run, *more)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_keep_their_shards_in_the_hosts_memory(on_gpus):
    of = "tests/training/test_sharding.py::test_shards_give_what_one_rank_gives_and_any_number"
    assert "1 passed" in on_gpus(*PYTEST, f"{of}_goes_on", gpus=2)


@pytest.mark.slow
@pytest.mark.dist
def test_all_that_is_for_gpus_and_shards(on_gpus):
    on_gpus(*PYTEST, "tests/models/test_cuda.py", "-k", "not compile and not options1")
    on_gpus(*PYTEST, "tests/training/test_sharding.py", "-m", "slow or not slow", gpus=4)
