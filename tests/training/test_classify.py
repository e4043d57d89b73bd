"""Classification and regression through the recipe: what is learned, counted, saved and refused."""

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import export_model
import generate_text
from glue_files import write_glue
from overture.config.load import load_config
from overture.config.schema import ModelConfig
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.errors import ConfigError
from overture.models.build import load_network
from overture.tokenizer import load_tokenizer
from overture.trained import load_trained
from overture.training import run as recipe
from runs import assert_same, curve, records, result

YAML = """
task: classify
max_seq_len: 32
tokenizer_name: {smoke}/tokenizer
data_local: {data}
model: {model}
train_loader: {{dataset: {{split: train, shuffle: true}}, drop_last: true}}
eval_loader: {{dataset: {{split: dev}}}}
optimizer: {{lr: 4.0e-3}}
max_duration: 24ba
eval_interval: 12ba
global_train_batch_size: 32
device_train_microbatch_size: 16
device_eval_batch_size: 32
progress_bar: false
"""
BERT = """{name: bert, pretrained: false, config: {hidden_size: 32, intermediate_size: 64,
  num_hidden_layers: 1, num_attention_heads: 2, max_position_embeddings: 32}}"""
MOSAIC = BERT.replace("bert", "mosaic_bert").replace(", max_position_embeddings: 32", "")
LLAMA = """{name: llama, pretrained: false, config: {hidden_size: 32, intermediate_size: 64,
  num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1}}"""


@pytest.fixture(scope="module")
def data(smoke, tmp_path_factory) -> Path:
    """Two classes (sst2, mostly of class 1), three (mnli) and numbers (stsb), in a folder each."""
    root = tmp_path_factory.mktemp("glue")
    files = write_glue(root / "tsv")
    lines = (files / "SST-2" / "train.tsv").read_text().splitlines()
    bad = [line for line in lines[1:] if line.endswith("0")]
    kept = [line for line in lines if line not in bad[::3]]
    (files / "SST-2" / "train.tsv").write_text("\n".join(kept) + "\n")
    fields = {
        "sst2": {"text": "sentence"},
        "mnli": {"text": "sentence1", "text_pair": "sentence2", "label": "gold_label"},
    }
    for task, folder, dev in [("sst2", "SST-2", "dev"), ("mnli", "MNLI", "dev_matched")]:
        origins = {
            "train": Origin(str(files / folder / "train.tsv")),
            "dev": Origin(str(files / folder / f"{dev}.tsv")),
        }
        options = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 32}
        options |= {"fields": {"id": "", **fields[task]}}
        convert(Conversion(origins, "classify", str(root / task), **options), lambda _: None)
    rng, words = random.Random(0), ("none", "one", "two", "three", "four")
    for split, count in (("train", 300), ("dev", 60)):
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["remark", "stars"])
            for number in range(count):
                stars = rng.randrange(5)
                writer.writerow([f"no {number}, {words[stars]} of five", stars + 0.5])
    origins = {split: Origin(str(root / f"{split}.csv")) for split in ("train", "dev")}
    options |= {"fields": {"text": "remark", "label": "stars"}, "regression": True}
    convert(Conversion(origins, "classify", str(root / "stars"), **options), lambda _: None)
    return root


@pytest.fixture
def classify(tmp_path, smoke, data, monkeypatch):
    """Train from the YAML above with overrides; returns the run folder."""
    monkeypatch.chdir(tmp_path)

    def go(*overrides: str, task: str = "sst2", model: str = BERT) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(YAML.format(smoke=smoke, data=data / task, model=model))
        config = load_config([str(path), *overrides], ("instruct", "classify"))
        assert recipe.train(config, command="python finetune.py tiny.yaml") == 0
        return tmp_path / config.run_folder

    return go


