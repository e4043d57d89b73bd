"""Faults injected into real runs: each is met before it does harm, in a sentence."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from composer import Callback
from composer.core import Precision
from composer.devices import DeviceCPU

from overture.callbacks.guards import FiniteGuard, GradientGuard
from overture.errors import ConfigError, GuardError, Preempted
from overture.models.causal_lm import CausalLM
from overture.training import run as recipe
from runs import records, result

ROOT = Path(__file__).parents[2]
SMOKE = "yamls/smoke/finetune.yaml"


@pytest.fixture
def at_step(monkeypatch):
    """Let something happen in the state of the Trainer at an event of a step."""

    def arrange(step: int, event: str, fault) -> None:
        def happen(self, state, logger):
            if state.timestamp.batch.value == step - (event != "batch_end"):
                fault(state)

        callback = type("Fault", (Callback,), {event: happen})
        build = recipe.build_callbacks
        monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), callback()])

    return arrange


@pytest.mark.parametrize(
    ("value", "clip"),
    [(float("nan"), "norm"), (float("inf"), "value"), (-float("inf"), None)],
)
def test_gradient_that_is_not_finite_stops_before_the_step(run, at_step, value, clip):
    # Composer clips before any callback looks: by value, Inf would become an ordinary number.
    clipping = f"algorithms.gradient_clipping={{clipping_type: {clip}}}" if clip else "seed=17"

    def spoil(state):
        next(p for p in state.model.parameters() if p.grad is not None).grad.view(-1)[0] = value

    at_step(5, "after_backward", spoil)
    with pytest.raises(GuardError, match=r"step 5: a gradient is not finite; its samples are in"):
        run("run_name=bad", "save_interval=2ba", clipping)
    folder = Path("runs/bad")
    assert result(folder)["status"] == "failed"
    bad = json.loads((folder / "bad_batch.json").read_text())
    assert bad["step"] == 5
    assert len(set(bad["sample_ids"])) == 4
    state = torch.load(folder / "checkpoints" / "ba4" / "state.pt", weights_only=False)["state"]
    assert all(p.isfinite().all() for p in state["model"].values())
    assert [r["step"] for r in records(folder, "train")] == [1, 2, 3, 4]


@pytest.fixture
def losses_times(monkeypatch):
    """Multiply the training losses of some steps by a factor."""
    loss, calls = CausalLM.loss, []

    def arrange(factor: float, *steps: int) -> None:
        calls.clear()

        def spoiled(self, outputs, batch):
            calls.append(0)
            return loss(self, outputs, batch) * (factor if len(calls) in steps else 1.0)

        monkeypatch.setattr(CausalLM, "loss", spoiled)

    return arrange


def test_loss_that_is_not_finite_is_skipped_as_often_as_allowed(run, losses_times):
    losses_times(float("inf"), 3, 5)
    code, folder = run("run_name=skips", "guards.non_finite=skip", "guards.max_skips=2")
    assert code == 0
    assert result(folder)["guards"]["skipped_steps"] == 2
    lines = (folder / "bad_batch.json").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 5]
    told = [(r["step"], r["what"]) for r in records(folder, "event")]
    assert told == [(step, "the loss is not finite; step skipped") for step in (3, 5)]
    assert "step 5: the loss is not finite; step skipped" in (folder / "report.html").read_text()
    losses_times(float("inf"), 3, 5)
    with pytest.raises(GuardError, match=r"step 5: the loss is not finite after 1 skipped steps"):
        run("run_name=few", "guards.non_finite=skip", "guards.max_skips=1")


def test_weights_that_are_not_finite_are_never_saved(run, at_step):
    def spoil(state):
        with torch.no_grad():
            next(p for p in state.model.parameters() if p.requires_grad).view(-1)[0] = torch.nan

    at_step(4, "batch_end", spoil)  # where the guard of gradients does not look
    with pytest.raises(GuardError, match=r"step 4: weights are not finite any more"):
        run("run_name=nan", "save_interval=2ba", "eval_interval=8ba")
    assert [p.name for p in Path("runs/nan/checkpoints").iterdir()] == ["ba2"]


def test_batch_without_labels_is_named(run, monkeypatch):
    build = recipe.build_loader

    def loader(*args, **options):
        spec = build(*args, **options)
        collate = spec.dataloader.collate_fn

        def emptied(rows):
            batch = collate(rows)
            batch["labels"].fill_(-100)
            return {**batch, "num_labels": [0] * len(rows)}

        spec.dataloader.collate_fn = emptied
        return spec

    monkeypatch.setattr(recipe, "build_loader", loader)
    with pytest.raises(GuardError, match=r"step 1: the batch has no label tokens"):
        run("run_name=empty", "eval_first=false", "eval_loader=null")


def test_adapter_out_of_reach_of_the_gradient(run, monkeypatch):
    build = recipe.build_network

    def cut(*args, **kwargs):
        network = build(*args, **kwargs)
        layer = network.base_model.model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: output.detach())
        return network

    monkeypatch.setattr(recipe, "build_network", cut)
    with pytest.raises(GuardError, match=r"trained tensors got no gradient in 4 steps.*_proj"):
        run("run_name=cut", "trainable=lora", "lora.r=4")


def test_what_the_gradient_reached_is_known_after_an_interruption():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "abc"})
    first, second = GradientGuard(), GradientGuard()

    def step(guard, number, reached):
        for name, layer in model.items():
            layer.weight.grad = torch.full((2, 2), float(name in reached))
        batch = SimpleNamespace(value=number)
        state = SimpleNamespace(model=model, timestamp=SimpleNamespace(batch=batch))
        guard.after_train_batch(state, None)

    step(first, 0, "a")
    step(first, 1, "")
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    step(second, 2, "b")
    with pytest.raises(
        GuardError, match=r"1 of 3 trained tensors got no .* never learn: c\.weight"
    ):
        step(second, 3, "")


def test_warm_up_from_zero_is_no_fault(run):
    options = ("trainable=lora", "lora.r=4", "scheduler.t_warmup=3ba")
    assert run("run_name=warm", *options)[0] == 0


def test_nothing_to_train(run, monkeypatch):
    build = recipe.build_network
    frozen = lambda *args, **kwargs: build(*args, **kwargs).requires_grad_(False)  # noqa: E731
    monkeypatch.setattr(recipe, "build_network", frozen)
    with pytest.raises(ConfigError, match="no parameter would be trained"):
        run("run_name=none")


def test_spike_is_marked_or_stops(run, losses_times):
    options = ("max_duration=26ba", "eval_loader=null", "eval_first=false", "optimizer.lr=1e-4")
    losses_times(3.0, 24)
    code, folder = run("run_name=marked", *options)
    assert code == 0
    assert result(folder)["guards"]["loss_spikes"] == [24]
    (event,) = records(folder, "event")
    assert event["step"] == 24 and "a spike" in event["what"]
    assert f"step 24: {event['what']}" in (folder / "report.html").read_text()
    losses_times(3.0, 24)
    with pytest.raises(GuardError, match=r"step 24: loss .*: a spike; guards\.loss_spike=mark"):
        run("run_name=stopped", *options, "guards.loss_spike=stop")


def test_step_that_is_skipped_is_no_spike(run, losses_times):
    losses_times(float("inf"), 23)
    code, folder = run(
        "run_name=skipped", "max_duration=25ba", "eval_loader=null", "eval_first=false",
        "optimizer.lr=1e-4", "guards.non_finite=skip", "guards.loss_spike=stop",
    )  # fmt: skip
    assert (code, result(folder)["guards"]) == (0, {"loss_spikes": [], "skipped_steps": 1})


HANGS = {
    "in_the_main_process": """
