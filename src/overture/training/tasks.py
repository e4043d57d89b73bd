"""What each task asks of the recipe, beside what all of them share: a row for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from overture.config.schema import Config
from overture.data.collate import ClassifyCollator, PairCollator, TokenCollator
from overture.data.masking import MaskingCollator
from overture.errors import ConfigError
from overture.models.causal_lm import CausalLM
from overture.models.classifier import Classifier
from overture.models.isolation import prove_encoder, prove_isolation, prove_padding
from overture.models.masked_lm import MaskedLM
from overture.models.seq2seq import Seq2SeqLM


class Task(NamedTuple):
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


def _masked_rows(config: Config, tokenizer: Any, training: bool) -> MaskingCollator:
    if tokenizer.mask_token_id is None:
        fault = f"tokenizer_name: {tokenizer.name_or_path} has no mask token"
        raise ConfigError(f"{fault}, which task masked_lm puts in; use a tokenizer that has one")
    loader = config.train_loader if training else config.eval_loader
    share = loader.dataset.mlm_probability or (0.3 if training else 0.15)
    rows = _causal_rows(config, tokenizer, training)
    seed = config.seed if training else 17  # so that runs of several seeds are asked the same
    return MaskingCollator(rows, tokenizer, share, seed, anew=training)


def _pairs(config: Config, tokenizer: Any, training: bool) -> PairCollator:
    together = config.device_train_microbatch_size if training else config.device_eval_batch_size
    together = config.global_train_batch_size if together == "auto" else together
    return PairCollator(tokenizer.pad_token_id, together)


_CAUSAL = Task("CausalLM", prove_isolation, lambda _, *parts: CausalLM(*parts), _causal_rows)
TASKS: dict[str, Task] = {
    "causal_lm": _CAUSAL,
    "masked_lm": Task("MaskedLM", prove_encoder, lambda _, *parts: MaskedLM(*parts), _masked_rows),
    "instruct": _CAUSAL,
    "chat": _CAUSAL,
    "seq2seq": Task(
        "Seq2SeqLM", prove_padding,
        lambda config, *parts: Seq2SeqLM(*parts, smoothing=config.label_smoothing), _pairs,
    ),
    "classify": Task(
        "SequenceClassification", prove_padding,
        lambda config, *parts: Classifier(*parts, config.metrics),
        lambda config, tokenizer, _: ClassifyCollator(config.max_seq_len, tokenizer.pad_token_id),
    ),
}  # fmt: skip