def test_learns_and_reports_beside_what_guessing_would_score(classify, data, capsys):
    folder = classify("eval_first=true", "run_name=one")
    said = capsys.readouterr().out
    lines = (data / "tsv" / "SST-2" / "dev.tsv").read_text().splitlines()[1:]
    share = Counter(line[-1] for line in lines).most_common()[0][1] / len(lines)
    assert f"would be right in {share:.1%} of dev" in said
    assert "labels of train: 1 1" in said
    outcome = result(folder)
    assert set(outcome["metrics"]) == {"accuracy", "f1", "matthews"}
    assert outcome["metrics"]["accuracy"] > share + 0.3
    assert outcome["metrics"]["matthews"] > 0.6
    assert outcome["eval_perplexity"] is None
    last = records(folder, "eval")[-1]
    assert {k: last[k] for k in outcome["metrics"]} == outcome["metrics"]
    assert "accuracy" in (folder / "report.html").read_text()
    assert outcome["label_tokens_seen"] == 24 * 32
    # What was saved is what was evaluated, read back by plain transformers.
    model = AutoModelForSequenceClassification.from_pretrained(folder / "hf").eval()
    assert model.config.id2label == {0: "0", 1: "1"}
    assert _accuracy(model, data / "sst2") == pytest.approx(outcome["metrics"]["accuracy"])
    # The figures do not depend on the size of the batches that are evaluated.
    other = result(classify("device_eval_batch_size=7", "run_name=other", "eval_first=true"))
    assert other["metrics"] == pytest.approx(outcome["metrics"])
    assert other["eval_cross_entropy"] == pytest.approx(outcome["eval_cross_entropy"], abs=1e-6)


def _accuracy(model, folder: Path) -> float:
    from streaming import StreamingDataset

    rows, right = StreamingDataset(local=str(folder), split="dev", batch_size=1), 0
    for number in range(rows.num_samples):
        row = rows[number]
        with torch.no_grad():
            names = ("input_ids", "token_type_ids")
            columns = {n: torch.from_numpy(row[n].astype("int64"))[None] for n in names}
            right += model(**columns).logits.argmax().item() == row["label"]
    return right / rows.num_samples


def test_regression_learns(classify):
    folder = classify("metrics=[pearson]", "max_duration=36ba", "eval_first=true", task="stars")
    outcome, evals = result(folder), records(folder, "eval")
    assert list(outcome["metrics"]) == ["pearson"]
    assert outcome["metrics"]["pearson"] > 0.7
    assert outcome["eval_cross_entropy"] < 0.6 * evals[0]["cross_entropy"]  # squared error


def test_decoder_with_a_head_learns(classify):
    outcome = result(classify(model=LLAMA))
    assert outcome["metrics"]["accuracy"] > 0.85


