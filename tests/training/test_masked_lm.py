"""Masked language models by the recipe: learning, resuming, running at other lengths, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Callback
from safetensors.torch import load_file
from transformers import AutoTokenizer

from overture.config.load import load_config
from overture.config.schema import ModelConfig
from overture.data.collate import TokenCollator
from overture.data.masking import MaskingCollator
from overture.data.streams import TokenStream
from overture.errors import ConfigError
from overture.models.build import load_network
from overture.models.masked_lm import MaskedLM
from overture.tokenizer import load_tokenizer
from overture.training import run as recipe
from overture.training.tasks import TASKS
from runs import assert_same, curve, records, result

SMALL = ("progress_bar=false", "max_duration=8ba", "model.config.hidden_size=32",
         "model.config.hidden_dropout_prob=0.1")  # fmt: skip


@pytest.fixture
def bert(smoke, tmp_path, monkeypatch):
    """Train from yamls/smoke/mlm.yaml with overrides; returns the run folder."""
    monkeypatch.chdir(tmp_path)
    path = str(smoke.parents[1] / "yamls" / "smoke" / "mlm.yaml")
    places = (f"tokenizer_name={smoke}/tokenizer", f"data_local={smoke}/text")

    def go(*overrides: str) -> Path:
        config = load_config([path, *places, *SMALL, *overrides], ("masked_lm",))
        assert recipe.train(config, "python main.py yamls/smoke/mlm.yaml") == 0
        return tmp_path / config.run_folder

    return go


class Power(Callback):
    """Goes out at the end of the fifth step."""

    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 5:
            raise OverflowError


def test_resume_is_bit_for_bit_and_evaluation_masks_stay(bert, smoke, monkeypatch):
    # Epochs of a few steps, so that masks of several of them are met.
    more = ("global_train_batch_size=24", "device_train_microbatch_size=12", "eval_interval=4ba",
            "max_duration=12ba")  # fmt: skip
    whole = bert(*more, "run_name=whole", "save_interval=12ba")
    build = recipe.build_callbacks
    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), Power()])
    with pytest.raises(OverflowError):
        bert(*more, "run_name=parts", "save_interval=2ba", "train_loader.num_workers=2")
    monkeypatch.setattr(recipe, "build_callbacks", build)
    parts = bert(*more, "run_name=parts", "save_interval=2ba", "train_loader.num_workers=2")
    assert_same(whole, parts)
    final = result(whole)["eval_cross_entropy"]
    assert final < records(whole, "eval")[0]["cross_entropy"]

    # The last evaluation once more, by hand: another process would find the same masks too.
    tokenizer = load_tokenizer(str(whole))
    network = load(whole, tokenizer)
    model = MaskedLM(network, tokenizer, None).eval()
    rows = list(TokenStream(local=str(smoke / "text"), split="test", batch_size=1))
    collate = MaskingCollator(
        TokenCollator(128, tokenizer.pad_token_id), tokenizer, 0.15, 17, False
    )
    with torch.no_grad():
        losses = torch.cat([model(collate([row]))["token_losses"] for row in rows])
        assert losses.mean().item() == pytest.approx(final, abs=1e-5)
        means = []  # of documents
        for row in sorted(rows, key=lambda row: row["sample_id"])[:64]:
            batch, begin = collate([row]), 0
            found = model(batch)["token_losses"]
            places = (batch["labels"][0] != -100).nonzero()[:, 0]
            for end in row["document_ends"].tolist():
                mine = found[(places >= begin) & (places < end)]
                means += [mine.mean().item()] * bool(len(mine))
                begin = end
        # Trained at 128, run at 512: four rows as one document.
        long = [join(rows[i : i + 4]) for i in range(0, len(rows) - 3, 4)]
        wide = MaskingCollator(
            TokenCollator(512, tokenizer.pad_token_id), tokenizer, 0.15, 17, False
        )
        longer = model(wide(long))["token_losses"].mean().item()
        assert longer < final + 0.1
    worst = [json.loads(line) for line in (whole / "token_losses.jsonl").read_text().splitlines()]
    expected = sorted(means, reverse=True)[:8]
    assert [row["mean"] for row in worst] == pytest.approx(expected, abs=1e-4)
    assert all(row["of"] == len(means) and "mask" not in str(row["pieces"]) for row in worst)


def load(folder, tokenizer):
    return load_network(ModelConfig(str(folder)), tokenizer, 512, "MaskedLM")


def join(rows):
    ids = np.concatenate([row["input_ids"] for row in rows])
    whole = {"loss_mask": np.ones(len(ids), np.uint8), "document_ends": np.uint32([len(ids)])}
    return rows[0] | {"input_ids": ids, **whole}


def test_hf_bert_runs_from_the_same_yaml(bert):
    more = ("max_duration=16ba", "model.config.hidden_dropout_prob=0.0")
    folder = bert("model.name=hf_bert", *more, "model.config.hidden_size=64")
    assert result(folder)["eval_cross_entropy"] < 6.5
    # Beside a MosaicBERT; each has a folder of its own. As no share is named, 30 % of the tokens
    # are masked in training and 15 % in evaluation.
    other = bert(*more, "train_loader.dataset.mlm_probability=null",
                 "eval_loader.dataset.mlm_probability=null")  # fmt: skip
    assert (folder.name, other.name) == ("mlm-hf_bert", "mlm-mosaic_bert")
    step = records(other, "train")[-1]
    assert step["label_tokens"] / step["tokens"] == pytest.approx(0.3, abs=0.03)
    named = bert(*more, "eval_loader.dataset.mlm_probability=0.15", "run_name=named")
    assert curve(named) == curve(other)


def test_what_was_pretrained_becomes_a_classifier(bert, smoke):
    base = bert("max_duration=16ba", "model.config.hidden_size=64")
    path = str(smoke.parents[1] / "yamls" / "smoke" / "classify.yaml")
    places = (f"tokenizer_name={base}", f"data_local={smoke}/classify", "progress_bar=false")
    taken = (f"model.name={base}", "model.pretrained=true", "max_duration=24ba")
    config = load_config([path, *places, *taken], ("classify",))
    assert recipe.train(config, "python finetune.py yamls/smoke/classify.yaml") == 0
    folder = Path(config.run_folder)
    begun = load_file(base / "hf" / "model.safetensors")
    ended = load_file(folder / "hf" / "model.safetensors")
    key = "bert.embeddings.word_embeddings.weight"
    moved = (ended[key] - begun[key]).norm() / begun[key].norm()
    assert 0 < moved < 0.5  # it began from what was pretrained
    outcome = result(folder)
    assert outcome["eval_cross_entropy"] < outcome["eval_cross_entropy_before"] - 0.2


def test_refusals(bert, smoke, tmp_path):
    folder = tmp_path / "maskless"
    shutil.copytree(smoke / "tokenizer", folder)
    AutoTokenizer.from_pretrained(folder, mask_token=None).save_pretrained(folder)
    config = load_config([str(smoke.parents[1] / "yamls" / "smoke" / "mlm.yaml")], ("masked_lm",))
    config.seed = 3
    whole = load_tokenizer(str(smoke / "tokenizer"))
    seeds = [
        TASKS["masked_lm"].collator(config, whole, training).seed for training in (True, False)
    ]
    assert seeds == [3, 17]  # runs of several seeds are asked at the same places
    with pytest.raises(ConfigError, match="maskless has no mask token, which task masked_lm puts"):
        TASKS["masked_lm"].collator(config, load_tokenizer(str(folder)), True)
    with pytest.raises(ConfigError, match=r"trainable: adapters are not trained by task: masked"):
        bert("trainable=lora")
    with pytest.raises(ConfigError, match=r"mlm_probability: must be above 0 and below 1"):
        bert("train_loader.dataset.mlm_probability=1.5")
    with pytest.raises(ConfigError, match=r"mlm_probability: needs task: masked_lm"):
        bert("task=causal_lm", "eval_loader.dataset.mlm_probability=0.15")
    first = bert("run_name=first", "max_duration=1ba")
    with pytest.raises(ConfigError, match=r"load_path: .*ba1: is a mosaic_bert of .*, but model "
                                          r"is a hf_bert of"):  # fmt: skip
        bert("run_name=second", "model.name=hf_bert", f"load_path={first}",
             "load_weights_only=true")  # fmt: skip
