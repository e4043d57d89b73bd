"""Masks: which tokens, how many, and that nothing but seed, epoch and sample decides it."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from overture.config.schema import Config, LoaderConfig, ModelConfig
from overture.data.collate import TokenCollator
from overture.data.loaders import build_loader
from overture.data.masking import MaskingCollator
from overture.data.schema import read_ledger
from overture.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(smoke):
    return load_tokenizer(str(smoke / "tokenizer"))


def masking(tokenizer, share=0.3, seed=17, anew=True, length=128):
    rows = TokenCollator(length, tokenizer.pad_token_id)
    return MaskingCollator(rows, tokenizer, share, seed, anew)


def rows(tokenizer, count, length=100, epoch=0):
    """Ordinary tokens between two special ones."""
    ordinary = np.random.default_rng(0).integers(3, len(tokenizer), (count, length - 2))
    ends = np.full((count, 1), tokenizer.eos_token_id)
    ids = np.concatenate([ends, ordinary, ends], 1).astype(np.uint16)
    fixed = {"loss_mask": np.ones(length, np.uint8), "document_ends": np.uint32([length])}
    more = ({"sample_id": number, "epoch": epoch} for number in range(count))
    return [{"input_ids": one, **fixed, **extra} for one, extra in zip(ids, more, strict=True)]


def test_thirty_in_a_hundred_and_of_these_eight_one_and_one_in_ten(tokenizer):
    given = rows(tokenizer, 400)
    batch = masking(tokenizer)(given)
    before = torch.from_numpy(np.stack([row["input_ids"] for row in given]).astype(np.int64))
    labels, after = batch["labels"][:, :100], batch["input_ids"][:, :100]
    chosen = labels != -100
    assert batch["num_labels"] == chosen.sum(1).tolist() == [round(0.3 * 98)] * 400
    assert batch["num_tokens"] == [100] * 400
    assert torch.equal(labels[chosen], before[chosen])
    assert torch.equal(after[~chosen], before[~chosen])
    assert not chosen[:, [0, 99]].any()
    assert (batch["labels"][:, 100:] == -100).all()
    masked = (after[chosen] == tokenizer.mask_token_id).float().mean().item()
    same = (after[chosen] == before[chosen]).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert same == pytest.approx(0.1, abs=0.02)
    put = after[chosen][(after[chosen] != tokenizer.mask_token_id)]
    assert not np.isin(put.numpy(), tokenizer.all_special_ids).any()
    # Every place is as likely as any other.
    often = chosen[:, 1:99].float().mean(0)
    assert often.mean().item() == pytest.approx(29 / 98)
    assert often.std().item() == pytest.approx((29 / 98 * 69 / 98 / 400) ** 0.5, rel=0.3)


def test_short_rows_have_a_label_and_rows_of_special_tokens_none(tokenizer):
    short, special = rows(tokenizer, 2, length=3)
    special["input_ids"][:] = tokenizer.eos_token_id
    batch = masking(tokenizer, share=0.15)([short, special])
    assert batch["num_labels"] == [1, 0]


def test_masks_follow_from_seed_epoch_and_sample_alone(tokenizer):
    def ids(number, seed=17, epoch=0, anew=True, among=4):
        given = rows(tokenizer, among, epoch=epoch)[number:]
        return masking(tokenizer, seed=seed, anew=anew)(given)["input_ids"][0].tolist()

    assert ids(2) == ids(2, among=7)  # whatever else is in the batch
    assert ids(2) != ids(2, seed=18)
    assert ids(2) != ids(2, epoch=1)
    assert ids(2, anew=False) == ids(2, epoch=1, anew=False) == ids(2)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_workers_do_not_matter(tokenizer, smoke, workers):
    length = read_ledger(smoke / "text" / "train")["max_seq_len"]
    config = Config("masked_lm", ModelConfig("none"), length, "1ep", 8)
    config.data_local = str(smoke / "text")
    loader = LoaderConfig(num_workers=workers)
    batches = build_loader(config, loader, masking(tokenizer, length=length), 8).dataloader

    def epoch():
        return {
            int(number): tuple(ids)
            for batch in batches
            for number, ids in zip(batch["sample_ids"], batch["input_ids"].tolist(), strict=True)
        }

    epochs = [epoch() for _ in range(3)]
    for number, found in enumerate(epochs):
        stream = batches.dataset
        given = [stream[i] | {"epoch": number} for i in sorted(found)]
        again = masking(tokenizer, length=length)(given)["input_ids"].tolist()
        assert [list(found[i]) for i in sorted(found)] == again
    assert all(one != other for one, other in pairwise(epochs))
