"""Encoders of any family as masked language models: their loss, and what their tokens see."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from overture.config.schema import ModelConfig
from overture.data.collate import TokenCollator
from overture.data.masking import MaskingCollator
from overture.errors import ConfigError
from overture.models.build import load_network, position_limit
from overture.models.isolation import prove_encoder
from overture.models.masked_lm import MaskedLM
from overture.tokenizer import load_tokenizer

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "mosaic_bert": TINY,
    "hf_bert": TINY,
    "roberta": TINY,
    "electra": {**TINY, "embedding_size": 24},
}


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def build(family, tokenizer, attention="auto", **more):
    torch.manual_seed(1)
    wanted = ModelConfig(family, False, "float32", attention, {**FAMILIES[family], **more})
    return load_network(wanted, tokenizer, 64, "MaskedLM")


def masked_batch(tokenizer, *rows, length=64):
    rng, given = np.random.default_rng(0), []
    for number, lengths in enumerate(rows):
        ids = rng.integers(3, len(tokenizer), sum(lengths)).astype(np.uint16)
        ends = np.cumsum(lengths).astype(np.uint32)
        row = {"input_ids": ids, "loss_mask": np.ones(len(ids), np.uint8), "document_ends": ends}
        given.append(row | {"sample_id": number, "epoch": 0})
    rows = TokenCollator(length, tokenizer.pad_token_id)
    return MaskingCollator(rows, tokenizer, 0.3, 17, anew=True)(given)


def losses_alone(network, batch):
    """Of each document by itself, as its family has it."""
    found = []
    for ids, labels, starts in zip(
        batch["input_ids"], batch["labels"], batch["document_starts"], strict=True
    ):
        for begin in sorted({*starts.tolist()} - {-1}):
            own = starts == begin
            logits = network(input_ids=ids[own][None]).logits[0]
            chosen = labels[own] != -100
            own_losses = F.cross_entropy(logits[chosen], labels[own][chosen], reduction="none")
            found.append(own_losses)
    return torch.cat(found)


PACKED, PADDED = [(40,), (9, 5, 14), (64,)], [(40,), (11,), (64,)]


@pytest.mark.parametrize(
    ("family", "rows", "attention"),
    [
        *(("mosaic_bert", PACKED, attention) for attention in ("auto", "sdpa", "eager")),
        *(("hf_bert", PACKED, attention) for attention in ("sdpa", "eager")),
        ("roberta", PADDED, "auto"),
        ("electra", PADDED, "auto"),
    ],
)
def test_loss_and_gradients_equal_those_of_each_alone(family, rows, attention, tokenizer):
    network = build(family, tokenizer, attention).eval()
    prove_encoder(network, len(tokenizer), 64, packed=family.endswith("_bert"))
    model = MaskedLM(network, tokenizer, eval_samples=None).eval()
    batch = masked_batch(tokenizer, *rows)
    out, alone = model(batch), losses_alone(network, batch)
    torch.testing.assert_close(out["token_losses"], alone.detach(), atol=1e-5, rtol=1e-5)
    assert out["rows"].tolist() == [r for r, n in enumerate(batch["num_labels"]) for _ in range(n)]
    weights = [p for p in network.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model.loss(out, batch), weights, allow_unused=True)
    theirs = torch.autograd.grad(alone.mean(), weights, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            assert (one - other).abs().max() <= 1e-5 * max(other.abs().max(), 0.1)


def test_positions_that_cannot_begin_anew_are_seen(tokenizer):
    network = build("roberta", tokenizer)
    with pytest.raises(ConfigError, match=r"RobertaForMaskedLM; convert .* --packing none"):
        prove_encoder(network, len(tokenizer), 64, packed=True)
    table = RobertaForMaskedLM(RobertaConfig(vocab_size=50, max_position_embeddings=514, **TINY))
    assert position_limit(table) == 512


def test_padding_that_is_seen_is_refused(tokenizer):
    network = build("hf_bert", tokenizer)
    network.bert.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ConfigError, match="padding changes what the tokens of a BertForMaskedLM"):
        prove_encoder(network, len(tokenizer), 64, packed=False)


def test_logits_that_are_not_those_of_the_head_are_refused(tokenizer):
    network = build("mosaic_bert", tokenizer)

    def shift(module, args, out):
        out.logits = out.logits + out.logits.mean()
        return out

    network.register_forward_hook(shift)
    with pytest.raises(ConfigError, match="are not simply those of its output head"):
        MaskedLM(network, tokenizer, None)


@pytest.mark.parametrize("family", ["mosaic_bert", "hf_bert"])
def test_bfloat16_is_close_and_every_weight_learns(family, tokenizer):
    network, batch = build(family, tokenizer).eval(), masked_batch(tokenizer, (50,), (20,))
    exact, fast = (MaskedLM(network, tokenizer, None, cast).eval() for cast in (False, True))
    losses = [model.loss(model(batch), batch) for model in (exact, fast)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=0.05)
    assert losses[0].item() != losses[1].item()
    losses[1].backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in network.parameters())


def test_flops_count_masked_positions_and_whole_documents(tokenizer):
    network = build("mosaic_bert", tokenizer)
    batch = masked_batch(tokenizer, (40,), (9, 5))
    found = MaskedLM(network, tokenizer, None).flops_of(batch)
    head = network.decoder.weight.numel()
    kinds = network.bert.embeddings.token_type_embeddings.weight.numel()
    layers = sum(p.numel() for p in network.parameters()) - head - kinds
    attention = 3 * 4 * 32 * (40**2 + 9**2 + 5**2) * 2
    assert found == pytest.approx(6 * (layers * 54 + head * sum(batch["num_labels"])) + attention)


def test_what_cannot_be_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="llama is a llama, of which there is none for MaskedLM"):
        load_network(ModelConfig("llama", False), tokenizer, 64, "MaskedLM")
    with pytest.raises(ConfigError, match=r"max_seq_len: 64, but hf_bert has 32 positions"):
        build("hf_bert", tokenizer, max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"hidden_size 30 is no multiple of 4 heads"):
        build("mosaic_bert", tokenizer, hidden_size=30)
    model = MaskedLM(build("mosaic_bert", tokenizer), tokenizer, None)
    with pytest.raises(ConfigError, match="compile: a mosaic_bert has as many tokens as its batch"):
        model.compile_backbone()
    build("mosaic_bert", tokenizer).save_pretrained(tmp_path)
    for changed in ({"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        ((key, value),) = changed.items()
        said = rf"model\.config: {key} {value}, but .* holds a mosaic_bert with {key} {TINY[key]}"
        with pytest.raises(ConfigError, match=said):
            load_network(ModelConfig(str(tmp_path), config=changed), tokenizer, 64, "MaskedLM")
    same = ModelConfig(str(tmp_path), config={"hidden_dropout_prob": 0.0, "hidden_size": 32})
    assert load_network(same, tokenizer, 512, "MaskedLM").config.hidden_dropout_prob == 0.0
