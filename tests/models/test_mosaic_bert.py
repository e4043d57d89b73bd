"""MosaicBERT against a naive reading of its paper, and as transformers knows models."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from overture.models.attention import NAME, choose_attention
from overture.models.mosaic_bert.model import (
    LowPrecisionLayerNorm,
    MosaicBertConfig,
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
    MosaicBertModel,
    alibi_slopes,
    register_mosaic_bert,
)
from overture.models.mosaic_bert.unpadding import STEP, unpad

SHAPE = {
    "vocab_size": 90, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "hidden_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
ROUTES = [NAME, "sdpa", "eager"]


def build(kind=MosaicBertModel, attention=NAME, **more):
    choose_attention("auto", MosaicBertModel)  # makes ours known
    torch.manual_seed(0)
    model = kind(MosaicBertConfig(**{**SHAPE, **more}, attn_implementation=attention))
    with torch.no_grad():  # biases and norms that do something
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def naive(model: MosaicBertModel, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states [tokens, width] of one document, spelled out."""
    shape, embeddings = model.config, model.embeddings
    heads, size = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads
    x = embeddings.word_embeddings.weight[ids] + embeddings.token_type_embeddings.weight[0]
    x = norm(x, embeddings.norm)
    for layer in model.layers:
        inner = layer.attention
        query, key, value = (x @ inner.projection.weight.T + inner.projection.bias).chunk(3, -1)
        mixed = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = query[:, part] @ key[:, part].T / math.sqrt(size)
            slope = alibi_slopes(heads)[head]
            bias = [[-slope * abs(i - j) for j in range(len(x))] for i in range(len(x))]
            shares = torch.softmax(scores + torch.tensor(bias), -1)
            mixed.append(shares @ value[:, part])
        x = norm(x + inner.dense(torch.cat(mixed, -1)), layer.attention_norm)
        gate, up = (x @ layer.mlp.gated.weight.T).chunk(2, -1)
        x = norm(x + layer.mlp.dense(F.gelu(gate) * up), layer.mlp_norm)
    return x


