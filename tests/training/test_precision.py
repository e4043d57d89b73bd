"""What a type of weights costs in quality, and that memory savers change nothing else."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from overture.config.load import load_config
from overture.config.schema import ModelConfig
from overture.models.build import load_network
from overture.tokenizer import load_tokenizer
from overture.training.run import train

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
