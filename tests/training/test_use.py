"""What a run leaves is used: asked, exported, loaded by plain transformers, asked again."""

import io
import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

import export_model
import generate_text
from overture.errors import ConfigError, DataError
from overture.export import _ask, _compare, _compare_tokens, _logits
from overture.generate import AS_IT_IS, answer, encode_prompts, join_ranks
from overture.models.lora import merge_where_exact
from overture.trained import load_trained
from runs import result

QUESTION = "### Instruction:\nWhere is the red box?\n\n### Response:\n"


@pytest.fixture(autouse=True)
def within(runs, monkeypatch):
    """Stand in the folder of the runs."""
    monkeypatch.chdir(runs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(trained, prompts):
    ids = encode_prompts([("", {"text": p}) for p in prompts], AS_IT_IS, trained.tokenizer, 80)
    return answer(trained.model, trained.tokenizer, ids, 50, max_new_tokens=8)[0]


@pytest.mark.parametrize("name", ["lora", "half"])
def test_a_run_answers_as_it_did_at_its_end(runs, door, name):
    told = lines(runs / "runs" / name / "generations.jsonl")
    assert any(row["before"] != row["after"] for row in told)
    prompts = [row["prompt"] for row in told]
    assert said(load_trained(f"runs/{name}"), prompts) == [row["after"] for row in told]
    # Adapters by themselves, over a base that is named.
    given = load_trained("runs/base/hf", f"runs/{name}")
    assert said(given, prompts) == [row["after"] for row in told]


def test_rows_of_a_dataset_are_answered_into_a_file_as_one_by_one(runs, door):
    out = runs / "answers.jsonl"
    options = ("--max_new_tokens", 8)
    shown = door(
        generate_text, "runs/lora", "--data", "rows.jsonl", "--sample", 5, "--seed", 3,
        "--out", out, "--batch_size", 2, *options,
    )  # fmt: skip
    assert "5 answers in" in shown
    assert "tokens/s" in shown
    rows = {row["response"] + row["instruction"]: row for row in lines(runs / "rows.jsonl")}
    for row in lines(out):
        # The template is the one that the run was trained with.
        text = row["prompt"].removeprefix("### Instruction:\n").removesuffix("\n\n### Response:\n")
        assert row["expected"] + text.split("\n\n### Context:\n")[0] in rows
        alone = door(generate_text, "runs/lora", "--prompt", row["prompt"], *options)
        assert alone.rpartition("1 answers")[0].rstrip("\n") == row["answer"].rstrip("\n")
    with pytest.raises(ConfigError, match="is there already; give --overwrite"):
        door(generate_text, "runs/lora", "--data", "rows.jsonl", "--out", out)


@pytest.mark.slow
def test_two_ranks_answer_as_one_does(runs, door, tmp_path):
    options = ("runs/lora", "--data", "rows.jsonl", "--max_new_tokens", "6", "--sample", "7")
    door(generate_text, *options, "--out", tmp_path / "one.jsonl", "--device_map", "auto")
    launcher = [sys.executable, "-m", "composer.cli.launcher", "-n", "2"]
    command = [*launcher, generate_text.__file__, *options, "--out", tmp_path / "two.jsonl"]
    done = subprocess.run(command, cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 answers in" in done.stdout
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")
    with pytest.raises(ConfigError, match="2 ranks share the rows of --data"):
        join_ranks(2, has_data=False, device_map=None)


def test_a_prompt_that_training_had_otherwise_is_told(runs, door, capsys, monkeypatch):
    ask = ("runs/lora", "--prompt", "Where is the red box?", "--max_new_tokens", "2")
    monkeypatch.setattr(sys, "argv", ["generate_text", *ask])
    generate_text.main()
    assert "as in training: --prompt_template dolly" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate_text", *ask, "--prompt_template", "dolly"])
    generate_text.main()
    assert "--prompt_template" not in capsys.readouterr().err


def test_a_checkpoint_by_its_file_is_of_its_run(runs):
    state = max((runs / "runs" / "lora" / "checkpoints").iterdir()) / "state.pt"
    assert load_trained(str(state)).run == runs / "runs" / "lora"


def test_a_yaml_of_options_may_hold_a_template(runs, door, tmp_path):
    made = {"sections": ["Q: {instruction}\n", "A: "], "response": "response"}
    options = {"model": "runs/base", "data": "rows.jsonl", "sample": 2, "max_new_tokens": 4}
    path = tmp_path / "ask.yaml"
    path.write_text(yaml.safe_dump({**options, "prompt": made, "stop": ["- ", "x"], "chat": False}))
    door(generate_text, "--config", path, "--sample", 3, "--out", tmp_path / "out.jsonl")
    rows = lines(tmp_path / "out.jsonl")
    assert len(rows) == 3
    assert all(r["prompt"].startswith("Q: ") and r["prompt"].endswith("\nA: ") for r in rows)
    assert not any("x" in row["answer"] for row in rows)
    path.write_text(yaml.safe_dump({**options, "temprature": 0.5}))
    with pytest.raises(ConfigError, match=r'no such option \(did you mean "temperature"\?\)'):
        door(generate_text, "--config", path)


def test_drawn_answers_depend_on_the_seed_alone(door):
    ask = ("runs/base", "--prompt", "the", "--temperature", 1.5, "--top_k", 50, "--seed")
    first = [door(generate_text, *ask, seed).rpartition("1 answers")[0] for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_a_conversation_goes_on_until_the_input_ends(door, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nwhere is it?\n"))
    ask = ("runs/base", "--chat", "--prompt_template", "plain", "--max_new_tokens", 4)
    assert door(generate_text, *ask).count("> ") == 3
    with pytest.raises(ConfigError, match="has no chat template"):
        door(generate_text, "runs/base", "--chat")


PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
ids = model.generate(ids.input_ids, max_new_tokens=8, do_sample=False)[0, ids.input_ids.shape[1]:]
print(tokenizer.decode(ids, skip_special_tokens=True))
assert "overture" not in sys.modules
"""


def test_merged_adapters_are_a_model_of_plain_transformers(runs, door):
    shown = door(
        export_model, "runs/lora", "--out", "merged", "--merge", "--license", "cc-by-sa-3.0",
        "--test_prompt", QUESTION,
    )  # fmt: skip
    assert "merged, against base and adapters: logits" in shown
    assert "a fresh process gives the same" in shown
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained("runs/base/hf")
        base = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, "runs/lora/hf")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
    assert (merged - adapted).abs().max() < 1e-4 < 1e-2 < (merged - base).abs().max()
    (text,) = said(load_trained("runs/lora"), [QUESTION])
    done = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN, "merged", QUESTION], capture_output=True, text=True
    )
    assert done.stdout.strip() == text.strip(), done.stderr
    assert QUESTION in shown
    assert said(load_trained("merged"), [QUESTION]) == [text]
    files = {path.name for path in (runs / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} < files
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".bin", ".pt", "trained_on.json"))]
    assert not list(runs.glob(".merged*"))
    card = (runs / "merged" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-sa-3.0"
    assert head["library_name"] == "transformers"
    loss = result(runs / "runs" / "lora")["eval_cross_entropy"]
    for part in ("| test | embedded |", f"{loss:.4f}", "run_name: lora", "transformers: 4."):
        assert part in card, part


def test_a_half_precision_base_is_merged_in_float32_and_rounded_once(runs, door):
    shown = door(export_model, "runs/half", "--out", "merged-half", "--merge")
    assert "in bfloat16, against float32: logits" in shown
    merged, base = (load_file(f"{f}/model.safetensors") for f in ("merged-half", "runs/base/hf"))
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    adapters = load_file("runs/half/hf/adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    down, up = (adapters[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    scale = yaml.safe_load((runs / "runs/half/config.yaml").read_text())["lora"]["alpha"] / 4
    weight = base[f"{name}.weight"].bfloat16().float() + scale * up @ down
    assert torch.equal(merged[f"{name}.weight"], weight.bfloat16())


def test_adapters_and_whole_models_are_exported_as_they_are(runs, door):
    door(export_model, "runs/lora", "--out", "adapters")
    ours, theirs = (
        load_file(f"{f}/adapter_model.safetensors") for f in ("runs/lora/hf", "adapters")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "library_name: peft" in (runs / "adapters" / "README.md").read_text()
    assert said(load_trained("adapters"), [QUESTION]) == said(load_trained("runs/lora"), [QUESTION])
    door(export_model, "runs/last", "--out", "last")
    assert said(load_trained("last"), [QUESTION]) == said(load_trained("runs/last"), [QUESTION])
    last, base = (load_file(f"{f}/model.safetensors") for f in ("last", "runs/base/hf"))
    moved = {name for name in base if not torch.equal(last[name], base[name])}
    assert moved and all(
        ".layers.1." in name or name in ("model.norm.weight", "lm_head.weight") for name in moved
    )
    door(export_model, "runs/base", "--out", "small", "--dtype", "bfloat16")
    small, base = (load_file(f"{f}/model.safetensors") for f in ("small", "runs/base/hf"))
    assert all(torch.equal(small[name], base[name].bfloat16()) for name in base)


def test_checkpoints_are_models_too(runs, door, tmp_path):
    for name in ("base", "lora"):
        newest = load_trained(f"runs/{name}/checkpoints/ba8")
        there, here = newest.model.state_dict(), load_trained(f"runs/{name}").model.state_dict()
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in here)
        assert newest.run.name == name
    # Of another maker, and so without our manifest.
    theirs = tmp_path / "ep1-rank0.pt"
    shutil.copy(runs / "runs/base/checkpoints/ba8/state.pt", theirs)
    with pytest.raises(ConfigError, match=r"can run any code .* give --load_unverified"):
        load_trained(str(theirs))
    base = load_trained("runs/base").model.state_dict()
    there = load_trained(str(theirs), unverified=True).model.state_dict()
    assert all(torch.equal(there[key], base[key]) for key in base)
    state = torch.load(theirs, weights_only=False)
    del state["state"]["model"]["model.model.norm.weight"]
    torch.save(state, theirs)
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of its model \(model\.norm\.weight"):
        load_trained(str(theirs), unverified=True)
    torch.save({"state": {"model": {}}}, theirs)
    with pytest.raises(ConfigError, match="holds no model of transformers"):
        load_trained(str(theirs), unverified=True)


def test_adapters_for_another_base_are_refused(runs, door, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "runs/base/hf", other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="was trained in another model than this one"):
        load_trained(str(other), "runs/lora")
    # Of others, without a record: by the shapes of their tensors.
    foreign = tmp_path / "foreign"
    shutil.copytree(runs / "runs/lora/hf", foreign)
    (foreign / "trained_on.json").unlink()
    assert said(load_trained(str(foreign)), ["the"]) == said(load_trained("runs/lora"), ["the"])
    narrow = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path / "narrow")
    shutil.copy(runs / "runs/base/hf/tokenizer.json", tmp_path / "narrow")
    shutil.copy(runs / "runs/base/hf/tokenizer_config.json", tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"adapters that do not fit .*size mismatch"):
        load_trained(str(tmp_path / "narrow"), str(foreign))
    data = (foreign / "adapter_model.safetensors").read_bytes()
    (foreign / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="adapters that do not fit this model"):
        load_trained(str(foreign))


def test_weights_of_other_names_are_not_drawn_at_random(runs, door, tmp_path):
    """As of a model that was saved while it was compiled."""
    other = tmp_path / "other"
    shutil.copytree(runs / "runs/base/hf", other)
    weights = load_file(other / "model.safetensors")
    weights = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors of its model .* drawn at random"):
        load_trained(str(other))


def test_a_model_that_transformers_would_not_save_is_saved(runs, door, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs / "runs/base/hf", other)
    settings = json.loads((other / "generation_config.json").read_text())
    settings |= {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (other / "generation_config.json").write_text(json.dumps(settings))
    door(export_model, other, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()


def test_another_model_than_the_one_that_was_trained_is_not_exported(door, capsys):
    model, ids = load_trained("runs/base").model, [5, 6, 7, 8, 9]
    with torch.no_grad():
        asked = [_ask(model, ids)]
        _compare([_logits(model, ids, asked[0].ids)], asked, "float32", "the same")
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
        with pytest.raises(DataError, match="the other: logits differ by"):
            _compare([_logits(model, ids, asked[0].ids)], asked, "float32", "the other")
    _, whole, _, logits = asked[0]
    first, second = logits[4].topk(2).indices.tolist()
    assert first == whole[5]
    _compare_tokens(asked, [(whole[5:], "")], 1e-3)
    with pytest.raises(DataError, match=rf"{second} is token 5 there, {first} here"):
        _compare_tokens(asked, [([second, *whole[6:]], "")], 1e-3)
    logits[4, second] = logits[4, first] - 1e-6
    _compare_tokens(asked, [([second], "")], 1e-3)  # a tie
    for other in (whole[5:-1], [*whole[5:], 7]):
        with pytest.raises(DataError, match=f"they make {len(other)} tokens, not {len(whole) - 5}"):
            _compare_tokens(asked, [(other, "")], 1e-3)
    _compare_tokens(asked, [([*whole[5:], 7], "")], 1e-3, may_go_on=True)
    assert "1 of them go on there" in capsys.readouterr().out


def test_adapters_are_merged_in_memory_where_that_is_exact(door):
    ask = ("--prompt", QUESTION, "--max_new_tokens", 8)
    shown = door(generate_text, "runs/lora", *ask)
    assert "adapters merged in memory" in shown
    assert said(load_trained("runs/lora"), [QUESTION])[0] in shown
    assert "merged" not in door(generate_text, "runs/half", *ask)
    model = load_trained("runs/lora").model
    last = [p for name, p in model.named_parameters() if "lora_B" in name][-1]
    last.data[0, 0] = float("nan")  # which peft refuses to merge, when others are merged already
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" not in name}
    assert merge_where_exact(model, 2048) is None
    assert all(
        torch.equal(p, before.get(n, p)) for n, p in model.named_parameters() if "lora" not in n
    )
    assert not any(getattr(module, "merged", False) for module in model.modules())


ASK, EXPORT = (generate_text, "runs/base --prompt a"), (export_model, "runs/base --out x")
FAULTS = [
    (generate_text, "runs/nothing --prompt a", "runs/nothing: no such folder"),
    (generate_text, "runs/nowhere --prompt a", "drawn at random, and are kept nowhere"),
    (generate_text, "runs/base", "give one of --prompt, --data and --chat"),
    (generate_text, "--prompt a", "MODEL is missing"),
    (generate_text, "runs/base --prompt ''", "a prompt of 0 tokens"),
    (generate_text, "runs/lora --adapter runs/lora --prompt a", "holds adapters only"),
    (generate_text, "bert --prompt a", "a BertForMaskedLM neither writes nor"),
    (*ASK, "--adapter runs/base", "runs/base: holds no adapters"),
    (*ASK, f"--prompt '{'a ' * 9000}'", r"--prompt: a prompt of \d+,\d+ tokens"),
    (*ASK, "--max_new_tokens 9999", "the model has 2,048 positions"),
    (*ASK, "--top_p 1.5", "--top_p 1.5: is out of range"),
    (*ASK, "--prompt_template jsquad", "the template reads title, question"),
    (*ASK, "--out no/x", "there is no folder no"),
    (*ASK, "--out runs --overwrite", "runs is there already"),
    (*ASK, "--sample 3", "--sample is of --data"),
    (*ASK, "--stop ''", "--stop '': an empty text"),
    (*ASK, "--chat", "give one of --prompt, --data and --chat"),
    (generate_text, "runs/base --chat --num_beams 2", "--chat answers word by word"),
    (*EXPORT, "--merge", "--merge: runs/base has no adapters"),
    (*EXPORT, "--private", "--private says how"),
    (*EXPORT, "--push_to_hub a/b/c", "--push_to_hub a/b/c"),
    (*EXPORT, "--out runs", "is there already; give --overwrite"),
    (*EXPORT, "--out runs --overwrite", "is no earlier export"),
    (export_model, "runs/lora --out x --dtype float32", "--dtype is of whole models"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[-1] for fault in FAULTS])
def test_what_does_not_fit_is_one_sentence(runs, door, fault):
    module, *arguments, message = fault
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained("bert")
    with pytest.raises(ConfigError, match=message) as caught:
        door(module, *shlex.split(" ".join(arguments)))
    assert "\n" not in str(caught.value)
    assert not (runs / "x").exists()


REWRITES = """{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content[:1] }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_conversations_of_a_dataset_are_answered(runs, door, monkeypatch, tmp_path):
    turns = [["Hello", "Hi!", "Where?", "Here."], ["Who?", "Me."], ["A <|endoftext|> mark", "b"]]
    with (tmp_path / "chat.jsonl").open("w") as file:
        for texts in turns:
            roles = ["user", "assistant"] * (len(texts) // 2)
            pairs = zip(roles, texts, strict=True)
            file.write(
                json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}) + "\n"
            )
    out = tmp_path / "out.jsonl"
    ask = ("runs/base", "--chat", "--prompt_template", "plain", "--max_new_tokens", 4)
    door(generate_text, *ask, "--data", tmp_path / "chat.jsonl", "--out", out)
    rows = lines(out)
    assert [row["expected"] for row in rows] == ["Here.", "Me."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    assert door(generate_text, *ask).split("> ")[1].strip() == rows[1]["answer"].strip()
    assert "Hi!" in rows[0]["prompt"] and rows[0]["prompt"].index("Where?") > 0
    # A template that has earlier turns otherwise, as those do that leave thoughts out.
    (tmp_path / "rewrites.jinja").write_text(REWRITES)
    ask = ("runs/base", "--chat", "--prompt_template", tmp_path / "rewrites.jinja")
    door(generate_text, *ask, "--data", tmp_path / "chat.jsonl", "--out", out, "--overwrite")
    prompt = "".join(lines(out)[0]["prompt"].split())
    assert prompt == "<user>H<assistant>H<user>Where?<assistant>"


def test_a_folder_that_cannot_be_written_is_said(runs, door):
    (runs / "file").write_text("")
    with pytest.raises(ConfigError, match="file/out: cannot be written"):
        door(export_model, "runs/base", "--out", "file/out")
