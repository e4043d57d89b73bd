"""Canaries in the environment, the config and URLs are found in no file and no output of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glue_files import write_glue
from runs import result

ROOT = Path(__file__).parents[2]
SMOKE = "yamls/smoke/finetune.yaml"
CANARY = "Cana-ry"
ENVIRONMENT = {
    "HF_TOKEN": f"hf_{CANARY}1",
    "AWS_ACCESS_KEY_ID": f"AKIA{CANARY}2",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}3/a+b",
    "WANDB_API_KEY": f"{CANARY}4",
    "HTTPS_PROXY": f"http://me:{CANARY}5@proxy.invalid:1",
}
URL = f"https://me:{CANARY}6@host.invalid/x"


@pytest.fixture
def door(smoke, tmp_path):
    """Run the door with canaries around; nothing that it writes or says may hold one."""

    def run(*options: str, before: str = "") -> tuple[subprocess.CompletedProcess, Path]:
        folder, prelude = tmp_path / "run", "import runpy, sys; sys.path[:0] = ['src']\n"
        arguments = ["finetune.py", SMOKE, f"run_folder={folder}", "max_duration=4ba", *options]
        program = (
            f"{prelude}{before}\nsys.argv = {arguments!r}\n"
            "runpy.run_path('finetune.py', run_name='__main__')"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200,
            env={**os.environ, **ENVIRONMENT, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert CANARY not in done.stdout + done.stderr
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
        return done, folder

    return run


def test_run_that_succeeds(door):
    done, folder = door(f"resume.allow=[{URL}]", "loggers.tensorboard={}", "save_interval=2ba")
    assert done.returncode == 0, done.stderr
    assert "https://***@host.invalid/x" in (folder / "config.yaml").read_text()
    assert "https://***@host.invalid/x" in (folder / "environment.json").read_text()
    assert "https://***@host.invalid/x" in (folder / "report.html").read_text()
    names = {path.name for path in folder.rglob("*")}
    assert {"manifest.json", "state.pt", "adapter_config.json", "result.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


# What a client may say, in every way that a library has.
CHATTY = """
import logging, os, sys, warnings
from composer import Callback
from overture.errors import GuardError
from overture.training import run
class Chatty(Callback):
    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 2:
            secrets = " ".join(v for k, v in os.environ.items() if "Cana" in v) + " " + {url!r}
            print("print", secrets)
            print("err", secrets, file=sys.stderr)
            logging.getLogger("some.library").error(f"log {{secrets}}")
            warnings.warn(f"warn {{secrets}}")
            raise {kind}(f"client: {{secrets}}")
run.build_callbacks = lambda config: [Chatty()]
"""


@pytest.mark.parametrize("kind", ["GuardError", "RuntimeError"])
def test_run_that_fails_with_secrets_in_its_mouth(door, kind):
    done, folder = door(
        f"resume.allow=[{URL}]", "eval_first=false", before=CHATTY.format(kind=kind, url=URL)
    )
    assert done.returncode == (5 if kind == "GuardError" else 1)
    assert ("Traceback" in done.stderr) == (kind == "RuntimeError")
    for way in ("err", "log", "warn", "client:"):
        assert f"{way} ***" in done.stderr.replace("hf_***", "***")
    assert "print ***" in done.stdout
    assert "client: ***" in result(folder)["error"]


@pytest.mark.parametrize(
    "option",
    [
        f"data_remote=s3://me:{CANARY}6@bucket/x",
        f"load_path=s3://me:{CANARY}6@bucket/x",
        f"loggers.mlflow.tracking_uri={URL}",
        f"optimizer.lr={URL}",
        f"loggers.wandb.api_key={CANARY}7",
        f"model.config.task_specific_params.api_key={CANARY}7",
        f"--hub_token={CANARY}7",
    ],
)
def test_config_that_cannot_be_used(door, option, tmp_path):
    data = (f"data_local={tmp_path}/cache",) if option.startswith("data_remote") else ()
    done, folder = door(option, *data)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "result.json").exists()


def test_secrets_in_a_yaml(smoke, tmp_path):
    """Of a run, and of GLUE, whose jobs read configs of their own."""
    data, name = write_glue(tmp_path / "tsv"), f"{CANARY}8"
    uri = f"https://me:{name}@host.invalid/x"
    path, work = tmp_path.parent / f"{tmp_path.name}.yaml", tmp_path / "work"
    path.write_text(f"""
data: {data}
tasks: [rte]
run_folder: {work}
data_local: {tmp_path}/converted
retries: 0
finetune:
  max_seq_len: 64
  tokenizer_name: {smoke}/tokenizer
  model: {{name: bert, pretrained: false, config: {{hidden_size: 32, intermediate_size: 64,
           num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 64}}}}
  max_duration: 1ba
  resume: {{allow: ["{uri}"]}}
  global_train_batch_size: 8
""")
    try:
        done = subprocess.run(
            [sys.executable, "src/evaluate_glue.py", str(path)], cwd=ROOT, capture_output=True,
            text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr
    assert result(work / "rte-17")["status"] == "completed"
    assert "https://***@host.invalid/x" in (work / "jobs" / "rte-17.yaml").read_text()
    assert CANARY not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file


def test_converter(smoke, tmp_path):
    options = ("--task", "instruct", "--tokenizer", str(smoke / "tokenizer"), "--max_rows", "50")
    remote = f"s3://me:{CANARY}6@bucket/x"
    typed = [sys.executable, "src/convert_dataset.py", "--hub_token", f"hf_{CANARY}9"]
    done = subprocess.run(typed, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, CANARY in done.stderr) == (2, False)
    for out, dataset, code in [("out", URL, 2), (remote, "embedded", 2)]:
        done = subprocess.run(
            [sys.executable, "src/convert_dataset.py", *options, "--dataset", dataset,
             "--out_root", out if "://" in out else str(tmp_path / out)],
            cwd=ROOT, capture_output=True, text=True, timeout=200,
            env={**os.environ, **ENVIRONMENT, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == code, (out, dataset, done.stderr)
        assert CANARY not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path
