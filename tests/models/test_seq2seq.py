"""Encoder-decoders: the family's own loss, whatever the padding, microbatches and smoothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer.core.data_spec import _default_split_batch
from transformers import GenerationConfig

from overture.config.schema import ModelConfig
from overture.data.collate import PairCollator
from overture.errors import ConfigError
from overture.models.build import load_network
from overture.models.isolation import prove_padding
from overture.models.lora import add_lora
from overture.models.seq2seq import Seq2SeqLM, begin_as_trained, refuse_unknown_family
from overture.tokenizer import load_tokenizer

BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.2,
}  # fmt: skip
FAMILIES = {
    "bart": BART,
    "mbart": BART,
    "marian": BART,
    "t5": {
        "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def build(family: str, tokenizer, seed: int = 1, **config):
    torch.manual_seed(seed)
    wanted = ModelConfig(family, False, config=FAMILIES[family] | config)
    network = load_network(wanted, tokenizer, 64, "Seq2SeqLM")
    if hasattr(network, "final_logits_bias"):  # Marian's checkpoints have one
        network.final_logits_bias.normal_()
    return network


def rows(tokenizer, count: int = 5, seed: int = 0) -> list[dict]:
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        source, target = (rng.integers(5, 900, rng.integers(2, 30), np.uint16) for _ in range(2))
        target = np.append(target, np.uint16(tokenizer.eos_token_id))
        made.append({"input_ids": source, "labels": target, "sample_id": number})
    return made


def test_rows_of_like_length_stand_together_and_counts_are_theirs(tokenizer):
    given = rows(tokenizer, 12)
    batch = PairCollator(tokenizer.pad_token_id, 4)(given)
    assert sorted(batch["sample_ids"].tolist()) == list(range(12))
    for place, number in enumerate(batch["sample_ids"].tolist()):
        source, target = (given[number][name].tolist() for name in ("input_ids", "labels"))
        mask = batch["attention_mask"][place].bool()
        assert batch["input_ids"][place][mask].tolist() == source
        assert batch["input_ids"][place][~mask].unique().tolist() in ([], [tokenizer.pad_token_id])
        assert batch["labels"][place][batch["labels"][place] != -100].tolist() == target
        assert batch["num_tokens"][place] == len(source) + len(target)
        assert batch["num_labels"][place] == len(target)
    for part in _default_split_batch(batch, 4):
        longest = part["attention_mask"].sum(1).max().item()
        assert len({*part["source_room"]}) == len({*part["target_room"]}) == 1
        assert longest <= part["source_room"][0] < longest + 4
        assert max(part["num_labels"]) <= part["target_room"][0] < max(part["num_labels"]) + 4
    assert sum(batch["source_room"]) < batch["input_ids"].numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_the_familys_own_row_by_row(family, smoothing, tokenizer):
    network = build(family, tokenizer)
    given = rows(tokenizer)
    model = Seq2SeqLM(network, tokenizer, None, smoothing=smoothing).train()
    parts = _default_split_batch(PairCollator(tokenizer.pad_token_id, 2)(given), 2)
    outputs = [model(part) for part in parts]
    ours = sum(out["loss"] for out in outputs)
    expected, each = 0.0, {}
    for row in given:  # alone, without any padding
        source, target = (
            torch.tensor(row[n].astype(np.int64))[None] for n in ("input_ids", "labels")
        )
        logits = network(input_ids=source, labels=target).logits
        expected += F.cross_entropy(
            logits[0], target[0], reduction="sum", label_smoothing=smoothing
        )
        each[row["sample_id"]] = F.cross_entropy(logits[0], target[0], reduction="sum").item()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    weights = [p for p in network.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    found = torch.autograd.grad(ours, weights, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    model.eval()  # evaluation measures plain cross-entropy
    for part in parts:
        out = model(part)
        sums = torch.zeros(len(part["sample_ids"])).index_add_(0, out["rows"], out["token_losses"])
        for number, total in zip(part["sample_ids"].tolist(), sums.tolist(), strict=True):
            assert total == pytest.approx(each[number], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_begins_as_training_does(family, tokenizer, tmp_path):
    network = build(family, tokenizer)
    targets = [row["labels"].tolist() for row in rows(tokenizer)]
    begin_as_trained(network, targets, {*tokenizer.all_special_ids})
    made = network.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)[0].tolist()
    begins = network.prepare_decoder_input_ids_from_labels(labels=torch.tensor([targets[0]]))
    assert made[0] == begins[0, 0]
    assert network.generation_config.forced_bos_token_id is None
    # What bends greedy answers, as bart-base's config does, stays out of it.
    network.generation_config.update(no_repeat_ngram_size=3, min_length=9)
    begin_as_trained(network, targets, {*tokenizer.all_special_ids})
    assert network.generation_config.no_repeat_ngram_size == 0
    assert network.generation_config.min_length == 0
    network.config.no_repeat_ngram_size = 3  # where older models have it
    begin_as_trained(network, targets, {*tokenizer.all_special_ids})
    network.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert (again.no_repeat_ngram_size or 0, again.min_length or 0) == (0, 0)
    # A language code that all targets begin with is not left to the model.
    code = tokenizer.all_special_ids[0]
    begin_as_trained(network, [[code, *ids] for ids in targets], {*tokenizer.all_special_ids})
    made = network.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)[0].tolist()
    assert made[1] == code


def test_a_decoder_that_begins_with_a_word_of_the_target_is_refused(tokenizer):
    network = build("mbart", tokenizer)
    targets = [row["labels"].tolist() for row in rows(tokenizer)]
    network.config.pad_token_id = tokenizer.eos_token_id  # then the end is taken for padding
    with pytest.raises(ConfigError, match="begins with a token of each target"):
        begin_as_trained(network, targets, {*tokenizer.all_special_ids})


def test_families_that_name_their_parts_otherwise_are_refused(tokenizer):
    refuse_unknown_family(build("t5", tokenizer))
    shape = {name: size for name, size in BART.items() if name != "init_std"}
    wanted = ModelConfig("m2m_100", False, config=shape)
    with pytest.raises(ConfigError, match=r"M2M100.* cannot be trained by task: seq2seq; T5, BART"):
        refuse_unknown_family(load_network(wanted, tokenizer, 64, "Seq2SeqLM"))


def test_a_decoder_that_sees_ahead_and_padding_that_counts_are_refused(tokenizer):
    network = build("bart", tokenizer)
    prove_padding(network, 900, 64, False)
    decoder = network.get_decoder()
    forward = network.forward

    def without_mask(attention_mask=None, **given):
        return forward(**given)

    network.forward = without_mask
    with pytest.raises(ConfigError, match="padding changes what a Bart"):
        prove_padding(network, 900, 64, False)
    network.forward = forward
    for layer in decoder.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, _own=own, **k: _own(
            *a, **{**k, "attention_mask": None}
        )
        layer.self_attn.is_causal = False
    with pytest.raises(ConfigError, match="decoder see what comes after them"):
        prove_padding(network, 900, 64, False)


def test_adapters_alone_learn_and_flops_are_those_of_the_parts(tokenizer):
    network = add_lora(build("t5", tokenizer), 4, 8, 0.0, "all-linear", head="Seq2SeqLM")
    model = Seq2SeqLM(network, tokenizer, None).train()
    batch = PairCollator(tokenizer.pad_token_id, 8)(rows(tokenizer))
    model.loss(model(batch), batch).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
    full = Seq2SeqLM(build("bart", tokenizer), tokenizer, None)
    source, target = 7, 5
    given = {"num_tokens": [source + target], "num_labels": [target]}
    encoder = 2 * (4 * 32**2 + 2 * 32 * 64)
    decoder = 8 * 32**2 + 2 * 32 * 64
    products = 6 * (encoder * source + decoder * target + len(tokenizer) * 32 * target)
    # Scores and mixing, forward and back: all of the source twice, half of the target, both across.
    attended = 12 * 32 * (2 * source**2 + target**2 / 2 + target * source)
    assert full.flops_of(given) == pytest.approx(products + attended)