def test_adapters_and_head_are_trained_and_saved(classify, capsys):
    # A random base has no features of use; with larger weights some of them are by chance.
    classify("run_name=base", "max_duration=2ba", "model.config.initializer_range=0.3", task="mnli")
    start = ("model.name=runs/base", "tokenizer_name=null", "metrics=[accuracy]")
    plain = "{name: x}"
    options = ("trainable=lora", "lora.r=4", "optimizer.lr=1.0e-2", "eval_first=true")
    lora = classify(*start, "run_name=lora", *options, model=plain)
    said = capsys.readouterr().out
    assert "made anew, as runs/base has none of that name and shape: classifier.bias" in said
    from peft import PeftModel

    saved = load_file(lora / "hf" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in saved if "lora_" not in name} == {"classifier"}
    state = torch.load(next((lora / "checkpoints").glob("ba*")) / "state.pt", weights_only=False)
    names = state["state"]["model"]
    assert any("classifier.modules_to_save" in name for name in names)
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    base = AutoModelForSequenceClassification.from_pretrained(
        "runs/base/hf", num_labels=2, ignore_mismatched_sizes=True
    )
    adapted = PeftModel.from_pretrained(base, lora / "hf").eval()
    evals, expected = records(lora, "eval"), result(lora)["metrics"]["accuracy"]
    assert evals[-1]["cross_entropy"] < evals[0]["cross_entropy"]
    data = Path(load_config([str(lora / "config.yaml")], ("classify",)).data_local)
    assert _accuracy(adapted, data) == pytest.approx(expected)
    head = classify(*start, "run_name=head", "trainable=last_layer", model=plain)
    one, other = (load_file(Path(f"runs/{n}/hf/model.safetensors")) for n in ("base", head.name))
    changed = {n for n in other if one[n].shape != other[n].shape or (one[n] != other[n]).any()}
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("task", "options", "model"),
    [
        ("sst2", (), BERT), ("sst2", (), LLAMA), ("stars", (), BERT),
        ("mnli", ("trainable=lora", "lora.r=4"), BERT), ("mnli", ("trainable=last_layer",), BERT),
        ("mnli", ("trainable=lora", "lora.r=4", "model.dtype=bfloat16"), BERT),
    ],
)  # fmt: skip
def test_what_was_trained_is_asked_exported_and_asked_again(
    task, options, model, classify, data, monkeypatch, capsys
):
    if options:
        classify("run_name=base", "max_duration=2ba", task=task)
        more = ("model.name=runs/base", "tokenizer_name=null", "metrics=[accuracy]")
        folder = classify(*more, *options, "run_name=tuned", task=task, model="{name: x}")
    else:
        folder = classify("run_name=tuned", task=task, model=model)

    def door(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    given = {
        "sst2": (data / "tsv" / "SST-2" / "dev.tsv", "text=sentence"),
        "mnli": (data / "tsv" / "MNLI" / "dev_matched.tsv", "text=sentence1", "text_pair=sentence2",
                 "label=gold_label", "id="),
        "stars": (data / "dev.csv", "text=remark", "label=stars"),
    }[task]  # fmt: skip

    def ask(model, name):
        out = folder / name
        door(generate_text, model, "--data", given[0], "--field", *given[1:], "--out", out)
        return [json.loads(line) for line in out.read_text().splitlines()]

    rows, scores = ask(folder, "one.jsonl"), result(folder)["metrics"]
    if task == "stars":
        errors = [(float(row["answer"]) - float(row["expected"])) ** 2 for row in rows]
        assert sum(errors) / len(errors) == pytest.approx(
            result(folder)["eval_cross_entropy"], rel=1e-3
        )
        assert rows[0]["probability"] is None
    else:
        right = [row["answer"] == row["expected"] for row in rows]
        assert sum(right) / len(right) == pytest.approx(scores["accuracy"])
        assert all(1 / 3 < row["probability"] <= 1 for row in rows)
    out, merge = folder / "out", ["--merge"] if "trainable=lora" in options else []
    if merge:
        with pytest.raises(ConfigError, match="labels of a classifier's adapters; give --merge"):
            door(export_model, folder, "--out", out)
    said = door(export_model, folder, "--out", out, *merge)
    assert "in a fresh process of plain transformers" in said
    assert "text-classification" in (out / "README.md").read_text()
    again = ask(out, "other.jsonl")
    assert [row["answer"] for row in again] == [row["answer"] for row in rows]
    if task == "stars":  # shared by two ranks
        named = ("--data", given[0], "--field", *given[1:], "--out", folder / "shared.jsonl")
        command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2",
                   generate_text.__file__, folder, *named]  # fmt: skip
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (folder / "shared.jsonl").read_text() == (folder / "one.jsonl").read_text()
        return
    with pytest.raises(ConfigError, match="it takes no --chat, no template and no option"):
        door(generate_text, folder, "--prompt", "a", "--max_new_tokens", 5)


def test_adapters_need_a_base_that_is_kept(classify, smoke, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    for name in ("hf_bert", "mosaic_bert"):
        own = {key: shape[key] for key in shape if name == "hf_bert" or "position" not in key}
        network = load_network(ModelConfig(name, False, config=own), tokenizer, 32, "MaskedLM")
        network.save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=r"trainable: bert\.pooler\..* drawn at random"):
            classify(f"model.name={tmp_path / name}", "trainable=lora", model="{name: x}")


def test_a_mosaic_bert_takes_adapters(classify):
    classify("run_name=base", "max_duration=2ba", model=MOSAIC)
    more = ("model.name=runs/base", "trainable=lora", "lora.r=4", "run_name=lora")
    folder = classify(*more, "max_duration=4ba", model="{name: x}")
    assert result(folder)["steps"] == 4
    for place in ("runs/base", "runs/lora"):  # the checkpoints are what was written out
        (newest,) = Path(place, "checkpoints").glob("ba[24]")
        there, here = (load_trained(p).model.state_dict() for p in (str(newest), place))
        assert there.keys() == here.keys()
        assert all(torch.equal(there[key], here[key]) for key in here)


def test_what_a_head_has_besides_its_classifier_is_trained_and_kept(classify, smoke, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 32}  # fmt: skip
    tokenizer = load_tokenizer(str(smoke / "tokenizer"))
    base = ModelConfig("deberta-v2", False, config=shape)
    load_network(base, tokenizer, 32, "MaskedLM").save_pretrained(tmp_path / "base")
    folder = classify(f"model.name={tmp_path}/base", "trainable=lora", model="{name: x}")
    kept = load_file(folder / "hf" / "adapter_model.safetensors")
    assert "base_model.model.pooler.dense.weight" in kept
    there = load_trained(str(folder)).model.state_dict()
    name = "base_model.model.pooler.dense.modules_to_save.default.weight"
    assert torch.equal(there[name].cpu(), kept["base_model.model.pooler.dense.weight"])
    # A head of several layers is trained as one.
    base = ModelConfig("roberta", False, config=shape | {"max_position_embeddings": 34})
    network = load_network(base, tokenizer, 32, "MaskedLM")
    network.save_pretrained(tmp_path / "other")
    more = ("trainable=lora", "run_name=other", "max_duration=8ba", "eval_interval=8ba")
    folder = classify(f"model.name={tmp_path}/other", *more, model="{name: x}")
    kept = load_file(folder / "hf" / "adapter_model.safetensors")
    heads = {name for name in kept if "lora_" not in name}
    of = "base_model.model.classifier.{}".format
    assert heads == {of(f"{x}.{y}") for x in ("dense", "out_proj") for y in ("weight", "bias")}
    assert load_trained(str(folder)).model


