"""Answers to held-out prompts before and after training: shown, and scored by exact match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from composer.utils import dist

from overture.config.schema import GenerationConfig
from overture.data.schema import write_aside
from overture.errors import ConfigError
from overture.generate import greedy_answers, held_out_prompts, is_exact


class HeldOutAnswers:
    """Asks the model the first prompts of the eval split; ranks share the work.

    Args:
        dataset: the eval split, an instruct one.
        tokenizer: turns ids into text.
        config: how many prompts, and how long an answer may be.
        positions: of the model; prompts that leave no room for an answer are passed over.
    """

    def __init__(
        self, dataset: Any, tokenizer: Any, config: GenerationConfig, positions: int
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        longest = positions - config.max_new_tokens
        pairs = held_out_prompts(dataset, config.num_prompts, longest)
        if not pairs:
            raise ConfigError(
                f"generation.max_new_tokens: {config.max_new_tokens} leave no room for a prompt in "
                f"the model's {positions} positions"
            )
        self._ids = [prompt for prompt, _ in pairs]
        self.prompts = tokenizer.batch_decode(self._ids, skip_special_tokens=True)
        self.expected = tokenizer.batch_decode([answer for _, answer in pairs])
        self.before: list[str] = []
        self.after: list[str] = []

    def ask(self, model: Any, title: str) -> list[str]:
        """Return the model's greedy answers, in the order of the prompts, on every rank."""
        rank, ranks = dist.get_global_rank(), dist.get_world_size()
        mine = greedy_answers(
            model,
            self.tokenizer,
            self._ids[rank::ranks],
            self.config.max_new_tokens,
            self.config.batch_size,
            title,
        )
        answers = [""] * len(self._ids)
        for share, part in enumerate(dist.all_gather_object(mine)):
            answers[share::ranks] = part
        return answers

    def write(self, path: Path) -> dict[str, float]:
        """Write one line per prompt and return the exact-match scores."""
        rows = []
        for row in zip(self.prompts, self.expected, self.before, self.after, strict=True):
            prompt, expected, before, after = row
            rows.append(
                {
                    "prompt": prompt,
                    "expected": expected,
                    "before": before,
                    "after": after,
                    "exact_before": is_exact(before, expected),
                    "exact_after": is_exact(after, expected),
                }
            )
        write_aside(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        return {
            "exact_match_before": sum(r["exact_before"] for r in rows) / len(rows),
            "exact_match_after": sum(r["exact_after"] for r in rows) / len(rows),
            "exact_match_prompts": len(rows),
        }
