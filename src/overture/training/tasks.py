"""What each task asks of the recipe, beside what all of them share: a row for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from overture.config.schema import Config
from overture.data.collate import TokenCollator
from overture.data.collate_classify import ClassifyCollator
from overture.models.causal_lm import CausalLM
from overture.models.classifier import Classifier
from overture.models.isolation import prove_isolation, prove_padding


class Task(NamedTuple):
    """A row of TASKS."""

    head: str  # of transformers: AutoModelFor<head>
    # (network, ids below, tokens of the longest row, whether rows are packed): ConfigError unless
    # tokens see what they may and nothing else
    prove: Callable[[Any, int, int, bool], None]
    # (config, network, tokenizer, samples of the eval split, whether a CPU casts to bfloat16) ->
    # the model that Composer's Trainer takes
    model: Callable[[Config, Any, Any, int | None, bool], Any]
    # (config, tokenizer, whether to train on it) -> rows of a split to a batch
    collator: Callable[[Config, Any, bool], Callable]


def _causal_rows(config: Config, tokenizer: Any, training: bool) -> TokenCollator:
    return TokenCollator(config.max_seq_len, tokenizer.pad_token_id)


def _causal_model(config: Config, *parts: Any) -> CausalLM:
    return CausalLM(*parts)


def _whole_rows(config: Config, tokenizer: Any, training: bool) -> ClassifyCollator:
    return ClassifyCollator(config.max_seq_len, tokenizer.pad_token_id)


def _classifier(config: Config, *parts: Any) -> Classifier:
    return Classifier(*parts, config.metrics)


_CAUSAL = Task("CausalLM", prove_isolation, _causal_model, _causal_rows)
_CLASSIFY = Task("SequenceClassification", prove_padding, _classifier, _whole_rows)
TASKS: dict[str, Task] = {"causal_lm": _CAUSAL, "instruct": _CAUSAL, "classify": _CLASSIFY}
