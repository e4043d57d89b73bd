"""Answers to held-out prompts before and after training, and how good they are."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from composer.utils import dist

from overture.callbacks.run_log import RunLog
from overture.config.schema import Config, GenerationConfig
from overture.data.encode import special_tokens
from overture.data.schema import ANSWERS, write_aside
from overture.errors import ConfigError
from overture.generate import answer_together, end_tokens

# Ids of a prompt, of the answer with its end, and all that would be right, where that is known.
Pairs = list[tuple[list[int], list[int], list[str] | None]]


def held_out_prompts(dataset: Any, count: int, longest: int = 2**31) -> Pairs:
    """Return the pairs of an instruct or chat split, of prompts of up to `longest` tokens.

    The answer is the last stretch that is learned; all before it is the prompt.
    """
    pairs: Pairs = []
    for index in range(dataset.num_samples):
        row = dataset[index]
        borders = row["document_ends"][:-1]
        documents = (np.split(row[name], borders) for name in ("input_ids", "loss_mask"))
        right = json.loads(row[ANSWERS]) if ANSWERS in row else [None] * (len(borders) + 1)
        for ids, mask, known in zip(*documents, right, strict=True):
            if not mask.any():
                continue
            end = int(np.flatnonzero(mask)[-1]) + 1
            begin = end - int((mask[:end][::-1] == 0).argmax() or end)
            if 0 < begin <= longest:
                pairs.append((ids[:begin].tolist(), ids[begin:end].tolist(), known))
            if len(pairs) == count:
                return pairs
    return pairs


class HeldOutAnswers:
    """Asks the model the first prompts of the eval split `dataset`.

    Ranks share the work. Prompts that leave no room for an answer in the model's `positions` are
    passed over; ConfigError if all of them are.
    """

    COUNT = "exact_match_prompts"
    pairs = staticmethod(held_out_prompts)

    def __init__(
        self, dataset: Any, tokenizer: Any, config: GenerationConfig, positions: int
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        pairs = self.pairs(dataset, config.num_prompts, positions - config.max_new_tokens)
        if not pairs:
            fault = f"{config.max_new_tokens} leave no room for a prompt in the model's {positions}"
            raise ConfigError(f"generation.max_new_tokens: {fault} positions")
        self._ids = [prompt for prompt, *_ in pairs]
        self._right = [known for *_, known in pairs]
        self._ends = {expected[-1] for _, expected, _ in pairs}  # of a chat it is no EOS
        self.prompts = tokenizer.batch_decode(self._ids, skip_special_tokens=True)
        # A chat's turn may end in two special tokens. What the tokenizer does not know is one too,
        # but stays: no answer has it, and left out of both it would look right.
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.pad_token_id}
        marks = {*special_tokens(tokenizer).values()} - unknown
        texts = [[n for n in expected[:-1] if n not in marks] for _, expected, _ in pairs]
        self.expected = tokenizer.batch_decode(texts)
        self.enough: Callable[[], bool] = bool  # asked before each batch; bool() is False
        self.before: list[str] = []
        self.after: list[str] = []

    def ask(self, model: Any, title: str) -> list[str]:
        """Return the model's answers, in the order of the prompts, on every rank."""
        config = self.config
        options = {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
        options["eos_token_id"] = sorted({*(end_tokens(model, self.tokenizer) or ()), *self._ends})
        how = self._ids, config.batch_size, title
        return answer_together(model, self.tokenizer, *how, enough=self.enough, **options)[0]

    def recall(self, path: Path) -> None:
        """Take the answers before training from where an earlier part of the run kept them."""
        kept = json.loads(path.read_text("utf-8")) if path.is_file() else []
        kept = dist.all_gather_object(kept)[0]  # of rank zero's disk
        self.before = kept if len(kept) == len(self.prompts) else []

    def write(self, path: Path) -> dict[str, float]:
        """Write one line per prompt and return the scores, after training and, known, before it."""
        names = ("prompt", "expected", *["before"] * bool(self.before), "after")
        columns = zip(*(getattr(self, f"{n}s" * (n == "prompt") or n) for n in names), strict=True)
        rows = [dict(zip(names, row, strict=True)) for row in columns]
        for row, right in zip(rows, self._right, strict=True):
            found = {f"exact_{n}": score(row[n], row["expected"], right)[0] for n in names[2:]}
            row |= found if right is None else {**found, "answers": right}
        write_aside(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        told = {when: self.scores(getattr(self, when)) for when in names[2:]}
        scores = {f"{name}_{when}": told[when][name] for name in told["after"] for when in told}
        return {**scores, self.COUNT: len(rows)}

    def scores(self, answers: list[str]) -> dict[str, float]:
        """Return how good answers are, by names, as shares of what could be."""
        pairs = zip(answers, self.expected, self._right, strict=True)
        exact, f1 = zip(*(score(*pair) for pair in pairs), strict=True)
        return {"exact_match": fmean(exact), "character_f1": fmean(f1)}


class Translations(HeldOutAnswers):
    """Those of an encoder-decoder, scored by sacrebleu, at every evaluation too."""

    COUNT = "bleu_sentences"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # What a run does, if it was asked to stop, with an evaluation that is broken off.
        self.break_off: Callable[[], None] = lambda: None
        from sacrebleu.metrics import BLEU, CHRF

        name = self.config.bleu_tokenize or ("char" if _has_no_spaces(self.expected) else "13a")
        self.tokenize = name
        try:
            # Beforehand: it would only say so when all is translated.
            self._metrics = {"bleu": BLEU(tokenize=name), "chrf": CHRF()}
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"generation.bleu_tokenize: {name}: {reason}") from None

    @staticmethod
    def pairs(dataset: Any, count: int, longest: int) -> Pairs:
        rows = [dataset[n] for n in range(min(count, dataset.num_samples) if longest > 0 else 0)]
        return [(row["input_ids"].tolist(), row["labels"].tolist(), None) for row in rows]

    def scores(self, answers: list[str]) -> dict[str, float]:
        texts, expected = [a.strip() for a in answers], [[e.strip() for e in self.expected]]
        return {n: m.corpus_score(texts, expected).score for n, m in self._metrics.items()}

    def judge(self, model: Any, log: RunLog) -> dict[str, float]:
        """Return the scores of what the model makes of the prompts now, and `log` some of it."""
        step, answers = log.step, self.ask(model, "translations")
        self.break_off()
        rows = zip(self.prompts, answers, self.expected, strict=True)
        count = 3 if self.config.num_shown is None else self.config.num_shown
        for prompt, text, truth in list(rows)[:count]:
            log.note(step, f"{prompt} -> {text} (expected: {truth})", "translation")
        return self.scores(answers)


def held_out_answers(
    config: Config, dataset: Any, tokenizer: Any, positions: int
) -> HeldOutAnswers:
    """Return what asks a config's held-out prompts, by its task; raises as HeldOutAnswers does."""
    kind = Translations if config.task == "seq2seq" else HeldOutAnswers
    return kind(dataset, tokenizer, config.generation, positions)


def _has_no_spaces(texts: list[str]) -> bool:
    """Return whether most letters are kana or Chinese, of languages that put no spaces."""
    letters = [c for text in texts for c in text if c.isalpha()]
    return 2 * sum("\u3040" <= c <= "\u9fff" for c in letters) > len(letters)


def score(answer: str, expected: str, right: list[str] | None = None) -> tuple[bool, float]:
    """Return whether an answer is exact, and the F1 of its characters.

    F1 is the harmonic mean of the shares of one's characters that are the other's too, each as
    often (Kurihara et al. 2022, "JGLUE", section 5.2; Rajpurkar et al. 2016, 1606.05250, have
    words), in small letters, without full stops at the end, white space made one space. Where all
    the answers that are `right` are known, both are as JGLUE has them: the best with any of them,
    exact if the same in that form. Else an exact one is the same but for white space at its ends.
    `expected`, one of them, is as a tokenizer gives it back.
    """
    said, known = _plain(answer), [*map(_plain, [expected, *(right or ())])]
    exact = answer.strip() == expected.strip() if right is None else said in known
    return exact, max(_f1(said, text) for text in known)


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().rstrip("。").split())


def _f1(ours: str, theirs: str) -> float:
    common, total = (Counter(ours) & Counter(theirs)).total(), len(ours) + len(theirs)
    return 2 * common / total if total else 1.0
