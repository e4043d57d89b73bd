"""Translation by the recipe: learned, scored, stopped early, resumed, exported and asked again."""

import html
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import sacrebleu
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import export_model
import generate_text
from overture import generate
from overture.config.load import load_config
from overture.data.conversion import Conversion, Origin
from overture.data.convert import convert
from overture.errors import ConfigError, DataError, Preempted
from overture.tokenizer import load_tokenizer
from overture.trained import load_trained
from overture.training import run as recipe
from runs import assert_same, records, result

YAML = """
task: seq2seq
max_seq_len: 24
tokenizer_name: {smoke}/tokenizer
data_local: {data}
model:
  name: {family}
  pretrained: false
  config: {config}
train_loader: {{dataset: {{split: train, shuffle: true}}, drop_last: true}}
eval_loader: {{dataset: {{split: dev}}}}
optimizer: {{lr: 4.0e-3}}
max_duration: 120ba
eval_interval: 40ba
global_train_batch_size: 32
device_train_microbatch_size: 16
device_eval_batch_size: 32
generation: {{num_prompts: 20, max_new_tokens: 12, batch_size: 20, bleu_tokenize: none}}
progress_bar: false
"""
SHAPES = {
    "bart": "{d_model: 32, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 64, decoder_ffn_dim: 64, dropout: 0.1, "
    "max_position_embeddings: 32}",
    "mbart": "{d_model: 32, encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, "
    "decoder_attention_heads: 2, encoder_ffn_dim: 64, decoder_ffn_dim: 64, dropout: 0.1, "
    "max_position_embeddings: 32}",
    "t5": "{d_model: 32, d_kv: 16, d_ff: 64, num_layers: 1, num_heads: 2, dropout_rate: 0.1}",
}
WORDS = ("red", "box", "small", "door", "green", "cup", "old", "key")
OTHERS = dict(
    zip(WORDS, ("one", "two", "three", "four", "five", "six", "seven", "eight"), strict=True)
)


