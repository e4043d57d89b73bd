"""Every shipped YAML is checked; those that can run here are run."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import convert_dataset
from handmade import talk
from overture.config.load import load_config, load_glue
from overture.config.schema import DOORS, ModelConfig
from overture.models.build import load_network
from overture.tokenizer import load_tokenizer
from overture.training.glue import plan
from overture.training.glue_tasks import TASKS
from overture.training.run import train
from runs import result

ROOT = Path(__file__).parents[1]
EVERY = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("yamls/**/*.yaml"))
GLUE = [path for path in EVERY if "/glue/" in path]
YAMLS = [path for path in EVERY if path not in GLUE]
# eval cross-entropy of a smoke run
MOST = {
    "causal_lm": 5.5, "masked_lm": 6.5, "instruct": 6.8, "seq2seq": 6.0, "classify": 1.9,
}  # fmt: skip


def load(path: str, *overrides: str):
    return load_config([str(ROOT / path), *overrides], tuple(DOORS))


def test_there_are_some():
    assert len(YAMLS) >= 10


def header(path: str) -> str:
    lines = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    assert lines[0].startswith("# Purpose: ")
    text = "\n".join(lines)
    for word in ("Hardware: ", "Launch: ", "Expected: "):
        assert f"# {word}" in text, word
    return text


@pytest.mark.parametrize("path", GLUE)
def test_glue_loads_and_every_job_of_it_fits(path):
    config = load_glue([str(ROOT / path)])
    assert f"Launch: python src/evaluate_glue.py {path}" in header(path)
    counts = [1 if TASKS[task].one_seed else len(config.seeds) for task in config.tasks]
    assert len(plan(config)) == sum(counts) + ("mnli" in config.tasks)


@pytest.mark.parametrize("path", YAMLS)
def test_loads_and_says_what_it_is(path):
    config, text = load(path), header(path)
    launched = rf"composer (-\S+ \S+ )*{re.escape(f'{DOORS[config.task]} {path}')}"
    assert re.search(launched, text) or "make dolly" in text
    begins = config.run_name.startswith(Path(path).stem)
    assert begins or config.run_name.removeprefix("tiny-") in path or "quickstart" in path
    # The smoke run of any YAML.
    assert load(path, "max_duration=16ba").max_duration == "16ba"


@pytest.mark.parametrize("path", [p for p in YAMLS if "/smoke/" in p])
def test_smoke_runs_do_what_their_headers_say(path, run_door, smoke, tmp_path):
    config = load(path)
    done = run_door(DOORS[config.task], path, f"run_folder={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["steps"] == 16
    assert result["eval_cross_entropy"] < MOST[config.task]
    assert (tmp_path / "run" / "report.html").is_file()
    assert "Warning" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
# name -> parameters with GPT-2's vocabulary, by the formulas of the architectures, and a tiny shape
SHAPES = {
    "gpt-125m": (
        50_257 * 768 + 2048 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768,
        {"n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "llama-1b": (
        50_257 * 2048 + 16 * (2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 2 * 2048) + 2048,
        LLAMA,
    ),
    "llama-7b": (
        2 * 50_257 * 4096 + 32 * (4096 * (4 * 4096 + 3 * 11_008) + 2 * 4096) + 4096,
        LLAMA,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_pretraining_shapes_are_as_large_as_their_headers_say(name, smoke):
    path = f"yamls/pretrain/{name}.yaml"
    model, expected = load(path).model, SHAPES[name][0]
    model.config["vocab_size"] = 50_257
    with torch.device("meta"):
        network = load_network(model, load_tokenizer(str(smoke / "tokenizer")), 2048)
    assert sum(p.numel() for p in network.parameters()) == expected
    # Weights, gradients and two states of Adam, in float32.
    header, held = (ROOT / path).read_text(), 16 * expected / 2**30
    said = f"{held:.0f} GiB on each"
    if load(path).fsdp_config:
        said = f"{held:.0f} GiB in all, {held / 8:.1f} on each of eight; what is gathered"
    assert said in " ".join(header.replace("#", "").split())


# The shapes of the hub's config.json, and bytes for a parameter: of full training, and of a base.
LLAMA_3 = {"vocab_size": 128_256, "num_key_value_heads": 8}
SHARDED = {
    "dolly-llama-3.1-8b": (
        16, 8, {**LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336,
                "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "dolly-llama-3.1-70b": (
        4, 16, {**LLAMA_3, "hidden_size": 8192, "intermediate_size": 28_672,
                "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_as_large_as_their_headers_say(name, smoke):
    each, ranks, shape = SHARDED[name]
    wanted = ModelConfig("llama", pretrained=False, config=dict(shape))
    with torch.device("meta"):
        network = load_network(wanted, load_tokenizer(str(smoke / "tokenizer")))
    count = sum(p.numel() for p in network.parameters())
    layer = sum(p.numel() for p in network.model.layers[0].parameters())
    apart = count - len(network.model.layers) * layer
    held, gathered = each * count / 2**30, 2 * (2 * layer + apart) / 2**30  # in bfloat16
    header = (ROOT / f"yamls/finetune/{name}.yaml").read_text().replace("\n#", "")
    assert f"{held:.0f} GiB in all" in header
    words = {8: "eight", 16: "sixteen"}[ranks]
    assert f"{held / ranks:.1f} on each of {words}" in header
    assert f"takes {gathered:.1f} besides" in header


FEW = (
    "max_duration=3ba", "eval_interval=3ba", "global_train_batch_size=8", "max_seq_len=128",
    "device_train_microbatch_size=4", "device_eval_batch_size=8", "train_loader.num_workers=0",
    "eval_loader.num_workers=0",
)  # fmt: skip


BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4}  # fmt: skip
PRETRAINED = {name: shape for name, (_, shape) in SHAPES.items()}
PRETRAINED |= {"mosaic-bert-base-uncased": BERT, "hf-bert-base-uncased": BERT}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining_recipes_run_in_small(name, smoke, tmp_path, monkeypatch):
    config = load(
        f"yamls/pretrain/{name}.yaml", f"tokenizer_name={smoke / 'tokenizer'}",
        f"data_local={smoke / 'text'}", "eval_loader.dataset.split=test",
        "scheduler.t_warmup=0.4dur", *FEW,
        *(f"model.config.{key}={value}" for key, value in PRETRAINED[name].items()),
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert train(config, command="python main.py") == 0
    outcome = result(tmp_path / "runs" / name)
    assert outcome["steps"] == 3
    assert outcome["eval_cross_entropy"] == pytest.approx(math.log(1024), abs=0.4)


BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
# recipe -> a model of its base's family, its head, and the part of the smoke data that it can take
FINETUNED = {
    "bart-alt-enja": ("bart", BART, "Seq2SeqLM", "seq2seq"),
    "dolly": ("llama", LLAMA, "CausalLM", "instruct"),
    "dolly-gpt-125m": ("gpt2", SHAPES["gpt-125m"][1], "CausalLM", "instruct"),
    "dolly-gpt-neo-1.3b": ("gpt_neo", NEO, "CausalLM", "neo"),
    "dolly-llama-3.1-8b": ("llama", LLAMA, "CausalLM", "instruct"),
    "dolly-llama-3.1-70b": ("llama", LLAMA, "CausalLM", "instruct"),
    "dolly-llama-3.2-1b": ("llama", LLAMA, "CausalLM", "instruct"),
    "enja": ("mbart", {}, "Seq2SeqLM", "seq2seq"),  # made by the recipe itself
    "jsquad": ("llama", BERT, "CausalLM", "instruct"),
    "oasst1": ("llama", LLAMA, "CausalLM", "chat"),
}


def test_every_recipe_of_finetuning_is_run_here_or_by_a_command():
    there = {path.stem for path in (ROOT / "yamls" / "finetune").glob("*.yaml")}
    assert there == {*FINETUNED, "classify", "quickstart"}  # make quickstart


def convert(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["convert_dataset.py", *map(str, arguments)])
    assert not convert_dataset.main()


def tiny(folder: Path, smoke: Path, kind: str, shape: dict, head: str) -> Path:
    """A model as a hub has them: a folder with weights and tokenizer."""
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    wanted = ModelConfig(kind, pretrained=False, config=dict(shape))
    load_network(wanted, tokenizer, 0, head).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FINETUNED)
def test_finetuning_recipes_run_in_small(name, smoke, tmp_path, monkeypatch):
    kind, shape, head, data = FINETUNED[name]
    place = smoke / data
    monkeypatch.chdir(tmp_path)
    if data == "chat":
        lines = [talk(f"say {n}", f"it is {n}") for n in range(60)]
        Path("talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = ("--dataset", "talks.jsonl", "--task", "chat", "--prompt_template", "plain")
    if data == "neo":  # cannot keep packed documents apart
        source = (
            "--dataset",
            "embedded",
            "--max_rows",
            200,
            "--task",
            "instruct",
            "--packing",
            "none",
        )
    if not place.is_dir():
        place = tmp_path / "data"
        convert(monkeypatch, *source, "--test_fraction", 0.2, "--tokenizer", smoke / "tokenizer",
                "--max_seq_len", 128, "--out_root", place)  # fmt: skip
    given = [
        f"tokenizer_name={smoke / 'tokenizer'}",
        "model.config={d_model: 32, max_position_embeddings: 128}",
    ]
    if name != "enja":
        given = [f"model.name={tiny(tmp_path / 'base', smoke, kind, shape, head)}"]
    config = load(
        f"yamls/finetune/{name}.yaml", *given, f"data_local={place}",
        "eval_loader.dataset.split=test", "scheduler.t_warmup=1ba", *FEW,
        *(["generation={num_prompts: 2, max_new_tokens: 4}"] if "3.1" not in name else []),
    )  # fmt: skip
    assert train(config, command="python finetune.py") == 0
    outcome = result(tmp_path / "runs" / config.run_name)
    assert outcome["steps"] == 3
    assert outcome["eval_cross_entropy"] == pytest.approx(math.log(1024), abs=0.6)


def test_ones_own_csv_is_three_lines(smoke, tmp_path, monkeypatch):
    """As the header of classify.yaml says, with nothing changed but what it marks."""
    monkeypatch.chdir(tmp_path)
    rows = [f"the food was {'good' if n % 2 else 'bad'} {n},{n % 2}" for n in range(200)]
    Path("my.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    base = tiny(tmp_path / "base", smoke, "bert", BERT, "MaskedLM")
    text = (ROOT / "yamls/finetune/classify.yaml").read_text()
    command = re.search(r"#   (python src/convert_dataset.py (?:.*\\\n)*.*)\n", text)[1]
    words = shlex.split(command.replace("\\\n#", ""))[2:]
    places = {"google-bert/bert-base-uncased": str(base), "data/my-classes": "data/reviews",
              "128": "64"}  # fmt: skip
    convert(monkeypatch, *(places.get(word, word) for word in words))
    marked = [line for line in text.splitlines() if "# <-" in line]
    assert len(marked) == 3
    for line in marked:
        changed = line
        for old, new in places.items():
            changed = changed.replace(old, new)
        assert changed != line
        text = text.replace(line, changed)
    Path("mine.yaml").write_text(text)
    config = load_config(["mine.yaml", "max_duration=2ba", "optimizer.lr=1e-2"], ("classify",))
    assert train(config, command="python finetune.py mine.yaml") == 0
    assert {"accuracy", "f1", "matthews"} <= result(Path("runs/mine"))["metrics"].keys()
