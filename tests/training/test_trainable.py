"""What is trained is what was asked for, nothing else; adapters of every kind; conversations."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import export_model
from overture.config.load import load_config
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.data.prompts import chat_templates
from overture.errors import ConfigError
from overture.models.trainable import numbers
from overture.tokenizer import load_tokenizer
from overture.trained import load_trained
from overture.training.run import train
from runs import result


@pytest.fixture
def changed(run, capsys):
    """Train with overrides from a base; returns the names of the tensors that are other ones."""
    _, base = run("run_name=base", "max_duration=1ba")

    def go(*overrides: str) -> set[str]:
        capsys.readouterr()
        more = ("model.pretrained=true", f"model.name={base}", "run_name=tuned")
        code, folder = run(*more, "optimizer.weight_decay=0.1", *overrides)
        assert code == 0
        one, other = (load_file(f / "hf" / "model.safetensors") for f in (base, folder))
        assert one.keys() == other.keys()
        return {name for name in one if (one[name] != other[name]).any()}

    return go


def test_patterns_train_what_they_name(changed, capsys):
    found = changed("trainable=['*.mlp.*', model.norm.weight]")
    said = capsys.readouterr().out
    expected = {f"model.layers.{n}.mlp.{part}_proj.weight" for n in range(2)
                for part in ("up", "gate", "down")} | {"model.norm.weight"}  # fmt: skip
    assert found == expected
    rows = dict(line.rsplit(maxsplit=1) for line in said.splitlines() if "model.layers" in line)
    assert {name.strip() for name in rows} == {
        f"model.layers.*.mlp.{part}_proj" for part in ("up", "gate", "down")
    }
    assert set(rows.values()) == {f"{2 * 32 * 64:,}"}
    assert f"{6 * 32 * 64 + 32:,}" in said


@pytest.mark.parametrize("tied", [True, False])
def test_the_last_layer_is_the_last_block_and_what_follows_it(run, capsys, tied):
    _, base = run("run_name=base", "max_duration=1ba", f"model.config.tie_word_embeddings={tied}")
    more = ("model.pretrained=true", f"model.name={base}", "run_name=tuned")
    _, folder = run(*more, "trainable=last_layer", f"model.config.tie_word_embeddings={tied}")
    one, other = (load_file(f / "hf" / "model.safetensors") for f in (base, folder))
    found = {name for name in one if (one[name] != other[name]).any()}
    block = {name for name in one if name.startswith("model.layers.1.")}
    assert found == block | {"model.norm.weight"} | (set() if tied else {"lm_head.weight"})


def test_what_names_nothing_is_refused(run):
    with pytest.raises(ConfigError, match=r"'\*\.mpl\.\*' is the name of no parameter"):
        run("trainable=['*.mlp.*', '*.mpl.*']")
    with pytest.raises(ConfigError, match="trainable: names nothing to train"):
        run("trainable=[]")
    with pytest.raises(ConfigError, match=r"load_in_4bit: such weights cannot be trained"):
        run("model.load_in_4bit=true")
    with pytest.raises(ConfigError, match=r"model\.adapter: is set, but trainable is 'all'"):
        run("model.adapter=runs/x")
    _, base = run("run_name=base", "max_duration=1ba")
    more = ("model.pretrained=true", f"model.name={base}", "trainable=lora")
    with pytest.raises(ConfigError, match=r"load_in_8bit: needs a CUDA device; on a CPU"):
        run(*more, "model.load_in_8bit=true")


@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_other_adapters_learn_merge_and_go_on(kind, run, monkeypatch, capsys):
    _, base = run("run_name=base", "max_duration=2ba")
    rate = {"dora": "2e-2", "rslora": "4e-3"}[kind]  # the latter scales by 16, not by 8
    rates = ("trainable=lora", f"optimizer.lr={rate}")
    lora = ("model.pretrained=true", f"model.name={base}", *rates)
    _, one = run(*lora, "run_name=one", "lora.r=4", f"lora.{kind}=true", "max_duration=24ba")
    config = json.loads((one / "hf" / "adapter_config.json").read_text())
    assert config[f"use_{kind}"] is True
    outcome = result(one)
    assert outcome["eval_cross_entropy"] < outcome["eval_cross_entropy_before"] - 0.05
    out = one / "out"
    monkeypatch.setattr(sys, "argv", ["x", str(one), "--out", str(out), "--merge"])
    export_model.main()
    assert "a fresh process gives the same" in capsys.readouterr().out
    load_trained(str(max(one.glob("checkpoints/ba*"))))  # whose magnitudes have another name
    shutil.copytree(one / "hf", one / "biased")
    with_biases = json.dumps(config | {"bias": "lora_only"})
    (one / "biased" / "adapter_config.json").write_text(with_biases)
    with pytest.raises(ConfigError, match="biased: trains biases, which is not done here"):
        run(*lora, "run_name=none", f"model.adapter={one}/biased")
    _, two = run(*lora, "run_name=two", f"model.adapter={one}", "max_duration=4ba")
    assert result(two)["eval_cross_entropy_before"] == pytest.approx(outcome["eval_cross_entropy"])
    assert json.loads((two / "hf" / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ConfigError, match=rf"lora\.{kind}: False, but the adapters of .* True"):
        run(*lora, "run_name=three", f"model.adapter={one}", "lora.r=4")


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_conversations_are_trained_and_their_last_answers_asked(
    template, smoke, tmp_path, monkeypatch
):
    base = load_tokenizer(str(smoke / "tokenizer"))
    if template == "chatml":  # the tokenizer's own, which ends with no EOS
        marks = ["<|im_start|>", "<|im_end|>"]
        base.add_special_tokens({"additional_special_tokens": marks})
        base.chat_template = chat_templates()[template]
    base.save_pretrained(tmp_path / "tokenizer")
    rows = []
    for number in range(60):
        colour = ("red", "green", "blue")[number % 3]
        turns = [("user", f"Box {number} is {colour}."), ("assistant", "I see."),
                 ("user", "Which colour?"), ("assistant", f"It is {colour}.")]  # fmt: skip
        rows.append({"messages": [{"role": r, "content": text} for r, text in turns]})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"tokenizer": str(tmp_path / "tokenizer"), "max_seq_len": 128}
    origins = {"train": Origin(str(tmp_path / "chat.jsonl"))}
    more = {"test_fraction": 0.2, "prompt_template": None if template == "chatml" else template}
    job = Conversion(origins, "chat", str(tmp_path / "data"), **options, **more)
    convert(job, lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.yaml").write_text(f"""