from composer import Callback
from overture.training import run
class Hang(Callback):
    def batch_start(self, state, logger):
        if state.timestamp.batch.value == 2:
            time.sleep(1000)
run.build_callbacks = lambda config: [Hang()]
""",
    "in_an_evaluation": """
from composer import Callback
from overture.training import run
class Hang(Callback):
    def eval_batch_start(self, state, logger):
        time.sleep(1000)
run.build_callbacks = lambda config: [Hang()]
""",
    "in_a_worker": """
from overture.data.collate import TokenCollator
def sleeps_on_its_fourth(self, rows, count=[], make=TokenCollator.__call__):
    count.append(1)
    time.sleep(1000 * (len(count) == 4))
    return make(self, rows)
TokenCollator.__call__ = sleeps_on_its_fourth
""",
}


@pytest.mark.parametrize("where", HANGS)
def test_hang_ends_with_the_stacks_of_all_threads_and_workers(smoke, tmp_path, where):
    program = f"""
import sys, time
sys.path[:0] = ["src"]
{HANGS[where]}
import runpy
sys.argv = ["finetune.py", "{SMOKE}", "run_folder={tmp_path}/run", "guards.timeout=4",
            "eval_first={where == "in_an_evaluation"}", "train_loader.num_workers=2"]
runpy.run_path("finetune.py", run_name="__main__")
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 5, done.stderr
    assert time.monotonic() - began < 60
    assert "no batch was finished for 4 seconds (guards.timeout)" in done.stdout
    (file,) = (tmp_path / "run").glob("stacks-*.txt")
    assert str(file) in done.stdout
    assert "most recent call first" not in done.stdout + done.stderr
    ours, *workers = file.read_text().split("\nworker ")
    assert result(tmp_path / "run")["status"] == "failed"
    if where == "in_an_evaluation":  # before the first step
        assert "in eval_batch_start" in ours
        return
    assert len(workers) == 2
    assert all("in _worker_loop" in stacks for stacks in workers)
    assert ("in batch_start" in ours) == (where == "in_the_main_process")
    asleep = ["in sleeps_on_its_fourth" in stacks for stacks in workers]
    assert asleep == [where == "in_a_worker"] * 2


