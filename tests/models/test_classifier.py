"""Scores against independent computations; the classifier's loss is the family's own."""

import numpy as np
import pytest
import torch

from overture.config.schema import ModelConfig
from overture.data.collate import ClassifyCollator
from overture.errors import ConfigError
from overture.models import scores
from overture.models.build import load_network
from overture.models.classifier import Classifier
from overture.models.isolation import prove_padding
from overture.models.loss import TokenCrossEntropy
from overture.tokenizer import load_tokenizer

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
FAMILIES = {
    "bert": TINY,
    "roberta": {**TINY, "max_position_embeddings": 130},
    "mosaic_bert": TINY,
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "llama": {**TINY, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
}


def labels(count: int) -> dict:
    """What data/labels.py says of so many classes, of 0 for a regression."""
    names = {number: str(number) for number in range(max(count, 1))}
    kind = "single_label_classification" if count else "regression"
    return {"id2label": names, "label2id": {v: k for k, v in names.items()}, "problem_type": kind}


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def build(family: str, tokenizer, classes: int, seed: int = 1):
    torch.manual_seed(seed)
    wanted = ModelConfig(family, False, config=FAMILIES[family])
    return load_network(wanted, tokenizer, 64, "SequenceClassification", labels(classes))


def rows(classes: int, lengths=(9, 30, 17, 41, 3), seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": rng.integers(2, 1000, length).astype(np.uint16),
            "token_type_ids": (np.arange(length) > length // 2).astype(np.uint8),
            "label": np.int32(rng.integers(classes)) if classes else np.float32(rng.normal()),
            "sample_id": number,
        }
        for number, length in enumerate(lengths)
    ]


# ---- scores


@pytest.fixture(params=[2, 3, 7])
def guesses(request) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(request.param)
    targets = rng.integers(request.param, size=200)
    outputs = rng.normal(size=(200, request.param)) + 0.8 * np.eye(request.param)[targets]
    return torch.from_numpy(outputs), torch.from_numpy(targets).double()


def test_scores_of_classes(guesses):
    outputs, targets = guesses
    guessed, true = outputs.argmax(-1).tolist(), targets.long().tolist()
    pairs, classes = list(zip(guessed, true, strict=True)), range(outputs.shape[1])
    assert scores.accuracy(*guesses).item() == sum(g == t for g, t in pairs) / len(pairs)
    each = []
    for name in classes:
        hits = sum(g == t == name for g, t in pairs)
        precision = hits / max(guessed.count(name), 1)
        recall = hits / max(true.count(name), 1)
        each.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    expected = each[1] if len(each) == 2 else sum(each) / len(each)
    assert scores.f1(*guesses).item() == pytest.approx(expected)
    # The correlation of the two tables of indicators, as Gorodkin defines it.
    one, other = (
        np.eye(len(classes))[x] - np.eye(len(classes))[x].mean(0) for x in (guessed, true)
    )
    expected = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    assert scores.matthews(*guesses).item() == pytest.approx(expected)
    if len(classes) == 2:
        binary = np.corrcoef(guessed, true)[0, 1]
        assert scores.matthews(*guesses).item() == pytest.approx(binary)


def test_scores_of_numbers_with_ties():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 12, 150) / 2.0
    outputs = np.round(targets + rng.normal(size=150), 1)
    given = torch.from_numpy(outputs)[:, None], torch.from_numpy(targets)
    assert scores.pearson(*given).item() == pytest.approx(np.corrcoef(outputs, targets)[0, 1])
    ranks = [[sum(v < x for v in x_s) + (sum(v == x for v in x_s) + 1) / 2 for x in x_s]
             for x_s in (outputs, targets)]  # fmt: skip
    assert scores.spearman(*given).item() == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_scores_where_all_guesses_are_alike():
    outputs, targets = torch.tensor([[0.0, 1.0]] * 8).double(), torch.tensor([1.0] * 5 + [0.0] * 3)
    assert scores.matthews(outputs, targets.double()).item() == 0
    assert scores.accuracy(outputs, targets.double()).item() == 5 / 8
    assert scores.pearson(outputs, targets.double()).item() == 0
    assert scores.spearman(outputs, targets.double()).item() == 0


def test_a_repeated_sample_counts_once(guesses):
    outputs, targets = guesses
    metric = scores.EvalScore(scores.matthews, 200, outputs.shape[1])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for ids in (order[:90], order[90:], order[:31]):
        metric.update(outputs[ids], targets[ids], ids)
    assert metric.compute().item() == pytest.approx(scores.matthews(*guesses).item())


def test_scores_that_do_not_fit():
    assert list(scores.choose_scores(None, regression=True)) == ["pearson", "spearman"]
    assert list(scores.choose_scores(["f1"], regression=False)) == ["f1"]
    with pytest.raises(ConfigError, match="metrics: accuracy does not fit data whose labels are n"):
        scores.choose_scores(["accuracy"], regression=True)


