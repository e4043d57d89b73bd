"""The check of the machine, and of data before torch is imported."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch

from overture import check, prove_resume
from overture.check import check_data, check_environment
from overture.config.load import load_config
from overture.data.schema import seal, unseal
from overture.errors import ConfigError, DataError


def test_environment_is_fine_here():
    findings = {what: (fine, text) for what, fine, text in check_environment()}
    assert all(fine for fine, _ in findings.values()), findings
    assert {"Python", "torch", "composer", "streaming", "CPU", "cpu bfloat16"} <= findings.keys()
    assert findings["cpu float32"][1].endswith("GFLOP/s")


def test_a_device_that_fails_is_one_line_of_the_table(monkeypatch):
    def fail(device):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(check, "_tiny_training_step", fail)
    findings = {what: (fine, text) for what, fine, text in check_environment()}
    assert findings["cpu model"] == (False, "no kernel image is available")
    assert "flash_attn" in findings


def test_door_says_that_all_is_well(run_door):
    done = run_door("src/check_setup.py")
    assert done.returncode == 0, done.stderr
    assert "everything needed is here" in done.stdout
    assert "STOP" not in done.stdout


@pytest.fixture
def config(smoke, tmp_path):
    shutil.copytree(smoke / "instruct", tmp_path / "data")

    def load(*overrides):
        options = [f"data_local={tmp_path / 'data'}", *overrides]
        return load_config(["yamls/smoke/finetune.yaml", *options], ("instruct",))

    return load


def test_good_data_passes(config):
    check_data(config())


@pytest.mark.skipif(bool(find_spec("mlflow")), reason="mlflow is installed")
def test_a_logger_without_its_package_is_told_before_all_else(config):
    with pytest.raises(ConfigError, match=r"loggers\.mlflow: needs `pip install mlflow`"):
        check_data(config("loggers.mlflow={}"))


def test_missing_split_names_those_there(config):
    with pytest.raises(ConfigError, match=r"the splits there are: test, train"):
        check_data(config("train_loader.dataset.split=dev"))


def test_batch_larger_than_the_split(config):
    with pytest.raises(ConfigError, match=r"global_train_batch_size: 4096 samples per batch"):
        check_data(config("global_train_batch_size=4096"))


def test_every_stream_is_checked(smoke, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(smoke / "instruct", tmp_path / name)
    streams = [f"train_loader.streams.{name}.data_local={tmp_path / name}" for name in ("a", "b")]
    held_out = [f"eval_loader.streams.b={{data_local: {tmp_path / 'b'}, split: test}}"]
    rest = ["data_local=null", "eval_loader.dataset.split=train"]
    options = ["yamls/smoke/finetune.yaml", *streams, *held_out, *rest]
    config = load_config(options, ("instruct",))
    check_data(config)
    for split in ("train", "test"):
        shard = next((tmp_path / "b" / split).glob("shard*"))
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=str(shard)):
            check_data(config)
        shard.write_bytes(whole)
    shutil.rmtree(tmp_path / "b" / "train")
    with pytest.raises(
        ConfigError, match=r"b/train: no converted dataset \(the splits there are: "
    ):
        check_data(config)


def test_split_without_a_label(config, tmp_path):
    ledger = tmp_path / "data" / "test" / "dataset.json"
    content = unseal(ledger)
    content["tokens"]["trained"] = 0
    ledger.write_text(seal(content))
    with pytest.raises(ConfigError, match=r"data/test: none of its tokens is a label, so there is"):
        check_data(config())


def test_missing_checkpoint(config):
    with pytest.raises(ConfigError, match=r"load_path: no/such\.pt: no such file"):
        check_data(config("load_path=no/such.pt"))


@pytest.mark.parametrize("damage", ["missing", "short", "ledger"])
def test_damaged_files_exit_4(config, tmp_path, damage):
    train = tmp_path / "data" / "train"
    shard = next(train.glob("shard*"))
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (train / "dataset.json").write_text("{")
    with pytest.raises(DataError) as caught:
        check_data(config())
    assert caught.value.exit_code == 4
    assert ("dataset.json" if damage == "ledger" else shard.name) in str(caught.value)


def test_ledger_agrees_with_the_index(smoke):
    ledgers = list(smoke.glob("*/*/dataset.json"))
    assert len(ledgers) == 8
    for path in ledgers:
        ledger = json.loads(path.read_text())
        index = json.loads((path.parent / "index.json").read_text())
        assert ledger["samples"] == sum(shard["samples"] for shard in index["shards"])


def test_runs_that_differ_by_themselves_prove_nothing(monkeypatch):
    config, finished = load_config(["yamls/smoke/finetune.yaml"], ("instruct",)), []
    monkeypatch.setattr(prove_resume, "_finish", finished.append)
    monkeypatch.setattr(prove_resume, "_kill", lambda *_: 6)
    monkeypatch.setattr(prove_resume, "_difference", lambda *_: "differs at step 3: 1.0, 2.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [*prove_resume.prove_resume(config, [])][-1] == "differs at step 3: 1.0, 2.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="two runs without an interruption differ too"):
        [*prove_resume.prove_resume(config, [])]
    assert len(finished) == 5 and finished[-1][-1].endswith("/again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [  # the first are left out, as it evaluates nothing: see SMALL
        ("callbacks.early_stop.patience=1", "loggers.tensorboard={}",
         "save_num_checkpoints_to_keep=1"),
        ("fsdp_config.state_dict_type=sharded", "model.dtype=float32"),
        ("load_path={}", "model.dtype=float32"),  # of a run that is longer
    ],
)  # fmt: skip
def test_resume_is_proven_on_a_config(run_door, smoke, options, tmp_path):
    if options[0] == "load_path={}":
        options = options[0].format(tmp_path), *options[1:]
        done = run_door("finetune.py", "yamls/smoke/finetune.yaml", *options[1:],
                        "max_duration=14ba", f"run_folder={tmp_path}")  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = run_door("src/check_setup.py", "yamls/smoke/finetune.yaml", "lora.dropout=0.1",
                    *options, "--prove_resume")  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.splitlines()[-1] == "identical: losses, weights and optimizer"
    assert "killed at step" in done.stdout
    done = run_door("src/check_setup.py", "--prove_resume")
    assert (done.returncode, "needs a config" in done.stderr) == (2, True)
