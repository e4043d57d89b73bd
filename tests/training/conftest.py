"""A tiny run of the recipe, in this process."""

import json
import sys
from pathlib import Path

import pytest

from outages import RESUMED, Outage, Power
from overture.config.load import load_config
from overture.data.embedded import generate_rows
from overture.training import run as recipe
from overture.training.run import train

FINETUNE = """
task: instruct
max_seq_len: 128
tokenizer_name: {smoke}/tokenizer
data_local: {data}
model:
  name: llama
  pretrained: false
  config: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2}}
train_loader: {{dataset: {{split: train, shuffle: true}}, drop_last: true}}
eval_loader: {{dataset: {{split: test}}}}
optimizer: {{lr: 1.0e-2}}
max_duration: 8ba
eval_interval: 4ba
eval_first: true
global_train_batch_size: 4
device_train_microbatch_size: 4
device_eval_batch_size: 4
progress_bar: false
"""

LORA = (
    "trainable=lora", "lora.r=4", "model.pretrained=true", "model.name=runs/base",
    "optimizer.lr=5e-2", "generation.num_prompts=6", "generation.max_new_tokens=8",
)  # fmt: skip
RUNS = {
    "base": (),
    "lora": LORA,
    "half": (*LORA, "model.dtype=bfloat16", "optimizer.lr=1e-2"),
    "last": (*LORA[2:], "trainable=last_layer"),
    "nowhere": ("trainable=lora", "max_duration=1ba"),  # over weights that are kept nowhere
}


@pytest.fixture(scope="session")
def tiny_yaml(smoke) -> str:
    """The YAML above, on the smoke data."""
    return FINETUNE.format(smoke=smoke, data=smoke / "instruct")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_yaml):
    """A folder with a small base, and adapters trained on it: `runs/base`, `runs/lora`, ..."""
    folder = tmp_path_factory.mktemp("use")
    (folder / "tiny.yaml").write_text(tiny_yaml)
    with (folder / "rows.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in generate_rows(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, overrides in RUNS.items():
            config = load_config(["tiny.yaml", f"run_name={name}", *overrides], ("instruct",))
            assert train(config, command="python finetune.py tiny.yaml") == 0
        yield folder


@pytest.fixture
def run(tmp_path, smoke, monkeypatch):
    """Train from the YAML above with overrides; returns (exit code, run folder)."""
    path = tmp_path / "tiny.yaml"

    def go(*overrides: str, data: Path = smoke / "instruct", tasks=("instruct",)):
        path.write_text(FINETUNE.format(smoke=smoke, data=data))
        config = load_config([str(path), *overrides], tasks)
        return train(config, command="python finetune.py tiny.yaml"), tmp_path / config.run_folder

    monkeypatch.chdir(tmp_path)
    return go


@pytest.fixture
def door(monkeypatch, capsys):
    """Run a door in this process; returns what it printed."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def broken(run, monkeypatch):
    """Train, with the power going out at some steps, and go on by the same command each time."""

    def go(name, *options, at=(), between=lambda folder: None, finish=True, **more) -> Path:
        build = recipe.build_callbacks
        for step in at:
            monkeypatch.setattr(
                recipe, "build_callbacks", lambda config, step=step: [*build(config), Outage(step)]
            )
            with pytest.raises(Power):
                run(*RESUMED, *options, f"run_name={name}", **more)
            between(Path("runs") / name)
            monkeypatch.setattr(recipe, "build_callbacks", build)
        if not finish:
            return Path("runs") / name
        code, folder = run(*RESUMED, *options, f"run_name={name}", **more)
        assert code == 0
        return folder

    return go