class Power(Exception):
    """The power went out."""


class Outage(Callback):
    def batch_end(self, state, logger):
        if state.timestamp.batch.value == 13:
            raise Power


@pytest.mark.parametrize(("trainable", "model"), [("all", BERT), ("lora", BERT), ("all", MOSAIC)])
def test_resumed_equals_uninterrupted_bit_for_bit(classify, monkeypatch, trainable, model):
    options = (f"trainable={trainable}", "save_interval=5ba", "eval_interval=8ba")
    classify = partial(classify, model=model)
    whole = classify(*options, "run_name=whole")
    build = recipe.build_callbacks
    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), Outage()])
    with pytest.raises(Power):
        classify(*options, "run_name=broken")
    monkeypatch.setattr(recipe, "build_callbacks", build)
    broken = classify(*options, "run_name=broken")
    assert curve(broken) == curve(whole)
    assert result(broken)["metrics"] == result(whole)["metrics"]
    assert_same(broken, whole)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["metrics=[pearson]"], r"metrics: pearson does not fit data whose labels are classes"),
        (["model.config.num_labels=3"], r"num_labels: 3, but the labels of the data are 2 classes"),
        (["metrics=[acuracy]"], r'metrics\[0\]: unknown value .*did you mean "accuracy"'),
        (["model.config.id2label={0: a}"], r"id2label: is what the converted data says"),
        (["task=instruct", "metrics=[f1]"], r"metrics: \['f1'\] is for task: classify, not instr"),
        (
            ["trainable=last"],
            r"trainable: 'last' is none; allowed: lora, all",
        ),
        (
            ["trainable=['*.attn.*']"],
            r"'\*\.attn\.\*' is the name of no parameter \(did you mean .attention.\?\)",
        ),
        (["task=instruct"], r"was converted with --task classify, but task instruct reads"),
        (["compile=true"], r"compile: is for language models"),
        (["eval_loader=null", "metrics=[f1]"], r"metrics: needs an eval_loader"),
        (["generation.num_prompts=3"], r"generation: scores answers to prompts"),
        (
            ["model.config.max_position_embeddings=16"],
            r"max_seq_len: 32, but bert has 16 positions",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(classify, overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        classify(*overrides)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_splits_of_other_classes_are_refused(classify, smoke, data):
    for name, lines in {"train": "a,x\nb,y\nc,x\n", "dev": "d,x\ne,z\n"}.items():
        (Path(f"{name}.csv")).write_text("text,label\n" + lines)
        origins = {name: Origin(f"{name}.csv")}
        options = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 32}
        convert(Conversion(origins, "classify", "other", **options), lambda _: None)
    small = ("data_local=other", "global_train_batch_size=2", "device_train_microbatch_size=2")
    with pytest.raises(ConfigError, match=r"labels of train are 2 classes \(x, y\), but dev has"):
        classify(*small)
    with pytest.raises(ConfigError, match="all rows are 'x': nothing to tell apart"):
        Path("one.csv").write_text("text,label\na,x\nb,x\n")
        origins = {"train": Origin("one.csv")}
        convert(Conversion(origins, "classify", "one", **options), lambda _: None)
        classify(*small[1:], "data_local=one", "eval_loader=null")


def test_load_path_with_a_head_of_another_size_is_refused(classify):
    three = classify("run_name=three", "max_duration=2ba", task="mnli")
    with pytest.raises(ConfigError, match=r"was trained in another model than this one"):
        classify(f"load_path={three}", "load_weights_only=true", "run_name=two")
    with pytest.raises(ConfigError, match=r"classifier.* is \[3.* there, but \[2.* here"):
        classify(
            f"load_path={three}", "load_weights_only=true", "run_name=two", "resume.allow=[model]"
        )