# ---- batches and models


def test_batches_have_few_lengths_and_the_counts_that_guards_read():
    collate, given = ClassifyCollator(64, 1), rows(3)
    batch = collate(given)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 48)
    assert batch["num_tokens"] == [9, 30, 17, 41, 3] == batch["attention_mask"].sum(1).tolist()
    assert batch["num_labels"] == batch["num_spans"] == [1] * 5
    for number, row in enumerate(given):
        length = len(row["input_ids"])
        assert batch["input_ids"][number, :length].tolist() == row["input_ids"].tolist()
        assert set(batch["input_ids"][number, length:].tolist()) <= {1}
        assert batch["token_type_ids"][number, :length].tolist() == row["token_type_ids"].tolist()
    assert batch["labels"].tolist() == [row["label"] for row in given]
    assert {collate(rows(2, (n,)))["input_ids"].shape[1] for n in range(1, 65)} == set(
        range(8, 65, 8)
    )
    assert ClassifyCollator(2, 0)(rows(2, (1, 2)))["input_ids"].shape == (2, 2)


@pytest.mark.parametrize("classes", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_familys_own(family, classes, tokenizer):
    network = build(family, tokenizer, classes).eval()
    prove_padding(network, len(tokenizer), 64, packed=False)
    model = Classifier(network, tokenizer, eval_samples=5).eval()
    given = rows(classes)
    takes = ["input_ids", "token_type_ids"][: 1 + ("bert" in family and family != "distilbert")]
    batch = ClassifyCollator(64, tokenizer.pad_token_id)(given)
    with torch.no_grad():
        outputs = model(batch)
        for number, row in enumerate(given):  # each alone, without padding
            columns = {name: torch.from_numpy(row[name].astype(np.int64))[None] for name in takes}
            theirs = network(**columns, labels=batch["labels"][number : number + 1])
            assert outputs["losses"][number].item() == pytest.approx(theirs.loss.item(), abs=1e-5)
            logits = outputs["outputs"][number].tolist()
            assert logits == pytest.approx(theirs.logits[0].tolist(), abs=1e-5)
    metrics = model.get_metrics(is_train=False)
    assert isinstance(metrics["TokenCrossEntropy"], TokenCrossEntropy)
    for metric in metrics.values():
        model.update_metric(batch, outputs, metric)
    mean = outputs["losses"].mean().item()
    assert metrics["TokenCrossEntropy"].compute().item() == pytest.approx(mean)
    assert model.loss(outputs, batch).item() == pytest.approx(mean)
    if classes:
        assert network.config.num_labels == classes
        right = (outputs["outputs"].argmax(-1) == batch["labels"]).float().mean().item()
        assert metrics["accuracy"].compute().item() == pytest.approx(right)


def test_an_encoder_with_a_decoder_is_refused(tokenizer):
    wanted = ModelConfig("bart", False, config={"d_model": 32})
    with pytest.raises(
        ConfigError, match="bart is a bart, an encoder with a decoder; task classif"
    ):
        load_network(wanted, tokenizer, 64, "SequenceClassification", labels(2))


def test_a_model_that_sees_padding_is_refused(tokenizer):
    network = build("bert", tokenizer, 2)
    forward = network.forward
    network.forward = lambda input_ids, attention_mask: forward(input_ids=input_ids)
    with pytest.raises(ConfigError, match="padding changes what a BertForSequenceClassification"):
        prove_padding(network, len(tokenizer), 64, packed=False)


def test_head_of_another_size_is_made_anew_and_other_sizes_are_refused(tokenizer, tmp_path):
    build("bert", tokenizer, 3).save_pretrained(tmp_path / "three")
    wanted, head = ModelConfig(str(tmp_path / "three")), "SequenceClassification"
    same = load_network(wanted, tokenizer, 64, head, labels(3))
    assert same.made_anew == []
    other = load_network(wanted, tokenizer, 64, head, labels(2))
    assert other.made_anew == ["classifier.bias", "classifier.weight"]
    assert other.classifier.weight.shape == (2, 32)
    assert 0 < other.classifier.weight.std() < 0.1
    torch.testing.assert_close(other.bert.pooler.dense.weight, same.bert.pooler.dense.weight)
    wanted.config = {"hidden_size": 16}
    with pytest.raises(ConfigError, match=r"hidden_size 16, but .* with hidden_size 32"):
        load_network(wanted, tokenizer, 64, head, labels(3))
    wanted.config = {"num_labels": 5}
    with pytest.raises(ConfigError, match="num_labels: 5, but the labels of the data are 3 cl"):
        load_network(wanted, tokenizer, 64, head, labels(3))
