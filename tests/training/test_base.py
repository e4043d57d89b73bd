"""Adapters know the base that they were trained on: by a checkpoint, and by the exported folder."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from overture.errors import ConfigError
from overture.models.lora import check_base, model_fingerprint

LORA = (
    "trainable=lora", "lora.r=4", "model.pretrained=true", "model.config.num_hidden_layers=1",
    "max_duration=2ba", "eval_loader=null", "eval_first=false",
)  # fmt: skip


@pytest.fixture
def bases(tmp_path, smoke):
    """A base model, and one that differs in a single weight."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=2)
    )  # fmt: skip
    network.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        network.model.layers[0].mlp.down_proj.weight[3, 5] += 1
    network.save_pretrained(tmp_path / "other")
    return tmp_path / "base", tmp_path / "other"


def test_adapters_on_another_base_are_refused(run, bases):
    base, other = bases

    asking = (*[x for x in LORA if not x.startswith("eval")], "generation.num_prompts=6",
              "generation.max_new_tokens=8", "optimizer.lr=5e-2")  # fmt: skip
    _, first = run(*asking, f"model.name={base}", "run_name=first")
    more = (*LORA, f"load_path={first}", "load_weights_only=true")
    of_first = (f"load_path={first}", "load_weights_only=true", f"model.name={base}")
    code, same = run(*asking, *of_first, "run_name=same")
    assert code == 0
    # What is asked before training is asked of the weights that training begins with.
    told = [[json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
            for folder in (first, same)]  # fmt: skip
    assert [row["before"] for row in told[1]] == [row["after"] for row in told[0]]
    assert not (same / "before.json").exists()
    with pytest.raises(
        ConfigError, match=r"is a .*base, pretrained, but model is a .*other, pretr"
    ):
        run(*more, f"model.name={other}", "run_name=wrong")
    allowed = run(*more, f"model.name={other}", "run_name=allowed", "resume.allow=[model]")
    assert allowed[0] == 0

    def exported(folder):
        network = AutoModelForCausalLM.from_pretrained(folder)
        return model_fingerprint(PeftModel.from_pretrained(network, first / "hf"))

    check_base(first / "hf" / "trained_on.json", exported(base))
    with pytest.raises(ConfigError, match=r"trained_on\.json: was trained in another model"):
        check_base(first / "hf" / "trained_on.json", exported(other))


def test_tokenizer_that_grew_into_spare_rows(run, bases, smoke):
    base, _ = bases  # of as many rows as the tokenizer has pieces, the last of which it never saw
    shutil.copytree(smoke / "tokenizer", base, dirs_exist_ok=True)
    named = f"tokenizer_name={smoke / 'tokenizer'}"
    assert run(*LORA, f"model.name={base}", "run_name=same", named)[0] == 0
    content = json.loads((base / "tokenizer.json").read_text())
    left, right = content["model"]["merges"].pop()
    assert content["model"]["vocab"].pop(left + right) == 1023
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"tokenizer_name: .* 1 pieces more, from .* stay as drawn"
    ):
        run(*LORA, f"model.name={base}", "run_name=grown", named)
    assert run(*LORA[2:], "trainable=all", f"model.name={base}", "run_name=all", named)[0] == 0


def test_a_base_is_known_by_the_place_of_its_weights_too():
    one = torch.nn.Linear(4, 4, bias=False)
    one.weight.requires_grad_(False)
    two = copy.deepcopy(one)
    two.weight.data = two.weight.data.flip(0)  # the same numbers
    assert model_fingerprint(one) != model_fingerprint(two)
    two.weight.data = two.weight.data.flip(0)
    assert model_fingerprint(one) == model_fingerprint(two)