task: chat
max_seq_len: 128
tokenizer_name: {tmp_path}/tokenizer
data_local: data
model: {{name: llama, pretrained: false, config: {{hidden_size: 64, intermediate_size: 128,
  num_hidden_layers: 2, num_attention_heads: 4}}}}
train_loader: {{dataset: {{split: train, shuffle: true}}, drop_last: true}}
eval_loader: {{dataset: {{split: test}}}}
optimizer: {{lr: 1.0e-2}}
max_duration: 120ba
eval_interval: 120ba
global_train_batch_size: 4
device_train_microbatch_size: 4
generation: {{num_prompts: 8, max_new_tokens: 12, batch_size: 8}}
progress_bar: false
""")
    config = load_config(["chat.yaml"], ("chat",))
    assert train(config, command="python finetune.py chat.yaml") == 0
    given = load_tokenizer("runs/chat")  # asked, here or elsewhere, as it was trained
    assert given.chat_template == chat_templates()[template]
    saved = json.loads((tmp_path / "runs" / "chat" / "hf" / "generation_config.json").read_text())
    ends = [given.eos_token] if template == "plain" else ["<|im_end|>", given.eos_token]
    assert sorted(saved["eos_token_id"]) == sorted(given.convert_tokens_to_ids(ends))
    lines = (tmp_path / "runs" / "chat" / "generations.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    answers = {row["messages"][0]["content"]: row["messages"][3]["content"] for row in rows}
    assert len(told) == 8
    for row in told:
        asked = row["prompt"]
        said, mine = ("User: ", "Assistant: ") if template == "plain" else ("user\n", "assistant\n")
        assert asked.endswith(f"{mine}I see.\n{said}Which colour?\n{mine}")
        first = asked.split(said)[1].split("\n")[0]
        assert row["expected"].strip() == answers[first]
        assert f"\n{said.strip()}" not in row["after"]  # it ends where its turn does
    scores = result(tmp_path / "runs" / "chat")["metrics"]
    assert scores["character_f1_after"] > scores["character_f1_before"] + 0.3


def test_a_parameter_of_4_bits_stands_for_two_numbers_a_byte():
    class Params4bit(torch.nn.Parameter):  # as bitsandbytes names it
        bnb_quantized = True

    packed = Params4bit(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert numbers(packed) == 24
    assert numbers(torch.nn.Parameter(torch.zeros(12))) == 12