def start(folder: Path, *options: str) -> subprocess.Popen:
    """Start a run of many steps as a process, and wait for the third."""
    command = [sys.executable, "finetune.py", SMOKE, f"run_folder={folder}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline, log = time.monotonic() + 120, folder / "metrics.jsonl"
    while not (log.exists() and log.read_text().count('"train"') >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
)
def test_signal_saves_and_the_same_command_goes_on(smoke, tmp_path, number):
    folder = tmp_path / "run"
    options = ("max_duration=100ba", "save_interval=100ba", "eval_interval=100ba")
    process = start(folder, *options)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert time.monotonic() - began < 25
    (saved,) = (folder / "checkpoints").iterdir()
    assert f"stopped as asked, saved at step {saved.name[2:]}; the same command" in said.decode()
    assert result(folder)["status"] == "preempted"
    if number != signal.SIGTERM:
        return
    process = start(folder, *options)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert result(folder)["steps"] == 100
    steps = [r["step"] for r in records(folder, "train")]
    assert steps == list(range(1, 101))  # none was done twice


def test_second_ctrl_c_stops_at_once(smoke, tmp_path):
    slow = (
        "import sys, time, runpy; sys.path[:0] = ['src']\n"
        "from composer import Callback\n"
        "from overture.training import run\n"
        "class Slow(Callback):\n"
        "    def batch_start(self, state, logger):\n"
        "        if state.timestamp.batch.value == 3: print('slow', flush=True); time.sleep(100)\n"
        "run.build_callbacks = lambda config: [Slow()]\n"
        f"sys.argv = ['finetune.py', {SMOKE!r}, 'run_folder={tmp_path}/run', 'save_interval=1ba']\n"
        "runpy.run_path('finetune.py', run_name='__main__')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    while b"slow" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert b"SIGINT: saving after this batch ..." in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, b"Traceback" in said) == (130, False)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").glob("ba*")} == {"ba2", "ba3"}


def test_signal_while_the_outcome_is_written(run, monkeypatch):
    """What was trained is there, and the same command makes what is left of it."""
    save = recipe.save_model

    def asked(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        save(*arguments)

    monkeypatch.setattr(recipe, "save_model", asked)
    with pytest.raises(Preempted, match="saved at step 8; the same command goes on from there"):
        run("run_name=late")
    assert result(Path("runs/late"))["status"] == "preempted"
    monkeypatch.setattr(recipe, "save_model", save)
    code, folder = run("run_name=late")
    assert (code, result(folder)["status"]) == (0, "completed")
    assert [r["step"] for r in records(folder, "train")] == list(range(1, 9))


def test_scaler_does_not_skip_for_ever(tmp_path):
    weight = torch.nn.Linear(2, 2)
    log = SimpleNamespace(path=tmp_path / "log", note=lambda *_: None)
    guard, step = FiniteGuard("stop", 3, log), SimpleNamespace(batch=SimpleNamespace(value=0))
    state = SimpleNamespace(model=weight, timestamp=step, device=DeviceCPU())
    state.batch = {"sample_ids": torch.zeros(1), "num_labels": [1]}
    state.precision = Precision.AMP_FP16

    def bad(value):
        guard.after_dataloader(state, None)
        weight.weight.grad = torch.full((2, 2), value)
        guard.after_train_batch(state, None)

    for _ in range(2):  # one that is finite begins the count anew
        for _ in range(FiniteGuard.SCALED - 1):
            bad(math.inf)
        bad(1.0)
    with pytest.raises(GuardError, match="a gradient is not finite"):
        for _ in range(FiniteGuard.SCALED):
            bad(math.nan)
    # Composer's scaler is there in every precision, on a GPU, and skips in that one alone.
    state.precision, state.scaler = Precision.AMP_BF16, SimpleNamespace(is_enabled=lambda: True)
    with pytest.raises(GuardError, match="a gradient is not finite"):
        bad(math.nan)


def test_dead_worker_of_the_loader(smoke, tmp_path):
    options = ("max_duration=2000ba", "eval_interval=2000ba", "save_interval=2000ba")
    process = start(tmp_path / "run", *options, "train_loader.num_workers=2")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 5, said
    assert b"a worker of the loader died" in said
    assert b"Traceback" not in said, said[-6000:].decode()


def test_a_signal_to_stop_that_comes_again_spares_the_workers(smoke, tmp_path):
    options = ("max_duration=2000ba", "eval_interval=2000ba", "save_interval=2000ba")
    process = start(tmp_path / "run", *options, "train_loader.num_workers=2")
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "finetune.py"], capture_output=True, text=True
    )
    workers = [int(number) for number in found.stdout.split()]
    assert len(workers) == 2
    for number in workers * 3:  # as long as a job takes to save, it comes again
        with suppress(ProcessLookupError):  # its epoch may be over
            os.kill(number, signal.SIGUSR1)
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