def norm(x, layer):
    spread = (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * layer.weight + layer.bias


def documents():
    """Rows of 150 with one document, several, and padding; and each document's place in them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (4, 150), generator=generator)
    starts = torch.full((4, 150), -1, dtype=torch.int32)
    places = []
    for row, lengths in enumerate([(7,), (150,), (130, 5, 11), (60, 20)]):
        begin = 0
        for length in lengths:
            starts[row, begin : begin + length] = begin
            places.append((row, begin, begin + length))
            begin += length
    return ids, starts, places


@pytest.mark.parametrize("attention", ROUTES)
@pytest.mark.parametrize("counted", [False, True])
def test_unpadded_padded_and_naive_are_equal_forward_and_backward(attention, counted):
    model = build(attention=attention)
    ids, starts, places = documents()
    counts = {"num_tokens": 383, "num_documents": 7} if counted else {}
    out = model(ids, document_starts=starts, **counts).last_hidden_state
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    weights = [p for n, p in model.named_parameters() if "pooler" not in n]
    ours = torch.autograd.grad((out * pull)[starts >= 0].sum(), weights)
    total = 0.0
    for row, begin, end in places:
        alone = naive(model, ids[row, begin:end])
        torch.testing.assert_close(out[row, begin:end], alone, atol=1e-5, rtol=1e-5)
        total = total + (alone * pull[row, begin:end]).sum()
    for one, other in zip(ours, torch.autograd.grad(total, weights), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_nothing_is_computed_on_padding():
    model, rows = build(), []
    model.layers[0].mlp.register_forward_hook(lambda module, given, out: rows.append(out.shape))
    ids, starts, _ = documents()
    out = model(ids, document_starts=starts).last_hidden_state
    assert rows == [(1, 384, 24)]  # of 600 places 383 hold tokens
    assert (out[starts < 0] == 0).all()
    model(ids[:, :20])
    assert rows[1] == (4, 20, 24)  # no padding: the rows as they are


def test_tokens_end_to_end_and_where_their_documents_begin():
    starts = torch.tensor([[0, 0, 2, -1, -1], [0, -1, -1, -1, -1], [0, 0, 0, 0, 4]] * 16)
    found = unpad(starts.to(torch.int32), 144, 80)
    real = [3 * 5 * g + p for g in range(16) for p in (0, 1, 2, 5, 10, 11, 12, 13, 14)]
    assert found.places.tolist()[:144] == real
    assert len(found.places) % STEP == 0
    first = found.mask[0, 0, 0].tolist()
    assert first[:12] == [0, 0, 2, 3, 4, 4, 4, 4, 8, 9, 9, 11]
    assert first[144:] == [-1] * (len(first) - 144)
    assert found.mask.__dict__["spans"] == 81


@pytest.mark.parametrize("rows", [2, 3])  # two of 32 are no more tokens than what is filled up to
def test_padding_before_and_between_tokens_counts_in_no_distance(rows):
    model, ids = build().eval(), torch.randint(0, 90, (rows, 32))
    mask = torch.ones(rows, 32, dtype=torch.long)
    mask[1, :5] = 0
    mask[0, 7:11] = 0
    out = model(ids, mask).last_hidden_state
    for row in range(rows):
        own = mask[row].bool()
        alone = model(ids[row, own][None]).last_hidden_state[0]
        torch.testing.assert_close(out[row, own], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("left", [False, True])
def test_masks_of_hugging_face_are_understood(left):
    model = build(MosaicBertForSequenceClassification, num_labels=3)
    model.eval()
    ids, lengths = torch.randint(0, 90, (3, 100)), (100, 30, 41)
    mask = torch.zeros(3, 100, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 100 - length if left else 0 : 100 if left else length] = 1
    kinds = torch.randint(0, 2, (3, 100))
    out = model.bert(ids, mask, kinds).last_hidden_state
    for row in range(3):
        own = mask[row].bool()
        alone = model.bert(ids[row, own][None], None, kinds[row, own][None]).last_hidden_state
        torch.testing.assert_close(out[row, own], alone[0], atol=1e-5, rtol=1e-5)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}
    found = model(**given, labels=torch.tensor([0, 2, 1]))
    assert found.logits.shape == (3, 3)
    expected = F.cross_entropy(found.logits, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(found.loss, expected)
    assert isinstance(model(**given, return_dict=False), tuple)
    with pytest.raises(ValueError, match=r"attention_mask is \[3, 1, 100, 100\]"):
        model(ids, mask[:, None, None].expand(3, 1, 100, 100))


@pytest.mark.parametrize("heads", [8, 12])
def test_slopes_are_those_of_the_paper(heads):
    eighths = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    more = [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5][: heads - 8]
    assert alibi_slopes(heads) == pytest.approx(eighths + more)


def test_saved_and_loaded_as_any_model(tmp_path):
    register_mosaic_bert()
    model = build(MosaicBertForMaskedLM).eval()
    ids = torch.randint(0, 90, (2, 40))
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert isinstance(again, MosaicBertForMaskedLM)
    assert again.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again.config.vocab_size == len(again.decoder.weight) == 128
    labels = torch.full((2, 40), -100)
    labels[0, 3] = 5
    expected = F.cross_entropy(model(ids).logits[0, 3:4], torch.tensor([5]))
    torch.testing.assert_close(again(ids, labels=labels).loss, expected)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "small")
    small = AutoModelForMaskedLM.from_pretrained(tmp_path / "small", attn_implementation=NAME)
    assert torch.equal(model(ids).logits, small(ids).logits)
    assert small.config.vocab_size == 100
    classes, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=4, output_loading_info=True
    )
    assert {name.split(".")[-2] for name in info["missing_keys"]} == {"pooler", "classifier"}
    one, other = (m.bert.layers[1].mlp.gated.weight for m in (classes, model))
    assert torch.equal(one, other)


def test_trainer_of_transformers_takes_it(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]} for _ in range(4)]
    trainer = Trainer(build(MosaicBertForMaskedLM), arguments, train_dataset=rows)
    assert trainer.train().training_loss > 0


def test_what_is_recomputed_is_the_same():
    model = build(MosaicBertForMaskedLM, hidden_dropout_prob=0.1)
    ids, starts, _ = documents()

    def gradients():
        torch.manual_seed(5)
        out = model(ids, document_starts=starts).logits[starts >= 0].square().mean()
        return torch.autograd.grad(out, list(model.parameters()))

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_norms_are_bfloat16_where_autocast_is_and_close():
    layer, x = LowPrecisionLayerNorm(64), torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(low.float(), layer(x), atol=0.03, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        model = build()
        out = model(documents()[0]).last_hidden_state
    assert out.dtype == torch.bfloat16
    exact = model(documents()[0]).last_hidden_state
    assert (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_of_128_runs_at_512():
    model = build()
    ids = torch.randint(0, 90, (1, 512))
    torch.testing.assert_close(model(ids).last_hidden_state[0], naive(model, ids[0]),
                               atol=2e-5, rtol=1e-4)  # fmt: skip