@pytest.fixture(scope="module")
def data(smoke, tmp_path_factory) -> Path:
    """Numbered words, and what is said of each in another tongue: `data/train`, `data/dev`."""
    root = tmp_path_factory.mktemp("pairs")
    for split, begin, count in (("train", 0, 400), ("dev", 400, 40)):
        words = [WORDS[n * 37 // 8 % 8] for n in range(begin, begin + count)]
        rows = [f"{number} {word}\n" for number, word in enumerate(words, begin)]
        (root / f"{split}.a").write_text("".join(rows))
        rows = [f"{OTHERS[word]} {OTHERS[word]} is all it is\n" for word in words]
        (root / f"{split}.b").write_text("".join(rows))
    origins = {s: Origin(f"{root / s}.a,{root / s}.b") for s in ("train", "dev")}
    options = {"tokenizer": str(smoke / "tokenizer"), "max_seq_len": 24}
    convert(Conversion(origins, "seq2seq", str(root / "data"), **options), lambda _: None)
    return root


@pytest.fixture
def translate(tmp_path, smoke, data, monkeypatch):
    """Train from the YAML above with overrides; returns the run folder."""
    monkeypatch.chdir(tmp_path)

    def go(*overrides: str, family: str = "bart") -> Path:
        path = tmp_path / "tiny.yaml"
        places = {"smoke": smoke, "data": data / "data", "family": family}
        path.write_text(YAML.format(**places, config=SHAPES.get(family, "{}")))
        config = load_config([str(path), *overrides], ("instruct", "seq2seq"))
        assert recipe.train(config, command="python finetune.py tiny.yaml") == 0
        return tmp_path / config.run_folder

    return go


@pytest.mark.parametrize("family", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_learns_is_scored_exported_and_says_the_same_again(family, translate, data, door):
    rate = ("optimizer.lr=3e-2",) if family == "t5" else ()
    folder = translate("label_smoothing=0.1", "eval_first=true", *rate, family=family)
    outcome, evals = result(folder), records(folder, "eval")
    assert outcome["eval_cross_entropy"] < outcome["eval_cross_entropy_before"] - 3
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    texts = (data / "dev.b").read_text().splitlines()[:20]
    assert [row["expected"] for row in rows] == texts
    after = [row["after"].strip() for row in rows]
    bleu = sacrebleu.corpus_bleu(after, [texts], tokenize="none").score
    assert bleu > 50
    assert outcome["metrics"]["bleu_after"] == pytest.approx(bleu)
    assert outcome["metrics"]["chrf_after"] == pytest.approx(
        sacrebleu.corpus_chrf(after, [texts]).score
    )
    assert evals[-1]["bleu"] == pytest.approx(bleu)
    assert evals[-1]["bleu"] > evals[0]["bleu"]
    worst = [json.loads(line) for line in (folder / "token_losses.jsonl").read_text().splitlines()]
    sides = [(data / f"dev.{side}").read_text().splitlines() for side in "ab"]
    for row in worst:
        pair = ["".join(t for t, loss in row["pieces"] if (loss is None) == of) for of in (1, 0)]
        pair = tuple(re.sub(r"<\|\w+\|>", "", text).strip() for text in pair)
        assert pair in zip(*sides, strict=True)
        found = [loss for _, loss in row["pieces"] if loss is not None]
        assert sum(found) / len(found) == pytest.approx(row["mean"])
    said = [e["what"] for e in records(folder, "translation") if e["step"] == 120]
    assert f"{rows[0]['prompt']} -> {after[0]} (expected: {texts[0]})" in said
    assert not records(folder, "event")
    page = (folder / "report.html").read_text()
    assert "Translations, latest first" in page and html.escape(texts[0]) in page
    # The run itself, asked with the texts; then the exported folder, by plain transformers too.
    files = f"{data / 'dev.a'},{data / 'dev.b'}"
    ask = ("--data", files, "--prompt_template", "pair", "--max_new_tokens", 12)
    out = folder / "asked.jsonl"
    door(generate_text, folder, *ask, "--out", out)
    asked = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["answer"] for row in asked[:20]] == [row["after"] for row in rows]
    shown = door(export_model, folder, "--out", folder / "out", "--test_prompt", "7 box")
    assert "a fresh process gives the same" in shown
    assert "text2text-generation" in (folder / "out" / "README.md").read_text()
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    given = tokenizer(asked[3]["prompt"], return_tensors="pt")
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=12, num_beams=1, do_sample=False)[0]
    assert tokenizer.decode(made, skip_special_tokens=True) == asked[3]["answer"]


def test_adapters_of_an_encoder_decoder_are_trained_merged_and_gone_on_with(translate, door):
    base = translate("run_name=base", "max_duration=20ba")
    lora = ("model.name=" + str(base), "model.pretrained=true", "model.config={}", "trainable=lora")
    one = translate(*lora, "run_name=lora", "lora.r=4", "max_duration=40ba", "optimizer.lr=2e-2")
    assert result(one)["eval_cross_entropy"] < result(base)["eval_cross_entropy"]
    shown = door(export_model, one, "--out", one / "merged", "--merge")
    assert "merged, against base and adapters" in shown
    more = (
        *lora,
        f"model.adapter={one}",
        "optimizer.lr=1e-4",
        "max_duration=40ba",
        "eval_first=true",
    )
    other = translate(*more, "run_name=more", "save_interval=20ba")
    before = result(other)["eval_cross_entropy_before"]
    assert before == pytest.approx(result(one)["eval_cross_entropy"], rel=1e-5)
    with pytest.raises(ConfigError, match=r"lora\.r: 8, but the adapters of .* have 4"):
        translate(*more, "run_name=wrong", "lora.r=8")
    with pytest.raises(ConfigError, match=r"model\.adapter: .*: holds no adapters"):
        translate(*lora, "run_name=wrong", f"model.adapter={base}")


def test_a_checkpoint_and_adapters_begin_as_the_run_did(translate, door, smoke):
    # mBART's decoder begins with the end; its own config would let generation begin elsewhere.
    base = translate("run_name=base", "save_interval=60ba", family="mbart")
    (base / "hf" / "generation_config.json").unlink()
    more = (f"model.name={base}", "model.pretrained=true", "model.config={}", "trainable=lora")
    lora = translate(*more, "run_name=lora", "max_duration=8ba", "optimizer.lr=1e-5")
    newest = max((base / "checkpoints").glob("ba*"), key=lambda path: int(path.name[2:]))
    for run, model in ((base, newest), (lora, lora)):
        rows = [json.loads(line) for line in (run / "generations.jsonl").read_text().splitlines()]
        told = door(generate_text, model, "--prompt", rows[0]["prompt"], "--max_new_tokens", 12)
        assert rows[0]["after"]
        assert f"-> {rows[0]['after']}" in told
    begins = load_trained(str(newest)).model.generation_config
    assert begins.decoder_start_token_id == load_tokenizer(str(smoke / "tokenizer")).eos_token_id


def test_a_cold_cache_is_filled_and_positions_are_asked_for(translate, data, tmp_path):
    remote = (f"data_remote={data / 'data'}", f"data_local={tmp_path / 'cache'}")
    folder = translate(*remote, "max_duration=2ba", "generation=null")
    assert result(folder)["steps"] == 2
    # Warm, and with nothing to evaluate on, it is opened once all the same.
    warm = (*remote, "max_duration=2ba", "generation=null", "eval_loader=null", "eval_interval=1ep")
    assert result(translate(*warm, "run_name=warm"))["steps"] == 2
    with pytest.raises(ConfigError, match="leave no room for a prompt in the model's 32"):
        translate("generation.max_new_tokens=32", "run_name=long")


def test_asked_to_stop_while_it_translates(translate, monkeypatch):
    made, calls, real = [], [], generate.answer

    def asked(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:  # the first was before training
            os.kill(os.getpid(), signal.SIGTERM)
        texts = real(*arguments, **options)
        made.append(sum(map(bool, texts[0])))
        return texts

    monkeypatch.setattr(generate, "answer", asked)
    options = ("max_duration=80ba", "generation.batch_size=5")
    with pytest.raises(Preempted, match="saved at step 40"):
        translate(*options, "run_name=asked")
    assert made[1] == 0  # not one batch more
    monkeypatch.setattr(generate, "answer", real)
    parts = translate(*options, "run_name=asked")
    assert_same(translate(*options, "run_name=whole"), parts)
    assert [r["step"] for r in records(parts, "eval")] == [40, 80]


def test_stops_when_it_overfits_and_gives_the_best_weights(translate, monkeypatch):
    # A high rate: the loss on others rises once the pairs are learned by heart.
    more = ("optimizer.lr=4e-2", "eval_interval=4ba", "max_duration=200ba", "generation=null")
    more = (*more, "callbacks.early_stop.patience=2", "model.config.dropout=0.0")
    folder = translate(*more, "run_name=whole", "save_interval=4ba")
    evals = records(folder, "eval")
    losses = [record["cross_entropy"] for record in evals]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    outcome = result(folder)
    assert outcome["steps"] < 200
    assert outcome["eval_cross_entropy"] == losses[best]
    events = " ".join(e["what"] for e in records(folder, "event"))
    assert f"no fall in 2 evaluations below {losses[best]:.4f}" in events
    assert not (folder / "best.safetensors").exists()
    again = translate(
        "model.pretrained=true", f"model.name={folder}", "model.config={}", "run_name=again",
        "eval_first=true", "max_duration=1ba", "generation=null",
    )  # fmt: skip
    assert result(again)["eval_cross_entropy_before"] == pytest.approx(losses[best], rel=1e-5)
    # Broken off while it waits, it ends alike.
    build = recipe.build_callbacks

    class Power(recipe.Throughput):
        def eval_end(self, state, logger):
            if state.timestamp.batch.value == evals[best + 1]["step"]:
                raise OverflowError

    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), Power()])
    with pytest.raises(OverflowError):
        translate(*more, "run_name=parts", "save_interval=4ba")
    monkeypatch.undo()
    monkeypatch.chdir(folder.parents[1])
    parts = translate(*more, "run_name=parts", "save_interval=4ba")
    assert_same(folder, parts)
    # Broken off between the end of training and the result, it does not go on training.
    for name in ("result.json", "report.html"):
        (parts / name).unlink()
    shutil.rmtree(parts / "hf")
    with pytest.raises(DataError, match=r"best\.safetensors: .* the last weights are given with"):
        translate(*more, "run_name=parts", "save_interval=4ba")
    last = ("callbacks.early_stop.keep_best=false", "resume.allow=[callbacks]")
    again = translate(*more, "run_name=parts", "save_interval=4ba", *last)
    assert result(again)["steps"] == outcome["steps"]
    assert result(again)["eval_cross_entropy"] == losses[-1]


