"""Greedy answers to held-out prompts, and how many are exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


def held_out_prompts(
    dataset: Any, count: int, longest: int = 2**31
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, answer ids without EOS) of the first documents of an instruct split.

    Prompts of more than `longest` tokens are passed over.
    """
    pairs = []
    for index in range(dataset.num_samples):
        row = dataset[index]
        starts = np.concatenate([[0], row["document_ends"][:-1]]).astype(int)
        for start, end in zip(starts, row["document_ends"].astype(int), strict=True):
            ids, learned = row["input_ids"][start:end], row["loss_mask"][start:end].astype(bool)
            if (~learned).sum() > longest:
                continue
            pairs.append((ids[~learned].tolist(), ids[learned][:-1].tolist()))
            if len(pairs) == count:
                return pairs
    return pairs


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    title: str,
) -> list[str]:
    """Return the greedy continuation of each prompt as text, special tokens left out."""
    was_training = model.training
    model.eval()
    answers = [""] * len(prompts)
    # Prompts of like length together: less padding, and the answers go back to their places.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    try:
        for batch in tqdm(batches, desc=title, unit=" batches", delay=2, leave=False):
            longest = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):  # padded on the left, so that answers start together
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, longest - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers


def is_exact(answer: str, expected: str) -> bool:
    """Return whether two answers are the same but for white space at their ends."""
    return answer.strip() == expected.strip()
