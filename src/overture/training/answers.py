"""Greedy answers to held-out prompts before and after training, and how many are exactly right."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from composer.utils import dist

from overture.config.schema import GenerationConfig
from overture.data.schema import write_aside
from overture.errors import ConfigError
from overture.generate import answer


class HeldOutAnswers:
    """Asks the model the first prompts of the eval split `dataset`, which is an instruct one.

    Ranks share the work. Prompts that leave no room for an answer in the model's `positions` are
    passed over; ConfigError if all of them are.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, config: GenerationConfig, positions: int
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        longest = positions - config.max_new_tokens
        pairs = held_out_prompts(dataset, config.num_prompts, longest)
        if not pairs:
            fault = f"{config.max_new_tokens} leave no room for a prompt in the model's {positions}"
            raise ConfigError(f"generation.max_new_tokens: {fault} positions")
        self._ids = [prompt for prompt, _ in pairs]
        self.prompts = tokenizer.batch_decode(self._ids, skip_special_tokens=True)
        self.expected = tokenizer.batch_decode([answer for _, answer in pairs])
        self.before: list[str] = []
        self.after: list[str] = []

    def ask(self, model: Any, title: str) -> list[str]:
        """Return the model's greedy answers, in the order of the prompts, on every rank."""
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        mine, batch = self._ids[rank::ranks], self.config.batch_size
        longest = self.config.max_new_tokens
        answers = [""] * len(self._ids)
        found, _ = answer(model, self.tokenizer, mine, batch, title, max_new_tokens=longest)
        for share, part in enumerate(dist.all_gather_object(found)):
            answers[share::ranks] = part
        return answers

    def write(self, path: Path) -> dict[str, float]:
        """Write one line per prompt and return the exact-match scores."""
        names = ("prompt", "expected", "before", "after")
        columns = zip(self.prompts, self.expected, self.before, self.after, strict=True)
        rows = [dict(zip(names, row, strict=True)) for row in columns]
        scores: dict[str, float] = {}
        for when in ("before", "after"):
            for row in rows:
                row[f"exact_{when}"] = is_exact(row[when], row["expected"])
            scores[f"exact_match_{when}"] = sum(r[f"exact_{when}"] for r in rows) / len(rows)
        write_aside(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        return {**scores, "exact_match_prompts": len(rows)}


def held_out_prompts(
    dataset: Any, count: int, longest: int = 2**31
) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, answer ids without EOS) of a split, of prompts of up to `longest`."""
    pairs = []
    for index in range(dataset.num_samples):
        row = dataset[index]
        borders = row["document_ends"][:-1]
        documents = (np.split(row[name], borders) for name in ("input_ids", "loss_mask"))
        for ids, mask in zip(*documents, strict=True):
            prompt, answer = ids[mask == 0].tolist(), ids[mask == 1].tolist()
            if len(prompt) <= longest:
                pairs.append((prompt, answer[:-1]))
            if len(pairs) == count:
                return pairs
    return pairs


def is_exact(answer: str, expected: str) -> bool:
    """Return whether two answers are the same but for white space at their ends."""
    return answer.strip() == expected.strip()