def test_refusals(translate, tmp_path, smoke):
    with pytest.raises(ConfigError, match="is a llama, of which there is none for Seq2SeqLM"):
        translate(family="llama")
    with pytest.raises(ConfigError, match=r"bleu_tokenize: unknown value 'klingon'.* ja-mecab"):
        translate("generation.bleu_tokenize=klingon")
    with pytest.raises(ConfigError, match=r"bleu_tokenize: ja-mecab: .*install"):
        translate("generation.bleu_tokenize=ja-mecab")
    with pytest.raises(ConfigError, match=r"a bart, an encoder with a decoder; set task: seq2seq"):
        translate("task=instruct", f"data_local={smoke / 'instruct'}", "generation=null",
                  "eval_loader.dataset.split=test", "max_seq_len=128")  # fmt: skip
    with pytest.raises(ConfigError, match="compile: is for models without an encoder"):
        translate("compile=true")
    with pytest.raises(ConfigError, match="label_smoothing: is for task: seq2seq, not instruct"):
        translate("task=instruct", "label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"early_stop: would meet other weights than algor"):
        translate("algorithms.ema={}", "callbacks.early_stop={}")
    with pytest.raises(ConfigError, match="was converted with --task instruct, but task seq2seq"):
        translate(f"data_local={smoke / 'instruct'}", "eval_loader=null", "generation=null")
