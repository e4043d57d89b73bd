"""Algorithms do what their names say to this model and these batches, or are refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer import Callback
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.core import Event, Time, Timestamp
from safetensors.torch import load_file

from overture.config.schema import Config, ModelConfig, MonitorConfig, SeqLengthWarmupConfig
from overture.data.collate import TokenCollator
from overture.errors import ConfigError
from overture.models.build import load_network
from overture.models.causal_lm import CausalLM
from overture.tokenizer import load_tokenizer
from overture.trained import load_trained
from overture.training import run as recipe
from overture.training.monitors import Average, exchange_modules
from overture.training.seq_length import LengthWarmup, cut_documents
from runs import records, result

SHAPES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def network(family: str, tokenizer):
    torch.manual_seed(1)
    return load_network(ModelConfig(family, False, config=SHAPES[family]), tokenizer)


def batch_of(*packs: tuple[int, ...], room: int = 32) -> dict:
    rng, rows = np.random.default_rng(0), []
    for number, lengths in enumerate(packs):
        ids = rng.integers(3, 900, sum(lengths)).astype(np.uint16)
        learned = (rng.random(len(ids)) < 0.8).astype(np.uint8)
        ends = np.cumsum(lengths).astype(np.uint32)
        rows.append(
            {"input_ids": ids, "loss_mask": learned, "document_ends": ends, "sample_id": number}
        )
    return TokenCollator(room, 0)(rows)


PACKS = ((9, 5, 14), (32,), (20,), (3, 4), (7, 25))


@pytest.mark.parametrize("length", [2, 5, 8, 16, 31])
def test_cut_documents_are_what_a_collator_makes_of_the_pieces(length):
    batch = batch_of(*PACKS)
    cut = cut_documents(batch, length)
    pieces = [
        tuple(min(length, n - begin) for n in pack for begin in range(0, n, length))
        for pack in PACKS
    ]
    expected = batch_of(*pieces)  # the same ids and masks, since these are drawn by the row
    assert cut.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(cut[name], value) if torch.is_tensor(value) else cut[name] == value
        assert same, name
    assert cut["num_tokens"] == batch["num_tokens"]
    assert sum(cut["num_labels"]) <= sum(batch["num_labels"]) - (length < 20)
    assert cut["document_starts"].dtype == torch.int32


def test_documents_that_are_short_enough_stay():
    batch = batch_of((8, 5), (8, 8, 8, 8))
    cut = cut_documents(batch, 8)
    for name, value in batch.items():
        same = torch.equal(cut[name], value) if torch.is_tensor(value) else cut[name] == value
        assert same, name


def test_loss_of_a_cut_batch_is_that_of_each_piece_alone(tokenizer):
    model = CausalLM(network("llama", tokenizer), tokenizer, None).eval()
    whole = batch_of((20, 9))
    with torch.no_grad():
        ours = model(cut_documents(whole, 8))["token_losses"]
        expected, labels = [], whole["labels"][0]
        for begin, end in ((0, 8), (8, 16), (16, 20), (20, 28), (28, 29)):
            ids = whole["input_ids"][:, begin:end]
            logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            expected.append(losses[labels[begin + 1 : end] != -100])
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_lengths_grow_in_even_steps_and_end_when_they_should():
    warmup = LengthWarmup(duration=0.3, min_seq_length=8, step_size=8, max_seq_length=128)
    lengths = [warmup.length(step / 100) for step in range(100)]
    assert lengths[0] == 8
    assert lengths.index(128) == 30
    assert lengths == sorted(lengths)
    assert {*lengths} == {*range(8, 121, 8)} | {128}
    assert all(lengths.count(length) == 2 for length in range(8, 121, 8))


def test_warm_up_keeps_tokens_and_leaves_out_the_labels_of_borders(run, smoke):
    common = (
        "task=causal_lm", "max_duration=2ep", "eval_interval=2ep", "global_train_batch_size=24",
        "device_train_microbatch_size=8",
    )  # fmt: skip
    text = {"tasks": ("causal_lm",), "data": smoke / "text"}
    growing = "algorithms.seq_length_warmup={duration: 0.5, min_seq_length: 8, step_size: 8}"
    _, plain = run(*common, "run_name=plain", **text)
    _, grown = run(*common, "run_name=grown", growing, **text)
    steps = [records(folder, "train") for folder in (plain, grown)]
    epoch = len(steps[0]) // 2
    assert epoch >= 3
    assert [r["tokens"] for r in steps[0]] == [r["tokens"] for r in steps[1]]
    labels = [np.diff([0, *(r["label_tokens"] for r in part)]) for part in steps]
    lost = labels[0] - labels[1]
    # max_duration is in epochs, and still lengths grow by the step.
    assert lost[0] > 2 * lost[1] > 2 * lost[2] >= 2 * lost[epoch - 1] >= 0
    assert (lost[epoch:] == 0).all()


def test_family_that_cannot_keep_pieces_apart_is_refused(tokenizer):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16,
             "attention_types": [[["global", "local"], 1]]}  # fmt: skip
    config = Config("causal_lm", ModelConfig("gpt_neo", False, config=shape), 128, "1ep", 4)
    recipe.build_network(config, tokenizer, "cpu", {"train": {"packing": {"method": "none"}}})
    config.algorithms.seq_length_warmup = SeqLengthWarmupConfig()
    refused = r"algorithms\.seq_length_warmup: pieces of a document see each other in a GPTNeoFor"
    with pytest.raises(ConfigError, match=refused + r"CausalLM \(gpt_neo\); leave it out"):
        recipe.build_network(config, tokenizer, "cpu", {"train": {"packing": {"method": "none"}}})


def test_an_average_leaves_constants_as_they_are():
    model = torch.nn.Linear(4, 4)
    model.register_buffer("positions", torch.arange(512))
    average, begun = Average(half_life="200ba"), Time.from_timestring("0.5dur")
    state = SimpleNamespace(
        model=model, timestamp=Timestamp(batch=1), get_elapsed_duration=lambda: begun
    )
    average.apply(Event.INIT, state, None)
    assert average.match(Event.BATCH_END, state)
    for event in (Event.BATCH_END, Event.EVAL_START):
        average.apply(event, state, None)
    assert model.positions.equal(torch.arange(512))


class Weights(Callback):
    """Keeps the weights after each step."""

    def __init__(self):
        self.kept = []

    def batch_end(self, state, logger):
        parts = state.model.model.named_parameters()
        self.kept.append({name: p.detach().clone() for name, p in parts})


def test_averaged_weights_are_evaluated_and_exported(run, monkeypatch):
    weights, build = Weights(), recipe.build_callbacks
    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), weights])
    _, folder = run("algorithms.ema.half_life=2ba", "run_name=ema")
    average, share = weights.kept[0], 0.5**0.5
    for step in weights.kept:
        average = {n: share * p + (1 - share) * step[n] for n, p in average.items()}
    exported = load_file(folder / "hf" / "model.safetensors")
    assert exported.keys() == average.keys() - {"lm_head.weight"} | (
        exported.keys() & {"lm_head.weight"}
    )
    for name, value in exported.items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)
    assert any((exported[n] - weights.kept[-1][n]).abs().max() > 1e-3 for n in exported)
    (checkpoint,) = (folder / "checkpoints").glob("ba*")  # what is used of it is averaged too
    there = load_trained(str(checkpoint)).model.state_dict()
    assert all(torch.equal(there[name].cpu(), exported[name]) for name in exported)
    # Read by another run, the export gives the loss that was reported.
    monkeypatch.setattr(recipe, "build_callbacks", build)
    _, again = run("model.name=runs/ema", "model.pretrained=true", "model.config={}",
                   "tokenizer_name=null", "max_duration=1ba", "run_name=again")  # fmt: skip
    reported = result(folder)["eval_cross_entropy"]
    assert result(again)["eval_cross_entropy_before"] == pytest.approx(reported, abs=1e-5)
    # Averaging leaves the course of training as it is.
    _, plain = run("run_name=plain")
    curves = [[r["loss"] for r in records(f, "train")] for f in (folder, plain)]
    assert curves[0] == curves[1]


def config_with(name: str, **algorithms) -> Config:
    config = Config("causal_lm", ModelConfig(name), 128, "1ep", 4)
    vars(config.algorithms).update(algorithms)
    return config


def test_exchanged_modules_are_counted_on_the_model_itself(tokenizer):
    wanted = {"low_precision_layernorm": MonitorConfig()}
    gpt, ids = network("gpt2", tokenizer).eval(), torch.arange(9)[None]
    before = gpt(ids).logits
    exchange_modules(gpt, config_with("gpt2", **wanted), "amp_bf16")
    assert sum(isinstance(m, LPLayerNorm) for m in gpt.modules()) == 5  # two a layer, and the last
    torch.testing.assert_close(gpt(ids).logits, before)  # without autocast they are the same
    for name, family, precision in (
        ("LlamaForCausalLM", "llama", "amp_bf16"),  # whose norms are of another kind
        ("GPT2LMHeadModel", "gpt2", "fp32"),
    ):
        with pytest.raises(
            ConfigError,
            match=rf"algorithms\.low_precision_layernorm: changes nothing in a {name} "
            rf"\({family}\) trained in {precision}; leave it out",
        ):
            exchange_modules(network(family, tokenizer), config_with(family, **wanted), precision)


def test_exchanged_modules_stay_as_frozen_and_as_narrow_as_they_were(tokenizer):
    gpt = network("gpt2", tokenizer).to(torch.bfloat16).requires_grad_(False)
    gpt.transformer.ln_f.requires_grad_(True)
    before = {name: (p.dtype, p.requires_grad) for name, p in gpt.named_parameters()}
    wanted = {"low_precision_layernorm": MonitorConfig()}
    exchange_modules(gpt, config_with("gpt2", **wanted), "amp_bf16")
    assert {name: (p.dtype, p.requires_grad) for name, p in gpt.named_parameters()} == before


def test_run_with_an_algorithm_without_effect_leaves_nothing(run, tmp_path):
    with pytest.raises(ConfigError, match=r"low_precision_layernorm: changes nothing in a Llama"):
        run("algorithms.low_precision_layernorm={}", "precision=amp_bf16", "run_name=idle")
    assert not (tmp_path / "runs" / "idle").exists()


def test_pretraining_goes_on_from_a_run_and_ends_as_a_model(run, smoke):
    options = ("task=causal_lm", "optimizer.lr=3e-3")
    text = {"tasks": ("causal_lm",), "data": smoke / "text"}
    _, first = run(*options, "run_name=first", **text)
    onward = ("model.name=runs/first", "model.pretrained=true", "model.config={}",
              "tokenizer_name=null")  # fmt: skip
    _, second = run(*options, *onward, "run_name=second", **text)
    end, begin = result(first)["eval_cross_entropy"], result(second)["eval_cross_entropy_before"]
    assert begin == pytest.approx(end, abs=1e-5)
    assert result(second)["eval_cross_entropy"] < end < math.log(1024)
    code, third = run(*onward[1:], "model.name=runs/second", "trainable=lora", "run_name=third")
    assert code == 0
    assert (third / "hf" / "adapter_model.safetensors").is_file()
