"""What could be lost or taken for another thing when a trained model is used."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

import export_model
import generate_text
from overture.errors import ConfigError, GuardError
from overture.export import save_model
from overture.trained import load_trained
from runs import result


@pytest.fixture(autouse=True)
def within(runs, monkeypatch):
    """Stand in the folder of the runs."""
    monkeypatch.chdir(runs)


def test_the_base_under_adapters_is_not_replaced_by_them(runs, door):
    door(export_model, "runs/base", "--out", "exported")
    settings = json.loads((runs / "runs/lora/hf/adapter_config.json").read_text())
    shutil.copytree(runs / "runs/lora/hf", runs / "over")
    settings["base_model_name_or_path"] = "exported"
    (runs / "over" / "adapter_config.json").write_text(json.dumps(settings))
    (runs / "over" / "trained_on.json").unlink()
    with pytest.raises(ConfigError, match="--out exported: is no earlier export, so it is not"):
        door(export_model, "over", "--out", "exported", "--overwrite")
    assert (runs / "exported" / "model.safetensors").is_file()
    door(export_model, "runs/base", "--out", "exported", "--overwrite")


def test_adapters_of_a_deeper_model_are_refused_rather_than_used_in_part(runs, tmp_path):
    deeper = tmp_path / "deeper"
    shutil.copytree(runs / "runs/lora/hf", deeper)
    (deeper / "trained_on.json").unlink()
    weights = load_file(deeper / "adapter_model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): w.clone() for name, w in weights.items()}
    save_file(weights | more, deeper / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no place for \d+ of their tensors, as .*layers.2"):
        load_trained("runs/base", str(deeper))


def test_the_card_of_a_checkpoint_has_no_figures_of_the_end(runs, door, tmp_path):
    figure = f"{result(runs / 'runs' / 'base')['eval_cross_entropy']:.4f}"
    for name, has in (("runs/base", True), ("runs/base/hf", True), ("checkpoint", False)):
        if name == "checkpoint":
            name = str(max((runs / "runs/base/checkpoints").glob("ba*")))
        out = tmp_path / str(len([*tmp_path.iterdir()]))
        door(export_model, name, "--out", out)
        assert (figure in (out / "README.md").read_text()) is has


def test_a_run_whose_data_is_gone_is_asked_by_a_template_that_is_named(runs, door):
    path = runs / "runs" / "base" / "config.yaml"
    text = path.read_text()
    config = yaml.safe_load(text)
    path.write_text(yaml.safe_dump(config | {"data_local": "nowhere"}))
    try:
        ask = ("runs/base", "--data", "rows.jsonl", "--sample", 2, "--max_new_tokens", 2)
        with pytest.raises(ConfigError, match="its template is not known; name it by --prompt"):
            door(generate_text, *ask)
        assert "2 answers" in door(generate_text, *ask, "--prompt_template", "dolly")
    finally:
        path.write_text(text)


def test_what_a_tokenizer_raises_on_a_full_disk_is_said_and_leaves_nothing(runs, tmp_path):
    trained = load_trained("runs/base")

    class Full:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")  # as tokenizers have it

    with pytest.raises(GuardError, match=r"out: cannot be written \(No space left on device"):
        save_model(trained.model, Full(), tmp_path / "out", {})
    assert not [*tmp_path.iterdir()]
