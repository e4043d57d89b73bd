"""What a type of weights costs in quality, and that memory savers change nothing else."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from overture.config.load import load_config
from overture.config.schema import ModelConfig
from overture.data.shards import Split
from overture.models.build import load_network
from overture.tokenizer import load_tokenizer
from overture.training.network import build_network, check_splits
from overture.training.run import train
from overture.training.tasks import TASKS

YAML = Path(__file__).parents[2] / "yamls" / "smoke" / "finetune.yaml"
STEPS = 200
SHAPE = yaml.safe_load(YAML.read_text())["model"]["config"]


@pytest.fixture(scope="module")
def losses(smoke, tmp_path_factory):
    """Eval losses (before, after) of the same run with other settings, in nats."""
    folder = tmp_path_factory.mktemp("precision")
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    torch.manual_seed(0)
    config = ModelConfig("llama", False, "float32", "auto", SHAPE)
    load_network(config, tokenizer).save_pretrained(folder / "base")

    def run(name: str, *settings: str) -> tuple[float, float]:
        arguments = [
            str(YAML), f"run_name={name}", f"run_folder={folder / name}", "progress_bar=false",
            f"data_local={smoke / 'instruct'}", f"tokenizer_name={smoke / 'tokenizer'}",
            f"max_duration={STEPS}ba", f"eval_interval={STEPS}ba", f"save_interval={STEPS}ba",
            f"model.name={folder / 'base'}", "model.pretrained=true", "optimizer.lr=2e-3",
            *settings,
        ]  # fmt: skip
        train(load_config(arguments, ("instruct",)), "test")
        result = json.loads((folder / name / "result.json").read_text())
        return result["eval_cross_entropy_before"], result["eval_cross_entropy"]

    return run


def test_bfloat16_base_learns_as_float32_does(losses):
    exact, half = losses("exact", "model.dtype=float32"), losses("half")
    assert exact[1] < exact[0] - 0.05  # there was something to learn
    assert half[0] == pytest.approx(exact[0], abs=0.005)
    assert half[1] == pytest.approx(exact[1], abs=0.005)


def test_activation_checkpointing_changes_nothing(losses):
    shorter = ("max_duration=10ba", "eval_interval=10ba", "save_interval=10ba")
    plain = losses("plain", *shorter)
    assert losses("saved", *shorter, "model.activation_checkpointing=true") == plain


@pytest.mark.parametrize(("yaml", "door"), [("finetune", "instruct"), ("pretrain", "causal_lm")])
def test_activation_checkpointing_lets_go_of_activations(smoke, yaml, door):
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    peaks = []
    for switch in ("false", "true"):
        options = [f"model.config={json.dumps(shape)}", f"model.activation_checkpointing={switch}"]
        config = load_config([f"yamls/smoke/{yaml}.yaml", "model.dtype=float32", *options], (door,))
        tokenizer = load_tokenizer(config.tokenizer_name)
        ledgers = check_splits(config, tokenizer)
        network = build_network(config, tokenizer, "cpu", ledgers)
        model = TASKS[door].model(config, network, tokenizer, None, False).train()
        split = Split(smoke / ("instruct" if door == "instruct" else "text") / "train")
        batch = TASKS[door].collator(config, tokenizer, True)([split.row(n) for n in range(8)])
        model.loss(model(batch), batch).backward()  # gradients are there from now on
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            model.loss(model(batch), batch).backward()
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        peaks.append(max(accumulate(event.nbytes() for event in events)))
    assert peaks[1] < 0.5 * peaks[0]


def test_the_proof_copies_no_weights(smoke, tiny_yaml, tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    asks = [str(tmp_path / "tiny.yaml"), "precision=amp_bf16", "model.dtype=float32"]
    config, seen = load_config(asks, ("instruct",)), []

    def prove(network, *_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))

    monkeypatch.setitem(TASKS, "instruct", TASKS["instruct"]._replace(prove=prove))
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    build_network(config, tokenizer, "cpu", check_splits(config, tokenizer))
    assert seen == [(True, False)]
