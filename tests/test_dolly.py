"""The main job in small: real Dolly rows, a real pretrained model, LoRA, a falling loss."""

import json
from pathlib import Path

import pytest

from overture.config.load import load_config
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.training.run import train

ROOT = Path(__file__).parents[1]


@pytest.mark.data
def test_lora_on_real_rows_lowers_the_loss_of_a_real_model(real_data, tmp_path, monkeypatch):
    model = str(real_data / "models" / "stories260K")
    convert(
        Conversion(
            origins={"train": Origin(str(real_data / "dolly" / "databricks-dolly-15k.jsonl"))},
            task="instruct",
            out_root=str(tmp_path / "data"),
            tokenizer=model,
            test_fraction=0.1,
            max_rows=600,
            max_seq_len=512,
        )
    )
    monkeypatch.chdir(tmp_path)
    config = load_config(
        [
            str(ROOT / "yamls" / "finetune" / "dolly.yaml"),
            f"model.name={model}",
            f"data_local={tmp_path / 'data'}",
            "max_duration=12ba",
            "scheduler.t_warmup=2ba",
            "generation.num_prompts=2",
            "generation.max_new_tokens=8",
            "progress_bar=false",
        ],
        ("instruct",),
    )
    assert train(config, command="make dolly") == 0
    result = json.loads((tmp_path / "runs" / "dolly" / "result.json").read_text())
    assert result["eval_cross_entropy_before"] - result["eval_cross_entropy"] > 0.3
